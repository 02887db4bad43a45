"""What runs on a CUDA machine, tried on CPU tensors with the kernels interpreted: that it runs, not how fast."""

import json
import time
from statistics import median

import pytest
import torch

import gpu
import gpu_checks

pytest.importorskip("triton")

from legato.ops.kernels import triton_recurrence

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or not triton_recurrence.INTERPRETED, reason="for machines without a GPU"
)


def in_turn(candidates, rounds, warmup=0):
    seconds = {name: [] for name in candidates}
    for name, run in candidates.items():
        start = time.perf_counter()
        run()
        seconds[name].append(1e3 * (time.perf_counter() - start))
    return {name: (median(t), min(t), max(t)) for name, t in seconds.items()}


@pytest.fixture
def on_cpu(monkeypatch):
    """Small sizes on CPU tensors, each candidate once."""
    for module in (gpu, gpu_checks):
        monkeypatch.setattr(module, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "on_device", in_turn)
    monkeypatch.setattr(gpu, "by_clock", lambda run, rounds, seconds: in_turn({0: run}, 1)[0][0])
    monkeypatch.setattr(gpu, "_facts", dict)
    monkeypatch.setattr(gpu, "SIZES", [((1, 6, 3), torch.float32), ((1, 6, 3), torch.bfloat16)])
    monkeypatch.setattr(gpu_checks, "LONG", 300)
    monkeypatch.setattr(gpu_checks, "HUGE", (2, 40, 3))
    interpreted = type(triton_recurrence._read)
    monkeypatch.setattr(interpreted, "__call__", lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs))


@pytest.fixture
def report(on_cpu, tmp_path):
    return gpu.Report(tmp_path / "out" / "figures.json", time.monotonic() + 1000)


def test_without_cuda_it_says_so(capsys):
    assert gpu.main([]) == 2
    assert "no CUDA device here" in capsys.readouterr().err


@pytest.mark.parametrize("case", [
    gpu_checks.Case((2, 20, 3), (2, 20, 3), torch.bfloat16, True, True),
    gpu_checks.Case((2, 20, 3), (3,), torch.float64, False, False),
])  # fmt: skip
def test_the_kernels_are_right_by_the_check(case, on_cpu):
    rows = gpu_checks.recurrence(case)
    assert len(rows) == 5
    assert all(row["right"] for row in rows), rows


def test_a_wrong_result_is_seen():
    exact = torch.ones(3, dtype=torch.float64)
    assert gpu_checks.judged("a", exact + 1e-8, exact, exact, 1e-7, 1.0)["right"]
    assert not gpu_checks.judged("a", exact + 1e-5, exact, exact, 1e-7, 1.0)["right"]
    assert not gpu_checks.judged("a", exact * torch.nan, exact, exact, 1e-7, 1.0)["right"]


@pytest.mark.parametrize("name", ["GILR", "LMU"])
def test_layers_are_right_by_the_check(name, on_cpu):
    rows = gpu_checks.layer(name)
    assert all(row["right"] for row in rows), [row for row in rows if not row["right"]]


def test_long_and_large_ones_are_right_by_the_check(on_cpu, monkeypatch):
    assert "dropped" in gpu_checks.more_than_32_bits_count()[0]["what"] or torch.cuda.is_available()
    monkeypatch.setattr(gpu_checks, "HUGE_BYTES", 1)
    rows = [*gpu_checks.million_steps(torch.bfloat16), *gpu_checks.more_than_32_bits_count(), *gpu_checks.memories()]
    assert all(row["right"] for row in rows), [row for row in rows if not row["right"]]


def test_kernels_and_sweep_have_a_row_for_each_pass_and_tuning(report):
    report.section("kernels", 0, gpu.kernels)
    assert [row["pass"] for row in report.rows("kernels")] == ["copy", "forward", "backward"] * 2
    report.section("sweep", 0, gpu.sweep)
    assert {row["tuning"] for row in report.rows("sweep")} == {"", *gpu.VARIANTS}
    assert report.content["dropped"] == []
    targets = json.loads(report.path.read_text())["subjects"]["kernels"]["targets"]
    assert [target["bound"] for target in targets] == [0.85, 0.8, 0.85, 0.8, 0.7, 0.7]


def test_peers_that_are_missing_are_named(report, monkeypatch):
    monkeypatch.setattr(gpu, "PEERS", {key: make for key, make in gpu.PEERS.items() if "torch" not in key})
    report.section("peers", 0, gpu.peers)
    assert {row["who"] for row in report.rows("peers")} == {"legato"}
    assert sum("No module named" in line for line in report.content["dropped"]) == 2 * (len(gpu.PEERS) - 1)


def test_table_training_and_steps_run(report, monkeypatch):
    monkeypatch.setattr(gpu, "LENGTHS", (3,))
    monkeypatch.setattr(gpu, "FEATURES", (4,))
    monkeypatch.setattr(gpu, "_captured", lambda run: run)
    for name, section in (("table", gpu.table), ("steps", gpu.steps)):
        report.section(name, 0, section)
        assert report.rows(name), name
    assert report.content["dropped"] == []


def test_a_failed_section_is_named_and_the_others_run(report, capsys):
    def fails(report):
        yield {"what": "first", "figure": 1.0}
        raise RuntimeError("no memory")

    report.section("fails", 0, fails)
    report.section("late", 10_000, fails)
    assert report.rows("fails") == [{"what": "first", "figure": 1.0}]
    assert [line.split(":")[0] for line in report.content["dropped"]] == ["the rest of fails", "late"]
    assert json.loads(report.path.read_text())["dropped"] == report.content["dropped"]


def test_a_section_that_takes_too_long_is_broken_off(report):
    def sleeps(report):
        yield {"what": "first"}
        time.sleep(20)

    report.deadline = time.monotonic() + 0.1
    report.section("slow", 0, sleeps)
    assert report.rows("slow") == [{"what": "first"}]
    assert "the time is up" in report.content["dropped"][0]


def test_figures_go_to_the_file_or_to_todays_in_the_folder(tmp_path):
    assert gpu._path([str(tmp_path / "a.json")]) == tmp_path / "a.json"
    assert gpu._path([str(tmp_path)]).name.startswith("cuda-")
