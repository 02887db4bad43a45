"""Measure subjects on this machine: ``python benchmarks/run.py recurrence lti``, or ``all`` but those ``BY_NAME``.

A subject is a module beside this one with

    TESTS: tuple[str, ...]         tests that must pass before anything is measured, as paths for pytest from the root
    measure() -> list[dict]        the figures, a row each; median_ms, min_ms and max_ms are shown as one column
    TARGETS: tuple[Target, ...]    optional: what is asked for, by column and row
    plot(rows, path) -> None       optional: its picture; else, where there are targets, how far from them it is
    versions() -> dict[str, str]   optional: of what it is compared with

Figures are printed and kept, with what they were measured on, in ``results/<device>-<date>.json``, a section a subject.
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
# Variants of ours, settings of the user's, data that must be at hand: not in ``all``, which takes 15 minutes.
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
        print(f"tests {tested - start:.0f} s, figures {section['seconds']:.0f} s, written to {path}", flush=True)
    return 0


def failing_tests(paths: set[str]) -> str:
    """What pytest says when one of these tests fails; empty when all pass."""
    if not paths:
        return ""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "2", "-p", "no:cacheprovider", "-m", "not compiled"]
    done = subprocess.run([*command, *sorted(paths)], cwd=ROOT, capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def measure(subject) -> dict:
    """The section of a subject: rows, targets and the facts that they depend on."""
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
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # all on the CPU, peers too, whatever the machine: gpu.py is for the rest
    sys.exit(main(sys.argv[1:]))
