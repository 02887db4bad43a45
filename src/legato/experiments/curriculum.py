"""A task at one length after the other, short ones first: ``recipes/adding.py`` and ``recipes/copy_memory.py``.

A network that remembers over 300 steps and holds its state where nothing happens is nearly one that remembers over
10,000, and learns it from sequences that cost a thirtieth.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .task import ExperimentError, Task, Training


@dataclass
class Curriculum(Training):
    """Trained at one length after the other, each until it is solved.

    Args:
        batch_size: sequences in an update at the full length; shorter ones come in batches of as many steps in all.
        largest_batch: but of no more sequences than this.
        first_length: the length to begin with; null begins with the full one.
        growth: factor from one length to the next.
        segment: steps computed at a time, for memory and speed only; null chooses by units and batch size.
    """

    largest_batch: int = 64
    first_length: int | None = None
    growth: float = 6.0
    segment: int | None = None


class Growing(Task):
    """A task whose sequences grow: after every epoch ``is_good`` decides on going on to the next length.

    The weights of the last epoch are tested, at the full length: a shorter one's figure says nothing about that.
    """

    keeps_last = True

    def __init__(self, length: int, training: Curriculum) -> None:
        at_least(
            {
                "training.batch_size": (training.batch_size, 1),
                "training.largest_batch": (training.largest_batch, 1),
                "training.first_length": (training.first_length or 2, 2),
                "training.growth": (training.growth, 1.1),
                "training.segment": (training.segment or 1, 1),
            }
        )
        self.training = training
        self.full_length = length
        self.lengths = lengths(training.first_length or length, length, training.growth)
        self.stage = self.epochs = 0
        self.course: list[dict[str, int]] = []

    @abstractmethod
    def is_good(self, figures: dict[str, float], *, at_the_end: bool) -> bool:
        """Whether the validation figures are good enough for the next length, or, at the end, to stop."""

    @property
    def length(self) -> int:
        """That of the sequences in training and validation at present."""
        return self.lengths[min(self.stage, len(self.lengths) - 1)]

    @property
    def batch_size(self) -> int:
        """Sequences in an update at the present length."""
        alike = self.training.batch_size * self.full_length // self.length
        return max(self.training.batch_size, min(alike, self.training.largest_batch))

    def finished(self, figures: dict[str, float]) -> bool:
        # Asked once after every epoch; a resumed run asks again for the epoch that its checkpoint was written after.
        self.epochs += 1
        if self.is_good(figures, at_the_end=self.length == self.full_length):
            self.course.append({"length": self.length, "epochs": self.epochs})
            self.stage += 1
            self.train.batch_size = self.batch_size
        return self.stage == len(self.lengths)

    def status(self) -> str:
        return f"length {self.length:,}"

    def state(self) -> dict[str, Any]:
        return {"stage": self.stage, "epochs": self.epochs, "course": list(self.course)}

    def restore(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.train.batch_size = self.batch_size

    def outcome(self) -> dict[str, Any]:
        return {"solved": self.stage == len(self.lengths), "curriculum": self.course}


def lengths(first: int, last: int, growth: float) -> list[int]:
    """From the first on by the factor, in whole steps, and the last."""
    found = []
    while first < last:
        found.append(first)
        first = round(first * growth)
    return [*found, last]


def at_least(fields: Mapping[str, tuple[int | float, int | float]]) -> None:
    """Raise for the first field, given as its value and the least one, that is below it."""
    for name, (value, least) in fields.items():
        if value < least:
            raise ExperimentError(f"expected --{name} to be {least} or more, got {value}")
