import json
from contextlib import nullcontext

import pytest
import torch

import bounds
import legato
import serial_recurrence as serial
import throughput
from legato.ops import backends
from measure import interleave


def run(capsys, *words):
    """Exit status, standard output and standard error of the command."""
    status = throughput.main([*map(str, words)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def trained(network, dtype, context):
    """Output and all gradients of a two-layer network over 2 x 33 steps."""
    torch.manual_seed(0)
    model = legato.Stack.of(network.layer, 3, 5, num_layers=2, **network.options).to(dtype)
    x, weight = torch.randn(2, 33, 3), torch.randn(2, 33, 5)
    with context:
        output, _ = model(x.to(dtype))
        output.backward(weight.to(dtype))
    return [output, *(parameter.grad for parameter in model.parameters())]


def assert_as_exact(got, run, *tensors):
    """4 roundings of a gate or sums of at most 16 products, through 63 steps."""
    bounds.assert_agrees(got, run, *tensors, terms=16 * 63)


def test_candidates_take_turns_and_the_warm_up_is_not_counted():
    order = []
    times = interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2, warmup=1)
    assert "".join(order) == "ab" + "abab"
    assert times["a"]["rounds"] == times["b"]["rounds"] == 2
    assert times["a"]["min_ms"] <= times["a"]["median_ms"] <= times["a"]["max_ms"]


def test_a_candidate_beyond_patience_is_timed_once():
    order = []
    times = interleave({"a": lambda: order.append("a")}, rounds=3, warmup=2, patience=1e-12)
    assert order == ["a"]
    assert times["a"]["rounds"] == 1


@pytest.mark.parametrize("reverse", [False, True])
def test_the_loop_computes_the_recurrence_and_its_gradients(reverse):
    torch.manual_seed(0)
    inputs = [torch.rand(2, 63, 4), torch.randn(2, 63, 4), torch.randn(2, 4)]
    weights = [torch.randn(2, 63, 4), torch.randn(2, 4)]

    def results(inputs, weights):
        leaves = [x.detach().requires_grad_() for x in inputs]
        outputs = legato.linear_recurrence(*leaves, reverse=reverse)
        return [*outputs, *torch.autograd.grad(outputs, leaves, weights)]

    with serial.looped():
        got = results(inputs, weights)
    assert_as_exact(got, results, inputs, weights)


@pytest.mark.parametrize("name", list(throughput.NETWORKS))
def test_a_looped_network_runs_the_loop_and_agrees(name, monkeypatch):
    calls, loop = [], serial._forward
    monkeypatch.setattr(serial, "_forward", lambda *arguments: calls.append(1) or loop(*arguments))
    network = throughput.NETWORKS[name]
    got = trained(network, torch.float32, serial.looped())
    recurrences = 2 * (2 if name == "gilr-lstm" else 1)  # of both layers
    assert len(calls) == 2 * recurrences  # there and back
    assert_as_exact(got, lambda: trained(network, torch.float64, nullcontext()))
    assert len(calls) == 2 * recurrences


def test_what_runs_serially_is_undone_after_an_error():
    threads, choice = torch.get_num_threads(), backends.resolve(None, torch.device("cpu"))
    for context in (serial.looped(), serial.swept(torch.device("cpu")), throughput._without_onednn()):
        with pytest.raises(KeyError), context:
            raise KeyError
    assert torch.backends.mkldnn.enabled
    assert torch.get_num_threads() == threads
    assert backends.resolve(None, torch.device("cpu")) == choice


def test_a_sweep_on_the_cpu_has_one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    with serial.swept(torch.device("cpu")):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)


def test_a_sweep_on_cuda_is_one_pass_where_time_is_otherwise_cut():
    pytest.importorskip("triton")
    from legato.ops.kernels import triton_recurrence

    for features in throughput.FEATURES:
        impulse = torch.empty(1, 65_536, 1, features, device="meta")
        assert triton_recurrence._plan(impulse).chunks > 1
        with serial.swept(torch.device("cuda")):
            sweep = backends.choose("linear_recurrence", impulse.device, backends.resolve(None, impulse.device))[0]
            assert triton_recurrence._plan(impulse, sweep.forward.keywords["tuning"]).chunks == 1


def test_the_table_of_the_kernel_stands_beside_the_papers(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "_STEPS_PER_RUN", 32)
    words = "--lengths 16 3 --features 4 7 --rounds 1 --device cpu --threads 1 --out".split()  # noqa: SIM905
    threads = torch.get_num_threads()
    status, out, _ = run(capsys, "kernel", *words, tmp_path)
    assert (status, torch.get_num_threads()) == (0, threads)
    assert "0.06" in out  # the K80's at length 16 and 4 features
    (path,) = tmp_path.glob("cpu-kernel-*.json")
    assert path.with_suffix(".png").stat().st_size > 0
    report = json.loads(path.read_text())
    assert report["machine"]["threads"] == 1
    assert [(row["length"], row["features"]) for row in report["rows"]] == [(16, 4), (16, 7), (3, 4), (3, 7)]
    for row in report["rows"]:
        for other in ("sweep", "loop"):
            assert row[f"{other}/parallel"] == row[other]["median_ms"] / row["parallel"]["median_ms"]


def test_the_table_of_networks_stands_beside_the_papers(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "BATCH_TIMES_LENGTH", 32)
    words = "--lengths 16 --networks gilr-lstm sru --rounds 1 --device cpu --out".split()  # noqa: SIM905
    status, out, _ = run(capsys, "networks", *words, tmp_path)
    assert status == 0
    for text in ("GILR-LSTM", "0.61", "SRU", "0.28", "torch.nn.LSTM without oneDNN"):
        assert text in out
    (path,) = tmp_path.glob("cpu-networks-*.json")
    assert path.with_suffix(".png").stat().st_size > 0
    rows = json.loads(path.read_text())["rows"]
    assert [(row["network"], row["batch"]) for row in rows] == [("gilr-lstm", 2), ("sru", 2)]
    for row in rows:
        for other in ("serial", "LSTM", "LSTM without oneDNN"):
            assert row[f"{other}/parallel"] == row[other]["median_ms"] / row["parallel"]["median_ms"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("kernel --lengths 16 0", "expected lengths of at least 1, got 16 0"),
        ("kernel --features -1", "expected features of at least 1, got -1"),
        ("kernel --rounds 0", "expected rounds of at least 1, got 0"),
        ("networks --threads 0", "expected threads of at least 1, got 0"),
        ("networks --networks gru", "expected networks among sru, qrnn-2, qrnn-10, gilr-lstm, got gru"),
        ("kernel --device tpu", "expected the device cpu or cuda, got tpu"),
    ],
)
def test_wrong_options_are_explained(capsys, words, message):
    status, _, err = run(capsys, *words.split())
    assert status == 1
    assert f"error: {message}" in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_named(capsys):
    assert "expected a CUDA device, got none: use --device cpu" in run(capsys, "kernel", "--device", "cuda")[2]


def test_kernels_that_cannot_be_used_are_not_measured(capsys, monkeypatch):
    failure = "ImportError: Numba needs NumPy 2.4 or less"
    monkeypatch.setattr(backends, "_failures", {("linear_recurrence", "numba"): failure})
    monkeypatch.setattr(backends, "_warned", {"numba": None})
    status, _, err = run(capsys, "kernel", "--device", "cpu")
    assert status == 1
    assert "no compiled kernel to measure on cpu (numba is installed but cannot be used: Imp" in err


@pytest.mark.parametrize("table", ["kernel", "networks"])
def test_a_length_beyond_memory_raises_and_names_one_that_fits(capsys, monkeypatch, table):
    monkeypatch.setattr(throughput, "free_memory", lambda device: 2**30)
    status, _, err = run(capsys, table, "--lengths", 10**9, "--device", "cpu")
    assert status == 1
    assert "1,000,000,000 steps would take about" in err
    fits = int(err.split("up to ")[1].split(" ")[0].replace(",", ""))
    assert 0 < fits < 10**9
