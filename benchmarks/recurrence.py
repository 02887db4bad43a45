"""The diagonal recurrence, compared with memory bandwidth and with other libraries.

Kernels are timed on existing arrays: they write into allocated memory, as ``torch.add(a, b,
out=c)`` does in the same rounds. A training step is forward and backward for a given gradient of
the states, with allocation. The states and gradients of every candidate are checked first
(``peers.py``).
"""

from pathlib import Path

import torch

import peers
from legato.ops.backends import choose
from legato.ops.recurrence import linear_recurrence
from measure import Target, interleave

TESTS = ("tests/ops/test_recurrence.py", "tests/ops/test_numba_recurrence.py", "tests/benchmarks/test_peers.py")
SHAPES = [(8, 4096, 256), (8, 2048, 256), (32, 1024, 512), (1, 65536, 64)]
BESIDE = [(8, 2048, 256), (8, 4096, 256)]
ONE_CHANNEL = (1, 1_048_576, 1)
SLOW = ("torch loop",)  # takes minutes at these sizes
STEP_ARRAYS = 8  # the least traffic: forward reads two arrays and writes one, backward reads three and writes two

TARGETS = (
    *(
        Target(f"{what} kernel at {shape}", "share_of_add", share, "of torch.add", {"what": what, "shape": shape})
        for what, share in (("forward", 0.8), ("backward", 0.6))
        for shape in ("(8, 4096, 256)", "(32, 1024, 512)", "(1, 65536, 64)")
    ),
    Target(f"forward kernel at {ONE_CHANNEL}", "times_cumsum", 3, "x torch.cumsum", at_most=True),
    *(
        Target(f"training step at {shape}, fastest peer", "times_ours", times, "x ours", {"shape": shape})
        for shape, times in (("(8, 2048, 256)", 5), ("(8, 4096, 256)", 2.5))
    ),
    Target("training step, torch associative_scan", "times_ours", 8, "x ours", {"by": "torch associative_scan"}),
)


def versions() -> dict[str, str]:
    return peers.versions("recurrence")


def measure() -> list[dict]:
    rows = [row for shape in SHAPES for row in _kernels(*shape)]
    rows += _one_channel()
    with peers.gather("recurrence") as others:
        others = [peer for peer in others if peer.name not in SLOW]
        for shape in BESIDE:
            rows += training_step(*shape, others, rounds=7)
    return rows


def training_step(B: int, T: int, C: int, others: list[peers.Peer], **options) -> list[dict]:
    """Our step compared with the others, with the bandwidth for its least memory traffic."""
    a, b = torch.ones(B, T, C), torch.empty(B, T, C)
    rows = peers.compare(
        "recurrence",
        {"batch": B, "steps": T, "channels": C},
        {"linear_recurrence": step},
        others,
        extra={"copy": lambda: b.copy_(a)},
        **options,
    )
    copy = next(row for row in rows if row["by"] == "copy")
    rate = 2 * a.nbytes / copy["median_ms"] / 1e6
    found = []
    for row in rows:
        row = {"shape": f"({B}, {T}, {C})", "what": "training step", **row}
        if "median_ms" in row and row["by"] != "copy":
            row["GB_per_s"] = STEP_ARRAYS * a.nbytes / row["median_ms"] / 1e6
            row["share_of_copy"] = row["GB_per_s"] / rate
        elif row["by"] == "copy":
            row |= {"what": "copy of the impulses", "GB_per_s": rate, "share_of_copy": 1.0}
        found.append(row)
    return found


def step(sizes: dict, arrays: dict):
    """Our step, as an argument of ``peers.compare``."""
    decay, impulse, grad = (torch.from_numpy(arrays[name]) for name in ("decay", "impulse", "grad"))
    leaves = decay.requires_grad_(), impulse.requires_grad_()

    def run() -> dict[str, torch.Tensor]:
        states, _ = linear_recurrence(*leaves)
        grad_decay, grad_impulse = torch.autograd.grad(states, leaves, grad)
        return {"states": states.detach(), "grad_decay": grad_decay, "grad_impulse": grad_impulse}

    return run


def plot(rows: list[dict], path: Path) -> None:
    from pictures import bars

    steps = [row for row in rows if row["what"] == "training step"]
    shapes = dict.fromkeys(row["shape"] for row in steps)
    bars({f"training step at {s}, float32": [row for row in steps if row["shape"] == s] for s in shapes}, path)


def _kernels(B: int, T: int, C: int) -> list[dict]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kernel, name, _ = choose("linear_recurrence", device)
    decay, impulse = (torch.rand(B, T, 1, C, device=device) for _ in range(2))
    out, grad_decay, grad_impulse = (torch.empty_like(decay) for _ in range(3))
    states, carry = kernel.forward(decay, impulse, None, None, False)
    state = torch.zeros_like(carry)
    candidates = {"torch.add": lambda: torch.add(decay, impulse, out=out)}
    if name == "numba":
        backward_arrays = (states, impulse, state, grad_decay, grad_impulse, carry)
        candidates |= {
            "forward": lambda: kernel._launch(kernel._forward, decay, (impulse, out, carry), None, False),
            "backward": lambda: kernel._launch(kernel._backward, decay, backward_arrays, None, False),
        }
    times = interleave(candidates, rounds=30)
    arrays = {"torch.add": 3, "forward": 3, "backward": 5}
    bandwidth = {key: arrays[key] * decay.nbytes / times[key]["median_ms"] / 1e6 for key in times}
    return [
        {
            "shape": f"({B}, {T}, {C})",
            "what": key,
            "by": "torch" if key == "torch.add" else name,
            **time,
            "moved_MB": arrays[key] * decay.nbytes / 1e6,
            "GB_per_s": bandwidth[key],
            "share_of_add": bandwidth[key] / bandwidth["torch.add"],
        }
        for key, time in times.items()
    ]


def _one_channel() -> list[dict]:
    """One channel, compared with torch.cumsum: the same chain of additions with decay 1."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kernel, name, _ = choose("linear_recurrence", device)
    decay, impulse = (torch.rand(1, ONE_CHANNEL[1], 1, 1, device=device) for _ in range(2))
    out = torch.empty_like(impulse)
    candidates = {"torch.cumsum": lambda: torch.cumsum(impulse, 1, out=out)}
    if name == "numba":
        carry = torch.zeros(1, 1, 1)
        candidates["forward"] = lambda: kernel._launch(kernel._forward, decay, (impulse, out, carry), None, False)
    times = interleave(candidates, rounds=30)
    base = times["torch.cumsum"]["median_ms"]
    return [
        {
            "shape": str(ONE_CHANNEL),
            "what": key,
            "by": "torch" if key == "torch.cumsum" else name,
            **time,
            "times_cumsum": time["median_ms"] / base,
        }
        for key, time in times.items()
    ]
