"""The Triton kernels against a loop: compiled on a GPU, else in Triton's interpreter on CPU tensors."""

import pytest
import torch

import bounds
import draws

pytest.importorskip("triton")

from legato.ops.kernels import triton_recurrence

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not triton_recurrence.INTERPRETED, reason="triton was imported before TRITON_INTERPRET was set"
)
NAMES = ("states", "final_state", "grad_decay", "grad_impulse", "grad_initial")


def loop(decay, impulse, h_0, reset, reverse, grad_states, grad_final):
    """Both passes as the equations have them, in the dtype of ``h_0``; results rounded to the impulse's dtype."""
    T, dtype, carry = impulse.shape[1], impulse.dtype, h_0.dtype
    a = decay.to(carry).expand(impulse.shape)
    h, states = h_0, torch.empty_like(impulse)
    order = list(reversed(range(T))) if reverse else list(range(T))
    keep = torch.ones_like(impulse[..., 0, 0], dtype=torch.bool) if reset is None else ~reset
    for t in order:
        h = a[:, t] * torch.where(keep[:, t, None, None], h, 0) + impulse[:, t].to(carry)
        states[:, t] = h.to(dtype)
    g, grad_a, grad_x = grad_final, torch.zeros_like(impulse, dtype=carry), torch.empty_like(impulse)
    for i in reversed(range(T)):
        t, kept = order[i], keep[:, order[i], None, None]
        g = grad_states[:, t].to(carry) + g
        grad_x[:, t] = g.to(dtype)
        before = states[:, order[i - 1]].to(carry) if i else h_0
        grad_a[:, t] = torch.where(kept, before.conj() * g, 0)
        g = torch.where(kept, a[:, t].conj() * g, 0)
    return states, h, grad_a.sum_to_size(decay.shape).to(dtype), grad_x, g


def example(B, T, H, D, dtype, *, decay_shape=None, resets=False, initial=True):
    generator = draws.generator(B + 10 * T + 100 * D)

    def normal(*shape, dtype=dtype):
        return torch.randn(shape, dtype=torch.promote_types(dtype, torch.float32), generator=generator).to(dtype)

    carry = torch.promote_types(dtype, torch.float32)
    decay = torch.rand(decay_shape or (B, T, H, D), generator=generator)
    if dtype.is_complex:
        decay = torch.polar(decay, 6.0 * torch.rand(decay.shape, generator=generator))
    reset = torch.rand(B, T, generator=generator) < 0.05 if resets else None
    h_0 = normal(B, H, D, dtype=carry) if initial else None
    both = decay.to(dtype), normal(B, T, H, D), h_0, reset, normal(B, T, H, D), normal(B, H, D, dtype=carry)
    return [x if x is None else x.to(DEVICE) for x in both]


def kernels(decay, impulse, h_0, reset, reverse, grad_states, grad_final):
    states, final_state = triton_recurrence.forward(decay, impulse, h_0, reset, reverse)
    grads = triton_recurrence.backward(grad_states, grad_final, decay, states, h_0, reset, reverse)
    return states, final_state, *grads


def check(decay, impulse, h_0, reset, grad_states, grad_final, *, reverse=False):
    """Every result against the loop in 64 bits, by the worst case of any order and any chunks."""
    dtype = impulse.dtype
    carry, wide = torch.promote_types(dtype, torch.float32), torch.complex128 if dtype.is_complex else torch.float64
    zeros = torch.zeros_like(grad_final) if h_0 is None else h_0

    def definition(decay, impulse, h_0, grad_states, grad_final):
        return loop(decay, impulse, h_0, reset, reverse, grad_states, grad_final)

    tensors = [x.to(wide) for x in (decay, impulse, zeros, grad_states, grad_final)]
    magnitude = bounds.majorant(definition, *tensors)
    T, summed = impulse.shape[1], impulse.numel() // max(decay.numel(), 1)
    # A product and a sum a step, and a running product where chunks are joined; a complex product counts three times,
    # and where 64 bits are compared with 64 bits, both have errors.
    each = (3 if dtype.is_complex else 1) * (2 if dtype == wide else 1)
    states, gradients = each * (3 * T + 2), each * (6 * T + 4 + summed)
    # Triton's interpreter cuts off what bfloat16 has no digits for: up to two roundings to the nearest.
    stored = 2 if dtype == torch.bfloat16 and DEVICE == "cpu" else 1
    found = kernels(decay, impulse, h_0, reset, reverse, grad_states, grad_final)
    for name, x, exact, scale in zip(NAMES, found, definition(*tensors), magnitude, strict=True):
        assert x.dtype == (carry if name in ("final_state", "grad_initial") else dtype)
        roundings, arithmetic = states if name in ("states", "final_state") else gradients, carry
        if name == "grad_decay" and dtype != carry:  # made of states that were stored in 16 bits
            roundings, arithmetic = stored + gradients * bounds.roundoff(carry) / bounds.roundoff(dtype), dtype
        bounds.assert_close(x, exact, magnitude=scale, roundings=roundings, dtype=arithmetic, stored=stored, name=name)


@pytest.fixture(autouse=True)
def quick_interpreter(monkeypatch):
    quicken(monkeypatch)


def quicken(monkeypatch):
    """The interpreter patches triton.language again at every call of a helper: once a launch is enough."""
    if triton_recurrence.INTERPRETED:
        interpreted = type(triton_recurrence._read)
        monkeypatch.setattr(interpreted, "__call__", lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs))


@pytest.fixture
def short_chunks(monkeypatch):
    """Chunks as they come with a million steps, at lengths that the interpreter can walk."""
    monkeypatch.setattr(
        triton_recurrence, "TUNING", triton_recurrence.Tuning(shortest_chunk=9, shortest_cut=0, group_bytes=16)
    )


@pytest.mark.parametrize(("B", "T", "D"), [(2, 0, 3), (2, 1, 65), (1, 63, 3), (1, 65, 64), (1, 65, 1), (1, 200, 1)])
@pytest.mark.parametrize("reverse", [False, True])
def test_values_and_gradients_are_the_loops_at_awkward_sizes(B, T, D, reverse):
    check(*example(B, T, 1, D, torch.float32), reverse=reverse)


@pytest.mark.parametrize(("B", "T", "D", "chunks"), [(1, 17, 65, 1), (2, 18, 33, 2), (1, 65, 3, 7), (1, 200, 1, 20)])
@pytest.mark.parametrize("reverse", [False, True])
def test_time_cut_into_chunks_gives_the_same(B, T, D, chunks, reverse, short_chunks):
    tensors = example(B, T, 1, D, torch.float32, resets=True)
    assert triton_recurrence._plan(tensors[1]).chunks == chunks
    check(*tensors, reverse=reverse)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.complex128])
@pytest.mark.parametrize("chunked", [False, True])
def test_every_dtype_with_its_carry(dtype, chunked, request):
    if chunked:
        request.getfixturevalue("short_chunks")
    check(*example(1, 37, 2, 3, dtype, decay_shape=(1, 37, 2, 1), resets=chunked), reverse=chunked)
    check(*example(1, 37, 2, 3, dtype, decay_shape=(1, 1, 2, 3)), reverse=not chunked)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("axes", range(1, 16))
def test_a_broadcast_decay_is_not_expanded(axes, chunked, request):
    if chunked:
        request.getfixturevalue("short_chunks")
    sizes = (2, 20, 2, 3)
    decay_shape = tuple(1 if axes >> i & 1 else size for i, size in enumerate(sizes))
    check(*example(*sizes, torch.float32, decay_shape=decay_shape, resets=chunked))


def test_the_gradient_is_autograds(short_chunks):
    decay, impulse, h_0, reset, grad_states, grad_final = example(2, 30, 1, 3, torch.complex128, resets=True)
    leaves = [x.requires_grad_() for x in (decay, impulse, h_0)]
    h, states = h_0, []
    for t in range(30):
        h = decay[:, t] * h.masked_fill(reset[:, t, None, None], 0) + impulse[:, t]
        states.append(h)
    states = torch.stack(states, 1)
    expected = torch.autograd.grad((states, h), leaves, (grad_states, grad_final))
    got = triton_recurrence.backward(grad_states, grad_final, *(x.detach() for x in (decay, states, h_0)), reset, False)

    def definition(decay, impulse, h_0, grad_states, grad_final):
        return loop(decay, impulse, h_0, reset, False, grad_states, grad_final)[2:]

    tensors = (x.detach() for x in (decay, impulse, h_0, grad_states, grad_final))
    # Three products and sums a step in either direction, three times for complex numbers, in both.
    bounds.assert_close(got, expected, magnitude=bounds.majorant(definition, *tensors), roundings=2 * 3 * 6 * 30)


@pytest.mark.parametrize("chunked", [False, True])
def test_no_initial_state_is_a_state_of_zeros(chunked, request):
    if chunked:
        request.getfixturevalue("short_chunks")
    check(*example(2, 20, 1, 5, torch.float32, initial=False))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("chunked", [False, True])
def test_nothing_passes_a_reset_not_even_nan(reverse, chunked, request):
    if chunked:
        request.getfixturevalue("short_chunks")
    decay, impulse, h_0, _, grad_states, grad_final = example(1, 30, 1, 3, torch.float32)
    reset = torch.zeros(1, 30, dtype=torch.bool, device=DEVICE)
    reset[0, 20 if not reverse else 9] = True
    before = slice(0, 20) if not reverse else slice(10, 30)
    after = slice(20, 30) if not reverse else slice(0, 10)
    clean = kernels(decay, impulse, h_0, reset, reverse, grad_states, grad_final)
    dirty = impulse.clone()
    dirty[:, before] = torch.nan
    spoilt = kernels(decay, dirty, h_0, reset, reverse, grad_states, grad_final)
    assert spoilt[0][:, before].isnan().all()
    for name, x, y in zip(NAMES, spoilt, clean, strict=True):
        if name in ("states", "grad_decay"):
            x, y = x[:, after], y[:, after]
        assert torch.equal(x, y), name
    late = grad_states.clone()
    late[:, after] = torch.nan
    spoilt = kernels(decay, impulse, h_0, reset, reverse, late, grad_final)
    assert torch.equal(spoilt[3][:, before], clean[3][:, before])
    assert torch.equal(spoilt[4], clean[4])


def test_programs_that_are_few_load_more_steps_together():
    def plan(B, T, D, dtype, *, deep):
        x = torch.empty((B, T, 1, D), dtype=dtype, device="meta")
        return triton_recurrence._plan(x, deep=deep)

    assert [plan(8, 8192, 1536, torch.float32, deep=deep).steps for deep in (True, False)] == [16, 8]
    assert [plan(8, 8192, 1536, torch.bfloat16, deep=deep).steps for deep in (True, False)] == [32, 16]
    assert [plan(B, 8192, 1536, torch.bfloat16, deep=True)[1] for B in (8, 128)] == [32, 64]
    assert plan(128, 8192, 1536, torch.float32, deep=True).steps == 8
    assert [plan(8, T, 1536, torch.float32, deep=True).steps for T in (1, 2, 3, 16, 17)] == [1, 1, 2, 8, 16]


@pytest.mark.parametrize("tuning", [{"group_bytes": 8}, {"warps": 2}, {"group_bytes": 64, "few_programs": 0}], ids=str)
def test_another_tuning_gives_the_same(tuning, monkeypatch):
    monkeypatch.setattr(
        triton_recurrence, "TUNING", triton_recurrence.TUNING._replace(shortest_chunk=9, shortest_cut=0, **tuning)
    )
    check(*example(1, 41, 1, 70, torch.float16, resets=True))


def test_time_is_cut_only_where_rows_do_not_fill_a_gpu():
    def plan(*shape, dtype=torch.float32):
        return triton_recurrence._plan(torch.empty(shape, dtype=dtype, device="meta"), deep=True)

    assert plan(8, 8192, 1, 1536).chunks == 1
    few = plan(1, 1 << 20, 1, 64)
    assert (few.chunks, few.length, few.grid) == (1024, 1024, (2048,))
    assert plan(8, 8192, 1, 1536, dtype=torch.bfloat16).chunks == 1
    assert [plan(1, T, 1, 64).chunks for T in (4095, 4096)] == [1, 32]  # too short to cut, and not
    for T in (1_000_003, 65_537, 4_097):
        uneven = plan(2, T, 3, 5, dtype=torch.bfloat16)
        assert (uneven.chunks - 1) * uneven.length < T <= uneven.chunks * uneven.length
