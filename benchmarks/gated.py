"""The kernel of the gated unit, compared with its definition, in networks of 256 units.

One layer, and a training step of two layers. Both variants are our code, the second without the
kernel, and their runs alternate. ``torch.nn.LSTM`` of the same size is timed too.
"""

import torch
from torch import nn

from legato.layers import GILR, GILRLSTM, SRU, Stack
from legato.ops.backends import choose, register, use_backend
from measure import Target, interleave

SHAPES = [(1, 65536), (8, 2048)]
INPUTS, UNITS = 4, 256
ROUNDS = 3

TESTS = ("tests/ops/test_gated.py", "tests/layers/test_gilr.py", "tests/layers/test_sru.py")
# A kernel with a smaller gain is not worth its code.
TARGETS = (Target("the kernel over the definition, the least gain", "definition over it", 1.05, "times"),)


def measure() -> list[dict]:
    torch.manual_seed(0)
    rows = []
    for batch, steps in SHAPES:
        networks = {
            "GILR, one layer": GILR(UNITS, UNITS),
            "SRU, one layer": SRU(UNITS, UNITS),
            "SRU": Stack(SRU(INPUTS, UNITS), SRU(UNITS, UNITS)),
            "GILR-LSTM": Stack(GILRLSTM(INPUTS, UNITS), GILRLSTM(UNITS, UNITS)),
        }
        candidates = {"torch.nn.LSTM": training_step(nn.LSTM(INPUTS, UNITS, 2, batch_first=True), batch, steps)}
        for name, network in networks.items():
            step = training_step(network, batch, steps)
            candidates |= {f"{name}: kernel": step, f"{name}: definition": without_kernel(step)}
        times = interleave(candidates, rounds=ROUNDS, warmup=1)
        lstm = times["torch.nn.LSTM"]["median_ms"]
        for name, time in times.items():
            network, _, variant = name.partition(": ")
            definition = times[f"{network}: definition"]["median_ms"] if variant == "kernel" else None
            comparable = variant and "one layer" not in network
            rows.append({
                "shape": f"({batch}, {steps})", "network": network, "by": variant, **time,
                "definition over it": definition and definition / time["median_ms"],
                "nn.LSTM over it": lstm / time["median_ms"] if comparable else None,
            })  # fmt: skip
    return rows


def training_step(network: nn.Module, batch: int, steps: int):
    """Forward and backward, with a gradient at every output; no optimiser."""
    x = torch.randn(batch, steps, INPUTS if isinstance(network, (nn.LSTM, Stack)) else UNITS)
    weight = torch.randn(batch, steps, UNITS)

    def step() -> None:
        network.zero_grad(set_to_none=True)
        network(x)[0].backward(weight)

    return step


def without_kernel(step):
    def run() -> None:
        # A backend with the kernel of the recurrence only: gated units compute their definition.
        register("recurrence alone", choose("linear_recurrence", torch.device("cpu"))[0])
        with use_backend("recurrence alone"):
            step()

    return run
