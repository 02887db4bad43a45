"""Every method of the time-invariant recurrence against the loop that defines it."""

import functools

import jaxtyping
import pytest
import torch
from torch.utils import _pytree as pytree

import bounds
import draws
import legato
from legato.legendre import delay_network
from legato.ops import time_invariant
from legato.ops.time_invariant import METHODS, apply, chunk_length, lti, prepare

RESETTING = [method for method in METHODS if method != "fft"]
ORDER = 5


@pytest.fixture
def shape_checker_off():
    """What a caller meets, to whom nothing checks the annotations."""
    was = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", was)


def by_loop(u, A, B, state=None, reset=None):
    """The definition, in the dtype of A."""
    batch, steps, channels = u.shape
    m = A.new_zeros(batch, channels, A.shape[-1]) if state is None else state
    memory = [m.new_zeros(batch, 0, channels, A.shape[-1])]
    for t in range(steps):
        if reset is not None:
            m = torch.where(reset[:, t, None, None], 0, m)
        m = (A @ m.unsqueeze(-1)).squeeze(-1) + B * u[:, t, :, None]
        memory.append(m.unsqueeze(1))
    return torch.cat(memory, dim=1), m


def example(steps, *, batch=3, channels=2, per_channel=False, state=True, reset=False, dtype=torch.float64):
    """Arguments of lti, with gradients on."""
    theta = torch.tensor([7.0, 40.0, 13.0][:channels]) if per_channel else 20.0
    A, B = delay_network(ORDER, theta)
    u = torch.randn(batch, steps, channels, dtype=dtype)
    m = torch.randn(batch, channels, ORDER, dtype=torch.promote_types(dtype, torch.float32)) if state else None
    cut = torch.rand(batch, steps) < 0.1 if reset else None
    return [x if x is None else x.requires_grad_() for x in (u, A, B, m)], cut


def with_gradients(function, tensors, **options):
    """The results at (u, A, B, state), and the gradients of a weighted sum of all, so that no part can hide another."""
    leaves = [x if x is None else x.detach().requires_grad_(x.requires_grad) for x in tensors]
    results = function(*leaves, **options)
    generator = draws.generator(1)
    weights = [torch.randn(x.shape, dtype=x.dtype, generator=generator) for x in results]
    sources = [x for x in leaves if x is not None and x.requires_grad]
    return *results, *torch.autograd.grad(results, sources, weights, materialize_grads=True)


def magnitudes(tensors, function=lti, **options):
    """Of the results of ``with_gradients``, in float64; of the chunked method, which takes the fewest operations."""
    options = {"method": "chunked", **options} if function is lti and not options.get("last_only") else options
    wide = [x if x is None else x.detach().to(torch.promote_types(x.dtype, torch.float64)) for x in tensors]
    wide = [x if x is None else x.requires_grad_(y.requires_grad) for x, y in zip(wide, tensors, strict=True)]
    return bounds.sensitivity(lambda tensors: with_gradients(function, tensors, **options), wide)


def assert_close(got, want, magnitude, steps, dtype=torch.float64):
    """Each number is a sum over time and order, through as many steps; where both are wide, both have errors."""
    sizes = [x.numel() for x in pytree.tree_leaves(want)]
    each = 2 if dtype == torch.float64 else 1
    counts = [each * bounds.likely(size, terms=max(steps, 1) * (ORDER + 1)) for size in sizes]
    bounds.assert_close(got, want, magnitude=magnitude, roundings=counts, dtype=dtype)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 63, 65, 200])
@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_the_loop_in_values_and_all_gradients(method, steps, state, reset, per_channel):
    if reset and method == "fft":
        pytest.skip("fft cannot reset")
    arguments, cut = example(steps, state=state, reset=reset, per_channel=per_channel)
    got = with_gradients(lti, arguments, method=method, reset=cut)
    want = with_gradients(by_loop, arguments, reset=cut)
    assert_close(got, want, magnitudes(arguments, reset=cut), steps)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 63, 200])
def test_the_last_state_alone_is_the_last_of_the_loop(steps, state, reset, per_channel):
    arguments, cut = example(steps, state=state, reset=reset, per_channel=per_channel)
    got = with_gradients(lti, arguments, last_only=True, reset=cut)
    want = with_gradients(lambda *x: by_loop(*x, reset=cut)[1:] * 2, arguments)
    assert_close(got, want, magnitudes(arguments, reset=cut, last_only=True), steps)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("lengths", [(70, 130), (1, 64), (33, 32, 31), (0, 5)])
def test_parts_with_the_state_carried_over_are_one_pass(method, lengths):
    steps = sum(lengths)
    arguments, _ = example(steps)

    def in_parts(u, A, B, state):
        parts = []
        for part in u.split(list(lengths), dim=1):
            piece, state = lti(part, A, B, state, method=method)
            parts.append(piece)
        return torch.cat(parts, dim=1), state

    want = with_gradients(lti, arguments, method=method)
    assert_close(with_gradients(in_parts, arguments), want, magnitudes(arguments), steps)


def many_channels(steps, *, state=True):
    """Arguments of lti for channels that share one system without gradients, which stay last in the store."""
    (u, A, B, m), _ = example(steps, channels=20, state=state)
    return u, A.detach(), B.detach(), m


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 31, 33, 65, 200])
def test_many_channels_equal_the_loop_with_all_gradients(steps, state):
    arguments = many_channels(steps, state=state)
    got, want = with_gradients(lti, arguments), with_gradients(by_loop, arguments)
    assert got[0].mT.is_contiguous() or steps == 1 or steps % chunk_length(steps)
    assert_close(got, want, magnitudes(arguments), steps)


def test_derivatives_of_many_channels_equal_the_loops():
    u, A, B, m = many_channels(50)
    directions = torch.randn_like(u), torch.randn_like(m)

    def derivatives(run, u, m, *directions):
        _, tangents = torch.func.jvp(run, (u.detach(), m.detach()), directions)
        u, m = (x.detach().requires_grad_() for x in (u, m))
        memory, _ = run(u, m)
        first = torch.autograd.grad(memory.square().sum(), (u, m), create_graph=True)
        second = torch.autograd.grad(sum((g * d).sum() for g, d in zip(first, directions, strict=True)), (u, m))
        return *tangents, *second

    got = derivatives(lambda u, m: lti(u, A, B, m, method="chunked"), u, m, *directions)

    def by_definition(*x):
        return derivatives(lambda u, m: by_loop(u, A, B, m), *x)

    # A second derivative sums over the steps twice, before and after the square.
    magnitude = bounds.sensitivity(by_definition, u, m, *directions)
    assert_close(got, by_definition(u, m, *directions), magnitude, 50 * 50)


def test_a_map_over_many_channels_is_the_loop_over_it():
    _, A, B, _ = many_channels(1)
    us, states = torch.randn(2, 3, 130, 20, dtype=torch.float64), torch.randn(2, 3, 20, ORDER, dtype=torch.float64)
    got = torch.func.vmap(lambda u, m: lti(u, A, B, m))(us, states)
    for i in range(2):
        magnitude = bounds.sensitivity(lti, us[i], A, B, states[i])
        assert_close([x[i] for x in got], by_loop(us[i], A, B, states[i]), magnitude, 130)


@pytest.mark.parametrize("pieces", [[1, 24, 25, 26, 49, 75], [200]])
def test_a_system_of_many_channels_serves_chunks_of_any_length(pieces):
    u, A, B, state = arguments = many_channels(200)
    want, want_state = by_loop(u, A, B, state)
    system, memory = prepare(A, B, 200, dtype=torch.float64), []
    for piece in u.split(pieces, dim=1):
        part, state = apply(piece, system, state)
        memory.append(part)
    magnitude = bounds.sensitivity(lti, *arguments)
    assert_close((torch.cat(memory, dim=1), state), (want, want_state), magnitude, 200)


@pytest.mark.parametrize("method", [*METHODS, None])
def test_no_steps_leave_the_state_as_it_was(method):
    (u, A, B, state), _ = example(0)
    memory, final_state = lti(u, A, B, state, method=method)
    assert memory.shape == (3, 0, 2, ORDER)
    assert torch.equal(final_state, state)
    assert torch.equal(lti(u, A, B, method=method)[1], torch.zeros_like(state))
    assert torch.equal(lti(u, A, B, state, last_only=True)[0], state)


@pytest.mark.parametrize(("batch", "channels"), [(0, 2), (3, 0), (0, 0)])
@pytest.mark.parametrize("method", [*METHODS, None])
def test_an_empty_batch_and_no_channels_work(method, batch, channels):
    (u, A, B, state), _ = example(70, batch=batch, channels=channels)
    memory, final_state = lti(u, A, B, state, method=method)
    assert memory.shape == (batch, 70, channels, ORDER)
    assert final_state.shape == (batch, channels, ORDER)
    for gradient, x in zip(torch.autograd.grad(memory.sum() + final_state.sum(), (u, state)), (u, state), strict=True):
        assert gradient.shape == x.shape


@pytest.mark.parametrize("method", [*METHODS, "last"])
def test_a_system_serves_shorter_inputs_too(method):
    (u, A, B, state), _ = example(200)
    last = method == "last"
    system = prepare(A, B, 200, method=None if last else method, last_only=last, dtype=u.dtype)
    for steps in (1, 31, 77, 200):
        memory, final_state = by_loop(u[:, :steps], A, B, state)
        magnitude = bounds.sensitivity(lambda *x: lti(*x, last_only=last), u[:, :steps], A, B, state)
        got, want = apply(u[:, :steps], system, state), (final_state if last else memory, final_state)
        # What the transforms of "fft" add up is as long as the impulse response.
        assert_close(got, want, magnitude, 200)


@pytest.mark.parametrize("method", ["sequential", "chunked"])
def test_a_system_for_a_short_input_serves_a_long_one(method):
    (u, A, B, state), _ = example(700)
    got = apply(u, prepare(A, B, 40, method=method, dtype=u.dtype), state)
    assert_close(got, by_loop(u, A, B, state), bounds.sensitivity(lti, u, A, B, state), 700)


@pytest.mark.parametrize("method", ["toeplitz", "fft", "last"])
def test_a_system_too_short_for_the_input_raises(method):
    (u, A, B, _), _ = example(60)
    last = method == "last"
    system = prepare(A, B, 50, method=None if last else method, last_only=last, dtype=u.dtype)
    with pytest.raises(ValueError, match="prepared for up to 50 steps, got 60"):
        apply(u, system)


@pytest.mark.parametrize("method", [*RESETTING, None])
def test_nothing_passes_a_reset_not_even_a_nan(method):
    (u, A, B, state), _ = example(100)
    reset = torch.zeros(3, 100, dtype=torch.bool)
    reset[:, [0, 40, 41]] = True
    poisoned = u.detach().clone()
    poisoned[:, 35:40] = torch.nan
    poisoned.requires_grad_()
    memory, final_state = lti(poisoned, A, B, torch.full_like(state, torch.nan), method=method, reset=reset)
    want, want_final = by_loop(u[:, 41:], A, B)
    magnitude = bounds.sensitivity(lti, u[:, 41:], A, B)
    assert_close((memory[:, 41:], final_state), (want, want_final), magnitude, 100)
    (gradient,) = torch.autograd.grad(final_state.sum() + memory[:, 41:].sum(), poisoned)
    assert gradient.isfinite().all()
    assert (gradient[:, :41] == 0).all()
    alone, _ = lti(poisoned, A, B, torch.full_like(state, torch.nan), last_only=True, reset=reset)
    assert_close(alone, want_final, magnitude[1], 100)


@pytest.mark.parametrize("method", [*METHODS, None])
def test_an_input_never_changes_the_past(method):
    (u, A, B, state), _ = example(100)
    changed = u.detach().clone()
    changed[:, 50:] += 1
    before, _ = lti(u, A, B, state, method=method)
    after, _ = lti(changed, A, B, state, method=method)
    assert_close(after[:, :50], before[:, :50], bounds.sensitivity(lti, changed, A, B, state)[0], 100)
    # One more at the input adds B.
    magnitude = bounds.sensitivity(lti, changed[:, :51], A, B, state)[0]
    assert_close(after[:, 50], before[:, 50] + B, magnitude, 100)


@pytest.mark.parametrize("channels", [2, 20])
@pytest.mark.parametrize("method", [*METHODS, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_narrow_inputs_are_computed_and_carried_in_32_bits(method, dtype, channels):
    (u, A, B, state), _ = example(150, channels=channels, dtype=dtype)
    arguments = u, A.detach(), B.detach(), state
    weights = [torch.randn(150, channels, ORDER).to(dtype), torch.randn(channels, ORDER)]

    def run(function, u, A, B, state, memory_weights, final_weights, **options):
        u, state = (x.detach().requires_grad_() for x in (u, state))
        memory, final = function(u, A, B, state, **options)
        # Of each number the same derivative in each row of the batch: its terms are exact in the dtype.
        loss = (memory * memory_weights).sum() + (final * final_weights).sum()
        return memory, final, *torch.autograd.grad(loss, (u, state))

    got = run(lti, *arguments, *weights, method=method)
    assert [x.dtype for x in got] == [dtype, torch.float32, dtype, torch.float32]
    wide = [x.double() for x in (*arguments, *weights)]
    magnitude = bounds.sensitivity(lambda *x: run(lti, *x, method="chunked"), *wide)
    assert_close(got, run(by_loop, *wide), magnitude, 150, torch.float32)


def inputs(steps):
    """Rough and smooth inputs (B, T, 1), a constant, and one that ends at once."""
    time = torch.arange(steps)
    rough, smooth = torch.randn(steps), torch.sin(time / 40)
    return torch.stack([rough, smooth, torch.full((steps,), 0.7), (time < steps // 3).float()]).unsqueeze(-1)


@functools.cache
def in_64_bits(order, theta):
    """Numbers that float16 and bfloat16 have too, and what comes of them: exact, with its magnitude."""
    draws.seed()
    A, B = delay_network(order, theta)
    tensors = inputs(1000).bfloat16().half(), torch.randn(4, 1, order), torch.randn(4, 1000, 1, order).bfloat16().half()
    wide = [x.double() for x in tensors]
    # The system is rounded to 16 bits too.
    system = prepare(A, B, 1000, method="chunked", dtype=torch.float64)
    return (
        system,
        tensors,
        memory_and_gradients(system, *wide),
        bounds.sensitivity(memory_and_gradients, system, *wide),
    )


def memory_and_gradients(system, u, state, weight):
    u, state = (x.detach().requires_grad_() for x in (u, state))
    memory, final = apply(u, system, state)
    return [memory, final, *torch.autograd.grad(memory, (u, state), weight)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("order", "theta"), [(1, 100.0), (32, 50.0), (64, 512.0), (256, 784.0)])
def test_products_of_16_bits_keep_the_error_bound_of_16_bits(order, theta, dtype, monkeypatch):
    """As on CUDA: 16-bit factors, sums in float32."""
    module = time_invariant
    system, (u, state, weight), exact, magnitude = in_64_bits(order, theta)
    system = system._replace(inputs=system.inputs.float(), powers=system.powers.float())
    tensors = u.to(dtype), state, weight.to(dtype)
    plain = memory_and_gradients(system, *tensors)
    monkeypatch.setattr(module, "_multiplied_in_16_bits", lambda u: u.dtype in (torch.float16, torch.bfloat16))
    got = memory_and_gradients(system, *tensors)
    assert [x.dtype for x in got[:2]] == [dtype, torch.float32]
    assert not torch.equal(got[0], plain[0])  # another path
    assert torch.equal(got[1], plain[1])  # the final state is float32's
    # Either factor, the product, and the sum where gradients meet, are rounded to 16 bits once.
    counts = [bounds.likely(x.numel()) for x in exact]
    bounds.assert_close(got, exact, magnitude=magnitude, roundings=counts, dtype=dtype)
    # In 32 bits, sums over the chunk and the state before it, through the chunks.
    counts = [bounds.likely(x.numel(), terms=1000 + order) for x in exact]
    bounds.assert_close(plain, exact, magnitude=magnitude, roundings=counts, dtype=torch.float32)


@pytest.mark.parametrize(("order", "theta", "steps"), [(32, 50.0, 4000), (256, 784.0, 1000)])
def test_factors_of_eleven_bits_keep_their_error_bound(order, theta, steps, monkeypatch):
    """What torch's switch for TF32 does on CUDA, the carry's products included: their roundings do not pile up."""
    module = time_invariant
    A, B = delay_network(order, theta)
    u, wide = inputs(steps), prepare(A, B, steps, method="chunked", dtype=torch.float64)
    exact, magnitude = apply(u.double(), wide), bounds.sensitivity(apply, u.double(), wide)

    def tf32(x):
        if x.dtype != torch.float32:
            return x
        bits = x.contiguous().view(torch.int32)
        return ((bits + 0x0FFF + (bits >> 13 & 1)) & ~0x1FFF).view(torch.float32)

    times = module._times
    monkeypatch.setattr(module, "_times", lambda rows, matrix: times(tf32(rows), tf32(matrix)))
    got = lti(u, A, B, method="chunked")
    # Both factors are rounded to 11 bits; 13 more are cut off than float32 does.
    counts = [2**13 * bounds.likely(x.numel(), terms=2) for x in exact]
    bounds.assert_close(got, exact, magnitude=magnitude, roundings=counts)
    # What is lost in a product of the carry is passed on by the others, which do not enlarge it: roundings that pile
    # up would be as many as the chunks, where these are as many as the levels of the scan.
    levels = len(wide.powers) + 1
    for size, x in zip(magnitude, exact, strict=True):
        assert size <= bounds.likely(x.numel(), terms=levels) * x.abs().max()


def test_a_32_bit_carry_is_exact_over_a_million_16_bit_steps(monkeypatch):
    module, steps = time_invariant, 2**20
    monkeypatch.setattr(module, "_multiplied_in_16_bits", lambda u: u.dtype == torch.bfloat16)
    A, B = delay_network(2, 100_000.0)
    u = torch.cat([torch.randn(1, steps, 1), torch.ones(1, steps, 1)]).bfloat16()
    system = prepare(A, B, steps, method="chunked", dtype=torch.float64)
    (memory, _), (exact, _) = lti(u, A, B, method="chunked"), apply(u.double(), system)
    # What is multiplied in 16 bits: the inputs of a chunk and the memory before it, by what they leave at each step.
    length = chunk_length(steps)
    before = torch.cat([torch.zeros(2, 1, 2, dtype=torch.float64), exact[:, length - 1 : -1 : length, 0]], dim=1)
    rows = torch.cat([u.double().view(2, -1, length), before], dim=-1)
    magnitude = (rows.abs() @ system.inputs.abs()).view_as(exact)
    # The worst case, for inputs of one are all alike: either factor, and a carry in float32 over 2^15 chunks, whose
    # products and sums are to a rounding of 16 bits as 2^16 is to 2.
    bounds.assert_close(memory, exact, magnitude=magnitude, roundings=2 + 4, dtype=torch.bfloat16)


def test_autocast_changes_nothing():
    (u, A, B, state), _ = example(100, dtype=torch.float32)
    memory, final_state = lti(u, A, B, state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under, under_final = lti(u, A, B, state)
    assert torch.equal(under, memory)
    assert torch.equal(under_final, final_state)


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("method", [*METHODS, None])
def test_complex_inputs_are_their_parts(method, reset):
    if reset and method == "fft":
        pytest.skip("fft cannot reset")
    (u, A, B, state), cut = example(70, reset=reset)
    u = torch.complex(u, torch.randn_like(u))
    z = torch.complex(state, torch.randn_like(state))
    for start in (z, state):
        got = lti(u, A, B, start, method=method, reset=cut)
        want = by_loop(u, A.to(u.dtype), B.to(u.dtype), start.to(u.dtype), reset=cut)
        magnitude = bounds.sensitivity(lambda *x: lti(*x, method="chunked", reset=cut), u, A, B, start)
        assert_close(got, want, magnitude, 70)
    assert lti(u, A, B, z, last_only=True)[0].is_complex()


@pytest.mark.parametrize("method", [*METHODS, None])
def test_any_strides_will_do(method):
    (u, A, B, state), _ = example(90)
    want, magnitude = by_loop(u, A, B, state), bounds.sensitivity(lti, u, A, B, state)
    strided_u = u.detach().permute(2, 1, 0).contiguous().permute(2, 1, 0)
    wide = torch.randn(3, 180, 4, dtype=u.dtype)
    wide[:, ::2, ::2] = u.detach()
    strided_A, strided_B = A.detach().mT.contiguous().mT, B.detach().repeat_interleave(2)[::2]
    strided_state = state.detach().permute(2, 0, 1).contiguous().permute(1, 2, 0)
    for other in (strided_u, wide[:, ::2, ::2]):
        assert_close(lti(other, strided_A, strided_B, strided_state, method=method), want, magnitude, 90)


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("method", [*METHODS, "last"])
def test_derivatives_match_numerical_ones(method, reset):
    if reset and method == "fft":
        pytest.skip("fft cannot reset")
    A, B = delay_network(2, 4.0)
    steps = 3 if method == "sequential" else 5
    arguments = [torch.randn(1, steps, 1, dtype=torch.float64), A, B, torch.randn(1, 1, 2, dtype=torch.float64)]
    arguments = [x.requires_grad_() for x in arguments]
    cut = torch.tensor([[False, False, True, False, False]])[:, :steps] if reset else None

    def run(*arguments):
        named = {"last_only": True} if method == "last" else {"method": method}
        return lti(*arguments, reset=cut, **named)

    torch.autograd.gradcheck(run, arguments, check_forward_ad=True)
    torch.autograd.gradgradcheck(run, arguments)


@pytest.mark.parametrize("method", ["fft", "chunked", "last"])
def test_gradients_reach_theta(method):
    u = torch.randn(1, 6, 2, dtype=torch.float64)
    named = {"last_only": True} if method == "last" else {"method": method}

    def run(theta):
        return lti(u, *delay_network(3, theta), **named)

    for theta in (torch.tensor(9.0), torch.tensor([5.0, 12.0])):
        torch.autograd.gradcheck(run, theta.double().requires_grad_(), check_forward_ad=True)
        torch.autograd.gradgradcheck(run, theta.double().requires_grad_())


@pytest.mark.parametrize("method", [*METHODS, "last"])
def test_a_map_over_any_argument_is_the_loop_over_it(method):
    named = {"last_only": True} if method == "last" else {"method": method}
    us, states = torch.randn(2, 3, 40, 2, dtype=torch.float64), torch.randn(2, 3, 2, ORDER, dtype=torch.float64)
    As, Bs = delay_network(ORDER, torch.tensor([9.0, 30.0]))

    def run(u, A, B, state):
        return lti(u, A, B, state, **named)

    for maps in [(0, None, None, 0), (0, None, None, None), (None, 0, 0, 0)]:
        given = [
            many if axis == 0 else one
            for axis, many, one in zip(maps, (us, As, Bs, states), (us[0], As[0], Bs[0], states[0]), strict=True)
        ]
        got = torch.func.vmap(run, in_dims=maps)(*given)
        for i in range(2):
            one = [x[i] if axis == 0 else x for axis, x in zip(maps, given, strict=True)]
            assert_close([x[i] for x in got], run(*one), bounds.sensitivity(run, *one), 40)


@pytest.mark.parametrize("method", RESETTING)
def test_a_map_over_resets_is_the_loop_over_them(method):
    (u, A, B, state), _ = example(40)
    resets = torch.rand(2, 3, 40) < 0.1
    got, _ = torch.func.vmap(lambda reset: lti(u, A, B, state, method=method, reset=reset))(resets)
    for i in range(2):
        magnitude = bounds.sensitivity(lambda *x, i=i: lti(*x, reset=resets[i])[0], u, A, B, state)
        assert_close(got[i], lti(u, A, B, state, method=method, reset=resets[i])[0], magnitude, 40)


def test_a_long_input_takes_a_bounded_number_of_operations():
    A, B = delay_network(2, 50.0)
    counts = []
    for steps in (2**12, 2**18):
        u = torch.randn(1, steps, 1)
        system = prepare(A, B, steps)
        with torch.profiler.profile() as profile:
            memory, _ = apply(u, system)
        counts.append(len(profile.events()))
        # What came 2,000 steps before, 40 windows ago, has died away below float64.
        late = u[:, -2000:].double()
        want, magnitude = by_loop(late, A, B)[0][:, -100:], bounds.sensitivity(lti, late, A, B)[0]
        assert_close(memory[:, -100:], want, magnitude, 2000, torch.float32)
    assert counts[1] < 3 * counts[0]


def test_the_chunk_divides_the_length_where_it_can():
    assert [chunk_length(steps) for steps in (1024, 784, 4096, 96, 1_048_576)] == [32, 28, 32, 32, 32]
    assert chunk_length(1021) == 32
    assert [chunk_length(steps) for steps in (1, 2, 5, 16, 20)] == [1, 2, 8, 16, 20]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"u": [1.0]}, TypeError, r"u must be a tensor, got list: wrap it with torch.as_tensor\(\)"),
        ({"A": 0.5}, TypeError, "A must be a tensor, got float"),
        ({"initial_state": [0.0]}, TypeError, "initial_state must be a tensor, got list"),
        ({"reset": [True]}, TypeError, "expected reset to be a tensor, got list"),
        ({"u": torch.randn(4, 3)}, ValueError, r"u must be \(batch, time, channels\), got shape \(4, 3\)"),
        ({"u": torch.ones(3, 10, 2, dtype=torch.int64)}, TypeError, "u must be floating or complex, got torch.int64"),
        ({"u": torch.randn(3, 10, 2, device="meta")}, ValueError, "u and A must share a device, got meta and cpu"),
        ({"A": torch.randn(5, 4)}, ValueError, r"A must be \(N, N\) and B \(N,\), .* got \(5, 4\) and \(5,\)"),
        ({"B": torch.randn(4)}, ValueError, r"A must be \(N, N\) and B \(N,\), .* got \(5, 5\) and \(4,\)"),
        ({"B": torch.ones(5, dtype=torch.int64)}, TypeError, "B must be floating, got torch.int64"),
        ({"B": torch.randn(5, device="meta")}, ValueError, "A and B must share a device, got cpu and meta"),
        (
            {"A": torch.randn(3, 5, 5), "B": torch.randn(3, 5)},
            ValueError,
            "one channel for each of the 3 systems in A, got 2",
        ),
        (
            {"initial_state": torch.randn(4, 2, 5)},
            ValueError,
            r"initial_state must be \(B, C, N\) = \(3, 2, 5\), got \(4, 2, 5\)",
        ),
        ({"initial_state": torch.randn(3, 2, 5, device="meta")}, ValueError, "initial_state and u must share a device"),
        (
            {"initial_state": torch.randn(3, 2, 5, dtype=torch.complex64)},
            TypeError,
            "initial_state is complex but u is real",
        ),
        (
            {"initial_state": torch.ones(3, 2, 5, dtype=torch.int64)},
            TypeError,
            "initial_state must be floating or complex",
        ),
        ({"reset": torch.ones(3, 9, dtype=torch.bool)}, ValueError, r"reset must be \(batch, time\) = \(3, 10\)"),
        ({"reset": torch.ones(3, 10)}, TypeError, "reset must be a boolean tensor, got torch.float32"),
        ({"reset": torch.ones(3, 10, dtype=torch.bool, device="meta")}, ValueError, "reset and u must share a device"),
        ({"method": "chunky"}, ValueError, "did you mean 'chunked'"),
        (
            {"method": "fft", "reset": torch.ones(3, 10, dtype=torch.bool)},
            ValueError,
            'use method "chunked", "toeplitz" or "sequential"',
        ),
        ({"method": "chunked", "last_only": True}, ValueError, "expected method=None with last_only=True"),
    ],
)
@pytest.mark.usefixtures("shape_checker_off")
def test_arguments_that_do_not_fit_say_what_would(change, error, message):
    A, B = delay_network(ORDER, 20)
    arguments = {"u": torch.randn(3, 10, 2), "A": A, "B": B} | change
    with pytest.raises(error, match=message):
        lti(**arguments)


def test_a_system_of_another_dtype_raises():
    system = prepare(*delay_network(ORDER, 20), 10, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"prepared for torch\.float32, got u in torch\.float64"):
        apply(torch.randn(3, 10, 2, dtype=torch.float64), system)


@pytest.mark.compiled
@pytest.mark.parametrize("method", [*METHODS, "last"])
def test_values_and_gradients_compile_into_one_graph(method):
    named = {"last_only": True} if method == "last" else {"method": method}
    steps = 5 if method == "sequential" else 70
    arguments, cut = example(steps, reset=method != "fft")
    torch._dynamo.reset()
    compiled = torch.compile(lti, fullgraph=True, backend="aot_eager")
    got = with_gradients(compiled, arguments, reset=cut, **named)
    want = with_gradients(lti, arguments, reset=cut, **named)
    assert_close(got, want, magnitudes(arguments, reset=cut, last_only=method == "last"), steps)


@pytest.mark.compiled
@pytest.mark.parametrize("method", [*METHODS, "last"])
def test_lengths_may_change_under_the_compiler(method):
    named = {"last_only": True} if method == "last" else {"method": method}
    torch._dynamo.reset()
    compiled = torch.compile(lti, fullgraph=True, dynamic=True, backend="eager")
    for steps in (5, 6) if method == "sequential" else (40, 55):
        arguments, _ = example(steps)
        got, want = with_gradients(compiled, arguments, **named), with_gradients(lti, arguments, **named)
        assert_close(got, want, magnitudes(arguments, last_only=method == "last"), steps)


@pytest.mark.compiled
@pytest.mark.parametrize("channels", [2, 20])
def test_new_lengths_reuse_the_compiled_chunked_graph(channels):
    (_, A, B, _), _ = example(1)
    system = prepare(A.detach(), B.detach(), 4096, dtype=torch.float64)
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    compiled = torch.compile(apply, fullgraph=True, dynamic=True, backend=counter)
    for steps in (520, 600, 777, 901, 1000):
        u = torch.randn(3, steps, channels, dtype=torch.float64)
        magnitude = bounds.sensitivity(lti, u, A, B)
        assert_close(compiled(u, system), apply(u, system), magnitude, steps)
    assert counter.frame_count <= 2


@pytest.mark.compiled
def test_the_default_compiler_agrees():
    (u, A, B, state), _ = example(64)
    arguments = u, A.detach(), B.detach(), state
    system = prepare(A.detach(), B.detach(), 64, dtype=u.dtype)
    compiled = torch.compile(apply, fullgraph=True)
    got = with_gradients(lambda u, A, B, state: compiled(u, system, state), arguments)
    want = with_gradients(lambda u, A, B, state: apply(u, system, state), arguments)
    assert_close(got, want, magnitudes(arguments), 64)


@pytest.mark.compiled
def test_autocast_changes_nothing_in_an_exported_graph():
    class Memory(torch.nn.Module):
        def forward(self, u):
            return lti(u, A.detach(), B.detach())

    (u, A, B, _), _ = example(100, dtype=torch.float32)
    u = u.detach()
    exported = torch.export.export(Memory(), (u,)).module()
    memory, final_state = exported(u)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under, under_final = exported(u)
    assert torch.equal(under, memory)
    assert torch.equal(under_final, final_state)


def test_explain_names_the_method_and_the_reason():
    A, B = delay_network(4, 10.0)
    lti(torch.randn(1, 20, 1), A, B, method="fft")
    assert "lti: fft (named by the caller)" in legato.explain()
    lti(torch.randn(1, 20, 1), A, B)
    assert "lti: chunked (the fastest measured for sequences)" in legato.explain()
    lti(torch.randn(1, 20, 1), A, B, last_only=True)
    assert "lti: last (last_only=True)" in legato.explain()


@pytest.mark.parametrize("options", [{"method": m} for m in METHODS] + [{"last_only": True}], ids=str)
@pytest.mark.parametrize(("steps", "resets"), [(0, False), (5, False), (70, False), (70, True)])
def test_writing_to_a_state_changes_nothing_else(options, steps, resets):
    if resets and options.get("method") == "fft":
        options = {"method": "toeplitz"}
    A, B = delay_network(4, 10.0)
    reset = torch.zeros(2, steps, dtype=torch.bool) if resets else None
    initial = torch.randn(2, 1, 4)
    memory, final = lti(torch.randn(2, steps, 1), A, B, initial, reset=reset, **options)
    before = memory.clone(), initial.clone()
    final.zero_()
    assert torch.equal(memory, before[0])
    assert torch.equal(initial, before[1])
