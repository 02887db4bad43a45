"""States as values: each tensor owns its storage, and files, pickles and exported programs know their classes."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch.utils import _pytree as pytree

from legato._shapes import Tensor

#: A state: a NamedTuple of tensors, or a tuple of states where layers are combined.
StateT = TypeVar("StateT", bound=tuple[Any, ...])
StateClass = TypeVar("StateClass")

# Missing from torch's type stubs.
_is_alias_of: Callable[[Tensor, Tensor], bool] = vars(torch._C)["_is_alias_of"]


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


def own_storage(output: Tensor, state: StateT, given: Iterable[Any]) -> tuple[Tensor, StateT]:
    """``output`` and ``state`` without storage in common: not with each other, nor among the tensors of the state, nor
    with the tensors, states of them and None in ``given``.

    What shares is copied. So is a part of a larger array, which would be held in memory as long as the state is, and a
    state with a gradient: its user may write to it, and the backward may need it as it was.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():  # there, storage cannot be read
        return output, _copied(state)
    others: list[Tensor] = []
    _add_tensors(given, others)
    for other in others:
        if _is_alias_of(output, other):
            output = output.clone()
            break
    others.append(output)
    return output, _owned(state, others)


# Every step of a stream passes here. Of a tensor isinstance is slow, of a tuple it is not, and any() of a generator is.
_TREES = (tuple, list)  # a data loader makes lists of tuples


def _add_tensors(given: Iterable[Any], others: list[Tensor]) -> None:
    for part in given:
        if isinstance(part, _TREES):
            _add_tensors(part, others)
        elif part is not None:
            others.append(part)


def _owned(state: Any, others: list[Tensor]) -> Any:
    parts, copied = list(state), False
    for i, part in enumerate(parts):
        if isinstance(part, _TREES):
            parts[i] = _owned(part, others)
        elif part.requires_grad or _is_alias_of(part, others[-1]) or _is_part(part):
            parts[i] = part.clone()
        else:
            for other in others:
                if _is_alias_of(part, other):
                    parts[i] = part.clone()
                    break
            else:
                others.append(part)
                continue
        copied = True
    return rebuilt(state, parts) if copied else state


def _is_part(tensor: Tensor) -> bool:
    """Whether it lies in an array of another size."""
    if tensor._is_view() or tensor.storage_offset() or not tensor.is_contiguous():
        return tensor.untyped_storage().nbytes() != tensor.nbytes
    return False


def _copied(state: Any) -> Any:
    return rebuilt(state, [_copied(part) if isinstance(part, _TREES) else part.clone() for part in state])


def rebuilt(state: StateT, parts: list[Any]) -> StateT:
    """A state of the same class with these parts; a list, as a data loader makes one, becomes a tuple."""
    make: Any = getattr(state, "_make", tuple)
    return make(parts)


def check_states(state: object, number: int, each: str, returned_by: str) -> None:
    """Raise unless ``state`` is a plain tuple of ``number`` states, or the list that a data loader makes of it."""
    advice = f"use initial_state() or what this {returned_by} returned"
    if not isinstance(state, _TREES) or type(state) not in _TREES:
        raise TypeError(f"expected a tuple of {number} states, {each}, got {type(state).__name__}: {advice}")
    if len(state) != number:
        raise ValueError(f"expected a tuple of {number} states, {each}, got {len(state)} states: {advice}")


def state_names(state: tuple[Any, ...]) -> list[str]:
    """What error messages call the parts of a state."""
    return [f"state.{name}" for name in getattr(state, "_fields", range(len(state)))]
