import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import bounds
import draws
from legato import GILR, GILRLSTM, LMU, SRU, Bidirectional, Stack, in_segments


def network():
    draws.seed(0)
    return Stack(LMU(3, 4, order=4, theta=6), GILRLSTM(4, 5)).double()


def leaves(state):
    return [tensor for part in state for tensor in part]


def given(layer):
    """A sequence and random states."""
    draws.seed(1)
    x = torch.randn(2, 65, 3, dtype=torch.float64, requires_grad=True)
    return x, [torch.randn_like(s).requires_grad_() for s in leaves(layer.initial_state(2))]


def results(layer, run, x, of_state):
    """Output, final states and all gradients of a weighted sum of both."""
    rest = iter(of_state)
    state = tuple(type(part)(*(next(rest) for _ in part)) for part in layer.initial_state(2))
    output, final = run(x, state)
    found = [output, *leaves(final)]
    draws.seed(2)
    loss = sum((torch.randn_like(value) * value).sum() for value in found)
    return found + list(torch.autograd.grad(loss, [x, *of_state, *layer.parameters()]))


def assert_agrees(found, run, *tensors, steps=65):
    """Sums of at most 16 products a step."""
    bounds.assert_agrees(found, run, *tensors, terms=16 * steps)


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("steps", [1, 16, 64, 65, 1000])
def test_segments_equal_one_pass_with_every_gradient(steps, recompute):
    layer = network()
    x, state = given(layer)
    found = results(layer, lambda *x: in_segments(layer, *x, steps=steps, recompute=recompute), x, state)
    assert_agrees(found, lambda x, state: results(layer, layer, x, state), x, state)


def test_the_last_output_alone_equals_that_of_one_pass():
    layer = network()

    def last(x, state):
        output, state = layer(x, state)
        return output[:, -1], state

    x, state = given(layer)
    found = results(layer, lambda *x: in_segments(layer, *x, steps=16, last_only=True), x, state)
    assert_agrees(found, lambda x, state: results(layer, last, x, state), x, state)


def test_what_is_inside_the_segments_is_not_kept():
    """Saved for the backward: with recompute one state a segment, without it what every step needs."""

    def saved_elements(recompute):
        layer, x = GILRLSTM(3, 8), torch.randn(2, 640, 3)
        seen = {}

        def pack(tensor):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output, _ = in_segments(layer, x, steps=64, last_only=True, recompute=recompute)
        assert output.requires_grad
        return sum(seen.values()) - x.numel() - sum(p.numel() for p in layer.parameters())

    a_state = 2 * 2 * 8
    whole = saved_elements(False)
    assert whole >= 640 * a_state
    assert saved_elements(True) <= whole / 10 + 11 * a_state  # a first look at one segment, and the states


def test_dropout_draws_the_same_numbers_again_in_the_backward():
    draws.seed(0)
    layer = Stack.of(GILRLSTM, 3, 8, num_layers=2, dropout=0.5).double()
    x = torch.randn(2, 64, 3, dtype=torch.float64)

    def run(x, recompute=False):
        draws.seed(3)
        output, _ = in_segments(layer, x, steps=16, recompute=recompute)
        return [output, *torch.autograd.grad(output.square().sum(), list(layer.parameters()))]

    found = run(x, recompute=True)
    assert torch.equal(found[0], run(x)[0])
    assert_agrees(found, run, x)


def test_autocast_is_the_same_in_the_second_pass():
    layer, x = GILRLSTM(3, 8), torch.randn(2, 64, 3)
    wide = copy.deepcopy(layer).double()

    def run(layer, x, **options):
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(options)):
            output, _ = in_segments(layer, x, steps=16, **options)
        return [output, *torch.autograd.grad(output.to(x.dtype).square().sum(), list(layer.parameters()))]

    for recompute in (True, False):
        found = run(layer, x, recompute=recompute)
        # Weights, input and products are rounded to 16 bits, and so are sums over segments.
        bounds.assert_agrees(found, lambda x: run(wide, x), x, terms=4 + 4, dtype=torch.bfloat16)
    again = [run(layer, x, recompute=recompute)[0] for recompute in (True, False)]
    assert torch.equal(*again)


def test_tokens_and_functions_do_as_well_as_channels_and_layers():
    embedding, layer = torch.nn.Embedding(7, 3).double(), GILRLSTM(3, 4).double()
    tokens = torch.randint(7, (2, 20))
    output, _ = in_segments(lambda x, state: layer(embedding(x), state), tokens, steps=6)
    assert_agrees(output, lambda x: layer(x)[0], embedding(tokens), steps=20)


def test_layers_whose_weights_are_held_fixed_are_passed_by():
    layer = network()
    layer.layers[0].requires_grad_(False)
    x = torch.randn(2, 20, 3, dtype=torch.float64)
    trained = list(layer.layers[1].parameters())

    def gradients(run, x):
        return torch.autograd.grad(run(x)[0].square().sum(), trained)

    found = gradients(lambda x: in_segments(layer, x, steps=6), x)
    assert_agrees(found, lambda x: gradients(layer, x), x, steps=20)
    assert not in_segments(layer.requires_grad_(False), x, steps=6)[0].requires_grad


@pytest.mark.parametrize("last_only", [True, False])
def test_a_read_out_is_trained_over_weights_held_fixed(last_only):
    layer, head = network().requires_grad_(False), torch.nn.Linear(5, 2).double()
    x = torch.randn(2, 20, 3, dtype=torch.float64)

    def read(x, state):
        output, state = layer(x, state)
        return head(output), state

    def gradients(output):
        return torch.autograd.grad(output.square().sum(), list(head.parameters()))

    found = gradients(in_segments(read, x, steps=6, last_only=last_only)[0])
    at = -1 if last_only else slice(None)
    assert_agrees(found, lambda x: gradients(read(x, None)[0][:, at]), x, steps=20)


def test_a_second_derivative_is_refused_where_it_would_be_lost():
    layer, x = GILR(3, 4), torch.randn(2, 20, 3, requires_grad=True)
    output, _ = in_segments(layer, x, steps=6)
    with pytest.raises(RuntimeError, match=r"create_graph=True.*recompute=False"):
        torch.autograd.grad(output.sum(), x, create_graph=True)
    output, _ = in_segments(layer, x, steps=6, recompute=False)
    (first,) = torch.autograd.grad(output.sum(), x, create_graph=True)
    assert torch.autograd.grad(first.square().sum(), x)[0].any()


def test_transforms_get_a_plain_loop():
    layer, x = GILR(3, 4).double(), torch.randn(2, 20, 3, dtype=torch.float64, requires_grad=True)

    def loss(x):
        return in_segments(layer, x, steps=6)[0].square().sum()

    def gradient(x):
        return torch.autograd.grad(layer(x)[0].square().sum(), x)[0]

    assert_agrees(torch.func.grad(loss)(x), gradient, x, steps=20)


def test_no_steps_give_no_outputs():
    output, state = in_segments(GILRLSTM(3, 4), torch.zeros(2, 0, 3), steps=4)
    assert output.shape == (2, 0, 4)
    assert not state.memory.any()


@pytest.mark.bad_input
def test_wrong_arguments_raise_errors_that_help():
    layer, x = GILRLSTM(3, 4), torch.zeros(2, 0, 3)
    with pytest.raises(ValueError, match="expected steps to be an int of at least 1, got 0"):
        in_segments(layer, x, steps=0)
    with pytest.raises(ValueError, match="expected at least one step for the last output"):
        in_segments(layer, x, steps=4, last_only=True)


@pytest.mark.parametrize(
    "layer",
    [
        Bidirectional(GILR(3, 4), GILR(3, 4)),
        Stack.of(SRU, 3, 4, bidirectional=True),
        torch.nn.ModuleList([Stack.of(SRU, 3, 4, bidirectional=True)]),
        torch.nn.LSTM(3, 4, bidirectional=True, batch_first=True),
    ],
    ids=lambda layer: type(layer).__name__,
)
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("steps", [5, 20])
def test_a_layer_that_reads_from_the_end_is_refused(layer, steps, recompute):
    with pytest.raises(ValueError, match=r"expected a layer that reads forward only, got a .* bidirectional"):
        in_segments(layer, torch.randn(2, 20, 3), steps=steps, recompute=recompute)


@pytest.mark.bad_input
def test_a_layer_that_gives_its_last_output_only_is_refused():
    layer = LMU(3, 4, order=4, theta=6, return_sequences=False)
    for refused in (layer, Stack(GILR(3, 3), layer)):
        with pytest.raises(ValueError, match="return_sequences=True and pass last_only=True"):
            in_segments(refused, torch.randn(2, 20, 3), steps=5, last_only=True)


class Routed(torch.nn.Module):
    """Two experts, the second of which is used from the first positive input on."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
        self.memory = GILR(3, 4)

    def forward(self, x, state=None):
        late = x[..., :1] > 0
        routed = torch.where(late, self.second(x), self.first(x)) if late.any() else self.first(x)
        return self.memory(routed, state)


def wrapped(layer):
    return lambda x, state: layer(x, state)


@pytest.mark.parametrize("as_given", [lambda layer: layer, wrapped], ids=["module", "function"])
def test_parameters_of_later_segments_get_gradients(as_given):
    layer, x = Routed().double(), torch.randn(2, 40, 3, dtype=torch.float64)
    x[:, :10, 0] = -1
    found = squared_gradients(lambda x: in_segments(as_given(layer), x, steps=10)[0], layer)(x)
    assert_agrees(found, squared_gradients(lambda x: layer(x)[0], layer), x, steps=40)
    assert found[2].any()


def squared_gradients(run, layer):
    """The function of x that gives the gradients of the sum of the squares of run(x) by the layer's parameters."""
    return lambda x: torch.autograd.grad(run(x).square().sum(), list(layer.parameters()))


@pytest.mark.parametrize("as_given", [lambda layer: layer, wrapped], ids=["module", "function"])
@pytest.mark.parametrize("last_only", [True, False])
def test_a_gradient_hook_acts_once_on_the_whole_gradient(as_given, last_only):
    layer, x, calls = GILRLSTM(3, 4).double(), torch.randn(2, 40, 3, dtype=torch.float64), []
    plain = copy.deepcopy(layer)

    def expected(x):
        output = plain(x)[0][:, -1 if last_only else slice(None)]
        return list(torch.autograd.grad(output.square().sum(), [plain.weight]))

    def halve(gradient):
        calls.append(gradient.clone())
        return gradient / 2

    layer.weight.register_hook(halve)
    for _ in range(2):  # the hook is still there after the first time
        layer.zero_grad()
        calls.clear()
        in_segments(as_given(layer), x, steps=10, last_only=last_only)[0].square().sum().backward()
        assert len(calls) == 1
        assert_agrees(calls, expected, x, steps=40)
        assert torch.equal(layer.weight.grad, calls[0] / 2)


def test_gradients_of_several_outputs_at_once_reach_parameters():
    layer, x = GILR(3, 4).double(), torch.randn(2, 40, 3, dtype=torch.float64, requires_grad=True)

    def gradients(run, x):
        output, directions = run(x)[0][0, -1], torch.eye(4, dtype=torch.float64)
        return torch.autograd.grad(output, [x, *layer.parameters()], directions, is_grads_batched=True)

    found = gradients(lambda x: in_segments(layer, x, steps=10), x)
    assert_agrees(found, lambda x: one_by_one(gradients_of_rows(layer, x)), x, steps=40)


def gradients_of_rows(layer, x):
    output = layer(x)[0][0, -1]
    return [torch.autograd.grad(value, [x, *layer.parameters()], retain_graph=True) for value in output]


def one_by_one(rows):
    return tuple(torch.stack(of_one) for of_one in zip(*rows, strict=True))


@pytest.mark.parametrize("inside", [True, False])
def test_checkpoints_around_or_inside_the_segments_work(inside):
    layer, x = GILR(3, 4).double(), torch.randn(2, 40, 3, dtype=torch.float64, requires_grad=True)

    def checkpointed(x, state):
        return checkpoint(layer, x, state, use_reentrant=False)

    if inside:
        output, _ = in_segments(checkpointed, x, steps=10)
    else:
        output, _ = checkpoint(lambda x: in_segments(layer, x, steps=10), x, use_reentrant=False)

    def gradients(output, x):
        return torch.autograd.grad(output.square().sum(), [x, *layer.parameters()])

    assert_agrees(gradients(output, x), lambda x: gradients(layer(x)[0], x), x, steps=40)
