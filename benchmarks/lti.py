"""The time-invariant recurrence: chunked, compared with fft and with its matrix products.

A time is one forward and one backward pass in float32 (gradients of the input and of the initial
state; A and B frozen and prepared). The incoming gradient has the memory layout of each method.
"fft, no state" omits the response to the initial state, which only fft computes separately. The
products are the two large products of chunked and the transforms are the two transforms of fft,
each alone on prepared data. "Channels first" is the variant for few channels, for comparison. One
input is very long, for chunked alone.
"""

from collections.abc import Callable
from unittest.mock import patch

import torch

from legato.legendre import delay_network
from legato.ops import time_invariant
from legato.ops.time_invariant import METHODS, apply, prepare
from measure import Target, interleave

SHAPES = [((16, 1024, 16), 64), ((4, 4096, 32), 32), ((32, 784, 1), 256)]
OTHERS = [((64, 4, 1), 64), ((64, 16, 1), 64), ((64, 64, 1), 64), ((32, 256, 64), 4), ((20, 784, 1), 468)]
LONG = ((1, 1_048_576, 1), 32)
SIDES = [((32, 64, 128), 4), ((64, 14, 128), 5), ((8, 1024, 256), 8), ((4, 4096, 32), 32), ((1, 1000, 64), 6)]

TESTS = ("tests/ops/test_time_invariant.py",)
TARGETS = (
    *(
        Target(
            f"chunked over its matrix products, {shape}, order {order}",
            "over its products",
            1.7,
            "times",
            {"shape": str(shape), "order": order, "by": "chunked"},
            at_most=True,
        )
        for shape, order in SHAPES
    ),
    Target(
        f"fft over chunked, {SHAPES[0][0]}, order {SHAPES[0][1]}",
        "over chunked",
        3,
        "times",
        {"shape": str(SHAPES[0][0]), "order": SHAPES[0][1], "by": "fft"},
    ),
)


def measure() -> list[dict]:
    torch.manual_seed(0)
    rows = [row for shape, order in SHAPES for row in _chunked_against_fft(shape, order)]
    rows += [row for shape, order in OTHERS for row in _every_method(shape, order)]
    rows += [row for shape, order in SIDES for row in _either_side(shape, order)]
    return rows + _rows(*LONG, interleave({"chunked": _training_pass(*LONG, "chunked")}, rounds=3, warmup=1))


def _chunked_against_fft(shape: tuple[int, int, int], order: int) -> list[dict]:
    times = interleave(
        {
            "chunked": _training_pass(shape, order, "chunked"),
            "products of chunked": _products(shape, order),
            "chunked with resets": _training_pass(shape, order, "chunked", reset=True),
            "fft": _training_pass(shape, order, "fft"),
            "fft, no state": _training_pass(shape, order, "fft", state=False),
            "transforms of fft": _transforms(shape, order),
        },
        rounds=7,
        warmup=2,
    )
    return _rows(shape, order, times)


def _every_method(shape: tuple[int, int, int], order: int) -> list[dict]:
    methods = [method for method in METHODS if shape[1] <= 256 or method in ("fft", "chunked")]
    return _rows(shape, order, interleave({m: _training_pass(shape, order, m) for m in methods}, rounds=7, warmup=2))


def _either_side(shape: tuple[int, int, int], order: int) -> list[dict]:
    """The two variants of "chunked", read as an LMU reads them: all numbers of a step in one
    row."""
    batch, steps, channels = shape
    system = prepare(*delay_network(order, max(steps, 8)), steps, method="chunked")
    u = torch.randn(shape, requires_grad=True)
    gradient = torch.randn(batch * steps, channels * order)

    def run(channels_last: bool) -> None:
        with patch.object(time_invariant, "_channels_last", lambda *_: channels_last):
            memory, _ = apply(u, system)
        read = memory.mT if channels_last else memory
        torch.autograd.grad(read.reshape(gradient.shape), u, gradient)

    candidates = {"chunked": lambda: run(True), "chunked, channels first": lambda: run(False)}
    return _rows(shape, order, interleave(candidates, rounds=7, warmup=2))


def _rows(shape: tuple[int, int, int], order: int, times: dict[str, dict[str, float]]) -> list[dict]:
    products = times.get("products of chunked")
    return [
        {
            "shape": str(shape),
            "order": order,
            "by": name,
            **time,
            "over chunked": time["median_ms"] / times["chunked"]["median_ms"],
            "over its products": time["median_ms"] / products["median_ms"] if products and name == "chunked" else None,
        }
        for name, time in times.items()
    ]


def _training_pass(
    shape: tuple[int, int, int], order: int, method: str, *, state: bool = True, reset: bool = False
) -> Callable:
    batch, steps, channels = shape
    system = prepare(*delay_network(order, max(steps, 8)), steps, method=method)
    u = torch.randn(shape, requires_grad=True)
    m = torch.randn(batch, channels, order, requires_grad=True) if state else None
    cut = torch.rand(batch, steps) < 8 / steps if reset else None
    gradient = torch.randn_like(apply(u, system, m)[0])

    def run():
        memory, _ = apply(u, system, m, reset=cut)
        torch.autograd.grad(memory, [x for x in (u, m) if x is not None], gradient)

    return run


def _products(shape: tuple[int, int, int], order: int) -> Callable:
    batch, steps, channels = shape
    system = prepare(*delay_network(order, steps), steps, method="chunked")
    W = system.inputs
    length = W.shape[0] - order
    if time_invariant._channels_last(torch.empty(shape), system, None):
        W = W.mT.expand(batch * steps // length, -1, -1)
        rows = torch.randn(len(W), length + order, channels)
        gradient = torch.randn(len(W), length * order, channels)
        return lambda: (W @ rows, W.mT @ gradient)
    rows = torch.randn(batch * channels * steps // length, length + order)
    gradient = torch.randn(rows.shape[0], length * order)
    return lambda: (rows @ W, gradient @ W.mT)


def _transforms(shape: tuple[int, int, int], order: int) -> Callable:
    batch, steps, channels = shape
    memory = torch.randn(channels, batch, order, 2 * steps)
    spectrum = torch.fft.rfft(memory)
    return lambda: (torch.fft.irfft(spectrum, n=2 * steps), torch.fft.rfft(memory))
