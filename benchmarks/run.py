"""Measure subjects on this machine: ``python benchmarks/run.py recurrence lti``; ``all`` excludes
``BY_NAME``.

A subject is a module in this folder with

    TESTS: tuple[str, ...]         paths for pytest of the tests that must pass before a measurement
    measure() -> list[dict]        the rows of metrics; median_ms, min_ms and max_ms become one column
    TARGETS: tuple[Target, ...]    optional: the targets, by column and row
    plot(rows, path) -> None       optional: draws the picture; the default draws the targets
    versions() -> dict[str, str]   optional: the versions of the packages that it compares with

The metrics are printed and saved in ``results/<device>-<date>.json``, with a section per subject
that names the machine.
"""

import importlib
import os
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import show
from measure import copy_bandwidth, judge, machine, save

ROOT = Path(__file__).parent.parent
ALL = ("recurrence", "lti", "layers", "training", "streaming", "memory", "startup", "scaling")
# Not in ``all``, which takes 15 minutes: variants of our code, user settings, subjects that need
# data sets.
BY_NAME = ("gated", "allocator", "preparing")
SUBJECTS = ALL + BY_NAME


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in (*SUBJECTS, "all")]
    if unknown or not names:
        problem = f"no subject {', '.join(unknown)}" if unknown else "no subject given"
        print(f"{problem}: expected some of {', '.join(SUBJECTS)}, or all", file=sys.stderr)
        return 2
    passed: set[str] = set()
    chosen = [subject for name in names for subject in (ALL if name == "all" else (name,))]
    for name in dict.fromkeys(chosen):
        start = time.perf_counter()
        subject = importlib.import_module(name)
        failure = failing_tests(set(subject.TESTS) - passed)
        if failure:
            print(f"{failure}\n{name}: its tests fail, so nothing was measured", file=sys.stderr)
            return 1
        passed |= set(subject.TESTS)
        tested = time.perf_counter()
        section = measure(subject)
        print(f"\n{name}\n\n{show.text(section['rows'])}\n")
        if section["targets"]:
            print(f"{show.text(show.target_rows(section['targets']))}\n")
        section["seconds"] = time.perf_counter() - tested
        path = save(name, section)
        draw(subject, section, path.with_name(path.name.replace("-", f"-{name}-", 1)).with_suffix(".png"))
        print(f"tests {tested - start:.0f} s, measurement {section['seconds']:.0f} s, written to {path}", flush=True)
    return 0


def failing_tests(paths: set[str]) -> str:
    """The output of pytest if one of these tests fails; empty if all pass."""
    if not paths:
        return ""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "2", "-p", "no:cacheprovider", "-m", "not compiled"]
    done = subprocess.run([*command, *sorted(paths)], cwd=ROOT, capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def measure(subject) -> dict:
    """The section of a subject: rows, targets, and the machine and versions of the measurement."""
    section = {
        "date": datetime.now().isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": subject.versions() if hasattr(subject, "versions") else {},
        "copy_GB_per_s": copy_bandwidth(),
    }
    rows = subject.measure()
    return section | {"targets": judge(getattr(subject, "TARGETS", ()), rows), "rows": rows}


def draw(subject, section: dict, path: Path) -> None:
    if hasattr(subject, "plot"):
        subject.plot(section["rows"], path)
    else:
        show.draw_targets(section["targets"], path)


if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # CPU only, peers too, on every machine: gpu.py measures a GPU
    sys.exit(main(sys.argv[1:]))
