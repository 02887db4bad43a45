"""The diagonal recurrence on a CPU, compiled by Numba: each number is read and written once, at the memory's speed.

The channels lie innermost. One task walks through time for one batch row and one block of channels, with the carry in
a small array that stays in the L1 cache. Where these tasks are fewer than the threads, and each channel has its own
decay, time is cut into pieces that fit the L2 cache, and a task is one piece, walked twice: once for what it makes of
any state, h -> product * h + end, then, when its predecessor has passed the state on, for its results. Memory is still
read once. How tasks reach threads is in ``numba_threads.py``.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import carray  # pyright: ignore[reportPrivateImportUsage]

from legato import _dtypes
from legato._shapes import Bool, Inexact, Tensor
from legato.ops.kernels.numba_cache import c_function, compiled, contracted
from legato.ops.kernels.numba_threads import (
    HEADER,
    NARROWEST_BYTES,
    PREFETCH_BYTES,
    block_width,
    cores,
    empty,
    launch,
    next_task,
    pass_on,
    pointer,
    prefetch,
    threads_for,
    wait_for,
)

# A row of a task: its arrays (five in the backward) must fit the L1 data cache, 32 KiB on small machines.
_BLOCK_BYTES = 4096
# The impulses of a piece of time: with as many decays and states they fit an L2 cache of 1 MiB.
_PIECE_BYTES = 1 << 18
# Where a step has several heads, they take turns over so many bytes of impulses, which stay in the L1 cache.
_TURN_BYTES = 1 << 13
# A product of decays is kept as p * 2 ** (60 * power): it neither vanishes nor overflows where the states do not,
# nor does it become a subnormal number, with which arithmetic takes 50 times as long.
_UNIT = 2.0**60
# More powers than these lead out of the range of any dtype.
_MOST_POWERS = 40


def forward(
    decay: Inexact[Tensor, "Bd Td Hd Dd"],
    impulse: Inexact[Tensor, "B T H D"],
    initial_state: Inexact[Tensor, "B H D"] | None,
    reset: Bool[Tensor, "B T"] | None,
    reverse: bool,
) -> tuple[Inexact[Tensor, "B T H D"], Inexact[Tensor, "B H D"]]:
    """h_t = decay_t * h_{t-1} + impulse_t; the arguments are those of ``reference.forward``."""
    dtype, carry_dtype = impulse.dtype, _dtypes.carry_dtype(impulse.dtype)
    decay, impulse = decay.to(carry_dtype), impulse.to(carry_dtype)
    states = empty(impulse, *impulse.shape)
    final_state = _carry(initial_state, impulse)
    _launch(_forward, decay, (impulse, states, final_state), reset, reverse)
    return states.to(dtype), final_state


def backward(
    grad_states: Inexact[Tensor, "B T H D"],
    grad_final: Inexact[Tensor, "B H D"],
    decay: Inexact[Tensor, "Bd Td Hd Dd"],
    states: Inexact[Tensor, "B T H D"],
    initial_state: Inexact[Tensor, "B H D"] | None,
    reset: Bool[Tensor, "B T"] | None,
    reverse: bool,
) -> tuple[Inexact[Tensor, "Bd Td Hd Dd"], Inexact[Tensor, "B T H D"], Inexact[Tensor, "B H D"]]:
    """g_t = grad_states_t + conj(decay_{t+1}) g_{t+1}: grad_impulse = g, grad_decay_t = conj(h_{t-1}) g_t."""
    dtype, carry_dtype = states.dtype, _dtypes.carry_dtype(states.dtype)
    decay_shape, decay_dtype = decay.shape, decay.dtype
    decay, states, grad_states = decay.to(carry_dtype), states.to(carry_dtype), grad_states.to(carry_dtype)
    grad_impulse = empty(states, *states.shape)
    # One gradient a batch row and head, in the decay's own shape over time and channels; the rest is summed below. A
    # decay that is constant in time has one a piece of time.
    B, _, H, _ = states.shape
    plan = _plan(states, decay)
    rows = decay_shape[1] if decay_shape[1] != 1 else plan.pieces
    grad_decay = empty(states, B, rows, H, decay_shape[3])
    if states.numel() == 0:
        grad_decay.zero_()
    grad_initial = _carry(grad_final, states)
    h0 = _carry(initial_state, states)
    arrays = (states, grad_states, h0, grad_decay, grad_impulse, grad_initial)
    _launch(_backward, decay, arrays, reset, reverse, plan)
    return grad_decay.sum_to_size(decay_shape).to(decay_dtype), grad_impulse.to(dtype), grad_initial


def prepare(dtype: torch.dtype, adjoint: bool) -> None:
    """Compile what ``forward`` or (``adjoint``) ``backward`` launches for a carry of that dtype."""
    (_backward if adjoint else _forward)(_numpy_dtype(dtype))


def _carry(state: Tensor | None, like: Tensor) -> Tensor:
    """A fresh (B, H, D) array that the kernel may write, holding ``state`` or zeros."""
    B, _, H, D = like.shape
    return like.new_zeros((B, H, D)) if state is None else state.clone(memory_format=torch.contiguous_format)


# --- the kernels: plain loops, compiled when first called and kept in Numba's cache on disk ---
# A walk takes many steps of one head, in a function of its own, and its loops over channels have few arrays and no
# choices inside: so LLVM makes vector code of them. Otherwise a step costs three times as much.


def _walk_of(prefetches: bool) -> Any:
    @contracted
    def walk(b, head, d0, d1, t, way, steps, decay, reset, impulse, states, h):
        """h = a_t h + x_t, kept in ``states``, in ``steps`` steps from t on; ``way`` is 1 or -1."""
        b_decay, moves, h_decay = _broadcast(decay, b, head)
        ahead = _ahead(h, impulse, way)
        t, way, moves = _unsigned(t, way, moves)
        for _ in range(steps):
            if reset.size > 0 and reset[b, t]:
                h[:] = 0
            a, x, out = decay[b_decay, t * moves, h_decay, d0:d1], impulse[b, t, head, d0:d1], states[b, t, head, d0:d1]
            if prefetches:
                prefetch(a, ahead * decay.strides[1])
                prefetch(x, ahead * impulse.strides[1])
                prefetch(out, ahead * states.strides[1])
            for i in range(h.size):
                state = a[i] * h[i] + x[i]
                h[i] = state
                out[i] = state
            t += way

    return walk


_walk, _narrow_walk = _walk_of(True), _walk_of(False)


@contracted
def _walk_one_channel(b, head, d0, t, way, steps, decay, reset, impulse, states, h):
    """The same for one channel, whose state stays in a register: a step takes as long as one multiply-add."""
    b_decay, moves, h_decay = _broadcast(decay, b, head)
    t, way, moves = _unsigned(t, way, moves)
    state = h[0]
    for _ in range(steps):
        if reset.size > 0 and reset[b, t]:
            h[0] = 0
            state = h[0]
        state = decay[b_decay, t * moves, h_decay, d0] * state + impulse[b, t, head, d0]
        states[b, t, head, d0] = state
        t += way
    h[0] = state


@contracted
def _walk_one_decay(b, head, d0, d1, t, way, steps, decay, reset, impulse, states, h):
    """The same where all channels of a head share one decay."""
    b_decay, moves, h_decay = _broadcast(decay, b, head)
    ahead = _ahead(h, impulse, way)
    t, way, moves = _unsigned(t, way, moves)
    for _ in range(steps):
        if reset.size > 0 and reset[b, t]:
            h[:] = 0
        a, x, out = decay[b_decay, t * moves, h_decay, 0], impulse[b, t, head, d0:d1], states[b, t, head, d0:d1]
        prefetch(x, ahead * impulse.strides[1])
        prefetch(out, ahead * states.strides[1])
        for i in range(h.size):
            state = a * h[i] + x[i]
            h[i] = state
            out[i] = state
        t += way


@compiled
def _forward_steps(b, d0, d1, first, way, steps, decay, reset, impulse, states, h):
    block, one_decay = _steps_a_turn(steps, h), decay.shape[3] < impulse.shape[3]
    for done in range(0, steps, block):
        t, turn = first + way * done, min(block, steps - done)
        for head in range(len(h)):
            if one_decay:
                _walk_one_decay(b, head, d0, d1, t, way, turn, decay, reset, impulse, states, h[head])
            elif h.shape[1] == 1:
                _walk_one_channel(b, head, d0, t, way, turn, decay, reset, impulse, states, h[head])
            elif _is_narrow(h):
                _narrow_walk(b, head, d0, d1, t, way, turn, decay, reset, impulse, states, h[head])
            else:
                _walk(b, head, d0, d1, t, way, turn, decay, reset, impulse, states, h[head])


def _walk_back_of(prefetches: bool) -> Any:
    @contracted
    def walk(b, head, d0, d1, t, way, steps, end, decay, reset, states, grads, h0, grad_decay, grad_impulse, g):
        """g_t = grad_t + g, and g = conj(a_t) g_t is what step t - way leaves; ``end`` is the walk's very last step."""
        b_decay, moves, h_decay = _broadcast(decay, b, head)
        ahead = _ahead(g, states, way)
        t, way, moves = _unsigned(t, way, moves)
        for _ in range(steps):
            h_before = h0[b, head, d0:d1] if t == np.uintp(end) else states[b, t + way, head, d0:d1]
            a, grad = decay[b_decay, t * moves, h_decay, d0:d1], grads[b, t, head, d0:d1]
            grad_a, grad_x = grad_decay[b, t, head, d0:d1], grad_impulse[b, t, head, d0:d1]
            if prefetches:
                prefetch(a, ahead * decay.strides[1])
                prefetch(grad, ahead * grads.strides[1])
                prefetch(h_before, ahead * states.strides[1])
                prefetch(grad_a, ahead * grad_decay.strides[1])
                prefetch(grad_x, ahead * grad_impulse.strides[1])
            for i in range(g.size):
                here = g[i] + grad[i]
                grad_x[i] = here
                g[i] = np.conj(a[i]) * here
            for i in range(g.size):
                grad_a[i] = np.conj(h_before[i]) * grad_x[i]
            if reset.size > 0 and reset[b, t]:
                grad_a[:] = 0
                g[:] = 0
            t += way

    return walk


_walk_back, _narrow_walk_back = _walk_back_of(True), _walk_back_of(False)


@contracted
def _walk_back_shared(
    b, head, d0, d1, t, way, steps, end, decay, reset, states, grads, h0, grad_decay, grad_impulse, g, total
):
    """The same for a decay that channels or steps share: ``total`` is its gradient, in 64 bits for long sums."""
    b_decay, moves, h_decay = _broadcast(decay, b, head)
    t, way, moves = _unsigned(t, way, moves)
    one_decay = decay.shape[3] < states.shape[3]
    for _ in range(steps):
        h_before = h0[b, head, d0:d1] if t == np.uintp(end) else states[b, t + way, head, d0:d1]
        a, grad, grad_x = decay[b_decay, t * moves, h_decay], grads[b, t, head, d0:d1], grad_impulse[b, t, head, d0:d1]
        for i in range(g.size):
            here = g[i] + grad[i]
            g[i] = here
            grad_x[i] = here
        if reset.size > 0 and reset[b, t]:
            g[:] = 0
        else:
            for i in range(g.size):
                total[i] += np.conj(h_before[i]) * g[i]
            if one_decay:
                one = np.conj(a[0])
                for i in range(g.size):
                    g[i] = one * g[i]
            else:
                each = a[d0:d1]
                for i in range(g.size):
                    g[i] = np.conj(each[i]) * g[i]
        if moves:  # this step's own sum over its channels
            grad_decay[b, t, head, 0] = total.sum()
            total[:] = 0
        t += way


@compiled
def _backward_steps(
    b, d0, d1, first, way, steps, end, piece, decay, reset, states, grads, h0, grad_decay, grad_impulse, g
):
    block = _steps_a_turn(steps, g)
    total = np.zeros(g.shape, dtype=(g[0] * np.float64(1)).dtype)
    one_decay, moves = decay.shape[3] < states.shape[3], decay.shape[1] != 1
    for done in range(0, steps, block):
        t, turn = first + way * done, min(block, steps - done)
        for head in range(len(g)):
            if moves and not one_decay and _is_narrow(g):
                _narrow_walk_back(
                    b, head, d0, d1, t, way, turn, end, decay, reset, states, grads, h0, grad_decay, grad_impulse,
                    g[head],
                )  # fmt: skip
            elif moves and not one_decay:
                _walk_back(
                    b, head, d0, d1, t, way, turn, end, decay, reset, states, grads, h0, grad_decay, grad_impulse,
                    g[head],
                )  # fmt: skip
            else:
                _walk_back_shared(
                    b, head, d0, d1, t, way, turn, end, decay, reset, states, grads, h0, grad_decay, grad_impulse,
                    g[head], total[head],
                )  # fmt: skip
    if not moves:
        for head in range(len(g)):
            if one_decay:
                grad_decay[b, piece, head, 0] = total[head].sum()
            else:
                for i in range(d1 - d0):
                    grad_decay[b, piece, head, d0 + i] = total[head, i]


@contracted
def _effect(b, head, d0, d1, t, way, steps, decay, reset, impulse, adjoint, product, power, end):
    """What these steps make of any state h: ``product`` * 2 ** (60 * ``power``) * h + ``end``.

    The adjoint adds before it multiplies. Returns whether a reset drops h: then it does not enter, even if it is not a
    number.
    """
    b_decay, moves, h_decay = _broadcast(decay, b, head)
    t, way, moves = _unsigned(t, way, moves)
    forgets = False
    product[:] = 1
    power[:] = 0
    end[:] = 0
    for step in range(steps):
        a, x = decay[b_decay, t * moves, h_decay, d0:d1], impulse[b, t, head, d0:d1]
        dropped = reset.size > 0 and reset[b, t]
        if dropped:
            forgets = True
            end[:] = 0
        if not adjoint:
            for i in range(end.size):
                end[i] = a[i] * end[i] + x[i]
                product[i] *= a[i]
        elif not dropped:
            for i in range(end.size):
                end[i] = np.conj(a[i]) * (end[i] + x[i])
                product[i] *= np.conj(a[i])
        if step % 32 == 0:
            for i in range(end.size):
                product[i], powers = _rescaled(product[i])
                power[i] += powers
        t += way
    return forgets


@contracted
def _effect_on_one_channel(b, head, d0, t, way, steps, decay, reset, impulse, adjoint, product, power, end):
    """The same for one channel, in registers."""
    b_decay, moves, h_decay = _broadcast(decay, b, head)
    t, way, moves = _unsigned(t, way, moves)
    forgets, powers = False, 0
    product[0], end[0] = 1, 0
    p, state = product[0], end[0]
    for step in range(steps):
        a, x = decay[b_decay, t * moves, h_decay, d0], impulse[b, t, head, d0]
        dropped = reset.size > 0 and reset[b, t]
        if dropped:
            forgets, state = True, end[0]
        if not adjoint:
            state = a * state + x
            p *= a
        elif not dropped:
            state = np.conj(a) * (state + x)
            p *= np.conj(a)
        if step % 32 == 0:
            p, more = _rescaled(p)
            powers += more
        t += way
    product[0], power[0], end[0] = p, powers, state
    return forgets


@compiled
def _rescaled(product):
    """The product within 2 ** -60 and 2 ** 60, and the powers of 2 ** 60 that this took from it."""
    size = abs(product.real) + abs(product.imag)
    if 0 < size < 1 / _UNIT:
        return product * _UNIT, -1
    if _UNIT < size < np.inf:
        return product / _UNIT, 1
    return product * 1.0, 0  # Numba's type of it is then that of the others: float64, complex128


@compiled
def _broadcast(decay, b, head):
    """The decay's row for a batch row and head, and by how much its index over time moves in one step."""
    return b * (decay.shape[0] != 1), 1 * (decay.shape[1] != 1), head * (decay.shape[2] != 1)


@compiled
def _unsigned(t, way, moves):
    """Indices that cannot count from an array's end, which no step need then check. Adding a way of -1 wraps round."""
    return np.uintp(t), np.uintp(way), np.uintp(moves)


@compiled
def _is_narrow(h):
    """Rows so short that asking for them early costs more than it gains."""
    return h.shape[1] * h.itemsize < 128


@compiled
def _ahead(h, rows, way):
    """How many steps ahead to ask for rows."""
    return way * -(-PREFETCH_BYTES // (h.size * h.itemsize * rows.shape[2]))


@compiled
def _steps_a_turn(steps, h):
    """Heads take turns over so many steps that their rows stay in the cache meanwhile."""
    return max(1, steps if len(h) == 1 else _TURN_BYTES // (h.size * h.itemsize))


# --- launching ---

# The words of a launch, after the header: flags, sizes, and addresses; those of the arrays come last.
_REVERSE, _SIZES, _DECAY_SIZES, _PIECES, _PIECE_STEPS, _HAS_RESET, _RESET, _DECAY, _ARRAYS = (
    HEADER, HEADER + 1, HEADER + 5, HEADER + 9, HEADER + 10, HEADER + 11, HEADER + 12, HEADER + 13, HEADER + 14,
)  # fmt: skip


@compiled
def _unpack(words, dtype):
    B, T, H, D = words[_SIZES], words[_SIZES + 1], words[_SIZES + 2], words[_SIZES + 3]
    Bd, Td, Hd, Dd = words[_DECAY_SIZES], words[_DECAY_SIZES + 1], words[_DECAY_SIZES + 2], words[_DECAY_SIZES + 3]
    decay = carray(pointer(words[_DECAY]), (Bd, Td, Hd, Dd), dtype)
    reset = carray(pointer(words[_RESET]), (B * words[_HAS_RESET], T), np.bool_)
    return B, T, H, D, decay, reset


@compiled
def _span(words, piece, adjoint):
    """The first step of a piece, the way it is walked, its number of steps, and the last step of the whole walk."""
    T, length = words[_SIZES + 1], words[_PIECE_STEPS]
    start = piece * length
    steps = min(length, T - start)
    if (words[_REVERSE] != 0) != adjoint:
        return T - 1 - start, -1, steps, 0
    return start, 1, steps, T - 1


@compiled
def _begin(words, b, d0, d1, piece, decay, reset, impulse, carry, adjoint):
    """The state that a piece begins with, and whether the state that it leaves is passed on already.

    It is, at once, where the effect of the piece is known in numbers: a product of growing decays may overflow where
    the states do not, and the successor then waits until the piece is done.
    """
    first, way, steps, _ = _span(words, piece, adjoint)
    inner = 0 < piece < words[_PIECES] - 1
    heads = impulse.shape[2] if inner else 0
    product, end = np.empty((heads, d1 - d0), impulse.dtype), np.empty((heads, d1 - d0), impulse.dtype)
    power = np.empty((heads, d1 - d0), np.int64)
    forgets = False
    for head in range(heads):
        p, n, e = product[head], power[head], end[head]
        if d1 - d0 == 1:
            forgets = _effect_on_one_channel(b, head, d0, first, way, steps, decay, reset, impulse, adjoint, p, n, e)
        else:
            forgets = _effect(b, head, d0, d1, first, way, steps, decay, reset, impulse, adjoint, p, n, e)
        if not forgets:
            for i in range(d1 - d0):
                if not np.isfinite(p[i]):
                    inner = False
    wait_for(words, b, d0, piece)
    h = np.empty((impulse.shape[2], d1 - d0), impulse.dtype)
    for head in range(len(h)):
        for i in range(d1 - d0):
            h[head, i] = carry[b, head, d0 + i]
            if inner:
                after = end[head, i]
                if not forgets:
                    after += product[head, i] * _scaled(h[head, i], power[head, i])
                carry[b, head, d0 + i] = after
    if inner:
        pass_on(words, b, d0)
    return h, inner


@compiled
def _scaled(x, power):
    """x * 2 ** (60 * power), out of the range of x only where the result is."""
    x, factor = x * 1.0, _UNIT if power > 0 else 1 / _UNIT
    for _ in range(min(abs(power), _MOST_POWERS)):
        x *= factor
    return x


@compiled
def _finish(words, b, d0, d1, carry, h, passed):
    """Pass the last state on, where that is not done: of the first piece, the last, and one of growing decays."""
    if not passed:
        for head in range(len(h)):
            for i in range(d1 - d0):
                carry[b, head, d0 + i] = h[head, i]
        pass_on(words, b, d0)


@cache
def _forward(dtype: np.dtype) -> Any:
    def run(words):
        B, T, H, D, decay, reset = _unpack(words, dtype)
        impulse = carray(pointer(words[_ARRAYS]), (B, T, H, D), dtype)
        states = carray(pointer(words[_ARRAYS + 1]), (B, T, H, D), dtype)
        carry = carray(pointer(words[_ARRAYS + 2]), (B, H, D), dtype)
        while True:
            piece, b, d0, d1 = next_task(words, D)
            if b < 0:
                return
            first, way, steps, _ = _span(words, piece, False)
            h, passed = _begin(words, b, d0, d1, piece, decay, reset, impulse, carry, False)
            _forward_steps(b, d0, d1, first, way, steps, decay, reset, impulse, states, h)
            _finish(words, b, d0, d1, carry, h, passed)

    return c_function(run)


@cache
def _backward(dtype: np.dtype) -> Any:
    def run(words):
        B, T, H, D, decay, reset = _unpack(words, dtype)
        rows = words[_PIECES] if decay.shape[1] == 1 else T
        states = carray(pointer(words[_ARRAYS]), (B, T, H, D), dtype)
        grads = carray(pointer(words[_ARRAYS + 1]), (B, T, H, D), dtype)
        h0 = carray(pointer(words[_ARRAYS + 2]), (B, H, D), dtype)
        grad_decay = carray(pointer(words[_ARRAYS + 3]), (B, rows, H, decay.shape[3]), dtype)
        grad_impulse = carray(pointer(words[_ARRAYS + 4]), (B, T, H, D), dtype)
        carry = carray(pointer(words[_ARRAYS + 5]), (B, H, D), dtype)
        while True:
            piece, b, d0, d1 = next_task(words, D)
            if b < 0:
                return
            first, way, steps, end = _span(words, piece, True)
            g, passed = _begin(words, b, d0, d1, piece, decay, reset, grads, carry, True)
            _backward_steps(
                b, d0, d1, first, way, steps, end, piece, decay, reset, states, grads, h0, grad_decay, grad_impulse, g
            )
            _finish(words, b, d0, d1, carry, g, passed)

    return c_function(run)


class _Plan(NamedTuple):
    """How a launch is divided: channels a task, threads, pieces of time, and steps a piece."""

    width: int
    threads: int
    pieces: int
    steps: int


def _plan(like: Tensor, decay: Tensor) -> _Plan:
    B, T, H, D = like.shape
    if like.numel() == 0:
        return _Plan(max(D, 1), 1, 1, T)
    item, threads = like.element_size(), threads_for(like.numel())
    widest = max(_BLOCK_BYTES // H, NARROWEST_BYTES) // item
    width = D if decay.shape[3] < D else block_width(B, D, widest, item, threads)
    tasks, row = B * -(-D // width), H * width * item
    if tasks >= threads or decay.shape[3] < D:
        return _Plan(width, threads, 1, T)
    threads = min(threads, cores())  # one that is not running would keep the others waiting
    steps = max(1, min(-(-T // -(-threads // tasks)), _PIECE_BYTES // row))
    return _Plan(width, threads, -(-T // steps), steps)


def _launch(
    kernel: Callable,
    decay: Tensor,
    arrays: tuple[Tensor, ...],
    reset: Tensor | None,
    reverse: bool,
    plan: _Plan | None = None,
) -> None:
    """Run ``kernel`` on all (piece of time, batch row, block of channels) tasks, in as many threads as torch uses.

    ``arrays``, in the order in which the C functions above unpack them: (impulse, states, carry) forward, (states,
    grad_states, h0, grad_decay, grad_impulse, carry) backward; contiguous, of one dtype, and alive during the call.
    """
    like = arrays[0]
    B, T, H, D = like.shape
    if B * H * D == 0:
        return
    plan = plan or _plan(like, decay)
    words = (
        *(reverse, B, T, H, D, *decay.shape, plan.pieces, plan.steps),
        *(reset is not None, reset.data_ptr() if reset is not None else 0),
        *(x.data_ptr() for x in (decay, *arrays)),
    )
    launch(kernel(_numpy_dtype(like.dtype)), plan.pieces, B, D, plan.width, plan.threads, words)


@cache
def _numpy_dtype(dtype: torch.dtype) -> np.dtype:
    return torch.empty(0, dtype=dtype, device="cpu").numpy().dtype
