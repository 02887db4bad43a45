"""States are values: files, pickles, data loaders and exported programs take them as they take a tensor."""

import copy
import io
import pickle
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.data import default_collate

import bounds
from legato._shapes import Tensor
from legato.layers import GILR, LMU, Stack
from legato.layers.base import RecurrentLayer
from legato.models import Embedding, LanguageModel
from test_contract import BATCH, build, every_layer, every_streaming_layer, inputs


class OwnState(NamedTuple):
    memory: Tensor


class Own(RecurrentLayer):
    """A layer of a user's own."""

    State = OwnState

    def __init__(self):
        super().__init__(3)
        self.hidden_size = 3

    def _state_shapes(self):
        return ((3,),)

    def _sequence(self, x, state, lengths, reset):
        states = x.cumsum(1)
        return states, OwnState(states), OwnState(states[:, -1])

    def _weight(self):
        return torch.empty(0)


def assert_same(found, expected):
    found, form = pytree.tree_flatten(found)
    expected, expected_form = pytree.tree_flatten(expected)
    assert form == expected_form  # the classes too
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def loaded(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file)


def pickled(value):
    return pickle.loads(pickle.dumps(value))


def state_of(layer):
    return pytree.tree_map(torch.Tensor.detach, inputs(layer)[1])


every_copy = pytest.mark.parametrize("copied", [loaded, pickled, copy.deepcopy])


@every_layer
@every_copy
def test_a_state_in_a_checkpoint_comes_back(case, copied):
    layer = build(case)
    checkpoint = {"model": layer.state_dict(), "state": state_of(layer)}
    found = copied(checkpoint)
    assert_same(found["state"], checkpoint["state"])
    x, _, _, _ = inputs(layer)
    assert_same(layer(x, found["state"])[0], layer(x, checkpoint["state"])[0])


@every_copy
def test_states_of_models_and_own_layers_come_back(copied):
    words = Embedding(9, 4)
    language = LanguageModel(words, lambda size: LMU(size, size, order=2, theta=4.0), num_layers=2)
    tokens = torch.randint(1, 9, (2, 5))
    with torch.no_grad():
        values = [
            language(tokens)[1],
            Stack(GILR(3, 4), GILR(4, 4)).initial_state(2),
            Own()(torch.randn(2, 5, 3))[1],
        ]
    for value in values:
        assert_same(copied(value), value)


def test_a_checkpoint_is_loaded_by_a_process_that_ran_nothing(tmp_path):
    layer = Stack(LMU(3, 4, order=2, theta=4.0), GILR(4, 4))
    torch.save({"state": layer.initial_state(2)}, tmp_path / "state.pt")
    code = "import sys, torch, legato; print(torch.load(sys.argv[1])['state'][0].memory.shape)"
    run = [sys.executable, "-c", code, str(tmp_path / "state.pt")]
    assert "[2, 1, 2]" in subprocess.run(run, capture_output=True, text=True, check=True).stdout


@every_layer
def test_states_are_collated_by_a_data_loader(case):
    layer = build(case)
    state = state_of(layer)
    rows = [pytree.tree_map(lambda s, row=row: s[row], state) for row in range(BATCH)]
    collated = default_collate(rows)
    for a, b in zip(pytree.tree_leaves(collated), pytree.tree_leaves(state), strict=True):
        assert torch.equal(a, b)
    x, _, _, _ = inputs(layer)
    assert_same(layer(x, collated), layer(x, state))


@every_layer
def test_the_form_of_a_state_can_be_written_to_a_file(case):
    state = state_of(build(case))
    form = pytree.tree_structure(state)
    assert pytree.treespec_loads(pytree.treespec_dumps(form)) == form


class Step(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, state):
        return self.layer.step(x, state)


@pytest.mark.compiled
@every_streaming_layer
def test_an_exported_program_takes_a_state_after_loading(case):
    layer = build(case, torch.float32)
    x, state, _, _ = inputs(layer, dtype=torch.float32)
    x, state = x.detach()[:, 0], state_of(layer)
    state = pytree.tree_map(lambda s: s.float(), state)
    layer.requires_grad_(False)
    program = torch.export.export(Step(layer), (x, state))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    found = torch.export.load(file).module()(x, state)
    assert pytree.tree_structure(found) == pytree.tree_structure(layer.step(x, state))
    # 4 roundings of a gate, or sums of at most 16 products, one behind the other.
    bounds.assert_agrees(found, layer.double().step, x, state, terms=2 * 16)


def test_two_layers_may_share_a_state():
    class Other(Own):
        State = OwnState

    assert_same(loaded(Other().initial_state(2)), OwnState(torch.zeros(2, 3)))
