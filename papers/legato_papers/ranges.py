"""Ranges of the numbers in a recipe's fields: written beside the type of each, checked before anything runs.

``units: Width = 32`` is an int from 1 to 65,536. A subclass that gives a field another default keeps its range.
"""

from dataclasses import dataclass, fields, is_dataclass
from inspect import get_annotations
from typing import Annotated, Any, get_args

from .errors import ExperimentError


@dataclass(frozen=True)
class Range:
    """Numbers from ``least`` to ``most``; neither NaN nor infinity is one.

    Args:
        least: the smallest.
        most: the largest. It is far above what is useful: it refuses slips such as a digit too many.
        above: ``least`` itself is excluded.
        below: ``most`` itself is excluded.
    """

    least: int | float
    most: int | float
    above: bool = False
    below: bool = False

    def __repr__(self) -> str:
        return f"Range({'above ' * self.above}{self.least:,} to {'below ' * self.below}{self.most:,})"

    def expected(self, value: int | float) -> str:
        """What was expected where ``value`` is out of the range; empty where it is inside."""
        if not (value > self.least if self.above else value >= self.least):
            return f"above {self.least:,}" if self.above else f"{self.least:,} or more"
        if not (value < self.most if self.below else value <= self.most):
            return f"below {self.most:,}" if self.below else f"{self.most:,} or less"
        return ""


Count = Annotated[int, Range(1, 10**9)]
CountOrZero = Annotated[int, Range(0, 10**9)]
Width = Annotated[int, Range(1, 2**16)]
WidthOrZero = Annotated[int, Range(0, 2**16)]
Order = Annotated[int, Range(1, 2048)]
Depth = Annotated[int, Range(1, 1000)]
DepthOrZero = Annotated[int, Range(0, 1000)]
Seed = Annotated[int, Range(0, 2**32 - 1)]
Window = Annotated[float, Range(1, 10**9)]
Fraction = Annotated[float, Range(0, 1)]
FractionBelowOne = Annotated[float, Range(0, 1, below=True)]
Factor = Annotated[float, Range(0, 10_000)]
Positive = Annotated[float, Range(0, 10**6, above=True)]


def check(config: Any, prefix: str = "") -> None:
    """Raise for the first number in a dataclass, or in one inside it, that is out of the range of its field.

    Args:
        config: the fields of a recipe, or its options.
        prefix: what the names of its fields begin with in the message.

    Raises:
        ExperimentError: it names the option, what was expected and what was given.
    """
    for field in fields(config):
        value, name = getattr(config, field.name), f"{prefix}{field.name}"
        if is_dataclass(value):
            check(value, f"{name}.")
            continue
        limits = range_of(type(config), field.name)
        for number in value if isinstance(value, list) else [value]:
            expected = limits.expected(number) if limits and number is not None else ""
            if expected:
                option = name if "." in name else name.replace("_", "-")
                raise ExperimentError(f"expected --{option} to be {expected}, got {number}")


def range_of(kind: type, name: str) -> Range | None:
    """The range of a field: of the most derived class that gives one."""
    for base in kind.__mro__:
        found = _range_in(get_annotations(base).get(name))
        if found is not None:
            return found
    return None


def _range_in(annotation: Any) -> Range | None:
    """The range in ``Annotated[int, Range(...)]``, also where that is a part of a union."""
    metadata = getattr(annotation, "__metadata__", ())
    parts = [*metadata, *map(_range_in, get_args(annotation))]
    return next((part for part in parts if isinstance(part, Range)), None)
