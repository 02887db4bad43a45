"""A training step of layers (forward and backward), compared with other libraries.

``LMU`` is compared with the two layers of keras-lmu that have the same equations, weights and
inputs, at the sizes of the two papers on psMNIST. Outputs and the gradients of all weights are
checked first (``peers.py``). The recurrent layers are compared with ``torch.nn.LSTM`` and ``GRU``
of the same width. Their equations differ, so only times are compared. There is no optimiser.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import expected
import peers
from legato.layers import GILR, GILRLSTM, LMU, SRU, MinGRU
from measure import Target, interleave

TESTS = ("tests/layers/test_lmu.py", "tests/layers/test_gilr.py", "tests/layers/test_sru.py",
         "tests/layers/test_min_rnn.py", "tests/benchmarks/test_peers.py")  # fmt: skip
_SIZES = {"steps": 784, "theta": 784}
SEQUENCES = {"batch": 32, "order": 256, "units": 212, "sequences": True, **_SIZES}
LAST_STATE = {"batch": 100, "order": 468, "units": 346, "sequences": False, **_SIZES}
# With its hidden cell inside, the keras-lmu layer takes 20 GB for sequences, so it is timed
# separately.
LMU_TASKS = (
    ("sequences", SEQUENCES, ("keras-lmu FFT, Dense after", "keras-lmu sequential")),
    ("sequences, cell inside", SEQUENCES, ("keras-lmu FFT",)),
    ("last state", LAST_STATE, ("keras-lmu FFT", "keras-lmu sequential")),
)
RNN_SHAPES = [(32, 784, 128), (1, 4096, 256)]
PATIENCE_SECONDS = 15.0  # of each candidate

TARGETS = (
    Target("LMU, sequences: keras-lmu FFT", "times_ours", 15, "x ours", {"task": "sequences, cell inside"}),
    Target("LMU, last state: keras-lmu, the faster layer", "times_ours", 200, "x ours", {"task": "last state"}),
)


def versions() -> dict[str, str]:
    return peers.versions("lmu")


def measure() -> list[dict]:
    rows = []
    for task, sizes, names in LMU_TASKS:
        with peers.gather("lmu") as others:
            rows += lmu_step(task, sizes, [peer for peer in others if peer.name in names])
    return rows + [row for shape in RNN_SHAPES for row in _recurrent(*shape)]


def lmu_step(task: str, sizes: dict, others: list[peers.Peer], **options) -> list[dict]:
    shape = f"({sizes['batch']}, {sizes['steps']}, 1)"
    about = {"task": task, "shape": shape, "order": sizes["order"], "units": sizes["units"]}
    options = {"rounds": 5, "warmup": 2, "patience": PATIENCE_SECONDS} | options
    return [about | row for row in peers.compare("lmu", sizes, {"LMU": expected.lmu_step}, others, **options)]


def plot(rows: list[dict], path: Path) -> None:
    from pictures import bars

    panels: dict[str, list[dict]] = {}
    for row in rows:
        order = f", order {row['order']}, {row['units']} units" if "order" in row else ""
        panels.setdefault(f"{row['task']} at {row['shape']}{order}", []).append(row)
    bars(panels, path)


def _recurrent(batch: int, steps: int, width: int) -> list[dict]:
    """Layers of ``width`` inputs and units; "times_faster" is relative to the faster layer of
    torch."""
    torch.manual_seed(0)
    layers = {
        "GILR": GILR(width, width),
        "GILRLSTM": GILRLSTM(width, width),
        "SRU": SRU(width, width),
        "MinGRU": MinGRU(width, width),
        "LMU": LMU(width, width, memory_size=width // 32, order=32, theta=256),
    }
    of_torch = {
        "torch.nn.LSTM": nn.LSTM(width, width, batch_first=True),
        "torch.nn.GRU": nn.GRU(width, width, batch_first=True),
    }
    x, weight = torch.randn(batch, steps, width), torch.randn(batch, steps, width)
    runs = {name: _training_step(layer, x, weight) for name, layer in (layers | of_torch).items()}
    times = interleave(runs, rounds=5, warmup=1, patience=PATIENCE_SECONDS)
    fastest = min(times[name]["median_ms"] for name in of_torch)
    return [
        {
            "task": "recurrent layers",
            "shape": str((batch, steps, width)),
            "by": name,
            "version": f"legato {peers.legato.__version__}" if name in layers else f"torch {torch.__version__}",
            "parameters": sum(p.numel() for p in (layers | of_torch)[name].parameters()),
            **time,
            "times_faster": fastest / time["median_ms"],
        }
        for name, time in times.items()
    ]


def _training_step(layer: nn.Module, x: torch.Tensor, weight: torch.Tensor) -> Callable[[], None]:
    parameters = list(layer.parameters())

    def step() -> None:
        torch.autograd.grad(layer(x)[0], parameters, weight)

    return step
