"""How every benchmark measures: candidates interleaved, medians and ratios within one run. Needs no package but torch.

``benchmark.py`` has the papers' tables; the subjects in ``benchmarks/`` use the same functions.
"""

import gc
import json
import math
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch

from .data.files import write as write_whole
from .environment import environment


class Seconds(float):
    """What a candidate returns that runs in another process and has measured itself."""


def interleave(
    candidates: dict[str, Callable[[], Any]],
    *,
    rounds: int = 20,
    warmup: int = 3,
    patience: float = math.inf,
    settle: bool = False,
) -> dict[str, dict[str, float]]:
    """Time each candidate once a round, in turn (A B C A B C ...), so that a noisy neighbour disturbs all alike.

    Args:
        candidates: what to run, by name; what one returns counts only where it is ``Seconds``, in place of its time.
        rounds: how often each is timed.
        warmup: runs of each before the first round.
        patience: seconds after which a candidate takes no more turns, its warm-up counted; one whose warm-up alone
            takes as long is timed by its first run.

    Returns:
        For each name the median, the fastest and the slowest time in milliseconds, and the number of times.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    spent = dict.fromkeys(candidates, 0.0)

    def turn(name: str) -> None:
        if spent[name] < patience:
            seconds[name].append(_time(candidates[name]))
            spent[name] += seconds[name][-1]

    for name in candidates:
        for _ in range(warmup):
            turn(name)
        if spent[name] < patience:
            seconds[name].clear()
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, run in candidates.items():
                if settle and spent[name] < patience:
                    run()
                turn(name)
    finally:
        gc.enable()
    return {
        name: {"median_ms": 1e3 * median(s), "min_ms": 1e3 * min(s), "max_ms": 1e3 * max(s), "rounds": len(s)}
        for name, s in seconds.items()
    }


def machine() -> dict[str, Any]:
    """The facts a timing depends on."""
    facts = environment()
    return {**facts["machine"], "legato": facts["legato"], "commit": facts["commit"]}


def write(folder: Path, device: str, subject: str, rows: list[dict], **facts: Any) -> Path:
    """Write the rows of one subject, with what they were measured on, to ``<device>-<subject>-<date>.json``."""
    path = folder / f"{device}-{subject}-{date.today().isoformat()}.json"
    report = {"subject": subject, "machine": machine(), **facts, "rows": rows}
    write_whole(path, [(json.dumps(report, indent=1) + "\n").encode()])
    return path


def _time(run: Callable[[], Any]) -> float:
    """Seconds of one run, from an idle device to an idle device."""
    _wait_for_device()
    start = time.perf_counter()
    result = run()
    own = result if isinstance(result, Seconds) else None
    del result  # giving memory back counts too
    _wait_for_device()
    return time.perf_counter() - start if own is None else own


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
