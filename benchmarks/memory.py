"""Memory of training: ``LMU`` with and without recomputation, the recurrence, long sequences.

A peak is the resident memory that one forward and backward pass adds, in a new process
(``measure.peak_memory``); the input and the gradient of the output exist before. "Kept" are the
tensors saved for the backward, counted by torch's hooks. The first target of the peak is a quarter
of the peak of training that stores all memories. The second target is a quarter of the size of all
memories, for the shape whose outputs, which all training stores, are a tenth of the memories. At
(32, 784, 1) the outputs are 0.83 of the memories, and ``LMU`` stores all memories, as it does up to
64 MiB: in segments the step took 1.5 times as long. The long sequence is run in one pass and by
``in_segments``.
"""

from collections.abc import Callable
from typing import Any

import torch

from legato.layers import GILR, LMU, in_segments
from legato.ops.recurrence import linear_recurrence
from measure import Target, peak_memory

ORDER, UNITS = 256, 212
LMU_SHAPES = [
    (32, 784, 1),
    (8, 4096, 4),
    (8, 8192, 8),
]  # batch, steps, memory_size; memories (B, T, memory_size * ORDER)
RECURRENCE = (8, 4096, 256)
LONG, SEGMENT = (1, 262_144, 128), 4096  # batch, steps, units; steps of a segment
MIB = 2**20
_SEGMENT, _ALL = "of a segment", "all (recompute=False)"

TESTS = ("tests/layers/test_lmu.py", "tests/layers/test_segments.py", "tests/ops/test_recurrence.py")
TARGETS = (
    *(
        Target(
            f"LMU {shape}, order {ORDER}: peak, relative to the peak with all memories stored",
            "peak / peak with all held",
            0.25,
            "",
            {"LMU": str(shape), "memories held": _SEGMENT},
            True,
        )
        for shape in LMU_SHAPES
    ),
    Target(
        f"LMU {LMU_SHAPES[-1]}, order {ORDER}: peak, relative to the size of all memories",
        "peak / memories",
        0.25,
        "",
        {"LMU": str(LMU_SHAPES[-1]), "memories held": _SEGMENT},
        True,
    ),
    Target("linear_recurrence: saved, relative to decay, states and final state", "kept / needed", 1, at_most=True),
)


def measure() -> list[dict]:
    rows = [row for shape in LMU_SHAPES for row in _lmu(shape)]
    rows += [_recurrence(decay) for decay in (RECURRENCE, RECURRENCE[-1:])]
    return rows + [_long(segment) for segment in (SEGMENT, None)]


def _lmu(shape: tuple[int, int, int]) -> list[dict]:
    batch, steps, memory_size = shape
    memories, outputs = (4 * batch * steps * numbers for numbers in (memory_size * ORDER, UNITS))
    peaks = {which: peak_memory(_train_lmu, shape, recompute) for which, recompute in ((_SEGMENT, True), (_ALL, False))}
    held = peaks[_ALL]
    return [
        {
            "LMU": str(shape),
            "memories held": which,
            "memories, MiB": memories / MIB,
            "outputs, MiB": outputs / MIB,
            "peak, MiB": None if peak is None else peak / MIB,
            "peak / memories": None if peak is None else peak / memories,
            "peak / peak with all held": None if peak is None or held is None else peak / held,
        }
        for which, peak in peaks.items()
    ]


def _train_lmu(shape: tuple[int, int, int], recompute: bool) -> Callable[[], Any]:
    batch, steps, memory_size = shape
    layer = LMU(1, UNITS, memory_size=memory_size, order=ORDER, theta=steps, recompute=recompute)
    x, gradient = torch.randn(batch, steps, 1), torch.randn(batch, steps, UNITS)

    def run(rows: int = batch) -> torch.Tensor:
        layer.zero_grad()
        output, _ = layer(x[:rows])
        output.backward(gradient[:rows])
        return output

    run(1)
    return run


def _recurrence(decay_shape: tuple[int, ...]) -> dict:
    leaves = torch.rand(decay_shape, requires_grad=True), torch.randn(RECURRENCE, requires_grad=True)
    saved: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        states, final = linear_recurrence(*leaves)
    needed = leaves[0].nbytes + states.nbytes + final.nbytes
    peak = peak_memory(_differentiate, decay_shape)
    return {
        "linear_recurrence": str(RECURRENCE),
        "decay": str(decay_shape),
        "decay + states, MiB": needed / MIB,
        "kept, MiB": sum(saved.values()) / MIB,
        "kept / needed": sum(saved.values()) / needed,
        "peak, MiB": None if peak is None else peak / MIB,
    }


def _differentiate(decay_shape: tuple[int, ...]) -> Callable[[], Any]:
    leaves = torch.rand(decay_shape, requires_grad=True), torch.randn(RECURRENCE, requires_grad=True)
    gradient = torch.ones(RECURRENCE)

    def run(leaves: Any = leaves, gradient: torch.Tensor = gradient) -> Any:
        states, _ = linear_recurrence(*leaves)
        return states, torch.autograd.grad(states, leaves, gradient)

    run([torch.rand(1, 1, 1, requires_grad=True)] * 2, torch.ones(1, 1, 1))
    return run


def _long(segment: int | None) -> dict:
    batch, steps, units = LONG
    peak = peak_memory(_train_long, segment)
    return {
        "GILR": str(LONG),
        "by": "one pass" if segment is None else f"in_segments(steps={segment})",
        "outputs, MiB": 4 * batch * steps * units / MIB,
        "peak, MiB": None if peak is None else peak / MIB,
    }


def _train_long(segment: int | None) -> Callable[[], Any]:
    layer = GILR(4, LONG[-1])
    x = torch.randn(*LONG[:2], 4)

    def run(steps: int = LONG[1]) -> None:
        layer.zero_grad()
        if segment is None:
            output = layer(x[:, :steps])[0][:, -1]
        else:
            output, _ = in_segments(layer, x[:, :steps], steps=segment, last_only=True)
        output.sum().backward()

    run(2 * SEGMENT)
    return run
