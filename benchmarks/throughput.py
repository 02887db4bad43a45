"""The throughput tables of Martin & Cundy 2018 on this machine: ``python benchmarks/throughput.py kernel|networks``.

Every metric is a ratio of times from one run, in which the candidates alternate.
``serial_recurrence.py`` computes the recurrence serially over time, ``throughput_report.py`` prints
and draws the tables; docs/papers/throughput.md explains them.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import nn

from legato import GILRLSTM, QRNN, SRU, RecurrentLayer, Stack, linear_recurrence
from legato._environment import free_memory
from legato.ops import backends
from measure import interleave, machine, write_json
from serial_recurrence import LOOP, SWEEP, looped, swept
from throughput_report import Panel, draw, show

LENGTHS = (16, 256, 4_096, 65_536)
FEATURES = (4, 32, 128)
#: Parallel against serial over time on a K80, at LENGTHS, by features.
K80_KERNEL = {4: (0.06, 0.22, 1.02, 38.5), 32: (0.06, 0.22, 2.94, 41.8), 128: (0.05, 0.86, 3.36, 17.5)}


class Network(NamedTuple):
    """A column of the table of networks."""

    title: str
    layer: type[RecurrentLayer]
    options: dict[str, Any]
    #: Parallel against serial over time on a K80, at LENGTHS.
    k80: tuple[float, ...]


NETWORKS = {
    "sru": Network("SRU", SRU, {}, (0.28, 0.84, 1.38, 9.21)),
    "qrnn-2": Network("QRNN (2)", QRNN, {"kernel_size": 2}, (0.38, 0.86, 1.18, 6.68)),
    "qrnn-10": Network("QRNN (10)", QRNN, {"kernel_size": 10}, (0.78, 0.99, 1.05, 2.05)),
    "gilr-lstm": Network("GILR-LSTM", GILRLSTM, {}, (0.61, 0.91, 0.98, 1.41)),
}
#: Of the networks: input channels, units per layer, number of layers, and batch size times length.
INPUTS, UNITS, LAYERS, BATCH_TIMES_LENGTH = 4, 256, 2, 65_536

# The number of time steps in one timed run of the kernel, so that it is long compared with the
# overhead of a call.
_STEPS_PER_RUN = 16_384
# Total seconds after which a network is not run again at a length.
_PATIENCE = 10.0
# Bytes of Python and autograd objects that a loop over time stores per step.
_LOOP_BYTES = 2_000


class BenchmarkError(Exception):
    """An option is invalid, or this machine cannot run the measurement."""


@dataclass
class Options:
    """The options of both tables.

    Args:
        device: cpu or cuda; None is CUDA if PyTorch has a CUDA device.
        lengths: the sequence lengths in time steps, one row per length.
        rounds: the number of timed runs of each candidate.
        threads: the threads of PyTorch and of our kernels on the CPU; None does not change them.
        out: the folder for <device>-<table>-<date>.json and .png.
    """

    device: str | None
    lengths: list[int]
    rounds: int
    threads: int | None
    out: Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure one table; exit status 0: measured, 1: not possible here, 2: invalid options."""
    parser = argparse.ArgumentParser(prog="benchmarks/throughput.py", description="The tables of Martin & Cundy 2018.")
    tables = parser.add_subparsers(dest="table", required=True)
    kernel = tables.add_parser("kernel", help="the recurrence, compared with a serial one over time: a minute")
    kernel.add_argument("--features", type=int, nargs="+", default=[*FEATURES], metavar="N", help="channels")
    _add_options(kernel, rounds=9)
    networks = tables.add_parser("networks", help="training of two layers of 256 units: some minutes")
    networks.add_argument("--networks", nargs="+", default=[*NETWORKS], metavar="NAME", help=", ".join(NETWORKS))
    _add_options(networks, rounds=3)
    given = parser.parse_args(arguments)
    options = Options(**{field.name: getattr(given, field.name) for field in fields(Options)})
    try:
        if given.table == "kernel":
            benchmark_kernel(given.features, options)
        else:
            benchmark_networks(given.networks, options)
    except (BenchmarkError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _add_options(parser: argparse.ArgumentParser, rounds: int) -> None:
    add = parser.add_argument
    add("--lengths", type=int, nargs="+", default=[*LENGTHS], metavar="T", help="time steps, one row per length")
    add("--device", default=None, help="cpu or cuda; default: cuda if there is a device")
    add("--rounds", type=int, default=rounds, help="timed runs of each candidate; the median is reported")
    add("--threads", type=int, default=None, help="threads of PyTorch and of our kernels on the CPU")
    add("--out", type=Path, default=Path("runs/benchmarks"), help="folder for the JSON file and the PNG")


def benchmark_kernel(features: list[int], options: Options) -> None:
    """Throughput of our kernel relative to a serial one: batch size 1, forward, float32.

    Raises:
        BenchmarkError: the device is not available, a number is out of range, or a length does not
            fit in memory.
    """
    device = _device(options)
    _check_numbers("features", features)
    for count in features:
        # Decay, impulse and states, and the states of the loop, separate and stacked.
        _check_memory(f"{count} features", max(options.lengths), 5 * 4 * count + _LOOP_BYTES, device)
    cells = [(length, count) for length in options.lengths for count in features]
    with _threads(options.threads):
        rows = [
            _measure_kernel(length, count, options.rounds, device)
            for length, count in _watched(cells, "length {:,}, {} features")
        ]
        sweep, what = SWEEP[device.type], {"parallel": "linear_recurrence", "pass": "forward", "loop": LOOP}
        path = _write(options.out, device.type, "kernel", rows, what={**what, "sweep": sweep})
        names = {count: f"{count} features" for count in features}
        k80 = {names[count]: _by_length(K80_KERNEL[count]) for count in features if count in K80_KERNEL}
        columns = partial(_columns, rows, "features", names)
        panels = [
            Panel(f"linear_recurrence: times as fast as {sweep}", columns("sweep/parallel"), k80),
            Panel(f"linear_recurrence: times as fast as {LOOP}", columns("loop/parallel"), {}),
        ]
        show([*panels, Panel("linear_recurrence: milliseconds", columns("parallel"), {})])
        draw(panels, path.with_suffix(".png"))
        _print_path(path)


def benchmark_networks(names: list[str], options: Options) -> None:
    """Training steps of networks, relative to a serial recurrence and to torch.nn.LSTM.

    Raises:
        BenchmarkError: the device is not available, a name or number is invalid, or a length does
            not fit in memory.
    """
    device = _device(options)
    wrong = [name for name in names if name not in NETWORKS]
    if wrong or not names:
        raise BenchmarkError(f"expected networks among {', '.join(NETWORKS)}, got {wrong[0] if wrong else 'none'}")
    with _threads(options.threads):
        torch.manual_seed(0)
        models = {name: _build(NETWORKS[name]).to(device) for name in names}
        for name, model in models.items():
            steps = max(BATCH_TIMES_LENGTH, *options.lengths)
            _check_memory(NETWORKS[name].title, steps, _training_bytes(model, device) + _LOOP_BYTES, device)
        rows = [
            row
            for (length,) in _watched([(length,) for length in options.lengths], "length {:,}")
            for row in _measure_networks(length, models, options.rounds, device)
        ]
        what = {"pass": "forward and backward", "serial": LOOP if device.type == "cpu" else SWEEP["cuda"]}
        path = _write(options.out, device.type, "networks", rows, what=what)
        titles = {name: NETWORKS[name].title for name in names}
        k80 = {titles[name]: _by_length(NETWORKS[name].k80) for name in names}
        columns = partial(_columns, rows, "network", titles)
        lstms = [kind for kind in rows[0] if kind.startswith("LSTM") and "/" not in kind]
        panels = [
            Panel(f"training: times as fast as with {what['serial']}", columns("serial/parallel"), k80),
            *(Panel(f"training: times as fast as torch.nn.{kind}", columns(f"{kind}/parallel"), {}) for kind in lstms),
        ]
        times = columns("parallel")
        for kind in lstms:
            times |= _columns(rows, "network", {names[0]: kind}, kind)
        show([*panels, Panel("training: milliseconds", times, {})])
        draw(panels, path.with_suffix(".png"))
        _print_path(path)


def _measure_kernel(length: int, features: int, rounds: int, device: torch.device) -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(0)
    decay = torch.rand(1, length, features, generator=generator, device=device)
    impulse = torch.randn(1, length, features, generator=generator, device=device)
    runs = max(1, _STEPS_PER_RUN // length)

    def timed_run(context: Callable[[], AbstractContextManager]) -> Callable[[], None]:
        def run() -> None:
            with context(), torch.inference_mode():
                for _ in range(runs):
                    linear_recurrence(decay, impulse)

        return run

    candidates = {
        "parallel": timed_run(nullcontext),
        "sweep": timed_run(lambda: swept(device)),
        "loop": timed_run(looped),
    }
    timed_runs = interleave(candidates, rounds=rounds, warmup=1, settle=True)
    times = {name: _each(time, runs) for name, time in timed_runs.items()}
    return {"length": length, "features": features, **times, **_ratios(times, "parallel")}


def _measure_networks(
    length: int, models: dict[str, nn.Module], rounds: int, device: torch.device
) -> list[dict[str, Any]]:
    """One row per network; the runs of all of them and of torch.nn.LSTM alternate."""
    batch = max(1, BATCH_TIMES_LENGTH // length)
    x = torch.randn(batch, length, INPUTS, device=device)
    weight = torch.randn(batch, length, UNITS, device=device)
    lstm = nn.LSTM(INPUTS, UNITS, LAYERS, batch_first=True, device=device)
    baselines = {"LSTM": nullcontext, "LSTM without oneDNN": _without_onednn}
    if device.type != "cpu":
        del baselines["LSTM without oneDNN"]
    candidates = {name: _training_step(lstm, x, weight, context) for name, context in baselines.items()}
    for name, model in models.items():
        candidates[f"{name} parallel"] = _training_step(model, x, weight, nullcontext)
        candidates[f"{name} serial"] = _training_step(model, x, weight, lambda: _serially(device))
    times = interleave(candidates, rounds=rounds, warmup=1, patience=_PATIENCE)
    rows = []
    for name in models:
        own = {kind: times[f"{name} {kind}"] for kind in ("parallel", "serial")} | {
            kind: times[kind] for kind in baselines
        }
        rows.append({"length": length, "batch": batch, "network": name, **own, **_ratios(own, "parallel")})
    return rows


def _training_step(
    model: nn.Module, x: torch.Tensor, weight: torch.Tensor, context: Callable[[], AbstractContextManager]
) -> Callable[[], None]:
    """Forward and backward, with a gradient at every output, to all weights; no optimiser."""

    def run() -> None:
        model.zero_grad(set_to_none=True)
        with context():
            output, _ = model(x)
            output.backward(weight)

    return run


@contextmanager
def _without_onednn() -> Iterator[None]:
    switch: Any = torch.backends.mkldnn  # its context manager, flags(), warns of settings that it does not change
    before, switch.enabled = switch.enabled, False
    try:
        yield
    finally:
        switch.enabled = before


def _serially(device: torch.device) -> AbstractContextManager:
    """The serial network of the paper: only the recurrences change. On the CPU our own kernel runs
    serially over time already, so the loop is used for comparison."""
    return swept(device) if device.type == "cuda" else looped()


def _each(time: dict[str, float], runs: int) -> dict[str, float]:
    """The time of one call from that of a timed run of several calls."""
    return {key: value / runs if key.endswith("_ms") else value for key, value in time.items()}


def _ratios(times: dict[str, dict[str, float]], ours: str) -> dict[str, float]:
    """How many times as fast ours is: other / ours, from medians of the same run."""
    return {
        f"{name}/{ours}": time["median_ms"] / times[ours]["median_ms"] for name, time in times.items() if name != ours
    }


def _columns(rows: list[dict[str, Any]], key: str, names: dict[Any, str], metric: str) -> dict[str, dict[int, float]]:
    """The metric, or the median of the times, by column and length."""
    columns: dict[str, dict[int, float]] = {name: {} for name in names.values()}
    for row in rows:
        if row[key] in names:
            value = row[metric]
            columns[names[row[key]]][row["length"]] = value["median_ms"] if isinstance(value, dict) else value
    return columns


def _by_length(k80: tuple[float, ...]) -> dict[int, float]:
    return dict(zip(LENGTHS, k80, strict=True))


def _build(network: Network) -> nn.Module:
    return Stack.of(network.layer, INPUTS, UNITS, num_layers=LAYERS, **network.options)


def _device(options: Options) -> torch.device:
    """The device of the options; checks all options."""
    _check_numbers("lengths", options.lengths)
    _check_numbers("rounds", [options.rounds], 10**6)
    _check_numbers("threads", [1 if options.threads is None else options.threads], 4096)
    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name not in SWEEP:
        raise BenchmarkError(f"expected the device {' or '.join(SWEEP)}, got {name}")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError("expected a CUDA device, got none: use --device cpu")
    _, backend, why = backends.choose("linear_recurrence", device, None, torch.float32)
    if backend == "torch":
        package = {"cpu": "numba", "cuda": "triton"}[device.type]
        missing = f"there is no compiled kernel to measure on {device.type} ({why})"
        raise BenchmarkError(f"{missing}: pip install {package}")
    return device


def _check_numbers(name: str, values: list[int], most: int = 2**40) -> None:
    got = " ".join(map(str, values)) or "none"
    if not values or min(values) < 1:
        raise BenchmarkError(f"expected {name} of at least 1, got {got}")
    if max(values) > most:
        raise BenchmarkError(f"expected {name} of at most {most:,}, got {got}")


def _check_memory(what: str, steps: int, bytes_per_step: int, device: torch.device) -> None:
    free = free_memory(device)
    if free is not None and steps * bytes_per_step > free:
        raise BenchmarkError(
            f"{what}: {steps:,} steps would take about {steps * bytes_per_step / 2**30:.1f} GiB, {free / 2**30:.1f} "
            f"are free on {device.type}: use up to {free // bytes_per_step:,} steps"
        )


def _training_bytes(model: nn.Module, device: torch.device) -> int:
    """Bytes per time step in training: three times the tensors that the forward saves, which
    includes gradients and intermediate products."""
    saved: dict[int, int] = {parameter.data_ptr(): 0 for parameter in model.parameters()}
    steps = 64

    def pack(x: torch.Tensor) -> torch.Tensor:
        saved.setdefault(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), _serially(device):
        output, _ = model(torch.zeros(1, steps, INPUTS, device=device))
    return 3 * (sum(saved.values()) + output.nbytes) // steps


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _watched(cells: list[tuple], text: str) -> Iterator[tuple]:
    """The cells, with a status line on the terminal that names the current one."""
    with Console(stderr=True).status("") as status:
        for cell in cells:
            status.update(text.format(*cell))
            yield cell


def _write(folder: Path, device: str, table: str, rows: list[dict], what: dict[str, str]) -> Path:
    path = folder / f"{device}-{table}-{date.today().isoformat()}.json"
    write_json(path, {"subject": table, "machine": machine(), "what": what, "rows": rows})
    return path


def _print_path(path: Path) -> None:
    Console(highlight=False).print(f"written to {path} and {path.with_suffix('.png').name}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
