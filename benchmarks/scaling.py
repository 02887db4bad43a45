"""Scaling of a training step with time, channels, batch size and order, ours and peers.

One size grows by factors of four to eight, and the others are constant. A candidate whose step
would take ``PATIENCE_SECONDS`` at the next size, if it took eight times as long there, is not run
at that size. Checks and timing are those of ``peers.py``.
"""

from pathlib import Path

import expected
import peers
from recurrence import step

TESTS = ("tests/ops/test_recurrence.py", "tests/layers/test_lmu.py", "tests/benchmarks/test_peers.py")
_SCAN = {"batch": 4, "steps": 1024, "channels": 128}
_LMU = {"batch": 16, "steps": 512, "theta": 512, "order": 64, "units": 128, "sequences": True}
# The values of the size that grows, the task, and the constant sizes.
SWEEPS = {
    "steps": ((64, 256, 1024, 4096, 16_384, 65_536), "recurrence", _SCAN),
    "channels": ((4, 32, 256, 2048), "recurrence", _SCAN),
    "batch": ((1, 8, 64, 512), "recurrence", _SCAN),
    "order": ((16, 64, 256, 1024), "lmu", _LMU),
}
OURS = {"recurrence": {"linear_recurrence": step}, "lmu": {"LMU": expected.lmu_step}}
# The memory of its gradients grows with the square of time; the same layer with Dense after it is
# used instead.
LEFT_OUT = ("keras-lmu FFT",)
PATIENCE_SECONDS = 1.0


def versions() -> dict[str, str]:
    return peers.versions("recurrence", "lmu")


def measure() -> list[dict]:
    return [row for name in SWEEPS for row in grow(name)]


def grow(name: str) -> list[dict]:
    values, task, sizes = SWEEPS[name]
    rows = []
    with peers.gather(task) as others:
        others = [peer for peer in others if peer.name not in LEFT_OUT]
        for value in values:
            now = sizes | {name: value}
            found = peers.compare(task, now, OURS[task], others, rounds=3, warmup=1, patience=PATIENCE_SECONDS)
            rows += [{"growing": name, "sizes": _words(now), name: value, **row} for row in found]
            slow = {row["by"] for row in found if row.get("median_ms", 0) > 1e3 * PATIENCE_SECONDS / 8}
            skipped = {row["by"] for row in found if "skipped" in row}  # reported once
            others = [peer for peer in others if peer.name not in slow | skipped]
    return rows


def plot(rows: list[dict], path: Path) -> None:
    from pictures import curves

    panels, x = {}, {}
    for name, (_, task, sizes) in SWEEPS.items():
        stay = _words({key: value for key, value in sizes.items() if key != name})
        title = f"{'linear_recurrence' if task == 'recurrence' else 'LMU'}, training step: {stay}"
        panels[title], x[title] = [row for row in rows if row["growing"] == name], name
    curves(panels, x, path)


def _words(sizes: dict) -> str:
    return ", ".join(f"{name} {value:,}" for name, value in sizes.items() if name != "sequences")
