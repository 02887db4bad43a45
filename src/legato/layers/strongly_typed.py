"""The strongly typed recurrent network: the simplest gated layer."""

import torch

from legato._checks import real_number
from legato._gate_spec import GateSpec
from legato.layers._gated import GatedLayer, GatedState


class StronglyTypedRNN(GatedLayer[GatedState]):
    """f_t = sigmoid(V x_t + b); h_t = f_t h_{t-1} + (1 - f_t) W x_t.

    A running average of W x_t. No non-linearity takes both the state and the input, hence "strongly
    typed". ``MinGRU`` adds a bias to W x_t, ``GILR`` a bias and a tanh, ``SRU`` an output gate with
    a skip connection.

    Args:
        input_size: channels of x.
        hidden_size: channels of the output and of the state.
        forget_bias: initial value of b; the paper gives none. ``spread_time_scales(layer.bias,
            ...)`` sets a different one per unit.
        device, dtype: of the weights.

    Shapes: input (B, T, input_size), output (B, T, hidden_size), state.memory (B, hidden_size). The
    rows of ``weight`` are those of V, then of W; ``bias`` is b.

    Example:
        >>> layer = StronglyTypedRNN(4, 256)
        >>> output, state = layer(torch.randn(2, 100, 4))
        >>> output.shape, state.memory.shape
        (torch.Size([2, 100, 256]), torch.Size([2, 256]))

    Source: Balduzzi & Ghifary 2016, arXiv 1602.02218, the T-RNN; as in Martin & Cundy 2018.
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
        biases = (real_number(forget_bias, "forget_bias"),)
        super().__init__(
            input_size, hidden_size, spec=GateSpec(("forget", "candidate")), biases=biases, device=device, dtype=dtype
        )
