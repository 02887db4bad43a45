"""The diagonal recurrence on a CPU, compiled by Numba: each number is read and written once, at the memory's speed.

The channels lie innermost. One task walks through time for one batch row and one block of channels, with the carry in
a small array that stays in the L1 cache. How tasks reach threads is in ``numba_threads.py``.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray  # pyright: ignore[reportPrivateImportUsage]

from legato._shapes import Bool, Inexact, Tensor
from legato.ops.kernels.numba_threads import (
    HEADER,
    NARROWEST_BYTES,
    PREFETCH_BYTES,
    block_width,
    c_function,
    compiled,
    launch,
    next_task,
    pointer,
    prefetch,
    threads_for,
)

# A row of a task: its arrays (five in the backward) must fit the L1 data cache, 32 KiB on small machines.
_BLOCK_BYTES = 4096


def forward(
    decay: Inexact[Tensor, "Bd Td Hd Dd"],
    impulse: Inexact[Tensor, "B T H D"],
    initial_state: Inexact[Tensor, "B H D"] | None,
    reset: Bool[Tensor, "B T"] | None,
    reverse: bool,
) -> tuple[Inexact[Tensor, "B T H D"], Inexact[Tensor, "B H D"]]:
    """h_t = decay_t * h_{t-1} + impulse_t; the arguments are those of ``reference.forward``."""
    dtype, carry_dtype = impulse.dtype, torch.promote_types(impulse.dtype, torch.float32)
    decay, impulse = decay.to(carry_dtype), impulse.to(carry_dtype)
    states = torch.empty_like(impulse)
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
    dtype, carry_dtype = states.dtype, torch.promote_types(states.dtype, torch.float32)
    decay_shape, decay_dtype = decay.shape, decay.dtype
    decay, states, grad_states = decay.to(carry_dtype), states.to(carry_dtype), grad_states.to(carry_dtype)
    grad_impulse = torch.empty_like(states)
    # One gradient a batch row and head, in the decay's own shape over time and channels; the rest is summed below.
    grad_decay = states.new_empty((states.shape[0], decay_shape[1], states.shape[2], decay_shape[3]))
    if states.numel() == 0:
        grad_decay.zero_()
    grad_initial = _carry(grad_final, states)
    h0 = _carry(initial_state, states)
    _launch(_backward, decay, (states, grad_states, h0, grad_decay, grad_impulse, grad_initial), reset, reverse)
    return grad_decay.sum_to_size(decay_shape).to(decay_dtype), grad_impulse.to(dtype), grad_initial


def _carry(state: Tensor | None, like: Tensor) -> Tensor:
    """A fresh (B, H, D) array that the kernel may write, holding ``state`` or zeros."""
    B, _, H, D = like.shape
    return like.new_zeros((B, H, D)) if state is None else state.clone(memory_format=torch.contiguous_format)


# --- the kernels: plain loops, compiled when first called and kept in Numba's cache on disk ---
# Each row of channels is one small function over 1-D arrays: LLVM vectorises those, and not the same loops inline.


@compiled
def _row(h, a, x, out):
    for i in range(h.size):
        state = a[i] * h[i] + x[i]
        h[i] = state
        out[i] = state


@compiled
def _row_one_decay(h, a, x, out):
    for i in range(h.size):
        state = a * h[i] + x[i]
        h[i] = state
        out[i] = state


@compiled
def _forward_task(b, d0, d1, decay, reset, reverse, impulse, states, carry):
    _, T, H, D = impulse.shape
    b_decay, t_decay, h_decay = decay.shape[0] != 1, decay.shape[1] != 1, decay.shape[2] != 1
    h = carry[b, :, d0:d1].copy()
    distance = -(-PREFETCH_BYTES // (H * (d1 - d0) * h.itemsize))
    for step in range(T):
        t = T - 1 - step if reverse else step
        if reset.size > 0 and reset[b, t]:
            h[:] = 0
        ahead = t - distance if reverse else t + distance
        near = 0 <= ahead < T
        for head in range(H):
            if near:
                prefetch(impulse[b, ahead, head, d0:d1])
                prefetch(states[b, ahead, head, d0:d1])
                if t_decay:
                    prefetch(decay[b if b_decay else 0, ahead, head if h_decay else 0])
            h_row, x, out = h[head], impulse[b, t, head, d0:d1], states[b, t, head, d0:d1]
            a = decay[b if b_decay else 0, t if t_decay else 0, head if h_decay else 0]
            if a.size == D:
                _row(h_row, a[d0:d1], x, out)
            else:
                _row_one_decay(h_row, a[0], x, out)
    carry[b, :, d0:d1] = h


@compiled
def _gradient_row(g, grad, a, h_before, grad_a, grad_x):
    for i in range(g.size):
        here = g[i] + grad[i]
        grad_x[i] = here
        grad_a[i] = np.conj(h_before[i]) * here
        g[i] = np.conj(a[i]) * here


@compiled
def _arrive_row(g, grad, grad_x):
    for i in range(g.size):
        here = g[i] + grad[i]
        g[i] = here
        grad_x[i] = here


@compiled
def _add_product_row(total, h_before, g):
    for i in range(g.size):
        total[i] += np.conj(h_before[i]) * g[i]


@compiled
def _pass_on_row(g, a):
    for i in range(g.size):
        g[i] = np.conj(a[i]) * g[i]


@compiled
def _pass_on_row_one_decay(g, a):
    for i in range(g.size):
        g[i] = np.conj(a) * g[i]


@compiled
def _backward_task(b, d0, d1, decay, reset, reverse, states, grad_states, h0, grad_decay, grad_impulse, carry):
    _, T, H, D = states.shape
    b_decay, t_decay, h_decay = decay.shape[0] != 1, decay.shape[1] != 1, decay.shape[2] != 1
    one_decay = decay.shape[3] < D
    g = carry[b, :, d0:d1].copy()
    distance = -(-PREFETCH_BYTES // (H * (d1 - d0) * g.itemsize))
    # A gradient that sums over time or channels does so in 64 bits: the sum may be long.
    total = np.zeros(g.shape, dtype=(g[0] * np.float64(1)).dtype)
    for step in range(T):
        t = step if reverse else T - 1 - step
        before = t + 1 if reverse else t - 1
        dropped = reset.size > 0 and reset[b, t]
        ahead = t + distance if reverse else t - distance
        near = 0 <= ahead < T
        for head in range(H):
            if near:
                prefetch(grad_states[b, ahead, head, d0:d1])
                prefetch(states[b, ahead, head, d0:d1])
                prefetch(grad_impulse[b, ahead, head, d0:d1])
                if t_decay:
                    prefetch(decay[b if b_decay else 0, ahead, head if h_decay else 0])
                    prefetch(grad_decay[b, ahead, head])
            g_row, grad, grad_x = g[head], grad_states[b, t, head, d0:d1], grad_impulse[b, t, head, d0:d1]
            h_before = states[b, before, head, d0:d1] if step < T - 1 else h0[b, head, d0:d1]
            a = decay[b if b_decay else 0, t if t_decay else 0, head if h_decay else 0]
            if t_decay and not one_decay and not dropped:
                _gradient_row(g_row, grad, a[d0:d1], h_before, grad_decay[b, t, head, d0:d1], grad_x)
                continue
            _arrive_row(g_row, grad, grad_x)
            if dropped:
                g_row[:] = 0
            else:
                _add_product_row(total[head], h_before, g_row)
                if one_decay:
                    _pass_on_row_one_decay(g_row, a[0])
                else:
                    _pass_on_row(g_row, a[d0:d1])
            if t_decay:  # this step's own sum over channels, or nothing where the state was dropped
                if one_decay:
                    grad_decay[b, t, head, 0] = total[head].sum()
                else:
                    grad_decay[b, t, head, d0:d1] = 0
                total[head] = 0
    if not t_decay:
        for head in range(H):
            if one_decay:
                grad_decay[b, 0, head, 0] = total[head].sum()
            else:
                grad_decay[b, 0, head, d0:d1] = total[head]
    carry[b, :, d0:d1] = g


# --- launching ---

# The words of a launch, after the header: flags, sizes, and addresses; those of the arrays come last.
_REVERSE, _SIZES, _DECAY_SIZES, _HAS_RESET, _RESET, _DECAY, _ARRAYS = (
    HEADER, HEADER + 1, HEADER + 5, HEADER + 9, HEADER + 10, HEADER + 11, HEADER + 12,
)  # fmt: skip


@compiled
def _unpack(words, dtype):
    B, T, H, D = words[_SIZES], words[_SIZES + 1], words[_SIZES + 2], words[_SIZES + 3]
    Bd, Td, Hd, Dd = words[_DECAY_SIZES], words[_DECAY_SIZES + 1], words[_DECAY_SIZES + 2], words[_DECAY_SIZES + 3]
    decay = carray(pointer(words[_DECAY]), (Bd, Td, Hd, Dd), dtype)
    reset = carray(pointer(words[_RESET]), (B * words[_HAS_RESET], T), np.bool_)
    return B, T, H, D, decay, reset, words[_REVERSE] != 0


@cache
def _forward(dtype: np.dtype) -> Any:
    def run(words):
        B, T, H, D, decay, reset, reverse = _unpack(words, dtype)
        impulse = carray(pointer(words[_ARRAYS]), (B, T, H, D), dtype)
        states = carray(pointer(words[_ARRAYS + 1]), (B, T, H, D), dtype)
        carry = carray(pointer(words[_ARRAYS + 2]), (B, H, D), dtype)
        while True:
            b, d0, d1 = next_task(words, D)
            if b < 0:
                return
            _forward_task(b, d0, d1, decay, reset, reverse, impulse, states, carry)

    return c_function(run)


@cache
def _backward(dtype: np.dtype) -> Any:
    def run(words):
        B, T, H, D, decay, reset, reverse = _unpack(words, dtype)
        states = carray(pointer(words[_ARRAYS]), (B, T, H, D), dtype)
        grad_states = carray(pointer(words[_ARRAYS + 1]), (B, T, H, D), dtype)
        h0 = carray(pointer(words[_ARRAYS + 2]), (B, H, D), dtype)
        grad_decay = carray(pointer(words[_ARRAYS + 3]), (B, decay.shape[1], H, decay.shape[3]), dtype)
        grad_impulse = carray(pointer(words[_ARRAYS + 4]), (B, T, H, D), dtype)
        carry = carray(pointer(words[_ARRAYS + 5]), (B, H, D), dtype)
        while True:
            b, d0, d1 = next_task(words, D)
            if b < 0:
                return
            _backward_task(b, d0, d1, decay, reset, reverse, states, grad_states, h0, grad_decay, grad_impulse, carry)

    return c_function(run)


def _launch(kernel: Callable, decay: Tensor, arrays: tuple[Tensor, ...], reset: Tensor | None, reverse: bool) -> None:
    """Run ``kernel`` on all (batch row, block of channels) tasks, in as many threads as torch uses.

    ``arrays``, in the order in which the C functions above unpack them: (impulse, states, carry) forward, (states,
    grad_states, h0, grad_decay, grad_impulse, carry) backward; contiguous, of one dtype, and alive during the call.
    """
    like = arrays[0]
    B, T, H, D = like.shape
    if B * H * D == 0:
        return
    threads = threads_for(like.numel())
    widest = max(_BLOCK_BYTES // H, NARROWEST_BYTES) // like.element_size()
    width = D if decay.shape[3] < D else block_width(B, D, widest, like.element_size(), threads)
    words = (
        *(reverse, B, T, H, D, *decay.shape),
        *(reset is not None, reset.data_ptr() if reset is not None else 0),
        *(x.data_ptr() for x in (decay, *arrays)),
    )
    launch(kernel(_numpy_dtype(like.dtype)), B, D, width, threads, words)


@cache
def _numpy_dtype(dtype: torch.dtype) -> np.dtype:
    return torch.empty(0, dtype=dtype).numpy().dtype
