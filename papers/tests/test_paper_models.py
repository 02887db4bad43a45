"""The papers' models keep the contract of the library's: devices, padding, modes, numbers, states, advice."""

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn

import bounds
import draws
from legato._checks import INTEGER_DTYPES
from legato.layers import GILR, LRU, SRU, Bidirectional, LegendreMemory
from legato.models import Embedding, LanguageModel, SequenceClassifier
from legato_papers.baselines import LSTM
from legato_papers.models import AdaptiveSoftmax, PairClassifier, Translator, adaptive_softmax
from model_checks import (
    alike,
    assert_equal,
    assert_ignores_default_device,
    assert_replicas_have_their_own_tensors,
    assert_starts_from_the_meta_device,
    assert_tied_weights_are_one_parameter,
    assert_trains_on_its_own_device,
    assert_trains_when_sharded,
    start,
)
from test_advice import TOKENS, WRONG
from test_devices import language_model, lengths, tokens
from test_language_model import step_by_step
from test_modes import modes
from test_numbers import assert_built_the_same, every_number
from test_padding import LENGTHS, WORDS, assert_any_integers_are_the_same, assert_padding_does_not_count
from test_padding import language_model as padded_language_model

SOFTMAX = adaptive_softmax((5, 9))


def translator(**options):
    encoder = Bidirectional(SRU(8, 4), SRU(8, 4))
    return Translator(encoder, SRU(8, 8), Embedding(27, 8), Embedding(27, 8), **options)


MODELS = {
    "pair": lambda: PairClassifier(LRU(8, 6), nn.Linear(24, 2), Embedding(27, 8)),
    "adaptive softmax": lambda: language_model(output=SOFTMAX, hidden_size=6),
    "translator": translator,
    "tied translator": lambda: translator(tied=True),
}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def calls(model):
    """All that a model does, each as a function."""
    if isinstance(model, Translator):
        yield lambda: model.loss(tokens, tokens, lengths, lengths)
        yield lambda: model.loss(tokens, tokens)
        yield lambda: model.greedy(tokens, lengths, longest=3)
        yield lambda: model.beam(tokens, width=2, longest=3)
    elif isinstance(model, PairClassifier):
        yield lambda: model(tokens, tokens, lengths=(lengths, None))
    else:
        yield lambda: model(tokens, lengths=lengths)
        yield lambda: model.loss(tokens, tokens, lengths=lengths)
        yield lambda: model.step(tokens[:, 0], model.initial_state(2))


@every_model
def test_a_model_ignores_the_default_device(make, elsewhere):
    assert_ignores_default_device(make, calls, elsewhere)


@every_model
def test_training_ignores_the_default_device(make, elsewhere):
    assert_trains_on_its_own_device(make, calls, elsewhere)


def test_a_model_is_built_where_its_embedding_is(elsewhere):
    where = {"device": "cpu", "dtype": torch.float64}
    elsewhere()
    embedding = Embedding(27, 8, **where)
    layer = lambda size: GILR(size, size, **where)  # noqa: E731
    adaptive = LanguageModel(embedding, layer, num_layers=1, output=adaptive_softmax((5, 9), **where))
    for model in (adaptive, Translator(GILR(8, 4, **where), GILR(8, 4, **where), embedding, embedding)):
        assert {(p.device.type, p.dtype) for p in model.parameters()} == {("cpu", torch.float64)}


@pytest.mark.parametrize("parents_first", [True, False])
@every_model
def test_a_model_starts_from_the_meta_device(make, parents_first):
    assert_starts_from_the_meta_device(make, calls, parents_first)


def test_what_starts_from_the_meta_device_is_as_built():
    make = lambda: Translator(GILR(50, 50), GILR(50, 50), Embedding(40, 50), Embedding(40, 50))  # noqa: E731
    draws.seed(0)
    alike(start(make(), parents_first=False).state_dict(), make().state_dict())


def test_tied_weights_stay_one_parameter():
    assert_tied_weights_are_one_parameter(translator(tied=True))


@every_model
def test_replicas_compute_with_their_own_tensors(make):
    assert_replicas_have_their_own_tensors(make, calls)


@every_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_a_sharded_model_starts_and_trains(make, dtype, one_process):
    def run(model):
        if isinstance(model, Translator):
            return model(tokens, tokens, lengths, lengths)
        return model(tokens, tokens) if isinstance(model, PairClassifier) else model(tokens, lengths=lengths)[0]

    assert_trains_when_sharded(make, run, dtype)


def small_translator():
    draws.seed(0)
    encoder = Bidirectional(SRU(8, 4), SRU(8, 4))
    return Translator(encoder, SRU(8, 4), Embedding(WORDS, 8), Embedding(WORDS, 8)).eval()


def of_pairs():
    draws.seed(0)
    model = PairClassifier(SRU(8, 6), nn.Linear(24, 2), Embedding(WORDS, 8))
    return lambda tokens, lengths: model(tokens, tokens, lengths=(lengths, lengths)), model


def of_sentences():
    model = small_translator()
    return lambda tokens, lengths: model.loss(tokens, tokens, lengths, lengths), model


def of_log_probabilities():
    model = small_translator()
    counts = (torch.arange(12) < LENGTHS[:, None])[..., None]
    return lambda tokens, lengths: model(tokens, tokens, lengths, lengths) * counts, model


def of_adaptive_scores():
    model = padded_language_model(output=SOFTMAX)
    return lambda tokens, lengths: model.score(tokens, tokens, lengths=lengths), model


RUNS = {
    "pair": of_pairs,
    "adaptive softmax": of_adaptive_scores,
    "translator's loss": of_sentences,
    "translator": of_log_probabilities,
}
every_run = pytest.mark.parametrize("make", RUNS.values(), ids=RUNS)


@pytest.mark.parametrize("padding", [-1, -100, WORDS, 2**31 - 1])
@every_run
def test_tokens_beyond_lengths_do_not_count(make, padding):
    assert_padding_does_not_count(*make(), padding)


@pytest.mark.parametrize("dtype", INTEGER_DTYPES, ids=str)
@every_run
def test_tokens_of_any_integer_dtype_are_the_same(make, dtype):
    assert_any_integers_are_the_same(*make(), dtype)


@pytest.mark.parametrize("dtype", INTEGER_DTYPES, ids=str)
def test_a_translation_does_not_depend_on_the_dtype(dtype):
    model, sources, ends = small_translator(), torch.randint(4, WORDS, (3, 7)), torch.tensor([7, 1, 4])
    for decode in (model.greedy, model.beam):
        found = decode(sources.to(dtype), ends.to(dtype), longest=5)
        expected = decode(sources, ends, longest=5)
        assert_equal(found, expected)
        assert [part.dtype for part in found] == [part.dtype for part in expected]


@every_run
def test_what_counts_must_be_in_the_vocabulary(make):
    wrong = torch.randint(4, WORDS, (4, 12))
    wrong[1, 11] = -100  # the last step of the longest row
    run, _ = make()
    with pytest.raises(ValueError, match=f"expected (tokens|targets) from 0 to {WORDS - 1}, got -100 to"):
        run(wrong, LENGTHS)


DECODERS = {
    "greedy": lambda model: model.greedy(tokens, longest=3).log_probability,
    "beam": lambda model: model.beam(tokens, width=2, longest=3).log_probability,
}


@pytest.mark.parametrize("run", DECODERS.values(), ids=DECODERS)
@pytest.mark.parametrize("frozen", ["first", "all but the first", "none", "all"])
def test_decoding_keeps_the_mode_of_every_part(run, frozen):
    model = translator(dropout=0.5).train(frozen != "all")
    first = next(model.children())
    if frozen != "none":
        first.eval()
    if frozen == "all but the first":
        model.eval()
        first.train()
    before = modes(model)
    found = run(model)
    assert modes(model) == before
    assert torch.equal(found, run(model.eval()))  # nothing was dropped


@pytest.mark.parametrize("run", DECODERS.values(), ids=DECODERS)
def test_the_modes_survive_an_error(run):
    model = translator(dropout=0.5).train()
    next(model.children()).eval()
    before = modes(model)

    def fail(*_):
        raise KeyError("broken")

    model.decoder.register_forward_pre_hook(fail)
    model.decoder.step = fail
    with pytest.raises(KeyError, match="broken"):
        run(model)
    assert modes(model) == before


def numbered_translator(i, r):
    source, target = Embedding(i(9), i(4)), Embedding(i(8), i(4))
    return Translator(GILR(4, 4), GILR(4, 4), source, target, dropout=r(0.5), padding=i(0), start=i(2), end=i(3))


def numbered_softmax(i, r):
    return AdaptiveSoftmax(8, 9, [i(4), i(6)])


@pytest.mark.bad_input
@pytest.mark.parametrize("build", [numbered_translator, numbered_softmax])
@every_number
def test_what_is_built_of_any_numbers_is_the_same(build, i, r):
    assert_built_the_same(build, i, r)


@pytest.mark.bad_input
def test_decoders_take_any_numbers():
    model, sources = numbered_translator(int, float), torch.randint(9, (2, 3))
    assert len(model.greedy(sources, longest=np.int64(3)).words) == 2
    found = model.beam(sources, width=np.int64(2), length_penalty=np.float32(1), longest=np.int64(3))
    assert len(found.words) == 2


def test_states_come_back_from_a_file():
    model = small_translator()
    with torch.no_grad():
        values = [model.initial_state(2), model.encode(tokens), model.greedy(tokens, longest=3)]
    for value in values:
        torch.save(value, file := io.BytesIO())
        file.seek(0)
        assert_equal(torch.load(file), value)


@pytest.mark.bad_input
@pytest.mark.parametrize("make", TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize("lengths", [None, torch.tensor([7, 5])])
def test_sentences_that_are_no_tensor_get_advice(make, lengths):
    layer, embedding = GILR(3, 3), Embedding(9, 3)
    model, sentence = Translator(layer, layer, embedding, embedding), torch.ones(2, 7).long()
    for call in (
        lambda: model.loss(make(), sentence, lengths),
        lambda: model.loss(sentence, make(), None, lengths),
        lambda: model.beam(make(), lengths),
    ):
        with pytest.raises((TypeError, ValueError), match=r"pad_packed_sequence|pad_sequence|to_padded|as_tensor"):
            call()


@pytest.mark.bad_input
@pytest.mark.parametrize(("make", "message"), WRONG.values(), ids=WRONG)
def test_a_pair_says_how_a_padded_tensor_is_made(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        PairClassifier(GILR(3, 4), nn.Linear(16, 2))(make(), torch.randn(2, 7, 3))


@pytest.mark.parametrize("layer", [LegendreMemory(4, 1, 9.0, return_sequences=False), GILR(4, 4)])
def test_a_pair_is_compared_by_its_last_outputs(layer):
    model = PairClassifier(layer, nn.Linear(16, 3), Embedding(11, 4))
    first, second = torch.randint(1, 11, (2, 8)), torch.randint(1, 11, (2, 5))
    scores = model(first, second, lengths=(torch.tensor([8, 3]), None))
    wide = copy.deepcopy(model).double()

    def of_row(first, second):
        classifier = SequenceClassifier(wide.layer, nn.Identity(), wide.embedding)
        m1, m2 = (classifier(x)[0] for x in (first, second))
        return wide.head(torch.cat([m1, m2, (m1 - m2).abs(), m1 * m2], 1))

    bounds.assert_agrees(scores[1:], of_row, first[1:, :3], second[1:], terms=16 * 8)
    assert sum(p.numel() for p in model.parameters()) == 51 + 44 + sum(p.numel() for p in layer.parameters())


def test_the_adaptive_softmax_is_that_of_torch():
    draws.seed(0)
    softmax = AdaptiveSoftmax(16, 30, [8, 20]).double()
    features, targets = torch.randn(50, 16, dtype=torch.float64), torch.randint(30, (50,))
    theirs = nn.AdaptiveLogSoftmaxWithLoss(16, 30, [8, 20], head_bias=True).double()
    theirs.load_state_dict(softmax.state_dict())
    ours = softmax.float()
    bounds.assert_agrees(ours(features.float()), theirs.log_prob, features.float(), terms=30)
    bounds.assert_agrees(
        ours(features.float(), targets), lambda x: theirs(x, targets).output, features.float(), terms=30
    )


@pytest.mark.bad_input
def test_cutoffs_rise_within_the_vocabulary():
    with pytest.raises(ValueError, match=r"rise between 0 and the vocabulary's 30, got \[20, 10\]"):
        AdaptiveSoftmax(8, 30, [20, 10])


@pytest.mark.parametrize("options", [{}, {"output": SOFTMAX}], ids=["plain", "adaptive"])
def test_a_language_model_of_an_lstm_streams(options):
    draws.seed(0)
    make = lambda size: LSTM(size, 9)  # noqa: E731
    model = LanguageModel(Embedding(30, 8, padding_idx=None), make, num_layers=2, **options).double()
    text = torch.randint(30, (3, 17))
    bounds.assert_agrees(step_by_step(model, text), model, text, terms=30 * 17)
