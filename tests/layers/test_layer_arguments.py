"""The same fault in an argument gives the same class of error in every layer: TypeError for a type, else ValueError."""

import inspect

import pytest
import torch
from torch.utils import _pytree as pytree

from legato.layers import GILR, GILRLSTM, LMU, SRU, Bidirectional, Highway, LinearRNN, LinearSurrogate, Stack
from legato.layers import spread_time_scales as spread
from legato.models import Embedding, LanguageModel
from test_contract import ARGUMENTS, BATCH, STEPS, build, every_layer, inputs, layer_classes

pytestmark = pytest.mark.bad_input

LENGTHS, RESET = torch.full((BATCH,), STEPS), torch.zeros(BATCH, STEPS, dtype=torch.bool)
# What is changed of (x, state), the options, and the error.
CALLS = {
    "x is an array": (lambda x, state: (x.numpy(), state), {}, TypeError),
    "x is None": (lambda x, state: (None, state), {}, TypeError),
    "x has integers": (lambda x, state: (x.long(), state), {}, TypeError),
    "x is complex": (lambda x, state: (x.to(torch.complex128), state), {}, TypeError),
    "x has another precision": (lambda x, state: (x.float(), state), {}, ValueError),
    "x has two axes": (lambda x, state: (x[0], state), {}, ValueError),
    "x has other channels": (lambda x, state: (x[..., :-1], state), {}, ValueError),
    "x is on another device": (lambda x, state: (x.to("meta"), state), {}, ValueError),
    "x is sparse": (lambda x, state: (x.to_sparse(), state), {}, ValueError),
    "state is a number": (lambda x, state: (x, 0), {}, TypeError),
    "state is a tensor": (lambda x, state: (x, x), {}, TypeError),
    "a state is None": (lambda x, state: (x, changed(state, lambda s: None)), {}, TypeError),
    "a state has integers": (lambda x, state: (x, changed(state, torch.Tensor.long)), {}, TypeError),
    "a state has another precision": (lambda x, state: (x, changed(state, torch.Tensor.float)), {}, ValueError),
    "a state has other rows": (lambda x, state: (x, changed(state, lambda s: s[:-1])), {}, ValueError),
    "lengths are a list": (lambda x, state: (x, state), {"lengths": LENGTHS.tolist()}, TypeError),
    "lengths have fractions": (lambda x, state: (x, state), {"lengths": LENGTHS.double()}, TypeError),
    "lengths are of other rows": (lambda x, state: (x, state), {"lengths": LENGTHS[:-1]}, ValueError),
    "lengths are beyond T": (lambda x, state: (x, state), {"lengths": LENGTHS + 1}, ValueError),
    "lengths are negative": (lambda x, state: (x, state), {"lengths": -LENGTHS}, ValueError),
    "reset is a list": (lambda x, state: (x, state), {"reset": RESET.tolist()}, TypeError),
    "reset has integers": (lambda x, state: (x, state), {"reset": RESET.int()}, TypeError),
    "reset has other steps": (lambda x, state: (x, state), {"reset": RESET[:, 1:]}, ValueError),
}


def changed(state, change):
    return pytree.tree_map(change, state)


@every_layer
@pytest.mark.parametrize(("change", "options", "error"), CALLS.values(), ids=CALLS)
def test_a_call_raises_the_class_of_the_fault(case, change, options, error):
    layer = build(case)
    x, state, _, _ = inputs(layer)
    state = changed(state, torch.Tensor.detach)
    arguments = change(x.detach(), state)
    with pytest.raises(error) as raised:
        layer(*arguments, **options)
    assert type(raised.value) is error


NUMBERS = {"a fraction": (2.5, TypeError), "text": ("3", TypeError), "None": (None, TypeError), "zero": (0, ValueError)}


@pytest.mark.parametrize("layer", layer_classes())
@pytest.mark.parametrize(("value", "error"), NUMBERS.values(), ids=NUMBERS)
def test_a_size_raises_the_class_of_the_fault(layer, value, error):
    required = [p.name for p in inspect.signature(layer).parameters.values() if p.default is p.empty]
    arguments = {name: ARGUMENTS[name] for name in required}
    for name in required:
        if name != "theta":
            with pytest.raises(error, match=f"expected {name} to be an int"):
                layer(**arguments | {name: value})


def gates(x):
    return x.sigmoid(), x


X, EMBEDDING = torch.randn(2, 5, 3), Embedding(9, 3)
BUILDS = {
    "activation is a number": (lambda: LMU(3, 4, order=2, theta=4, activation=1), TypeError),
    "activation is None": (lambda: SRU(3, 4, activation=None), TypeError),
    "activation is unknown": (lambda: GILRLSTM(3, 4, activation="rleu"), ValueError),
    "forget_bias is text": (lambda: GILR(3, 4, forget_bias="1"), TypeError),
    "forget_bias is infinite": (lambda: GILR(3, 4, forget_bias=float("inf")), ValueError),
    "dropout is text": (lambda: Stack(GILR(3, 3), GILR(3, 3), dropout="0.1"), TypeError),
    "dropout is one": (lambda: Stack(GILR(3, 3), GILR(3, 3), dropout=1.0), ValueError),
    "theta is text": (lambda: LMU(3, 4, order=2, theta="4"), TypeError),
    "theta is below one": (lambda: LMU(3, 4, order=2, theta=0.5), ValueError),
    "a stack of modules": (lambda: Stack(torch.nn.Linear(3, 3)), TypeError),
    "a stack of a class": (lambda: Stack(GILR), TypeError),
    "a stack of other widths": (lambda: Stack(GILR(3, 4), GILR(3, 4)), ValueError),
    "Stack.of a layer": (lambda: Stack.of(GILR(3, 4), 3, 4), TypeError),
    "two directions of a module": (lambda: Bidirectional(GILR(3, 4), torch.nn.Linear(3, 4)), TypeError),
    "two directions of other widths": (lambda: Bidirectional(GILR(3, 4), GILR(2, 4)), ValueError),
    "a surrogate that is a module": (lambda: LinearSurrogate(torch.nn.GRUCell(3, 4), torch.nn.GRU(3, 4)), TypeError),
    "a cell that is a layer": (lambda: LinearSurrogate(GILR(3, 4), GILR(3, 4)), TypeError),
    "a cell of another width": (lambda: LinearSurrogate(torch.nn.GRUCell(3, 5), GILR(3, 4)), ValueError),
    "a cell that gives no tensor": (lambda: LinearSurrogate(lambda s, x: None, GILR(3, 4))(X), TypeError),
    "a cell that gives another width": (lambda: LinearSurrogate(lambda s, x: x, GILR(3, 4))(X), ValueError),
    "no gates": (lambda: LinearRNN(3, 4), TypeError),
    "gates that are one tensor": (lambda: LinearRNN(3, 3, torch.sigmoid)(X), TypeError),
    "gates of another width": (lambda: LinearRNN(3, 4, gates)(X), ValueError),
    "highway of integers": (lambda: Highway(3)(X.long()), TypeError),
    "highway of other channels": (lambda: Highway(3)(X[..., 1:]), ValueError),
    "a bias that is a list": (lambda: spread([0.0, 0.0], 1, 10), TypeError),
    "a bias with two axes": (lambda: spread(torch.zeros(2, 2), 1, 10), ValueError),
    "tokens with fractions": (lambda: EMBEDDING(X), TypeError),
    "tokens beyond the vocabulary": (lambda: EMBEDDING(torch.tensor([9])), ValueError),
    "a model of modules": (lambda: LanguageModel(EMBEDDING, [torch.nn.Linear(3, 3)]), TypeError),
    "a model of other widths": (lambda: LanguageModel(EMBEDDING, [GILR(2, 3)]), ValueError),
}


@pytest.mark.parametrize(("run", "error"), BUILDS.values(), ids=BUILDS)
def test_other_arguments_raise_the_class_of_the_fault(run, error):
    with pytest.raises(error) as raised:
        run()
    assert type(raised.value) is error
