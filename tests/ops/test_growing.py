"""Growing systems, whose powers overflow although no state does: values and gradients are those of the loop.

All numbers here are positive, so that a sum is as exact as its terms and errors are relative: a few roundings a step.
"""

import math

import pytest
import torch

import bounds
import legato
from legato.ops.matrix import matrix_recurrence
from legato.ops.recurrence import linear_recurrence
from legato.ops.time_invariant import METHODS, apply, lti, prepare

GROWTH = 1.3
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
FORMS = [{"method": method} for method in METHODS] + [{}, {"last_only": True}]


def long_enough(dtype, times):
    """The length at which GROWTH to its power is the largest number of the dtype, to the power of ``times``."""
    return int(times * math.log(torch.finfo(dtype).max) / math.log(GROWTH))


def late_ones(dtype, channels=1):
    x = torch.zeros(2, long_enough(dtype, 3), channels, dtype=dtype)
    x[:, -100:] = 1
    return x


def tiny(dtype, channels=1):
    """Numbers that grow nearly as far as the dtype goes."""
    return torch.full((2, long_enough(dtype, 1.5), channels), torch.finfo(dtype).max ** -0.8, dtype=dtype)


def bound(x):
    return 8 * x.shape[1] * torch.finfo(x.dtype).eps


def assert_equal(found, expected, rtol):
    torch.testing.assert_close(found.double(), expected.double(), rtol=rtol, atol=torch.finfo(found.dtype).tiny)


def system(order, channels=0):
    """Eigenvalues GROWTH and, but for order 1, GROWTH - 0.2."""
    A = torch.tensor([[GROWTH]]) if order == 1 else torch.tensor([[GROWTH - 0.1, 0.1], [0.1, GROWTH - 0.1]])
    A = A.double().expand(*[channels] * bool(channels), -1, -1).clone()
    return A, torch.ones(A.shape[:-1], dtype=torch.float64)


@every_dtype
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(("channels", "order", "per_channel"), [(1, 1, False), (2, 2, True), (16, 2, False)])
@pytest.mark.parametrize("inputs", [late_ones, tiny])
def test_a_time_invariant_system_is_the_loop(inputs, channels, order, per_channel, form, dtype):
    u = inputs(dtype, channels)
    A, B = system(order, channels if per_channel else 0)
    found = lti(u, A, B, **form)
    expected = lti(u.double(), A, B, method="sequential")
    if form.get("last_only"):
        assert found[0].shape == expected[1].shape
    else:
        assert_equal(found[0], expected[0], bound(u))
    assert_equal(found[1], expected[1], bound(u))


@every_dtype
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("channels", [1, 16])
def test_gradients_of_a_time_invariant_system_are_the_loops(channels, form, dtype):
    u = tiny(dtype, channels)

    def gradients(u, **form):
        A, B = system(2)
        given = [u.clone(), A, B, u[0, 0, 0].expand(2, channels, 2).clone()]
        given = [x.requires_grad_() for x in given]
        final = lti(*given, **form)[1]
        return torch.autograd.grad((final * final.new_tensor(u[0, 0, 0].item())).sum(), given)

    for found, want in zip(gradients(u, **form), gradients(u.double(), method="sequential"), strict=True):
        assert_equal(found, want, bound(u))


@every_dtype
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_powers_that_are_not_used_have_no_gradient(form, dtype):
    if form.get("last_only"):
        return
    u = late_ones(dtype).requires_grad_()
    A, B = (x.requires_grad_() for x in system(1))
    memory, _ = lti(u, A, B, **form)
    gradients = torch.autograd.grad(memory[:, :10].sum(), [u, A, B])
    assert not gradients[1].any()
    assert not gradients[2].any()
    assert torch.equal(gradients[0][:, :10] > 0, torch.ones_like(u[:, :10], dtype=torch.bool))
    assert not gradients[0][:, 10:].any()


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("growth", [1.05, 40.0, 1e30])
def test_a_state_in_the_direction_that_shrinks_stays_there(growth, form):
    A = torch.diag(torch.tensor([growth, 0.9], dtype=torch.float64))
    state = torch.tensor([0.0, 1.0]).expand(1, 3, 2)
    _, final = lti(torch.zeros(1, 2000, 3), A, torch.zeros(2), state, **form)
    expected = lti(torch.zeros(1, 2000, 3), A, torch.zeros(2), state, method="sequential")[1]
    assert torch.equal(final[..., 0], torch.zeros(1, 3))
    assert_equal(final, expected, 2000 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("channels", [2, 16])
def test_kernels_for_short_inputs_serve_long_ones_that_grow(channels):
    u = late_ones(torch.float32, channels)
    A, B = system(2)
    found = apply(u, prepare(A, B, 100))
    expected = lti(u.double(), A, B, method="sequential")
    for got, want in zip(found, expected, strict=True):
        assert_equal(got, want, bound(u))


@pytest.mark.parametrize("form", [form for form in FORMS if form.get("method") != "fft"], ids=str)
def test_resets_of_a_growing_system_are_the_loops(form):
    u = late_ones(torch.float32, 2)
    reset = torch.zeros(u.shape[:2], dtype=torch.bool)
    reset[:, 5] = reset[0, -50] = True
    state = torch.full((2, 2, 2), torch.nan)
    A, B = system(2)
    found, expected = lti(u, A, B, state, reset=reset, **form), lti(u.double(), A, B, state.double(), reset=reset)
    if not form.get("last_only"):
        assert found[0][:, :5].isnan().all()
        assert_equal(found[0][:, 5:], expected[0][:, 5:], bound(u))
    assert_equal(found[1], expected[1], bound(u))


def test_explain_says_that_powers_overflow():
    u = late_ones(torch.float32)
    lti(u, *system(1), method="fft")
    assert "lti: chunked (the powers of A overflow in 'fft')" in legato.explain()
    lti(u, torch.tensor([[20.0]]), torch.ones(1))
    assert "lti: sequential (the powers of A overflow in 'chunked')" in legato.explain()


def sudden(dtype, channels=1):
    """Few steps, for growth that overflows within a chunk."""
    x = torch.zeros(2, 60, channels, dtype=dtype)
    x[:, -2:] = 1
    return x


def results(run, transition, x, reverse, exact):
    """States, the final state, and the gradients of a sum that neither they nor it overflow."""
    transition, x = transition.clone().requires_grad_(), (x.flip(1) if reverse else x).clone().requires_grad_()
    states, final = run(transition, x)
    early = states[:, -2:] if reverse else states[:, :2]
    loss = early.sum() + (x.detach().abs().max() * final.sum() if exact else 0)
    return states, final, *torch.autograd.grad(loss, [transition, x])


def assert_is_loop(found, expected, rtol):
    for got, want in zip(found, expected, strict=True):
        finite = want.isfinite()
        assert torch.equal(got.isfinite(), finite)
        assert_equal(got[finite], want[finite], rtol)


@every_dtype
@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("inputs", "growth"), [(late_ones, GROWTH), (tiny, GROWTH), (sudden, 1e15)])
def test_a_matrix_recurrence_is_the_loop(inputs, growth, reverse, per_step, dtype):
    x = inputs(dtype, 2)
    A = system(2)[0].to(dtype) * (growth / GROWTH)
    A = A.expand(2, x.shape[1], 2, 2) if per_step else A

    def loop(A, x):
        h, states = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1])[:: -1 if reverse else 1]:
            h = (h.unsqueeze(1) @ (A[:, t] if per_step else A).mT).squeeze(1) + x[:, t]
            states.append(h)
        return torch.stack(states[:: -1 if reverse else 1], 1), h

    exact = inputs is tiny
    found = results(lambda A, x: matrix_recurrence(A, x, reverse=reverse), A, x, reverse, exact)
    assert_is_loop(found, results(loop, A, x, reverse, exact), 2 * bound(x))


@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("backend", "inputs", "growth"),
    [(backend, sudden, 1e15) for backend in ("torch", "numba", "triton")]
    + [(backend, inputs, GROWTH) for backend in ("torch", "numba") for inputs in (late_ones, tiny)],
)
def test_growing_decays_are_the_loop(backend, inputs, growth, reverse, per_step, short_chunks):
    x = inputs(torch.float32, 2)
    decay = torch.full((2, x.shape[1], 2) if per_step else (2,), growth)
    found, expected = (
        results(
            lambda decay, x, name=name: linear_recurrence(decay, x, reverse=reverse, backend=name),
            decay, x, reverse, inputs is tiny,
        )
        for name in (backend, "reference")
    )  # fmt: skip
    assert_is_loop(found, expected, 2 * bound(x))


@pytest.mark.parametrize("backend", ["torch", "numba", "triton"])
def test_a_state_returns_from_products_of_decays_that_underflow(backend, short_chunks):
    decay = torch.ones(1, 100, 1)
    decay[:, 50:52], decay[:, 60:62] = 1e-30, 1e30
    state = torch.full((1, 1), 1e30)
    found = linear_recurrence(decay, torch.zeros(1, 100, 1), state, backend=backend)
    expected = linear_recurrence(decay, torch.zeros(1, 100, 1), state, backend="reference")
    for got, want in zip(found, expected, strict=True):
        assert_equal(got, want, 100 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("decay", [1.05, 30.0, 1e15])
def test_time_cut_into_pieces_for_threads_is_the_loop(decay, channels, dtype):
    """A product of growing decays over a piece of time overflows while the states, zero until the end, do not."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        impulse = torch.zeros(1, 40_000, channels, dtype=dtype)
        impulse[:, -3:] = 1
        impulse.requires_grad_()
        decays = torch.full((1, 40_000, channels), decay, dtype=dtype, requires_grad=True)
        found = legato.linear_recurrence(decays, impulse, backend="numba")[0]
        expected = legato.linear_recurrence(decays.detach(), impulse.detach(), backend="reference")[0]
        # The chain ends in at most three products and sums, of one channel in registers or of many in memory.
        scale = decay**2 + decay + 1
        bounds.assert_close(found, expected.double(), magnitude=scale, roundings=12, dtype=dtype)
        gradients = torch.autograd.grad(found[:, :3].sum(), [decays, impulse])
        assert all(gradient.isfinite().all() for gradient in gradients)
    finally:
        torch.set_num_threads(before)
