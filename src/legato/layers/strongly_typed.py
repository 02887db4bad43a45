"""The strongly typed recurrent network: the barest gated layer."""

import torch

from legato._checks import real_number
from legato._gate_spec import GateSpec
from legato.layers._gated import GatedLayer, GatedState


class StronglyTypedRNN(GatedLayer[GatedState]):
    """f_t = sigmoid(V x_t + b); h_t = f_t h_{t-1} + (1 - f_t) W x_t.

    A running average of W x_t alone: state and input never meet inside a non-linearity, which is what the name says of
    them. ``MinGRU`` has a bias beside W x_t too, ``GILR`` a tanh around both, ``SRU`` a read-out with a way past.

    Args:
        input_size: channels of x.
        hidden_size: channels of the output and of the state.
        forget_bias: b at first; the paper names none. ``spread_time_scales(layer.bias, ...)`` gives each unit its own.
        device, dtype: of the weights.

    Shapes: input (B, T, input_size), output (B, T, hidden_size), state.memory (B, hidden_size). ``weight`` holds V
    above W; ``bias`` is b.

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
