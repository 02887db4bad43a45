"""A task at one length after the other, short ones first: adding, copy memory and the long dependency in ``recipes``.

A network that remembers over 300 steps and holds its state where nothing happens is nearly one that remembers over
10,000, and learns it from sequences that cost a thirtieth.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch

from legato._environment import free_memory

from .ranges import Count, Range
from .task import ExperimentError, Task, Training


@dataclass
class Curriculum(Training):
    """Trained at one length after the other, each until it is solved.

    Args:
        first_length: the length to begin with; null begins with the full one.
        growth: factor from one length to the next.
        segment: steps computed at a time, for memory and speed only; null chooses by units and batch size.
    """

    first_length: Count | None = None
    growth: Annotated[float, Range(1.1, 10**6)] = 6.0
    segment: Count | None = None


@dataclass
class ValidatedCurriculum(Curriculum):
    """Trained at one length after the other, each until validation finds it solved.

    Args:
        batch_size: sequences in an update at the full length; shorter ones come in batches of as many steps in all.
        largest_batch: but of no more sequences than this.
    """

    largest_batch: Annotated[int, Range(1, 10**6)] = 64


class Growing(Task):
    """A task whose sequences grow; ``go_on`` when a length is solved, and training ends when all are.

    The weights of the last epoch are tested, at the full length: a shorter one's figure says nothing about that.
    """

    keeps_last = True

    def __init__(self, length: int, training: Curriculum) -> None:
        self.full_length = length
        self.lengths = lengths(training.first_length or length, length, training.growth)
        self.stage = 0
        self.solved: list[dict[str, int]] = []

    @property
    def length(self) -> int:
        """That of the sequences in training and validation at present."""
        return self.lengths[min(self.stage, len(self.lengths) - 1)]

    @property
    def all_solved(self) -> bool:
        """Whether the full length is behind us too."""
        return self.stage == len(self.lengths)

    def go_on(self, **when: int) -> None:
        """The present length is solved: on to the next."""
        self.solved.append({"length": self.length} | when)
        self.stage += 1

    def finished(self, figures: dict[str, float]) -> bool:
        return self.all_solved

    def status(self) -> str:
        return f"length {self.length:,}" + (" solved" if self.all_solved else "")

    def state(self) -> dict[str, Any]:
        return {"stage": self.stage, "solved": list(self.solved)}

    def restore(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def outcome(self) -> dict[str, Any]:
        return {"solved": self.all_solved, "curriculum": self.solved}


class GrowingByValidation(Growing):
    """After every epoch ``is_good`` decides on going on to the next length."""

    def __init__(self, length: int, training: ValidatedCurriculum) -> None:
        super().__init__(length, training)
        self.training = training
        self.epochs = 0

    @abstractmethod
    def is_good(self, figures: dict[str, float], *, at_the_end: bool) -> bool:
        """Whether the validation figures are good enough for the next length, or, at the end, to stop."""

    @property
    def batch_size(self) -> int:
        """Sequences in an update at the present length."""
        alike = self.training.batch_size * self.full_length // self.length
        return max(self.training.batch_size, min(alike, self.training.largest_batch))

    def finished(self, figures: dict[str, float]) -> bool:
        # Asked once after every epoch; a resumed run asks again for the epoch that its checkpoint was written after.
        self.epochs += 1
        if self.is_good(figures, at_the_end=self.length == self.full_length):
            self.go_on(epochs=self.epochs)
            self.train.batch_size = self.batch_size
        return super().finished(figures)

    def state(self) -> dict[str, Any]:
        return super().state() | {"epochs": self.epochs}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.train.batch_size = self.batch_size


def lengths(first: int, last: int, growth: float | int) -> list[int]:
    """From the first on by the factor, in whole steps, and the last."""
    found = []
    while first < last:
        found.append(first)
        first = round(first * growth)
    return [*found, last]


def refuse_what_does_not_fit(length: int, needed: Callable[[int], int]) -> None:
    """Raise, before anything of that size is made, where training at the full length needs more memory than is free.

    Args:
        length: steps of the longest sequences.
        needed: bytes that training at a length holds at the most, rising with the length.

    Raises:
        ExperimentError: with a length that fits.
    """
    free = free_memory(torch.device("cpu"))  # where every task is built
    if free is None or needed(length) <= 0.9 * free:
        return
    fits = 1
    while needed(2 * fits) <= 0.9 * free:
        fits *= 2
    raise ExperimentError(
        f"--length {length:,} needs about {needed(length) / 2**30:,.1f} GiB and {free / 2**30:.1f} GiB are free: about "
        f"{fits:,} steps fit; fewer units or a smaller --training.batch_size need less"
    )
