"""What gated layers share: all gates from one matrix product, and ``gated_unit``.

A member says what the blocks of rows of its weight are and which of them carry a bias; ``strongly_typed.py`` is the
shortest. Next: ``ops/gated.py``, the recurrence.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from legato._checks import positive_int
from legato._shapes import Float, Tensor
from legato.layers._states import StateT
from legato.layers.base import Activation, RecurrentLayer, StateShapes, activation_function, whole
from legato.ops.gated import gated_unit, gated_unit_step


class GatedState(NamedTuple):
    """What the units hold, in float32 or wider."""

    memory: Float[Tensor, "B H"]


class GatedLayer(RecurrentLayer[StateT]):
    """z_t = W x_t + b; c_t = f_t c_{t-1} + (1 - f_t) g(candidate_t);
    output_t = o_t activation(c_t) + (1 - o_t) skip_t.

    ``squash`` says whether g is tanh, ``activation`` what c_t passes through, ``_skip`` what goes past it. Without an
    output gate among the blocks, output_t = c_t.

    Args:
        input_size, hidden_size, device, dtype: as of every layer.
        blocks: what the blocks of ``hidden_size`` rows of the weight are, from the top; see ``gated_unit``.
        biases: at first, of as many blocks from the top; the blocks after them have none.
        taps: how many inputs the gates see at each step.
    """

    squash = False
    activation: Activation = "identity"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        blocks: tuple[str, ...],
        biases: tuple[float, ...],
        taps: int = 1,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ):
        super().__init__(input_size)
        self.hidden_size = hidden_size = positive_int(hidden_size, "hidden_size")
        self.blocks = blocks
        self.biases = biases
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(len(blocks) * hidden_size, taps * self.input_size, **where))
        self.bias = nn.Parameter(torch.empty(len(biases) * hidden_size, **where))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights anew and set the biases to their first values."""
        with whole(self.weight) as weight, whole(self.bias) as bias:
            for block in weight.split(self.hidden_size):
                self._draw(block)
            for block, value in zip(bias.split(self.hidden_size), self.biases, strict=True):
                block.fill_(value)

    def _draw(self, block: Tensor) -> None:
        """A block of the weight at first: uniform, of variance 1 / columns."""
        bound = (3 / block.shape[1]) ** 0.5
        nn.init.uniform_(block, -bound, bound)

    def _arguments(self) -> dict[str, Any]:
        return {"forget_bias": self.biases[0]}

    def _state_shapes(self) -> StateShapes:
        return ((self.hidden_size,),)

    def _sequence(self, x, state, lengths, reset):
        output, states, final = self._from_input(x, x, None if state is None else state[0], reset)
        return output, self.State(states), self.State(final)

    def _from_input(self, seen, x, initial, reset):
        """Output, memories and final memory, where the gates see ``seen``, (B, T, taps * input_size)."""
        output, states, final = gated_unit(
            (seen,), (self.weight,), self._whole_bias(), self.blocks, initial, reset=reset, **self._form(x)
        )
        return output.to(x.dtype), states, final

    def _step(self, x_t, state):
        output, memory = self._step_from_input(x_t, x_t, state[0])
        return output, self.State(memory)

    def _step_from_input(self, seen, x_t, memory):
        """Output and memory after one step, where the gates see ``seen``, (B, taps * input_size)."""
        output, memory = gated_unit_step(
            (seen,), (self.weight,), self._whole_bias(), self.blocks, memory, **self._form(x_t)
        )
        return output.to(x_t.dtype), memory

    def _form(self, x: Tensor) -> dict[str, Any]:
        return {
            "skip": self._skip(x),
            "squash": self.squash,
            "activation": activation_function(self.activation) if "output" in self.blocks else None,
        }

    def _whole_bias(self) -> Tensor:
        """The bias with zeros for the blocks that have none."""
        missing = len(self.blocks) - len(self.biases)
        return F.pad(self.bias, (0, missing * self.hidden_size)) if missing else self.bias

    def _weight(self) -> Tensor:
        return self.weight

    def _skip(self, x: Tensor) -> Tensor | None:
        """What goes past the memory, where it is not a block of the products."""
        return None
