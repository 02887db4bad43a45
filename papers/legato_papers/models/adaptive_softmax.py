"""Adaptive softmax: the rarer a token, the fewer channels its probability is computed from."""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from legato._checks import positive_int
from legato._dtypes import carry_dtype
from legato._shapes import Float, Int, Tensor


class AdaptiveSoftmax(nn.AdaptiveLogSoftmaxWithLoss):
    """log p of every token or of the targets, in clusters of falling frequency; an ``output`` of a ``LanguageModel``.

    The parameters are those of torch's class. Its forward passes mix dtypes under autocast, so they are written anew.

    Args:
        channels: channels of the features.
        vocabulary: number of tokens, sorted by falling frequency.
        cutoffs: the first token of each cluster of rarer tokens, rising, between 0 and ``vocabulary``.

    Raises:
        ValueError: cutoffs that do not rise within the vocabulary.

    Example:
        >>> softmax = AdaptiveSoftmax(16, 1000, [100, 400])
        >>> softmax(torch.randn(2, 16)).shape, softmax(torch.randn(2, 16), torch.tensor([3, 999])).shape
        (torch.Size([2, 1000]), torch.Size([2]))

    Source: Grave et al. 2017, "Efficient softmax approximation for GPUs".
    """

    def __init__(
        self,
        channels: int,
        vocabulary: int,
        cutoffs: Sequence[int],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        cutoffs = [positive_int(cutoff, "each of cutoffs") for cutoff in cutoffs]
        if any(a >= b for a, b in zip([0, *cutoffs], [*cutoffs, vocabulary], strict=True)):
            raise ValueError(
                f"expected cutoffs that rise between 0 and the vocabulary's {vocabulary}, got {cutoffs}: "
                "each is the first token of a cluster of rarer tokens"
            )
        # Each cluster has a quarter of the channels of the one before, as in the paper, but at least one.
        narrower = next(n for n in (4.0, 2.0, 1.0) if channels >= n ** len(cutoffs))
        super().__init__(channels, vocabulary, cutoffs, div_value=narrower, head_bias=True, device=device, dtype=dtype)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, features: Float[Tensor, "R C"], targets: Int[Tensor, "R"] | None = None
    ) -> Float[Tensor, "R *V"]:
        """log p of the targets, or of all tokens."""
        if targets is None:
            return self.log_prob(features)
        targets = targets.to(torch.int64)
        head = F.log_softmax(self.head(features), dim=1, dtype=carry_dtype(features.dtype))
        # Targets outside of the vocabulary stay as they are, so that gather raises, on a GPU too.
        rare = (targets >= self.shortlist_size) & (targets < self.n_classes)
        log_p = head.gather(1, targets.masked_fill(rare, 0)[:, None])[:, 0]
        for number, (tail, low, high) in enumerate(self._clusters(), self.shortlist_size):
            rows = ((targets >= low) & (targets < high)).nonzero()[:, 0]
            inside = F.log_softmax(tail(features[rows]), dim=1, dtype=carry_dtype(features.dtype))
            inside = inside.gather(1, targets[rows, None] - low)[:, 0]
            log_p = log_p.index_copy(0, rows, head[rows, number] + inside)
        return log_p

    def log_prob(self, features: Float[Tensor, "R C"]) -> Float[Tensor, "R V"]:
        """log p of all tokens."""
        head = F.log_softmax(self.head(features), dim=1, dtype=carry_dtype(features.dtype))
        parts = [head[:, : self.shortlist_size]]
        for number, (tail, _, _) in enumerate(self._clusters(), self.shortlist_size):
            parts.append(
                head[:, number, None] + F.log_softmax(tail(features), dim=1, dtype=carry_dtype(features.dtype))
            )
        return torch.cat(parts, 1)

    def _clusters(self) -> Iterator[tuple[nn.Module, int, int]]:
        return zip(self.tail, self.cutoffs[:-1], self.cutoffs[1:], strict=True)


def adaptive_softmax(
    cutoffs: Sequence[int], *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Callable[[int, int], AdaptiveSoftmax]:
    """The ``output`` of a ``LanguageModel``: an ``AdaptiveSoftmax`` with these cutoffs."""
    return lambda channels, vocabulary: AdaptiveSoftmax(channels, vocabulary, cutoffs, device=device, dtype=dtype)
