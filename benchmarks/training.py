"""One training step (forward, loss, backward, Adam): parallel LMU and sequential LMU.

psMNIST: the sizes of the two papers, batch size 100, 784 steps, classification by the last output.
Mackey-Glass: one network (140 units over a memory of order 40, then 80, then 1) with either layer,
series of 5,000 steps, an error at every step. The sequential layer gains more from a batch than the
parallel one, which is efficient without a batch, so two batch sizes are measured.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from legato.layers import LMU, RecurrentLMU
from measure import Target, interleave

ROUNDS = 5
PARALLEL_STEPS = 10  # per timed run, because one step is short
# The ratios of the papers on a GPU (unverified).
PAPERS = (("psMNIST", 100, 220), ("Mackey-Glass", 1, 64))

TESTS = ("tests/layers/test_lmu.py", "tests/layers/test_recurrent_lmu.py", "tests/layers/test_legendre_memory.py")
TARGETS = tuple(
    Target(
        f"LMU over RecurrentLMU, {task}, batch {batch}",
        "times faster",
        times,
        "times",
        {"task": task, "batch": batch, "layer": "LMU"},
    )
    for task, batch, times in PAPERS
)


def measure() -> list[dict]:
    torch.manual_seed(0)
    rows = compare("psMNIST", 100, 784, psmnist_step)
    for batch in (1, 8):
        rows += compare("Mackey-Glass", batch, 5000, mackey_glass_step)
    return rows


def compare(task: str, batch: int, steps: int, make: Callable) -> list[dict]:
    parallel, parallel_size = make(True, batch, steps)
    sequential, sequential_size = make(False, batch, steps)

    def parallel_run():
        for _ in range(PARALLEL_STEPS):
            parallel()

    times = interleave({"parallel": parallel_run, "sequential": sequential}, rounds=ROUNDS, warmup=1)
    milliseconds = {
        "parallel": {k: times["parallel"][k] / PARALLEL_STEPS for k in ("median_ms", "min_ms", "max_ms")},
        "sequential": {k: times["sequential"][k] for k in ("median_ms", "min_ms", "max_ms")},
    }
    slow = milliseconds["sequential"]["median_ms"]
    return [
        {"task": task, "batch": batch, "steps": steps, "layer": layer, "parameters": size, **milliseconds[name]}
        | {"times faster": slow / milliseconds[name]["median_ms"]}
        for name, layer, size in (
            ("parallel", "LMU", parallel_size),
            ("sequential", "RecurrentLMU", sequential_size),
        )
    ]


def psmnist_step(parallel: bool, batch: int, steps: int) -> tuple[Callable[[], None], int]:
    layer = (
        LMU(1, 346, order=468, theta=784, return_sequences=False)
        if parallel
        else RecurrentLMU(1, 212, order=256, theta=784, return_sequences=False)
    )
    x, y = torch.rand(batch, steps, 1), torch.randint(10, (batch,))
    return training_step(layer, nn.Linear(layer.hidden_size, 10), lambda output: F.cross_entropy(output, y), x)


def mackey_glass_step(parallel: bool, batch: int, steps: int) -> tuple[Callable[[], None], int]:
    layer = LMU(1, 140, order=40, theta=50, activation="tanh") if parallel else RecurrentLMU(1, 140, order=40, theta=50)
    head = nn.Sequential(nn.Linear(140, 80), nn.Tanh(), nn.Linear(80, 1))
    x, y = torch.rand(batch, steps, 1), torch.rand(batch, steps, 1)
    return training_step(layer, head, lambda output: F.mse_loss(output, y), x)


def training_step(layer: nn.Module, head: nn.Module, loss: Callable, x: torch.Tensor) -> tuple[Callable[[], None], int]:
    parameters = [*layer.parameters(), *head.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=1e-3, fused=True)

    def step() -> None:
        optimiser.zero_grad()
        output, _ = layer(x)
        loss(head(output)).backward()
        optimiser.step()

    return step, sum(p.numel() for p in parameters)
