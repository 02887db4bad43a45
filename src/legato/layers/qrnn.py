"""The quasi-recurrent network: gates from a convolution over the last inputs."""

from typing import NamedTuple

import torch

from legato._checks import positive_int, real_number
from legato._gate_spec import GateSpec
from legato._shapes import Float, Tensor
from legato.layers._gated import GatedLayer
from legato.layers.base import StateShapes
from legato.ops.gated import gated_unit, gated_unit_step


class QRNNState(NamedTuple):
    """c_t and the last kernel_size - 1 inputs, oldest first, in float32 or wider."""

    memory: Float[Tensor, "B H"]
    inputs: Float[Tensor, "B K C"]


class QRNN(GatedLayer[QRNNState]):
    """z, f, o = tanh, sigmoid, sigmoid of (W * x)_t + b, a causal convolution over x_{t-k+1} .. x_t;
    c_t = f_t c_{t-1} + (1 - f_t) z_t; h_t = o_t c_t.

    A running average whose gates read the last k inputs, with zeros before the first one. With
    k = 1 it is a ``GILR`` followed by an output gate. The state includes the last k - 1 inputs, so
    that chunks and single steps agree with the parallel pass; a reset clears them with the memory.

    Args:
        input_size: channels of x.
        hidden_size: channels of the output and of the memory.
        kernel_size: k, how many inputs the gates read, at least 1.
        forget_bias: initial bias of f. ``spread_time_scales(layer.bias[:hidden_size], ...)`` sets a
            different one per unit.
        device, dtype: of the weights.

    Shapes: input (B, T, input_size), output (B, T, hidden_size), state.memory (B, hidden_size), state.inputs
    (B, k - 1, input_size). The rows of ``weight`` (3 hidden_size, k input_size) and ``bias`` belong
    to f, o and z, in this order; the columns of ``weight`` begin with the oldest input.

    Example:
        >>> layer = QRNN(4, 256, kernel_size=3)
        >>> output, state = layer(torch.randn(2, 100, 4))
        >>> output.shape, state.memory.shape, state.inputs.shape
        (torch.Size([2, 100, 256]), torch.Size([2, 256]), torch.Size([2, 2, 4]))

    Source: Bradbury, Merity, Xiong & Socher 2017, section 2, with fo-pooling, as in Martin & Cundy 2018.
    """

    State = QRNNState

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        kernel_size: int = 2,
        forget_bias: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        taps = positive_int(kernel_size, "kernel_size")
        biases = (real_number(forget_bias, "forget_bias"), 0.0, 0.0)
        super().__init__(
            input_size,
            hidden_size,
            spec=GateSpec(("forget", "output", "candidate"), candidate_tanh=True),
            biases=biases,
            taps=taps,
            device=device,
            dtype=dtype,
        )
        self.kernel_size = taps

    def _state_shapes(self) -> StateShapes:
        return (self.hidden_size,), (self.kernel_size - 1, self.input_size)

    def _sequence(self, x, state, lengths, reset):
        initial, inputs = (None, None) if state is None else state
        windows, last = self._windows(x, inputs, reset)
        output, states, final = gated_unit((windows,), (self.weight,), self.bias, self.spec, initial, reset=reset)
        # The next step needs the window of this step without its oldest input.
        recent = windows.unflatten(2, (self.kernel_size, self.input_size))[:, :, 1:]  # (B, T, k - 1, C)
        return output.to(x.dtype), QRNNState(states, recent), QRNNState(final, last.to(self._carry_dtype()))

    def _step(self, x_t, state):
        row = torch.cat([state.inputs.to(x_t.dtype), x_t[:, None]], dim=1)  # (B, k, C)
        output, memory = gated_unit_step((row.flatten(1),), (self.weight,), self.bias, self.spec, state.memory)
        return output.to(x_t.dtype), QRNNState(memory, row[:, 1:].to(self._carry_dtype(), copy=True))

    def _windows(self, x, inputs, reset):
        """The k inputs that each step reads, (B, T, k C), oldest first, and the last k - 1."""
        (B, T), k = x.shape[:2], self.kernel_size
        inputs = x.new_zeros(B, k - 1, self.input_size) if inputs is None else inputs.to(x.dtype)
        row = torch.cat([inputs, x], dim=1)  # (B, k - 1 + T, C)
        # Not taken from the windows: the gradient would be a tensor of k times the size of x.
        shifted, last = [row[:, j : j + T] for j in range(k)], row[:, T:]
        if reset is not None:
            # A step reads an input if there is no reset between the two: equal counts of resets.
            resets = torch.cat([reset.new_zeros(B, k - 1), reset], dim=1).cumsum(1)
            stale = [resets[:, j : j + T] < resets[:, k - 1 :] for j in range(k)]
            shifted = [s.masked_fill(mask[..., None], 0) for s, mask in zip(shifted, stale, strict=True)]
            last = last.masked_fill((resets[:, T:] < resets[:, -1:])[..., None], 0)
        # For one product with k C columns. k products of shifted inputs need no copy, but save less
        # than a tenth of the time, or are slower.
        return torch.cat(shifted, dim=2), last
