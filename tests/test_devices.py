"""What is made inside a call is on the device of what was given, and modules start from the meta device."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils import _pytree as pytree

import draws
import legato
from legato.layers import GILR, LMU, LRU, SRU, Bidirectional, Highway, LegendreMemory
from legato.layers.base import RecurrentLayer
from legato.models import Embedding, LanguageModel, SequenceClassifier, SequenceRegressor
from legato.ops.time_invariant import METHODS
from model_checks import (
    alike,
    assert_ignores_default_device,
    assert_replicas_have_their_own_tensors,
    assert_starts_from_the_meta_device,
    assert_tied_weights_are_one_parameter,
    assert_trains_on_its_own_device,
    assert_trains_when_sharded,
    replica,
    spoiled,
    start,
)
from test_contract import BATCH, CASES, NAMES, STEPS, build, every_layer, flat, inputs

tokens, lengths = torch.randint(4, 27, (2, 12)), torch.tensor([12, 5])


def language_model(**options):
    return LanguageModel(Embedding(27, 8), lambda size: SRU(size, size), num_layers=2, highways=1, **options)


def bag():
    return SequenceClassifier(LegendreMemory(8, 1, 9.0, return_sequences=False), nn.Linear(8, 2), Embedding(27, 8))


MODELS = {
    "classifier": lambda: SequenceClassifier(SRU(8, 6), nn.Linear(6, 2), Embedding(27, 8, dropout=0.1)),
    "regressor": lambda: SequenceRegressor(LMU(8, 6, order=2, theta=4.0), nn.Linear(6, 2), Embedding(27, 8)),
    "bag of words": bag,
    "language model": language_model,
    "tied": lambda: language_model(tied=True),
}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def calls(model):
    """All that a model does, each as a function."""
    yield lambda: model(tokens)
    yield lambda: model(tokens, lengths=lengths)
    yield lambda: model.step(tokens[:, 0], model.initial_state(2))
    if isinstance(model, LanguageModel):
        yield lambda: model.loss(tokens, tokens, lengths=lengths)
        yield lambda: model.generate(tokens, 2, temperature=0)
        yield lambda: model.calibrate(tokens)


@every_layer
@pytest.mark.parametrize("condition", ["plain", "lengths and resets"])
def test_a_layer_ignores_the_default_device(case, condition, elsewhere):
    def run():
        layer = build_(case)
        x, state, lengths, reset = given
        results = [layer(x, state, lengths=lengths, reset=reset), layer(x), layer(x[:, :0]), layer.initial_state(2)]
        if not layer.bidirectional:
            results.append(layer.step(x[:, 0], state))
        sum(part.sum() for part in pytree.tree_leaves(results)).backward()
        return results

    layer = build(case, torch.float32)
    build_ = lambda case: copy.deepcopy(layer)  # noqa: E731
    given = inputs(layer, condition, dtype=torch.float32)
    expected = run()
    elsewhere()
    for a, b in zip(pytree.tree_leaves(run()), pytree.tree_leaves(expected), strict=True):
        assert torch.equal(a, b)


@every_model
def test_a_model_ignores_the_default_device(make, elsewhere):
    assert_ignores_default_device(make, calls, elsewhere)


@every_model
def test_training_a_model_ignores_the_default_device(make, elsewhere):
    assert_trains_on_its_own_device(make, calls, elsewhere)


def test_a_model_is_built_where_its_embedding_is(elsewhere):
    """Its other parts have the device and dtype of the vectors, not the defaults."""
    where = {"device": "cpu", "dtype": torch.float64}
    elsewhere()
    embedding = Embedding(27, 8, **where)
    for options in ({}, {"hidden_size": 6}, {"tied": True, "hidden_size": 6}):
        model = LanguageModel(embedding, lambda size: GILR(size, size, **where), num_layers=1, **options)
        assert {(p.device.type, p.dtype) for p in model.parameters()} == {("cpu", torch.float64)}


BUILT = {
    "LRU": lambda **where: LRU(3, 4, **where),
    "LMU": lambda **where: LMU(3, 4, order=3, theta=6.0, **where),
    "trained theta": lambda **where: LegendreMemory(3, 4, [6.0, 7.0, 8.0], trainable_theta=True, **where),
    "Euler": lambda **where: LegendreMemory(3, 2, 60.0, discretizer="euler", **where),
    "Highway": lambda **where: Highway(3, **where),
    "vectors": lambda **where: Embedding(3, 2, vectors=np.ones((3, 2)), **where),
    "Embedding": lambda **where: Embedding(3, 2, **where),
}


@pytest.mark.parametrize("make", BUILT.values(), ids=BUILT)
def test_what_is_built_on_a_device_ignores_the_default_one(make, elsewhere):
    draws.seed(0)
    expected = make(device="cpu", dtype=torch.float32).state_dict()
    elsewhere()
    draws.seed(0)
    for name, value in make(device="cpu", dtype=torch.float32).state_dict().items():
        assert torch.equal(value, expected[name])


def test_functions_ignore_the_default_device(elsewhere):
    decay, x, h = torch.rand(4), torch.randn(2, 50, 4), torch.randn(2, 4)
    A, B = legato.delay_network(3, 6.0)
    u, reset = torch.randn(2, 50, 4), torch.rand(2, 50) < 0.1

    def run():
        draws.seed(0)
        results = [legato.matrix_recurrence(torch.eye(4, device="cpu"), x, h, reset=reset)]
        for backend in ("reference", "torch", "numba"):
            results.append(legato.linear_recurrence(decay, x, h, backend=backend, reset=reset))
        results += [legato.lti(u, A, B, method=method) for method in METHODS]
        results += [legato.lti(u, A, B, last_only=True), legato.lti(u, A, B, reset=reset)]
        results.append(legato.delay_network(3, torch.tensor([6.0, 9.0], device="cpu", dtype=torch.float32)))
        results.append(legato.spread_time_scales(torch.empty(5, device="cpu", dtype=torch.float32), 1, 9, shuffle=True))
        return results

    expected = run()
    elsewhere()
    for a, b in zip(pytree.tree_leaves(run()), pytree.tree_leaves(expected), strict=True):
        assert torch.equal(a, b)


def test_factories_use_the_default_device(elsewhere):
    """As torch's own do."""
    elsewhere()
    A, B = legato.delay_network(3, 6.0)
    assert A.is_meta
    assert B.is_meta
    assert legato.window_decoder(3, 2).is_meta


@pytest.mark.parametrize("parents_first", [True, False])
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_a_layer_starts_from_the_meta_device(case, parents_first):
    layer = build(case)
    found = start(layer, parents_first=parents_first)
    assert not [name for name, value in found.state_dict().items() if value.isnan().any()]
    x = torch.randn(BATCH, STEPS, layer.input_size, dtype=torch.float64)
    assert all(part.isfinite().all() for part in flat(found(x)))


@pytest.mark.parametrize("parents_first", [True, False])
@every_model
def test_a_model_starts_from_the_meta_device(make, parents_first):
    assert_starts_from_the_meta_device(make, calls, parents_first)


LARGE = {
    "GILR": lambda: GILR(40, 50),
    "SRU": lambda: SRU(40, 50),
    "QRNN": lambda: legato.QRNN(40, 50),
    "MinGRU": lambda: legato.MinGRU(40, 50),
    "MinLSTM": lambda: legato.MinLSTM(40, 50),
    "GILRLSTM": lambda: legato.GILRLSTM(40, 50),
    "LRU": lambda: LRU(40, 50),
    "Highway": lambda: Highway(40),
    "LMU": lambda: LMU(40, 50, memory_size=30, order=5, theta=9.0),
    "Embedding": lambda: Embedding(40, 50),
    "language model": lambda: LanguageModel(Embedding(40, 50), lambda size: GILR(size, size), num_layers=2),
}


@pytest.mark.parametrize("make", LARGE.values(), ids=LARGE)
def test_what_starts_from_the_meta_device_is_as_built(make):
    """Children before parents, as ``Module.apply`` goes: a parent may draw its children in a way of its own."""
    draws.seed(0)
    alike(start(make(), parents_first=False).state_dict(), make().state_dict())


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("as_array", [True, False])
def test_given_vectors_survive_the_meta_device(trainable, as_array):
    vectors = torch.randn(9, 4)
    given = vectors.numpy() if as_array else vectors
    embedding = Embedding(9, 4, vectors=given, trainable=trainable, device="meta")
    start(embedding, parents_first=True)
    vectors = vectors.index_fill(0, torch.tensor([0]), 0)
    assert torch.equal(embedding.weight, vectors)
    assert embedding.weight.requires_grad == trainable
    assert torch.equal(start(copy.deepcopy(embedding), parents_first=True).weight, vectors)
    built = Embedding(9, 4, vectors=given)
    built.reset_parameters()
    assert torch.equal(built.weight, vectors)


def test_tied_weights_stay_one_parameter():
    assert_tied_weights_are_one_parameter(language_model(tied=True))


@every_layer
def test_replicas_of_a_layer_compute_with_their_own_tensors(case):
    layer = build(case)
    x, state, lengths, reset = inputs(layer, "lengths and resets")
    expected = flat(layer(x, state, lengths=lengths, reset=reset))
    first, second = replica(layer), replica(layer)
    spoiled(layer)
    for other in (first, second, first):
        for a, b in zip(flat(other(x, state, lengths=lengths, reset=reset)), expected, strict=True):
            assert torch.equal(a, b)
        if not layer.bidirectional:
            assert all(part.isfinite().all() for part in flat(other.step(x[:, 0], other.initial_state(BATCH))))


@every_model
def test_replicas_of_a_model_compute_with_their_own_tensors(make):
    assert_replicas_have_their_own_tensors(make, calls)


@every_layer
def test_a_shallow_copy_computes_the_same(case):
    layer = build(case)
    x, state, _, _ = inputs(layer)
    for a, b in zip(flat(copy.copy(layer)(x, state)), flat(layer(x, state)), strict=True):
        assert torch.equal(a, b)


@every_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_a_sharded_model_starts_and_trains(make, dtype, one_process):
    assert_trains_when_sharded(make, lambda model: model(tokens, lengths=lengths)[0], dtype)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_layers_sharded_inside_a_layer_take_narrow_inputs(one_process):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for layer in (
        Bidirectional(GILR(3, 4), SRU(3, 4)),
        legato.Stack(GILR(3, 4), LRU(4, 4)),
        legato.LinearSurrogate(nn.LSTMCell(3, 4), GILR(3, 4)),
        legato.Stack(GILR(3, 4), legato.LinearRNN(4, 4, lambda x: (torch.full_like(x, 0.5), x))),
    ):
        for part in layer.modules():
            if isinstance(part, RecurrentLayer) and part is not layer and list(part.parameters()):
                fully_shard(part, mp_policy=policy)
        fully_shard(layer, mp_policy=policy)
        output, state = layer(torch.randn(2, 9, 3), lengths=torch.tensor([9, 4]))
        output.float().sum().backward()
        assert all(part.dtype == torch.float32 for part in pytree.tree_leaves(state))
