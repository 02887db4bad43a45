"""Check and measure the Triton kernels on a CUDA machine: PYTHONPATH=src python benchmarks/gpu_check.py OUT.json

Needs torch with CUDA and triton, nothing else. Exit code: 0 right, 1 a result is out of bounds, 2 no CUDA here.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import torch

try:
    import jaxtyping  # noqa: F401
except ImportError:  # shapes are only names here: Float[Tensor, "B T"] becomes Tensor
    stand_in = ModuleType("jaxtyping")
    shape = type("Shape", (), {"__class_getitem__": classmethod(lambda cls, item: item[0])})
    stand_in.__dict__.update(dict.fromkeys(("Bool", "Complex", "Float", "Inexact", "Int", "Shaped"), shape))
    sys.modules["jaxtyping"] = stand_in

RESULTS = ("states", "final_state", "grad_decay", "grad_impulse", "grad_initial")
# (impulse, decay, dtype, reset, reverse): whole and uneven blocks, one pass and chunks, broadcast decays.
CASES = [
    ((8, 1000, 512), (8, 1000, 512), torch.float32, False, False),
    ((8, 1000, 512), (8, 1000, 512), torch.bfloat16, True, True),
    ((300, 65, 65), (300, 65, 65), torch.float16, True, False),
    ((2, 20_001, 63), (2, 20_001, 63), torch.float32, True, True),
    ((2, 20_001, 63), (63,), torch.float32, False, False),
    ((3, 5_000, 4, 24), (3, 5_000, 4, 1), torch.bfloat16, False, False),
    ((2, 3_000, 40), (40,), torch.complex64, True, True),
    ((2, 3_000, 40), (2, 3_000, 40), torch.float64, True, False),
    ((2, 1, 5), (2, 1, 5), torch.float32, False, False),
]
SPEEDS = [
    ((8, 8192, 1536), torch.float32),
    ((8, 8192, 1536), torch.bfloat16),
    ((1, 1 << 20, 64), torch.float32),
    ((1, 1 << 20, 64), torch.bfloat16),
]


def main() -> int:
    if not torch.cuda.is_available():
        print("gpu_check: no CUDA device here, nothing was checked", file=sys.stderr)
        return 2
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 1
    from measure import machine

    correctness = [row for case in CASES for row in check(*case)]
    speed = [row for size, dtype in SPEEDS for row in time_kernels(size, dtype)]
    for row in correctness + speed:
        print(row)
    report = {"machine": machine(), "correctness": correctness, "speed": speed}
    Path(sys.argv[1]).write_text(json.dumps(report, indent=1) + "\n")
    return 0 if all(row["right"] for row in correctness) else 1


def check(
    size: tuple[int, ...], decay_size: tuple[int, ...], dtype: torch.dtype, resets: bool, reverse: bool
) -> list[dict[str, Any]]:
    """err(triton, float64) <= 2 (err(plain torch, float64) + eps max|h|), for both results and all gradients."""
    torch.manual_seed(0)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    carry = torch.promote_types(dtype, torch.float32)
    decay = torch.rand(decay_size, device="cuda")
    if dtype.is_complex:
        decay = torch.polar(decay, 6.0 * torch.rand_like(decay))
    inputs = [decay.to(dtype), *(torch.randn(size, device="cuda", dtype=carry).to(dtype) for _ in range(2))]
    states = [torch.randn(size[:1] + size[2:], device="cuda", dtype=carry) for _ in range(2)]
    reset = torch.rand(size[:2], device="cuda") < 0.01 if resets else None

    def run(backend: str, dtype: torch.dtype, carry: torch.dtype) -> list[torch.Tensor]:
        from legato.ops.recurrence import linear_recurrence

        decay, impulse, grad_states = (x.to(dtype) for x in inputs)
        h_0, grad_final = (x.to(carry) for x in states)
        leaves = [x.clone().requires_grad_() for x in (decay, impulse, h_0)]
        results = linear_recurrence(*leaves, reset=reset, reverse=reverse, backend=backend)
        return [*results, *torch.autograd.grad(results, leaves, (grad_states, grad_final))]

    # In 64 bits plain torch is its own measure: its error is taken from 32 bits, scaled.
    low = dtype if dtype != wide else (torch.complex64 if dtype.is_complex else torch.float32)
    got, exact = run("triton", dtype, carry), run("reference", wide, wide)
    same = run("reference", low, torch.promote_types(low, torch.float32))
    scales = [exact[i].detach().abs().max().item() for i in (0, 0, 2, 3, 3)]
    rows = []
    for name, x, y, z, scale in zip(RESULTS, got, same, exact, scales, strict=True):
        eps = torch.finfo(x.dtype).eps
        error, plain = (x - z).abs().max().item(), (y - z).abs().max().item() * eps / torch.finfo(y.dtype).eps
        bound = 2 * (plain + eps * scale)
        rows.append({
            "impulse": size, "decay": decay_size, "dtype": str(dtype), "reset": resets, "reverse": reverse,
            "result": name, "error": error, "bound": bound, "right": error <= bound,
        })  # fmt: skip
    return rows


def time_kernels(size: tuple[int, int, int], dtype: torch.dtype) -> list[dict[str, Any]]:
    """Forward (3 arrays), backward (5) and a copy (2) in turn: each as GB/s and as a share of the copy's."""
    from legato.ops.kernels import triton_gpu

    B, T, D = size
    decay = torch.rand(B, T, 1, D, device="cuda").to(dtype)
    impulse = torch.randn(B, T, 1, D, device="cuda").to(dtype)
    grad = torch.zeros(B, 1, D, device="cuda")
    states, _ = triton_gpu.forward(decay, impulse, None, None, False)
    target = torch.empty_like(impulse)
    candidates = {
        "copy": (2, lambda: target.copy_(impulse)),
        "forward": (3, lambda: triton_gpu.forward(decay, impulse, None, None, False)),
        "backward": (5, lambda: triton_gpu.backward(impulse, grad, decay, states, None, None, False)),
    }
    times = _interleave({name: run for name, (_, run) in candidates.items()})
    rows = []
    for name, (arrays, _) in candidates.items():
        bandwidth = arrays * impulse.nbytes / times[name] / 1e6  # GB/s
        share = bandwidth / (2 * impulse.nbytes / times["copy"] / 1e6)
        row = {"size": size, "dtype": str(dtype), "pass": name, "ms": times[name], "GB/s": bandwidth}
        rows.append(row | {"share_of_copy": share, "chunks": triton_gpu._plan(impulse).chunks})
    return rows


def _interleave(candidates: dict[str, Callable[[], Any]], rounds: int = 30, warmup: int = 5) -> dict[str, float]:
    """The median time of each in milliseconds on the device's clock, measured in turn."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(warmup + rounds):
        for name, run in candidates.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            if turn >= warmup:
                times[name].append(start.elapsed_time(end))
    return {name: median(t) for name, t in times.items()}


if __name__ == "__main__":
    sys.exit(main())
