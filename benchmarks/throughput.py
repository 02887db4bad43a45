"""The throughput tables of Martin & Cundy 2018 on this machine: ``python benchmarks/throughput.py kernel|networks``.

Every metric is a ratio of times taken in turns within one run. ``serial_recurrence.py`` runs the recurrence serially
over time, ``throughput_report.py`` prints and draws the tables; docs/papers/throughput.md explains them.
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
#: Of the networks: channels in, units of a layer, layers, and batch times length.
INPUTS, UNITS, LAYERS, BATCH_TIMES_LENGTH = 4, 256, 2, 65_536

# A turn of the kernel is about this many steps, so that it is long against the clock and the call.
_STEPS_A_TURN = 16_384
# A network takes no more turns at a length once they have taken this long together, in seconds.
_PATIENCE = 10.0
# What a loop over time keeps for each of its steps, beside numbers, in bytes.
_LOOP_BYTES = 2_000


class BenchmarkError(Exception):
    """An option is wrong or the machine cannot run the measurement; the message says why."""


@dataclass
class Options:
    """How and where a table is measured.

    Args:
        device: cpu or cuda; None is CUDA where PyTorch sees a device.
        lengths: steps of time, a row each.
        rounds: how many turns each candidate takes.
        threads: of PyTorch and of our kernels on the CPU; None leaves them as they are.
        out: folder for <device>-<table>-<date>.json and .png.
    """

    device: str | None
    lengths: list[int]
    rounds: int
    threads: int | None
    out: Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure one table and return the exit status: 0 measured, 1 not possible here, 2 options not understood."""
    parser = argparse.ArgumentParser(prog="benchmarks/throughput.py", description="The tables of Martin & Cundy 2018.")
    tables = parser.add_subparsers(dest="table", required=True)
    kernel = tables.add_parser("kernel", help="the recurrence against the same run serially over time: a minute")
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
    add("--lengths", type=int, nargs="+", default=[*LENGTHS], metavar="T", help="time steps, a row for each")
    add("--device", default=None, help="cpu or cuda; default: cuda where there is a device")
    add("--rounds", type=int, default=rounds, help="timed runs of each candidate; the median counts")
    add("--threads", type=int, default=None, help="threads of PyTorch and of our kernels on the CPU")
    add("--out", type=Path, default=Path("runs/benchmarks"), help="folder for the JSON file and the PNG")


def benchmark_kernel(features: list[int], options: Options) -> None:
    """Our kernel's throughput against the same recurrence run serially over time: minibatch 1, forward, float32.

    Raises:
        BenchmarkError: the device is not there, a number is out of range, or a length would not fit in memory.
    """
    device = _device(options)
    _check_numbers("features", features)
    for count in features:
        # Decay, impulse and states, and the loop's states one by one and together.
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
        _say_where(path)


def benchmark_networks(names: list[str], options: Options) -> None:
    """Training steps of networks against the same run serially over time, and against torch.nn.LSTM of their size.

    Raises:
        BenchmarkError: the device is not there, a name or number is wrong, or a length would not fit in memory.
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
        lstms = [way for way in rows[0] if way.startswith("LSTM") and "/" not in way]
        panels = [
            Panel(f"training: times as fast as with {what['serial']}", columns("serial/parallel"), k80),
            *(Panel(f"training: times as fast as torch.nn.{way}", columns(f"{way}/parallel"), {}) for way in lstms),
        ]
        times = columns("parallel")
        for way in lstms:
            times |= _columns(rows, "network", {names[0]: way}, way)
        show([*panels, Panel("training: milliseconds", times, {})])
        draw(panels, path.with_suffix(".png"))
        _say_where(path)


def _measure_kernel(length: int, features: int, rounds: int, device: torch.device) -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(0)
    decay = torch.rand(1, length, features, generator=generator, device=device)
    impulse = torch.randn(1, length, features, generator=generator, device=device)
    runs = max(1, _STEPS_A_TURN // length)

    def turn(context: Callable[[], AbstractContextManager]) -> Callable[[], None]:
        def run() -> None:
            with context(), torch.inference_mode():
                for _ in range(runs):
                    linear_recurrence(decay, impulse)

        return run

    candidates = {"parallel": turn(nullcontext), "sweep": turn(lambda: swept(device)), "loop": turn(looped)}
    turns = interleave(candidates, rounds=rounds, warmup=1, settle=True)
    times = {name: _each(time, runs) for name, time in turns.items()}
    return {"length": length, "features": features, **times, **_ratios(times, "parallel")}


def _measure_networks(
    length: int, models: dict[str, nn.Module], rounds: int, device: torch.device
) -> list[dict[str, Any]]:
    """A row for each network, all of them and torch.nn.LSTM taking turns."""
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
        own = {way: times[f"{name} {way}"] for way in ("parallel", "serial")} | {way: times[way] for way in baselines}
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
    switch: Any = torch.backends.mkldnn  # whose own context, flags(), warns of what it does not change
    before, switch.enabled = switch.enabled, False
    try:
        yield
    finally:
        switch.enabled = before


def _serially(device: torch.device) -> AbstractContextManager:
    """The paper's serial network: everything but the recurrences as before. On the CPU our own kernel sweeps over time
    anyway, so the loop is what is left to compare with."""
    return swept(device) if device.type == "cuda" else looped()


def _each(time: dict[str, float], runs: int) -> dict[str, float]:
    """The time of one run from that of a turn."""
    return {key: value / runs if key.endswith("_ms") else value for key, value in time.items()}


def _ratios(times: dict[str, dict[str, float]], ours: str) -> dict[str, float]:
    """How many times as fast ours is: other / ours, medians of the same run."""
    return {
        f"{name}/{ours}": time["median_ms"] / times[ours]["median_ms"] for name, time in times.items() if name != ours
    }


def _columns(rows: list[dict[str, Any]], key: str, names: dict[Any, str], figure: str) -> dict[str, dict[int, float]]:
    """The figure, or the median of the times, by column and length."""
    columns: dict[str, dict[int, float]] = {name: {} for name in names.values()}
    for row in rows:
        if row[key] in names:
            value = row[figure]
            columns[names[row[key]]][row["length"]] = value["median_ms"] if isinstance(value, dict) else value
    return columns


def _by_length(k80: tuple[float, ...]) -> dict[int, float]:
    return dict(zip(LENGTHS, k80, strict=True))


def _build(network: Network) -> nn.Module:
    return Stack.of(network.layer, INPUTS, UNITS, num_layers=LAYERS, **network.options)


def _device(options: Options) -> torch.device:
    """The device of the options, once all of them are known to be right."""
    _check_numbers("lengths", options.lengths)
    _check_numbers("rounds", [options.rounds], 10**6)
    _check_numbers("threads", [1 if options.threads is None else options.threads], 4096)
    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name not in SWEEP:
        raise BenchmarkError(f"expected the device {' or '.join(SWEEP)}, got {name}")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError("PyTorch sees no CUDA device here: take --device cpu")
    _, backend, why = backends.choose("linear_recurrence", device, None, torch.float32)
    if backend == "torch":
        package = {"cpu": "numba", "cuda": "triton"}[device.type]
        lacking = f"there is no compiled kernel to measure on {device.type} ({why})"
        raise BenchmarkError(f"{lacking}: pip install {package}")
    return device


def _check_numbers(name: str, values: list[int], most: int = 2**40) -> None:
    got = " ".join(map(str, values)) or "none"
    if not values or min(values) < 1:
        raise BenchmarkError(f"expected {name} of at least 1, got {got}")
    if max(values) > most:
        raise BenchmarkError(f"expected {name} of at most {most:,}, got {got}")


def _check_memory(what: str, steps: int, bytes_a_step: int, device: torch.device) -> None:
    free = free_memory(device)
    if free is not None and steps * bytes_a_step > free:
        raise BenchmarkError(
            f"{what}: {steps:,} steps would take about {steps * bytes_a_step / 2**30:.1f} GiB, {free / 2**30:.1f} are "
            f"free on {device.type}: up to {free // bytes_a_step:,} steps would fit"
        )


def _training_bytes(model: nn.Module, device: torch.device) -> int:
    """What a step of time takes in training: three times what the forward pass keeps, for the gradients and products
    under way."""
    kept: dict[int, int] = {parameter.data_ptr(): 0 for parameter in model.parameters()}
    steps = 64

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept.setdefault(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), _serially(device):
        output, _ = model(torch.zeros(1, steps, INPUTS, device=device))
    return 3 * (sum(kept.values()) + output.nbytes) // steps


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _watched(cells: list[tuple], text: str) -> Iterator[tuple]:
    """The cells, with a line on the terminal that says which is being measured."""
    with Console(stderr=True).status("") as status:
        for cell in cells:
            status.update(text.format(*cell))
            yield cell


def _write(folder: Path, device: str, table: str, rows: list[dict], what: dict[str, str]) -> Path:
    path = folder / f"{device}-{table}-{date.today().isoformat()}.json"
    write_json(path, {"subject": table, "machine": machine(), "what": what, "rows": rows})
    return path


def _say_where(path: Path) -> None:
    Console(highlight=False).print(f"written to {path} and {path.with_suffix('.png').name}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
