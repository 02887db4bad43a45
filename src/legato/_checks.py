"""Checks of numbers, for every constructor and function: one message each, and a plain Python number in return.

NumPy's numbers, and arrays and tensors of one number without axes, are taken too. What is returned and stored is
Python's own, which ``repr``, ``pickle`` and ``torch.load`` handle without NumPy.
"""

import math
from numbers import Integral, Real
from typing import Any


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
