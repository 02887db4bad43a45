"""The base class of the gated layers: one matrix product for all gates, then ``gated_unit``.

A subclass gives a ``GateSpec``, which names the blocks of rows of its weight, and the initial
biases; ``strongly_typed.py`` is the shortest. Next: ``ops/gated.py``, the recurrence.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from legato._checks import positive_int
from legato._gate_spec import GateSpec
from legato._shapes import Float, Tensor
from legato.layers._states import StateT
from legato.layers.base import Activation, RecurrentLayer, StateShapes, activation_function, full_parameter
from legato.ops.gated import gated_unit, gated_unit_step


class GatedState(NamedTuple):
    """c_t, in float32 or wider."""

    memory: Float[Tensor, "B H"]


class GatedLayer(RecurrentLayer[StateT]):
    """z_t = W x_t + b; c_t = f_t c_{t-1} + (1 - f_t) g(candidate_t);
    output_t = o_t activation(c_t) + (1 - o_t) skip_t.

    Args:
        input_size, hidden_size, device, dtype: as for every layer.
        spec: the blocks of ``hidden_size`` rows of the weight, in order, and the choice of g and
            skip_t. Without an output gate among the blocks, output_t = c_t.
        biases: initial values of the biases of the first blocks; the other blocks have no bias.
        taps: how many inputs the gates read at each step.
    """

    #: Applied to the state before the output gate; a name or a callable.
    activation: Activation = "identity"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        spec: GateSpec,
        biases: tuple[float, ...],
        taps: int = 1,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ):
        super().__init__(input_size)
        self.hidden_size = hidden_size = positive_int(hidden_size, "hidden_size")
        self.spec = spec
        self.biases = biases
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(len(spec.blocks) * hidden_size, taps * self.input_size, **where))
        self.bias = nn.Parameter(torch.empty(len(biases) * hidden_size, **where))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the weights again and set the biases to their initial values."""
        with full_parameter(self.weight) as weight, full_parameter(self.bias) as bias:
            for block in weight.split(self.hidden_size):
                self._draw(block)
            for block, value in zip(bias.split(self.hidden_size), self.biases, strict=True):
                block.fill_(value)

    def _draw(self, block: Tensor) -> None:
        """Initialise a block of the weight: uniform, with variance 1 / columns."""
        bound = (3 / block.shape[1]) ** 0.5
        nn.init.uniform_(block, -bound, bound)

    def _arguments(self) -> dict[str, Any]:
        return {"forget_bias": self.biases[0]}

    def _state_shapes(self) -> StateShapes:
        return ((self.hidden_size,),)

    def _sequence(self, x, state, lengths, reset):
        initial = None if state is None else state[0]
        activation = activation_function(self.activation)
        output, states, final = gated_unit(
            (x,), (self.weight,), self._padded_bias(), self.spec, initial, activation=activation, reset=reset
        )
        return output.to(x.dtype), self.State(states), self.State(final)

    def _step(self, x_t, state):
        activation = activation_function(self.activation)
        output, memory = gated_unit_step(
            (x_t,), (self.weight,), self._padded_bias(), self.spec, state[0], activation=activation
        )
        return output.to(x_t.dtype), self.State(memory)

    def _padded_bias(self) -> Tensor:
        """The bias, with zeros for the blocks that have none."""
        missing = len(self.spec.blocks) - len(self.biases)
        return F.pad(self.bias, (0, missing * self.hidden_size)) if missing else self.bias

    def _weight(self) -> Tensor:
        return self.weight
