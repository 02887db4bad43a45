"""The time-invariant recurrence: chunked against fft, against its own matrix products, and on one very long input.

A time is one forward and one backward pass (gradients of the input and of the initial state; A and B frozen and
prepared), float32. The incoming gradient is laid out as each method lays out its memory. "fft, no state" leaves the
response to the initial state out, which only fft has to compute apart. "products" are the two matrix products that
chunked consists of, "transforms" the two that fft consists of, both alone and on data that lie ready.
"""

from collections.abc import Callable

import torch
from measure import interleave

from legato.legendre import delay_network
from legato.ops.lti import METHODS, apply, prepare

SHAPES = [((16, 1024, 16), 64), ((4, 4096, 32), 32), ((32, 784, 1), 256)]
OTHERS = [((64, 4, 1), 64), ((64, 16, 1), 64), ((64, 64, 1), 64), ((32, 256, 64), 4), ((20, 784, 1), 468)]
LONG = ((1, 1_048_576, 1), 32)

TESTS = ("tests/ops/test_lti.py",)


def measure() -> list[dict]:
    torch.manual_seed(0)
    rows = [_chunked_against_fft(shape, order) for shape, order in SHAPES]
    rows += [_every_method(shape, order) for shape, order in OTHERS]
    long = interleave({"chunked": _training_pass(*LONG, "chunked")}, rounds=3, warmup=1)
    return [*rows, {"shape": str(LONG[0]), "order": LONG[1], "chunked_ms": long["chunked"]["median_ms"]}]


def _chunked_against_fft(shape: tuple[int, int, int], order: int) -> dict:
    times = interleave(
        {
            "chunked": _training_pass(shape, order, "chunked"),
            "fft": _training_pass(shape, order, "fft"),
            "fft, no state": _training_pass(shape, order, "fft", state=False),
            "products": _products(shape, order),
            "transforms": _transforms(shape, order),
            "with resets": _training_pass(shape, order, "chunked", reset=True),
        },
        rounds=7,
        warmup=2,
    )
    ms = {name: time["median_ms"] for name, time in times.items()}
    return {
        "shape": str(shape),
        "order": order,
        "chunked_ms": ms["chunked"],
        "fft_ms": ms["fft"],
        "fft_no_state_ms": ms["fft, no state"],
        "fft/chunked": ms["fft"] / ms["chunked"],
        "fft_no_state/chunked": ms["fft, no state"] / ms["chunked"],
        "products_ms": ms["products"],
        "chunked/products": ms["chunked"] / ms["products"],
        "transforms_ms": ms["transforms"],
        "transforms/chunked": ms["transforms"] / ms["chunked"],
        "chunked_resets_ms": ms["with resets"],
    }


def _every_method(shape: tuple[int, int, int], order: int) -> dict:
    methods = [method for method in METHODS if shape[1] <= 256 or method in ("fft", "chunked")]
    times = interleave({method: _training_pass(shape, order, method) for method in methods}, rounds=7, warmup=2)
    return {"shape": str(shape), "order": order} | {f"{name}_ms": time["median_ms"] for name, time in times.items()}


def _training_pass(
    shape: tuple[int, int, int], order: int, method: str, *, state: bool = True, reset: bool = False
) -> Callable:
    batch, steps, channels = shape
    kernels = prepare(*delay_network(order, max(steps, 8)), steps, method=method)
    u = torch.randn(shape, requires_grad=True)
    m = torch.randn(batch, channels, order, requires_grad=True) if state else None
    cut = torch.rand(batch, steps) < 8 / steps if reset else None
    gradient = torch.randn_like(apply(u, kernels, m)[0])

    def run():
        memory, _ = apply(u, kernels, m, reset=cut)
        torch.autograd.grad(memory, [x for x in (u, m) if x is not None], gradient)

    return run


def _products(shape: tuple[int, int, int], order: int) -> Callable:
    batch, steps, channels = shape
    W = prepare(*delay_network(order, steps), steps, method="chunked").inputs
    length = W.shape[0] - order
    rows = torch.randn(batch * channels * steps // length, length + order)
    gradient = torch.randn(rows.shape[0], length * order)
    return lambda: (rows @ W, gradient @ W.mT)


def _transforms(shape: tuple[int, int, int], order: int) -> Callable:
    batch, steps, channels = shape
    memory = torch.randn(channels, batch, order, 2 * steps)
    spectrum = torch.fft.rfft(memory)
    return lambda: (torch.fft.irfft(spectrum, n=2 * steps), torch.fft.rfft(memory))
