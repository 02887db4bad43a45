"""Recurrences run in the precision that they are given: autocast would round what they carry."""

from contextlib import AbstractContextManager, nullcontext

import torch

from legato._shapes import Tensor


def without_autocast(x: Tensor) -> AbstractContextManager:
    """The context in which products of tensors like ``x`` keep their dtype; the meta device knows no autocast.

    An exported graph keeps it, whether autocast was on or off: nobody knows where it will be run.
    """
    if x.is_meta or not (torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type)):
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)
