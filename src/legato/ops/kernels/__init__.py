"""The table of kernels for the diagonal recurrence, and the choice among them by fixed rules.

Each kernel module has ``forward``; one that has a faster way than the recurrence run backwards
also has ``backward``, and one that is compiled has ``prepare``, which compiles what they launch.
Numba and Triton may be broken, switched off or without a compiler: a module that fails while it is
loaded or compiled is not used again in this process. Plain PyTorch then computes the same, and one
warning says why.
"""

import difflib
import importlib
import importlib.util
import re
import sys
import warnings
from functools import cache
from types import ModuleType

import torch

from legato import _dtypes

# name: (module, device type it needs or None, package it needs or None)
BACKENDS = {
    "reference": ("reference", None, None),
    "torch": ("torch_scan", None, None),
    "numba": ("numba_cpu", "cpu", "numba"),
    "triton": ("triton_gpu", "cuda", "triton"),
}
# With the kernel of the gated unit, which is no backend of the recurrence.
_KERNELS = BACKENDS | {"gated": ("gated_cpu", "cpu", "numba")}


def choose(
    device: torch.device, name: str | None = None, dtype: torch.dtype | None = None, adjoint: bool = False
) -> tuple[ModuleType, str, str]:
    """The kernel module for tensors on ``device``, its name, and why it was taken.

    Args:
        name: the backend that the caller asks for; None chooses by device.
        dtype: of the tensors. What ``forward`` (``adjoint``: ``backward``) launches for it is
            compiled now, and where that fails another module is taken. None: modules are loaded
            and not compiled.

    Raises:
        ValueError: no backend has that name, or it cannot run on that device.
        RuntimeError: the named backend needs a package that is not installed, or it cannot be
            loaded or compiled.
    """
    if name is not None:
        check(name, device)
        module = _usable(name, dtype, adjoint)
        if module is None:
            raise RuntimeError(
                f"backend {name!r} is installed but cannot be used: {_failures[name]}. "
                "Correct that, or pass backend='torch'"
            )
        return module, name, "named by the caller"
    device_type, why = device.type, None
    for candidate in ("triton", "numba"):
        _, needs_device, package = BACKENDS[candidate]
        if device_type == needs_device and _installed(package):
            module = _usable(candidate, dtype, adjoint)
            if module is not None:
                return module, candidate, f"{device_type} tensors and {package} is installed"
            why = _fall_back(candidate)
    return _load("torch"), "torch", why or f"no compiled kernel for {device_type} is installed"


def gated(device: torch.device, dtype: torch.dtype | None = None, adjoint: bool = False) -> ModuleType | None:
    """The kernel of the gated unit for tensors on ``device``, or None; arguments of ``choose``."""
    if device.type != "cpu" or not _installed("numba"):
        return None
    module = _usable("gated", dtype, adjoint)
    if module is None:
        _fall_back("gated")
    return module


def why_not_gated(device: torch.device) -> str:
    """Why ``gated`` gives None."""
    if "gated" in _failures:
        return _fall_back("gated")
    return f"no kernel for {device.type} is installed"


def check(name: str, device: torch.device) -> None:
    """Raise what ``choose`` documents if the backend cannot run here, short of compiling it."""
    if name not in BACKENDS:
        nearest = difflib.get_close_matches(str(name), BACKENDS, n=1, cutoff=0) or ["numba"]
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}: did you mean {nearest[0]!r}?")
    _, needs_device, package = BACKENDS[name]
    if not _installed(package):
        raise RuntimeError(f"backend {name!r} needs {package}, which is not installed: pip install {package}")
    if needs_device not in (None, device.type):
        triton = _usable(name, None, False) if name == "triton" else None
        if triton is None or not triton.INTERPRETED:
            raise ValueError(
                f"backend {name!r} needs {needs_device} tensors, got {device.type}: move them with "
                f".to({needs_device!r}), or pass backend=None to let the device decide"
            )


@cache
def _installed(package: str | None) -> bool:
    if package is None or sys.modules.get(package) is not None:
        return True  # find_spec refuses a loaded module without a spec, such as a mock
    return importlib.util.find_spec(package) is not None


# --- what may fail through no fault of ours ---

# Why kernels that are installed cannot be used, by their name in the table; never retried.
_failures: dict[str, str] = {}
# The packages that a warning has named.
_warned: dict[str, object] = {}


def _usable(name: str, dtype: torch.dtype | None, adjoint: bool) -> ModuleType | None:
    """The kernel module, with what it launches compiled, or None where it has failed."""
    return None if name in _failures else _prepared(name, dtype, adjoint)


@cache
def _prepared(name: str, dtype: torch.dtype | None, adjoint: bool) -> ModuleType | None:
    """The one place where kernels are loaded and compiled, and where failures of that are caught.

    A failure counts for the whole module: its forward and backward, in every dtype.
    """
    carry_dtype = None if dtype is None else _dtypes.carry_dtype(dtype)
    try:
        module = _load(name)
        if carry_dtype is not None and hasattr(module, "prepare"):
            module.prepare(carry_dtype, adjoint)
    except Exception as error:
        text = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split())
        # Only the text: the error's traceback would keep the tensors of the calls alive.
        _failures.setdefault(name, f"{type(error).__name__}: {text}"[:300])
        return None
    return module


@cache
def _load(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{_KERNELS[name][0]}")


def _fall_back(name: str) -> str:
    """Why plain PyTorch replaces a kernel that failed; warns once per package and process."""
    package, failure, own = str(_KERNELS[name][2]), _failures[name], object()
    if _warned.setdefault(package, own) is own:  # in one thread only
        warnings.warn(
            f"the {package} kernels cannot be used ({failure}): plain PyTorch computes the same, "
            f"more slowly. Correct that or reinstall {package}, then restart Python",
            stacklevel=3,
        )
    return f"{package} is installed but cannot be used: {failure}"
