"""Checks of numbers and tensors, for every constructor and function: one message each.

NumPy's numbers, and arrays and tensors of one number without axes, are taken as numbers too. What is returned and
stored is Python's own, which ``repr``, ``pickle`` and ``torch.load`` handle without NumPy.
"""

import math
from numbers import Integral, Real
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence

from legato._shapes import Tensor

INTEGER_DTYPES = (
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64
)  # fmt: skip


def whole_number(value: Any, name: str, *, least: int = 0) -> int:
    """``value`` as an int; an error unless it is of an integer type and ``least`` or more."""
    number = _python_number(value)
    if not isinstance(number, Integral) or number < least:
        raise ValueError(f"expected {name} to be an int of at least {least}, got {value!r}")
    return int(number)


def positive_int(value: Any, name: str) -> int:
    """``value`` as an int; an error unless it is of an integer type and 1 or more."""
    return whole_number(value, name, least=1)


def real_number(value: Any, name: str) -> float | int:
    """``value`` as a float, or as an int where it is one; an error unless it is real and finite."""
    number = _python_number(value)
    if not isinstance(number, Real) or not math.isfinite(number):
        raise ValueError(f"expected {name} to be a finite number, got {value!r}")
    return int(number) if isinstance(number, Integral) else float(number)


def dropout_rate(value: Any, name: str = "dropout") -> float:
    """``value`` as a float; an error unless it is real and from 0 to below 1."""
    number = _python_number(value)
    if not isinstance(number, Real) or not 0 <= float(number) < 1:
        raise ValueError(f"expected {name} from 0 to below 1, got {value!r}: the fraction that is dropped")
    return float(number)


def _python_number(value: Any) -> Any:
    """The number in a scalar of NumPy or torch, anything else as it is; None for a bool, which is no number here."""
    if type(value) in (int, float):
        return value
    if getattr(value, "shape", None) == () and hasattr(value, "item") and not getattr(value, "is_meta", False):
        value = value.item()
    return None if isinstance(value, bool) else value


def check_tensor(name: str, value: Any) -> None:
    """Raise TypeError, with advice, unless ``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"expected {name} to be a tensor, got {type(value).__name__}: {as_tensor_advice(value)}")


def check_plain(name: str, value: Any) -> None:
    """Raise TypeError unless ``value`` is a tensor, and ValueError unless it is dense and not nested."""
    check_tensor(name, value)
    if value.is_nested:
        raise ValueError(
            f"expected {name} as a padded tensor, got a nested one: pad it with torch.nested.to_padded_tensor({name}, "
            "0.0) and give the number of steps of each row as lengths="
        )
    if value.layout is not torch.strided:
        raise ValueError(f"expected {name} as a dense tensor, got layout {value.layout}: convert it with .to_dense()")


def as_tensor_advice(value: Any, *, lengths: bool = True) -> str:
    """How a tensor is made of ``value``; ``lengths`` where the function that got it has such an argument."""
    then = ", and give lengths=lengths" if lengths else ""
    if isinstance(value, PackedSequence):
        return "unpack it with x, lengths = torch.nn.utils.rnn.pad_packed_sequence(packed, batch_first=True)" + then
    if isinstance(value, tuple | list) and value and all(isinstance(part, Tensor) for part in value):
        rows = "pad rows of several lengths with torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)"
        return rows + (", and give the number of steps of each as lengths=" if lengths else "")
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], Tensor):
        return "it seems to be the (output, state) of a layer: give the output, or join layers with legato.Stack"
    return "wrap it with torch.as_tensor()"
