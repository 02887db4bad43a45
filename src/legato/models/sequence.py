"""A regressor and a classifier of sequences: a recurrent layer and a head."""

from typing import Any, Generic

import torch
from torch import nn

from legato._modes import evaluating
from legato._shapes import Bool, Int, Shaped, Tensor
from legato.layers._fused import can_be_read
from legato.layers._states import StateT
from legato.layers.base import RecurrentLayer
from legato.layers.legendre_memory import LegendreMemory, LegendreMemoryState

from .embedding import Embedding, without_padding


class SequenceRegressor(nn.Module, Generic[StateT]):
    """y_t = head(o_t), o = layer(x): one output per step.

    Args:
        layer: a recurrent layer, such as a ``Stack``, with (B, T, channels) outputs.
        head: any module that works on the last axis.
        embedding: maps tokens (B, T) to x; None if the input is x itself.

    Example:
        >>> import torch
        >>> from legato import LMU
        >>> model = SequenceRegressor(LMU(1, 8, order=4, theta=10), nn.Linear(8, 1))
        >>> y, state = model(torch.randn(2, 20, 1))
        >>> y.shape
        torch.Size([2, 20, 1])
        >>> y_t, state = model.step(torch.randn(2, 1), state)
    """

    def __init__(self, layer: RecurrentLayer[StateT], head: nn.Module, embedding: nn.Module | None = None) -> None:
        super().__init__()
        check_embedding(embedding, layer)
        self.layer, self.head, self.embedding = layer, head, embedding

    def forward(
        self,
        x: Shaped[Tensor, "B T *C"],
        state: StateT | None = None,
        *,
        lengths: Int[Tensor, "B"] | None = None,
        reset: Bool[Tensor, "B T"] | None = None,
    ) -> tuple[Tensor, StateT]:
        """(y, state) of a chunk of inputs (B, T, C) or tokens (B, T); options as for the layer."""
        if self.embedding is not None:
            x = self.embedding(without_padding("x", x, lengths))
        output, new = self.layer(x, state, lengths=lengths, reset=reset)
        return self.head(output), new

    def step(self, x_t: Shaped[Tensor, "B *C"], state: StateT) -> tuple[Tensor, StateT]:
        """(y_t, state) of one step."""
        output_t, state = self.layer.step(self._embed(x_t), state)
        return self.head(output_t), state

    def initial_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> StateT:
        """The layer's initial state."""
        return self.layer.initial_state(batch_size, device=device, dtype=dtype)

    @torch.no_grad()
    def calibrate(self, x: Shaped[Tensor, "B T *C"], *, lengths: Int[Tensor, "B"] | None = None) -> None:
        """``RecurrentLayer.calibrate`` for the layer, on inputs (B, T, C) or tokens (B, T)."""
        with evaluating(self):
            if self.embedding is not None:
                x = self.embedding(without_padding("x", x, lengths))
            self.layer.calibrate(x, lengths=lengths)

    def _embed(self, x: Tensor) -> Tensor:
        return x if self.embedding is None else self.embedding(x)


class SequenceClassifier(SequenceRegressor[StateT]):
    """y = head(o_T), o = layer(x): class scores per sequence, from the output at its last step.

    Args:
        layer: a recurrent layer. Build it with ``return_sequences=False`` if it has that option:
            the other outputs are then not computed.
        head: maps the output of the layer, flattened to (B, channels), to class scores.
        embedding: maps tokens (B, T) to x, such as an ``Embedding``; None if the input is x itself.

    For a row without steps, the input of the head is zero.

    Example:
        >>> import torch
        >>> from legato import LMU
        >>> model = SequenceClassifier(LMU(1, 8, order=4, theta=10, return_sequences=False), nn.Linear(8, 10))
        >>> scores, state = model(torch.randn(2, 20, 1))
        >>> scores.shape
        torch.Size([2, 10])
    """

    def forward(
        self,
        x: Shaped[Tensor, "B T *C"],
        state: StateT | None = None,
        *,
        lengths: Int[Tensor, "B"] | None = None,
        reset: Bool[Tensor, "B T"] | None = None,
    ) -> tuple[Tensor, StateT]:
        """(scores, state) after the last valid step."""
        output, state = last_output(self.layer, self.embedding, x, state, lengths, reset)
        return self.head(output), state

    def step(self, x_t: Shaped[Tensor, "B *C"], state: StateT) -> tuple[Tensor, StateT]:
        """(scores, state) after one more step."""
        output_t, state = self.layer.step(self._embed(x_t), state)
        return self.head(output_t.flatten(1)), state


def last_output(
    layer: RecurrentLayer[StateT],
    embedding: nn.Module | None,
    x: Shaped[Tensor, "B T *C"],
    state: StateT | None = None,
    lengths: Int[Tensor, "B"] | None = None,
    reset: Bool[Tensor, "B T"] | None = None,
) -> tuple[Tensor, StateT]:
    """The output at the last valid step, flattened to (B, channels), and the state.

    The output of a row without steps is zero. ``x`` are inputs, or tokens if there is an embedding.
    """
    if embedding is not None:
        x = without_padding("x", x, lengths)
        if state is None and reset is None and x.ndim == 2 and x.shape[1] and _is_weighted_sum(layer, embedding):
            return _weighted_sum(layer, embedding, x, lengths)
        x = embedding(x)
    output, new = layer(x, state, lengths=lengths, reset=reset)
    if layer.return_sequences:
        if x.shape[1] == 0:
            output = output.new_zeros(x.shape[0], *output.shape[2:])
        elif lengths is None:
            output = output[:, -1]
        else:  # outputs from a length on are zero, so that of a row without steps is zero too
            last = (lengths.to(x.device, torch.int64) - 1).clamp(min=0)
            output = output[torch.arange(len(x), device=x.device), last]
    return output.flatten(1), new


def _is_weighted_sum(layer: RecurrentLayer, embedding: nn.Module | None) -> bool:
    """Whether the last memory is a weighted sum of word vectors, of order 1."""
    return (
        isinstance(layer, LegendreMemory)
        and can_be_read(layer, LegendreMemory)
        and not layer.return_sequences
        and layer.order == 1
        and layer.window().ndim == 0
        and isinstance(embedding, Embedding)
        and can_be_read(embedding, Embedding)
        and embedding.weight.dtype == layer.scale.dtype == layer._carry_dtype()
    )


def _weighted_sum(layer: Any, embedding: Any, tokens: Tensor, lengths: Tensor | None) -> tuple[Tensor, Any]:
    """The same in a fifth of the time: does not create the tensor of all word vectors."""
    steps = tokens.shape[1]
    if lengths is None:
        lengths = torch.full((len(tokens),), steps, device=tokens.device)
    weights = layer.response(lengths.to(tokens.device, torch.int64), steps)[..., 0]
    memory = embedding.weighted_sum(tokens, weights)
    return layer._own(memory * layer.scale[:, 0], LegendreMemoryState(memory[..., None]), tokens, None)


def check_embedding(embedding: nn.Module | None, layer: RecurrentLayer) -> None:
    """Raise ValueError unless the embedding has as many channels as the layer's input."""
    if isinstance(embedding, Embedding) and embedding.embedding_dim != layer.input_size:
        raise ValueError(
            f"expected an embedding of {layer.input_size} channels, the layer's input_size, got "
            f"{embedding.embedding_dim}: make them equal"
        )
