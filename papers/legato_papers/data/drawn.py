"""Examples that are drawn when they are asked for: nothing is kept, and training never sees one twice.

Example number n of a stream is a pure function of (stream, seed, n), so a resumed run sees what it would have seen, and
training, validation and test are streams of their own. Who draws: the recipes ``capacity``, ``adding``, ``copy-memory``
and ``long-dependency``.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from legato._shapes import Int, Tensor

from ..task import Batch, Examples

_STREAMS = {"train": 0, "validation": 1, "test": 2}


@dataclass
class Drawn(Examples):
    """Examples without end: every update of every epoch has new ones.

    Args:
        per_epoch: numbers kept for an epoch, more than it uses; null counts on from the epoch before without a gap,
            which takes epochs of as many updates, and batches of one size.
    """

    per_epoch: int | None = 2**32

    def shuffled(self, seed: int, epoch: int, updates: int) -> Iterator[Tensor]:
        """The numbers of the next ``updates`` batches. The run's seed is in the stream already."""
        used = updates * self.batch_size
        first = epoch * (self.per_epoch or used)
        yield from torch.arange(first, first + used).split(self.batch_size)


def drawn(
    draw: Callable[[np.random.Generator], tuple[np.ndarray, ...]],
    stream: str,
    seed: int,
    size: int,
    batch_size: int,
) -> Drawn:
    """A stream of examples, each made by ``draw`` from random numbers of its own.

    Args:
        draw: makes one example from a generator: arrays, whose shapes are the same for all examples.
        stream: train, validation or test.
        seed: of the stream.
        size: examples in one pass over it.
        batch_size: examples in a batch.

    Example:
        >>> examples = drawn(lambda random: (random.random(3),), "test", seed=0, size=10, batch_size=5)
        >>> examples.take(torch.arange(2))[0].shape
        torch.Size([2, 3])
    """

    def take(numbers: Int[Tensor, " B"]) -> Batch:
        rows = [draw(np.random.default_rng((_STREAMS[stream], seed, number))) for number in numbers.tolist()]
        return tuple(torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))

    return Drawn(size, batch_size, take)
