"""GILR, the gated impulse linear recurrence, and GILRLSTM, an LSTM whose gates read a GILR."""

from typing import Any, NamedTuple

import torch
from torch import nn

from legato._checks import check_tensor, positive_int, real_number
from legato._gate_spec import GateSpec
from legato._shapes import Bool, Float, Int, Tensor
from legato.layers._gated import GatedLayer, GatedState
from legato.layers.base import Activation, RecurrentLayer, StateShapes, activation_function, full_parameter
from legato.ops.gated import gated_unit, gated_unit_step


class GILR(GatedLayer[GatedState]):
    """g_t = sigmoid(U x_t + b_g); i_t = tanh(V x_t + b_z); h_t = g_t h_{t-1} + (1 - g_t) i_t.

    The gates depend on the input only, so the state is linear in time. Each unit is a running
    average of tanh(V x + b_z); the input sets the length of the average through g_t. ``MinGRU`` is
    the same layer without the tanh.

    Args:
        input_size: channels of x.
        hidden_size: channels of the output and of the state.
        forget_bias: initial value of b_g; 5 is a time scale of about 150 steps.
            ``spread_time_scales(layer.bias[:hidden_size], ...)`` sets a different one per unit.
        device, dtype: of the weights.

    Shapes: input (B, T, input_size), output (B, T, hidden_size), state.memory (B, hidden_size). The
    rows of ``weight`` are those of U, then of V; ``bias`` is b_g, then b_z.

    Example:
        >>> layer = GILR(4, 256)
        >>> output, state = layer(torch.randn(2, 100, 4))
        >>> output.shape, state.memory.shape
        (torch.Size([2, 100, 256]), torch.Size([2, 256]))

    Source: Martin & Cundy 2018, (7); the bias of 5 is from the authors' code. The weights are
    initialised Glorot-uniform.
    """

    State = GatedState

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        forget_bias: float = 5.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        biases = (real_number(forget_bias, "forget_bias"), 0.0)
        super().__init__(
            input_size,
            hidden_size,
            spec=GateSpec(("forget", "candidate"), candidate_tanh=True),
            biases=biases,
            device=device,
            dtype=dtype,
        )

    def _draw(self, block):
        nn.init.xavier_uniform_(block)


# The surrogate: returns h~_{t-1}, computed from the products of x.
_SURROGATE = GateSpec(("forget", "candidate"), candidate_tanh=True, delayed=True)
_CELL = GateSpec(("forget", "write", "output", "candidate"), candidate_tanh=True)


class GILRLSTMState(NamedTuple):
    """The cell c_t and the surrogate h~_t, in float32 or wider."""

    memory: Float[Tensor, "B H"]
    surrogate: Float[Tensor, "B H"]


class GILRLSTM(RecurrentLayer[GILRLSTMState]):
    """h~ = GILR(x); f, i, o = sigmoid(U h~_{t-1} + V x_t + b); z = tanh(U_z h~_{t-1} + V_z x_t + b_z);
    c_t = f_t c_{t-1} + i_t z_t; h_t = o_t c_t.

    An LSTM whose gates read h~_{t-1}, a GILR of the input, in place of its own output h_{t-1}. The
    cell state is linear in time, as in any LSTM, so both recurrences are computed in parallel over
    time. The layer equals ``LinearSurrogate`` over an LSTM cell, but computes all products of x in
    one matrix product. It has 2 n (m + 1) more parameters than that LSTM for m input channels, the
    parameters of the ``GILR``; the paper counts 2 n (n + m).

    Args:
        input_size: channels of x.
        hidden_size: n, channels of the output, of the cell and of the surrogate.
        activation: applied to the cell state before the output gate, h_t = o_t activation(c_t):
            "identity" as in the paper, "tanh" as in an LSTM.
        forget_bias: initial bias of f_t and of the surrogate's gate; see ``spread_time_scales`` and
            ``forget_biases``.
        device, dtype: of the weights.

    Shapes: input (B, T, input_size), output (B, T, hidden_size), state.memory and state.surrogate (B, hidden_size).
    The rows of ``weight`` (6 n, input_size) and ``bias`` belong to the GILR's gate and candidate,
    then to f, i, o and z; ``weight_surrogate`` (4 n, n) is U of f, i, o and z.

    Example:
        >>> layer = GILRLSTM(4, 256)
        >>> output, state = layer(torch.randn(2, 100, 4))
        >>> output.shape, state.memory.shape
        (torch.Size([2, 100, 256]), torch.Size([2, 256]))

    Source: Martin & Cundy 2018, section 3.2; the bias of 5 is from the authors' code. The weights
    are initialised Glorot-uniform.
    """

    State = GILRLSTMState

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        activation: Activation = "identity",
        forget_bias: float = 5.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(input_size)
        self.hidden_size = hidden_size = positive_int(hidden_size, "hidden_size")
        self.activation = activation
        activation_function(activation)  # raises on an unknown name
        self.forget_bias = real_number(forget_bias, "forget_bias")
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(6 * hidden_size, self.input_size, **where))
        self.weight_surrogate = nn.Parameter(torch.empty(4 * hidden_size, hidden_size, **where))
        self.bias = nn.Parameter(torch.empty(6 * hidden_size, **where))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the weights again; see Source above."""
        with full_parameter(self.weight) as weight, full_parameter(self.weight_surrogate) as weight_surrogate:
            for matrix in (*weight.chunk(6), *weight_surrogate.chunk(4)):
                nn.init.xavier_uniform_(matrix)
        with full_parameter(self.bias) as bias:
            bias.zero_()
            surrogate, _, cell, *_ = bias.chunk(6)
            surrogate.fill_(self.forget_bias)
            cell.fill_(self.forget_bias)

    def forget_biases(self) -> tuple[Tensor, Tensor]:
        """Views of the biases of the two forget gates: the surrogate's and the cell's."""
        surrogate, _, cell, *_ = self.bias.detach().chunk(6)
        return surrogate, cell

    @property
    def _sizes(self) -> tuple[int, int]:
        """Number of rows of ``weight`` that belong to the surrogate, and to the cell."""
        return 2 * self.hidden_size, 4 * self.hidden_size

    def _state_shapes(self) -> StateShapes:
        return (self.hidden_size,), (self.hidden_size,)

    def _sequence(self, x, state, lengths, reset):
        matrices = zip(self.weight.split(self._sizes), self.bias.split(self._sizes), strict=True)
        surrogate, cell = ({"inputs": (x,), "weights": (weight,), "bias": bias} for weight, bias in matrices)
        return self._from_parts(surrogate, cell, x.dtype, state, lengths, reset)

    def _step(self, x_t, state):
        (of_surrogate, of_cell), (surrogate_bias, bias) = (x.split(self._sizes) for x in (self.weight, self.bias))
        before = state.surrogate
        _, surrogate = gated_unit_step((x_t,), (of_surrogate,), surrogate_bias, _SURROGATE, before)
        inputs, weights = (x_t, before.to(x_t.dtype)), (of_cell, self.weight_surrogate)
        activation = activation_function(self.activation)
        output, memory = gated_unit_step(inputs, weights, bias, _CELL, state.memory, activation=activation)
        return output.to(x_t.dtype), GILRLSTMState(memory, surrogate)

    def _weight(self) -> Tensor:
        return self.weight

    def from_products(
        self,
        products: Float[Tensor, "B T K"],
        state: GILRLSTMState | None = None,
        *,
        lengths: Int[Tensor, "B"] | None = None,
        reset: Bool[Tensor, "B T"] | None = None,
    ) -> tuple[Tensor, GILRLSTMState]:
        """The layer, from products = weight x_t + bias, (B, T, 6 n).

        For callers that can compute the products faster than by a matrix product: for a one-hot x_t
        they are a row of a table. The other arguments and the results are those of ``forward``.
        """
        check_tensor("products", products)
        width = len(self.weight)
        if products.ndim != 3 or products.shape[-1] != width:
            raise ValueError(
                f"expected products of shape (B, T, 6 hidden_size) = (B, T, {width}), got {tuple(products.shape)}: "
                "they are weight x_t + bias"
            )
        self._check_kind("products", products)
        lengths = self._check_options(products, state, lengths, reset)
        if lengths is None:
            output, _, new = self._from_products(products, state, None, reset)
            return self._own(output, new, products, state)
        return self._padded(self._from_products, products, state, lengths, reset)

    def _from_products(self, products, state, lengths, reset):
        parts = products.split(self._sizes, dim=-1)
        surrogate, cell = ({"inputs": (), "weights": (), "bias": None, "products": part} for part in parts)
        return self._from_parts(surrogate, cell, products.dtype, state, lengths, reset)

    def _from_parts(self, of_surrogate, of_cell, dtype, state, lengths, reset):
        """The layer, from the arguments of ``gated_unit`` for the surrogate and for the cell."""
        memory, surrogate = (None, None) if state is None else state
        _, before, last = gated_unit(**of_surrogate, spec=_SURROGATE, initial_state=surrogate, reset=reset)  # h~_{t-1}
        of_cell["inputs"] += (before.to(dtype),)
        of_cell["weights"] += (self.weight_surrogate,)
        of_cell["activation"] = activation_function(self.activation)
        output, states, final = gated_unit(**of_cell, spec=_CELL, initial_state=memory, reset=reset)
        states = None if lengths is None else GILRLSTMState(states, _one_step_earlier(before, last))
        return output.to(dtype), states, GILRLSTMState(final, last)


def _one_step_earlier(before: Tensor, last: Tensor) -> Tensor:
    """The states after each step, from the states before each step and the last state."""
    return torch.cat([before[:, 1:], last[:, None].to(before.dtype)], dim=1) if before.shape[1] else before
