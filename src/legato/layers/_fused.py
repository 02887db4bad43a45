"""When a layer may leave the plain path: read a child's weights in place of calling it, cache, recompute."""

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def can_be_read(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    """Whether calling ``module`` computes what ``kind`` computes from its own weights; True for None.

    It does not where the module was replaced (adapters, quantisation), parametrised, pruned, hooked, compiled, given
    another forward, or where its weights are tensors of another class.
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
    """The weight of ``linear``, for its dtype and device; where it was replaced, any floating parameter it has."""
    weight = linear._parameters.get("weight")
    if weight is not None and weight.is_floating_point():
        return weight
    return next((p for p in linear.parameters() if p.is_floating_point()), None)


def transforms_are_active() -> bool:
    """Whether a compiler, a ``torch.func`` transform or forward mode is at work: tensors may have no values, and
    autograd Functions of ours would hide what they compute from it."""
    return (
        torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    )
