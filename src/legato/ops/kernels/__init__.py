"""The table of kernels for the diagonal recurrence, and the choice among them by fixed rules.

Each kernel module has ``forward``; one that has a faster way than the recurrence run backwards also has ``backward``.
"""

import difflib
import importlib
import importlib.util
from functools import cache
from types import ModuleType

import torch

# name: (module, device type it needs or None, package it needs or None)
BACKENDS = {
    "reference": ("reference", None, None),
    "torch": ("torch_scan", None, None),
    "numba": ("numba_cpu", "cpu", "numba"),
    "triton": ("triton_gpu", "cuda", "triton"),
}


def choose(device: torch.device, name: str | None = None) -> tuple[ModuleType, str, str]:
    """The kernel module for tensors on ``device``, its name, and why it was taken.

    Raises:
        ValueError: no backend has that name, or it cannot run on that device.
        RuntimeError: the named backend needs a package that is not installed.
    """
    if name is not None:
        check(name, device)
        return _load(name), name, "named by the caller"
    for candidate in ("triton", "numba"):
        _, needs_device, package = BACKENDS[candidate]
        if device.type == needs_device and _installed(package):
            return _load(candidate), candidate, f"{device.type} tensors and {package} is installed"
    return _load("torch"), "torch", f"no compiled kernel for {device.type} is installed"


def gated(device: torch.device) -> ModuleType | None:
    """The kernel of the gated unit for tensors on ``device``, or None."""
    if device.type != "cpu" or not _installed("numba"):
        return None
    return importlib.import_module(f"{__name__}.gated_cpu")


def check(name: str, device: torch.device) -> None:
    """Raise what ``choose`` documents if the backend cannot run here."""
    if name not in BACKENDS:
        nearest = difflib.get_close_matches(str(name), BACKENDS, n=1, cutoff=0) or ["numba"]
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}: did you mean {nearest[0]!r}?")
    _, needs_device, package = BACKENDS[name]
    if not _installed(package):
        raise RuntimeError(f"backend {name!r} needs {package}, which is not installed: pip install {package}")
    if needs_device not in (None, device.type) and not (name == "triton" and _load(name).INTERPRETED):
        raise ValueError(
            f"backend {name!r} needs {needs_device} tensors, got {device.type}: move them with .to({needs_device!r}),"
            " or pass backend=None to let the device decide"
        )


@cache
def _installed(package: str | None) -> bool:
    return package is None or importlib.util.find_spec(package) is not None


@cache
def _load(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{BACKENDS[name][0]}")
