"""A NaN or an infinity at one step is seen where the recurrence, run step by step, brings it, and nowhere else."""

import pytest
import torch

import draws
from legato.ops.matrix import matrix_recurrence
from legato.ops.recurrence import linear_recurrence
from legato.ops.time_invariant import apply, lti, prepare

BATCH, ROW = 3, 1
every_value = pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)


def system(order, per_channel=0):
    generator = draws.generator(order)
    shape = (per_channel, order, order) if per_channel else (order, order)
    Q, _ = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64))
    return 0.95 * Q, torch.randn(shape[:-1], generator=generator, dtype=torch.float64)


def of_lti(channels=3, order=4, per_channel=False, prepared=False, **options):
    A, B = system(order, channels if per_channel else 0)

    def run(u, state, reset, **changes):
        if prepared:
            return apply(u, prepare(A, B, u.shape[1], dtype=u.dtype, **options), state, reset=reset)
        return lti(u, A, B, state, reset=reset, **(options | changes))

    return run, (channels,), (channels, order)


def of_matrices(per_step, reverse=False):
    def run(x, state, reset):
        A = system(4)[0].to(x.dtype)
        if per_step:
            A = A.expand(*x.shape[:2], 4, 4) * torch.linspace(0.9, 1, x.shape[1]).to(x.dtype)[:, None, None]
        return matrix_recurrence(A, x, state, reset=reset, reverse=reverse)

    return run, (2, 4), (2, 4)


def of_decays(backend, reverse=False):
    def run(x, state, reset):
        decay = torch.linspace(0.5, 1, x.shape[1])[:, None].to(x.dtype)
        return linear_recurrence(decay, x, state, reset=reset, reverse=reverse, backend=backend)

    return run, (3,), (3,)


CASES = {
    **{f"lti-{method}": of_lti(method=method) for method in ("sequential", "toeplitz", "fft", "chunked")},
    "lti-prepared": of_lti(prepared=True),
    "lti-channels-last": of_lti(channels=16),
    "lti-per-channel": of_lti(per_channel=True),
    "lti-order-1": of_lti(order=1),
    **{f"matrices-{p}-{r}": of_matrices(p, r) for p in (False, True) for r in (False, True)},
    **{f"decays-{b}-{r}": of_decays(b, r) for b in ("reference", "torch", "numba") for r in (False, True)},
}


def arguments(case, steps, dtype=torch.float32):
    run, channels, state = CASES[case]
    generator = draws.generator(steps)
    x = torch.randn(BATCH, steps, *channels, generator=generator, dtype=dtype)
    return run, x, torch.randn(BATCH, *state, generator=generator, dtype=dtype), case.endswith("True")


def spoiled_at(x, at, value):
    spoiled = x.clone()
    spoiled[(ROW, at, 1, 2)[: x.ndim]] = value
    return spoiled


def reached(states, at, reverse, until=None):
    """Which of these states, or of final states, follow from the spoiled number: by the step-by-step loop, all of its
    channel from its own step on, and at that step those that it enters."""
    after = torch.zeros(states.shape, dtype=torch.bool)
    after[(ROW, slice(until, at + 1) if reverse else slice(at, until), 1)] = True
    return after


def assert_unchanged(case, found, clean, x):
    """Equal bit for bit, but for a transform over the whole length: log2(2 T) levels of roundings of numbers whose
    squares add up to those of the response times those of the input."""
    if case != "lti-fft":
        assert torch.equal(found, clean)
        return
    A, B = system(4)
    response = torch.stack([torch.linalg.matrix_power(A, k) @ B for k in range(x.shape[1])])
    levels = 2 * x.shape[1]
    bound = 8 * torch.finfo(x.dtype).eps * levels.bit_length() * (response.norm() * x[ROW].norm()).item()
    assert (found - clean).abs().max() <= bound


@every_value
@pytest.mark.parametrize("steps", [1, 7, 65, 100])
@pytest.mark.parametrize("case", CASES)
def test_only_later_states_of_the_channel_are_spoiled(case, steps, value):
    run, x, state, reverse = arguments(case, steps)
    clean, clean_final = run(x, state, None)
    for at in {0, steps // 2, steps - 1}:
        states, final = run(spoiled_at(x, at, value), state, None)
        after = reached(states, at, reverse)
        others = torch.ones(final.shape, dtype=torch.bool)
        others[ROW, 1] = False
        assert_unchanged(case, states[~after], clean[~after], x)
        assert torch.equal(final[others], clean_final[others])
        if case.startswith("matrices"):  # it enters one number of the state, which enters the others a step later
            entered = states[ROW, at, 1].isfinite()
            assert entered.tolist() == [True, True, False, True]
            after[ROW, at, 1] = ~entered
        assert torch.equal(states.isfinite(), ~after)
        last = states[:, 0 if reverse else -1]
        assert torch.equal(final.isfinite(), last.isfinite())


@every_value
@pytest.mark.parametrize("steps", [7, 65, 100])
@pytest.mark.parametrize("case", [case for case in CASES if case != "lti-fft"])
def test_a_reset_ends_what_is_spoiled(case, steps, value):
    run, x, state, reverse = arguments(case, steps)
    for at, cut in ((steps // 2, steps // 2 + 2), (0, steps - 1), (steps // 2, steps // 2 + 1)):
        at, cut = (steps - 1 - at, steps - 1 - cut) if reverse else (at, cut)
        reset = torch.zeros(BATCH, steps, dtype=torch.bool)
        reset[:, cut] = True
        clean, clean_final = run(x, state, reset)
        states, final = run(spoiled_at(x, at, value), state, reset)
        after = reached(states, at, reverse, until=cut + 1 if reverse else cut)
        assert torch.equal(states[~after], clean[~after])
        assert torch.equal(final, clean_final)


@pytest.mark.parametrize("case", [case for case in CASES if case != "lti-fft"])
def test_a_reset_at_the_first_step_drops_a_spoiled_state(case):
    run, x, state, reverse = arguments(case, 65)
    reset = torch.zeros(BATCH, 65, dtype=torch.bool)
    reset[:, -1 if reverse else 0] = True
    x.requires_grad_()
    for got, want in zip(run(x, torch.full_like(state, torch.nan), reset), run(x, state, reset), strict=True):
        assert torch.equal(got, want)


@every_value
@pytest.mark.parametrize("steps", [7, 100])
@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_gradients_of_earlier_outputs_are_clean(case, resets, steps, value):
    run, x, state, reverse = arguments(case, steps)
    if resets and case == "lti-fft":
        return
    reset = torch.zeros(BATCH, steps, dtype=torch.bool) if resets else None
    at = steps // 2
    if resets:
        reset[:, at // 2] = True

    def gradients(x):
        x, h = x.requires_grad_(), state.clone().requires_grad_()
        states, _ = run(x, h, reset)
        weight = torch.linspace(0.5, 1.5, states.numel()).view(states.shape)
        return torch.autograd.grad(
            states[~reached(states, at, reverse)] @ weight[~reached(states, at, reverse)], [x, h]
        )

    for got, want in zip(gradients(spoiled_at(x, at, value)), gradients(x.clone()), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("case", ["lti-chunked", "lti-fft", "lti-channels-last"])
@pytest.mark.parametrize("steps", [7, 100])
def test_the_gradient_passes_a_spoiled_input_as_in_the_loop(case, steps):
    run, x, state, _ = arguments(case, steps, torch.float64)
    x = spoiled_at(x, steps // 2, torch.nan).requires_grad_()
    (found,) = torch.autograd.grad(run(x, state, None)[0].sum(), x)
    (expected,) = torch.autograd.grad(run(x, state, None, method="sequential")[0].sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert expected.all()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("resets", [False, True])
def test_chunks_on_a_gpu_spoil_later_states_only(resets, reverse, short_chunks):
    decay, x, state = torch.rand(BATCH, 65, 3), torch.randn(BATCH, 65, 3), torch.randn(BATCH, 3)
    reset = torch.zeros(BATCH, 65, dtype=torch.bool) if resets else None
    if resets:
        reset[:, 35] = True
    found, clean = (
        linear_recurrence(decay, given, state, reset=reset, reverse=reverse, backend="triton")[0]
        for given in (spoiled_at(x, 32, torch.nan), x)
    )
    after = reached(found, 32, reverse, until=35 if resets and not reverse else None)
    assert torch.equal(found[~after], clean[~after])
    assert torch.equal(found.isfinite(), ~after)


@every_value
@pytest.mark.parametrize("backend", ["torch", "numba", "triton"])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_spoiled_decay_acts_as_in_the_loop(reverse, backend, value, short_chunks):
    decay, x, state = torch.rand(BATCH, 30, 3), torch.randn(BATCH, 30, 3), torch.randn(BATCH, 3)
    reset = torch.zeros(BATCH, 30, dtype=torch.bool)
    reset[:, [14, 20]] = True
    for row, at in enumerate((0, 12, 29)):
        decay[row, at, 1] = value
    found, expected = (
        linear_recurrence(decay, x, state, reset=reset, reverse=reverse, backend=name)
        for name in (backend, "reference")
    )
    for got, want in zip(found, expected, strict=True):
        finite = want.isfinite()
        assert torch.equal(got.isfinite(), finite)
        # Up to 30 steps of two roundings each, on states of which none is above the sum of 30 numbers below 5.
        bound = 60 * torch.finfo(torch.float32).eps * 150
        torch.testing.assert_close(got[finite], want[finite], rtol=0, atol=bound)


@every_value
@pytest.mark.parametrize("backend", ["reference", "torch", "numba"])
@pytest.mark.parametrize("reverse", [False, True])
def test_the_first_decay_touches_the_state_gradient_alone(reverse, backend, value):
    decay, x, state = torch.rand(BATCH, 9, 3), torch.randn(BATCH, 9, 3), torch.randn(BATCH, 3)
    (clean,) = gradient_of_the_impulse(decay, x, state, reverse, backend)
    decay[ROW, -1 if reverse else 0, 1] = value
    (found,) = gradient_of_the_impulse(decay, x, state, reverse, backend)
    assert torch.equal(found, clean)


def gradient_of_the_impulse(decay, x, state, reverse, backend):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(linear_recurrence(decay, x, state, reverse=reverse, backend=backend)[0].sum(), x)


@pytest.mark.parametrize("channels", [3, 16])
@pytest.mark.parametrize("method", ["fft", "chunked"])
def test_earlier_states_are_finite_under_transforms(method, channels):
    A, B = system(4)
    u = torch.randn(BATCH, 70, channels)
    u[ROW, 40, 1] = torch.nan
    run = of_lti(channels, method=method)[0]
    expected = lti(u, A, B, method="sequential")[0]
    after = reached(expected, 40, False)
    # A rotation keeps lengths, so no term is above 5 |B|; 70 terms and as many roundings, or levels of a transform.
    bound = 70 * 70 * torch.finfo(torch.float32).eps * 5 * B.norm().item()
    for states in (
        torch.vmap(lambda u: run(u[None], None, None)[0][0])(u),
        torch.func.jvp(lambda u: run(u, None, None)[0], (u,), (torch.ones_like(u),))[0],
        run(torch.complex(u, torch.ones_like(u)), None, None)[0].real,
        run(u.double(), None, None)[0].float(),
    ):
        assert torch.equal(states.isfinite(), ~after)
        torch.testing.assert_close(states[~after], expected[~after], rtol=0, atol=bound)
    gradient = torch.func.vmap(torch.func.grad(lambda u: run(u[None], None, None)[0][:, :40].sum()))(u)
    clean = torch.func.grad(lambda u: run(u, None, None)[0][:, :40].sum())(u.nan_to_num())
    torch.testing.assert_close(gradient, clean, rtol=0, atol=bound)
