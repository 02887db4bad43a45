"""The table of kernels and the choice of one: by argument, by ``use_backend``, or by device.

Every kernel module of the recurrence has ``forward``. It has ``backward`` if its adjoint is faster
than the recurrence in reverse time, and ``prepare`` if it is compiled; ``prepare`` compiles what
the other two launch. Numba and Triton may be broken, disabled or without a compiler. A kernel that
fails while it is loaded or compiled is not used again in this process: plain PyTorch computes the
same result, and one warning gives the reason.

The public function of an op calls ``resolve`` and passes the result to the registered op, which
calls ``choose``. torch.compile therefore guards the backend as a constant of the graph.
"""

import difflib
import importlib
import importlib.util
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch

from legato._dtypes import carry_dtype


class Entry(NamedTuple):
    """A kernel and its requirements."""

    #: A module of ``legato.ops.kernels``, or an object with the functions of such a module.
    kernel: Any
    #: The device type that its tensors must have; None: any.
    device_type: str | None = None
    #: The package that it needs in addition to torch.
    package: str | None = None


# The public names. An op without a kernel of that name computes its definition by
# ``linear_recurrence``.
BACKENDS = ("reference", "torch", "numba", "triton")
# By op and backend. If no backend is named, the first entry for the device whose package works is
# chosen.
TABLE = {
    "linear_recurrence": {
        "triton": Entry("triton_recurrence", "cuda", "triton"),
        "numba": Entry("numba_recurrence", "cpu", "numba"),
        "torch": Entry("torch_scan"),
        "reference": Entry("reference"),
    },
    "gated_unit": {"numba": Entry("numba_gated", "cpu", "numba")},
}


class _Context(threading.local):
    """The backend that ``use_backend`` names in this thread. Dynamo guards an attribute of it, not a ContextVar."""

    backend: str | None = None


_context = _Context()


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Use the backend ``name`` for ops in this thread unless their ``backend`` argument is set.

    A backward pass uses the backend of its forward pass, inside and outside of the context. A
    forward pass that is recomputed in the backward pass, as by ``torch.utils.checkpoint`` or
    ``in_segments``, chooses its backend again: run such a backward pass inside the context too.

    A gated layer computes its definition, which is separate torch operations and
    ``linear_recurrence``, if that backend has no kernel for gated layers. ``lti``,
    ``matrix_recurrence`` and single steps of a stream are plain torch in every backend. Code under
    torch.compile is compiled once for each backend that it runs with.

    Args:
        name: "reference", "torch", "numba" (CPU) or "triton" (CUDA), as the ``backend`` of ``linear_recurrence``; None
            restores the choice by device inside another ``use_backend``.

    Raises:
        ValueError: no backend has that name. An op inside raises it if the backend does not run on
            the device of the op.
        RuntimeError: the backend needs a package that is not installed. An op inside raises it if
            the package does not work.

    Example:
        >>> import torch, legato
        >>> layer = legato.GILR(4, 8)
        >>> with legato.use_backend("reference"):
        ...     output, state = layer(torch.randn(2, 100, 4))
        >>> print(legato.explain().splitlines()[-1])
        linear_recurrence: reference (named by the caller)
    """
    if name is not None and not torch.compiler.is_compiling():
        _check_name(name)
    before = _context.backend
    _context.backend = name
    try:
        yield
    finally:
        _context.backend = before


def explain() -> str:
    """The backend or method of the latest call of each op in this process, and the reason.

    Example:
        >>> import torch, legato
        >>> _ = legato.linear_recurrence(torch.rand(1, 8, 2), torch.rand(1, 8, 2), backend="reference")
        >>> print(legato.explain())
        linear_recurrence: reference (named by the caller)
    """
    return "\n".join(f"{op}: {choice} ({why})" for op, (choice, why) in sorted(_last.items())) or "no op has run yet"


_last: dict[str, tuple[str, str]] = {}


def record(op: str, choice: str, why: str) -> None:
    """Store the choice that ``op`` made at its latest call, for ``explain``."""
    _last[op] = (choice, why)


def register(name: str, kernel: Any) -> None:
    """Add a kernel of ``linear_recurrence`` for a benchmark: ``use_backend(name)`` then uses it.

    ``kernel`` has the functions of a module in ``legato.ops.kernels`` and runs on any device.
    """
    TABLE["linear_recurrence"][name] = Entry(kernel)
    _candidates.cache_clear()
    _load.cache_clear()
    _prepared.cache_clear()


def resolve(backend: str | None, device: torch.device) -> str | None:
    """The backend named by an argument, or else by ``use_backend``; None means a choice by device.

    Raises the errors of ``choose``, but compiles nothing.
    """
    name = _context.backend if backend is None else backend
    # Compiled code is checked by ``choose`` when it runs: here Dynamo would replace the error, and
    # it cannot trace cached functions.
    if name is not None and not torch.compiler.is_compiling():
        _check_name(name)
        _check_device(name, device)
    return name


def choose(
    op: str, device: torch.device, name: str | None = None, dtype: torch.dtype | None = None, adjoint: bool = False
) -> tuple[Any, str, str]:
    """The kernel of ``op`` for tensors on ``device``, the name of the choice, and the reason.

    Args:
        name: the backend that ``resolve`` returned; None chooses by device.
        dtype: of the tensors. The code that ``forward`` (``adjoint``: ``backward``) launches for
            this dtype is compiled now; if that fails, another kernel is chosen. None: modules are
            loaded and nothing is compiled.

    Returns:
        The kernel module, its backend and the reason; (None, "definition", reason) if the op has no
        kernel for this device.

    Raises:
        ValueError: no backend has that name, or it cannot run on that device.
        RuntimeError: the named backend needs a package that is not installed, or it cannot be loaded or compiled.
    """
    if name is not None:
        return _named(op, device, name, dtype, adjoint)
    device_type, why = device.type, None
    for backend, package in _candidates(op, device_type):
        if not _installed(package):
            continue
        kernel = _usable(op, backend, dtype, adjoint)
        if kernel is None:
            why = _fall_back(op, backend)
        elif package is None:
            return kernel, backend, why or f"no compiled kernel for {device_type} is installed"
        else:
            return kernel, backend, f"{device_type} tensors and {package} is installed"
    return None, "definition", why or f"no kernel for {device_type} is installed"


@cache
def _candidates(op: str, device_type: str) -> tuple[tuple[str, str | None], ...]:
    """The backends that run on the device, in the order of the table, and their packages."""
    entries = TABLE[op].items()
    return tuple((backend, entry.package) for backend, entry in entries if entry.device_type in (None, device_type))


def _named(op: str, device: torch.device, name: str, dtype: torch.dtype | None, adjoint: bool) -> tuple[Any, str, str]:
    _check_name(name)
    _check_device(name, device)
    if name not in TABLE[op]:
        return None, "definition", f"no kernel in backend {name!r}"
    kernel = _usable(op, name, dtype, adjoint)
    if kernel is None:
        raise RuntimeError(
            f"backend {name!r} is installed but cannot be used: {_failures[op, name]}. "
            "Correct that, or pass backend='torch'"
        )
    return kernel, name, "named by the caller"


def _check_name(name: str) -> None:
    entry = TABLE["linear_recurrence"].get(name)
    if entry is None:
        nearest = difflib.get_close_matches(str(name), BACKENDS, n=1, cutoff=0) or ["numba"]
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}: did you mean {nearest[0]!r}?")
    if not _installed(entry.package):
        raise RuntimeError(
            f"backend {name!r} needs {entry.package}, which is not installed: pip install {entry.package}"
        )


def _check_device(name: str, device: torch.device) -> None:
    needed = TABLE["linear_recurrence"][name].device_type
    if needed in (None, device.type):
        return
    triton = _usable("linear_recurrence", name, None, False) if name == "triton" else None
    if triton is None or not triton.INTERPRETED:
        raise ValueError(
            f"backend {name!r} needs {needed} tensors, got {device.type}: move them with "
            f".to({needed!r}), or pass backend=None to let the device decide"
        )


@cache
def _installed(package: str | None) -> bool:
    if package is None or sys.modules.get(package) is not None:
        return True  # find_spec raises for a loaded module without a spec, such as a mock
    return importlib.util.find_spec(package) is not None


# --- failures of the packages ---

# Why a kernel cannot be used although its package is installed, by op and backend. Never retried.
_failures: dict[tuple[str, str], str] = {}
# The packages for which a warning was issued.
_warned: dict[str, object] = {}


def _usable(op: str, backend: str, dtype: torch.dtype | None, adjoint: bool) -> Any:
    """The compiled kernel, or None if it failed to load or compile."""
    return None if (op, backend) in _failures else _prepared(op, backend, dtype, adjoint)


@cache
def _prepared(op: str, backend: str, dtype: torch.dtype | None, adjoint: bool) -> Any:
    """Load and compile a kernel, and record a failure; no other function does either.

    A failure disables the kernel module: its forward and backward, in every dtype.
    """
    try:
        kernel = _load(op, backend)
        if dtype is not None and hasattr(kernel, "prepare"):
            kernel.prepare(carry_dtype(dtype), adjoint)
    except Exception as error:
        text = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split())
        # Store only the text: the traceback would hold references to the tensors of the call.
        _failures.setdefault((op, backend), f"{type(error).__name__}: {text}"[:300])
        return None
    return kernel


@cache
def _load(op: str, backend: str) -> Any:
    kernel = TABLE[op][backend].kernel
    return importlib.import_module(f"legato.ops.kernels.{kernel}") if isinstance(kernel, str) else kernel


def _fall_back(op: str, backend: str) -> str:
    """Why plain PyTorch replaces a kernel that failed; warns once per package and process."""
    package, failure, own = str(TABLE[op][backend].package), _failures[op, backend], object()
    if _warned.setdefault(package, own) is own:  # in one thread only
        warnings.warn(
            f"the {package} kernels cannot be used ({failure}): plain PyTorch computes the same, "
            f"more slowly. Correct that or reinstall {package}, then restart Python",
            stacklevel=3,
        )
    return f"{package} is installed but cannot be used: {failure}"
