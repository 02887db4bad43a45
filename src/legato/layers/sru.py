"""The simple recurrent unit, in its first version."""

from typing import Any

import torch

from legato._checks import real_number
from legato._gate_spec import GateSpec
from legato.layers._gated import GatedLayer, GatedState
from legato.layers.base import Activation, activation_function


class SRU(GatedLayer[GatedState]):
    """f_t = sigmoid(W_f x_t + b_f); r_t = sigmoid(W_r x_t + b_r); c_t = f_t c_{t-1} + (1 - f_t) W x_t;
    h_t = r_t g(c_t) + (1 - r_t) x_t.

    A running average of W x_t with a gated skip connection for the input. This is the first
    version, whose gates depend on x only. The later version adds v_f * c_{t-1} and v_r * c_{t-1}
    inside the gates, which makes c non-linear in its own past and so sequential in time; it also
    scales the skip connection, (1 - r_t) x_t, and drops g. Without r, g and the skip connection,
    this layer is a ``StronglyTypedRNN``.

    Args:
        input_size: channels of x.
        hidden_size: channels of the output and of the state. Where it differs from ``input_size``,
            x_t in h_t is replaced by P x_t, with a learned matrix P.
        activation: g, a name or a callable; "tanh" as in the paper, "identity" for none.
        forget_bias: initial value of b_f; 0 as in the authors' code.
            ``spread_time_scales(layer.bias[:hidden_size], ...)`` sets a different one per unit.
        highway_bias: initial value of b_r; with a value below zero, h_t is initially closer to x_t.
        device, dtype: of the weights.

    Shapes: input (B, T, input_size), output (B, T, hidden_size), state.memory (B, hidden_size):
    c_t. The rows of ``weight`` are those of W_f, W_r, P (if used) and W, in this order; ``bias`` is
    b_f, then b_r.

    Example:
        >>> layer = SRU(4, 256)
        >>> output, state = layer(torch.randn(2, 100, 4))
        >>> output.shape, state.memory.shape
        (torch.Size([2, 100, 256]), torch.Size([2, 256]))

    Source: Lei, Zhang, Wang, Dai & Artzi 2017, arXiv 1709.02755v1, as in Martin & Cundy 2018.
    """

    State = GatedState

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        activation: Activation = "tanh",
        forget_bias: float = 0.0,
        highway_bias: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        same_size = bool(input_size == hidden_size)  # a bool for NumPy integers, too
        spec = GateSpec(("forget", "output", *(() if same_size else ("skip",)), "candidate"), skips_input=same_size)
        biases = (real_number(forget_bias, "forget_bias"), real_number(highway_bias, "highway_bias"))
        super().__init__(input_size, hidden_size, spec=spec, biases=biases, device=device, dtype=dtype)
        self.activation = activation
        activation_function(activation)  # raises on an unknown name

    def _arguments(self) -> dict[str, Any]:
        return {"forget_bias": self.biases[0], "highway_bias": self.biases[1]}
