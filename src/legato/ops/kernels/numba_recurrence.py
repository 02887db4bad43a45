"""The diagonal recurrence on a CPU, compiled by Numba: each number is read and written once.

The channels are the innermost axis. One task runs over time for one batch row and one block of
channels, with the carry in a small array that stays in the L1 cache. If there are fewer such tasks
than threads, and each channel has its own decay, time is divided into chunks that fit the L2 cache.
A task is then one chunk, computed in two passes: the first summarises the chunk as the map
h -> product * h + end; the second starts when the final state of the previous chunk is available
and computes the states. Memory is still read once. ``numba_threads.py`` assigns tasks to threads.
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
    pointer,
    prefetch,
    signal,
    threads_for,
    wait_for,
)

# One row of one array of a task: five of them, in the backward, must fit the L1 data cache (32 KiB
# on small machines).
_BLOCK_BYTES = 4096
# The impulses of a chunk of time: together with its decays and states they fit an L2 cache of 1
# MiB.
_CHUNK_BYTES = 1 << 18
# With several heads, the kernel alternates between heads after so many bytes of impulses, which fit
# the L1 cache.
_HEAD_BYTES = 1 << 13
# A product of decays is stored as p * 2 ** (60 * power): it does not underflow or overflow where
# the states do not, and does not become subnormal, for which arithmetic takes 50 times as long.
_UNIT = 2.0**60
# More powers than this exceed the range of every dtype.
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
    # One gradient per batch row and head, over the decay's own time steps and channels; the rest is
    # summed below. If the decay is constant in time, one per chunk of time.
    B, _, H, _ = states.shape
    plan = _plan(states, decay)
    rows = decay_shape[1] if decay_shape[1] != 1 else plan.chunks
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
    """A new (B, H, D) array with ``state`` or zeros, which the kernel may overwrite."""
    B, _, H, D = like.shape
    return like.new_zeros((B, H, D)) if state is None else state.clone(memory_format=torch.contiguous_format)


# --- the kernels: plain loops, compiled when first called and cached on disk ---
# Many steps of one head are one function, whose loops over channels have few arrays and no
# branches, so that LLVM vectorises them. Otherwise a step costs three times as much.


def _scan_of(prefetches: bool) -> Any:
    @contracted
    def scan(b, head, d0, d1, t, dt, steps, decay, reset, impulse, states, h):
        """h = a_t h + x_t, written to ``states``, for ``steps`` steps from t on; ``dt`` is 1 or
        -1."""
        b_decay, varies, h_decay = _broadcast(decay, b, head)
        ahead = _ahead(h, impulse, dt)
        t, dt, varies = _unsigned(t, dt, varies)
        for _ in range(steps):
            if reset.size > 0 and reset[b, t]:
                h[:] = 0
            a, x, out = (
                decay[b_decay, t * varies, h_decay, d0:d1],
                impulse[b, t, head, d0:d1],
                states[b, t, head, d0:d1],
            )
            if prefetches:
                prefetch(a, ahead * decay.strides[1])
                prefetch(x, ahead * impulse.strides[1])
                prefetch(out, ahead * states.strides[1])
            for i in range(h.size):
                state = a[i] * h[i] + x[i]
                h[i] = state
                out[i] = state
            t += dt

    return scan


_scan, _narrow_scan = _scan_of(True), _scan_of(False)


@contracted
def _scan_one_channel(b, head, d0, t, dt, steps, decay, reset, impulse, states, h):
    """As ``_scan`` for one channel, with the state in a register: one multiply-add per step."""
    b_decay, varies, h_decay = _broadcast(decay, b, head)
    t, dt, varies = _unsigned(t, dt, varies)
    state = h[0]
    for _ in range(steps):
        if reset.size > 0 and reset[b, t]:
            h[0] = 0
            state = h[0]
        state = decay[b_decay, t * varies, h_decay, d0] * state + impulse[b, t, head, d0]
        states[b, t, head, d0] = state
        t += dt
    h[0] = state


@contracted
def _scan_one_decay(b, head, d0, d1, t, dt, steps, decay, reset, impulse, states, h):
    """As ``_scan`` where all channels of a head have the same decay."""
    b_decay, varies, h_decay = _broadcast(decay, b, head)
    ahead = _ahead(h, impulse, dt)
    t, dt, varies = _unsigned(t, dt, varies)
    for _ in range(steps):
        if reset.size > 0 and reset[b, t]:
            h[:] = 0
        a, x, out = decay[b_decay, t * varies, h_decay, 0], impulse[b, t, head, d0:d1], states[b, t, head, d0:d1]
        prefetch(x, ahead * impulse.strides[1])
        prefetch(out, ahead * states.strides[1])
        for i in range(h.size):
            state = a * h[i] + x[i]
            h[i] = state
            out[i] = state
        t += dt


@compiled
def _forward_steps(b, d0, d1, first, dt, steps, decay, reset, impulse, states, h):
    block, one_decay = _steps_per_head(steps, h), decay.shape[3] < impulse.shape[3]
    for done in range(0, steps, block):
        t, count = first + dt * done, min(block, steps - done)
        for head in range(len(h)):
            if one_decay:
                _scan_one_decay(b, head, d0, d1, t, dt, count, decay, reset, impulse, states, h[head])
            elif h.shape[1] == 1:
                _scan_one_channel(b, head, d0, t, dt, count, decay, reset, impulse, states, h[head])
            elif _is_narrow(h):
                _narrow_scan(b, head, d0, d1, t, dt, count, decay, reset, impulse, states, h[head])
            else:
                _scan(b, head, d0, d1, t, dt, count, decay, reset, impulse, states, h[head])


def _scan_back_of(prefetches: bool) -> Any:
    @contracted
    def scan(b, head, d0, d1, t, dt, steps, end, decay, reset, states, grads, h0, grad_decay, grad_impulse, g):
        """g_t = grad_t + g, then g = conj(a_t) g_t is the next carry; ``end`` is the last step."""
        b_decay, varies, h_decay = _broadcast(decay, b, head)
        ahead = _ahead(g, states, dt)
        t, dt, varies = _unsigned(t, dt, varies)
        for _ in range(steps):
            h_before = h0[b, head, d0:d1] if t == np.uintp(end) else states[b, t + dt, head, d0:d1]
            a, grad = decay[b_decay, t * varies, h_decay, d0:d1], grads[b, t, head, d0:d1]
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
            t += dt

    return scan


_scan_back, _narrow_scan_back = _scan_back_of(True), _scan_back_of(False)


@contracted
def _scan_back_broadcast(
    b, head, d0, d1, t, dt, steps, end, decay, reset, states, grads, h0, grad_decay, grad_impulse, g, total
):
    """As ``_scan_back`` for a broadcast decay: ``total`` is its gradient, in 64 bits."""
    b_decay, varies, h_decay = _broadcast(decay, b, head)
    t, dt, varies = _unsigned(t, dt, varies)
    one_decay = decay.shape[3] < states.shape[3]
    for _ in range(steps):
        h_before = h0[b, head, d0:d1] if t == np.uintp(end) else states[b, t + dt, head, d0:d1]
        a, grad, grad_x = decay[b_decay, t * varies, h_decay], grads[b, t, head, d0:d1], grad_impulse[b, t, head, d0:d1]
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
        if varies:  # the gradient of this step's decay is a sum over channels
            grad_decay[b, t, head, 0] = total.sum()
            total[:] = 0
        t += dt


@compiled
def _backward_steps(
    b, d0, d1, first, dt, steps, end, chunk, decay, reset, states, grads, h0, grad_decay, grad_impulse, g
):
    block = _steps_per_head(steps, g)
    total = np.zeros(g.shape, dtype=(g[0] * np.float64(1)).dtype)
    one_decay, varies = decay.shape[3] < states.shape[3], decay.shape[1] != 1
    for done in range(0, steps, block):
        t, count = first + dt * done, min(block, steps - done)
        for head in range(len(g)):
            if varies and not one_decay and _is_narrow(g):
                _narrow_scan_back(
                    b, head, d0, d1, t, dt, count, end, decay, reset, states, grads, h0, grad_decay, grad_impulse,
                    g[head],
                )  # fmt: skip
            elif varies and not one_decay:
                _scan_back(
                    b, head, d0, d1, t, dt, count, end, decay, reset, states, grads, h0, grad_decay, grad_impulse,
                    g[head],
                )  # fmt: skip
            else:
                _scan_back_broadcast(
                    b, head, d0, d1, t, dt, count, end, decay, reset, states, grads, h0, grad_decay, grad_impulse,
                    g[head], total[head],
                )  # fmt: skip
    if not varies:
        for head in range(len(g)):
            if one_decay:
                grad_decay[b, chunk, head, 0] = total[head].sum()
            else:
                for i in range(d1 - d0):
                    grad_decay[b, chunk, head, d0 + i] = total[head, i]


@contracted
def _summary(b, head, d0, d1, t, dt, steps, decay, reset, impulse, adjoint, product, power, end):
    """Summarise these steps as the map h -> ``product`` * 2 ** (60 * ``power``) * h + ``end``.

    The adjoint adds before it multiplies. Returns whether there is a reset: then the result does
    not depend on h, even if h is NaN.
    """
    b_decay, varies, h_decay = _broadcast(decay, b, head)
    t, dt, varies = _unsigned(t, dt, varies)
    resets = False
    product[:] = 1
    power[:] = 0
    end[:] = 0
    for step in range(steps):
        a, x = decay[b_decay, t * varies, h_decay, d0:d1], impulse[b, t, head, d0:d1]
        dropped = reset.size > 0 and reset[b, t]
        if dropped:
            resets = True
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
        t += dt
    return resets


@contracted
def _summary_one_channel(b, head, d0, t, dt, steps, decay, reset, impulse, adjoint, product, power, end):
    """As ``_summary`` for one channel, in registers."""
    b_decay, varies, h_decay = _broadcast(decay, b, head)
    t, dt, varies = _unsigned(t, dt, varies)
    resets, powers = False, 0
    product[0], end[0] = 1, 0
    p, state = product[0], end[0]
    for step in range(steps):
        a, x = decay[b_decay, t * varies, h_decay, d0], impulse[b, t, head, d0]
        dropped = reset.size > 0 and reset[b, t]
        if dropped:
            resets, state = True, end[0]
        if not adjoint:
            state = a * state + x
            p *= a
        elif not dropped:
            state = np.conj(a) * (state + x)
            p *= np.conj(a)
        if step % 32 == 0:
            p, more = _rescaled(p)
            powers += more
        t += dt
    product[0], power[0], end[0] = p, powers, state
    return resets


@compiled
def _rescaled(product):
    """The product scaled into 2 ** -60 .. 2 ** 60, and the power of 2 ** 60 that was removed."""
    size = abs(product.real) + abs(product.imag)
    if 0 < size < 1 / _UNIT:
        return product * _UNIT, -1
    if _UNIT < size < np.inf:
        return product / _UNIT, 1
    return product * 1.0, 0  # * 1.0 gives all results the same Numba type: float64 or complex128


@compiled
def _broadcast(decay, b, head):
    """The decay's indices for a batch row and head, and whether it varies in time: 0 or 1."""
    return b * (decay.shape[0] != 1), 1 * (decay.shape[1] != 1), head * (decay.shape[2] != 1)


@compiled
def _unsigned(t, dt, varies):
    """Unsigned, so that Numba does not test for negative indices. Adding a dt of -1 wraps."""
    return np.uintp(t), np.uintp(dt), np.uintp(varies)


@compiled
def _is_narrow(h):
    """Whether rows are so short that prefetching them costs more than it gains."""
    return h.shape[1] * h.itemsize < 128


@compiled
def _ahead(h, rows, dt):
    """The number of steps by which rows are prefetched ahead."""
    return dt * -(-PREFETCH_BYTES // (h.size * h.itemsize * rows.shape[2]))


@compiled
def _steps_per_head(steps, h):
    """The number of steps of one head before the next head: its rows stay in the cache."""
    return max(1, steps if len(h) == 1 else _HEAD_BYTES // (h.size * h.itemsize))


# --- launching ---

# The words of a launch, after the header: flags, sizes and addresses, with the addresses of the
# arrays last.
_REVERSE, _SIZES, _DECAY_SIZES, _CHUNKS, _CHUNK_STEPS, _HAS_RESET, _RESET, _DECAY, _ARRAYS = (
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
def _span(words, chunk, adjoint):
    """The first step of a chunk, its direction dt, its number of steps, the last step of all."""
    T, length = words[_SIZES + 1], words[_CHUNK_STEPS]
    start = chunk * length
    steps = min(length, T - start)
    if (words[_REVERSE] != 0) != adjoint:
        return T - 1 - start, -1, steps, 0
    return start, 1, steps, T - 1


@compiled
def _begin(words, b, d0, d1, chunk, decay, reset, impulse, carry, adjoint):
    """The initial state of a chunk, and whether its final state is already available.

    It is available if this is neither the first nor the last chunk and its summary is finite. A
    product of growing decays may overflow where the states do not; the next chunk then waits until
    this one is complete.
    """
    first, dt, steps, _ = _span(words, chunk, adjoint)
    has_summary = 0 < chunk < words[_CHUNKS] - 1
    heads = impulse.shape[2] if has_summary else 0
    product, end = np.empty((heads, d1 - d0), impulse.dtype), np.empty((heads, d1 - d0), impulse.dtype)
    power = np.empty((heads, d1 - d0), np.int64)
    resets = False
    for head in range(heads):
        p, n, e = product[head], power[head], end[head]
        if d1 - d0 == 1:
            resets = _summary_one_channel(b, head, d0, first, dt, steps, decay, reset, impulse, adjoint, p, n, e)
        else:
            resets = _summary(b, head, d0, d1, first, dt, steps, decay, reset, impulse, adjoint, p, n, e)
        if not resets:
            for i in range(d1 - d0):
                if not np.isfinite(p[i]):
                    has_summary = False
    wait_for(words, b, d0, chunk)
    h = np.empty((impulse.shape[2], d1 - d0), impulse.dtype)
    for head in range(len(h)):
        for i in range(d1 - d0):
            h[head, i] = carry[b, head, d0 + i]
            if has_summary:
                after = end[head, i]
                if not resets:
                    after += product[head, i] * _scaled(h[head, i], power[head, i])
                carry[b, head, d0 + i] = after
    if has_summary:
        signal(words, b, d0)
    return h, has_summary


@compiled
def _scaled(x, power):
    """x * 2 ** (60 * power), which overflows or underflows only if the result does."""
    x, factor = x * 1.0, _UNIT if power > 0 else 1 / _UNIT
    for _ in range(min(abs(power), _MOST_POWERS)):
        x *= factor
    return x


@compiled
def _finish(words, b, d0, d1, carry, h, available):
    """Make the final state available if ``_begin`` did not."""
    if not available:
        for head in range(len(h)):
            for i in range(d1 - d0):
                carry[b, head, d0 + i] = h[head, i]
        signal(words, b, d0)


@cache
def _forward(dtype: np.dtype) -> Any:
    def run(words):
        B, T, H, D, decay, reset = _unpack(words, dtype)
        impulse = carray(pointer(words[_ARRAYS]), (B, T, H, D), dtype)
        states = carray(pointer(words[_ARRAYS + 1]), (B, T, H, D), dtype)
        carry = carray(pointer(words[_ARRAYS + 2]), (B, H, D), dtype)
        while True:
            chunk, b, d0, d1 = next_task(words, D)
            if b < 0:
                return
            first, dt, steps, _ = _span(words, chunk, False)
            h, available = _begin(words, b, d0, d1, chunk, decay, reset, impulse, carry, False)
            _forward_steps(b, d0, d1, first, dt, steps, decay, reset, impulse, states, h)
            _finish(words, b, d0, d1, carry, h, available)

    return c_function(run)


@cache
def _backward(dtype: np.dtype) -> Any:
    def run(words):
        B, T, H, D, decay, reset = _unpack(words, dtype)
        rows = words[_CHUNKS] if decay.shape[1] == 1 else T
        states = carray(pointer(words[_ARRAYS]), (B, T, H, D), dtype)
        grads = carray(pointer(words[_ARRAYS + 1]), (B, T, H, D), dtype)
        h0 = carray(pointer(words[_ARRAYS + 2]), (B, H, D), dtype)
        grad_decay = carray(pointer(words[_ARRAYS + 3]), (B, rows, H, decay.shape[3]), dtype)
        grad_impulse = carray(pointer(words[_ARRAYS + 4]), (B, T, H, D), dtype)
        carry = carray(pointer(words[_ARRAYS + 5]), (B, H, D), dtype)
        while True:
            chunk, b, d0, d1 = next_task(words, D)
            if b < 0:
                return
            first, dt, steps, end = _span(words, chunk, True)
            g, available = _begin(words, b, d0, d1, chunk, decay, reset, grads, carry, True)
            _backward_steps(
                b, d0, d1, first, dt, steps, end, chunk, decay, reset, states, grads, h0, grad_decay, grad_impulse, g
            )
            _finish(words, b, d0, d1, carry, g, available)

    return c_function(run)


class _Plan(NamedTuple):
    """How a launch is divided: channels per task, threads, chunks of time, and steps per chunk."""

    width: int
    threads: int
    chunks: int
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
    threads = min(threads, cores())  # the others would wait for a thread without a core
    steps = max(1, min(-(-T // -(-threads // tasks)), _CHUNK_BYTES // row))
    return _Plan(width, threads, -(-T // steps), steps)


def _launch(
    kernel: Callable,
    decay: Tensor,
    arrays: tuple[Tensor, ...],
    reset: Tensor | None,
    reverse: bool,
    plan: _Plan | None = None,
) -> None:
    """Run ``kernel`` on all tasks (chunk of time, batch row, block of channels).

    ``arrays`` are in the order in which the C functions above unpack them: (impulse, states, carry)
    in the forward, (states, grad_states, h0, grad_decay, grad_impulse, carry) in the backward. They
    must be contiguous, of one dtype, and alive during the call.
    """
    like = arrays[0]
    B, T, H, D = like.shape
    if B * H * D == 0:
        return
    plan = plan or _plan(like, decay)
    words = (
        *(reverse, B, T, H, D, *decay.shape, plan.chunks, plan.steps),
        *(reset is not None, reset.data_ptr() if reset is not None else 0),
        *(x.data_ptr() for x in (decay, *arrays)),
    )
    launch(kernel(_numpy_dtype(like.dtype)), plan.chunks, B, D, plan.width, plan.threads, words)


@cache
def _numpy_dtype(dtype: torch.dtype) -> np.dtype:
    return torch.empty(0, dtype=dtype, device="cpu").numpy().dtype
