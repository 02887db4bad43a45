"""Two sequences compared: do they say the same, does one follow from the other."""

import torch
from torch import nn

from legato._shapes import Float, Int, Shaped, Tensor
from legato.layers.base import RecurrentLayer
from legato.models.sequence import check_embedding, last_output


class PairClassifier(nn.Module):
    """y = head([m1, m2, |m1 - m2|, m1 * m2]), m = layer(x): class scores for two sequences, read by one layer.

    Args:
        layer: a recurrent layer, of which the output after the last step counts. Build it with
            ``return_sequences=False`` where it takes that.
        head: maps (B, 4 * channels) to class scores, where m, flattened, has ``channels``.
        embedding: turns tokens (B, T) into x, such as an ``Embedding``; None where x is given.

    A sequence without steps has m = 0.

    Example:
        >>> import torch
        >>> from legato import LegendreMemory
        >>> layer = LegendreMemory(300, order=1, theta=50, return_sequences=False)
        >>> model = PairClassifier(layer, nn.Linear(1200, 3))
        >>> model(torch.randn(2, 20, 300), torch.randn(2, 14, 300)).shape
        torch.Size([2, 3])

    Source: Chilkuri & Eliasmith 2021, on QQP and SNLI; the vector is that of Mou et al. 2016, "Natural language
    inference by tree-based convolution and heuristic matching".
    """

    def __init__(self, layer: RecurrentLayer, head: nn.Module, embedding: nn.Module | None = None) -> None:
        super().__init__()
        check_embedding(embedding, layer)
        self.layer, self.head, self.embedding = layer, head, embedding

    def forward(
        self,
        first: Shaped[Tensor, "B T1 *C"],
        second: Shaped[Tensor, "B T2 *C"],
        *,
        lengths: tuple[Int[Tensor, "B"] | None, Int[Tensor, "B"] | None] = (None, None),
    ) -> Float[Tensor, "B classes"]:
        """Scores of pairs of inputs (B, T, C), or of tokens (B, T).

        Args:
            first, second: row b of one goes with row b of the other; their numbers of steps may differ.
            lengths: steps that count in each row of ``first`` and of ``second``; None: all.
        """
        m1, m2 = self._read(first, lengths[0]), self._read(second, lengths[1])
        return self.head(torch.cat([m1, m2, (m1 - m2).abs(), m1 * m2], dim=1))

    def _read(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        return last_output(self.layer, self.embedding, x, lengths=lengths)[0]
