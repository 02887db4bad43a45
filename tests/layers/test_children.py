"""Modules inside a layer are called: adapters, hooks, pruning, parametrisations and quantisation take effect."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import bounds
import draws
from legato.layers import GILR, GILRLSTM, LMU, QRNN, LinearSurrogate, MinLSTM, RecurrentLMU

SIZES = {"order": 4, "theta": 6.0, "dtype": torch.float64}
LAYERS = {
    "LMU": lambda: LMU(3, 5, memory_size=2, **SIZES),
    "LMU, last output": lambda: LMU(3, 5, memory_size=3, return_sequences=False, **SIZES),
    "LMU, dropout": lambda: LMU(3, 5, memory_dropout=0.5, **SIZES).eval(),
    "RecurrentLMU": lambda: RecurrentLMU(3, 5, memory_size=2, bias=True, **SIZES),
    "RecurrentLMU, gru": lambda: RecurrentLMU(3, 5, hidden_cell="gru", **SIZES),
    "RecurrentLMU, lstm": lambda: RecurrentLMU(3, 5, hidden_cell="lstm", **SIZES),
    "LinearSurrogate, LSTM": lambda: LinearSurrogate(nn.LSTMCell(3, 5), GILR(3, 5)).double(),
    "LinearSurrogate, GRU": lambda: LinearSurrogate(nn.GRUCell(3, 5), GILR(3, 5)).double(),
}
# Children with weights; the surrogate of a LinearSurrogate is a layer that is called as it is.
CHILDREN = [(kind, name) for kind, build in LAYERS.items() for name, _ in build().named_children()]
every_child = pytest.mark.parametrize(("kind", "name"), CHILDREN)
LINEAR = [(kind, name) for kind, name in CHILDREN if type(getattr(LAYERS[kind](), name)) is nn.Linear]
every_linear = pytest.mark.parametrize(("kind", "name"), LINEAR)


class Adapter(nn.Module):
    """A low-rank adapter: the base layer's output plus a product of two small matrices."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, dtype=torch.float64)
        self.up = nn.Linear(2, base.out_features, dtype=torch.float64)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def build(kind):
    draws.seed(0)
    layer = LAYERS[kind]()
    with torch.no_grad():
        for parameter in layer.parameters():  # a weight that starts at zero would hide a child that is not called
            if not parameter.any():
                parameter.normal_(std=0.3)
    return layer


def data(layer, requires_grad=False):
    draws.seed(1)
    x = torch.randn(3, 40, 3, dtype=torch.float64, requires_grad=requires_grad)
    lengths, reset = torch.tensor([40, 0, 25]), torch.rand(3, 40) < 0.1
    state = layer.initial_state(3)
    leaves, form = torch.utils._pytree.tree_flatten(state)
    state = torch.utils._pytree.tree_unflatten([torch.randn_like(leaf) / 2 for leaf in leaves], form)
    return x, state, lengths, reset


def results(layer, x, state, lengths, reset):
    output, final = layer(x, state, lengths=lengths, reset=reset)
    values = [output, *torch.utils._pytree.tree_leaves(final)]
    weights = [torch.linspace(-1, 1, v.numel(), dtype=v.dtype).view_as(v) for v in values]
    loss = sum((w * v).sum() for w, v in zip(weights, values, strict=True))
    return values + list(torch.autograd.grad(loss, list(layer.parameters())))


def assert_agrees(found, run, *tensors):
    """Sums of at most 16 products a step, over 40 steps."""
    bounds.assert_agrees(found, run, *tensors, terms=40 * 16)


def differ(found, before):
    """By far more than the roundings of another order of the same sums."""
    return (found - before).norm() > 1e-3 * before.norm()


@every_child
def test_a_hooked_child_is_called_and_changes_no_result(kind, name):
    layer, plain, calls = build(kind), build(kind), []
    getattr(layer, name).register_forward_hook(lambda *_: calls.append(name))
    x, state, lengths, reset = data(layer)
    found = results(layer, x, state, lengths, reset)
    assert_agrees(found, lambda x, state: results(plain, x, state, lengths, reset), x, state)
    assert calls


@every_child
def test_a_forward_hook_can_replace_what_a_child_returns(kind, name):
    layer = build(kind)
    before = results(layer, *data(layer))[0]

    def halve(module, arguments, result):
        return (result[0] / 2, *result[1:]) if isinstance(result, tuple) else result / 2

    getattr(layer, name).register_forward_hook(halve)
    assert differ(results(layer, *data(layer))[0], before)


@every_linear
def test_an_adapter_changes_the_output_and_is_trained(kind, name):
    layer = build(kind)
    x, state, _, _ = data(layer)
    plain = layer(x, state)[0]
    setattr(layer, name, Adapter(getattr(layer, name)))
    output, _ = layer(x, state)
    assert differ(output, plain)
    output.sum().backward()
    adapter = getattr(layer, name)
    assert adapter.down.weight.grad.any()
    steps = []
    for t in range(x.shape[1]):
        y, state = layer.step(x[:, t], state)
        steps.append(y)

    def last(x, state):
        one_pass = layer(x, state)[0]
        return one_pass[:, -1] if layer.return_sequences else one_pass

    assert_agrees(steps[-1], last, x, data(layer)[1])


@every_linear
def test_a_pruned_child_is_masked_in_every_update(kind, name):
    layer = build(kind)
    prune.l1_unstructured(getattr(layer, name), "weight", amount=0.3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(data(layer)[0])[0].square().sum().backward()
        optimizer.step()
    child = getattr(layer, name)
    layer(data(layer)[0])
    assert torch.equal(child.weight == 0, child.weight_mask == 0)


@every_linear
def test_a_parametrised_child_computes_with_its_new_weight(kind, name):
    layer, reference = build(kind), build(kind)
    with torch.no_grad():
        getattr(reference, name).weight.mul_(2)
    torch.nn.utils.parametrize.register_parametrization(getattr(layer, name), "weight", Doubled())
    x = data(layer)[0]
    assert_agrees(layer(x)[0], lambda x: reference(x)[0], x)
    normed, reference = build(kind), build(kind)
    parametrizations.weight_norm(getattr(normed, name))
    assert_agrees(normed(x)[0], lambda x: reference(x)[0], x)


@every_linear
def test_a_child_with_a_forward_of_its_own_is_called(kind, name):
    layer = build(kind)
    child = getattr(layer, name)
    plain = layer(data(layer)[0])[0]
    child.forward = lambda x: 2 * nn.Linear.forward(child, x)
    assert differ(layer(data(layer)[0])[0], plain)


def test_a_wrapped_cell_still_gets_input_and_state_in_its_order():
    layer, plain = build("LinearSurrogate, GRU"), build("LinearSurrogate, GRU")
    x, state, _, _ = data(layer)

    class Wrapper(nn.Module):
        def __init__(self, cell):
            super().__init__()
            self.cell = cell

        def forward(self, x, hidden):
            return self.cell(x, hidden)

    layer.cell = Wrapper(layer.cell)
    assert_agrees(layer(x, state)[0], lambda x, state: plain(x, state)[0], x, state)


@pytest.mark.parametrize("kind", LAYERS)
def test_dynamically_quantised_children_are_near_the_layer(kind):
    layer = build(kind).float().eval()
    x = data(layer)[0].float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kinds = {nn.Linear, nn.LSTMCell, nn.GRUCell}
        quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(layer), kinds, dtype=torch.qint8)
    assert any("quantized" in type(child).__module__ for child in quantised.children())
    expected, found = layer(x)[0], quantised(x)[0]
    # Eight bits for weights and inputs: each product is off by a hundredth of the largest, here four in a chain.
    assert 0 < (found - expected).norm() <= 0.1 * expected.norm()


@every_child
def test_global_hooks_are_called_for_children(kind, name):
    layer, names = build(kind), []
    child = getattr(layer, name)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: names.append(module))
    layer(data(layer)[0])
    handle.remove()
    assert any(module is child for module in names)


@pytest.mark.parametrize("kind", [GILR, GILRLSTM, QRNN, MinLSTM])
def test_steps_of_a_pruned_layer_follow_its_weights(kind):
    layer = kind(3, 5, dtype=torch.float64)
    prune.l1_unstructured(layer, "weight", amount=0.3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x = torch.randn(2, 6, 3, dtype=torch.float64)
    for _ in range(3):  # a weight that was masked once and not again has no second backward pass
        optimizer.zero_grad()
        state, outputs = layer.initial_state(2), []
        for t in range(x.shape[1]):
            output, state = layer.step(x[:, t], state)
            outputs.append(output)
        torch.stack(outputs, 1).square().sum().backward()
        optimizer.step()
    output, _ = layer.step(x[:, 0], layer.initial_state(2))
    assert_agrees(output, lambda x: layer(x[:, :1])[0][:, 0], x)
