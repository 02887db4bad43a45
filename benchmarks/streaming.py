"""One time step by ``step`` under inference_mode: latency, many streams, memory.

A batch of a thousand streams is compared with two bounds, both from the same run: the bytes that
must move (state in and out, input, output, weights once) at the copy bandwidth of this machine, and
the matrix products of the step at the speed of one large product.
"""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from legato.layers import GILR, GILRLSTM, LMU, SRU, LegendreMemory, MinGRU, Stack
from measure import Target, copy_bandwidth, in_own_process, interleave, resident

UNITS = 256
THREADS = (1, 2)
STEPS_PER_RUN, ROUNDS = 200, 11
STREAMS = 1000
EARLY, LATE = 1_000, 10_000

_NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "LMU, order 256, 212 units": lambda: LMU(1, 212, order=256, theta=784),
    "GILR, 2 x 256": lambda: Stack(GILR(UNITS, UNITS), GILR(UNITS, UNITS)),
    "SRU, 2 x 256": lambda: Stack(SRU(UNITS, UNITS), SRU(UNITS, UNITS)),
    "MinGRU, 2 x 256": lambda: Stack(MinGRU(UNITS, UNITS), MinGRU(UNITS, UNITS)),
    "GILRLSTM, 2 x 256": lambda: Stack(GILRLSTM(UNITS, UNITS), GILRLSTM(UNITS, UNITS)),
    "LegendreMemory, order 256": lambda: LegendreMemory(1, 256, 784),
    "torch.nn.LSTM, 2 x 256": lambda: nn.LSTM(UNITS, UNITS, 2, batch_first=True),
    "torch.nn.LSTM, 212 units": lambda: nn.LSTM(1, 212, batch_first=True),
}
_LMU, _GILR = list(_NETWORKS)[:2]

TESTS = ("tests/layers/test_lmu.py", "tests/test_contract.py::test_chunks_and_steps_equal_one_pass")
TARGETS = (
    *(
        Target(f"a step of {name}, threads: {n}", "median_us", us, "us", {"network": name, "threads": n}, at_most=True)
        for name, us in ((_LMU, 80), (_GILR, 150))
        for n in THREADS
    ),
    *(
        Target(f"{STREAMS:,} streams of {name}: fraction of {bound}", f"% of {bound}", 50, "%", {"network": name})
        for name in (_LMU, _GILR)
        for bound in ("bandwidth bound", "the higher bound")
    ),
    Target("additional tensors after 9,000 more steps", "tensors more", 0, at_most=True),
    Target("additional memory after 9,000 more steps", "MiB more", 1, "MiB", at_most=True),
)


def measure() -> list[dict]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    try:
        rows = [row for number in THREADS for row in _one_stream(number)]
    finally:
        torch.set_num_threads(threads)
    rows += _many_streams()
    return rows + [_growth(name) for name in _NETWORKS if "torch" not in name]


def _one_stream(threads: int) -> list[dict]:
    torch.set_num_threads(threads)
    runs = {name: _timed_run(name, 1, STEPS_PER_RUN) for name in _NETWORKS}
    times = interleave(runs, rounds=ROUNDS)
    return [{"network": name, "threads": threads, **_microseconds(times[name], STEPS_PER_RUN)} for name in _NETWORKS]


def _many_streams() -> list[dict]:
    a, b = (torch.randn(1024, 1024) for _ in range(2))
    product = torch.empty(1024, 1024)
    runs = {name: _timed_run(name, STREAMS, 5) for name in _NETWORKS}
    times = interleave({"": lambda: torch.mm(a, b, out=product), **runs}, rounds=ROUNDS)
    flops_per_us, bytes_per_us = 2 * 1024**3 / times[""]["median_ms"] / 1e3, copy_bandwidth()["copy"] * 1e3
    rows = []
    for name in _NETWORKS:
        time = _microseconds(times[name], 5)
        moved, flops = _work(name)
        bandwidth, arithmetic = moved / bytes_per_us, flops / flops_per_us
        rows.append({
            "network": name, "streams": STREAMS, **time, "us a stream": time["median_us"] / STREAMS,
            "bandwidth bound, us": bandwidth, "% of bandwidth bound": 100 * bandwidth / time["median_us"],
            "arithmetic bound, us": arithmetic, "% of arithmetic bound": 100 * arithmetic / time["median_us"],
            "% of the higher bound": 100 * max(bandwidth, arithmetic) / time["median_us"],
        })  # fmt: skip
    return rows


def _timed_run(name: str, streams: int, steps: int) -> Callable[[], Any]:
    step, state = _stream(name, streams)

    @torch.inference_mode()
    def run() -> None:
        nonlocal state
        for _ in range(steps):
            _, state = step(state)

    return run


def _stream(name: str, streams: int) -> tuple[Callable[[Any], tuple[torch.Tensor, Any]], Any]:
    """step(state) -> (output, state) on one fixed input, and the initial state."""
    network: Any = _NETWORKS[name]().eval()
    if isinstance(network, nn.LSTM):
        x = torch.randn(streams, 1, network.input_size)
        h = torch.zeros(network.num_layers, streams, network.hidden_size)
        return lambda state: network(x, state), (h, h)
    x = torch.randn(streams, network.input_size)
    return lambda state: network.step(x, state), network.initial_state(streams)


@torch.inference_mode()
def _work(name: str) -> tuple[int, int]:
    """The bytes that a step of all streams must move, and the operations of its products."""
    network: Any = _NETWORKS[name]()
    step, state = _stream(name, STREAMS)
    output, state = step(state)
    memories = [layer for layer in network.modules() if isinstance(layer, LegendreMemory)]
    fixed = [*network.parameters(), *(matrix for memory in memories for matrix in memory.transition())]
    moved = 4 * STREAMS * network.input_size + output.nbytes + 2 * sum(part.nbytes for part in _leaves(state))
    matrices = [weight for weight in fixed if weight.ndim == 2 and min(weight.shape) > 1]
    return moved + sum(t.nbytes for t in fixed), 2 * STREAMS * sum(weight.numel() for weight in matrices)


def _leaves(state: Any) -> list[torch.Tensor]:
    return [state] if isinstance(state, torch.Tensor) else [leaf for part in state for leaf in _leaves(part)]


def _growth(name: str) -> dict:
    early, late = in_own_process(_after_steps, name)
    row = {"network": name, f"tensors after {EARLY:,}": early[0], "tensors more": late[0] - early[0]}
    if early[1] is not None:
        row |= {f"MiB after {EARLY:,}": early[1] / 2**20, "MiB more": (late[1] - early[1]) / 2**20}
    return row


@torch.inference_mode()
def _after_steps(name: str) -> list[tuple[int, int | None]]:
    """The number of tensors and the peak resident memory, after EARLY and after LATE steps."""
    step, state = _stream(name, 1)
    found = []
    for steps in (EARLY, LATE - EARLY):
        for _ in range(steps):
            _, state = step(state)
        tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
        found.append((tensors, resident("VmHWM") if Path("/proc/self/status").exists() else None))
    return found


def _microseconds(time: dict[str, float], steps: int) -> dict[str, float]:
    return {f"{key}_us": 1e3 * time[f"{key}_ms"] / steps for key in ("median", "min", "max")}
