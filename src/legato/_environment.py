"""The environment of a measured result: the machine, the package versions, the commit."""

import os
import platform
import subprocess
import sys
from datetime import datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import legato


def environment() -> dict[str, Any]:
    """The processor, the number of threads, the versions of Python and the packages, the commit and the date."""
    return {
        "machine": {
            "processor": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numba": _version("numba"),
        },
        "legato": legato.__version__,
        "commit": commit(),
        "date": datetime.now().isoformat(timespec="seconds"),
    }


def peak_memory() -> float:
    """The peak memory of this process so far, in GiB; with a GPU, that of PyTorch's allocator."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource  # not available on Windows

    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def free_memory(device: torch.device) -> int | None:
    """Available memory of the device in bytes, without swapping; None if it is unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


@cache
def commit() -> str | None:
    """The commit of this source tree, with "-dirty" if code differs; None without a source tree."""
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], capture_output=True, check=True)
        found = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        code = (":(top)src", ":(top)papers/legato_papers", ":(top)benchmarks/*.py")
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *code], capture_output=True).returncode
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip() + ("-dirty" if changed else "")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    found = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return found[0] if found else platform.processor() or platform.machine()
