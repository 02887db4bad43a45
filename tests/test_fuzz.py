"""Random shapes, dtypes, options and values, against float64 oracles that are written apart from the library.

``make test`` runs a fixed number of cases, the same ones every time; ``make fuzz`` draws new ones for an hour.
"""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

import bounds
import draws
import legato
from legato.ops.time_invariant import METHODS
from test_contract import CASES, assert_close, build, in_one_pass, in_single_steps, magnitudes, results


def cases(number):
    """That many cases in ``make test``; the profile decides how many in ``make fuzz``."""
    if settings.get_current_profile_name() == "fuzz":
        return settings(suppress_health_check=list(HealthCheck))
    return settings(max_examples=number, suppress_health_check=list(HealthCheck))


LENGTHS = st.one_of(st.integers(0, 40), st.sampled_from([63, 64, 65, 100, 127, 129, 200]))


class Values:
    """Random tensors of a case, all from one seed."""

    def __init__(self, data):
        self.data = data
        self.generator = draws.generator(data.draw(st.integers(0, 2**32 - 1)))

    def normal(self, *shape, dtype=torch.float64, requires_grad=True):
        """Standard normal numbers that the dtype holds exactly."""
        x = torch.randn(shape, dtype=torch.promote_types(dtype, torch.float32), generator=self.generator).to(dtype)
        return x.requires_grad_(requires_grad)

    def decay(self, *shape, dtype):
        """Of absolute values from 0 to 1.05, of any sign or phase."""
        x = self.normal(*shape, dtype=dtype, requires_grad=False)
        size = torch.rand(shape, generator=self.generator) * self.data.draw(st.sampled_from([0.5, 1.0, 1.05]))
        return (x.sgn() * size).to(dtype).requires_grad_()

    def mask(self, *shape):
        p = self.data.draw(st.sampled_from([0.0, 0.05, 0.5, 1.0]))
        return torch.rand(shape, generator=self.generator) < p

    def strided(self, x):
        """The same numbers in another order in memory."""
        if self.data.draw(st.booleans()) and x.ndim:
            axis = self.data.draw(st.integers(0, x.ndim - 1))
            doubled = torch.repeat_interleave(x.detach(), 2, dim=axis)
            return doubled[(slice(None),) * axis + (slice(None, None, 2),)].requires_grad_(x.requires_grad)
        return x


def outputs_and_gradients(run, *leaves):
    """What ``run`` returns of the leaves that are not None, and the gradients of a weighted sum by each of them."""
    returned = list(run(*leaves))
    weights = [draws_like(y, i) for i, y in enumerate(returned)]
    given = [x for x in leaves if x is not None and x.requires_grad]
    loss = sum((w * y).sum() for w, y in zip(weights, returned, strict=True))
    loss = loss.real if loss.is_complex() else loss
    if not loss.requires_grad:
        return returned
    return returned + list(torch.autograd.grad(loss, given, materialize_grads=True))


def draws_like(y, number):
    """Weights of the outputs: positive, so that they serve for a majorant too."""
    return torch.rand(y.shape, generator=draws.generator(number), dtype=torch.float64).to(y.dtype)


def wide(x):
    """In float64 or complex128."""
    return x if x is None else x.detach().to(torch.promote_types(x.dtype, torch.float64)).requires_grad_()


def assert_right(run, oracle, leaves, roundings):
    """``run`` agrees with ``oracle``, whose results are sums of products of the leaves, values and gradients."""
    found = outputs_and_gradients(run, *leaves)
    exact = outputs_and_gradients(oracle, *map(wide, leaves))
    magnitude = bounds.majorant(lambda *x: outputs_and_gradients(oracle, *x), *map(wide, leaves))
    for i, (x, y, scale) in enumerate(zip(found, exact, magnitude, strict=True)):
        # The sum of a gradient over what is broadcast adds a rounding for each term.
        terms = max([1, *(max(1, f.numel()) for f in found[:1])])
        dtype = torch.promote_types(narrowest(leaves), torch.float32)
        bounds.assert_close(
            x, y, magnitude=scale, roundings=roundings + (terms if i >= 2 else 0), dtype=dtype, name=str(i)
        )


def narrowest(leaves):
    return min((x.dtype for x in leaves if x is not None), key=lambda dtype: dtype.itemsize / (1 + dtype.is_complex))


def diagonal_loop(reset, reverse):
    def run(decay, impulse, initial=None):
        decay = decay.expand(impulse.shape) if decay.ndim == impulse.ndim else decay.expand_as(impulse)
        h = torch.zeros_like(impulse[:, 0]) if initial is None else initial
        steps, states = range(impulse.shape[1]), {}
        for t in reversed(steps) if reverse else steps:
            if reset is not None:
                h = h.masked_fill(reset[:, t].view(-1, *[1] * (h.ndim - 1)), 0)
            h = states[t] = decay[:, t] * h + impulse[:, t]
        return torch.stack([states[t] for t in steps], 1), h

    return run


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128]


@cases(200)
@given(st.data())
def test_the_diagonal_recurrence_is_right(data):
    values, dtype = Values(data), data.draw(st.sampled_from(DTYPES))
    B, T = data.draw(st.integers(1, 3)), max(1, data.draw(LENGTHS))
    channels = data.draw(st.lists(st.integers(1, 5), max_size=3))
    shape = (B, T, *channels)
    of_decay = [n if data.draw(st.booleans()) else 1 for n in shape][data.draw(st.integers(0, len(shape))) :]
    reset = values.mask(B, T) if data.draw(st.booleans()) else None
    initial = values.normal(B, *channels, dtype=dtype) if data.draw(st.booleans()) else None
    reverse = data.draw(st.booleans())
    backend = data.draw(st.sampled_from([None, "reference", "torch", "numba"]))
    leaves = values.strided(values.decay(*of_decay, dtype=dtype)), values.strided(values.normal(*shape, dtype=dtype))

    def run(*leaves):
        return legato.linear_recurrence(*leaves, reset=reset, reverse=reverse, backend=backend)

    # A complex product has three roundings for one of a real product.
    each = 4 if dtype.is_complex else 1
    assert_right(run, diagonal_loop(reset, reverse), (*leaves, initial), each * (4 * T + 4) + stored_states(dtype))


def stored_states(dtype):
    """In 16 bits the backward pass reads states, and writes gradients, that are stored in them."""
    return 3 * torch.finfo(dtype).eps / torch.finfo(torch.float32).eps if dtype.itemsize == 2 else 0


def matrix_loop(reset, reverse):
    def run(A, impulse, initial=None):
        h = torch.zeros_like(impulse[:, 0]) if initial is None else initial
        steps, states = range(impulse.shape[1]), {}
        for t in reversed(steps) if reverse else steps:
            if reset is not None:
                h = h.masked_fill(reset[:, t].view(-1, *[1] * (h.ndim - 1)), 0)
            A_t = A if A.ndim == 2 else A[:, t].reshape(len(h), *[1] * (h.ndim - 2), *A.shape[2:])
            h = states[t] = (A_t @ h.unsqueeze(-1)).squeeze(-1) + impulse[:, t]
        return torch.stack([states[t] for t in steps], 1), h

    return run


@cases(100)
@given(st.data())
def test_the_matrix_recurrence_is_right(data):
    values, dtype = Values(data), data.draw(st.sampled_from([torch.float32, torch.float64, torch.complex128]))
    B, T, N = data.draw(st.integers(1, 2)), max(1, data.draw(LENGTHS)), data.draw(st.integers(1, 4))
    channels = data.draw(st.lists(st.integers(1, 3), max_size=2))
    varies = data.draw(st.booleans())
    A = (values.normal(*((B, T) if varies else ()), N, N, dtype=dtype) / (2 * N)).detach().requires_grad_()
    reset = values.mask(B, T) if data.draw(st.booleans()) else None
    initial = values.normal(B, *channels, N, dtype=dtype) if data.draw(st.booleans()) else None
    reverse = data.draw(st.booleans())

    def run(*leaves):
        return legato.matrix_recurrence(*leaves, reset=reset, reverse=reverse)

    each = 4 if dtype.is_complex else 1
    leaves = A, values.strided(values.normal(B, T, *channels, N, dtype=dtype)), initial
    assert_right(run, matrix_loop(reset, reverse), leaves, each * 4 * (T + 4) * (N + 2))


def lti_loop(reset, last_only):
    def run(u, A, B, initial=None):
        m = (u.new_zeros(*u[:, 0].shape, A.shape[-1])) if initial is None else initial
        memory = []
        for t in range(u.shape[1]):
            if reset is not None:
                m = m.masked_fill(reset[:, t, None, None], 0)
            m = (A @ m.unsqueeze(-1)).squeeze(-1) + u[:, t, :, None] * B
            memory.append(m)
        return (m if last_only else torch.stack(memory, 1)), m

    return run


@cases(150)
@given(st.data())
def test_the_time_invariant_memory_is_right(data):
    values, dtype = Values(data), data.draw(st.sampled_from([torch.float32, torch.float64]))
    batch, T, C, N = (data.draw(st.integers(1, n)) for n in (3, 1, 3, 4))
    T, C = max(1, data.draw(LENGTHS)), data.draw(st.sampled_from([C, 16]))
    own = (C,) if data.draw(st.booleans()) else ()
    last_only = data.draw(st.booleans())
    method = None if last_only else data.draw(st.sampled_from([None, *METHODS]))
    reset = values.mask(batch, T) if method != "fft" and data.draw(st.booleans()) else None
    initial = values.normal(batch, C, N, dtype=dtype) if data.draw(st.booleans()) else None
    A = (values.normal(*own, N, N) / (2 * N)).detach().requires_grad_()
    leaves = values.strided(values.normal(batch, T, C, dtype=dtype)), A, values.normal(*own, N), initial
    oracle = lti_loop(reset, last_only)

    def run(*leaves):
        return legato.lti(*leaves, method=method, last_only=last_only, reset=reset)

    found = outputs_and_gradients(run, *leaves)
    exact = outputs_and_gradients(oracle, *map(wide, leaves))
    magnitude = bounds.majorant(lambda *x: outputs_and_gradients(oracle, *x), *map(wide, leaves))
    # Sums of a chunk and its state, through as many levels as pairs of chunks make; kernels are rounded once.
    roundings = (64 + T + 2 * N) * (4 + 2 * math.ceil(math.log2(T + 1))) * N
    for i, (x, y, scale) in enumerate(zip(found, exact, magnitude, strict=True)):
        if method == "fft":  # its errors are spread evenly over time and channels
            scale = scale.max() * T
        bounds.assert_close(x, y, magnitude=scale, roundings=roundings + (x.numel() + T * batch * C if i >= 2 else 0),
                            dtype=dtype, name=f"{method} {i}")  # fmt: skip


@cases(40)
@given(st.data())
def test_layers_in_any_chunks_equal_single_steps(data):
    number = data.draw(st.sampled_from([i for i, case in enumerate(CASES) if case[0].__name__ != "bidirectional"]))
    layer = build(CASES[number], seed=data.draw(st.integers(0, 1000)))
    values, B, T = Values(data), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 70))
    lengths = torch.randint(T + 1, (B,), generator=values.generator) if data.draw(st.booleans()) else None
    reset = values.mask(B, T) if data.draw(st.booleans()) else None
    ends = sorted({*data.draw(st.lists(st.integers(0, T), max_size=4)), T})
    x = values.normal(B, T, layer.input_size)
    zeros = layer.initial_state(B)
    state = pytree.tree_map(lambda part: values.normal(*part.shape, dtype=part.dtype), zeros)

    def in_chunks(layer, x, state, lengths, reset):
        outputs, start = [], 0
        for end in ends:
            part, start = slice(start, end), end
            until = None if lengths is None else (lengths - part.start).clamp(0, end - part.start)
            output, state = layer(x[:, part], state, lengths=until, reset=None if reset is None else reset[:, part])
            outputs.append(output)
        return torch.cat(outputs, 1), state

    chunks = in_chunks if layer.return_sequences else in_one_pass
    found = results(layer, chunks, x, state, lengths, reset)

    expected = results(layer, in_single_steps, x, state, lengths, reset)
    magnitude = magnitudes(layer, x, state, lengths, reset)
    assert_close(found, expected, magnitude, steps=T)


@pytest.mark.parametrize("steps", [1, 5])
def test_the_oracles_tell_a_wrong_result(steps):
    """A relative error of 1e-4 in one number is found in float32."""
    x, decay = torch.randn(2, steps, 3), torch.rand(3)

    def wrong(decay, impulse):
        states, final = legato.linear_recurrence(decay, impulse)
        return states.index_put((torch.tensor(1), torch.tensor(steps - 1)), states[1, -1] * 1.0001), final

    with pytest.raises(AssertionError, match="elements are off"):
        assert_right(wrong, diagonal_loop(None, False), (decay, x), 4 * steps + 4)
