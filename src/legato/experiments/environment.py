"""What a figure depends on beside its configuration; benchmarks record the same. Needs no package but torch."""

import os
import platform
import subprocess
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch

import legato


def environment() -> dict[str, Any]:
    """What a figure depends on beside its configuration."""
    return {
        "machine": {
            "processor": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "legato": legato.__version__,
        "commit": commit(),
        "date": datetime.now().isoformat(timespec="seconds"),
    }


@cache
def commit() -> str | None:
    """The commit of this source tree; None where the package is installed without one."""
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], capture_output=True, check=True)
        found = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--exclude=*"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    found = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return found[0] if found else platform.processor() or platform.machine()
