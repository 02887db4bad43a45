"""A diagonal linear recurrence with user-defined gates and read-out."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from legato._checks import positive_int
from legato._dtypes import without_autocast
from legato._shapes import Float, Tensor
from legato.layers.base import RecurrentLayer, StateShapes
from legato.ops.recurrence import linear_recurrence


class LinearRNNState(NamedTuple):
    """h_t, in float32 or wider."""

    memory: Float[Tensor, "B H"]


class LinearRNN(RecurrentLayer[LinearRNNState]):
    """a_t, b_t = gates(x_t); h_t = a_t h_{t-1} + b_t; o_t = read(h_t, x_t).

    Any recurrence whose gates depend on the input only, given by two functions or by a subclass
    that defines them. States, chunks, lengths, resets and ``step`` are implemented. The library's
    gated layers are faster: they have one matrix product for all gates, and one op for the gates
    and the recurrence. For a cell with feedback, use ``LinearSurrogate``.

    Args:
        input_size: channels of x.
        hidden_size: channels of the state.
        gates: computes the decay and the impulse from x (B, T, input_size) as two real tensors: the
            impulse (B, T, hidden_size), the decay of any shape that broadcasts to it; the
            recurrence is stable for decays up to 1. It must compute each time step independently,
            because ``step`` calls it with one step. A module is registered, and so trained and
            saved with the layer. It runs without autocast, because 16 bits round a decay above
            0.998 to one.
        read: computes the output (B, T, output_size) from the states h (B, T, hidden_size), in
            float32 or wider, and x (B, T, input_size), each time step independently; None returns
            h.
        output_size: channels of what ``read`` returns; ``hidden_size`` by default.

    Shapes: input (B, T, input_size), output (B, T, output_size), state.memory (B, hidden_size).

    Raises:
        TypeError: ``gates`` is neither given nor defined by a subclass, or does not return two real
            tensors.
        ValueError: ``gates`` returns a tensor of a wrong shape.

    Example:
        >>> layer = LinearRNN(4, 4, lambda x: (torch.tensor(0.5), 0.5 * x))  # running averages
        >>> layer(torch.ones(1, 3, 4))[0][0, :, 0].tolist()
        [0.5, 0.75, 0.875]

        As a subclass, with a gate and a candidate:

        >>> class Leaky(LinearRNN):
        ...     def __init__(self, input_size, hidden_size):
        ...         super().__init__(input_size, hidden_size)
        ...         self.gate = torch.nn.Linear(input_size, hidden_size)
        ...         self.candidate = torch.nn.Linear(input_size, hidden_size)
        ...
        ...     def gates(self, x):
        ...         decay = self.gate(x).sigmoid()
        ...         return decay, (1 - decay) * self.candidate(x)
        >>> Leaky(4, 256)(torch.randn(2, 100, 4))[0].shape
        torch.Size([2, 100, 256])

    Source: Martin & Cundy 2018, section 3: linear surrogate RNNs, of which the gated layers of this
    library are instances.
    """

    State = LinearRNNState
    _steps_are_new = False  # gates and read may return their arguments

    _no_weight: Tensor

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        gates: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
        read: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        output_size: int | None = None,
    ):
        super().__init__(input_size)
        self.hidden_size = positive_int(hidden_size, "hidden_size")
        self._output_size = self.hidden_size if output_size is None else positive_int(output_size, "output_size")
        if gates is None and type(self).gates is LinearRNN.gates:
            raise TypeError(
                "expected gates, got None: pass a function of x that returns (decay, impulse), or define gates() in a "
                "subclass"
            )
        self.gates_function, self.read_function = gates, read
        # Carries the dtype and device of a layer without parameters.
        self.register_buffer("_no_weight", torch.empty(0), persistent=False)

    @property
    def output_size(self) -> int:
        """Channels of what ``read`` returns."""
        return self._output_size

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Decay and impulse, (B, T, hidden_size), from x, (B, T, input_size)."""
        if self.gates_function is None:
            raise NotImplementedError("expected gates, got none: define gates() in a subclass, or pass gates=")
        return self.gates_function(x)

    def read(self, states: Tensor, x: Tensor) -> Tensor:
        """The output from the states, (B, T, hidden_size), and x."""
        return states if self.read_function is None else self.read_function(states, x)

    def _arguments(self) -> dict[str, Any]:
        output_size = None if self._output_size == self.hidden_size else self._output_size
        return {"gates": self.gates_function, "read": self.read_function, "output_size": output_size}

    def _state_shapes(self) -> StateShapes:
        return ((self.hidden_size,),)

    def _sequence(self, x, state, lengths, reset):
        initial = None if state is None else state.memory
        with without_autocast(x):
            decay, impulse = self._checked_gates(x.to(self._weight().dtype))
            states, final = linear_recurrence(decay, impulse, initial, reset=reset)
        output = self.read(states, x)
        return output.to(x.dtype), LinearRNNState(states), LinearRNNState(final)

    def _checked_gates(self, x):
        found = self.gates(x)
        if not isinstance(found, tuple) or len(found) != 2 or not all(isinstance(part, Tensor) for part in found):
            raise TypeError(f"expected gates(x) to return two tensors, decay and impulse, got {found!r}")
        decay, impulse = found
        if impulse.shape != (*x.shape[:2], self.hidden_size):
            raise ValueError(
                f"expected gates(x) to return an impulse of shape {(*x.shape[:2], self.hidden_size)}, "
                f"got {tuple(impulse.shape)}: (batch, time, hidden_size)"
            )
        if decay.is_complex() or impulse.is_complex():
            raise TypeError("expected gates(x) to return real tensors, got complex ones: LRU has complex decays")
        return decay.to(self._carry_dtype()), impulse.to(self._carry_dtype())

    def _check_kind(self, name: str, x: Tensor) -> None:
        # Without parameters, the layer accepts 16-bit inputs, as a neighbour gives them under
        # FSDP's mixed precision.
        weight = self._weight()
        narrow = x.dtype in (torch.float16, torch.bfloat16) and weight.dtype == torch.float32
        if not (weight is self._no_weight and narrow and x.device == weight.device):
            super()._check_kind(name, x)

    def _weight(self) -> Tensor:
        return next(self.parameters(), self._no_weight)
