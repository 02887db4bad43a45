"""Two layers over the same input, one of them in reverse time."""

from typing import Any, NamedTuple, NoReturn

import torch

from legato._shapes import Bool, Float, Int, Shaped, Tensor
from legato.layers.base import RecurrentLayer, check_layer, flat_output_size, zero_padding


class BidirectionalState(NamedTuple):
    """The forward layer's state after the last step, and the backward layer's after step 0."""

    forward: tuple[Any, ...]
    backward: tuple[Any, ...]


class Bidirectional(RecurrentLayer[BidirectionalState]):
    """o_t = [forward(x_0 .. x_t)_t, backward(x_t .. x_{L-1})_t], concatenated over channels.

    The backward layer reads each row from its last valid step to its first; the padding has no
    effect. ``reset[b, t]`` separates step t - 1 from step t for both layers: the backward layer
    resets its state between t and t - 1.

    Args:
        forward: a ``RecurrentLayer``, stored as ``forward_layer``.
        backward: another one with the same input_size and its own weights, stored as
            ``backward_layer``.

    Shapes: input (B, T, input_size), output (B, T, forward.output_size + backward.output_size), or
    without T if both layers have return_sequences=False: the last output of each layer, which for
    the backward layer is the one after step 0. The initial state.forward applies before step 0, and
    the final one is the state after the last step. The initial state.backward applies before the
    last step, and the final one is the state after step 0, as h_n of ``torch.nn.LSTM``.

    Raises:
        TypeError: an argument is not a layer.
        ValueError: the layers do not fit together.
        RuntimeError: by ``step``, which is not available.

    Example:
        >>> from legato import GILR
        >>> layer = Bidirectional(GILR(4, 8), GILR(4, 8))
        >>> output, state = layer(torch.randn(2, 100, 4), lengths=torch.tensor([100, 60]))
        >>> output.shape, state.backward.memory.shape
        (torch.Size([2, 100, 16]), torch.Size([2, 8]))

    Source: Schuster & Paliwal 1997.
    """

    State = BidirectionalState
    bidirectional = True

    def __init__(self, forward: RecurrentLayer, backward: RecurrentLayer):
        for name, layer in (("forward", forward), ("backward", backward)):
            check_layer(layer, name)
            if layer.bidirectional:
                raise ValueError(
                    f"expected {name} to read forward, got a bidirectional {type(layer).__name__}: pass a forward layer"
                )
            flat_output_size(layer, name)
        for name in ("input_size", "return_sequences"):
            a, b = getattr(forward, name), getattr(backward, name)
            if a != b:
                raise ValueError(f"expected forward and backward with one {name}, got {a} and {b}: make them equal")
        super().__init__(forward.input_size)
        self.return_sequences = forward.return_sequences
        self.forward_layer = forward
        self.backward_layer = backward

    @property
    def output_size(self) -> int:
        """Channels of both layers together."""
        forward = flat_output_size(self.forward_layer, "forward")
        return forward + flat_output_size(self.backward_layer, "backward")

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        state: BidirectionalState | None = None,
        *,
        lengths: Int[Tensor, "B"] | None = None,
        reset: Bool[Tensor, "B T"] | None = None,
    ) -> tuple[Tensor, BidirectionalState]:
        """Both outputs, concatenated, and both states; the arguments are those of every layer."""
        ends = self._check_arguments(x, state, lengths, reset)
        before, after = (None, None) if state is None else state
        forward, before = self.forward_layer(x, before, lengths=lengths, reset=reset)
        if reset is not None:
            reset = _reversed(_until_next(reset, ends), ends)
        # The original lengths: if they are on the CPU, the check needs no synchronisation.
        backward, after = self.backward_layer(_reversed(x, ends), after, lengths=lengths, reset=reset)
        if self.return_sequences:
            backward = _reversed(backward, ends)
        return torch.cat([forward, backward], dim=-1), BidirectionalState(before, after)

    def step(self, x_t: Float[Tensor, "B C"], state: BidirectionalState) -> NoReturn:
        """Not available: raises RuntimeError."""
        refuse_to_step(self)

    def initial_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> BidirectionalState:
        """Zeros for both layers."""
        layers = (self.forward_layer, self.backward_layer)
        return BidirectionalState(*(layer.initial_state(batch_size, device=device, dtype=dtype) for layer in layers))

    def _calibrate(self, x, lengths):
        self.forward_layer.calibrate(x, lengths=lengths)
        self.backward_layer.calibrate(_reversed(x, lengths), lengths=lengths)

    def _check_state(self, state: object, batch: int) -> None:
        self._checked_state(state)  # each layer checks its own state

    def _weight(self) -> Tensor:
        return self.forward_layer._weight()


def refuse_to_step(layer: RecurrentLayer) -> NoReturn:
    """Raise the error of ``step`` for a bidirectional layer."""
    raise RuntimeError(
        f"expected a layer that reads forward only, got a bidirectional {type(layer).__name__}: "
        "step() is not available for bidirectional layers. Pass complete sequences to forward(), "
        "or use forward layers only"
    )


def _reversed(x: Shaped[Tensor, "B T *channels"], lengths: Tensor | None) -> Shaped[Tensor, "B T *channels"]:
    """x_{L-1}, ..., x_0 of each row, followed by the unchanged padding; its own inverse."""
    if lengths is None:
        return x.flip(1)
    t = torch.arange(x.shape[1], device=x.device)
    lengths = lengths[:, None]
    t = torch.where(t < lengths, lengths - 1 - t, t)  # (B, T)
    rows = torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1]
    # As fast as a flip, forward and backward; x[rows, t] takes 1.5 times as long.
    return x.flatten(0, 1).index_select(0, (rows + t).flatten()).view(x.shape)


def _until_next(reset: Bool[Tensor, "B T"], lengths: Tensor | None) -> Bool[Tensor, "B T"]:
    """reset_{t+1} at step t: in reverse time, a reset between t and t + 1 applies before step t."""
    if lengths is not None:
        # A reset in the padding must not drop the initial state of the backward layer.
        reset = zero_padding(reset, lengths)
    return torch.cat([reset[:, 1:], torch.zeros_like(reset[:, :1])], dim=1)
