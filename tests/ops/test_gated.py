"""The gated unit: its kernel against the definition, values and all gradients, and what goes to the definition."""

from dataclasses import replace

import pytest
import torch
from torch.autograd import gradcheck

import bounds
import draws
import legato
from legato._gate_spec import GateSpec
from legato.ops import backends, gated
from legato.ops.gated import gated_recurrence, gated_unit

PLAIN, CELL = GateSpec(("forget", "candidate")), GateSpec(("forget", "write", "output", "candidate"))
OUTPUT, SKIP = GateSpec(("forget", "output", "candidate")), GateSpec(("forget", "output", "skip", "candidate"))
PAST = replace(OUTPUT, skips_input=True)

pytestmark = pytest.mark.skipif(
    backends.choose("gated_unit", torch.device("cpu"))[0] is None, reason="the kernel needs numba"
)


@pytest.fixture
def filled():
    """New memory is full of NaN: an output that is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def example(spec, B, T, C, *, widths=(7,), products=False, resets=True, seed=0):
    """Tensors in float64, by name, and the spec."""
    generator = draws.generator(seed)

    def draw(*shape):  # in numbers that float32 has too
        return torch.randn(shape, generator=generator).double()

    K, widths = C * len(spec.blocks), (C, *widths[1:]) if spec.skips_input else widths
    return {
        "spec": spec,
        "inputs": [draw(B, T, width) for width in widths],
        "weights": [(draw(K, width) / width**0.5).float().double() for width in widths],
        "bias": draw(K) if widths else None,
        "products": draw(B, T, K) if products or not widths else None,
        "initial_state": draw(B, C),
        "reset": torch.rand(B, T, generator=generator) < 0.05 if resets else None,
    }


def evaluate(function, tensors, dtype=torch.float32, activation=None, **fields):
    """Outputs and the gradients of a weighted sum of them by every tensor, in float64; ``fields`` are of the spec."""

    def leaf(x):
        return x.to(dtype).detach().requires_grad_() if isinstance(x, torch.Tensor) else x

    inputs, weights = ([leaf(x) for x in tensors[name]] for name in ("inputs", "weights"))
    bias, products, initial_state = given = [leaf(tensors[name]) for name in ("bias", "products", "initial_state")]
    leaves = [x for x in (*inputs, *weights, *given) if isinstance(x, torch.Tensor)]
    options = {"products": products, "reset": tensors["reset"], "activation": activation}
    spec = replace(tensors["spec"], **fields)
    outputs = function(tuple(inputs), tuple(weights), bias, spec, initial_state, **options)
    generator = draws.generator(1)
    sums = [(y * torch.randn(y.shape, generator=generator).to(y.dtype)).sum() for y in outputs]
    return [x.detach() for x in (*outputs, *torch.autograd.grad(torch.stack(sums).sum(), leaves))]


def by_definition(inputs, weights, bias, spec, initial_state, *, products=None, reset=None, activation=None):
    return gated._definition(inputs, weights, bias, products, initial_state, reset, spec, activation, None)


def expected(tensors, **options):
    """The definition in float64, with the magnitude and the roundings that ``bounds.assert_close`` takes."""

    def run(tensors):
        return evaluate(by_definition, tensors, torch.float64, **options)

    exact = run(tensors)
    return exact, {"magnitude": bounds.sensitivity(run, tensors), "roundings": roundings(tensors, exact)}


def roundings(tensors, exact):
    """Of each output and gradient: 4 for sigmoid and tanh, or the sums of the matrix products where they have more."""
    inputs, weights = tensors["inputs"], tensors["weights"]
    B, T, C = exact[1].shape
    summed = sum(x.shape[-1] for x in inputs) + 2  # the products with inputs; bias and what is known already
    rows, columns = B * T, C * len(tensors["spec"].blocks)
    leaves = [columns] * len(inputs) + [rows] * len(weights) + [rows] * (tensors["bias"] is not None)
    leaves += [0] * (len(exact) - 3 - len(leaves))
    return [bounds.likely(y.numel(), max(16, summed, n)) for y, n in zip(exact, [0, 0, 0, *leaves], strict=True)]


def agree(tensors, **options):
    exact, bound = expected(tensors, **options)
    found = evaluate(gated_unit, tensors, **options)
    assert "gated_unit: numba" in legato.explain()
    bounds.assert_close(found, exact, dtype=torch.float32, **bound)


@pytest.mark.parametrize("candidate_tanh", [False, True])
@pytest.mark.parametrize("T", [1, 63, 65, 1000])
def test_the_plain_unit_agrees_at_awkward_lengths(filled, T, candidate_tanh):
    agree(example(PLAIN, 2, T, 5), candidate_tanh=candidate_tanh)


@pytest.mark.parametrize("candidate_tanh", [False, True])
@pytest.mark.parametrize("activation", [None, torch.tanh])
@pytest.mark.parametrize(
    ("spec", "more"),
    [
        (OUTPUT, {}),
        (PAST, {}),
        (SKIP, {}),
        (CELL, {"widths": (3, 4)}),
        (CELL, {"products": True}),
        (CELL, {"widths": ()}),
    ],
)
def test_every_spec_agrees(filled, spec, more, candidate_tanh, activation):
    agree(example(spec, 3, 40, 33, **more), candidate_tanh=candidate_tanh, activation=activation)


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("more", [{}, {"widths": ()}])
def test_delayed_states_agree(filled, more, resets):
    agree(example(PLAIN, 3, 65, 33, resets=resets, **more), candidate_tanh=True, delayed=True)


@pytest.mark.parametrize(("B", "T", "C"), [(1, 700, 70), (5, 100, 70), (40, 9, 70), (1, 20, 1200)])
def test_sequences_of_several_parts_agree(filled, two_threads, monkeypatch, B, T, C):
    """The products of a part are limited: here to 100 steps or so, or to a few batch rows."""
    from legato.ops.kernels import numba_gated

    monkeypatch.setattr(numba_gated, "_CHUNK_NUMBERS", 300 * 70)
    agree(example(PAST, B, T, C, widths=(40,)), activation=torch.tanh)
    agree(example(PLAIN, B, T, C), candidate_tanh=True, delayed=True)


@pytest.mark.parametrize("widths", [(4,), (40,)])
def test_any_number_of_threads_gives_the_same_states(two_threads, widths):
    tensors = example(PLAIN, 1, 500, 200, widths=widths)
    exact, bound = expected(tensors)
    for threads in (2, 1):
        torch.set_num_threads(threads)
        bounds.assert_close(evaluate(gated_unit, tensors), exact, **bound)


def test_strided_tensors_agree():
    tensors = example(CELL, 2, 65, 6, widths=(5,), products=True)

    def with_strides(inputs, weights, bias, spec, initial_state, **options):
        inputs, weights = (tuple(x.mT.contiguous().mT for x in xs) for xs in (inputs, weights))
        wide = torch.cat([options.pop("products")] * 2, dim=-1)[..., : 6 * len(spec.blocks)]
        return gated_unit(inputs, weights, bias, spec, initial_state.mT.contiguous().mT, products=wide, **options)

    exact, bound = expected(tensors)
    bounds.assert_close(evaluate(with_strides, tensors), exact, **bound)


def test_sigmoid_and_tanh_are_exact_to_a_few_ulp():
    """One step: c_1 = sigmoid(forget) c_0 + sigmoid(-forget) g(candidate), of which one term is made zero."""
    x = torch.cat([torch.linspace(-87, 87, 4001), torch.linspace(-1, 1, 4001), torch.logspace(-20, 0, 50)])[None, None]
    zero, state = torch.zeros_like(x), torch.ones_like(x[0])
    kept = gated_unit((), (), None, PLAIN, state, products=torch.cat([x, zero], -1))[0]
    written = gated_unit((), (), None, PLAIN, products=torch.cat([x, zero + 1], -1))[0]
    spec = replace(PLAIN, candidate_tanh=True)
    tanh = gated_unit((), (), None, spec, products=torch.cat([zero - 200, x], -1))[0]
    exact = x.double()
    for got, expected in ((kept, exact.sigmoid()), (written, (-exact).sigmoid()), (tanh, exact.tanh())):
        # exp, a sum, a quotient, a product, and a state that is multiplied and added to zero: 8 roundings
        bounds.assert_close(got, expected, magnitude=expected.abs(), roundings=8)


@pytest.mark.parametrize("large", [90.0, 1e30, torch.inf])
def test_saturated_gates_hold_exactly(large):
    spec, state = replace(PLAIN, candidate_tanh=True), torch.full((1, 1), 3.0)
    for forget, expected in ((large, 3.0), (-large, 1.0)):
        products = torch.tensor([[[forget, large]]])
        assert gated_unit((), (), None, spec, state, products=products)[1].item() == expected


def test_nan_goes_on_until_a_reset():
    products, reset = torch.randn(1, 6, 2), torch.tensor([[False, False, False, False, True, False]])
    products[0, 2, 0] = torch.nan
    states = gated_unit((), (), None, PLAIN, products=products, reset=reset)[1]
    assert states.isnan().flatten().tolist() == [False, False, True, True, False, False]


def test_the_gradient_equals_float64_finite_differences():
    tensors = example(PAST, 2, 5, 3)
    leaves = [x.requires_grad_() for x in (*tensors["inputs"], *tensors["weights"], tensors["bias"])]

    def unit(x, weight, bias):
        return gated_unit((x,), (weight,), bias, replace(PAST, candidate_tanh=True), activation=torch.tanh)

    assert gradcheck(unit, leaves)


def test_second_derivatives_are_those_of_the_definition():
    tensors = example(PAST, 2, 9, 3, resets=False)

    def second(function, x, weight, bias, state):
        x, weight = (leaf.detach().requires_grad_() for leaf in (x, weight))
        y = function((x,), (weight,), bias, PAST, state, activation=torch.tanh)[0]
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return first, *torch.autograd.grad(first.square().sum(), (x, weight))

    leaves = tensors["inputs"][0], tensors["weights"][0], tensors["bias"], tensors["initial_state"]
    exact = second(by_definition, *leaves)
    magnitude = bounds.sensitivity(lambda *leaves: second(by_definition, *leaves), *leaves)
    # Sums over 2 * 9 rows and 9 columns, and 4 roundings in gates.
    roundings = bounds.likely(exact[0].numel(), terms=18)
    found = second(gated_unit, *(x.float() for x in leaves))
    bounds.assert_close(found, exact, magnitude=magnitude, roundings=roundings)


def test_a_tensor_in_two_places_gets_the_gradient_of_each():
    x = torch.randn(1, 6, 4)
    weights = torch.randn(8, 4), torch.randn(8, 4)

    def gradient(x, weights, create_graph=False):
        x = x.detach().requires_grad_()
        both = gated_unit((x, x), weights, None, PLAIN)[0].sum()
        return torch.autograd.grad(both, x, create_graph=create_graph)[0]

    wide = x.double(), tuple(w.double() for w in weights)
    magnitude = bounds.sensitivity(gradient, *wide)
    # 4 roundings of a gate, or sums of 8 products.
    roundings = bounds.likely(x.numel(), terms=16)
    for create_graph in (False, True):
        found = gradient(x, weights, create_graph)
        bounds.assert_close(found, gradient(*wide), magnitude=magnitude, roundings=roundings)


def test_what_needs_no_gradient_gets_none():
    x, weight, bias = torch.randn(1, 6, 4), torch.randn(12, 4, requires_grad=True), torch.randn(12)
    for spec in (OUTPUT, PAST):
        output = gated_unit((x,), (weight,), bias, spec)[0]
        output.sum().backward()
        assert x.grad is None
        (expected,) = torch.autograd.grad(
            gated_unit((x.clone().requires_grad_(),), (weight,), bias, spec)[0].sum(), weight
        )
        assert torch.equal(weight.grad, expected)
        weight.grad = None


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda x: x.double(), "float32"),
        (lambda x: x.bfloat16(), "float32"),
        (lambda x: x[:0], "nothing"),
        (lambda x: x[:, :0], "nothing"),
        (lambda x: x.to("meta"), "no kernel for meta"),
    ],
)
def test_what_the_kernel_does_not_know_goes_to_the_definition(change, why):
    products = change(torch.randn(2, 5, 6))
    states, _, final = gated_unit((), (), None, PLAIN, products=products)
    assert states.shape == (*products.shape[:2], 3)
    assert final.shape == (len(products), 3)
    assert why in legato.explain()


def test_torch_func_and_forward_mode_go_to_the_definition():
    products, tangent = torch.randn(2, 2, 5, 6)

    def last(products):
        return gated_unit((), (), None, PLAIN, products=products)[2]

    def gradient(products):
        x = products.detach().requires_grad_()
        y = last(x)
        return torch.autograd.grad(y, x, torch.ones_like(y))[0]

    forward = torch.func.jvp(last, (products,), (tangent,))[1]
    assert "torch.func" in legato.explain()
    by_vmap = torch.func.vmap(torch.func.grad(lambda x: last(x[None]).sum()))(products)
    exact = gradient(products.double())
    magnitude = bounds.sensitivity(gradient, products.double())
    for found in (by_vmap, gradient(products)):
        bounds.assert_close(found, exact, magnitude=magnitude, roundings=bounds.likely(60, terms=16))

    def directional(products, tangent):
        return (gradient(products) * tangent).sum()

    both = products.double(), tangent.double()
    # 4 roundings of a gate; the 60 products are added up here.
    bound = {"magnitude": bounds.sensitivity(directional, *both), "roundings": bounds.likely(1, terms=60)}
    bounds.assert_close(forward.sum(), directional(*both), **bound)


def test_batched_output_gradients_equal_separate_passes():
    leaves = torch.randn(1, 6, 4), torch.randn(9, 4), torch.randn(9), torch.randn(1, 3)
    grads = torch.randn(5, 1, 6, 3), torch.randn(5, 1, 3)

    def gradients(leaves, grads, **options):
        x, weight, bias, state = (leaf.detach().requires_grad_() for leaf in leaves)
        output, _, final = gated_unit((x,), (weight,), bias, OUTPUT, state, activation=torch.tanh)
        return torch.autograd.grad((output, final), (x, weight), grads, **options)

    batched = gradients(leaves, grads, is_grads_batched=True)
    wide = [x.double() for x in leaves]
    for i in range(5):
        of_row = [g[i].double() for g in grads]
        bound = {"magnitude": bounds.sensitivity(gradients, wide, of_row), "roundings": bounds.likely(36, terms=16)}
        exact = gradients(wide, of_row)
        bounds.assert_close([x[i] for x in batched], exact, **bound)
        bounds.assert_close(gradients(leaves, [g[i] for g in grads]), exact, **bound)


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@pytest.mark.parametrize("create_graph", [False, True])
def test_outputs_whose_gradient_is_not_there_give_none(create_graph):
    products = torch.randn(2, 5, 6, requires_grad=True)
    output = NoGradient.apply(gated_unit((), (), None, PLAIN, products=products)[0])
    (found,) = torch.autograd.grad(output.sum(), products, create_graph=create_graph, allow_unused=True)
    assert found is None or not found.any()


@pytest.mark.compiled
@pytest.mark.parametrize("dynamic", [False, True])
def test_it_compiles_without_gradients(dynamic):
    def unit(x, weight):
        return gated_unit((x,), (weight,), None, PAST, activation=torch.tanh)[0]

    compiled = torch.compile(unit, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    weight = torch.randn(9, 3, requires_grad=True)
    for without in (torch.no_grad, torch.inference_mode):
        x = torch.randn(2, 7, 3)
        with without():
            assert torch.equal(compiled(x, weight), unit(x, weight))


@pytest.mark.compiled
@pytest.mark.parametrize("dynamic", [False, True])
def test_it_compiles_as_one_graph(dynamic):
    def unit(x, weight, bias, state):
        return gated_unit((x,), (weight,), bias, PAST, state, activation=torch.tanh)

    compiled = torch.compile(unit, backend="aot_eager", fullgraph=True, dynamic=dynamic)

    def results(function, leaves):
        leaves = [x.detach().clone().requires_grad_() for x in leaves]
        output, _, final = function(*leaves)
        return output, final, *torch.autograd.grad(output.sum() + final.sum(), leaves)

    for T in (7, 12):
        given = torch.randn(2, T, 3), torch.randn(9, 3), torch.randn(9), torch.randn(2, 3)
        wide = [x.double() for x in given]
        magnitude = bounds.sensitivity(lambda *leaves: results(unit, leaves), *wide)
        # Sums over 2 T rows, or 4 roundings of a gate.
        bound = {"magnitude": magnitude, "roundings": bounds.likely(2 * T * 9, terms=24)}
        for function in (unit, compiled):
            bounds.assert_close(results(function, given), results(unit, wide), **bound)


def test_tied_and_free_gates_follow_the_equation():
    f, z, w = torch.randn(3, 2, 4, 3, dtype=torch.float64)
    for write in (None, w):

        def last(f, z, write):
            h = torch.zeros_like(f[:, 0])
            gate = 1 - f.sigmoid() if write is None else write.sigmoid()
            for t in range(4):
                h = f.sigmoid()[:, t] * h + gate[:, t] * z[:, t].tanh()
            return h

        states, final = gated_recurrence(f, z, write, candidate_tanh=True)
        # 4 roundings of a gate, in either of the two.
        bound = {"magnitude": bounds.sensitivity(last, f, z, write), "roundings": 2 * bounds.likely(6, terms=16)}
        bounds.assert_close(final, last(f, z, write), **bound)
        assert torch.equal(states[:, -1], final)


@pytest.mark.parametrize(
    ("spec", "fields", "message"),
    [
        (OUTPUT, {"delayed": True}, "delayed=True cannot be combined with an 'output' block"),
        (SKIP, {"skips_input": True}, "skips_input=True cannot be combined with a 'skip' block"),
    ],
)
def test_fields_that_exclude_each_other_raise(spec, fields, message):
    with pytest.raises(ValueError, match=message):
        replace(spec, **fields)


def test_an_activation_without_an_output_gate_raises():
    with pytest.raises(ValueError, match="activation needs an 'output' block"):
        gated_unit((), (), None, PLAIN, products=torch.zeros(1, 2, 4), activation=torch.tanh)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"initial_state": torch.zeros(1, 3)}, r"initial_state must be of shape \(2, 3\), got \(1, 3\)"),
        ({"spec": PAST}, r"inputs\[0\] must be of shape \(2, 5, 3\), got \(2, 5, 4\)"),
        ({"products": torch.zeros(2, 5, 8)}, r"products must be of shape \(2, 5, 9\), got \(2, 5, 8\)"),
        ({"bias": torch.zeros(8)}, r"bias must be of shape \(9,\), got \(8,\)"),
        ({"reset": torch.zeros(2, 4, dtype=torch.bool)}, r"reset must be \(batch, time\) = \(2, 5\), got \(2, 4\)"),
        (
            {"inputs": (torch.zeros(2, 5, 4), torch.zeros(1, 5, 4))},
            r"inputs\[1\] must be of shape \(2, 5, 4\), got \(1, 5, 4\)",
        ),
        ({"weights": (torch.zeros(9, 4), torch.zeros(6, 4))}, r"weights\[1\] must be of shape \(9, 4\), got \(6, 4\)"),
    ],
)
def test_wrong_shapes_raise_before_the_kernel_runs(changes, message):
    inputs, weights = (torch.zeros(2, 5, 4),) * 2, (torch.zeros(9, 4),) * 2
    given = {"inputs": inputs, "weights": weights, "bias": None, "spec": OUTPUT, **changes}
    with pytest.raises(ValueError, match=message):
        gated_unit(**given)
