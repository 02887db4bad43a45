"""First use in a new process: imports, and first calls with an empty and with a full kernel cache.

Every timed run is a new Python process that measures the time of the import or the call itself. The
import of Numba is part of the first call. A read-only installation is a copy of the package and a
home folder in which nothing can be written: there are files in place of the cache folders.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import legato
from measure import Target

COLD, WARM, READ_ONLY = "empty cache", "from the cache", "read-only installation"
ROUNDS = 3
IMPORTS = ("import torch", "import legato")

_LAYER = "import torch, legato; layer, x = legato.{}, torch.rand(8, 784, 1)"
_STEP = {"training step": "layer(x)[0].sum().backward()"}
# The untimed code of a process, and the code that it times.
CALLS = {
    "linear_recurrence": (
        "import torch, legato; a, x = (torch.rand(8, 64, 256, requires_grad=True) for _ in range(2))",
        {"forward": "h, _ = legato.linear_recurrence(a, x)", "backward": "h.sum().backward()"},
    ),
    "GILR": (_LAYER.format("GILR(1, 256)"), _STEP),
    "GILRLSTM": (_LAYER.format("GILRLSTM(1, 256)"), _STEP),
    "LMU of order 256": (_LAYER.format("LMU(1, 212, order=256, theta=784)"), _STEP),
}
# The calls that are also measured in a read-only installation, each with a compilation of seconds.
IN_READ_ONLY = ("linear_recurrence", "LMU of order 256")

TESTS = ("tests/ops/test_numba_recurrence.py",)
TARGETS = (
    *(
        Target(f"{what}, {kernels}", "median_s", bound, "s", {"kernels": kernels, **where}, at_most=True)
        for kernels, bound in ((COLD, 8), (WARM, 0.5))
        for what, where in (
            ("first linear_recurrence", {"first": "linear_recurrence, forward"}),
            ("slowest first call", {}),
        )
    ),
    Target("fraction of calls that run in a read-only installation", "runs", 1, where={"kernels": READ_ONLY}),
)


def measure() -> list[dict]:
    rows = _measure_imports()
    with tempfile.TemporaryDirectory() as folder:
        read_only = _install_read_only(Path(folder) / "read-only")
        for name, (before, timed) in CALLS.items():
            cache = {"NUMBA_CACHE_DIR": f"{folder}/{name}"}
            settings = [(COLD, 1, cache), (WARM, ROUNDS, cache), (READ_ONLY, 1, read_only)]
            for kernels, rounds, environment in settings if name in IN_READ_ONLY else settings[:2]:
                seconds = [_seconds(before, timed, **environment) for _ in range(rounds)]
                rows += [_row(f"{name}, {call}", kernels, [times[call] for times in seconds]) for call in timed]
    return rows


def _measure_imports() -> list[dict]:
    seconds = [{name: _seconds("pass", {name: name})[name] for name in IMPORTS} for _ in range(ROUNDS)]
    return [_row(name, "", [times[name] for times in seconds]) for name in IMPORTS]


def _row(name: str, kernels: str, seconds: list[float | None]) -> dict:
    known = [s for s in seconds if s is not None]
    spread = {"median_s": median(known), "min_s": min(known), "max_s": max(known)} if known else {}
    missing = dict.fromkeys(("median_s", "min_s", "max_s"))
    return {"first": name, "kernels": kernels, **missing, **spread, "runs": len(known) / len(seconds)}


def _seconds(before: str, timed: dict[str, str], **environment: str) -> dict[str, float | None]:
    """Seconds of each call after ``before``, in a new process; None if that process fails."""
    clocked = "".join(f"start = clock()\n{call}\nprint(clock() - start)\n" for call in timed.values())
    code = f"from time import perf_counter as clock\n{before}\n{clocked}"
    variables = {name: value for name, value in os.environ.items() if name not in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME")}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, env=variables | environment, capture_output=True, text=True)
    return (
        dict(zip(timed, map(float, done.stdout.split()), strict=True)) if done.returncode == 0 else dict.fromkeys(timed)
    )


def _install_read_only(folder: Path) -> dict[str, str]:
    """Copy the package so that not even root can write to it; returns environment variables."""
    shutil.copytree(Path(legato.__file__).parent, folder / "legato", ignore=shutil.ignore_patterns("__pycache__"))
    for directory in [folder / "legato", *(path for path in (folder / "legato").rglob("*") if path.is_dir())]:
        (directory / "__pycache__").touch()  # a file
    home = folder / "home"
    home.touch()
    return {"PYTHONPATH": str(folder), "HOME": str(home)}
