"""The diagonal recurrence on a GPU, compiled by Triton: each number is read and written once, at the memory's speed.

One program walks through time for one batch row and one block of channels, the carry in registers and the loads of
the steps to come under way in two groups that take turns. Where batch and channels are too few to fill a GPU, time is
cut into chunks: every chunk is summarised (product of decays, state from zero), the summaries are scanned by the same
recurrence, and every chunk is walked again from the state that enters it; docs/maths/recurrence.md derives both.

Nothing is tuned at run time and nothing is atomic: equal shapes give equal launches and equal bits. ``Tuning`` has what
a launch follows from beside the shape; benchmarks/gpu.py measures around its values. With TRITON_INTERPRET=1, set
before this module is imported, all of it runs on CPU tensors.
"""

# Triton compiles a subset of Python (no starred tuples), which these do not know:
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

# Whether the kernels run in Triton's interpreter, on CPU tensors: settled when this module is imported.
INTERPRETED = knobs.runtime.interpret


class Tuning(NamedTuple):
    """The constants of the rule in ``_plan``."""

    # Time is cut into chunks below this many programs (two for each multiprocessor of a large GPU): reading the inputs
    # a second time costs 5/3 of the traffic, which a GPU that is less than half busy has to spare.
    few_programs: int = 256
    # Programs wanted once time is cut, and those above which a lane takes two 16-bit channels and not one.
    many_programs: int = 2048
    # Shorter chunks than this spend more on their summaries than they gain, and shorter walks more on the calls.
    shortest_chunk: int = 128
    shortest_cut: int = 4096
    # Bytes of one array that a lane loads together, a group of steps; two groups are under way. The forward has twice
    # as long ones below so many programs, which each need more under way. 255 registers a lane bound both, and the time
    # to compile, which grows faster than the group: seconds at 8 steps, half a minute at 32.
    group_bytes: int = 32
    deep_programs: int = 1024
    warps: int = 1  # a program


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

    A ``tuning`` may be given in place of ``TUNING``, to measure it.
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
        within = (tuning or TUNING)._replace(shortest_cut=0)  # the device is busy: calls cost nothing
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

    The walk carries conj(decay_t) g_t, what a step hands to the one before it in the recurrence's order.
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
    # One partial sum a chunk where the decay is constant in time; other broadcast axes are summed below.
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
    """Raise if Triton cannot compile and launch a kernel here: no C compiler, or a GPU that is too old.

    The kernels themselves are compiled when they are launched, for each shape that needs its own code.
    """
    if not INTERPRETED:
        _launch_one()


@cache
def _launch_one() -> None:
    _one_kernel[(1,)](torch.empty(1, device="cuda"))


class Plan(NamedTuple):
    """How one shape and dtype is launched: a fixed rule, never a measurement."""

    grid: tuple[int]
    block: int  # channels a program
    chunks: int  # pieces of time
    length: int  # steps in each of them; the last may have fewer
    steps: int  # loaded together, while as many that were loaded before are used
    warps: int


def _plan(x: Tensor, tuning: Tuning | None = None, *, deep: bool = False) -> Plan:
    tuning = tuning or TUNING
    B, T, H, D = x.shape
    item, lanes = x.element_size(), 32 * tuning.warps

    def programs(block: int) -> int:
        return B * _ceil_divide(H * D, block)

    # A lane a channel: a step's load is 128 bytes a warp. Two of 16 bits, unless that leaves too few programs.
    block = 2 * lanes if item == 2 and programs(2 * lanes) >= tuning.many_programs else lanes
    chunks = 1
    if programs(block) < tuning.few_programs and tuning.shortest_cut <= T:
        chunks = max(1, min(_ceil_divide(tuning.many_programs, programs(block)), T // tuning.shortest_chunk))
    length = _ceil_divide(T, chunks)
    chunks = _ceil_divide(T, length)
    deep = deep and programs(block) * chunks < tuning.deep_programs
    steps = max(1, tuning.group_bytes * lanes // (item * block)) * (2 if deep else 1)
    # Two groups that hold a short walk whole are enough for it.
    steps = min(steps, triton.next_power_of_2(_ceil_divide(length, 2)))
    return Plan((programs(block) * chunks,), block, chunks, length, steps, tuning.warps)


def _ceil_divide(a: int, b: int) -> int:
    """a / b, rounded up; some releases of triton declare that theirs returns a ``constexpr``."""
    return -(-a // b)


def _summarise(
    plan: Plan, decay: Tensor, x: Tensor, reset: Tensor | None, *, down: bool, adjoint: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Product of decays and state from zero at the end of every chunk, (B, chunks, H, D) each, in the carry's dtype;
    and for every row and block of channels whether a product overflows, or underflows and may grow again."""
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
    """Write the states that enter the chunks anew, by running through all steps, where a product overflows.

    The device decides, so that nothing waits for it. Elsewhere the launch ends at once.
    """
    _, T, H, D = x.shape
    with torch.cuda.device_of(x):
        _run_through_kernel[(len(overflows),)](
            *map(_numbers, (decay, x, first, reset, overflows, entering)),
            T, H * D, D, plan.length, plan.chunks, *_decay_strides(decay),
            DOWN=down, ADJOINT=adjoint, **_options(plan, decay, x) | {"STEPS": 1},
        )  # fmt: skip


def _dropped(reset: Tensor | None, plan: Plan) -> Tensor | None:
    """(B, chunks): whether the state that enters a chunk is dropped inside it."""
    if reset is None:
        return None
    padding = plan.chunks * plan.length - reset.shape[1]
    return torch.nn.functional.pad(reset, (0, padding)).unflatten(1, (plan.chunks, plan.length)).any(-1)


def _entering(scanned: Tensor, first: Tensor | None, *, down: bool) -> Tensor:
    """The state that enters every chunk: what leaves the chunk walked before it, or the very first state."""
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
    """What a kernel can point to: complex numbers as pairs, booleans as bytes."""
    if x is None:
        return None
    x = x.resolve_conj().resolve_neg().contiguous()
    if x.is_complex():
        return torch.view_as_real(x)
    return x.view(torch.uint8) if x.dtype == torch.bool else x


def _decay_strides(decay: Tensor) -> list[int]:
    """Strides in numbers, 0 along a broadcast axis."""
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


# --- the kernels. A number is a tuple of PARTS tensors, (real,) or (real, imaginary); a row is all that one step reads:
# (impulse or gradient, decay if it varies in time, state before if the step needs it, reset if there is one).
# no_type_check keeps the tests' shape checker out of what Triton compiles. ---

# Lengths differ from call to call: no new compilation for a length of 1 or a multiple of 16.
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
    start, steps, stride = _walk(chunk, length, T, channels * PARTS, DOWN)
    decay += (_decay_offset(b, c, D, decay_b, decay_h, decay_d, DECAY_BY_HEAD) + start * decay_t) * PARTS
    at = ((b * T + start) * channels + c) * PARTS
    h = _read_or_zero(entering, ((b * chunks + chunk) * channels + c) * PARTS, inside, PARTS, CARRY, BLOCK)
    a = _read(decay, inside, PARTS)
    if reset is not None:
        reset += b * T + start
    whole = steps // (2 * STEPS) * (2 * STEPS)
    h = _forward_span(h, a, 0, whole, impulse + at, decay, reset, states + at, stride, decay_t, lane, lanes, True,
                      DOWN, DECAY_VARIES, PARTS, CARRY, STEPS, BLOCK)  # fmt: skip
    h = _forward_span(h, a, whole, steps, impulse + at, decay, reset, states + at, stride, decay_t, lane, lanes, False,
                      DOWN, DECAY_VARIES, PARTS, CARRY, (STEPS + 3) // 4, BLOCK)  # fmt: skip
    if chunk == (0 if DOWN else chunks - 1):
        _write(final_state + (b * channels + c) * PARTS, h, inside, PARTS)


@triton.jit
@no_type_check
def _forward_span(
    h, a, first, last, impulse, decay, reset, states, stride, decay_t, lane, lanes, WHOLE: tl.constexpr,
    DOWN: tl.constexpr, DECAY_VARIES: tl.constexpr, PARTS: tl.constexpr, CARRY: tl.constexpr, STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The walk's steps first to last, 2 STEPS at a time; WHOLE says that these divide them.

    Two groups take turns, each loaded before the other is used. One, handed on from turn to turn, would have to be
    copied, and a copy waits for its loads.
    """
    even = _rows(first, last, impulse, decay, None, 0, reset, stride, decay_t, lane, lanes, WHOLE,
                 DOWN, DECAY_VARIES, PARTS, STEPS)  # fmt: skip
    for i in range(first, last, 2 * STEPS):
        odd = _rows(i + STEPS, last, impulse, decay, None, 0, reset, stride, decay_t, lane, lanes, WHOLE,
                    DOWN, DECAY_VARIES, PARTS, STEPS)  # fmt: skip
        h = _forward_group(h, a, even, i, last, states, stride, lane, lanes, reset is not None, WHOLE,
                           DECAY_VARIES, PARTS, CARRY, STEPS, BLOCK)  # fmt: skip
        even = _rows(i + 2 * STEPS, last, impulse, decay, None, 0, reset, stride, decay_t, lane, lanes, WHOLE,
                     DOWN, DECAY_VARIES, PARTS, STEPS)  # fmt: skip
        h = _forward_group(h, a, odd, i + STEPS, last, states, stride, lane, lanes, reset is not None, WHOLE,
                           DECAY_VARIES, PARTS, CARRY, STEPS, BLOCK)  # fmt: skip
    return h


@triton.jit
@no_type_check
def _forward_group(
    h, a, rows, i, last, states, stride, lane, lanes, RESETS: tl.constexpr, WHOLE: tl.constexpr,
    DECAY_VARIES: tl.constexpr, PARTS: tl.constexpr, CARRY: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The walk's steps i to i + STEPS; unless all are known to be there, those past the last change nothing."""
    for s in tl.static_range(STEPS):
        new = _forward_step(h, a, rows[s], RESETS, DECAY_VARIES, PARTS, CARRY, BLOCK)
        h = new if WHOLE else _select(i + s < last, new, h, PARTS)
        _write(states + (i + s) * stride, h, _mask(i + s, last, lane, lanes, WHOLE), PARTS)
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
    """One chunk of the walk back: g = grad_states_t + carry, then carry = conj(decay_t) g, or 0 where reset_t."""
    b, chunk, c, lane, lanes = _place(channels, chunks, BLOCK)
    inside = lane < lanes
    start, steps, stride = _walk(chunk, length, T, channels * PARTS, DOWN)
    decay += (_decay_offset(b, c, D, decay_b, decay_h, decay_d, DECAY_BY_HEAD) + start * decay_t) * PARTS
    at = ((b * T + start) * channels + c) * PARTS
    carry = _read_or_zero(entering, ((b * chunks + chunk) * channels + c) * PARTS, inside, PARTS, CARRY, BLOCK)
    a = _read(decay, inside, PARTS)
    if reset is not None:
        reset += b * T + start
    # The walk ends at the recurrence's first step, whose state before is not among the states.
    ends_here = chunk == (0 if DOWN else chunks - 1)
    known = tl.where(ends_here, steps - 1, steps)
    h_0 = _read_or_zero(initial_state, (b * channels + c) * PARTS, inside, PARTS, CARRY, BLOCK)
    total = _number(0, PARTS, CARRY, BLOCK)
    # The state before step i of the recurrence is what the walk back meets at its next step.
    before = states + at + stride
    # The walk's last step stays out of what is whole: it may be the one without a state before.
    whole = (steps - 1) // (2 * STEPS) * (2 * STEPS)
    carry, total = _backward_span(
        carry, total, a, h_0, 0, whole, known, grad_states + at, decay, before, reset,
        grad_decay + at, grad_impulse + at, stride, decay_t, lane, lanes, True,
        DOWN, DECAY_VARIES, PARTS, CARRY, STEPS, BLOCK,
    )  # fmt: skip
    carry, total = _backward_span(
        carry, total, a, h_0, whole, steps, known, grad_states + at, decay, before, reset,
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
    stride, decay_t, lane, lanes, WHOLE: tl.constexpr,
    DOWN: tl.constexpr, DECAY_VARIES: tl.constexpr, PARTS: tl.constexpr, CARRY: tl.constexpr, STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """As ``_forward_span``."""
    even = _rows(first, last, grad_states, decay, before, known, reset, stride, decay_t, lane, lanes, WHOLE,
                 DOWN, DECAY_VARIES, PARTS, STEPS)  # fmt: skip
    for i in range(first, last, 2 * STEPS):
        odd = _rows(i + STEPS, last, grad_states, decay, before, known, reset, stride, decay_t, lane, lanes, WHOLE,
                    DOWN, DECAY_VARIES, PARTS, STEPS)  # fmt: skip
        carry, total = _backward_group(
            carry, total, a, h_0, even, i, last, known, grad_decay, grad_impulse, stride, lane, lanes,
            reset is not None, WHOLE, DECAY_VARIES, PARTS, CARRY, STEPS, BLOCK,
        )  # fmt: skip
        even = _rows(i + 2 * STEPS, last, grad_states, decay, before, known, reset, stride, decay_t, lane, lanes, WHOLE,
                     DOWN, DECAY_VARIES, PARTS, STEPS)  # fmt: skip
        carry, total = _backward_group(
            carry, total, a, h_0, odd, i + STEPS, last, known, grad_decay, grad_impulse, stride, lane, lanes,
            reset is not None, WHOLE, DECAY_VARIES, PARTS, CARRY, STEPS, BLOCK,
        )  # fmt: skip
    return carry, total


@triton.jit
@no_type_check
def _backward_group(
    carry, total, a, h_0, rows, i, last, known, grad_decay, grad_impulse, stride, lane, lanes,
    RESETS: tl.constexpr, WHOLE: tl.constexpr, DECAY_VARIES: tl.constexpr, PARTS: tl.constexpr, CARRY: tl.constexpr,
    STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As ``_forward_group``; two levels of partial sums keep the rounding error of a long sum down."""
    group_total = _number(0, PARTS, CARRY, BLOCK)
    for s in tl.static_range(STEPS):
        h_before = _cast(rows[s][2] if DECAY_VARIES else rows[s][1], PARTS, CARRY)
        if not WHOLE:
            h_before = _select(i + s < known, h_before, h_0, PARTS)
        g, new, grad_a = _backward_step(carry, a, h_before, rows[s], RESETS, DECAY_VARIES, PARTS, CARRY, BLOCK)
        mask = _mask(i + s, last, lane, lanes, WHOLE)
        _write(grad_impulse + (i + s) * stride, g, mask, PARTS)
        if not WHOLE:
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
    """(g_t, the carry to the next step of the walk, the gradient of decay_t)."""
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
    """One chunk of a walk as leaving = product * entering + end: of the forward, or of the backward where ADJOINT.

    A chunk with a reset is marked as dropped when the summaries are scanned; its product is zero from the reset on.
    """
    b, chunk, c, lane, lanes = _place(channels, chunks, BLOCK)
    inside = lane < lanes
    start, steps, stride = _walk(chunk, length, T, channels * PARTS, DOWN)
    decay += (_decay_offset(b, c, D, decay_b, decay_h, decay_d, DECAY_BY_HEAD) + start * decay_t) * PARTS
    x += ((b * T + start) * channels + c) * PARTS
    a = _read(decay, inside, PARTS)
    if reset is not None:
        reset += b * T + start
    summary = _summary_of_none(PARTS, CARRY, BLOCK)
    whole = steps // (2 * STEPS) * (2 * STEPS)
    summary = _summary_span(summary, a, 0, whole, x, decay, reset, stride, decay_t, lane, lanes, True,
                            DOWN, ADJOINT, DECAY_VARIES, PARTS, CARRY, STEPS, BLOCK)  # fmt: skip
    summary = _summary_span(summary, a, whole, steps, x, decay, reset, stride, decay_t, lane, lanes, False,
                            DOWN, ADJOINT, DECAY_VARIES, PARTS, CARRY, (STEPS + 3) // 4, BLOCK)  # fmt: skip
    end, product, smallest, largest_decay = summary
    if ADJOINT:
        product = _conj(product, PARTS)
    at = ((b * chunks + chunk) * channels + c) * PARTS
    _write(products + at, product, inside, PARTS)
    _write(ends + at, end, inside, PARTS)
    # A product that overflows stays so, and one that underflows may be forgotten unless a later decay is above 1:
    # clearly above, because complex ones of size 1 are rounded.
    fits = (_square(product, PARTS) <= 2.0**120) & ((smallest >= 2.0**-120) | (largest_decay <= 1 + 2.0**-9))
    blocks = (channels + BLOCK - 1) // BLOCK
    tl.store(overflows + b * blocks + c // BLOCK, tl.where(fits, 0, 1).to(tl.uint8), mask=inside & ~fits)


@triton.jit
@no_type_check
def _summary_of_none(PARTS: tl.constexpr, CARRY: tl.constexpr, BLOCK: tl.constexpr):
    """The state from zero, the product of decays, and the squares of its smallest value and of the largest decay."""
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
    """The state that enters each chunk, running through all steps, if a product of any chunk overflows."""
    b, _, c, lane, lanes = _place(channels, 1, BLOCK)
    inside = lane < lanes
    if tl.load(overflows + tl.program_id(0)) != 0:
        decays = decay + _decay_offset(b, c, D, decay_b, decay_h, decay_d, DECAY_BY_HEAD) * PARTS
        a = _read(decays, inside, PARTS)
        h = _read_or_zero(first, (b * channels + c) * PARTS, inside, PARTS, CARRY, BLOCK)
        none = _summary_of_none(PARTS, CARRY, BLOCK)
        for k in range(chunks):
            chunk = tl.cast(chunks - 1 - k if DOWN else k, tl.int64)
            _write(entering + ((b * chunks + chunk) * channels + c) * PARTS, h, inside, PARTS)
            start, steps, stride = _walk(chunk, length, T, channels * PARTS, DOWN)
            h = _summary_span(
                (h, none[1], none[2], none[3]), a, 0, steps, x + ((b * T + start) * channels + c) * PARTS,
                decays + start * decay_t * PARTS, reset if reset is None else reset + b * T + start, stride, decay_t,
                lane, lanes, False, DOWN, ADJOINT, DECAY_VARIES, PARTS, CARRY, STEPS, BLOCK,
            )[0]  # fmt: skip


@triton.jit
@no_type_check
def _summary_span(
    summary, a, first, last, x, decay, reset, stride, decay_t, lane, lanes, WHOLE: tl.constexpr,
    DOWN: tl.constexpr, ADJOINT: tl.constexpr, DECAY_VARIES: tl.constexpr, PARTS: tl.constexpr, CARRY: tl.constexpr,
    STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As ``_forward_span``, writing nothing."""
    even = _rows(first, last, x, decay, None, 0, reset, stride, decay_t, lane, lanes, WHOLE,
                 DOWN, DECAY_VARIES, PARTS, STEPS)  # fmt: skip
    for i in range(first, last, 2 * STEPS):
        odd = _rows(i + STEPS, last, x, decay, None, 0, reset, stride, decay_t, lane, lanes, WHOLE,
                    DOWN, DECAY_VARIES, PARTS, STEPS)  # fmt: skip
        summary = _summary_group(summary, a, even, i, last, reset is not None, WHOLE, ADJOINT,
                                 DECAY_VARIES, PARTS, CARRY, STEPS, BLOCK)  # fmt: skip
        even = _rows(i + 2 * STEPS, last, x, decay, None, 0, reset, stride, decay_t, lane, lanes, WHOLE,
                     DOWN, DECAY_VARIES, PARTS, STEPS)  # fmt: skip
        summary = _summary_group(summary, a, odd, i + STEPS, last, reset is not None, WHOLE, ADJOINT,
                                 DECAY_VARIES, PARTS, CARRY, STEPS, BLOCK)  # fmt: skip
    return summary


@triton.jit
@no_type_check
def _summary_group(
    summary, a, rows, i, last, RESETS: tl.constexpr, WHOLE: tl.constexpr, ADJOINT: tl.constexpr,
    DECAY_VARIES: tl.constexpr, PARTS: tl.constexpr, CARRY: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    end, product, smallest, largest_decay = summary
    for s in tl.static_range(STEPS):
        if ADJOINT:
            _, new, _ = _backward_step(end, a, end, rows[s], RESETS, DECAY_VARIES, PARTS, CARRY, BLOCK)
        else:
            new = _forward_step(end, a, rows[s], RESETS, DECAY_VARIES, PARTS, CARRY, BLOCK)
        factor = _cast(rows[s][1] if DECAY_VARIES else a, PARTS, CARRY)
        if RESETS and not ADJOINT:  # what enters a step is dropped before it is multiplied
            product = _select(rows[s][-1], _number(0, PARTS, CARRY, BLOCK), product, PARTS)
        through = _multiply(factor, product, PARTS)
        if RESETS and ADJOINT:  # and in the walk back what leaves it
            through = _select(rows[s][-1], _number(0, PARTS, CARRY, BLOCK), through, PARTS)
        if not WHOLE:
            new = _select(i + s < last, new, end, PARTS)
            through = _select(i + s < last, through, product, PARTS)
        end, product = new, through
        smallest = tl.minimum(smallest, _square(product, PARTS))
        largest_decay = tl.maximum(largest_decay, _square(factor, PARTS))
    return end, product, smallest, largest_decay


# --- where a program stands ---


@triton.jit
@no_type_check
def _place(channels, chunks, BLOCK: tl.constexpr):
    """This program's batch row, chunk and channels, in 64 bits, from which every offset is computed; and its lanes,
    with their number."""
    program = tl.program_id(0).to(tl.int64)
    blocks = (channels + BLOCK - 1) // BLOCK
    first = program % blocks * BLOCK
    lane = tl.arange(0, BLOCK)
    return program // blocks // chunks, program // blocks % chunks, first + lane, lane, (channels - first).to(tl.int32)


@triton.jit
@no_type_check
def _walk(chunk, length, T, row, DOWN: tl.constexpr):
    """The first time of a chunk's walk, its number of steps, and the way from one of its rows to the next."""
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
        # Without a division the compiler sees that neighbouring channels are neighbours in memory.
        channel = c * decay_d
    return b * decay_b + channel


# --- loads ---


@triton.jit
@no_type_check
def _rows(
    i, last, x, decay, before, known, reset, stride, decay_t, lane, lanes, WHOLE: tl.constexpr,
    DOWN: tl.constexpr, DECAY_VARIES: tl.constexpr, PARTS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """The rows of the walk's steps i to i + STEPS: none is read from ``last`` on, of ``before`` from ``known`` on."""
    decay_stride = tl.cast(-decay_t if DOWN else decay_t, tl.int64) * PARTS
    rows = ()
    for s in tl.static_range(STEPS):
        # Where groups are whole, one condition serves all of their rows.
        there = i if WHOLE else i + s
        mask = _mask(there, last, lane, lanes, False)
        row = (_read(x + (i + s) * stride, mask, PARTS),)
        if DECAY_VARIES:
            row = row + (_read(decay + (i + s) * decay_stride, mask, PARTS),)
        if before is not None:
            if not WHOLE:
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
    """The lanes that have a channel, at a step that is there; KNOWN says that it is."""
    if KNOWN:
        mask = lane < lanes
    else:
        # The condition enters through the bound: the interpreter cannot broadcast a boolean.
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
