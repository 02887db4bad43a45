"""States as values: each tensor owns its storage, and files, pickles and exported programs know their classes."""

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch.utils import _pytree as pytree

from legato._shapes import Tensor

StateClass = TypeVar("StateClass")


def register_state(state_class: StateClass) -> StateClass:
    """Let ``torch.load``, with its default weights_only=True, and ``torch.export.save`` know a NamedTuple of tensors.

    A decorator. The class that a layer has as its ``State`` is registered with the layer.
    """
    named: Any = state_class
    if isinstance(named, type) and issubclass(named, tuple) and hasattr(named, "_fields"):
        torch.serialization.add_safe_globals([named])
        if named not in pytree.SUPPORTED_SERIALIZED_TYPES:
            name = f"{named.__module__}.{named.__qualname__}"
            pytree._register_namedtuple(named, serialized_type_name=name)
    return state_class


def own_storage(output: Tensor, state: Any, *given: Iterable[Any]) -> tuple[Tensor, Any]:
    """``output`` and ``state`` without storage in common: not with each other, nor among the tensors of the state, nor
    with the tensors, states of them and None in ``given``.

    What shares is copied. So is a part of a larger array, which would be held in memory as long as the state is, and a
    state with a gradient: its user may write to it, and the backward may need it as it was.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():  # there, storage cannot be read
        return output, _copied(state)
    taken: set[int] = set()
    for parts in given:
        _add_storages(parts, taken)
    storage = output.untyped_storage()._cdata
    if storage in taken:
        output = output.clone()
    taken.add(storage)
    return output, _owned(state, taken)


# A tensor's isinstance is slow, a tuple's is not. A data loader makes lists of tuples.
_TREES = (tuple, list)


def _add_storages(parts: Iterable[Any], taken: set[int]) -> None:
    for part in parts:
        if isinstance(part, _TREES):
            _add_storages(part, taken)
        elif part is not None:
            taken.add(part.untyped_storage()._cdata)


def _owned(state: Any, taken: set[int]) -> Any:
    parts, copied = list(state), False
    for i, part in enumerate(parts):
        if isinstance(part, tuple):
            parts[i] = _owned(part, taken)
        elif part.requires_grad:
            parts[i] = part.clone()
        else:
            storage = part.untyped_storage()
            if storage._cdata not in taken and storage.nbytes() == part.nbytes:
                taken.add(storage._cdata)
                continue
            parts[i] = part.clone()
        copied = True
    return _rebuilt(state, parts) if copied else state


def _copied(state: Any) -> Any:
    return _rebuilt(state, [_copied(part) if isinstance(part, tuple) else part.clone() for part in state])


def _rebuilt(state: Any, parts: list[Any]) -> Any:
    return state._make(parts) if hasattr(state, "_make") else tuple(parts)
