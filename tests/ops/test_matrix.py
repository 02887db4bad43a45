"""The square-matrix recurrence against a loop: values, every kind of derivative, and the whole contract."""

import functools

import pytest
import torch
from torch.func import jvp, vmap

import bounds
import draws
from legato.ops.matrix import matrix_recurrence

N = 3


def loop(transition, impulse, state, reset=None, reverse=False):
    """h_t = A_t h_{t-1} + x_t, one step after another."""
    T, h, states = impulse.shape[1], state, list(impulse.unbind(1))
    for t in reversed(range(T)) if reverse else range(T):
        A = transition if transition.ndim == 2 else transition[:, t].reshape(-1, *[1] * (h.ndim - 2), N, N)
        if reset is not None:
            h = torch.where(reset[:, t].reshape(-1, *[1] * (h.ndim - 1)), 0, h)
        h = (A @ h.unsqueeze(-1)).squeeze(-1) + impulse[:, t]
        states[t] = h
    return torch.stack(states, 1) if T else impulse.clone(), h


def example(T, *, B=2, channels=(), varying=True, dtype=torch.float64, grad=False):
    shape = (B, T, N, N) if varying else (N, N)
    tensors = 0.4 * torch.randn(shape, dtype=dtype), torch.randn(B, T, *channels, N, dtype=dtype)
    tensors = *tensors, torch.randn(B, *channels, N, dtype=torch.promote_types(dtype, torch.float32))
    return [x.requires_grad_(grad) for x in tensors]


def resets(T, B=2):
    return torch.rand(B, T) < 0.1


def with_gradients(function, tensors, **options):
    """States and final state, and the gradients of a weighted sum of both."""
    tensors = [x.detach().requires_grad_() for x in tensors]
    both = function(*tensors, **options)
    weights = [torch.randn(x.shape, dtype=x.dtype, generator=draws.generator(i)) for i, x in enumerate(both)]
    grads = torch.autograd.grad(both, tensors, weights, allow_unused=True, materialize_grads=True)
    return [x.detach() for x in (*both, *grads)]


def roundings(T, results, *, of_gradients=True, dtype=torch.float64):
    """Likely ones: N products and a sum a step, twice as many where chunks are joined; a complex product has three.

    The gradient of a constant A is a sum over batch, channels and steps.
    """
    each = 4 * (N + 1) * (9 if dtype.is_complex else 1)
    summed = max(T, 1) * 8 if of_gradients else 0
    return [bounds.likely(x.numel(), terms=each + summed) for x in results]


def assert_equal_in_64_bits(got, function, tensors):
    """Results in float64 against those of a function in float64: both have errors."""
    exact = function(*tensors)
    steps = 2 * tensors[1].shape[1]
    counts = [2 * count for count in roundings(steps, exact)]
    bounds.assert_close(got, exact, magnitude=bounds.sensitivity(function, *tensors), roundings=counts)


@pytest.mark.parametrize("T", [0, 1, 16, 17, 63, 65, 300, 1000])
@pytest.mark.parametrize("varying", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_values_and_gradients_are_the_loops(T, varying, reverse):
    for channels, reset in (((), None), ((2, 2), resets(T))):
        arguments, options = example(T, channels=channels, varying=varying), {"reset": reset, "reverse": reverse}
        got = with_gradients(matrix_recurrence, arguments, **options)
        exact = with_gradients(loop, arguments, **options)
        function = functools.partial(with_gradients, matrix_recurrence, **options)
        magnitude = bounds.sensitivity(function, arguments)
        counts = [2 * count for count in roundings(T, exact)]
        bounds.assert_close(got, exact, magnitude=magnitude, roundings=counts)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.complex64, torch.complex128])
@pytest.mark.parametrize("varying", [False, True])
def test_every_dtype_is_as_exact_as_its_carry(dtype, varying):
    arguments = example(100, varying=varying, dtype=dtype)
    carry = torch.promote_types(dtype, torch.float32)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    got = matrix_recurrence(*arguments)
    assert (got[0].dtype, got[1].dtype) == (dtype, carry)
    arguments = [x.to(wide) for x in arguments]
    exact, magnitude = loop(*arguments), bounds.sensitivity(loop, *arguments)
    counts = roundings(100, exact, of_gradients=False, dtype=dtype)
    if dtype == wide:  # the exact results have errors too
        counts = [2 * count for count in counts]
    bounds.assert_close(got, exact, magnitude=magnitude, roundings=counts)


def test_a_16_bit_impulse_meets_a_32_bit_transition_in_32_bits():
    transition, impulse, state = example(20, varying=False, dtype=torch.float32)
    states, final_state = matrix_recurrence(transition, impulse.half(), state)
    assert states.dtype == final_state.dtype == torch.float32


@pytest.mark.parametrize("varying", [False, True])
@pytest.mark.parametrize("cut", [0, 1, 16, 50])
def test_two_chunks_equal_one_pass(varying, cut):
    transition, impulse, state = example(80, varying=varying)
    reset = resets(80)
    first, second = (transition[:, :cut], transition[:, cut:]) if varying else (transition, transition)
    whole, last = matrix_recurrence(transition, impulse, state, reset=reset)
    a, middle = matrix_recurrence(first, impulse[:, :cut], state, reset=reset[:, :cut])
    b, end = matrix_recurrence(second, impulse[:, cut:], middle, reset=reset[:, cut:])
    assert torch.equal(end, b[:, -1])
    assert_equal_in_64_bits(
        [torch.cat([a, b], 1), end], lambda *x: list(matrix_recurrence(*x, reset=reset)), (transition, impulse, state)
    )
    assert torch.equal(last, whole[:, -1])


@pytest.mark.parametrize("varying", [False, True])
def test_no_initial_state_is_a_state_of_zeros(varying):
    transition, impulse, state = example(40, varying=varying)
    got = matrix_recurrence(transition, impulse)
    expected = matrix_recurrence(transition, impulse, torch.zeros_like(state))
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("T", [10, 90])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("spoil_transition", [False, True])
def test_nothing_passes_a_reset_not_even_nan(T, reverse, spoil_transition):
    transition, impulse, state = example(T, B=1)
    reset = torch.zeros(1, T, dtype=torch.bool)
    at = T // 2
    reset[:, at] = True
    after, before = (slice(0, at + 1), slice(at + 1, T)) if reverse else (slice(at, T), slice(0, at))
    dirty = [x.clone() for x in (transition, impulse, state)]
    dirty[1][:, before] = dirty[2][:] = torch.nan
    if spoil_transition:
        dirty[0][:, before] = torch.nan
    dirty = [x.requires_grad_() for x in dirty]
    states, final_state = matrix_recurrence(*dirty, reset=reset, reverse=reverse)
    assert_equal_in_64_bits(
        states[:, after],
        lambda *x: matrix_recurrence(*x, reset=reset, reverse=reverse)[0][:, after],
        (transition, impulse, state),
    )
    grads = torch.autograd.grad(states[:, after].sum() + final_state.sum(), dirty)
    assert not grads[0][:, after].isnan().any()
    if not spoil_transition:  # else the gradient 0 is multiplied by NaN on its way back, as in the loop
        assert not grads[1].any(-1)[:, before].any()
        assert not grads[2].any()


@pytest.mark.parametrize("varying", [False, True])
def test_strided_and_expanded_arguments_are_read_right(varying):
    transition, impulse, state = example(40, channels=(2,), varying=varying)
    apart = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in (transition, impulse, state)]
    assert not apart[1].is_contiguous()
    assert_equal_in_64_bits(matrix_recurrence(*apart), matrix_recurrence, (transition, impulse, state))
    same = impulse[:, :1].expand_as(impulse)
    assert_equal_in_64_bits(matrix_recurrence(transition, same), matrix_recurrence, (transition, same.clone()))


@pytest.mark.parametrize(("B", "channels"), [(0, ()), (2, (0,))])
@pytest.mark.parametrize("varying", [False, True])
def test_an_empty_batch_or_channel_axis_stays_empty(B, channels, varying):
    arguments = example(20, B=B, channels=channels, varying=varying, grad=True)
    states, final_state = matrix_recurrence(*arguments, reset=resets(20, B))
    assert (states.shape, final_state.shape) == (arguments[1].shape, arguments[2].shape)
    states.sum().backward()
    assert not arguments[0].grad.any()


@pytest.mark.parametrize("varying", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_first_and_second_derivatives_match_differences(varying, dtype):
    arguments = example(18, B=1, varying=varying, dtype=dtype, grad=True)
    reset = torch.zeros(1, 18, dtype=torch.bool)
    reset[0, 5] = True

    def run(*tensors):
        return matrix_recurrence(*tensors, reset=reset)

    # fast_mode: one random direction each, or complex second derivatives take a minute.
    assert torch.autograd.gradcheck(run, arguments, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, arguments, fast_mode=True)


def test_forward_mode_is_the_loops():
    arguments, directions = example(50), example(50)

    def forward(function, *x):
        states, tangents = jvp(function, x[:3], x[3:])
        return *states, *tangents

    got = forward(lambda *x: matrix_recurrence(*x), *arguments, *directions)
    assert_equal_in_64_bits(got, lambda *x: forward(loop, *x), (*arguments, *directions))


@pytest.mark.parametrize("mapped", [(0, 0, 0), (None, 1, 0), (0, None, None)])
@pytest.mark.parametrize("varying", [False, True])
def test_vmap_is_a_loop_over_the_mapped_axis(mapped, varying):
    several = [example(40, varying=varying) for _ in range(3)]
    arguments = [
        several[0][i] if axis is None else torch.stack([one[i] for one in several], axis)
        for i, axis in enumerate(mapped)
    ]
    got = vmap(lambda *x: matrix_recurrence(*x), in_dims=mapped)(*arguments)
    for k in range(3):
        row = [several[k if axis is not None else 0][i] for i, axis in enumerate(mapped)]
        assert_equal_in_64_bits([x[k] for x in got], lambda *x: list(matrix_recurrence(*x)), row)


def test_autocast_does_not_lower_the_carry():
    arguments = example(40, dtype=torch.float32)
    expected = matrix_recurrence(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        got = matrix_recurrence(*arguments)
    assert all(map(torch.equal, got, expected))


def test_a_growing_matrix_stays_finite_while_its_states_do():
    # 4^250 overflows float32, but the state is dropped long before.
    reset = (torch.arange(260) % 40 == 0).unsqueeze(0)
    transition, impulse = 4.0 * torch.eye(N), torch.ones(1, 260, N)
    states, _ = matrix_recurrence(transition, impulse, reset=reset)
    exact = loop(transition.double(), impulse.double(), torch.zeros(1, N).double(), reset)[0]
    # All terms are positive: N products and sums in each of 40 steps to the next reset, twice where chunks are joined.
    bounds.assert_close(states, exact, magnitude=exact, roundings=2 * (N + 1) * 40)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"transition": 0.5}, TypeError, r"transition must be a tensor, got float: wrap it with torch.as_tensor\(\)"),
        ({"reset": [True]}, TypeError, "expected reset to be a tensor, got list"),
        ({"impulse": torch.randn(2, 3)}, ValueError, r"impulse must be \(batch, time, \*channels, N\), got shape"),
        ({"impulse": torch.randn(2, 4, 5)}, ValueError, r"transition must be \(N, N\) = \(5, 5\)"),
        ({"transition": torch.randn(2, 5, 3, 3)}, ValueError, r"= \(2, 4, 3, 3\) for this impulse, got \(2, 5, 3, 3\)"),
        ({"transition": torch.ones(3, 3).long()}, TypeError, "transition must be floating or complex, got"),
        ({"initial_state": torch.randn(2, 4, 3)}, ValueError, r"initial_state must be .* = \(2, 3\), got"),
        ({"initial_state": torch.randn(2, 3) + 1j}, TypeError, "initial_state is complex"),
        ({"reset": torch.zeros(2, 4)}, TypeError, "reset must be a boolean tensor, got torch.float32"),
        ({"reset": torch.zeros(2, 5).bool()}, ValueError, r"reset must be \(batch, time\) = \(2, 4\), got \(2, 5\)"),
        ({"transition": torch.randn(3, 3, device="meta")}, ValueError, "transition and impulse must share a device"),
    ],
)  # fmt: skip
def test_bad_input_gets_a_clear_error(change, error, message):
    arguments = {"transition": torch.randn(3, 3), "impulse": torch.randn(2, 4, 3)} | change
    with pytest.raises(error, match=message):
        matrix_recurrence(**arguments)


@pytest.mark.compiled
@pytest.mark.parametrize("varying", [False, True])
def test_values_and_gradients_compile_into_one_graph(varying):
    compiled = torch.compile(matrix_recurrence, backend="aot_eager", fullgraph=True, dynamic=False)
    arguments, reset = example(40, varying=varying), resets(40)
    got = with_gradients(compiled, arguments, reset=reset)
    assert_equal_in_64_bits(got, lambda *x: with_gradients(matrix_recurrence, x, reset=reset), arguments)


@pytest.mark.compiled
@pytest.mark.parametrize("varying", [False, True])
def test_compiled_code_serves_many_lengths(varying):
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(matrix_recurrence, backend=count, fullgraph=True, dynamic=True)
    for T in (40, 57, 200):  # multiples of 16 have a graph of their own
        arguments, reset = example(T, varying=varying), resets(T)
        assert_equal_in_64_bits(
            compiled(*arguments, reset=reset), lambda *x, reset=reset: matrix_recurrence(*x, reset=reset), arguments
        )
    assert len(graphs) == 1
