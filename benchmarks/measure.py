"""How every benchmark here measures: candidates interleaved, medians and ratios within one run, results as JSON."""

import gc
import json
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def interleave(candidates: dict[str, Callable[[], Any]], *, rounds: int = 20, warmup: int = 3) -> dict[str, dict]:
    """Time each candidate once a round, in turn (A B C A B C ...), so that a noisy neighbour disturbs all alike.

    Returns for each name the median, the fastest and the slowest time in milliseconds.
    """
    for run in candidates.values():
        for _ in range(warmup):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, run in candidates.items():
                _wait_for_device()
                start = time.perf_counter()
                run()
                _wait_for_device()
                seconds[name].append(time.perf_counter() - start)
    finally:
        gc.enable()
    return {
        name: {"median_ms": 1e3 * median(s), "min_ms": 1e3 * min(s), "max_ms": 1e3 * max(s), "rounds": rounds}
        for name, s in seconds.items()
    }


def save(subject: str, rows: list[dict]) -> Path:
    """Write the rows of one subject, with what they were measured on, to ``results/<device>-<subject>-<date>.json``."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = RESULTS / f"{device}-{subject}-{date.today().isoformat()}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"subject": subject, "machine": machine(), "rows": rows}, indent=1) + "\n")
    return path


def machine() -> dict:
    """The facts a timing depends on."""
    from legato.experiments.environment import environment

    facts = environment()
    return {**facts["machine"], "legato": facts["legato"], "commit": facts["commit"]}


def table(rows: list[dict]) -> str:
    """The rows as aligned text; numbers with three significant digits."""
    if not rows:
        return ""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns] + [[_text(row.get(key, "")) for key in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
