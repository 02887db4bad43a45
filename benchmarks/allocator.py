"""Environment variables of the user: large pages, and a C library that reuses its memory.

A training step in a new process per setting, alternating between settings. Arrays over 32 MiB are
newly mapped at every step. legato requests large pages for its own arrays; only the user can
request them for the arrays of torch.
"""

import os
import subprocess
import sys
from pathlib import Path
from statistics import median

import torch

SETTINGS = {
    "default": {},
    "large pages for torch": {"THP_MEM_ALLOC_ENABLE": "1"},
    "memory reused": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "17179869184"},
}
WORK = {
    "linear_recurrence (8, 4096, 256)": (
        "from legato import linear_recurrence\n"
        "leaves = [torch.rand(8, 4096, 256, requires_grad=True) for _ in range(2)]\n"
        "parts, weight = leaves, torch.ones(8, 4096, 256)\n"
        "def forward(): return linear_recurrence(*leaves)[0]\n"
    ),
    "GILR (8, 4096, 256)": (
        "from legato import GILR\n"
        "layer, x, weight = GILR(256, 256), torch.rand(8, 4096, 256), torch.ones(8, 4096, 256)\n"
        "parts = list(layer.parameters())\n"
        "def forward(): return layer(x)[0]\n"
    ),
    "LMU (32, 784, 1), order 256, sequences": (
        "from legato import LMU\n"
        "layer, x, weight = LMU(1, 212, order=256, theta=784), torch.rand(32, 784, 1), torch.ones(32, 784, 212)\n"
        "parts = list(layer.parameters())\n"
        "def forward(): return layer(x)[0]\n"
    ),
}
_PROGRAM = """
import time, torch
torch.set_num_threads({threads})
torch.manual_seed(0)
{work}
def step():
    start = time.perf_counter()
    forward().backward(weight)
    for part in parts:
        part.grad = None
    return time.perf_counter() - start
for _ in range(5):
    step()
print(*(step() for _ in range({steps})))
"""
ROUNDS, STEPS = 2, 12

TESTS = ("tests/ops/test_numba_recurrence.py",)


def measure() -> list[dict]:
    rows = []
    for what, work in WORK.items():
        seconds: dict[str, list[float]] = {name: [] for name in SETTINGS}
        for _ in range(ROUNDS):
            for name, setting in SETTINGS.items():
                seconds[name] += _seconds(work, setting)
        usual = median(seconds["default"])
        for name, s in seconds.items():
            spread = {"median_ms": 1e3 * median(s), "min_ms": 1e3 * min(s), "max_ms": 1e3 * max(s)}
            rows.append({"training step": what, "setting": name, **spread, "times faster": usual / median(s)})
    return rows


def _seconds(work: str, setting: dict[str, str]) -> list[float]:
    program = _PROGRAM.format(threads=torch.get_num_threads(), work=work, steps=STEPS)
    source = str(Path(__file__).parents[1] / "src")
    environment = {**os.environ, **setting, "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    return [float(word) for word in done.stdout.split()]
