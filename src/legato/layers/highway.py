"""The highway layer: a gated feed-forward layer, for use between or above recurrent layers."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from legato._checks import check_floating, check_tensor, positive_int, real_number
from legato._shapes import Float, Tensor
from legato.layers._repr import constructor_arguments
from legato.layers.base import Activation, activation_function, full_parameter


class Highway(nn.Module):
    """y = g f(W x + b) + (1 - g) x, g = sigmoid(W_g x + b_g): a gated skip connection, per step.

    It has no state. With b_g < 0 the layer is initially close to y = x, so that many stacked
    highway layers can be trained.

    Args:
        input_size: channels of x and of y.
        activation: f: "relu", "tanh", "gelu", "silu", "sigmoid", "identity" or a callable.
        gate_bias: initial value of b_g; the gate g is then 0.27 for -1 and 0.05 for -3, where
            W_g x = 0.
        device, dtype: of the weights.

    Shapes: input and output (..., input_size). The rows of ``weight`` (2 input_size, input_size)
    are those of W_g, then of W; ``bias`` is b_g, then b.

    Raises:
        TypeError: x is not a floating tensor.
        ValueError: x does not have ``input_size`` channels.

    Example:
        >>> layer = Highway(32)
        >>> layer(torch.randn(2, 100, 32)).shape
        torch.Size([2, 100, 32])

    Source: Srivastava, Greff & Schmidhuber 2015, (3); used in the language models of Chilkuri &
    Eliasmith 2021 between the memories. The weights are initialised Glorot-uniform, b at zero.
    """

    def __init__(
        self,
        input_size: int,
        *,
        activation: Activation = "relu",
        gate_bias: float = -1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.input_size = size = positive_int(input_size, "input_size")
        self.activation = activation
        activation_function(activation)  # raises on an unknown name
        self.gate_bias = real_number(gate_bias, "gate_bias")
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(2 * size, size, **where))
        self.bias = nn.Parameter(torch.empty(2 * size, **where))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the weights again; see Source above."""
        with full_parameter(self.weight) as weight, full_parameter(self.bias) as bias:
            for matrix in weight.chunk(2):
                nn.init.xavier_uniform_(matrix)
            bias.zero_()
            bias[: self.input_size] = self.gate_bias

    def forward(self, x: Float[Tensor, "*B C"]) -> Float[Tensor, "*B C"]:
        """y for each step of x, (..., input_size)."""
        check_tensor("x", x)
        check_floating("x", x)
        if x.ndim == 0 or x.shape[-1] != self.input_size:
            raise ValueError(
                f"expected x of shape (..., {self.input_size}), got {tuple(x.shape)}: the last axis is channels"
            )
        gate, z = F.linear(x, self.weight, self.bias).chunk(2, dim=-1)
        f = activation_function(self.activation)
        new = z if f is None else f(z)
        return (x + gate.sigmoid() * (new - x)).to(x.dtype)

    def extra_repr(self) -> str:
        """The arguments of the constructor that are not defaults."""
        return constructor_arguments(self, {})
