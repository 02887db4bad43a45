"""The diagonal recurrence on a GPU, compiled by Triton: each number is read and written once.

One program runs over time for one batch row and one block of channels. The carry is in registers,
and the next steps are loaded in advance, in two alternating groups. If batch and channels are too
few to fill a GPU, time is divided into chunks: every chunk is summarised (product of decays, final
state from zero), the summaries are scanned by the same recurrence, and every chunk is computed from
its initial state. docs/maths/recurrence.md derives both.

Nothing is tuned at run time and nothing is atomic: equal shapes give equal launches and equal bits.
A launch follows from the shape and from the constants in ``Tuning``; benchmarks/gpu.py measures
other values of these constants. If TRITON_INTERPRET=1 is set before this module is imported, the
kernels run on CPU tensors.
"""

# Triton compiles a subset of Python (no starred tuples), which these rules do not take into
# account:
# ruff: noqa: RUF005, SIM108
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false

from functools import cache
from typing import Any, NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from triton import knobs

from legato import _dtypes
from legato._shapes import Bool, Inexact, Tensor

# Whether the kernels run in Triton's interpreter, on CPU tensors: fixed when this module is
# imported.
INTERPRETED = knobs.runtime.interpret


class Tuning(NamedTuple):
    """The constants of the rule in ``_plan``."""

    # Time is divided into chunks below this many programs (two for each multiprocessor of a large
    # GPU). Chunks read the inputs twice, 5/3 of the traffic: that is worth it while the GPU is less
    # than half busy.
    few_programs: int = 256
    # The number of programs to reach by chunks; with more programs, a lane takes two 16-bit
    # channels instead of one.
    many_programs: int = 2048
    # Chunks shorter than this cost more for their summaries than they gain; sequences shorter than
    # this cost more for the additional launches.
    shortest_chunk: int = 128
    shortest_cut: int = 4096
    # Bytes of one array that a lane loads together: a group of steps. Two groups are in flight.
    # With fewer programs than ``deep_programs`` the groups of the forward are twice as long, since
    # each program needs more bytes in flight. The limits are 255 registers per lane and the time to
    # compile: seconds at 8 steps, half a minute at 32.
    group_bytes: int = 32
    deep_programs: int = 1024
    warps: int = 1  # per program


TUNING = Tuning()


def forward(
    decay: Inexact[Tensor, "Bd Td Hd Dd"],
    impulse: Inexact[Tensor, "B T H D"],
    initial_state: Inexact[Tensor, "B H D"] | None,
    reset: Bool[Tensor, "B T"] | None,
    reverse: bool,
    tuning: Tuning | None = None,
) -> tuple[Inexact[Tensor, "B T H D"], Inexact[Tensor, "B H D"]]:
    """h_t = decay_t * h_{t-1} + impulse_t; the arguments are those of ``reference.forward``.

    ``tuning`` replaces ``TUNING``, for benchmarks.
    """
    B, T, H, D = impulse.shape
    carry_dtype = _dtypes.carry_dtype(impulse.dtype)
    states = torch.empty_like(impulse)
    if impulse.numel() == 0:
        return states, _zeros_or_copy(initial_state, impulse)
    plan = _plan(impulse, tuning, deep=True)
    entering = initial_state
    if plan.chunks > 1:
        products, ends, overflows = _summarise(plan, decay, impulse, reset, down=reverse, adjoint=False)
        within = (tuning or TUNING)._replace(shortest_cut=0)  # the device is busy, so launches cost nothing
        scanned, _ = forward(products, ends, initial_state, _dropped(reset, plan), reverse, within)
        entering = _entering(scanned, initial_state, down=reverse)
        _run_through(plan, overflows, decay, impulse, initial_state, reset, entering, down=reverse, adjoint=False)
    final_state = torch.empty((B, H, D), dtype=carry_dtype, device=impulse.device)
    with torch.cuda.device_of(impulse):
        _forward_kernel[plan.grid](
            *map(_numbers, (decay, impulse, entering, reset, states, final_state)),
            T, H * D, D, plan.length, plan.chunks, *_decay_strides(decay),
            DOWN=reverse, **_options(plan, decay, impulse),
        )  # fmt: skip
    return states, final_state


def backward(
    grad_states: Inexact[Tensor, "B T H D"],
    grad_final: Inexact[Tensor, "B H D"],
    decay: Inexact[Tensor, "Bd Td Hd Dd"],
    states: Inexact[Tensor, "B T H D"],
    initial_state: Inexact[Tensor, "B H D"] | None,
    reset: Bool[Tensor, "B T"] | None,
    reverse: bool,
    tuning: Tuning | None = None,
) -> tuple[Inexact[Tensor, "Bd Td Hd Dd"], Inexact[Tensor, "B T H D"], Inexact[Tensor, "B H D"]]:
    """g_t = grad_states_t + conj(decay_{t+1}) g_{t+1}: grad_impulse = g, grad_decay_t = conj(h_{t-1}) g_t.

    The carry is conj(decay_t) g_t, the term that step t adds to the gradient of the previous state.
    """
    B, T, H, D = states.shape
    carry_dtype = _dtypes.carry_dtype(states.dtype)
    grad_impulse = torch.empty_like(states)
    if states.numel() == 0:
        return torch.zeros_like(decay), grad_impulse, grad_final.clone()
    plan = _plan(states, tuning)
    entering = last = grad_final.contiguous()
    if plan.chunks > 1:
        products, ends, overflows = _summarise(plan, decay, grad_states, reset, down=not reverse, adjoint=True)
        within = (tuning or TUNING)._replace(shortest_cut=0)
        scanned, _ = forward(products, ends, last, _dropped(reset, plan), not reverse, within)
        entering = _entering(scanned, last, down=not reverse)
        _run_through(plan, overflows, decay, grad_states, last, reset, entering, down=not reverse, adjoint=True)
    grad_initial = torch.empty((B, H, D), dtype=carry_dtype, device=states.device)
    # If the decay is constant in time there is one partial sum per chunk; other broadcast axes are
    # summed below.
    rows = T if decay.shape[1] > 1 else plan.chunks
    exact = decay.shape == states.shape and rows == T
    grad_decay = torch.empty((B, rows, H, D), dtype=decay.dtype if exact else carry_dtype, device=states.device)
    with torch.cuda.device_of(states):
        _backward_kernel[plan.grid](
            *map(_numbers, (decay, grad_states, entering, states, initial_state, reset)),
            *map(_numbers, (grad_decay, grad_impulse, grad_initial)),
            T, H * D, D, plan.length, plan.chunks, *_decay_strides(decay),
            DOWN=not reverse, **_options(plan, decay, states),
        )  # fmt: skip
    return grad_decay.sum_to_size(decay.shape).to(decay.dtype), grad_impulse, grad_initial


def prepare(dtype: torch.dtype, adjoint: bool) -> None:
    """Raise if Triton cannot compile and launch a kernel: no C compiler, or the GPU is too old.

    The kernels themselves are compiled at their first launch, once for each specialisation.
    """
    if not INTERPRETED:
        _launch_one()


@cache
def _launch_one() -> None:
    _one_kernel[(1,)](torch.empty(1, device="cuda"))


class Plan(NamedTuple):
    """The launch for one shape and dtype: a fixed rule, never a measurement."""

    grid: tuple[int]
    block: int  # channels per program
    chunks: int  # chunks of time
    length: int  # steps per chunk; the last may have fewer
    steps: int  # per group: loaded together, while the previous group is used
    warps: int


def _plan(x: Tensor, tuning: Tuning | None = None, *, deep: bool = False) -> Plan:
    tuning = tuning or TUNING
    B, T, H, D = x.shape
    item, lanes = x.element_size(), 32 * tuning.warps

    def programs(block: int) -> int:
        return B * _ceil_divide(H * D, block)

    # One channel per lane: a warp loads 128 bytes per step. Two channels of 16 bits, unless that
    # gives too few programs.
    block = 2 * lanes if item == 2 and programs(2 * lanes) >= tuning.many_programs else lanes
    chunks = 1
    if programs(block) < tuning.few_programs and tuning.shortest_cut <= T:
        chunks = max(1, min(_ceil_divide(tuning.many_programs, programs(block)), T // tuning.shortest_chunk))
    length = _ceil_divide(T, chunks)
    chunks = _ceil_divide(T, length)
    deep = deep and programs(block) * chunks < tuning.deep_programs
    steps = max(1, tuning.group_bytes * lanes // (item * block)) * (2 if deep else 1)
    # Two groups that cover all steps of a short chunk are enough.
    steps = min(steps, triton.next_power_of_2(_ceil_divide(length, 2)))
    return Plan((programs(block) * chunks,), block, chunks, length, steps, tuning.warps)


def _ceil_divide(a: int, b: int) -> int:
    """a / b, rounded up; ``triton.cdiv`` is declared to return a ``constexpr`` in some releases."""
    return -(-a // b)


def _summarise(
    plan: Plan, decay: Tensor, x: Tensor, reset: Tensor | None, *, down: bool, adjoint: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The product of decays and the final state from zero of every chunk, (B, chunks, H, D) each,
    in the carry's dtype; and for every row and block of channels, whether a product overflows, or
    underflows and may grow again."""
    B, T, H, D = x.shape
    carry_dtype = _dtypes.carry_dtype(x.dtype)
    products = torch.empty((B, plan.chunks, H, D), dtype=carry_dtype, device=x.device)
    ends = torch.empty_like(products)
    overflows = torch.zeros(plan.grid[0] // plan.chunks, dtype=torch.uint8, device=x.device)
    with torch.cuda.device_of(x):
        _summary_kernel[plan.grid](
            *map(_numbers, (decay, x, reset, products, ends, overflows)),
            T, H * D, D, plan.length, plan.chunks, *_decay_strides(decay),
            DOWN=down, ADJOINT=adjoint, **_options(plan, decay, x),
        )  # fmt: skip
    return products, ends, overflows


def _run_through(
    plan: Plan, overflows: Tensor, decay: Tensor, x: Tensor, first: Tensor | None, reset: Tensor | None,
    entering: Tensor, *, down: bool, adjoint: bool,
) -> None:  # fmt: skip
    """Recompute the initial states of the chunks step by step, where a product overflows.

    The device decides, so that the host does not wait for it. Elsewhere the launch returns
    immediately.
    """
    _, T, H, D = x.shape
    with torch.cuda.device_of(x):
        _run_through_kernel[(len(overflows),)](
            *map(_numbers, (decay, x, first, reset, overflows, entering)),
            T, H * D, D, plan.length, plan.chunks, *_decay_strides(decay),
            DOWN=down, ADJOINT=adjoint, **_options(plan, decay, x) | {"STEPS": 1},
        )  # fmt: skip


def _dropped(reset: Tensor | None, plan: Plan) -> Tensor | None:
    """(B, chunks): whether there is a reset in the chunk."""
    if reset is None:
        return None
    padding = plan.chunks * plan.length - reset.shape[1]
    return torch.nn.functional.pad(reset, (0, padding)).unflatten(1, (plan.chunks, plan.length)).any(-1)


def _entering(scanned: Tensor, first: Tensor | None, *, down: bool) -> Tensor:
    """The initial state of every chunk: the final state of the previous one, or ``first``."""
    entering = torch.empty_like(scanned)
    if down:
        entering[:, :-1] = scanned[:, 1:]
    else:
        entering[:, 1:] = scanned[:, :-1]
    entering[:, -1 if down else 0] = 0 if first is None else first
    return entering


def _zeros_or_copy(state: Tensor | None, impulse: Tensor) -> Tensor:
    B, _, H, D = impulse.shape
    carry_dtype = _dtypes.carry_dtype(impulse.dtype)
    return impulse.new_zeros((B, H, D), dtype=carry_dtype) if state is None else state.clone()


def _numbers(x: Tensor | None) -> Tensor | None:
    """``x`` contiguous and as Triton supports it: complex numbers as pairs, booleans as bytes."""
    if x is None:
        return None
    x = x.resolve_conj().resolve_neg().contiguous()
    if x.is_complex():
        return torch.view_as_real(x)
    return x.view(torch.uint8) if x.dtype == torch.bool else x


def _decay_strides(decay: Tensor) -> list[int]:
    """Strides in elements, 0 along a broadcast axis."""
    return [0 if size == 1 else stride for size, stride in zip(decay.shape, decay.stride(), strict=True)]


def _options(plan: Plan, decay: Tensor, x: Tensor) -> dict[str, Any]:
    return {
        "DECAY_VARIES": decay.shape[1] > 1,
        "DECAY_BY_HEAD": decay.shape[2:] not in (x.shape[2:], (1, 1)),
        "PARTS": 2 if x.is_complex() else 1,
        "CARRY": tl.float64 if x.dtype in (torch.float64, torch.complex128) else tl.float32,
        "STEPS": plan.steps,
        "BLOCK": plan.block,
        "num_warps": plan.warps,
        "enable_fp_fusion": True,
    }


@triton.jit
def _one_kernel(x):
    tl.store(x, 1.0)


# --- the kernels ---
# A number is a tuple of PARTS tensors, (real,) or (real, imaginary). A row is everything that one
# step reads: (impulse or gradient, decay if it varies in time, previous state if it is needed,
# reset if there is one). no_type_check excludes the functions that Triton compiles from the shape
# checker of the tests.

# Lengths differ between calls: do not compile again for a length of 1 or a multiple of 16.
_LENGTHS = ["T", "length", "chunks"]


@triton.jit(do_not_specialize=_LENGTHS)
@no_type_check
def _forward_kernel(
    decay, impulse, entering, reset, states, final_state,
    T, channels, D, length, chunks, decay_b, decay_t, decay_h, decay_d,
    DOWN: tl.constexpr, DECAY_VARIES: tl.constexpr, DECAY_BY_HEAD: tl.constexpr, PARTS: tl.constexpr,
    CARRY: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One chunk of h_t = decay_t * h_{t-1} + impulse_t, for one batch row and BLOCK channels."""
    b, chunk, c, lane, lanes = _place(channels, chunks, BLOCK)
    inside = lane < lanes
    start, steps, stride = _chunk_range(chunk, length, T, channels * PARTS, DOWN)
    decay += (_decay_offset(b, c, D, decay_b, decay_h, decay_d, DECAY_BY_HEAD) + start * decay_t) * PARTS
    at = ((b * T + start) * channels + c) * PARTS
    h = _read_or_zero(entering, ((b * chunks + chunk) * channels + c) * PARTS, inside, PARTS, CARRY, BLOCK)
    a = _read(decay, inside, PARTS)
    if reset is not None:
        reset += b * T + start
    full = steps // (2 * STEPS) * (2 * STEPS)
    h = _forward_span(h, a, 0, full, impulse + at, decay, reset, states + at, stride, decay_t, lane, lanes, True,
                      DOWN, DECAY_VARIES, PARTS, CARRY, STEPS, BLOCK)  # fmt: skip
    h = _forward_span(h, a, full, steps, impulse + at, decay, reset, states + at, stride, decay_t, lane, lanes, False,
                      DOWN, DECAY_VARIES, PARTS, CARRY, (STEPS + 3) // 4, BLOCK)  # fmt: skip
    if chunk == (0 if DOWN else chunks - 1):
        _write(final_state + (b * channels + c) * PARTS, h, inside, PARTS)


@triton.jit
@no_type_check
def _forward_span(
    h, a, first, last, impulse, decay, reset, states, stride, decay_t, lane, lanes, FULL: tl.constexpr,
    DOWN: tl.constexpr, DECAY_VARIES: tl.constexpr, PARTS: tl.constexpr, CARRY: tl.constexpr, STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Steps first to last, 2 STEPS at a time; FULL: their number is a multiple of 2 STEPS.

    Two groups alternate, and each is loaded before the other is used. With one variable for both,
    the loop would copy it, and a copy waits for its loads.
    """
    even = _rows(first, last, impulse, decay, None, 0, reset, stride, decay_t, lane, lanes, FULL,
                 DOWN, DECAY_VARIES, PARTS, STEPS)  # fmt: skip
    for i in range(first, last, 2 * STEPS):
        odd = _rows(i + STEPS, last, impulse, decay, None, 0, reset, stride, decay_t, lane, lanes, FULL,
                    DOWN, DECAY_VARIES, PARTS, STEPS)  # fmt: skip
        h = _forward_group(h, a, even, i, last, states, stride, lane, lanes, reset is not None, FULL,
                           DECAY_VARIES, PARTS, CARRY, STEPS, BLOCK)  # fmt: skip
        even = _rows(i + 2 * STEPS, last, impulse, decay, None, 0, reset, stride, decay_t, lane, lanes, FULL,
                     DOWN, DECAY_VARIES, PARTS, STEPS)  # fmt: skip
        h = _forward_group(h, a, odd, i + STEPS, last, states, stride, lane, lanes, reset is not None, FULL,
                           DECAY_VARIES, PARTS, CARRY, STEPS, BLOCK)  # fmt: skip
    return h


@triton.jit
@no_type_check
def _forward_group(
    h, a, rows, i, last, states, stride, lane, lanes, RESETS: tl.constexpr, FULL: tl.constexpr,
    DECAY_VARIES: tl.constexpr, PARTS: tl.constexpr, CARRY: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Steps i to i + STEPS; unless FULL, steps from ``last`` on have no effect."""
    for s in tl.static_range(STEPS):
        new = _forward_step(h, a, rows[s], RESETS, DECAY_VARIES, PARTS, CARRY, BLOCK)
        h = new if FULL else _select(i + s < last, new, h, PARTS)
        _write(states + (i + s) * stride, h, _mask(i + s, last, lane, lanes, FULL), PARTS)
    return h


@triton.jit
@no_type_check
def _forward_step(
    h, a, row, RESETS: tl.constexpr, DECAY_VARIES: tl.constexpr, PARTS: tl.constexpr, CARRY: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    if DECAY_VARIES:
        a = row[1]
    if RESETS:
        h = _select(row[-1], _number(0, PARTS, CARRY, BLOCK), h, PARTS)
    return _add(_multiply(_cast(a, PARTS, CARRY), h, PARTS), _cast(row[0], PARTS, CARRY), PARTS)


@triton.jit(do_not_specialize=_LENGTHS)
@no_type_check
def _backward_kernel(
    decay, grad_states, entering, states, initial_state, reset, grad_decay, grad_impulse, grad_initial,
    T, channels, D, length, chunks, decay_b, decay_t, decay_h, decay_d,
    DOWN: tl.constexpr, DECAY_VARIES: tl.constexpr, DECAY_BY_HEAD: tl.constexpr, PARTS: tl.constexpr,
    CARRY: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One chunk of g = grad_states_t + carry, then carry = conj(decay_t) g, or 0 where reset_t."""
    b, chunk, c, lane, lanes = _place(channels, chunks, BLOCK)
    inside = lane < lanes
    start, steps, stride = _chunk_range(chunk, length, T, channels * PARTS, DOWN)
    decay += (_decay_offset(b, c, D, decay_b, decay_h, decay_d, DECAY_BY_HEAD) + start * decay_t) * PARTS
    at = ((b * T + start) * channels + c) * PARTS
    carry = _read_or_zero(entering, ((b * chunks + chunk) * channels + c) * PARTS, inside, PARTS, CARRY, BLOCK)
    a = _read(decay, inside, PARTS)
    if reset is not None:
        reset += b * T + start
    # The adjoint ends at the first step of the recurrence, whose previous state is the initial
    # state.
    ends_here = chunk == (0 if DOWN else chunks - 1)
    known = tl.where(ends_here, steps - 1, steps)
    h_0 = _read_or_zero(initial_state, (b * channels + c) * PARTS, inside, PARTS, CARRY, BLOCK)
    total = _number(0, PARTS, CARRY, BLOCK)
    # The adjoint runs in the opposite direction, so the previous state of a step is at its next
    # address.
    before = states + at + stride
    # The last step is excluded from the full groups: its previous state may be the initial state.
    full = (steps - 1) // (2 * STEPS) * (2 * STEPS)
    carry, total = _backward_span(
        carry, total, a, h_0, 0, full, known, grad_states + at, decay, before, reset,
        grad_decay + at, grad_impulse + at, stride, decay_t, lane, lanes, True,
        DOWN, DECAY_VARIES, PARTS, CARRY, STEPS, BLOCK,
    )  # fmt: skip
    carry, total = _backward_span(
        carry, total, a, h_0, full, steps, known, grad_states + at, decay, before, reset,
        grad_decay + at, grad_impulse + at, stride, decay_t, lane, lanes, False,
        DOWN, DECAY_VARIES, PARTS, CARRY, (STEPS + 3) // 4, BLOCK,
    )  # fmt: skip
    if ends_here:
        _write(grad_initial + (b * channels + c) * PARTS, carry, inside, PARTS)
    if not DECAY_VARIES:
        _write(grad_decay + ((b * chunks + chunk) * channels + c) * PARTS, total, inside, PARTS)


@triton.jit
@no_type_check
def _backward_span(
    carry, total, a, h_0, first, last, known, grad_states, decay, before, reset, grad_decay, grad_impulse,
    stride, decay_t, lane, lanes, FULL: tl.constexpr,
    DOWN: tl.constexpr, DECAY_VARIES: tl.constexpr, PARTS: tl.constexpr, CARRY: tl.constexpr, STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """As ``_forward_span``."""
    even = _rows(first, last, grad_states, decay, before, known, reset, stride, decay_t, lane, lanes, FULL,
                 DOWN, DECAY_VARIES, PARTS, STEPS)  # fmt: skip
    for i in range(first, last, 2 * STEPS):
        odd = _rows(i + STEPS, last, grad_states, decay, before, known, reset, stride, decay_t, lane, lanes, FULL,
                    DOWN, DECAY_VARIES, PARTS, STEPS)  # fmt: skip
        carry, total = _backward_group(
            carry, total, a, h_0, even, i, last, known, grad_decay, grad_impulse, stride, lane, lanes,
            reset is not None, FULL, DECAY_VARIES, PARTS, CARRY, STEPS, BLOCK,
        )  # fmt: skip
        even = _rows(i + 2 * STEPS, last, grad_states, decay, before, known, reset, stride, decay_t, lane, lanes, FULL,
                     DOWN, DECAY_VARIES, PARTS, STEPS)  # fmt: skip
        carry, total = _backward_group(
            carry, total, a, h_0, odd, i + STEPS, last, known, grad_decay, grad_impulse, stride, lane, lanes,
            reset is not None, FULL, DECAY_VARIES, PARTS, CARRY, STEPS, BLOCK,
        )  # fmt: skip
    return carry, total


@triton.jit
@no_type_check
def _backward_group(
    carry, total, a, h_0, rows, i, last, known, grad_decay, grad_impulse, stride, lane, lanes,
    RESETS: tl.constexpr, FULL: tl.constexpr, DECAY_VARIES: tl.constexpr, PARTS: tl.constexpr, CARRY: tl.constexpr,
    STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As ``_forward_group``; two levels of partial sums reduce the rounding error of a long sum."""
    group_total = _number(0, PARTS, CARRY, BLOCK)
    for s in tl.static_range(STEPS):
        h_before = _cast(rows[s][2] if DECAY_VARIES else rows[s][1], PARTS, CARRY)
        if not FULL:
            h_before = _select(i + s < known, h_before, h_0, PARTS)
        g, new, grad_a = _backward_step(carry, a, h_before, rows[s], RESETS, DECAY_VARIES, PARTS, CARRY, BLOCK)
        mask = _mask(i + s, last, lane, lanes, FULL)
        _write(grad_impulse + (i + s) * stride, g, mask, PARTS)
        if not FULL:
            new = _select(i + s < last, new, carry, PARTS)
            grad_a = _select(i + s < last, grad_a, _number(0, PARTS, CARRY, BLOCK), PARTS)
        carry = new
        if DECAY_VARIES:
            _write(grad_decay + (i + s) * stride, grad_a, mask, PARTS)
        else:
            group_total = _add(group_total, grad_a, PARTS)
    return carry, _add(total, group_total, PARTS)


@triton.jit
@no_type_check
def _backward_step(
    carry, a, h_before, row, RESETS: tl.constexpr, DECAY_VARIES: tl.constexpr, PARTS: tl.constexpr,
    CARRY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(g_t, the carry to the next step of the adjoint, the gradient of decay_t)."""
    if DECAY_VARIES:
        a = row[1]
    g = _add(_cast(row[0], PARTS, CARRY), carry, PARTS)
    carry = _multiply(_conj(_cast(a, PARTS, CARRY), PARTS), g, PARTS)
    grad_a = _multiply(_conj(h_before, PARTS), g, PARTS)
    if RESETS:
        carry = _select(row[-1], _number(0, PARTS, CARRY, BLOCK), carry, PARTS)
        grad_a = _select(row[-1], _number(0, PARTS, CARRY, BLOCK), grad_a, PARTS)
    return g, carry, grad_a


@triton.jit(do_not_specialize=_LENGTHS)
@no_type_check
def _summary_kernel(
    decay, x, reset, products, ends, overflows,
    T, channels, D, length, chunks, decay_b, decay_t, decay_h, decay_d,
    DOWN: tl.constexpr, ADJOINT: tl.constexpr, DECAY_VARIES: tl.constexpr, DECAY_BY_HEAD: tl.constexpr,
    PARTS: tl.constexpr, CARRY: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One chunk as final = product * initial + end, of the forward or, if ADJOINT, the backward.

    A chunk with a reset is a reset in the scan of the summaries; its product is zero from the reset
    on.
    """
    b, chunk, c, lane, lanes = _place(channels, chunks, BLOCK)
    inside = lane < lanes
    start, steps, stride = _chunk_range(chunk, length, T, channels * PARTS, DOWN)
    decay += (_decay_offset(b, c, D, decay_b, decay_h, decay_d, DECAY_BY_HEAD) + start * decay_t) * PARTS
    x += ((b * T + start) * channels + c) * PARTS
    a = _read(decay, inside, PARTS)
    if reset is not None:
        reset += b * T + start
    summary = _empty_summary(PARTS, CARRY, BLOCK)
    full = steps // (2 * STEPS) * (2 * STEPS)
    summary = _summary_span(summary, a, 0, full, x, decay, reset, stride, decay_t, lane, lanes, True,
                            DOWN, ADJOINT, DECAY_VARIES, PARTS, CARRY, STEPS, BLOCK)  # fmt: skip
    summary = _summary_span(summary, a, full, steps, x, decay, reset, stride, decay_t, lane, lanes, False,
                            DOWN, ADJOINT, DECAY_VARIES, PARTS, CARRY, (STEPS + 3) // 4, BLOCK)  # fmt: skip
    end, product, smallest, largest_decay = summary
    if ADJOINT:
        product = _conj(product, PARTS)
    at = ((b * chunks + chunk) * channels + c) * PARTS
    _write(products + at, product, inside, PARTS)
    _write(ends + at, end, inside, PARTS)
    # A product that overflows is never finite again. One that underflows may be taken as zero
    # unless a decay is above 1: by more than rounding, because complex decays of size 1 are
    # rounded.
    fits = (_square(product, PARTS) <= 2.0**120) & ((smallest >= 2.0**-120) | (largest_decay <= 1 + 2.0**-9))
    blocks = (channels + BLOCK - 1) // BLOCK
    tl.store(overflows + b * blocks + c // BLOCK, tl.where(fits, 0, 1).to(tl.uint8), mask=inside & ~fits)


@triton.jit
@no_type_check
def _empty_summary(PARTS: tl.constexpr, CARRY: tl.constexpr, BLOCK: tl.constexpr):
    """The summary of no steps: the state from zero, the product of decays, the square of its least
    size, and the square of the largest decay."""
    one, zero = _number(1, PARTS, CARRY, BLOCK), _number(0, PARTS, CARRY, BLOCK)
    return zero, one, one[0], zero[0]


@triton.jit(do_not_specialize=_LENGTHS)
@no_type_check
def _run_through_kernel(
    decay, x, first, reset, overflows, entering,
    T, channels, D, length, chunks, decay_b, decay_t, decay_h, decay_d,
    DOWN: tl.constexpr, ADJOINT: tl.constexpr, DECAY_VARIES: tl.constexpr, DECAY_BY_HEAD: tl.constexpr,
    PARTS: tl.constexpr, CARRY: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The initial state of each chunk, step by step, if the product of any chunk overflows."""
    b, _, c, lane, lanes = _place(channels, 1, BLOCK)
    inside = lane < lanes
    if tl.load(overflows + tl.program_id(0)) != 0:
        decays = decay + _decay_offset(b, c, D, decay_b, decay_h, decay_d, DECAY_BY_HEAD) * PARTS
        a = _read(decays, inside, PARTS)
        h = _read_or_zero(first, (b * channels + c) * PARTS, inside, PARTS, CARRY, BLOCK)
        none = _empty_summary(PARTS, CARRY, BLOCK)
        for k in range(chunks):
            chunk = tl.cast(chunks - 1 - k if DOWN else k, tl.int64)
            _write(entering + ((b * chunks + chunk) * channels + c) * PARTS, h, inside, PARTS)
            start, steps, stride = _chunk_range(chunk, length, T, channels * PARTS, DOWN)
            h = _summary_span(
                (h, none[1], none[2], none[3]), a, 0, steps, x + ((b * T + start) * channels + c) * PARTS,
                decays + start * decay_t * PARTS, reset if reset is None else reset + b * T + start, stride, decay_t,
                lane, lanes, False, DOWN, ADJOINT, DECAY_VARIES, PARTS, CARRY, STEPS, BLOCK,
            )[0]  # fmt: skip


@triton.jit
@no_type_check
def _summary_span(
    summary, a, first, last, x, decay, reset, stride, decay_t, lane, lanes, FULL: tl.constexpr,
    DOWN: tl.constexpr, ADJOINT: tl.constexpr, DECAY_VARIES: tl.constexpr, PARTS: tl.constexpr, CARRY: tl.constexpr,
    STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As ``_forward_span``, but updates a summary and writes nothing."""
    even = _rows(first, last, x, decay, None, 0, reset, stride, decay_t, lane, lanes, FULL,
                 DOWN, DECAY_VARIES, PARTS, STEPS)  # fmt: skip
    for i in range(first, last, 2 * STEPS):
        odd = _rows(i + STEPS, last, x, decay, None, 0, reset, stride, decay_t, lane, lanes, FULL,
                    DOWN, DECAY_VARIES, PARTS, STEPS)  # fmt: skip
        summary = _summary_group(summary, a, even, i, last, reset is not None, FULL, ADJOINT,
                                 DECAY_VARIES, PARTS, CARRY, STEPS, BLOCK)  # fmt: skip
        even = _rows(i + 2 * STEPS, last, x, decay, None, 0, reset, stride, decay_t, lane, lanes, FULL,
                     DOWN, DECAY_VARIES, PARTS, STEPS)  # fmt: skip
        summary = _summary_group(summary, a, odd, i + STEPS, last, reset is not None, FULL, ADJOINT,
                                 DECAY_VARIES, PARTS, CARRY, STEPS, BLOCK)  # fmt: skip
    return summary


@triton.jit
@no_type_check
def _summary_group(
    summary, a, rows, i, last, RESETS: tl.constexpr, FULL: tl.constexpr, ADJOINT: tl.constexpr,
    DECAY_VARIES: tl.constexpr, PARTS: tl.constexpr, CARRY: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    end, product, smallest, largest_decay = summary
    for s in tl.static_range(STEPS):
        if ADJOINT:
            _, new, _ = _backward_step(end, a, end, rows[s], RESETS, DECAY_VARIES, PARTS, CARRY, BLOCK)
        else:
            new = _forward_step(end, a, rows[s], RESETS, DECAY_VARIES, PARTS, CARRY, BLOCK)
        factor = _cast(rows[s][1] if DECAY_VARIES else a, PARTS, CARRY)
        if RESETS and not ADJOINT:  # the previous state is reset before the product
            product = _select(rows[s][-1], _number(0, PARTS, CARRY, BLOCK), product, PARTS)
        through = _multiply(factor, product, PARTS)
        if RESETS and ADJOINT:  # in the adjoint the carry is reset after the product
            through = _select(rows[s][-1], _number(0, PARTS, CARRY, BLOCK), through, PARTS)
        if not FULL:
            new = _select(i + s < last, new, end, PARTS)
            through = _select(i + s < last, through, product, PARTS)
        end, product = new, through
        smallest = tl.minimum(smallest, _square(product, PARTS))
        largest_decay = tl.maximum(largest_decay, _square(factor, PARTS))
    return end, product, smallest, largest_decay


# --- the indices of a program ---


@triton.jit
@no_type_check
def _place(channels, chunks, BLOCK: tl.constexpr):
    """This program's batch row, chunk and channels in 64 bits, from which every offset is computed;
    its lanes, and how many of them have a channel."""
    program = tl.program_id(0).to(tl.int64)
    blocks = (channels + BLOCK - 1) // BLOCK
    first = program % blocks * BLOCK
    lane = tl.arange(0, BLOCK)
    return program // blocks // chunks, program // blocks % chunks, first + lane, lane, (channels - first).to(tl.int32)


@triton.jit
@no_type_check
def _chunk_range(chunk, length, T, row, DOWN: tl.constexpr):
    """The first time step of a chunk, its number of steps, and the stride between rows."""
    low = chunk * length
    high = tl.minimum(low + length, T)
    row = tl.cast(row, tl.int64)
    if DOWN:
        start, stride = high - 1, -row
    else:
        start, stride = low, row
    return start, (high - low).to(tl.int32), stride


@triton.jit
@no_type_check
def _decay_offset(b, c, D, decay_b, decay_h, decay_d, DECAY_BY_HEAD: tl.constexpr):
    if DECAY_BY_HEAD:
        channel = c // D * decay_h + c % D * decay_d
    else:
        # Without a division the compiler can infer that adjacent channels are adjacent in memory.
        channel = c * decay_d
    return b * decay_b + channel


# --- loads ---


@triton.jit
@no_type_check
def _rows(
    i, last, x, decay, before, known, reset, stride, decay_t, lane, lanes, FULL: tl.constexpr,
    DOWN: tl.constexpr, DECAY_VARIES: tl.constexpr, PARTS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """The rows of steps i to i + STEPS. Nothing is read from ``last`` on, nor of ``before`` from
    ``known`` on."""
    decay_stride = tl.cast(-decay_t if DOWN else decay_t, tl.int64) * PARTS
    rows = ()
    for s in tl.static_range(STEPS):
        # In a full group, one condition is enough for all rows.
        there = i if FULL else i + s
        mask = _mask(there, last, lane, lanes, False)
        row = (_read(x + (i + s) * stride, mask, PARTS),)
        if DECAY_VARIES:
            row = row + (_read(decay + (i + s) * decay_stride, mask, PARTS),)
        if before is not None:
            if not FULL:
                mask = _mask(there, known, lane, lanes, False)
            row = row + (_read(before + (i + s) * stride, mask, PARTS),)
        if reset is not None:
            flag = tl.load(reset - (i + s) if DOWN else reset + (i + s), mask=there < last, other=0)
            row = row + (flag != 0,)
        rows = rows + (row,)
    return rows


@triton.jit
@no_type_check
def _mask(i, last, lane, lanes, KNOWN: tl.constexpr):
    """True for the lanes that have a channel, if i < last; KNOWN: i < last is known."""
    if KNOWN:
        mask = lane < lanes
    else:
        # The condition is part of the bound, because the interpreter cannot broadcast a boolean.
        mask = lane < tl.where(i < last, lanes, 0)
    return mask


# --- numbers of one or two parts ---


@triton.jit
@no_type_check
def _read(pointers, mask, PARTS: tl.constexpr):
    z = (tl.load(pointers, mask=mask, other=0),)
    if PARTS == 2:
        z = z + (tl.load(pointers + 1, mask=mask, other=0),)
    return z


@triton.jit
@no_type_check
def _read_or_zero(pointer, offsets, mask, PARTS: tl.constexpr, CARRY: tl.constexpr, BLOCK: tl.constexpr):
    if pointer is None:
        z = _number(0, PARTS, CARRY, BLOCK)
    else:
        z = _read(pointer + offsets, mask, PARTS)
    return z


@triton.jit
@no_type_check
def _write(pointers, z, mask, PARTS: tl.constexpr):
    tl.store(pointers, z[0].to(pointers.dtype.element_ty), mask=mask)
    if PARTS == 2:
        tl.store(pointers + 1, z[1].to(pointers.dtype.element_ty), mask=mask)


@triton.jit
@no_type_check
def _number(value, PARTS: tl.constexpr, CARRY: tl.constexpr, BLOCK: tl.constexpr):
    z = (tl.full((BLOCK,), value, CARRY),)
    if PARTS == 2:
        z = z + (tl.full((BLOCK,), 0, CARRY),)
    return z


@triton.jit
@no_type_check
def _cast(z, PARTS: tl.constexpr, CARRY: tl.constexpr):
    w = (z[0].to(CARRY),)
    if PARTS == 2:
        w = w + (z[1].to(CARRY),)
    return w


@triton.jit
@no_type_check
def _conj(z, PARTS: tl.constexpr):
    if PARTS == 2:
        w = (z[0], -z[1])
    else:
        w = z
    return w


@triton.jit
@no_type_check
def _square(z, PARTS: tl.constexpr):
    """abs(z) ** 2"""
    if PARTS == 2:
        square = z[0] * z[0] + z[1] * z[1]
    else:
        square = z[0] * z[0]
    return square


@triton.jit
@no_type_check
def _multiply(a, z, PARTS: tl.constexpr):
    if PARTS == 2:
        w = (a[0] * z[0] - a[1] * z[1], a[0] * z[1] + a[1] * z[0])
    else:
        w = (a[0] * z[0],)
    return w


@triton.jit
@no_type_check
def _add(w, z, PARTS: tl.constexpr):
    if PARTS == 2:
        v = (w[0] + z[0], w[1] + z[1])
    else:
        v = (w[0] + z[0],)
    return v


@triton.jit
@no_type_check
def _select(condition, z, otherwise, PARTS: tl.constexpr):
    v = (tl.where(condition, z[0], otherwise[0]),)
    if PARTS == 2:
        v = v + (tl.where(condition, z[1], otherwise[1]),)
    return v
