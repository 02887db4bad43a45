"""What the subjects here share: time (``interleave``), bandwidth, peak memory, targets, and where the figures go.

A subject is a module beside this one; ``run.py`` says what it consists of.
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
_COPY_BYTES = 256 * 2**20  # an array; the three of an addition are more than any cache holds


class Target(NamedTuple):
    """A figure that is asked for: ``column`` of the rows that match ``where``, the worst of them, against ``bound``."""

    what: str
    column: str
    bound: float
    unit: str = ""
    where: dict[str, Any] = {}  # noqa: RUF012
    at_most: bool = False


def judge(targets: tuple[Target, ...], rows: list[dict]) -> list[dict]:
    """Every target with what was measured and whether it is met; None for both where no row has the figure."""
    judged = []
    for target in targets:
        figures = [row[target.column] for row in find(rows, **target.where) if row.get(target.column) is not None]
        worst = None if not figures else max(figures) if target.at_most else min(figures)
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
    """What a timing depends on: processor, threads, versions, commit."""
    facts = environment()
    return {**facts["machine"], "legato": facts["legato"], "commit": facts["commit"]}


def copy_bandwidth(rounds: int = 15) -> dict[str, float]:
    """This machine's own bandwidth now, in GB/s: of torch.add(a, b, out=c) and of c.copy_(a), far beyond the caches."""
    a, b, c = (torch.ones(_COPY_BYTES // 4, device=device()) for _ in range(3))
    times = interleave({"add": lambda: torch.add(a, b, out=c), "copy": lambda: c.copy_(a)}, rounds=rounds, warmup=1)
    return {name: arrays * _COPY_BYTES / times[name]["median_ms"] / 1e6 for name, arrays in (("add", 3), ("copy", 2))}


def peak_memory(prepare: Callable[..., Callable[[], Any]], *arguments: Any) -> int | None:
    """Bytes of resident memory that ``prepare(*arguments)()`` adds at its peak; None where the system is not Linux.

    Both run in a process of their own with as many threads as here. ``prepare`` is a function of a module, and does
    what is not to be counted: making the inputs, compiling kernels (run something small).
    """
    return in_own_process(_peak, prepare, arguments) if Path("/proc/self/clear_refs").exists() else None


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a module's ``function`` returns in a fresh process with as many threads as here."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        process.submit(torch.set_num_threads, torch.get_num_threads())
        return process.submit(function, *arguments).result()


def _peak(prepare: Callable[..., Callable[[], Any]], arguments: tuple[Any, ...]) -> int:
    run = prepare(*arguments)
    gc.collect()
    # Memory that was freed but not given back would be taken again without being seen.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident memory so far is that of now
    before = resident("VmRSS")
    kept = run()
    peak = resident("VmHWM")
    del kept
    return peak - before


def resident(name: str = "VmRSS") -> int:
    """Bytes of this process in memory, on Linux: now, or with "VmHWM" at most so far."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def results_file() -> Path:
    """``results/<device>-<date>.json``: one file a day, a section a subject."""
    return RESULTS / f"{device()}-{date.today().isoformat()}.json"


def save(subject: str, section: dict[str, Any]) -> Path:
    """Put the section of one subject into the results of today, in place of an earlier one; all others stay."""
    path = results_file()
    report = json.loads(path.read_text()) if path.exists() else {"subjects": {}}
    report["subjects"][subject] = section
    write_json(path, report)
    return path


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Write the file such that a reader sees the old one or the new one, whole."""
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
    del result  # giving memory back counts too
    _wait_for_device()
    return time.perf_counter() - start if own is None else own


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
