"""The minimal GRU and LSTM: the gates of 1997 and 2014 with everything that is not parallel over time taken out."""

import torch
import torch.nn.functional as F

from legato._checks import real_number
from legato._dtypes import carry_dtype
from legato._gate_spec import GateSpec
from legato.layers._gated import GatedLayer, GatedState
from legato.ops.gated import gated_recurrence, gated_step


class MinGRU(GatedLayer[GatedState]):
    """f_t = sigmoid(V x_t + b_f); h_t = f_t h_{t-1} + (1 - f_t) (W x_t + b_h).

    A GRU without its reset gate, whose other gate sees x alone. The paper writes z_t = 1 - f_t, so V and b_f are its
    weights of z with the sign turned. It is a ``StronglyTypedRNN`` with a bias beside W x_t, and a ``GILR`` without the
    tanh. The paper's log-space form, which keeps h above zero by a candidate that is positive, is not this one: it lets
    a scan over logarithms do what ``linear_recurrence`` does without them, so here h has either sign, as in the paper's
    plain form.

    Args:
        input_size: channels of x.
        hidden_size: channels of the output and of the state.
        forget_bias: b_f at first. ``spread_time_scales(layer.bias[:hidden_size], ...)`` gives each unit its own.
        device, dtype: of the weights.

    Shapes: input (B, T, input_size), output (B, T, hidden_size), state.memory (B, hidden_size). ``weight`` holds V
    above W, ``bias`` b_f before b_h.

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

    An LSTM whose gates see x alone and share one unit of weight between what stays and what comes, without the output
    gate. f_t / (f_t + i_t) is formed as sigmoid(log f_t - log i_t), so gates that are both closed divide no zero by
    zero. ``MinGRU`` has one gate for the two. The paper's log-space form keeps h above zero; this is the
    plain form, as in ``MinGRU``.

    Args:
        input_size: channels of x.
        hidden_size: channels of the output and of the state.
        forget_bias: b_f and -b_i at first, which makes the decay sigmoid(forget_bias). f_t alone cannot open it further
            than 1 / (1 + i_t). For a time scale of each unit's own, n being hidden_size,
            ``layer.bias.data[n : 2 * n] = -spread_time_scales(layer.bias.data[:n], ...)``.
        device, dtype: of the weights.

    Shapes: input (B, T, input_size), output (B, T, hidden_size), state.memory (B, hidden_size). ``weight`` holds W_f,
    W_i and W from the top, ``bias`` b_f, b_i and b_h.

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
        """log(f / i), whose sigmoid is f / (f + i), and the candidate."""
        forget, write, candidate = F.linear(x, self.weight, self.bias).chunk(3, dim=-1)
        carry = carry_dtype(forget.dtype)
        return F.logsigmoid(forget.to(carry)) - F.logsigmoid(write.to(carry)), candidate
