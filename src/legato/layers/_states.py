"""State values that own their storage, and their registration with pickle and torch.export."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch.utils import _pytree as pytree

from legato._shapes import Tensor

#: A state: a NamedTuple of tensors, or a tuple of states for combined layers.
StateT = TypeVar("StateT", bound=tuple[Any, ...])
StateClass = TypeVar("StateClass")

# Missing from torch's type stubs.
_is_alias_of: Callable[[Tensor, Tensor], bool] = vars(torch._C)["_is_alias_of"]


def register_state(state_class: StateClass) -> StateClass:
    """Register a NamedTuple of tensors with ``torch.load(weights_only=True)`` and ``torch.export``.

    A decorator. The ``State`` of a layer class is registered when the layer class is defined.
    """
    named: Any = state_class
    if isinstance(named, type) and issubclass(named, tuple) and hasattr(named, "_fields"):
        torch.serialization.add_safe_globals([named])
        if named not in pytree.SUPPORTED_SERIALIZED_TYPES:
            name = f"{named.__module__}.{named.__qualname__}"
            pytree._register_namedtuple(named, serialized_type_name=name)
    return state_class


def own_storage(output: Tensor, state: StateT, given: Iterable[Any]) -> tuple[Tensor, StateT]:
    """``output`` and ``state``, copied where they share storage.

    Afterwards ``output`` and the tensors of ``state`` share storage neither with each other nor
    with ``given`` (tensors, states and None). Views of a larger array are copied too, because they
    would prevent the array from being freed as long as the state exists. So are state tensors that
    require a gradient: the user may write to the state, and the backward pass may need its old
    values.
    """
    # In compiled and transformed code, storage cannot be inspected.
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return output, _copied(state)
    others: list[Tensor] = []
    _add_tensors(given, others)
    for other in others:
        if _is_alias_of(output, other):
            output = output.clone()
            break
    others.append(output)
    return output, _owned(state, others)


# Runs at every step of a stream: isinstance(..., Tensor) and any() over a generator would be slow.
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
    """Whether the tensor is a view into an array of another size."""
    if tensor._is_view() or tensor.storage_offset() or not tensor.is_contiguous():
        return tensor.untyped_storage().nbytes() != tensor.nbytes
    return False


def _copied(state: Any) -> Any:
    return rebuilt(state, [_copied(part) if isinstance(part, _TREES) else part.clone() for part in state])


def rebuilt(state: StateT, parts: list[Any]) -> StateT:
    """A state of the same class with these parts; a list, from a data loader, becomes a tuple."""
    make: Any = getattr(state, "_make", tuple)
    return make(parts)


def check_states(state: object, number: int, each: str, returned_by: str) -> None:
    """Raise unless ``state`` is a tuple, or a data loader's list, of ``number`` states."""
    advice = f"use initial_state() or what this {returned_by} returned"
    if not isinstance(state, _TREES) or type(state) not in _TREES:
        raise TypeError(f"expected a tuple of {number} states, {each}, got {type(state).__name__}: {advice}")
    if len(state) != number:
        raise ValueError(f"expected a tuple of {number} states, {each}, got {len(state)} states: {advice}")


def state_names(state: tuple[Any, ...]) -> list[str]:
    """The names of the parts of a state in error messages."""
    return [f"state.{name}" for name in getattr(state, "_fields", range(len(state)))]
