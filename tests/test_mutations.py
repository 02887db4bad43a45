"""The bounds of the other tests catch a wrong kernel: their own assertions fail on each of three small mistakes.

One coefficient is wrong by 1e-4 of itself, one step at the edge of a chunk is dropped from what is carried on, or two
channels are swapped. The mistakes are made around the op, on what goes in and comes out, so no shipped code knows them.
"""

import pytest
import torch

import bounds
import test_contract as contract
from legato.ops.time_invariant import METHODS
from ops import test_gated as gated
from ops import test_matrix as matrix
from ops import test_recurrence as recurrence
from ops import test_time_invariant as lti

MISTAKES = ["coefficient", "step", "channels"]
every_mistake = pytest.mark.parametrize("mistake", MISTAKES)


def scaled(x, of=None):
    """x, in which the number that has the most of ``of`` is larger by 1e-4 of itself."""
    factor = torch.ones(x.shape, dtype=x.dtype)
    factor.view(-1)[(x if of is None else of).detach().abs().argmax()] += 1e-4
    return x * factor


def swapped(x, axis=-1):
    return x.index_select(axis, torch.tensor([1, 0, *range(2, x.shape[axis])]))


def without_a_step(run, steps, edge):
    """run(part, state) in two chunks, of which the second starts from the state before the last step of the first."""
    first, _ = run(slice(0, edge), None)
    _, carried = run(slice(0, edge - 1), None)
    second, final = run(slice(edge, steps), carried)
    return torch.cat([first, second], 1), final


def mistaken(mistake, function, edge):
    """A recurrence (coefficients, sequence, initial state) with the mistake."""

    def run(decay, x, state, reset=None, **options):
        def part(at, carried):
            varies = decay.ndim > 1 and decay.shape[1] == x.shape[1] > 1
            given = decay[:, at] if varies else decay
            return function(given, x[:, at], state if carried is None else carried, **options)

        if mistake == "step":
            return without_a_step(part, x.shape[1], edge)
        if mistake == "channels":
            states, final = function(decay, x, state, **options)
            return swapped(states), final
        states, _ = function(decay, x, state, **options)
        before = torch.cat([state.unsqueeze(1).to(states.dtype), states[:, :-1]], 1)
        if decay.shape == x.shape:
            return function(scaled(decay, decay * before), x, state, **options)
        return function(scaled(decay), x, state, **options)

    return run


@every_mistake
@pytest.mark.parametrize("backend", recurrence.BACKENDS)
@pytest.mark.parametrize("decay_shape", [(2, 5, 3), (3,)])
def test_the_recurrence_in_64_bits(mistake, backend, decay_shape):
    decay, impulse, state, _ = recurrence.example(2, 5, (3,), decay_shape)

    def run(*x):
        return recurrence.linear_recurrence(*x, backend=backend)

    recurrence.assert_equals_the_loop(run, decay, impulse, state, None)
    with pytest.raises(AssertionError, match="elements are off"):
        recurrence.assert_equals_the_loop(mistaken(mistake, run, edge=3), decay, impulse, state, None)


# 1e-4 is less than a rounding of 16 bits.
SEEN = [(mistake, dtype) for mistake in MISTAKES for dtype in (torch.float32, torch.complex64)]
SEEN += [(mistake, dtype) for mistake in MISTAKES[1:] for dtype in (torch.float16, torch.bfloat16)]


@pytest.mark.parametrize("backend", recurrence.FAST)
@pytest.mark.parametrize(("mistake", "dtype"), SEEN)
@pytest.mark.parametrize("T", [63, 1000])
def test_the_recurrence_in_every_dtype(mistake, backend, dtype, T):
    decay, impulse, state, _ = recurrence.example(3, T, (5,), (3, T, 5), dtype)
    carry = torch.promote_types(dtype, torch.float32)
    tensors = [x.to(dtype) for x in (decay * 0.9, impulse)]
    tensors += [x.to(carry) for x in (state, torch.randn_like(impulse).to(dtype), torch.randn_like(state))]

    def run(*x):
        return recurrence.linear_recurrence(*x, backend=backend)

    with pytest.raises(AssertionError, match="elements are off"):
        recurrence.assert_as_exact_as_the_dtype(
            mistaken(mistake, run, edge=32), tensors, dtype, None, own_backward=backend == "numba"
        )


@every_mistake
@pytest.mark.parametrize("chunked", [False, True])
def test_the_triton_kernels(mistake, chunked, monkeypatch):
    pytest.importorskip("triton")
    from ops import test_triton_recurrence as triton

    triton.quicken(monkeypatch)
    if chunked:
        tuning = triton.triton_recurrence.Tuning(shortest_chunk=9, shortest_cut=0, group_bytes=16)
        monkeypatch.setattr(triton.triton_recurrence, "TUNING", tuning)
    right = triton.kernels

    def kernels(decay, impulse, h_0, reset, reverse, grad_states, grad_final):
        if mistake == "coefficient":
            states, *_ = right(decay, impulse, h_0, reset, reverse, grad_states, grad_final)
            before = torch.cat([h_0.unsqueeze(1), states[:, :-1]], 1)
            decay = scaled(decay.cpu(), (decay * before).cpu()).to(decay.device)
        elif mistake == "step":  # 18 steps of two chunks: the last of the first is one in which nothing happens
            decay, impulse = decay.clone(), impulse.clone()
            decay[:, 8], impulse[:, 8] = 1, 0
        states, *others = right(decay, impulse, h_0, reset, reverse, grad_states, grad_final)
        return (swapped(states.cpu()).to(states.device) if mistake == "channels" else states), *others

    tensors = triton.example(2, 18, 1, 33, torch.float32)
    triton.check(*tensors)
    monkeypatch.setattr(triton, "kernels", kernels)
    with pytest.raises(AssertionError, match="elements are off"):
        triton.check(*tensors)


GATED = {
    "plain": ((gated.PLAIN, 2, 65, 5), {}, {"candidate_tanh": True}),
    "long": ((gated.PLAIN, 2, 1000, 5), {}, {}),
    "output": ((gated.OUTPUT, 3, 40, 33), {}, {"activation": torch.tanh}),
    "skip": ((gated.SKIP, 3, 40, 33), {}, {"activation": torch.tanh}),
    "cell": ((gated.CELL, 3, 40, 33), {"widths": (3, 4)}, {"candidate_tanh": True}),
    "wide": ((gated.PAST, 1, 20, 1200), {}, {"activation": torch.tanh}),
    "delayed": ((gated.PLAIN, 3, 65, 33), {}, {"candidate_tanh": True, "delayed": True}),
}


def of_the_largest_effect(tensors, options):
    """Ones, but 1 + 1e-4 at that weight of a candidate that moves an output the most: a row is a channel of its own."""
    weight, channels = tensors["weights"][0], tensors["initial_state"].shape[-1]
    exact, effects = gated.evaluate(gated.by_definition, tensors, torch.float64, **options)[0], []
    for column in range(weight.shape[1]):
        factor = torch.ones_like(weight)
        factor[-channels:, column] += 1e-4
        changed = tensors | {"weights": [weight * factor, *tensors["weights"][1:]]}
        effects.append((gated.evaluate(gated.by_definition, changed, torch.float64, **options)[0] - exact).abs())
    at = torch.stack([effect.amax((0, 1)) for effect in effects], 1).argmax()
    factor = torch.ones(weight.shape)
    factor[-channels:].view(-1)[at] += 1e-4
    return factor


# 1e-4 of one of 1,200 products is less than what a serial sum of them in 32 bits may lose.
UNITS = [(mistake, case) for case in GATED for mistake in MISTAKES if (mistake, case) != ("coefficient", "wide")]


@pytest.mark.parametrize(("mistake", "case"), UNITS)
@pytest.mark.skipif(
    gated.backends.choose("gated_unit", torch.device("cpu"))[0] is None, reason="the kernel needs numba"
)
def test_the_gated_unit(mistake, case, monkeypatch):
    sizes, more, options = GATED[case]
    tensors, right = gated.example(*sizes, **more, resets=False), gated.gated_unit
    factor = of_the_largest_effect(tensors, options) if mistake == "coefficient" else None

    def gated_unit(inputs, weights, bias, spec, initial_state, *, products, reset, activation):
        def run(at, state):
            cut = tuple(x[:, at] for x in inputs)
            state = initial_state if state is None else state
            h, c, final = right(cut, weights, bias, spec, state, activation=activation)
            return torch.stack([h, c]).movedim(0, -1), final

        every = slice(None)
        if mistake == "coefficient":
            weights = (weights[0] * factor, *weights[1:])
        both, final = (
            without_a_step(run, sizes[2], 20 if sizes[2] > 20 else 10) if mistake == "step" else run(every, None)
        )
        h, c = both.unbind(-1)
        return (swapped(h), c, final) if mistake == "channels" else (h, c, final)

    gated.agree(tensors, **options)
    monkeypatch.setattr(gated, "gated_unit", gated_unit)
    with pytest.raises(AssertionError, match="elements are off"):
        gated.agree(tensors, **options)


@every_mistake
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("per_channel", [False, True])
def test_the_time_invariant_recurrence(mistake, method, per_channel, monkeypatch):
    right, real = lti.lti, lti.test_a_method_is_the_loop_in_values_and_all_gradients

    def mistaken(u, A, B, state, **options):
        if mistake == "coefficient":
            return right(u, scaled(A), B, state, **options)
        if mistake == "step":
            return without_a_step(
                lambda at, carried: right(u[:, at], A, B, state if carried is None else carried, **options), 65, 32
            )
        memory, final = right(u, A, B, state, **options)
        return swapped(memory, axis=2), final

    monkeypatch.setattr(lti, "lti", mistaken)
    with pytest.raises(AssertionError, match="elements are off"):
        real(method, 65, True, False, per_channel)


@every_mistake
@pytest.mark.parametrize("T", [17, 65])
@pytest.mark.parametrize("varying", [False, True])
def test_the_recurrence_of_matrices(mistake, T, varying, monkeypatch):
    right = matrix.matrix_recurrence

    def mistaken(A, x, state, **options):
        if mistake == "coefficient":
            return right(scaled(A), x, state, **options)
        if mistake == "step":

            def run(at, carried):
                return right(A[:, at] if varying else A, x[:, at], state if carried is None else carried)

            return without_a_step(run, T, 16)
        states, final = right(A, x, state, **options)
        return swapped(states), final

    monkeypatch.setattr(matrix, "matrix_recurrence", mistaken)
    with pytest.raises(AssertionError, match="elements are off"):
        matrix.test_values_and_gradients_are_the_loops(T, varying, False)


@every_mistake
@contract.every_streaming_layer
def test_one_pass_of_every_layer(mistake, case):
    layer = contract.build(case)
    arguments = contract.inputs(layer)

    def with_mistake(layer, x, state, lengths, reset):
        if mistake == "coefficient":
            given = dict(layer.named_parameters())
            name = next((name for name in given if "theta" not in name), None)
            if name is None:  # nothing of the layer is trained
                late = torch.arange(x.shape[1])[:, None] == x.shape[1] - 1
                return layer(scaled(x, x * late), state)
            return torch.func.functional_call(layer, given | {name: scaled(given[name])}, (x, state))
        if mistake == "step":
            edge = contract.SPLIT
            first, _ = layer(x[:, :edge], state)
            second, final = layer(x[:, edge:], layer(x[:, : edge - 1], state)[1])
            return (torch.cat([first, second], 1) if layer.return_sequences else second), final
        output, final = layer(x, state)
        return swapped(output, axis=-1 if output.shape[-1] > 1 else -2), final

    expected = contract.results(layer, contract.in_one_pass, *arguments)
    magnitude = contract.magnitudes_of_case(contract.CASES.index(case), "plain")
    with pytest.raises(AssertionError, match="elements are off"):
        contract.assert_close(contract.results(layer, with_mistake, *arguments), expected, magnitude)


@pytest.mark.parametrize("found", [torch.zeros(3), torch.ones(3).half()], ids=["zeros", "float16"])
def test_a_bound_of_no_size_lets_nothing_pass(found):
    with pytest.raises(AssertionError):
        bounds.assert_close(found * 1.1, torch.ones(3).double(), magnitude=0, roundings=0)
