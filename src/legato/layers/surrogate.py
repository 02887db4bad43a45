"""The linear surrogate RNN: any cell, with the previous state replaced by a linear recurrence."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.rnn import RNNCellBase

from legato._shapes import Bool, Float, Int, Tensor
from legato.layers._fused import can_be_read
from legato.layers._states import register_state, state_names
from legato.layers.base import RecurrentLayer, check_layer, flat_output_size
from legato.ops.gated import gated_recurrence, one_step_later


@register_state
class LinearSurrogateState(NamedTuple):
    """The state of the surrogate layer, and its output s~_t in float32 or wider."""

    memory: tuple[Any, ...]
    surrogate: Float[Tensor, "B H"]


@register_state
class LinearSurrogateLSTMState(NamedTuple):
    """The state with an LSTM cell: as above, and the cell state c_t."""

    memory: tuple[Any, ...]
    surrogate: Float[Tensor, "B H"]
    cell: Float[Tensor, "B H"]


class LinearSurrogate(RecurrentLayer[LinearSurrogateState | LinearSurrogateLSTMState]):
    """s_t = f(s~_{t-1}, x_t), s~ = surrogate(x): the cell f, applied to all time steps in parallel.

    A recurrent network s_t = f(s_{t-1}, x_t) is sequential because the cell reads its own previous
    output. Here it reads s~_{t-1} instead, which a layer that is linear in time computes from x in
    parallel. The cell state of an LSTM cell is linear in time already and is not replaced:

        i, f, z, o from (x_t, s~_{t-1}) by the cell's weights;  c_t = f_t c_{t-1} + i_t z_t;  s_t = o_t tanh(c_t)

    With ``nn.LSTMCell`` and ``GILR`` it equals ``GILRLSTM(activation="tanh")``, but computes the
    products of x in two places. Other linear surrogate RNNs have their own layers: in ``QRNN`` s~
    is a convolution of the last inputs, in ``StronglyTypedRNN`` the input itself.

    Args:
        cell: f: an ``nn.LSTMCell``, ``nn.GRUCell`` or ``nn.RNNCell``, or a user-defined function or
            module f(s_{t-1}, x_t) -> s_t that works on rows: (rows, H), (rows, input_size) ->
            (rows, H).
        surrogate: the layer that computes s~, with H channels: ``GILR``, ``SRU``, ``QRNN``, ... or
            a ``Stack`` of them. It must not be bidirectional. If it is linear in time, this layer
            is parallel over time.

    Shapes: input (B, T, input_size), output (B, T, H) with H = surrogate.output_size; state.memory
    is the state of the surrogate, state.surrogate s~_t (B, H) and, with an LSTM cell, state.cell
    c_t (B, H).

    Raises:
        TypeError: the cell or the surrogate is of a wrong type.
        ValueError: the sizes of cell and surrogate differ; in the first call, f does not return the
            shape of s~.

    Example:
        >>> from legato import SRU
        >>> layer = LinearSurrogate(nn.GRUCell(4, 32), SRU(4, 32))
        >>> output, state = layer(torch.randn(2, 100, 4))
        >>> output.shape, state.surrogate.shape
        (torch.Size([2, 100, 32]), torch.Size([2, 32]))

    Source: Martin & Cundy 2018, section 3. The weights are those of the given cell and surrogate.
    """

    def __init__(self, cell: Callable[..., Tensor] | RNNCellBase, surrogate: RecurrentLayer):
        _check_surrogate(surrogate)
        _check_cell(cell, surrogate)
        super().__init__(surrogate.input_size)
        self.State = LinearSurrogateLSTMState if isinstance(cell, nn.LSTMCell) else LinearSurrogateState
        self.hidden_size = flat_output_size(surrogate, "surrogate")
        self.cell = cell
        self._input_comes_first = isinstance(cell, RNNCellBase)  # the cell may be wrapped later
        self.surrogate = surrogate

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        state: LinearSurrogateState | LinearSurrogateLSTMState | None = None,
        *,
        lengths: Int[Tensor, "B"] | None = None,
        reset: Bool[Tensor, "B T"] | None = None,
    ) -> tuple[Tensor, LinearSurrogateState | LinearSurrogateLSTMState]:
        """s_t of all steps and the state after the last; the arguments are those of every layer."""
        # The surrogate gets the original lengths: on the CPU, the check needs no synchronisation.
        given, lengths = lengths, self._check_arguments(x, state, lengths, reset)
        s, memory = self.surrogate(x, None if state is None else state.memory, lengths=given, reset=reset)
        if lengths is None:
            output, _, new = self._from_surrogate(s, memory, x, state, None, reset)
            return self._own(output, new, x, state)
        return self._padded(partial(self._from_surrogate, s, memory), x, state, lengths, reset)

    def _sequence(self, x, state, lengths, reset):
        s, memory = self.surrogate(x, None if state is None else state.memory, lengths=lengths, reset=reset)
        return self._from_surrogate(s, memory, x, state, lengths, reset)

    def _from_surrogate(self, s, memory, x, state, lengths, reset):
        """The layer, from s~_t, (B, T, H), and the state of the surrogate at the lengths."""
        _, start, *cells = self.initial_state(len(x)) if state is None else state
        last = s[:, -1].to(start.dtype) if s.shape[1] else start
        before = one_step_later(s, start, reset).to(x.dtype)
        make: Any = self.State
        if self.State is LinearSurrogateState:
            output = self._rows(before.flatten(0, 1), x.flatten(0, 1)).unflatten(0, x.shape[:2])
            return output.to(x.dtype), make(None, s), make(memory, last)
        cell: Any = self.cell
        run = _lstm if can_be_read(cell, nn.LSTMCell) else _lstm_by_steps
        output, states, final = run(cell, x, before, cells[0], reset)
        return output.to(x.dtype), make(None, s, states), make(memory, last, final)

    def initial_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> LinearSurrogateState | LinearSurrogateLSTMState:
        """Zeros for the surrogate, s~ and, with an LSTM cell, c."""
        where: dict[str, Any] = {"device": device or self._weight().device, "dtype": dtype or self._carry_dtype()}
        memory = self.surrogate.initial_state(batch_size, device=device, dtype=dtype)
        own = self.State._fields[1:]
        return self.State(memory, *(torch.zeros(batch_size, self.hidden_size, **where) for _ in own))

    def _calibrate(self, x, lengths):
        self.surrogate.calibrate(x, lengths=lengths)

    def _rows(self, before: Float[Tensor, "R H"], x: Float[Tensor, "R C"]) -> Float[Tensor, "R H"]:
        """f(s~_{t-1}, x_t), one row per step of each sequence; torch's cells take x_t first."""
        s = self.cell(x, before) if self._input_comes_first else self.cell(before, x)
        if not isinstance(s, Tensor) or s.shape != before.shape:
            got = f"shape {tuple(s.shape)}" if isinstance(s, Tensor) else type(s).__name__
            raise (ValueError if isinstance(s, Tensor) else TypeError)(
                f"expected the cell to return s_t as a tensor of shape {tuple(before.shape)}, that of s_{{t-1}} from "
                f"the surrogate, got {got}: make their sizes equal, and return s_t only"
            )
        return s

    def _check_state(self, state: object, batch: int) -> None:
        memory, *others = tensors = self._checked_state(state)
        self.surrogate._check_state(memory, batch)
        for name, tensor in zip(state_names(tensors)[1:], others, strict=True):
            self._check_state_tensor(name, tensor, (batch, self.hidden_size))

    def _weight(self) -> Tensor:
        return self.surrogate._weight()


def _lstm(
    cell: nn.LSTMCell,
    x: Float[Tensor, "B T C"],
    before: Float[Tensor, "B T H"],
    c: Float[Tensor, "B H"],
    reset: Bool[Tensor, "B T"] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """h_t and c_t of an LSTM cell that reads ``before`` in place of h_{t-1}, and the final c_t."""
    bias = cell.bias_ih + cell.bias_hh if cell.bias else None
    of_x = F.linear(x, cell.weight_ih, bias)
    gates = torch.addmm(of_x.flatten(0, 1), before.flatten(0, 1), cell.weight_hh.mT)
    i, f, z, o = gates.unflatten(0, x.shape[:2]).chunk(4, dim=-1)
    states, final = gated_recurrence(f, z, i, c, candidate_tanh=True, reset=reset)
    return o.sigmoid() * states.tanh(), states, final


def _lstm_by_steps(cell: Any, x: Tensor, before: Tensor, c: Tensor, reset: Tensor | None):
    """The same by one call of the cell per step, if it is hooked, replaced or parametrised."""
    outputs, states = [], []
    for t, (x_t, before_t) in enumerate(zip(x.unbind(1), before.unbind(1), strict=True)):
        if reset is not None:
            c = c.masked_fill(reset[:, t, None], 0)
        output, c_t = cell(x_t, (before_t, c.to(before_t.dtype)))
        c = c_t.to(c.dtype)
        outputs.append(output)
        states.append(c)
    if not outputs:
        return before, before.to(c.dtype), c
    return torch.stack(outputs, 1), torch.stack(states, 1), c


def _check_surrogate(surrogate: RecurrentLayer) -> None:
    name = type(surrogate).__name__
    check_layer(surrogate, "surrogate")
    if surrogate.bidirectional:
        raise ValueError(
            f"expected a surrogate that reads forward only, got a bidirectional {name}: use a forward layer, "
            "because s_{t-1} must not depend on later steps"
        )
    if not surrogate.return_sequences:
        raise ValueError(
            f"expected a surrogate that returns every s_t, got a {name} that returns its last output only: "
            "build it with return_sequences=True"
        )
    flat_output_size(surrogate, "surrogate")


def _check_cell(cell: Any, surrogate: RecurrentLayer) -> None:
    name = type(cell).__name__
    if inspect.isclass(cell) or isinstance(cell, nn.RNNBase | RecurrentLayer) or not callable(cell):
        got = f"the class {cell.__name__}" if inspect.isclass(cell) else name
        raise TypeError(
            f"expected cell to compute one step, got {got}: pass a cell such as nn.GRUCell(4, 256), "
            "or a function f(s_{t-1}, x_t)"
        )
    if not isinstance(cell, RNNCellBase):
        return
    if isinstance(cell, nn.LSTMCell) and type(cell).forward is not nn.LSTMCell.forward:
        raise TypeError(
            f"expected a plain nn.LSTMCell, got a {name} with a forward of its own, which would not be called: "
            "pass a function f(s_{t-1}, x_t)"
        )
    for what, theirs, ours in (
        ("hidden_size", cell.hidden_size, surrogate.output_size),
        ("input_size", cell.input_size, surrogate.input_size),
    ):
        if theirs != ours:
            verb = "returns" if what == "hidden_size" else "takes"
            raise ValueError(
                f"expected a cell of {what} {ours}, the channels that the surrogate {verb}, got a {name} of {theirs}: "
                "make them equal"
            )
    theirs, ours = cell.weight_ih, surrogate._weight()
    if (theirs.dtype, theirs.device) != (ours.dtype, ours.device):
        raise ValueError(
            f"expected a cell in {ours.dtype} on {ours.device} like the surrogate, got a {name} in {theirs.dtype} on "
            f"{theirs.device}: convert one with .to()"
        )
