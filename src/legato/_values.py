"""Conditions on the values of tensors, and where values may be read."""

import cmath

import torch
from torch._C import _get_dispatch_mode, _len_torch_dispatch_stack, _TorchDispatchModeKey
from torch._C._functorch import get_unwrapped, is_batchedtensor, is_functorch_wrapped_tensor
from torch.nn import Parameter

from legato._shapes import Tensor


def examinable(x: Tensor) -> bool:
    """Whether the values of x may be read to choose between computations.

    False on a GPU, unless anomaly detection is on, because a read waits for all earlier work. False
    also in compiled, exported and traced code, which has no values, and for mapped tensors, for
    which one choice may not be correct for all.
    """
    if torch.compiler.is_compiling() or torch._C._is_tracing() or type(x) not in (torch.Tensor, Parameter):
        return False
    if not x.is_cpu and (x.is_meta or not torch.is_anomaly_enabled()):
        return False
    if is_mapped(x):
        return False
    tracers = _TorchDispatchModeKey.FAKE, _TorchDispatchModeKey.PROXY
    return _len_torch_dispatch_stack() == 0 or all(_get_dispatch_mode(key) is None for key in tracers)


def is_mapped(x: Tensor) -> bool:
    """Whether ``torch.vmap`` maps over an axis of x, also in other transforms; False if compiled."""
    while not torch.compiler.is_compiling() and is_functorch_wrapped_tensor(x):
        if is_batchedtensor(x):
            return True
        x = get_unwrapped(x)
    return False


def all_finite(x: Tensor) -> bool:
    """Whether x has no NaN and no infinity: one pass, and a second one if the sum overflows."""
    x = x.detach()
    return cmath.isfinite(x.sum().item()) or bool(x.isfinite().all())


def in_range(x: Tensor) -> bool:
    """Whether the sum of the squares of x is finite, so that no product of two values overflows."""
    x = x.detach().reshape(-1)
    return cmath.isfinite(torch.vdot(x, x).item())
