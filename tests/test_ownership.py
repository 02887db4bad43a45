"""Outputs and states own their storage: writing to one changes no other, nor what a backward needs."""

from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import draws
import legato
from legato._shapes import Tensor
from legato.layers import GILR, GILRLSTM, LegendreMemory, LinearRNN
from legato.layers.base import RecurrentLayer
from legato.models import Embedding, LanguageModel, SequenceClassifier, SequenceRegressor
from legato.ops.time_invariant import METHODS
from test_contract import BATCH, SPLIT, STEPS, build, every_layer, every_streaming_layer, inputs

MODES = {"training": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}
every_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


def tensors(*values):
    return [value for value in pytree.tree_leaves(values) if isinstance(value, torch.Tensor)]


def assert_own(made, *given):
    """No two of the tensors made share storage, nor one of them with what was given."""
    taken = {tensor.untyped_storage()._cdata for tensor in tensors(*given)}
    for tensor in tensors(made):
        storage = tensor.untyped_storage()._cdata
        assert storage not in taken
        taken.add(storage)


def assert_whole(state):
    """Nothing of a state holds more memory than it needs."""
    for tensor in tensors(state):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def own_tensors(layer):
    return [*layer.parameters(), *layer.buffers()]


SITUATIONS = {
    "plain": {},
    "no state": {"state": False},
    "lengths": {"lengths": [0, SPLIT, STEPS]},
    "all lengths 0": {"lengths": [0, 0, 0]},
    "lengths and no state": {"lengths": [0, SPLIT, STEPS], "state": False},
    "resets": {"reset": True},
    "no step": {"steps": 0},
    "no step and no state": {"steps": 0, "state": False},
    "one step": {"steps": 1},
    "no row": {"batch": 0},
}


@every_layer
@every_mode
@pytest.mark.parametrize("situation", SITUATIONS.values(), ids=SITUATIONS)
def test_outputs_and_states_share_no_storage(case, mode, situation):
    layer = build(case)
    steps, batch = situation.get("steps", STEPS), situation.get("batch", BATCH)
    x, state, _, _ = inputs(layer, batch=batch, steps=steps)
    options = {}
    if "lengths" in situation:
        options["lengths"] = torch.tensor(situation["lengths"])
    if "reset" in situation:
        options["reset"] = torch.rand(batch, steps) < 0.3
    if "state" in situation:
        state = None
    with mode():
        output, final = layer(x, state, **options)
    assert_own((output, final), x, state, own_tensors(layer))
    assert_whole(final)


@every_streaming_layer
@every_mode
def test_steps_share_no_storage(case, mode):
    layer = build(case)
    x, state, _, _ = inputs(layer)
    with mode():
        for t in range(3):
            output, after = layer.step(x[:, t], state)
            assert_own((output, after), x, state, own_tensors(layer))
            assert_whole(after)
            state = after


@every_layer
def test_initial_states_share_no_storage(case):
    layer = build(case)
    assert_own((layer.initial_state(BATCH), layer.initial_state(BATCH)), own_tensors(layer))


@every_streaming_layer
def test_writing_to_outputs_does_not_change_a_stream(case):
    layer = build(case)
    x, state, _, _ = inputs(layer)
    left = state
    with torch.no_grad():
        for t in range(6):
            output, state = layer.step(x[:, t], state)
            kept = output.clone()
            output.fill_(torch.nan)
            expected, left = layer.step(x[:, t], left)
            assert_equal((kept, state), (expected, left))


def assert_equal(found, expected):
    for a, b in zip(tensors(found), tensors(expected), strict=True):
        assert torch.equal(a, b)


def in_steps(layer, x, state, write):
    outputs = []
    for t in range(6):
        output, state = layer.step(x[:, t], state)
        outputs.append(output)
        state = write(state)
    return torch.stack(outputs, 1), state


def in_chunks(layer, x, state, write):
    outputs = []
    for part in x[:, :18].split(6, dim=1):
        output, state = layer(part, state)
        outputs.append(output)
        state = write(state)
    return torch.stack(outputs, 1), state


def in_chunks_with_lengths(layer, x, state, write):
    outputs = []
    for part in x[:, :18].split(6, dim=1):
        output, state = layer(part, state, lengths=torch.tensor([0, 4, 6]))
        outputs.append(output)
        state = write(state)
    return torch.stack(outputs, 1), state


def zeroed_in_place(state):
    for part in tensors(state):
        part[1] = 0
    return state


def zeroed(state):
    def zero(part):
        keep = torch.ones(len(part), *[1] * (part.ndim - 1), dtype=part.dtype)
        keep[1] = 0
        return part * keep

    return pytree.tree_map(zero, state)


@every_layer
@pytest.mark.parametrize("how", [in_steps, in_chunks, in_chunks_with_lengths])
def test_rows_of_a_state_may_be_zeroed_in_training(case, how):
    layer = build(case)
    if layer.bidirectional and how is in_steps:
        return
    assert_equal(gradients(layer, how, zeroed_in_place), gradients(layer, how, zeroed))


@every_layer
@pytest.mark.parametrize("steps", [1, STEPS])
def test_writing_to_the_last_state_changes_no_gradient(case, steps):
    layer = build(case)

    def in_one_pass(layer, x, state, write):
        output, state = layer(x[:, :steps], state)
        loss = sum(part.square().sum() for part in tensors(state))
        write(state)
        return output, loss

    def leave(state):
        return state

    def spoil(state):
        with torch.no_grad():
            for part in tensors(state):
                part.fill_(torch.nan)

    # The squares need the state as it was, so they are of a copy.
    def of_a_copy(layer, x, state, write):
        output, state = layer(x[:, :steps], state)
        loss = sum(part.clone().square().sum() for part in tensors(state))
        write(state)
        return output, loss

    assert_equal(gradients(layer, of_a_copy, spoil), gradients(layer, in_one_pass, leave))


def gradients(layer, how, write):
    x, state, _, _ = inputs(layer)
    output, state_or_loss = how(layer, x, state, write)
    draws.seed(2)
    loss = sum((torch.randn_like(part) * part).sum() for part in tensors(output, state_or_loss))
    sources = [x, *tensors(state), *layer.parameters()]
    return output, torch.autograd.grad(loss, sources, materialize_grads=True, allow_unused=True)


class OneState(NamedTuple):
    memory: Tensor


class Careless(RecurrentLayer):
    """A layer of a user's own, which returns what it has at hand."""

    State = OneState

    def __init__(self, size, output, final):
        super().__init__(size)
        self.hidden_size = size
        self.start = nn.Parameter(torch.zeros(size))
        self.register_buffer("rest", torch.zeros(BATCH, size))
        self.output, self.final = output, final

    def _state_shapes(self):
        return ((self.hidden_size,),)

    def _sequence(self, x, state, lengths, reset):
        states = x.cumsum(1)
        return self.output(self, x, states), OneState(states), OneState(self.final(self, x, states, state))


OUTPUTS = {
    "the input": lambda layer, x, states: x,
    "a view of the input": lambda layer, x, states: x.flip(1).flip(1) if x.is_complex() else x.view_as(x),
    "its states": lambda layer, x, states: states,
    "a parameter": lambda layer, x, states: layer.start.expand_as(x),
}
FINALS = {
    "a view of its states": lambda layer, x, states, state: states[:, -1],
    "a view of the input": lambda layer, x, states, state: x[:, -1],
    "the state that it was given": lambda layer, x, states, state: state.memory,
    "a view of that": lambda layer, x, states, state: state.memory.view_as(state.memory),
    "a parameter": lambda layer, x, states, state: layer.start.expand(len(x), -1),
    "a buffer": lambda layer, x, states, state: layer.rest,
}


@every_mode
@pytest.mark.parametrize("output", OUTPUTS.values(), ids=OUTPUTS)
@pytest.mark.parametrize("final", FINALS.values(), ids=FINALS)
def test_a_layer_of_a_users_own_shares_nothing(mode, output, final):
    layer = Careless(3, output, final)
    x, state = torch.randn(BATCH, 5, 3), layer.initial_state(BATCH)
    with mode():
        assert_own(layer(x, state), x, state, own_tensors(layer))
        assert_whole(layer(x, state)[1])
        assert_own(layer.step(x[:, 0], state), x, state, own_tensors(layer))


@every_mode
@pytest.mark.parametrize("read", [None, lambda states, x: x, lambda states, x: states])
def test_gates_and_read_outs_may_return_their_input(mode, read):
    layer = LinearRNN(3, 3, lambda x: (torch.tensor(0.5), x), read)
    x, state = torch.randn(BATCH, 5, 3), layer.initial_state(BATCH)
    with mode():
        for given in (x, x[:, :0]):
            assert_own(layer(given, state), x, state)
        assert_own(layer.step(x[:, 0], state), x, state)


@every_mode
@pytest.mark.parametrize("lengths", [None, torch.tensor([5, 0, 2])])
def test_a_layer_of_products_shares_nothing(mode, lengths):
    layer = GILRLSTM(3, 4)
    products, state = torch.randn(BATCH, 5, 24), layer.initial_state(BATCH)
    with mode():
        for given in (products, products[:, :0]):
            short = None if lengths is None else lengths.clamp(max=given.shape[1])
            assert_own(layer.from_products(given, state, lengths=short), products, state, own_tensors(layer))


@every_mode
@pytest.mark.parametrize("steps", [0, 1, 20, 70])
@pytest.mark.parametrize("backend", ["reference", "torch", "numba"])
def test_recurrences_share_nothing(mode, steps, backend):
    decay, x, h = torch.rand(4), torch.randn(2, steps, 4), torch.randn(2, 4)
    reset = torch.zeros(2, steps, dtype=torch.bool)
    with mode():
        for options in ({}, {"reset": reset}, {"reverse": True}):
            found = legato.linear_recurrence(decay, x, h, backend=backend, **options)
            assert_own(found, decay, x, h)
            assert_whole(found)
            found = legato.matrix_recurrence(torch.eye(4), x, h, **options)
            assert_own(found, x, h)
            assert_whole(found[1])


@every_mode
@pytest.mark.parametrize("steps", [0, 1, 20, 70])
@pytest.mark.parametrize("options", [*({"method": m} for m in METHODS), {"last_only": True}], ids=str)
def test_time_invariant_systems_share_nothing(mode, steps, options):
    A, B = legato.delay_network(3, 6.0)
    u, m = torch.randn(2, steps, 4), torch.randn(2, 4, 3)
    with mode():
        found = legato.lti(u, A, B, m, **options)
        assert_own(found, u, A, B, m)


def test_a_delay_network_is_two_tensors():
    for discretizer in ("zoh", "bilinear", "euler"):
        A, B = legato.delay_network(3, 20.0, discretizer=discretizer)
        assert_own((A, B))
        assert A.untyped_storage().nbytes() == A.nbytes


@every_mode
def test_models_share_nothing(mode):
    layer = GILR(3, 8)
    tokens, x = torch.randint(1, 9, (2, 7)), torch.randn(2, 7, 3)
    bag = LegendreMemory(3, 1, 9.0, return_sequences=False)
    language = LanguageModel(Embedding(9, 4), lambda size: GILR(size, size), num_layers=2)
    models = [
        (SequenceRegressor(layer, nn.Identity()), x),
        (SequenceClassifier(layer, nn.Identity()), x),
        (SequenceClassifier(bag, nn.Identity(), Embedding(9, 3)), tokens),
        (language, tokens),
    ]
    with mode():
        for model, given in models:
            state = model.initial_state(2)
            assert_own(model(given, state), given, state, own_tensors(model))
            assert_own(model(given), given, own_tensors(model))
            assert_own(model.step(given[:, 0], state), given, state, own_tensors(model))


@pytest.mark.parametrize("kind", [GILR, legato.MinGRU, legato.MinLSTM, legato.StronglyTypedRNN])
def test_a_head_that_works_in_place_does_not_change_a_stream(kind):
    draws.seed(0)
    layer, head = kind(3, 8), nn.Linear(8, 1)
    in_place = SequenceRegressor(layer, nn.Sequential(nn.ReLU(inplace=True), head))
    apart = SequenceRegressor(layer, nn.Sequential(nn.ReLU(), head))
    x, state, other = torch.randn(2, 20, 3), layer.initial_state(2), layer.initial_state(2)
    with torch.no_grad():
        for t in range(20):
            output, state = in_place.step(x[:, t], state)
            expected, other = apart.step(x[:, t], other)
            assert torch.equal(output, expected)
