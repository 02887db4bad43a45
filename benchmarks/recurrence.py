"""The diagonal recurrence against the memory's bandwidth, as ``torch.add(a, b, out=c)`` shows it in the same run."""

import torch
from measure import interleave

from legato.ops.kernels import choose
from legato.ops.recurrence import linear_recurrence

SHAPES = [(8, 4096, 256), (8, 2048, 256), (32, 1024, 512), (1, 65536, 64)]


def measure() -> list[dict]:
    return [row for shape in SHAPES for row in _measure_shape(*shape)]


def _measure_shape(B: int, T: int, C: int) -> list[dict]:
    """Buffers are warm: the kernels write into arrays that exist, as torch.add does. A training step allocates."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kernel, name, _ = choose(device)
    decay, impulse = (torch.rand(B, T, 1, C, device=device) for _ in range(2))
    out, grad_decay, grad_impulse = (torch.empty_like(decay) for _ in range(3))
    states, carry = kernel.forward(decay, impulse, None, None, False)
    state = torch.zeros_like(carry)
    leaves = [x.squeeze(2).clone().requires_grad_() for x in (decay, impulse)]
    weight = torch.ones_like(leaves[1])

    def training_step():
        linear_recurrence(*leaves)[0].backward(weight)
        leaves[0].grad = leaves[1].grad = None

    candidates = {"torch.add": lambda: torch.add(decay, impulse, out=out), "training step": training_step}
    arrays = {"torch.add": 3, "forward": 3, "backward": 5}
    if name == "numba":
        backward_arrays = (states, impulse, state, grad_decay, grad_impulse, carry)
        candidates |= {
            "forward": lambda: kernel._launch(kernel._forward, decay, (impulse, out, carry), None, False),
            "backward": lambda: kernel._launch(kernel._backward, decay, backward_arrays, None, False),
        }
    times = interleave(candidates, rounds=30)
    bandwidth = {key: n * decay.nbytes / times[key]["median_ms"] / 1e6 for key, n in arrays.items() if key in times}
    rows = []
    for key, time in times.items():
        row = {"shape": f"({B}, {T}, {C})", "what": key, "backend": name, **time}
        if key in bandwidth:
            row |= {"GB_per_s": bandwidth[key], "share_of_add": bandwidth[key] / bandwidth["torch.add"]}
        rows.append(row)
    return rows
