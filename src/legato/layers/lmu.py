"""The Legendre Memory Unit that trains in parallel over time: an encoder, a Legendre memory and a read-out.

``LMU.forward`` computes every output, or only the last one (``_last``) by one matrix product. The
memory is in ``legendre_memory.py``; the LMU of 2019, with recurrent weights, in
``recurrent_lmu.py``.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from legato._checks import dropout_rate, positive_int
from legato._dtypes import without_autocast
from legato._shapes import Float, Tensor
from legato.layers._fused import can_be_read, floating_weight, transforms_are_active
from legato.layers.base import Activation, RecurrentLayer, StateShapes, activation_function, at_length
from legato.layers.legendre_memory import (
    LegendreMemory,
    LegendreMemoryState,
    Theta,
    refuse_method_without_sequences,
)
from legato.layers.segments import over_segments
from legato.ops.time_invariant import apply

# Memories up to this size in total are not recomputed: recomputation takes up to 1.7 times the
# time.
MAX_STORED_BYTES = 64 * 2**20
# Beyond it, the size of the memories of one segment. Twice this size is a tenth faster, but takes
# 1.3 times the memory.
SEGMENT_BYTES = 4 * 2**20
# Activations whose derivative can be computed from the output, so that they may run in place.
IN_PLACE = {"relu": torch.relu_, "sigmoid": torch.sigmoid_, "tanh": torch.tanh_}


class LMUState(NamedTuple):
    """m_t, not scaled, in float32 or wider."""

    memory: Float[Tensor, "B C N"]


class LMU(RecurrentLayer[LMUState]):
    """o_t = f2(W_m m_t + W_x x_t + b_o), m_t = A m_{t-1} + B u_t, u_t = f1(U_x x_t + b_u).

    An encoder (u), a Legendre memory (m) and a read-out (o). There is no learned feedback in time,
    unlike W_h, e_h and e_m in ``RecurrentLMU``, the unit of 2019. A and B are determined by
    ``order`` and ``theta``, so all m_t are computed by matrix products over time, and the same
    network can be run as a stream, step by step, from ``state.memory``. W_m reads ``memory.scale *
    m_t``; see ``calibrate``.

    Args:
        input_size: channels of x.
        hidden_size: channels of the output o.
        memory_size: C, channels of u, each with its own memory.
        order: N, Legendre coefficients per channel.
        theta: length of the window in steps, 1 or more; a number, or one per channel of u.
        discretizer: "zoh" (the paper's), "euler" or "bilinear".
        trainable_theta: learn theta; see ``LegendreMemory``.
        encoder_activation: f1, "identity" (the paper's on psMNIST), "relu", "tanh", "gelu", "silu",
            "sigmoid" or a callable.
        activation: f2, likewise; "relu" is the paper's on psMNIST.
        input_to_output: whether to add W_x x_t.
        bias: whether to add b_u and b_o.
        memory_dropout: fraction of m_t that is dropped in training before W_m, 0 to below 1.
        return_sequences: True returns o_t at every step. False returns o at the last valid step, by
            equation (25).
        recompute: in training, store the memories of one segment of time only, and recompute them
            in the backward pass, if the memories, B * T * C * N numbers, exceed 64 MiB. False
            stores all of them, and so do a backward pass with create_graph=True, forward mode,
            ``torch.func`` and compiled graphs.
        method: the algorithm of the memory, see ``LegendreMemory``; None chooses one.
        device, dtype: of the weights.

    Shapes: input (B, T, input_size), output (B, T, hidden_size) or (B, hidden_size), state.memory
    (B, memory_size, order).

    Example:
        >>> layer = LMU(input_size=1, hidden_size=346, order=468, theta=784, return_sequences=False)
        >>> output, state = layer(torch.randn(100, 784, 1))
        >>> output.shape, state.memory.shape
        (torch.Size([100, 346]), torch.Size([100, 1, 468]))

    Source: Chilkuri & Eliasmith 2021, (18) to (20), (24) to (26). The weights are initialised as in
    Voelker, Kajic & Eliasmith 2019: U_x as e_x (LeCun-uniform), W_m and W_x as W (Glorot-normal).
    Our addition: each row of U_x is then normalised to length 1, so that a memory with one input is
    not switched off by an initial weight near zero. Biases are initially zero.
    """

    State = LMUState

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
        encoder_activation: Activation = "identity",
        activation: Activation = "relu",
        input_to_output: bool = True,
        bias: bool = True,
        memory_dropout: float = 0.0,
        return_sequences: bool = True,
        recompute: bool = True,
        method: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(input_size)
        self.hidden_size = positive_int(hidden_size, "hidden_size")
        refuse_method_without_sequences(method, return_sequences)
        self.encoder_activation = encoder_activation
        self.activation = activation
        for function in (encoder_activation, activation):
            activation_function(function)  # raises on an unknown name
        self.memory_dropout = dropout_rate(memory_dropout, "memory_dropout")
        self.return_sequences = bool(return_sequences)
        self.recompute = bool(recompute)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.memory = LegendreMemory(
            positive_int(memory_size, "memory_size"),
            order,
            theta,
            discretizer=discretizer,
            trainable_theta=trainable_theta,
            method=method,
            **where,
        )
        m_size = self.memory.input_size * self.memory.order
        self.encoder = nn.Linear(self.input_size, self.memory.input_size, bias=bias, **where)  # U_x, b_u
        self.memory_to_output = nn.Linear(m_size, self.hidden_size, bias=bias, **where)  # W_m, b_o
        W_x = nn.Linear(self.input_size, self.hidden_size, bias=False, **where) if input_to_output else None
        self.input_to_output = W_x
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the weights again; see Source above. The scale and theta of the memory stay.

        A loop over ``modules()`` that resets every module resets the linear modules of this layer
        after the layer itself: call this method again after the loop.
        """
        U_x = self.encoder.weight.uniform_(-1, 1)
        U_x.div_(torch.linalg.vector_norm(U_x, dim=1, keepdim=True).clamp(min=torch.finfo(U_x.dtype).tiny))
        nn.init.xavier_normal_(self.memory_to_output.weight)
        if self.input_to_output is not None:
            nn.init.xavier_normal_(self.input_to_output.weight)
        for linear in (self.encoder, self.memory_to_output):
            if linear.bias is not None:
                linear.bias.zero_()

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
            "method": memory.method,
            "input_to_output": self.input_to_output is not None,
            "bias": self.memory_to_output.bias is not None,
        }

    def _state_shapes(self) -> StateShapes:
        return ((self.memory.input_size, self.memory.order),)

    def _sequence(self, x, state, lengths, reset):
        # Returns no states over time: the memories may exist for one segment at a time, or not at
        # all.
        m = None if state is None else state.memory
        if not self._children_are_as_built():
            output, m = self._by_children(x, m, lengths, reset)
        elif not self.return_sequences:
            output, m = self._last(x, m, lengths, reset)
        else:
            length = self._segment_length(x)
            system, u = self.memory.prepared(length), self._encode(x)
            if x.shape[1] <= length:
                output, m = self._segment(u, x, m, self._read_out(), system, lengths, reset)
            else:
                output, m = self._in_segments(u, x, m, system, length, lengths, reset)
            if not isinstance(self.activation, str):
                # A user-supplied activation may own parameters that we cannot find, so it is
                # applied outside the recomputed segments.
                output = self._f2(output)
        return output, None, LMUState(m)

    def _children_are_as_built(self) -> bool:
        """Whether the weights of the children may be used without a call of the children."""
        return (
            can_be_read(self.memory, LegendreMemory)
            and can_be_read(self.memory_to_output, nn.Linear)
            and can_be_read(self.input_to_output, nn.Linear)
        )

    def _read_out(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """W_m for memories that are not scaled, b_o and W_x."""
        W_x = None if self.input_to_output is None else self.input_to_output.weight
        return _scaled(self.memory_to_output.weight, self.memory.scale), self.memory_to_output.bias, W_x

    def _in_segments(self, u, x, m, system, length, lengths, reset):
        """``_segment`` for all segments of time in order, recomputed in the backward pass."""

        def run(segments, leaves, part, tensors):
            *weights, inputs, powers = tensors
            u, x = segments
            until = None if lengths is None else (lengths - part.start).clamp(0, u.shape[1])
            drop = None if reset is None else reset[:, part]
            m = leaves[0] if leaves else None
            z, m = self._segment(u, x, m, weights, system._replace(inputs=inputs, powers=powers), until, drop)
            return z, [m]

        tensors = [*self._read_out(), system.inputs, system.powers]
        random = self.training and self.memory_dropout > 0
        output, (m,) = over_segments(run, [u, x], [] if m is None else [m], tensors, steps=length, random=random)
        return output, m

    def _by_children(self, x, m, lengths, reset):
        """The layer by calls of its children, if one was replaced or hooked: all memories."""
        before = None if m is None else LegendreMemoryState(m)
        memory, final = self.memory(self._encode(x), before, lengths=lengths, reset=reset)
        if not self.return_sequences:
            if x.shape[1] == 0:
                return x.new_zeros(len(x), self.hidden_size), final.memory
            memory, x = (_last_of(sequence, lengths) for sequence in (memory, x))
        return self._read(memory, x), final.memory

    def _segment(self, u, x, m, weights, system, lengths, reset):
        """(19) and (20) over a segment of S steps: the output (B, S, H) and m at its end."""
        W_m, b_o, W_x = weights
        # The state that at_length selects must not be rounded to 16 bits.
        wide = u if lengths is None else u.to(self._carry_dtype())
        memory, final = apply(wide, system, m, reset=reset)
        if lengths is not None:  # m is unchanged for a row that ended before this segment
            final = at_length(memory, m, final, lengths)
        if memory.stride(-2) == 1:  # stored as (B, S, N, C): transpose W_m, not the memory
            memory, W_m = memory.mT, W_m.unflatten(1, memory.shape[-2:]).mT.flatten(1)
        read = memory.to(u.dtype).flatten(0, 1).flatten(-2)  # (B S, C N) or (B S, N C)
        del memory
        read = F.dropout(read, self.memory_dropout, self.training)
        z = torch.addmm(_outside_memory(x, W_x, b_o, self.hidden_size).flatten(0, 1), read, W_m.mT)
        if isinstance(self.activation, str):
            z = self._f2_in_place(z)
        return z.unflatten(0, u.shape[:2]), final

    def _last(self, x, m, lengths, reset):
        """(25) and (20) at the last valid step."""
        batch, steps, _ = x.shape
        if steps == 0:
            m = self.initial_state(batch).memory if m is None else m
            return x.new_zeros(batch, self.hidden_size), m
        if m is None and lengths is None and reset is None and self._input_first(x):
            m = self._last_input_first(x)
        else:
            m = self.memory.last(self._encode(x), m, lengths=lengths, reset=reset)
        return self._read((m * self.memory.scale).to(x.dtype), _last_of(x, lengths)), m

    def _input_first(self, x: Tensor) -> bool:
        """Whether to apply the memory before the encoder: both are linear, and it costs no more."""
        return (
            can_be_read(self.encoder, nn.Linear)
            and activation_function(self.encoder_activation) is None
            and not x.requires_grad
            and self.input_size <= self.memory.input_size
            and self.memory.window().ndim == 0
        )

    def _last_input_first(self, x: Tensor) -> Tensor:
        """m = U_x (H x) + b_u (H 1): H x needs no gradient, which saves a third of the time."""
        system = self.memory.prepared(x.shape[1], last_only=True)
        of_x = apply(x, system)[1]  # (B, input_size, N)
        with without_autocast(x):
            m = F.linear(of_x.mT, self.encoder.weight.to(of_x.dtype)).mT  # (B, C, N)
            if self.encoder.bias is None:
                return m
            of_one = apply(torch.ones_like(x[:1, :, :1]), system)[1]  # (1, 1, N)
            return m + self.encoder.bias.to(m.dtype)[:, None] * of_one

    def _step(self, x_t, state):
        scaled, m = self.memory.advance(self._encode(x_t), state.memory)
        return self._read(scaled, x_t), LMUState(m)

    def _calibrate(self, x, lengths):
        self.memory.calibrate(self._encode(x), lengths=lengths)

    def _encode(self, x: Tensor) -> Tensor:
        """(18): u = f1(U_x x + b_u)."""
        u = self.encoder(x)
        f1 = activation_function(self.encoder_activation)
        return u if f1 is None else f1(u)

    def _read(self, m: Tensor, x_t: Tensor) -> Tensor:
        """(20) for scaled memories, of one step or of all steps: o = f2(W_m m + W_x x + b_o)."""
        z = self.memory_to_output(F.dropout(m.flatten(-2), self.memory_dropout, self.training))
        if self.input_to_output is not None:
            z = z + self.input_to_output(x_t)
        return self._f2(z)

    def _f2(self, z: Tensor) -> Tensor:
        f2 = activation_function(self.activation)
        return z if f2 is None else f2(z)

    def _f2_in_place(self, z: Tensor) -> Tensor:
        f2 = IN_PLACE.get(self.activation) if isinstance(self.activation, str) else None
        return self._f2(z) if f2 is None else f2(z)

    def _segment_length(self, x: Tensor) -> int:
        """Steps per segment: T if the memories of all steps are small or must all be stored.

        Otherwise as many as fit into SEGMENT_BYTES, but at least sqrt(T) / 2: with shorter
        segments, the states between segments would take more memory than a segment.
        """
        batch, steps, _ = x.shape
        bytes_per_step = batch * self.memory.input_size * self.memory.order * self._carry_dtype().itemsize
        if bytes_per_step * steps <= MAX_STORED_BYTES or (
            torch.is_grad_enabled() and (transforms_are_active() or not self.recompute)
        ):
            return steps
        length = max(SEGMENT_BYTES // bytes_per_step, 32)
        while (2 * length) ** 2 < steps:
            length *= 2
        return -(-length // 32) * 32  # a multiple of the chunk length

    def _weight(self) -> Tensor:
        weight = floating_weight(self.encoder)
        return self.memory.scale if weight is None else weight


def _scaled(weight: Tensor, scale: Tensor) -> Tensor:
    """W_m for memories that are not scaled; the scale is wider under FSDP's mixed precision."""
    return (weight * scale.flatten()).to(weight.dtype)


def _last_of(x: Tensor, lengths: Tensor | None) -> Tensor:
    """x at the last valid step; at step 0 for a row without valid steps."""
    if lengths is None:
        return x[:, -1]
    return x[torch.arange(len(x), device=x.device), (lengths - 1).clamp(min=0)]


def _outside_memory(x: Tensor, W_x: Tensor | None, b_o: Tensor | None, channels: int) -> Tensor:
    """W_x x + b_o, (B, T, H)."""
    if W_x is not None:
        return F.linear(x, W_x, b_o)
    rest = torch.zeros((), device=x.device, dtype=x.dtype) if b_o is None else b_o
    return rest.expand(*x.shape[:2], channels)
