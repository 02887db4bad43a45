"""The Legendre Memory Unit of 2019, with learned feedback: the sequential baseline for ``LMU``.

Computed in plain PyTorch: the input terms of all steps in two matrix products, then five products
and a non-linearity per step. On a CPU the products take most of the time, not the Python calls.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from legato._checks import positive_int
from legato._dtypes import without_autocast
from legato._shapes import Float, Tensor
from legato.layers._fused import can_be_read, floating_weight
from legato.layers._states import register_state
from legato.layers.base import RecurrentLayer, StateShapes, full_parameter
from legato.layers.legendre_memory import LegendreMemory, LegendreMemoryState, Theta

GATES = {"tanh": 1, "relu": 1, "gru": 3, "lstm": 4}


@register_state
class RecurrentLMUState(NamedTuple):
    """m_t, not scaled, and the output h_t; in float32 or wider."""

    memory: Float[Tensor, "B C N"]
    hidden: Float[Tensor, "B H"]


@register_state
class RecurrentLMUCellState(NamedTuple):
    """The state with an LSTM cell: m_t, h_t, and the cell state c_t."""

    memory: Float[Tensor, "B C N"]
    hidden: Float[Tensor, "B H"]
    cell: Float[Tensor, "B H"]


class RecurrentLMU(RecurrentLayer[RecurrentLMUState | RecurrentLMUCellState]):
    """h_t = f(W_x x_t + W_h h_{t-1} + W_m m_t), m_t = A m_{t-1} + B u_t, u_t = e_x x_t + e_h h_{t-1} + e_m m_{t-1}.

    The memory is that of ``LMU``. The feedback by e_h, e_m and W_h makes the layer sequential in
    time. Other cells use the same three terms; with z_t for their sum, one block per gate,

        "lstm"  i, f, g, o = z_t;  c_t = sig(f) c_{t-1} + sig(i) tanh(g);  h_t = sig(o) tanh(c_t)
        "gru"   r, v = sig(z_t);  n = tanh(W_x x_t + W_m m_t + r * W_h h_{t-1});  h_t = v h_{t-1} + (1 - v) n

    Args:
        input_size: channels of x.
        hidden_size: H, channels of the output h.
        memory_size: C, channels of u, each with its own memory.
        order: N, Legendre coefficients per channel.
        theta: length of the window in steps, 1 or more; a number, or one per channel of u.
        discretizer: "zoh" (the paper's), "euler" or "bilinear".
        trainable_theta: learn theta; see ``LegendreMemory``.
        hidden_cell: f: "tanh" (the paper's), "relu", "gru" or "lstm".
        hidden_to_memory: whether to add e_h h_{t-1}.
        memory_to_memory: whether to add e_m m_{t-1}.
        input_to_hidden: whether to add W_x x_t.
        bias: whether to add b to z_t; the paper has no bias.
        return_sequences: True returns h_t at every step, False h at the last valid step.
        device, dtype: of the weights; the steps are computed in float32 or wider.

    Shapes: input (B, T, input_size), output (B, T, hidden_size) or (B, hidden_size); state.memory (B, memory_size,
    order), state.hidden and, for "lstm", state.cell (B, hidden_size).

    Example:
        >>> layer = RecurrentLMU(input_size=1, hidden_size=212, order=256, theta=784, return_sequences=False)
        >>> output, state = layer(torch.randn(2, 50, 1))
        >>> output.shape, sum(p.numel() for p in layer.parameters())
        (torch.Size([2, 212]), 99897)

    Source: Voelker, Kajic & Eliasmith 2019, (6) to (9), with their initial weights: e_x, e_h
    LeCun-uniform, e_m zero, each W Glorot-normal. e_m and W_m read ``memory.scale * m``; the scale
    is one unless you set it, and ``calibrate`` leaves it unchanged.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        memory_size: int = 1,
        order: int,
        theta: Theta,
        discretizer: str = "zoh",
        trainable_theta: bool = False,
        hidden_cell: str = "tanh",
        hidden_to_memory: bool = True,
        memory_to_memory: bool = True,
        input_to_hidden: bool = True,
        bias: bool = False,
        return_sequences: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(input_size)
        self.hidden_size = positive_int(hidden_size, "hidden_size")
        if hidden_cell not in GATES:
            raise ValueError(f"expected hidden_cell to be one of {', '.join(GATES)}, got {hidden_cell!r}")
        self.hidden_cell = hidden_cell
        self.return_sequences = bool(return_sequences)
        self.State = RecurrentLMUCellState if hidden_cell == "lstm" else RecurrentLMUState
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.memory = LegendreMemory(
            positive_int(memory_size, "memory_size"),
            order,
            theta,
            discretizer=discretizer,
            trainable_theta=trainable_theta,
            **where,
        )

        def linear(columns: int, rows: int, bias: bool = False) -> nn.Linear:
            return nn.Linear(columns, rows, bias=bias, **where)

        input_size, hidden_size, memory_size = self.input_size, self.hidden_size, self.memory.input_size
        gates, numbers = GATES[hidden_cell] * hidden_size, memory_size * self.memory.order
        self.input_to_memory = linear(input_size, memory_size)  # e_x
        self.hidden_to_memory = linear(hidden_size, memory_size) if hidden_to_memory else None  # e_h
        self.memory_to_memory = linear(numbers, memory_size) if memory_to_memory else None  # e_m
        self.input_to_hidden = linear(input_size, gates) if input_to_hidden else None  # W_x
        self.hidden_to_hidden = linear(hidden_size, gates)  # W_h
        self.memory_to_hidden = linear(numbers, gates, bias=bias)  # W_m, b
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the weights again; see Source above. The scale and theta of the memory stay.

        A loop over ``modules()`` that resets every module resets the linear modules of this layer
        after the layer itself: call this method again after the loop.
        """
        for e in (self.input_to_memory, self.hidden_to_memory):
            if e is not None:
                bound = math.sqrt(3 / e.in_features)
                e.weight.uniform_(-bound, bound)
        if self.memory_to_memory is not None:
            self.memory_to_memory.weight.zero_()
        for W in (self.input_to_hidden, self.hidden_to_hidden, self.memory_to_hidden):
            if W is not None:
                with full_parameter(W.weight) as weight:
                    for gate in weight.chunk(GATES[self.hidden_cell]):
                        nn.init.xavier_normal_(gate)
                if W.bias is not None:
                    W.bias.zero_()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"

    def _arguments(self) -> dict[str, Any]:
        memory = self.memory
        return {
            "memory_size": memory.input_size,
            "order": memory.order,
            "theta": memory._theta,
            "discretizer": memory.discretizer,
            "trainable_theta": memory.trainable_theta,
            "hidden_to_memory": self.hidden_to_memory is not None,
            "memory_to_memory": self.memory_to_memory is not None,
            "input_to_hidden": self.input_to_hidden is not None,
            "bias": self.memory_to_hidden.bias is not None,
        }

    def _state_shapes(self) -> StateShapes:
        hidden = (self.hidden_size,)
        return ((self.memory.input_size, self.memory.order), hidden, hidden)[: len(self.State._fields)]

    def _sequence(self, x, state, lengths, reset):
        batch, steps, _ = x.shape
        shape = (batch, self.memory.input_size, self.memory.order)
        m, *hidden = self.initial_state(batch) if state is None else state
        if steps == 0:
            empty = (batch, 0, self.hidden_size) if self.return_sequences else (batch, self.hidden_size)
            return x.new_zeros(empty), None, self.State(m, *hidden)
        current = [m.flatten(1), *hidden]  # (B, C N), (B, H)
        outputs = []
        fused = all(can_be_read(child, nn.Linear) for child in self._linear_children())
        fused = fused and can_be_read(self.memory, LegendreMemory)
        # Before the autocast region: torch cannot load an exported program with nested autocast
        # regions.
        advance = self._one_step(m.dtype) if fused else self._one_step_by_children
        with without_autocast(x):
            terms = self._input_terms(x.to(m.dtype)) if fused else ((x_t,) for x_t in x.unbind(1))
            for t, input_term in enumerate(terms):
                if reset is not None:
                    current = [torch.where(reset[:, t, None], 0, part) for part in current]
                new = advance(*input_term, *current)
                if lengths is not None:
                    new = [torch.where((t < lengths)[:, None], *pair) for pair in zip(new, current, strict=True)]
                current = new
                outputs.append(current[1])
        output = torch.stack(outputs, dim=1) if self.return_sequences else current[1]
        m, *hidden = current
        # Returns no states over time: per step, the memory takes far more space than the output.
        return output.to(x.dtype), None, self.State(m.view(shape), *hidden)

    def _linear_children(self) -> list[nn.Module | None]:
        return [
            self.input_to_memory,
            self.hidden_to_memory,
            self.memory_to_memory,
            self.input_to_hidden,
            self.hidden_to_hidden,
            self.memory_to_hidden,
        ]

    def _one_step_by_children(self, x: Tensor, m: Tensor, h: Tensor, c: Tensor | None = None) -> list[Tensor]:
        """One step, (x, m, h, ...) -> [m, h, ...], by calls of the children; for replaced ones."""
        wide, h_before = h.dtype, h.to(x.dtype)
        m = m.unflatten(1, (self.memory.input_size, self.memory.order))
        u = self.input_to_memory(x)
        if self.hidden_to_memory is not None:
            u = u + self.hidden_to_memory(h_before)
        if self.memory_to_memory is not None:
            u = u + self.memory_to_memory((m * self.memory.scale).flatten(1).to(x.dtype))
        read, state = self.memory(u[:, None], LegendreMemoryState(m))
        m = state.memory.flatten(1)
        z = self.memory_to_hidden(read.flatten(1))
        if self.input_to_hidden is not None:
            z = z + self.input_to_hidden(x)
        of_h = self.hidden_to_hidden(h_before).to(wide)
        return [m, *self._cell(z.to(wide), of_h, h, c)]

    def _input_terms(self, x: Tensor):
        """e_x x_t (B, C) and W_x x_t + b (B, gates) for each t."""
        xs = x.transpose(0, 1)  # (T, B, input_size), so that each step is contiguous
        u = F.linear(xs, self.input_to_memory.weight.to(x.dtype))
        b = None if self.memory_to_hidden.bias is None else self.memory_to_hidden.bias.to(x.dtype)
        if self.input_to_hidden is not None:
            z = F.linear(xs, self.input_to_hidden.weight.to(x.dtype), b)
        else:
            zero = torch.zeros((), dtype=x.dtype, device=x.device) if b is None else b
            z = zero.expand(*xs.shape[:2], self.hidden_to_hidden.out_features)
        return zip(u.unbind(0), z.unbind(0), strict=True)

    def _one_step(self, dtype: torch.dtype):
        """The function of one step, (u, z, m, h, ...) -> [m, h, ...]; prepares the weights once."""
        A, B = self.memory.transition()
        scale = self.memory.scale.flatten().to(dtype)
        W_h = self.hidden_to_hidden.weight.to(dtype).mT
        W_m = (self.memory_to_hidden.weight.to(dtype) * scale).mT
        e_h = None if self.hidden_to_memory is None else self.hidden_to_memory.weight.to(dtype).mT
        e_m = None if self.memory_to_memory is None else (self.memory_to_memory.weight.to(dtype) * scale).mT

        def advance(u: Tensor, z: Tensor, m: Tensor, h: Tensor, c: Tensor | None = None) -> list[Tensor]:
            if e_h is not None:
                u = torch.addmm(u, h, e_h)
            if e_m is not None:
                u = torch.addmm(u, m, e_m)
            m = _memory_step(m, u, A, B)
            z = torch.addmm(z, m, W_m)
            if self.hidden_cell == "gru":
                return [m, *self._cell(z, h @ W_h, h, c)]
            return [m, *self._cell(torch.addmm(z, h, W_h), None, h, c)]

        return advance

    def _cell(self, z: Tensor, of_h: Tensor | None, h: Tensor, c: Tensor | None) -> list[Tensor]:
        """[h_t] or [h_t, c_t], from z = W_x x_t + W_m m_t + b and of_h = W_h h_{t-1}.

        of_h is None if z includes it. The "gru" needs both: r multiplies W_h h_{t-1} only.
        """
        if of_h is not None:
            if self.hidden_cell == "gru":
                return [_gru(z, of_h, h)]
            z = z + of_h
        if c is not None:
            return list(_lstm(z, c))
        return [torch.tanh(z) if self.hidden_cell == "tanh" else torch.relu(z)]

    def _weight(self) -> Tensor:
        weight = floating_weight(self.hidden_to_hidden)
        return self.memory.scale if weight is None else weight


def _memory_step(m: Tensor, u: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """A m + B u, where the argument A is transposed: m (B, C N), u (B, C)."""
    if A.ndim == 2:
        return torch.addmm(u.reshape(-1, 1) * B, m.view(-1, B.shape[-1]), A).view(m.shape)
    m = m.unflatten(1, B.shape).transpose(0, 1)  # (C, B, N)
    return torch.baddbmm(u.mT.unsqueeze(-1) * B.unsqueeze(1), m, A).transpose(0, 1).flatten(1)


def _gru(z: Tensor, of_h: Tensor, h: Tensor) -> Tensor:
    gates, candidate = z.split([2 * h.shape[1], h.shape[1]], dim=1)
    gates_h, candidate_h = of_h.split([2 * h.shape[1], h.shape[1]], dim=1)
    r, v = torch.sigmoid(gates + gates_h).chunk(2, dim=1)
    n = torch.tanh(candidate + r * candidate_h)
    return n + v * (h - n)


def _lstm(z: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = z.chunk(4, dim=1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c
