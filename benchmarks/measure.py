"""Tools for all subjects: timing (``interleave``), bandwidth, memory, targets, result files.

A subject is a module in this folder; ``run.py`` describes its contents.
"""

import ctypes
import gc
import json
import math
import multiprocessing
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from legato._environment import environment

RESULTS = Path(__file__).parent / "results"
_COPY_BYTES = 256 * 2**20  # per array; the three arrays of an addition exceed every cache


class Target(NamedTuple):
    """A bound on a metric: the worst value of ``column`` in the rows that match ``where``."""

    what: str
    column: str
    bound: float
    unit: str = ""
    where: dict[str, Any] = {}  # noqa: RUF012
    at_most: bool = False


def judge(targets: tuple[Target, ...], rows: list[dict]) -> list[dict]:
    """Every target with its measured value and whether it is met; None if no row has the metric."""
    judged = []
    for target in targets:
        values = [row[target.column] for row in find(rows, **target.where) if row.get(target.column) is not None]
        worst = None if not values else max(values) if target.at_most else min(values)
        met = None if worst is None else worst <= target.bound if target.at_most else worst >= target.bound
        judged.append({
            "target": target.what, "at_most": target.at_most, "bound": target.bound, "unit": target.unit,
            "measured": worst, "met": met,
        })  # fmt: skip
    return judged


def find(rows: list[dict], **where: Any) -> list[dict]:
    """The rows that have these values in these columns."""
    return [row for row in rows if all(row.get(key) == value for key, value in where.items())]


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


class Seconds(float):
    """The result of a candidate that runs in another process and measures its own time."""


def interleave(
    candidates: dict[str, Callable[[], Any]],
    *,
    rounds: int = 20,
    warmup: int = 3,
    patience: float = math.inf,
    settle: bool = False,
) -> dict[str, dict[str, float]]:
    """Time all candidates in rounds (A B C A B C ...), so that other load affects all equally.

    Args:
        candidates: functions by name. Their results are ignored, except that ``Seconds`` replaces
            the measured time.
        rounds: the number of timed runs of each candidate.
        warmup: the number of untimed runs of each candidate before the first round.
        patience: seconds, warm-up included, after which a candidate is not run again. If its
            warm-up alone takes as long, its warm-up runs are its timed runs.
        settle: run each candidate once, untimed, before each timed run.

    Returns:
        For each name the median, the fastest and the slowest time in milliseconds, and the number
        of timed runs.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    spent = dict.fromkeys(candidates, 0.0)

    def timed_run(name: str) -> None:
        if spent[name] < patience:
            seconds[name].append(_time(candidates[name]))
            spent[name] += seconds[name][-1]

    for name in candidates:
        for _ in range(warmup):
            timed_run(name)
        if spent[name] < patience:
            seconds[name].clear()
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, run in candidates.items():
                if settle and spent[name] < patience:
                    run()
                timed_run(name)
    finally:
        gc.enable()
    return {
        name: {"median_ms": 1e3 * median(s), "min_ms": 1e3 * min(s), "max_ms": 1e3 * max(s), "rounds": len(s)}
        for name, s in seconds.items()
    }


def machine() -> dict[str, Any]:
    """The facts that a timing depends on: processor, threads, versions, commit."""
    facts = environment()
    return {**facts["machine"], "legato": facts["legato"], "commit": facts["commit"]}


def copy_bandwidth(rounds: int = 15) -> dict[str, float]:
    """The bandwidth of this machine in GB/s, of torch.add(a, b, out=c) and of c.copy_(a)."""
    a, b, c = (torch.ones(_COPY_BYTES // 4, device=device()) for _ in range(3))
    times = interleave({"add": lambda: torch.add(a, b, out=c), "copy": lambda: c.copy_(a)}, rounds=rounds, warmup=1)
    return {name: arrays * _COPY_BYTES / times[name]["median_ms"] / 1e6 for name, arrays in (("add", 3), ("copy", 2))}


def peak_memory(prepare: Callable[..., Callable[[], Any]], *arguments: Any) -> int | None:
    """Bytes of resident memory that ``prepare(*arguments)()`` adds at its peak; None if not Linux.

    Both run in a new process with the same number of threads. ``prepare`` is a function of a module
    and does the work that is not counted: it makes the inputs and compiles the kernels with a small
    run.
    """
    return in_own_process(_peak, prepare, arguments) if Path("/proc/self/clear_refs").exists() else None


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a module's ``function`` in a new process with the same number of threads."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        process.submit(torch.set_num_threads, torch.get_num_threads())
        return process.submit(function, *arguments).result()


def _peak(prepare: Callable[..., Callable[[], Any]], arguments: tuple[Any, ...]) -> int:
    run = prepare(*arguments)
    gc.collect()
    # Memory that was freed but not returned to the system would be reused without being counted.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current resident memory
    before = resident("VmRSS")
    result = run()
    peak = resident("VmHWM")
    del result
    return peak - before


def resident(name: str = "VmRSS") -> int:
    """Resident bytes of this process, on Linux: the current value, or with "VmHWM" the peak."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def results_file() -> Path:
    """``results/<device>-<date>.json``: one file per day, one section per subject."""
    return RESULTS / f"{device()}-{date.today().isoformat()}.json"


def save(subject: str, section: dict[str, Any]) -> Path:
    """Write the section of one subject to today's results; replaces its earlier section."""
    path = results_file()
    report = json.loads(path.read_text()) if path.exists() else {"subjects": {}}
    report["subjects"][subject] = section
    write_json(path, report)
    return path


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Write the file atomically: a reader gets either the old content or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(report, indent=1) + "\n")
    partial.replace(path)


def _time(run: Callable[[], Any]) -> float:
    """Seconds of one run, from an idle device to an idle device."""
    _wait_for_device()
    start = time.perf_counter()
    result = run()
    own = result if isinstance(result, Seconds) else None
    del result  # freeing memory is part of the time
    _wait_for_device()
    return time.perf_counter() - start if own is None else own


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
