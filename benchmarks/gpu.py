"""Check and measure legato on a CUDA machine: PYTHONPATH=src python benchmarks/gpu.py [OUT] (make gpu).

Needs PyTorch 2.10 or later with CUDA and triton. legato is imported from ``src`` and nothing is
downloaded. OUT is a file or a folder; the default is benchmarks/results/cuda-<date>.json. The
results are written after every section. Sections for which the time (520 seconds, or
LEGATO_SECONDS) is too short are listed in "dropped". Exit code: 0 all results are correct, 1 a
result is out of bounds or none was checked, 2 no CUDA device. The sections, in order:

correctness   the tests of the kernels and ``gpu_checks.py``, in parallel processes; compiles all kernels
kernels       forward and backward as a fraction of the bandwidth of a copy in the same run
sweep         the same for other values of each constant of ``triton_recurrence.TUNING``
memory        lti: chunked in float32, TF32 and bfloat16, compared with fft
training      the parallel LMU, compared with RecurrentLMU
peers         accelerated-scan, flash-linear-attention and torch's associative_scan, forward and backward
table         the paper's table of the kernel: parallel, compared with one pass over time
networks      gated layers, compared with cuDNN's LSTM and GRU over 65,536 steps
steps         one step of a stream, by call and as a captured graph

Peers are imported from the environment, or from .venv-peers-gpu next to the Makefile. To install
them as wheels:
    pip download --no-deps -d wheels -r benchmarks/peers-gpu.txt                 # on a machine with a network
    pip install --no-index --no-deps --target .venv-peers-gpu wheels/*           # on the machine with the GPU
A missing peer is reported and skipped. How to use the results: benchmarks/README.md, "On a GPU".
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date, datetime
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import torch

try:
    import jaxtyping  # noqa: F401
except ImportError:  # annotations without effect: Float[Tensor, "B T"] becomes Tensor
    stand_in = ModuleType("jaxtyping")
    shape = type("Shape", (), {"__class_getitem__": classmethod(lambda cls, item: item[0])})
    stand_in.__dict__.update(dict.fromkeys(("Bool", "Complex", "Float", "Inexact", "Int", "Shaped"), shape))
    sys.modules["jaxtyping"] = stand_in

DEVICE = "cuda"
ROOT = Path(__file__).parent.parent
SECONDS = 520.0
Row = dict[str, Any]
FULL, LONG = (8, 8192, 1536), (1, 1 << 20, 64)
# The paper's table of the kernel.
LENGTHS, FEATURES = (16, 256, 4_096, 65_536), (4, 32, 128)
SIZES = [(FULL, torch.float32), (FULL, torch.bfloat16), (LONG, torch.float32), (LONG, torch.bfloat16)]
# One constant changed at a time; the first three need their own kernels, which are compiled
# beforehand.
VARIANTS: dict[str, Row] = {
    "as it is": {},
    "group_bytes 16": {"group_bytes": 16},
    "group_bytes 64, not deep": {"group_bytes": 64, "deep_programs": 0},
    "warps 2": {"warps": 2},
    "warps 4": {"warps": 4},
    "never deep": {"deep_programs": 0},
    "always deep": {"deep_programs": 1 << 30},
    "two channels a lane": {"many_programs": 1, "few_programs": 0},
    "few_programs 512": {"few_programs": 512},
    "few_programs 1024": {"few_programs": 1024},
    "many_programs 512": {"many_programs": 512},
    "many_programs 1024": {"many_programs": 1024},
    "many_programs 4096": {"many_programs": 4096},
}


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--part"]:
        print(json.dumps(_part(arguments[1])))
        return 0
    if len(arguments) > 1 or arguments[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 1
    if not torch.cuda.is_available():
        print("gpu: PyTorch has no CUDA device here, nothing was checked or measured", file=sys.stderr)
        return 2
    report = Report(_path(arguments), time.monotonic() + float(os.environ.get("LEGATO_SECONDS", SECONDS)))
    for name, (least, section) in SECTIONS.items():
        report.section(name, least, section)
    print(f"written to {report.path}")
    checked = report.rows("correctness")
    return 0 if checked and all(row.get("right", True) for row in checked) else 1


def _path(arguments: list[str]) -> Path:
    """The path of the results: a file, or a file with today's date in a folder."""
    path = Path(arguments[0]) if arguments else ROOT / "benchmarks/results"
    return path if path.suffix == ".json" else path / f"cuda-{date.today().isoformat()}.json"


class Report:
    """The results so far, written after every section, and the remaining time."""

    def __init__(self, path: Path, deadline: float):
        self.path, self.deadline = path, deadline
        self.facts = {"date": datetime.now().isoformat(timespec="seconds"), **_facts()}
        self.content: Row = {"dropped": [], "subjects": {}}

    def left(self) -> float:
        """The remaining seconds."""
        return self.deadline - time.monotonic()

    def drop(self, what: str, why: str) -> None:
        self.content["dropped"].append(f"{what}: {why}")
        print(f"dropped {what}: {why}", flush=True)
        self.write()

    def section(self, name: str, least: float, measure: Callable[["Report"], Iterator[Row]]) -> None:
        """Run one section and judge its targets; drop it if less than ``least`` seconds are left."""
        from measure import judge

        if self.left() < least:
            self.drop(name, f"{self.left():.0f} seconds left, it needs {least:.0f}")
            return
        start, rows = time.monotonic(), []
        # A section that exceeds the time is interrupted, and its remaining rows are dropped, as
        # after an error.
        signal.signal(signal.SIGALRM, _time_is_up)
        signal.setitimer(signal.ITIMER_REAL, max(1.0, self.left()))
        self.content["subjects"][name] = section = {**self.facts, "rows": rows, "targets": []}
        try:
            for row in measure(self):
                rows.append(row)
                print(name, {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        except Exception as problem:  # later sections are still measured
            self.drop(f"the rest of {name}", f"{type(problem).__name__}: {problem}"[:300])
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        torch.cuda.empty_cache()
        section["targets"] = judge(TARGETS.get(name, ()), rows)
        section["seconds"] = time.monotonic() - start
        for target in section["targets"]:
            print(name, target, flush=True)
        self.write()

    def rows(self, name: str) -> list[Row]:
        return self.content["subjects"].get(name, {"rows": []})["rows"]

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        partial.write_text(json.dumps(self.content, indent=1, default=str) + "\n")
        partial.replace(self.path)  # readers get the old file or the new one


def _time_is_up(*_: Any) -> None:
    raise TimeoutError("the time is up")


def _facts() -> Row:
    """The machine, versions and bandwidth, in the format of the other benchmarks."""
    import triton

    from measure import copy_bandwidth, machine

    about = torch.cuda.get_device_properties(0)
    device = {"GiB": about.total_memory / 2**30, "multiprocessors": about.multi_processor_count}
    versions = {"triton": triton.__version__, "CUDA": torch.version.cuda, "cuDNN": torch.backends.cudnn.version()}
    return {"machine": machine() | device, "versions": versions, "copy_GB_per_s": copy_bandwidth()}


# --- correctness: in processes, which compile in parallel ---


def correctness(report: Report) -> Iterator[Row]:
    import gpu_checks

    limit = max(60.0, min(0.45 * report.left(), report.left() - 60))
    parts = [f"check {name}" for name in gpu_checks.PARTS] + [f"compile {i}" for i in (*range(len(SIZES)), "table")]
    commands = {name: [sys.executable, __file__, "--part", name] for name in parts}
    commands["tests"] = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    commands["tests"] += ["-n", str(max(1, (os.cpu_count() or 2) // 3)), "tests/ops/test_triton_recurrence.py"]
    deadline = time.monotonic() + limit

    def run(name: str) -> list[Row]:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]),
        }
        try:
            done = subprocess.run(
                commands[name], cwd=ROOT, env=environment, capture_output=True, text=True,
                timeout=max(1.0, deadline - time.monotonic()),
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return [{"part": name, "what": f"dropped: over {limit:.0f} seconds"}]
        if name == "tests" and done.returncode in (0, 1) and "No module named" not in done.stderr:
            return [{"part": name, "what": done.stdout[-2000:], "right": done.returncode == 0}]
        if done.returncode:
            # A check that could not run is a failure, unless only pytest or its plugin for several
            # processes is missing.
            missing = name == "tests" and ("No module named pytest" in done.stderr or "arguments: -n" in done.stderr)
            return [
                {"part": name, "what": (done.stdout + done.stderr)[-2000:], **({} if missing else {"right": False})}
            ]
        return [{"part": name} | row for row in json.loads(done.stdout.splitlines()[-1])]

    with ThreadPoolExecutor(max(2, (os.cpu_count() or 2) - 2)) as pool:
        # The longest first; the largest arrays last, when the other processes have freed their
        # memory.
        order = sorted(commands, key=lambda name: ("2^31" in name, not name.startswith(("tests", "compile"))))
        for rows in pool.map(run, order):
            for row in rows:
                if "dropped" in str(row.get("what")):
                    report.drop(f"correctness, {row['part']}", row["what"])
                yield row


def _part(name: str) -> list[Row]:
    """The work of one process: a check, or the compilation of the kernels for one size."""
    kind, _, rest = name.partition(" ")
    if kind == "check":
        return importlib.import_module("gpu_checks").PARTS[rest]()
    start = time.monotonic()
    if rest == "table":
        for _, _, parallel, serial in _cells():
            parallel()
            serial()
        return [{"what": "kernels for the table", "seconds": time.monotonic() - start}]
    size, dtype = SIZES[int(rest)]
    inputs = _inputs(size, dtype)
    for tuning in _tunings(dtype).values():
        for run in _passes(inputs, tuning).values():
            run()
    _wait()
    return [{"what": f"kernels for {size} {dtype}", "seconds": time.monotonic() - start}]


# --- the kernels ---


def _inputs(size: tuple[int, int, int], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Decay, impulse (B, T, 1, D), gradient of the final state, states."""
    from legato.ops.kernels import triton_recurrence

    B, T, D = size
    torch.manual_seed(0)
    decay = torch.rand(B, T, 1, D, device=DEVICE).to(dtype)
    impulse = torch.randn(B, T, 1, D, device=DEVICE).to(dtype)
    return (
        decay,
        impulse,
        torch.zeros(B, 1, D, device=DEVICE),
        triton_recurrence.forward(decay, impulse, None, None, False)[0],
    )


def _passes(inputs: tuple[torch.Tensor, ...], tuning: Any = None) -> dict[str, Callable[[], Any]]:
    from legato.ops.kernels import triton_recurrence

    decay, impulse, grad, states = inputs
    return {
        "forward": lambda: triton_recurrence.forward(decay, impulse, None, None, False, tuning),
        "backward": lambda: triton_recurrence.backward(impulse, grad, decay, states, None, None, False, tuning),
    }


ARRAYS = {"copy": 2, "forward": 3, "backward": 5}


def kernels(report: Report) -> Iterator[Row]:
    for size, dtype in SIZES:
        inputs = _inputs(size, dtype)
        yield from _fractions(size, dtype, inputs, {"as it is": _passes(inputs)}, rounds=20)


def sweep(report: Report) -> Iterator[Row]:
    for size, dtype in SIZES:
        if report.left() < 30:
            report.drop(f"sweep at {size} {dtype}", f"{report.left():.0f} seconds left")
            continue
        inputs = _inputs(size, dtype)
        variants = {name: _passes(inputs, tuning) for name, tuning in _tunings(dtype).items()}
        yield from _fractions(size, dtype, inputs, variants, rounds=8)


def _tunings(dtype: torch.dtype) -> dict[str, Any]:
    from legato.ops.kernels import triton_recurrence

    # Groups of more than 32 steps take minutes to compile.
    variants = {
        name: change
        for name, change in VARIANTS.items()
        if dtype.itemsize > 2 or ("64" not in name and name != "always deep")
    }
    if dtype.itemsize > 2:
        del variants["two channels a lane"]
    return {name: triton_recurrence.TUNING._replace(**change) for name, change in variants.items()}


def _fractions(size, dtype, inputs, variants: dict[str, dict[str, Callable]], rounds: int) -> list[Row]:
    """GB/s and the fraction of the bandwidth of a copy; all candidates alternate."""
    target, impulse = torch.empty_like(inputs[1]), inputs[1]
    candidates = {("", "copy"): lambda: target.copy_(impulse)}
    candidates |= {(variant, name): run for variant, passes in variants.items() for name, run in passes.items()}
    times = on_device(candidates, rounds=rounds)
    bandwidth = {key: ARRAYS[key[1]] * impulse.nbytes / ms / 1e6 for key, (ms, _, _) in times.items()}
    copy = bandwidth["", "copy"]
    return [
        {
            "size": str(size), "dtype": str(dtype), "pass": key[1], "tuning": key[0], "median_ms": ms, "min_ms": low,
            "max_ms": high, "GB_per_s": bandwidth[key], "share_of_copy": bandwidth[key] / copy,
        }
        for key, (ms, low, high) in times.items()
    ]  # fmt: skip


# --- lti and LMU ---


def memory(report: Report) -> Iterator[Row]:
    from legato.legendre import delay_network
    from legato.ops.time_invariant import apply, prepare

    size, order = (32, 4096, 64), 64
    A, B = (x.to(DEVICE) for x in delay_network(order, 4096))
    names = {"chunked float32": torch.float32, "chunked tf32": torch.float32, "chunked bfloat16": torch.bfloat16}
    names |= {"fft float32": torch.float32}
    candidates: dict[Any, Callable[[], Any]] = {}
    for name, dtype in names.items():
        kernel = prepare(A, B, size[1], method=name.split()[0], dtype=dtype)
        u = torch.randn(size, device=DEVICE, dtype=dtype)
        leaf, fast = u.clone().requires_grad_(), name.endswith("tf32")
        weight = torch.randn_like(apply(u, kernel)[0])

        def forward(u=u, kernel=kernel, fast=fast) -> None:
            torch.backends.cuda.matmul.allow_tf32 = fast
            apply(u, kernel)
            torch.backends.cuda.matmul.allow_tf32 = False

        def step(u=leaf, kernel=kernel, weight=weight, fast=fast) -> None:
            torch.backends.cuda.matmul.allow_tf32 = fast
            torch.autograd.grad(apply(u, kernel)[0], u, weight)
            torch.backends.cuda.matmul.allow_tf32 = False

        candidates |= {(name, "forward"): forward, (name, "forward and backward"): step}
    times = on_device(candidates, rounds=8)
    for (name, what), (ms, low, high) in times.items():
        fft = times["fft float32", what][0]
        yield {"what": name, "pass": what, "median_ms": ms, "min_ms": low, "max_ms": high, "fft/this": fft / ms}


def training(report: Report) -> Iterator[Row]:
    """The sizes of psMNIST; RecurrentLMU is slow, so it has at most three timed runs."""
    from legato.layers import LMU, RecurrentLMU

    def step(layer: torch.nn.Module, batch: int) -> Callable[[], Any]:
        layer = layer.to(DEVICE)
        optimiser = torch.optim.Adam(layer.parameters(), lr=1e-3, fused=True)
        x = torch.randn(batch, 784, 1, device=DEVICE)

        def run() -> None:
            optimiser.zero_grad()
            layer(x)[0].square().mean().backward()
            optimiser.step()

        return run

    for sequences in (False, True):
        batch, units, order = (32, 212, 256) if sequences else (100, 346, 468)
        options: Row = {"theta": 784, "return_sequences": sequences}
        parallel = step(LMU(1, units, order=order, **options), batch)
        serial = step(RecurrentLMU(1, 212, order=256, **options), batch)
        fast, slow = by_clock(parallel, rounds=30, seconds=5), by_clock(serial, rounds=3, seconds=20)
        what = "with sequences" if sequences else "last state"
        yield {"what": what, "LMU_ms": fast, "RecurrentLMU_ms": slow, "times faster": slow / fast}


# --- others ---


def peers(report: Report) -> Iterator[Row]:
    """Forward and backward of all peers, each in its own layout; conversions are not timed."""
    for size, dtype in SIZES:
        if report.left() < 25:
            report.drop(f"peers at {size} {dtype}", f"{report.left():.0f} seconds left")
            continue
        candidates: dict[Any, Callable[[], Any]] = {}
        wanted: list[torch.Tensor] = []
        for name, make in PEERS.items():
            try:
                run = make(*_example(size, dtype))
                got = [x.double() for x in run()]
                wanted = wanted or got  # ours are the first
                error = max(((x - y).abs().max() / y.abs().max()).item() for x, y in zip(got, wanted, strict=True))
                if not error < 8 * torch.finfo(dtype).eps:  # only the order of a few roundings differs
                    raise ValueError(f"wrong results: an error of {error:.2g} of the largest")
                candidates[name] = run
            except Exception as problem:
                report.drop(f"{name} at {size} {dtype}", f"{type(problem).__name__}: {problem}"[:200])
            torch.cuda.empty_cache()
        del wanted
        times = on_device(candidates, rounds=8)
        ours = times["legato"][0]
        for name, (ms, low, high) in times.items():
            row = {"size": str(size), "dtype": str(dtype), "who": name, "median_ms": ms, "min_ms": low, "max_ms": high}
            yield row | ({} if name == "legato" else {"this/legato": ms / ours})


def _example(size: tuple[int, int, int], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Decay from 0.5 to 1, impulse and gradient of the states, (B, T, D)."""
    torch.manual_seed(0)
    decay = (1 - 0.5 * torch.rand(size, device=DEVICE)).to(dtype)
    return decay, *(torch.randn(size, device=DEVICE).to(dtype) for _ in range(2))


def _both(run: Callable, weight: torch.Tensor, *leaves: torch.Tensor) -> Callable[[], list[torch.Tensor]]:
    """The states and the gradient of the impulse, which is the last of ``leaves``; in the layout of
    ``run``."""
    leaves = tuple(x.requires_grad_() for x in leaves)

    def both() -> list[torch.Tensor]:
        states = run(*leaves)
        return [states.detach(), torch.autograd.grad(states, leaves, weight)[-1]]

    return both


def _legato(decay, impulse, weight):
    from legato import linear_recurrence

    return _both(lambda a, x: linear_recurrence(a, x)[0], weight, decay, impulse)


def _accelerated(module: str):
    def make(decay, impulse, weight):
        scan = importlib.import_module(module).scan
        a, x, w = (y.mT.contiguous() for y in (decay, impulse, weight))  # (B, D, T)
        if module.endswith("warp") and (a.shape[-1] & (a.shape[-1] - 1) or a.shape[-1] > 1 << 16):
            raise ValueError(f"its lengths are powers of 2 up to 65,536, not {a.shape[-1]:,}")
        run = _both(scan, w, a, x)

        class Transposed(list):
            """Results that are transposed to (B, T, D) only when they are compared."""

        return lambda: Transposed(y.mT for y in run())

    return make


def _hgrn(name: str):
    def make(decay, impulse, weight):
        function = getattr(importlib.import_module("fla.ops.hgrn"), name)
        return _both(lambda g, x: function(x, g)[0], weight, decay.float().log().to(decay.dtype), impulse)

    return make


def _associative_scan(decay, impulse, weight):
    """Not every PyTorch release has its backward, so the adjoint is another scan, from the end."""
    from torch._higher_order_ops.associative_scan import associative_scan

    def combine(first, second):
        return first[0] * second[0], first[1] * second[0] + second[1]

    @torch.compile(dynamic=False)
    def both(a, x, w):
        states = associative_scan(combine, (a, x), dim=1)[1]
        later = torch.cat([a[:, 1:], torch.zeros_like(a[:, :1])], 1)
        g = associative_scan(combine, (later, w), dim=1, reverse=True)[1]
        before = torch.cat([torch.zeros_like(states[:, :1]), states[:, :-1]], 1)
        return states, g, before * g

    return lambda: list(both(decay, impulse, weight)[:2])


PEERS: dict[str, Callable] = {
    "legato": _legato,
    "accelerated-scan, Triton": _accelerated("accelerated_scan.scalar"),
    "accelerated-scan, CUDA": _accelerated("accelerated_scan.warp"),
    "flash-linear-attention, fused_recurrent_hgrn": _hgrn("fused_recurrent_hgrn"),
    "flash-linear-attention, chunk_hgrn": _hgrn("chunk_hgrn"),
    "torch associative_scan, compiled": _associative_scan,
}


def table(report: Report) -> Iterator[Row]:
    """The time on the device, and the time of calls, which is mostly Python for short sequences."""
    for length, features, parallel, serial in _cells():
        candidates = {"parallel": parallel, "sweep": serial}
        device = {name: ms for name, (ms, _, _) in on_device(candidates, rounds=15).items()}
        calls = {name: by_clock(run, 100, 1.0) for name, run in candidates.items()}
        yield {
            "length": length, "features": features, "long": length >= 256,
            "parallel_ms": device["parallel"], "sweep_ms": device["sweep"],
            "sweep/parallel": device["sweep"] / device["parallel"],
            "sweep/parallel by call": calls["sweep"] / calls["parallel"],
        }  # fmt: skip


def _cells() -> Iterator[tuple[int, int, Callable[[], None], Callable[[], None]]]:
    """Length, features, our recurrence and the same in one pass, for each cell of the table."""
    from legato import linear_recurrence
    from serial_recurrence import swept

    for length in LENGTHS:
        for features in FEATURES:
            decay, impulse = (torch.rand(1, length, features, device=DEVICE) for _ in range(2))

            def parallel(decay=decay, impulse=impulse) -> None:
                with torch.inference_mode():
                    linear_recurrence(decay, impulse)

            def serial(parallel=parallel) -> None:
                with swept(torch.device(DEVICE)):
                    parallel()

            yield length, features, parallel, serial


def networks(report: Report) -> Iterator[Row]:
    """A training step of two layers of 256 units over 65,536 steps, without an optimiser."""
    from legato.layers import GILR, GILRLSTM, QRNN, SRU, Stack

    def step(network: torch.nn.Module, batch: int) -> Callable[[], Any]:
        network = network.to(DEVICE)
        x = torch.randn(batch, 65_536, 4, device=DEVICE)

        def run() -> None:
            network.zero_grad(set_to_none=True)
            network(x)[0].sum().backward()

        return run

    for batch in (1, 8, 32):
        times: dict[str, float] = {}
        makers: dict[str, Callable[[], torch.nn.Module]] = {
            kind.__name__: lambda kind=kind: Stack.of(kind, 4, 256, num_layers=2)
            for kind in (GILR, SRU, QRNN, GILRLSTM)
        }
        makers |= {
            f"torch.nn.{kind.__name__} (cuDNN)": lambda kind=kind: kind(4, 256, 2, batch_first=True)
            for kind in (torch.nn.LSTM, torch.nn.GRU)
        }
        for name, make in makers.items():
            if report.left() < 12:
                report.drop(f"networks, {name} in batches of {batch}", f"{report.left():.0f} seconds left")
                continue
            try:
                times[name] = by_clock(step(make(), batch), rounds=4, seconds=6)
            except torch.OutOfMemoryError as problem:
                report.drop(f"networks, {name} in batches of {batch}", str(problem)[:100])
            torch.cuda.empty_cache()
        lstm = times.get("torch.nn.LSTM (cuDNN)")
        for name, ms in times.items():
            row = {"batch": batch, "steps": 65_536, "network": name, "median_ms": ms}
            yield row | ({"LSTM/this": lstm / ms} if lstm else {})


def steps(report: Report) -> Iterator[Row]:
    from legato.layers import GILR, LMU, Stack

    networks = {
        "LMU, order 256": LMU(1, 212, order=256, theta=784),
        "GILR, two layers": Stack.of(GILR, 4, 256, num_layers=2),
    }
    for name, network in networks.items():
        network = network.to(DEVICE).eval()
        with torch.inference_mode():
            state = network.initial_state(1)
            x = torch.randn(1, network.input_size, device=DEVICE)

            def step(network=network, x=x, state=state) -> None:
                network.step(x, state)

            called = by_clock(step, rounds=300, seconds=4)
            row: Row = {"network": name, "call_us": 1e3 * called}
            try:
                row["graph_us"] = 1e3 * by_clock(_captured(step), rounds=300, seconds=4)
            except RuntimeError as problem:
                report.drop(f"the graph of a step of {name}", str(problem)[:200])
        yield row


def _captured(run: Callable[[], Any]) -> Callable[[], Any]:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


# --- time ---


def on_device(candidates: dict[Any, Callable[[], Any]], rounds: int, warmup: int = 2) -> dict[Any, tuple]:
    """Median, least and greatest milliseconds on the device's clock, alternating (A B A B ...).

    The device waits until a run is queued, so that the time of Python's calls is not included.
    """
    times: dict[Any, list[float]] = {name: [] for name in candidates}
    for run_number in range(warmup + rounds):
        for name, run in candidates.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(3_000_000)  # cycles, more than a millisecond
            start.record()
            run()
            end.record()
            end.synchronize()
            if run_number >= warmup:
                times[name].append(start.elapsed_time(end))
    return {name: (median(t), min(t), max(t)) for name, t in times.items()}


def by_clock(run: Callable[[], Any], rounds: int, seconds: float) -> float:
    """Median milliseconds from an idle device to an idle device, calls included; at most about
    ``seconds`` in total."""
    times: list[float] = []
    begin = time.monotonic()
    while len(times) <= rounds and (len(times) < 2 or time.monotonic() - begin < seconds):
        _wait()
        start = time.perf_counter()
        run()
        _wait()
        times.append(1e3 * (time.perf_counter() - start))
    return median(times[1:])  # the first compiles


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def _targets() -> dict[str, tuple]:
    from measure import Target

    def fraction(size, dtype, name, bound):
        where = {"size": str(size), "dtype": str(dtype), "pass": name}
        return Target(f"{name} at {size} {dtype}", "share_of_copy", bound, "of a copy", where)

    full = [
        fraction(FULL, d, n, b)
        for d in (torch.float32, torch.bfloat16)
        for n, b in (("forward", 0.85), ("backward", 0.8))
    ]
    long = [fraction(LONG, torch.float32, name, 0.7) for name in ("forward", "backward")]
    kinds = ("float32", "tf32", "bfloat16")
    return {
        "kernels": (*full, *long),
        "memory": tuple(
            Target(f"chunked {k}, compared with fft", "fft/this", 10, "times", {"what": f"chunked {k}", "pass": p})
            for k in kinds
            for p in ("forward", "forward and backward")
        ),
        "training": (
            Target(
                "LMU, compared with RecurrentLMU, last state", "times faster", 1000, "times", {"what": "last state"}
            ),
            Target(
                "LMU, compared with RecurrentLMU, sequences", "times faster", 200, "times", {"what": "with sequences"}
            ),
        ),
        "peers": (Target("the fastest peer, at any size", "this/legato", 1, "times"),),
        "table": (Target("the paper's table from 256 steps on", "sweep/parallel", 1, "times", {"long": True}),),
    }


TARGETS = _targets()
# The minimum of seconds that a section needs, and the section.
SECTIONS: dict[str, tuple[float, Callable[[Report], Iterator[Row]]]] = {
    "correctness": (60, correctness),
    "kernels": (30, kernels),
    "memory": (20, memory),
    "training": (30, training),
    "sweep": (40, sweep),
    "peers": (40, peers),
    "table": (20, table),
    "steps": (12, steps),
    "networks": (20, networks),
}

if __name__ == "__main__":
    sys.path[:0] = [str(ROOT / "src"), str(ROOT / ".venv-peers-gpu")]
    sys.exit(main(sys.argv[1:]))
