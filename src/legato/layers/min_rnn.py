"""The minimal GRU and LSTM: a GRU and an LSTM without the parts that are sequential in time."""

import torch
import torch.nn.functional as F

from legato._checks import real_number
from legato._dtypes import carry_dtype
from legato._gate_spec import GateSpec
from legato.layers._gated import GatedLayer, GatedState
from legato.ops.gated import gated_recurrence, gated_step


class MinGRU(GatedLayer[GatedState]):
    """f_t = sigmoid(V x_t + b_f); h_t = f_t h_{t-1} + (1 - f_t) (W x_t + b_h).

    A GRU without its reset gate, whose other gate depends on x only. The paper writes
    z_t = 1 - f_t, so V and b_f are the paper's weights of z with the opposite sign. The layer is a
    ``StronglyTypedRNN`` with a bias added to W x_t, and a ``GILR`` without the tanh. It is the
    paper's plain version, in which h has either sign. The paper's log-space version makes the
    candidate positive, so that a scan over logarithms can compute h; ``linear_recurrence`` does not
    need logarithms.

    Args:
        input_size: channels of x.
        hidden_size: channels of the output and of the state.
        forget_bias: initial value of b_f. ``spread_time_scales(layer.bias[:hidden_size], ...)``
            sets a different one per unit.
        device, dtype: of the weights.

    Shapes: input (B, T, input_size), output (B, T, hidden_size), state.memory (B, hidden_size). The
    rows of ``weight`` are those of V, then of W; ``bias`` is b_f, then b_h.

    Example:
        >>> layer = MinGRU(4, 256)
        >>> output, state = layer(torch.randn(2, 100, 4))
        >>> output.shape, state.memory.shape
        (torch.Size([2, 100, 256]), torch.Size([2, 256]))

    Source: Feng, Tung, Ahmed, Bengio & Hajimirsadeghi 2024, arXiv 2410.01201, section 3.1.
    """

    State = GatedState

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        forget_bias: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            input_size,
            hidden_size,
            spec=GateSpec(("forget", "candidate")),
            biases=(real_number(forget_bias, "forget_bias"), 0.0),
            device=device,
            dtype=dtype,
        )


class MinLSTM(GatedLayer[GatedState]):
    """f_t, i_t = sigmoid(k_f), sigmoid(k_i), k = W_f x_t + b_f and W_i x_t + b_i;
    h_t = (f_t h_{t-1} + i_t (W x_t + b_h)) / (f_t + i_t).

    An LSTM without the output gate, whose gates depend on x only and are normalised to a sum of
    one. f_t / (f_t + i_t) is computed as sigmoid(log f_t - log i_t), which avoids 0 / 0 where both
    gates are closed. ``MinGRU`` has one gate in place of the two. The paper's log-space version
    makes h positive; this is the plain version, as in ``MinGRU``.

    Args:
        input_size: channels of x.
        hidden_size: channels of the output and of the state.
        forget_bias: initial value of b_f and of -b_i, which makes the initial decay
            sigmoid(forget_bias). f_t alone cannot raise the decay above 1 / (1 + i_t). For a
            different time scale per unit, with n = hidden_size,
            ``layer.bias.data[n : 2 * n] = -spread_time_scales(layer.bias.data[:n], ...)``.
        device, dtype: of the weights.

    Shapes: input (B, T, input_size), output (B, T, hidden_size), state.memory (B, hidden_size). The
    rows of ``weight`` are those of W_f, W_i and W, in this order; ``bias`` is b_f, b_i and b_h.

    Example:
        >>> layer = MinLSTM(4, 256)
        >>> output, state = layer(torch.randn(2, 100, 4))
        >>> output.shape, state.memory.shape
        (torch.Size([2, 100, 256]), torch.Size([2, 256]))

    Source: Feng, Tung, Ahmed, Bengio & Hajimirsadeghi 2024, arXiv 2410.01201, section 3.2.
    """

    State = GatedState

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        forget_bias: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        forget_bias = real_number(forget_bias, "forget_bias")
        biases = (forget_bias, -forget_bias, 0.0)
        spec = GateSpec(("forget", "write", "candidate"))
        super().__init__(input_size, hidden_size, spec=spec, biases=biases, device=device, dtype=dtype)

    def _sequence(self, x, state, lengths, reset):
        forget, candidate = self._gate_and_candidate(x)
        states, final = gated_recurrence(forget, candidate, None, None if state is None else state.memory, reset=reset)
        return states.to(x.dtype), GatedState(states), GatedState(final)

    def _step(self, x_t, state):
        forget, candidate = self._gate_and_candidate(x_t)
        memory = gated_step(forget, candidate, None, state.memory)
        return memory.to(x_t.dtype), GatedState(memory)

    def _gate_and_candidate(self, x):
        """log(f / i), whose sigmoid is the decay f / (f + i), and the candidate."""
        forget, write, candidate = F.linear(x, self.weight, self.bias).chunk(3, dim=-1)
        carry = carry_dtype(forget.dtype)
        return F.logsigmoid(forget.to(carry)) - F.logsigmoid(write.to(carry)), candidate
