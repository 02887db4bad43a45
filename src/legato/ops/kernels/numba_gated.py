"""The gated recurrence on a CPU, compiled by Numba: gates, scan and output gate in one pass over the products.

    c_t = f_t c_{t-1} + w_t g(candidate_t),  h_t = o_t s(c_t) + (1 - o_t) skip_t

The forward reads each product once and writes c and h. The backward recomputes the gates from the
products and writes the gradients of the products into one array. Everything is in float32.
``numba_threads.py`` launches the kernels; the arguments are those of ``ops/gated.py``.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray  # pyright: ignore[reportPrivateImportUsage]
from numba.core import types

from legato._gate_spec import GateSpec
from legato._shapes import Bool, Float, Tensor
from legato.ops.kernels.numba_cache import c_function, compiled
from legato.ops.kernels.numba_threads import (
    HEADER,
    PREFETCH_BYTES,
    block_width,
    empty,
    intrinsic,
    launch,
    next_task,
    pointer,
    prefetch,
    threads_for,
)


def forward(
    inputs: list[Tensor],
    weights: list[Tensor],
    bias: Float[Tensor, "K"] | None,
    addend: Float[Tensor, "B T K"] | None,
    initial_state: Float[Tensor, "B C"] | None,
    reset: Bool[Tensor, "B T"] | None,
    spec: GateSpec,
    output_tanh: bool,
    save_products: bool,
) -> tuple[Float[Tensor, "B T K"] | None, Float[Tensor, "B T C"] | None, Float[Tensor, "B T C"], Float[Tensor, "B C"]]:
    """Products (None if not saved), h_t (None without output gate), c_t or c_{t-1}, the last c."""
    like: Any = (*inputs, addend)[0]
    (B, T), K = like.shape[:2], addend.shape[-1] if addend is not None else len(weights[0])
    C = K // len(spec.blocks)
    saved = empty(like, B, T, K) if save_products else None
    states, output = empty(like, B, T, C), empty(like, B, T, C) if "output" in spec.blocks else None
    carry = like.new_zeros(B, C) if initial_state is None else initial_state.contiguous().clone()
    skip = inputs[0] if spec.skips_input else None
    kernel = _forward()
    for chunk in _chunks(B, T, K):
        products = _products(inputs, weights, bias, addend, chunk, saved)
        arrays = _blocks(products, spec) | _select(chunk, skip=skip, states=states, gated_output=output, reset=reset)
        arrays = _addressable(arrays | {"carry": carry[chunk[0]]})
        launch(kernel, *_call(arrays, spec, output_tanh))
    return saved, output, states, carry


def backward(
    grad_output: Float[Tensor, "B T C"] | None,
    grad_states: Float[Tensor, "B T C"] | None,
    grad_final: Float[Tensor, "B C"] | None,
    saved_products: Float[Tensor, "B T K"] | None,
    states: Float[Tensor, "B T C"],
    wanted: list[bool],
    inputs: list[Tensor],
    weights: list[Tensor],
    bias: Float[Tensor, "K"] | None,
    addend: Float[Tensor, "B T K"] | None,
    initial_state: Float[Tensor, "B C"] | None,
    reset: Bool[Tensor, "B T"] | None,
    spec: GateSpec,
    output_tanh: bool,
) -> tuple[list[Tensor | None], list[Tensor], Tensor | None, Tensor | None, Float[Tensor, "B C"]]:
    """The gradients of the ``wanted`` inputs, and of weights, bias, addend and initial state."""
    B, T, C = states.shape
    K = C * len(spec.blocks)
    grad_inputs = [empty(x, *x.shape) if want else None for x, want in zip(inputs, wanted, strict=True)]
    grad_weights = [torch.zeros_like(w) for w in weights]
    grad_bias = None if bias is None else torch.zeros_like(bias)
    grad_addend = None if addend is None else empty(addend, B, T, K)
    skip, grad_skip = (inputs[0], grad_inputs[0]) if spec.skips_input else (None, None)
    carry = states.new_zeros(B, C) if grad_final is None else grad_final.contiguous().clone()
    first = states.new_zeros(B, C) if initial_state is None else initial_state
    if "output" in spec.blocks and grad_output is None:
        grad_output = states.new_zeros(()).expand(B, T, C)
    kernel = _backward()
    for chunk in reversed(_chunks(B, T, K)):
        rows, steps = chunk
        products = saved_products[chunk] if saved_products is not None else None
        if products is None:
            products = _products(inputs, weights, bias, addend, chunk, None)
        grad_products = torch.empty_like(products) if grad_addend is None else grad_addend[chunk]
        arrays = _blocks(products, spec) | {f"grad_{k}": x for k, x in _blocks(grad_products, spec).items()}
        arrays |= _select(chunk, skip=skip, states=states, grad_states=grad_states)
        arrays |= _select(chunk, grad_gated_output=grad_output, grad_skip=grad_skip, reset=reset)
        if spec.skips_input and grad_skip is None:
            arrays["grad_skip"] = torch.empty_like(states[chunk])  # the kernel writes it, and nothing reads it
        arrays |= {"carry": carry[rows], "initial": states[rows, steps.start - 1] if steps.start else first[rows]}
        arrays = _addressable(arrays)
        launch(kernel, *_call(arrays, spec, output_tanh))
        flat = grad_products.flatten(0, 1)  # (rows * steps, K)
        for i, (x, w, grad) in enumerate(zip(inputs, weights, grad_inputs, strict=True)):
            grad_weights[i].addmm_(flat.mT, x[chunk].flatten(0, 1))
            if grad is not None:
                beta = 1 if spec.skips_input and i == 0 else 0
                grad[chunk].view(len(flat), -1).addmm_(flat, w, beta=beta)
        if grad_bias is not None:
            grad_bias += flat.sum(0)
    return grad_inputs, grad_weights, grad_bias, grad_addend, carry


def prepare(dtype: torch.dtype, adjoint: bool) -> None:
    """Compile what ``forward`` or (``adjoint``) ``backward`` launches; ``dtype`` is float32."""
    (_backward if adjoint else _forward)()


def _chunks(B: int, T: int, K: int) -> list[tuple[slice, slice]]:
    """Slices of batch rows and steps, in order of time, whose products fit the cache."""
    steps = max(1, _CHUNK_NUMBERS // K)
    rows = max(1, steps // max(T, 1))
    return [
        (slice(b, min(b + rows, B)), slice(t, min(t + steps, T)))
        for b in range(0, B, rows)
        for t in range(0, max(T, 1), steps)
    ]


def _products(inputs, weights, bias, addend, chunk, saved):
    """addend + bias + sum of weight x for one chunk, as a view of ``saved`` or in new memory."""
    if not inputs:
        return addend[chunk]
    rows, steps = (s.stop - s.start for s in chunk)
    out = inputs[0].new_empty(rows, steps, len(weights[0])) if saved is None else saved[chunk]
    flat = out.view(-1, out.shape[-1])
    if addend is not None:
        out.copy_(addend[chunk] if bias is None else addend[chunk] + bias)
    elif bias is not None:
        flat.copy_(bias)
    for i, (x, w) in enumerate(zip(inputs, weights, strict=True)):
        flat.addmm_(x[chunk].flatten(0, 1), w.mT, beta=1 if i or addend is not None or bias is not None else 0)
    return out


def _blocks(products: Tensor, spec: GateSpec) -> dict[str, Tensor | None]:
    """The blocks of the products by name; "output" is the output gate before its sigmoid."""
    return dict(zip(spec.blocks, products.chunk(len(spec.blocks), dim=-1), strict=True))


def _select(chunk: tuple[slice, slice], **arrays: Tensor | None) -> dict[str, Tensor | None]:
    """The chunk of each array that is not None."""
    return {name: x[chunk] for name, x in arrays.items() if x is not None}


# The products of a chunk: 8 MiB. Smaller chunks cost more launches, larger ones do not fit the
# caches (two layers of SRU at (1, 65536): 0.58 s per training step, with 1 MiB 0.71 s and with 64
# MiB 0.90 s).
_CHUNK_NUMBERS = 1 << 21
# Channels per task: a dozen rows of them fit the L1 cache.
_WIDEST = 512

# The table of arrays in the words of a launch: address, bytes per row, bytes per step. An address
# of 0: no array.
_NAMES = ("forget", "write", "candidate", "output", "skip", "states", "gated_output", "carry")
_NAMES += (*(f"grad_{name}" for name in _NAMES[:-1]), "initial")
_FORGET, _WRITE, _CANDIDATE, _OUTPUT, _SKIP, _STATES, _GATED_OUTPUT, _CARRY = range(8)
_GRAD_FORGET, _GRAD_WRITE, _GRAD_CANDIDATE, _GRAD_OUTPUT, _GRAD_SKIP = range(8, 13)
_GRAD_STATES, _GRAD_GATED_OUTPUT, _INITIAL = range(13, 16)
# The words: sizes, flags, the resets, the table.
_T, _C, _CANDIDATE_TANH, _OUTPUT_TANH, _DELAYED, _RESET = range(HEADER, HEADER + 6)
_TABLE = HEADER + 6


# --- exp, sigmoid and tanh in float32, as arithmetic that the compiler can vectorise ---


@intrinsic
def _bits(_, x):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(types.int32))

    return types.int32(types.float32), generate


@intrinsic
def _float_of(_, bits):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(types.float32))

    return types.float32(types.int32), generate


def _contracted(kernel: Callable) -> Any:
    """Compile with fused multiply-add instructions."""
    return compiled(kernel, fastmath={"contract"})


# Adding this rounds to an integer, which is then in the lowest bits.
_ROUNDER = np.float32(1.5 * 2**23)
_LOG2_E = np.float32(1.44269504)
# ln 2 as a sum of two numbers. The first has few bits, so that k times it is exact.
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194442e-4)
# Below this exp underflows; 0 is used.
_LOWEST = np.float32(-87.3)
# (exp(r) - 1 - r) / r^2 on abs(r) <= ln(2) / 2, interpolated at Chebyshev points: the error of exp is 1e-9.
_P0, _P1, _P2 = np.float32(0.5), np.float32(0.16666667), np.float32(0.041666467)
_P3, _P4, _P5 = np.float32(0.0083332984), np.float32(0.0013933652), np.float32(1.9899287e-4)
_ZERO, _ONE, _TWO = np.float32(0), np.float32(1), np.float32(2)


@_contracted
def _parts_of_exp(x):
    """s and p such that exp(x) = s + s p, where s is a power of two; x <= 0."""
    x = _LOWEST if x < _LOWEST else x  # NaN stays NaN
    shifted = x * _LOG2_E + _ROUNDER
    k = shifted - _ROUNDER
    r = (x - k * _LN2_HIGH) - k * _LN2_LOW
    p = r + r * r * (_P0 + r * (_P1 + r * (_P2 + r * (_P3 + r * (_P4 + r * _P5)))))
    s = _float_of((_bits(shifted) << np.int32(23)) + np.int32(0x3F800000))
    return s, p


@_contracted
def _sigmoids(x):
    """sigmoid(x) and sigmoid(-x), each accurate to a few units in its own last place."""
    a = -abs(x)
    s, p = _parts_of_exp(a)
    e = _ZERO if a < _LOWEST else s + s * p
    large = _ONE / (_ONE + e)
    small = e * large
    return (large if x >= _ZERO else small), (small if x >= _ZERO else large)


@_contracted
def _tanh(x):
    """-expm1(-2 abs(x)) / (2 + expm1(-2 abs(x))) with the sign of x."""
    s, p = _parts_of_exp(-_TWO * abs(x))
    m = s * p + (s - _ONE)
    y = (_ZERO - m) / (_TWO + m)
    return y if x >= _ZERO else -y


@compiled
def _gate_row(x, gate, complement):
    for i in range(x.size):
        gate[i], complement[i] = _sigmoids(x[i])


@compiled
def _tanh_row(x, y):
    for i in range(x.size):
        y[i] = _tanh(x[i])


# --- one step: rows of channels, each a small function over 1-D arrays that stay in the L1 cache ---


@compiled
def _update_row(h, f, w, v, states):
    for i in range(h.size):
        state = f[i] * h[i] + w[i] * v[i]
        h[i] = state
        states[i] = state


@compiled
def _output_row(o, y, output):
    for i in range(o.size):
        output[i] = o[i] * y[i]


@compiled
def _output_and_skip_row(o, past, y, skip, output):
    for i in range(o.size):
        output[i] = o[i] * y[i] + past[i] * skip[i]


@compiled
def _row(words, which, b, t, d0, n):
    entry = _TABLE + 3 * which
    address = words[entry] + b * words[entry + 1] + t * words[entry + 2] + 4 * d0
    return carray(pointer(address), (n,), np.float32)


@compiled
def _is_given(words, which):
    return words[_TABLE + 3 * which] != 0


@compiled
def _prefetch_rows(words, first, last, b, t, d0, n):
    for which in range(first, last):
        if _is_given(words, which):
            prefetch(_row(words, which, b, t, d0, n), 0)


@compiled
def _reset_at(words, b, t):
    if words[_RESET] == 0:
        return False
    return carray(pointer(words[_RESET] + b * words[_T] + t), (1,), np.bool_)[0]


@compiled
def _forward_task(words, b, d0, n):
    T, delayed = words[_T], words[_DELAYED] != 0
    candidate_tanh, output_tanh = words[_CANDIDATE_TANH] != 0, words[_OUTPUT_TANH] != 0
    tied, has_output, has_skip = not _is_given(words, _WRITE), _is_given(words, _OUTPUT), _is_given(words, _SKIP)
    scratch = np.empty((6, n), np.float32)
    h, f, w, unused, v, y = scratch[0], scratch[1], scratch[2], scratch[3], scratch[4], scratch[5]
    carry = _row(words, _CARRY, b, 0, d0, n)
    h[:] = carry
    distance = -(-PREFETCH_BYTES // (4 * n))
    for t in range(T):
        if t + distance < T:
            _prefetch_rows(words, _FORGET, _CARRY, b, t + distance, d0, n)
        if _reset_at(words, b, t):
            h[:] = 0
        _gate_row(_row(words, _FORGET, b, t, d0, n), f, w)
        if not tied:
            _gate_row(_row(words, _WRITE, b, t, d0, n), w, unused)
        written = _row(words, _CANDIDATE, b, t, d0, n)
        if candidate_tanh:
            _tanh_row(written, v)
            written = v
        states = _row(words, _STATES, b, t, d0, n)
        if delayed:
            states[:] = h
            states = y
        _update_row(h, f, w, written, states)
        if has_output:
            if output_tanh:
                _tanh_row(h, y)
            else:
                y[:] = h
            _gate_row(_row(words, _OUTPUT, b, t, d0, n), f, w)
            if has_skip:
                _output_and_skip_row(f, w, y, _row(words, _SKIP, b, t, d0, n), _row(words, _GATED_OUTPUT, b, t, d0, n))
            else:
                _output_row(f, y, _row(words, _GATED_OUTPUT, b, t, d0, n))
    carry[:] = h


@compiled
def _add_row(total, x):
    for i in range(total.size):
        total[i] += x[i]


@compiled
def _grad_output_row(g, grad, o, past, y, grad_output):
    for i in range(g.size):
        g[i] += grad[i] * o[i]
        grad_output[i] = grad[i] * y[i] * o[i] * past[i]


@compiled
def _grad_output_and_skip_row(g, grad, o, past, y, skip, grad_output, grad_skip):
    for i in range(g.size):
        g[i] += grad[i] * o[i]
        grad_output[i] = grad[i] * (y[i] - skip[i]) * o[i] * past[i]
        grad_skip[i] = grad[i] * past[i]


@compiled
def _times_tanh_slope_row(g, y):
    for i in range(g.size):
        g[i] *= _ONE - y[i] * y[i]


@compiled
def _tied_row(g, f, w, v, previous, grad_forget, grad_written):
    for i in range(g.size):
        here = g[i]
        grad_forget[i] = here * (previous[i] - v[i]) * f[i] * w[i]
        grad_written[i] = here * w[i]
        g[i] = here * f[i]


@compiled
def _forget_row(g, f, closed, previous, grad_forget):
    for i in range(g.size):
        here = g[i]
        grad_forget[i] = here * previous[i] * f[i] * closed[i]


@compiled
def _written_row(g, w, closed, v, grad_write, grad_written):
    for i in range(g.size):
        here = g[i]
        grad_write[i] = here * v[i] * w[i] * closed[i]
        grad_written[i] = here * w[i]


@compiled
def _backward_task(words, b, d0, n):
    T, delayed = words[_T], words[_DELAYED] != 0
    candidate_tanh, output_tanh = words[_CANDIDATE_TANH] != 0, words[_OUTPUT_TANH] != 0
    tied, has_output, has_skip = not _is_given(words, _WRITE), _is_given(words, _OUTPUT), _is_given(words, _SKIP)
    scratch = np.zeros((6, n), np.float32)
    g, f, closed, v, y, zeros = (
        scratch[0], scratch[1], scratch[2], scratch[3], scratch[4], scratch[5],
    )  # fmt: skip
    carry = _row(words, _CARRY, b, 0, d0, n)
    g[:] = carry
    distance = -(-PREFETCH_BYTES // (4 * n))
    for step in range(T):
        t = T - 1 - step
        if t >= distance:
            _prefetch_rows(words, _FORGET, _STATES + 1, b, t - distance, d0, n)
            _prefetch_rows(words, _GRAD_FORGET, _INITIAL, b, t - distance, d0, n)
        dropped = _reset_at(words, b, t)
        if dropped:
            previous = zeros
        elif delayed:
            previous = _row(words, _STATES, b, t, d0, n)
        elif t > 0:
            previous = _row(words, _STATES, b, t - 1, d0, n)
        else:
            previous = _row(words, _INITIAL, b, 0, d0, n)
        # The gradient of c_t: from the output and from the states.
        if has_output:
            grad = _row(words, _GRAD_GATED_OUTPUT, b, t, d0, n)
            state = _row(words, _STATES, b, t, d0, n)
            grad_output = _row(words, _GRAD_OUTPUT, b, t, d0, n)
            _gate_row(_row(words, _OUTPUT, b, t, d0, n), f, closed)
            if output_tanh:
                _tanh_row(state, y)
                state = y
                v[:] = g
                g[:] = 0
            if has_skip:
                skip, grad_skip = _row(words, _SKIP, b, t, d0, n), _row(words, _GRAD_SKIP, b, t, d0, n)
                _grad_output_and_skip_row(g, grad, f, closed, state, skip, grad_output, grad_skip)
            else:
                _grad_output_row(g, grad, f, closed, state, grad_output)
            if output_tanh:
                _times_tanh_slope_row(g, y)
                _add_row(g, v)
        if _is_given(words, _GRAD_STATES) and not delayed:
            _add_row(g, _row(words, _GRAD_STATES, b, t, d0, n))
        # The gradients of the gates and of the previous state.
        written = _row(words, _CANDIDATE, b, t, d0, n)
        if candidate_tanh:
            _tanh_row(written, v)
            written = v
        grad_forget, grad_candidate = _row(words, _GRAD_FORGET, b, t, d0, n), _row(words, _GRAD_CANDIDATE, b, t, d0, n)
        if tied:
            _gate_row(_row(words, _FORGET, b, t, d0, n), f, closed)
            _tied_row(g, f, closed, written, previous, grad_forget, grad_candidate)
        else:
            _gate_row(_row(words, _WRITE, b, t, d0, n), f, closed)
            _written_row(g, f, closed, written, _row(words, _GRAD_WRITE, b, t, d0, n), grad_candidate)
            _gate_row(_row(words, _FORGET, b, t, d0, n), f, closed)
            _forget_row(g, f, closed, previous, grad_forget)
            _times_row(g, f)
        if candidate_tanh:
            _times_tanh_slope_row(grad_candidate, v)
        if dropped:
            g[:] = 0
        elif delayed and _is_given(words, _GRAD_STATES):
            _add_row(g, _row(words, _GRAD_STATES, b, t, d0, n))
    carry[:] = g


@compiled
def _times_row(g, f):
    for i in range(g.size):
        g[i] *= f[i]


# --- launching ---


@cache
def _forward() -> Any:
    def run(words):
        while True:
            _, b, d0, d1 = next_task(words, words[_C])
            if b < 0:
                return
            _forward_task(words, b, d0, d1 - d0)

    return c_function(run)


@cache
def _backward() -> Any:
    def run(words):
        while True:
            _, b, d0, d1 = next_task(words, words[_C])
            if b < 0:
                return
            _backward_task(words, b, d0, d1 - d0)

    return c_function(run)


def _addressable(arrays: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """The arrays that are not None, with contiguous channels; resets are fully contiguous.

    Time and batch may have any stride. The kernel takes addresses, so the caller must hold
    references to the arrays until it has run.
    """
    given = {name: x for name, x in arrays.items() if x is not None}
    return {name: x if x.stride(-1) == 1 and name != "reset" else x.contiguous() for name, x in given.items()}


def _call(arrays: dict[str, Tensor], spec: GateSpec, output_tanh: bool) -> tuple:
    """The arguments of ``launch`` after the kernel: chunks of time, rows, channels, width, threads and words."""
    B, T, C = arrays["states"].shape
    table = []
    for name in _NAMES:
        x = arrays.get(name)
        table += (0, 0, 0) if x is None else (x.data_ptr(), 4 * x.stride(0), 4 * x.stride(1) if x.ndim == 3 else 0)
    options = spec.candidate_tanh, output_tanh, spec.delayed
    words = (T, C, *options, arrays["reset"].data_ptr() if "reset" in arrays else 0, *table)
    threads = threads_for(B * T * C)
    return 1, B, C, block_width(B, C, _WIDEST, 4, threads), threads, words
