"""What gated layers share: all gates from one matrix product, ``gated_recurrence``, and a read-out.

A member says how many blocks of rows its weight has, which of them carry a bias, and what it does with the products;
``strongly_typed.py`` is the shortest. Next: ``ops/gated.py``, the recurrence.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from legato._shapes import Float, Tensor
from legato.layers._base import RecurrentLayer, at_length, positive_int
from legato.ops.gated import gated_recurrence


class GatedState(NamedTuple):
    """What the units hold, in float32 or wider."""

    memory: Float[Tensor, "B H"]


class GatedLayer(RecurrentLayer):
    """z_t = W x_t + b; h_t = f_t h_{t-1} + (1 - f_t) g(candidate_t); output_t = read(h_t, z_t, x_t).

    The first block of z is the forget gate before its sigmoid and the last the candidate, unless ``_gates`` says
    otherwise. ``squash`` says whether g is tanh; the read-out is h_t itself, unless ``_read`` says otherwise.

    Args:
        input_size, hidden_size, device, dtype: as of every layer.
        blocks: how many blocks of ``hidden_size`` rows the weight has.
        biases: at first, of as many blocks from the top; the blocks after them have none.
        taps: how many inputs the gates see at each step.
    """

    State: Any = GatedState
    squash = False

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        blocks: int,
        biases: tuple[float, ...],
        taps: int = 1,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ):
        super().__init__(input_size)
        self.hidden_size = positive_int(hidden_size, "hidden_size")
        self.biases = biases
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(blocks * hidden_size, taps * input_size, **where))
        self.bias = nn.Parameter(torch.empty(len(biases) * hidden_size, **where))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights anew and set the biases to their first values."""
        for block in self.weight.split(self.hidden_size):
            self._draw(block)
        for bias, value in zip(self.bias.split(self.hidden_size), self.biases, strict=True):
            bias.fill_(value)

    def _draw(self, block: Tensor) -> None:
        """A block of the weight at first: uniform, of variance 1 / columns."""
        bound = (3 / block.shape[1]) ** 0.5
        nn.init.uniform_(block, -bound, bound)

    def _state_shapes(self) -> Any:
        return GatedState((self.hidden_size,))  # pyright: ignore[reportArgumentType]

    def _sequence(self, x, state, lengths, reset):
        output, memory = self._from_input(x, x, None if state is None else state.memory, lengths, reset)
        return output, GatedState(memory)

    def _from_input(self, seen, x, initial, lengths, reset):
        """Output and final memory, where the gates see ``seen``, (B, T, taps * input_size)."""
        bias = F.pad(self.bias, (0, len(self.weight) - len(self.bias)))
        z = F.linear(seen, self.weight, bias).split(self.hidden_size, dim=-1)
        states, final = gated_recurrence(*self._gates(z), None, initial, squash=self.squash, reset=reset)
        return self._read(states, z, x).to(x.dtype), at_length(states, initial, final, lengths)

    def _gates(self, z: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """The forget gate before its sigmoid and the candidate before g."""
        return z[0], z[-1]

    def _read(self, states: Tensor, z: tuple[Tensor, ...], x: Tensor) -> Tensor:
        """The output, from the states in float32 or wider, the products z and the input."""
        return states
