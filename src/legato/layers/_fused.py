"""Conditions for faster paths: use of a child's weights without a call, caches, recomputation."""

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def can_be_read(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    """Whether ``module(x)`` is ``kind.forward`` applied to its own weights; True for None.

    False if the module was replaced (adapters, quantisation), parametrised, pruned, hooked,
    compiled or given another forward, or if its weights are instances of a tensor subclass.
    """
    if module is None:
        return True
    return (
        type(module) is kind
        and "forward" not in module.__dict__
        and module._compiled_call_impl is None
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and not _has_any_global_hook()
        and not any(is_traceable_wrapper_subclass(p) for p in module._parameters.values() if p is not None)
    )


def floating_weight(linear: nn.Module) -> Tensor | None:
    """The weight of ``linear``, for its dtype and device; if replaced, any floating parameter."""
    weight = linear._parameters.get("weight")
    if weight is not None and weight.is_floating_point():
        return weight
    return next((p for p in linear.parameters() if p.is_floating_point()), None)


def transforms_are_active() -> bool:
    """Whether a compiler, a ``torch.func`` transform or forward mode is active.

    Tensors may then have no values, and our autograd Functions would hide their computation from
    it.
    """
    return (
        torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    )
