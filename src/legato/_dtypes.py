"""The precision of recurrences: the dtype of the state, and a context without autocast."""

from contextlib import AbstractContextManager, nullcontext

import torch

from legato._shapes import Tensor


def carry_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states, sums and logarithms for tensors of ``dtype``: float32 or wider.

    Complex if ``dtype`` is complex.
    """
    return torch.promote_types(dtype, torch.float32)


def real_carry_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of real matrices that multiply tensors of ``dtype``: float32 or float64."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


def without_autocast(x: Tensor) -> AbstractContextManager:
    """A context that disables autocast on the device of ``x``; the meta device has no autocast.

    A compiled or exported graph always contains the context, because it may run under autocast
    later.
    """
    if x.is_meta or not (torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type)):
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)
