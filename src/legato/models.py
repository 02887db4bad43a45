"""Whole networks: a recurrent layer and a head. They keep the layers' contract, so they stream as the layers do."""

from typing import Any

from torch import nn

from legato._shapes import Float, Tensor
from legato.layers._base import RecurrentLayer


class SequenceRegressor(nn.Module):
    """y_t = head(o_t), o = layer(x): a value at every step.

    Args:
        layer: a recurrent layer, such as a ``Stack``, with (B, T, channels) outputs.
        head: any module that works on the last axis.

    Example:
        >>> import torch
        >>> from legato import LMU
        >>> model = SequenceRegressor(LMU(1, 8, order=4, theta=10), nn.Linear(8, 1))
        >>> y, state = model(torch.randn(2, 20, 1))
        >>> y.shape
        torch.Size([2, 20, 1])
        >>> y_t, state = model.step(torch.randn(2, 1), state)
    """

    def __init__(self, layer: RecurrentLayer, head: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, head

    def forward(self, x: Float[Tensor, "B T C"], state: Any = None, **options: Any) -> tuple[Tensor, Any]:
        """(y, state) of a chunk; ``lengths`` and ``reset`` are the layer's."""
        output, state = self.layer(x, state, **options)
        return self.head(output), state

    def step(self, x_t: Float[Tensor, "B C"], state: Any) -> tuple[Tensor, Any]:
        """(y_t, state) of one step."""
        output_t, state = self.layer.step(x_t, state)
        return self.head(output_t), state

    def initial_state(self, batch_size: int, **options: Any) -> Any:
        """The layer's initial state."""
        return self.layer.initial_state(batch_size, **options)


class SequenceClassifier(SequenceRegressor):
    """y = head(o_T), o = layer(x): one vector of class scores for a sequence, from the output after its last step.

    Args:
        layer: a recurrent layer built with ``return_sequences=False``, which need not compute the other outputs.
        head: maps its (B, channels) output to class scores.

    Example:
        >>> import torch
        >>> from legato import LMU
        >>> model = SequenceClassifier(LMU(1, 8, order=4, theta=10, return_sequences=False), nn.Linear(8, 10))
        >>> scores, state = model(torch.randn(2, 20, 1))
        >>> scores.shape
        torch.Size([2, 10])
    """

    def __init__(self, layer: RecurrentLayer, head: nn.Module) -> None:
        if layer.return_sequences:
            raise ValueError(
                "a SequenceClassifier reads the last output only, got a layer that returns all of them: "
                "build it with return_sequences=False"
            )
        super().__init__(layer, head)
