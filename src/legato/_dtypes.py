"""The precision of recurrences: the dtype of what they carry from step to step, and a context without autocast."""

from contextlib import AbstractContextManager, nullcontext

import torch

from legato._shapes import Tensor


def carry_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 or wider, complex where ``dtype`` is: of states, sums and logarithms for tensors of ``dtype``."""
    return torch.promote_types(dtype, torch.float32)


def real_carry_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 or float64: of the real matrices that multiply tensors of ``dtype``."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


def without_autocast(x: Tensor) -> AbstractContextManager:
    """The context in which products of tensors like ``x`` keep their dtype; the meta device knows no autocast.

    An exported graph keeps it, whether autocast was on or off: the program may run under either.
    """
    if x.is_meta or not (torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type)):
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)
