"""Batches of texts of similar length, and a batch of texts as one tensor."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from legato._shapes import Int, Tensor

from ..task import Examples, ExperimentError
from .words import PADDING

#: Batches that are filled together, by length: more waste less padding, fewer mix the examples better.
_POOL = 50


@dataclass
class Bucketed(Examples):
    """Examples of different lengths, in batches of similar length.

    Args:
        lengths: of each example, in steps, as cut for the network; of a pair, the longer.
    """

    lengths: Int[Tensor, " size"]

    def in_order(self) -> Iterator[Tensor]:
        """The indices of every batch, each example once, the longest first: what does not fit the memory fails at once.

        The order is not that of the data: write what is computed for a batch to the places its indices name.
        """
        yield from self.lengths.argsort(descending=True, stable=True).split(self.batch_size)

    def shuffled(self, seed: int, epoch: int, updates: int) -> Iterator[Tensor]:
        """The indices of ``updates`` batches: a pure function of seed and epoch, so resumed runs see the same.

        The examples are shuffled and cut into pools of 50 batches; each pool is sorted by length and cut into batches;
        the batches are shuffled. What does not fill a batch is left out of this pass.
        """
        generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
        batches: list[Tensor] = []
        for _ in range(updates):
            if not batches:
                order = torch.randperm(self.size, generator=generator)[: self.updates_per_pass * self.batch_size]
                for pool in order.split(_POOL * self.batch_size):
                    batches += pool[self.lengths[pool].argsort(stable=True)].split(self.batch_size)
                batches = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
            yield batches.pop()


def padded(
    texts: Sequence[Int[np.ndarray, " _"]], longest: int | None = None, truncate: Literal["front", "back"] = "back"
) -> tuple[Int[Tensor, "B T"], Int[Tensor, " B"], int]:
    """One tensor of numbers of words, filled up with zeros at the end to the longest text.

    Args:
        texts: the numbers of each text.
        longest: words kept of a text; None keeps all.
        truncate: where a longer text is cut: "front" drops its first words, "back" its last.

    Returns:
        tuple: the words (B, T), int64; their numbers (B,); how many texts were cut. T is 1 or more: a text without a
        word has a length of 0 and is all padding.

    Raises:
        ExperimentError: ``longest`` is less than 1, or ``truncate`` is neither.

    Example:
        >>> words, lengths, cut = padded([np.array([5, 6, 7]), np.array([8])], longest=2, truncate="front")
        >>> words.tolist(), lengths.tolist(), cut
        ([[6, 7], [8, 0]], [2, 1], 1)
    """
    if truncate not in ("front", "back"):
        raise ExperimentError(f'truncate must be "front" or "back", got {truncate!r}')
    if longest is not None and longest < 1:
        raise ExperimentError(f"texts must keep 1 word or more, got longest={longest}")
    cut = 0
    if longest is not None:
        cut = sum(len(text) > longest for text in texts)
        texts = [text[-longest:] if truncate == "front" else text[:longest] for text in texts]
    lengths = np.array([len(text) for text in texts], np.int64)
    words = np.full((len(texts), max(1, int(lengths.max(initial=0)))), PADDING, np.int64)
    for row, text in zip(words, texts, strict=True):
        row[: len(text)] = text
    return torch.from_numpy(words), torch.from_numpy(lengths), cut
