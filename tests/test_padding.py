"""Integers of every width count, and what lies beyond lengths does not, in every layer and model."""

import pytest
import torch
from torch import nn

import draws
from legato._checks import INTEGER_DTYPES
from legato.layers import GILR, GILRLSTM, LMU, SRU, Bidirectional, LegendreMemory
from legato.models import Embedding, LanguageModel, SequenceClassifier, SequenceRegressor
from test_contract import BATCH, STEPS, build, every_layer, flat, inputs

WORDS, LENGTHS = 27, torch.tensor([5, 12, 0, 1])
every_dtype = pytest.mark.parametrize("dtype", INTEGER_DTYPES, ids=str)


@every_layer
@every_dtype
def test_lengths_of_any_integer_dtype_are_the_same(case, dtype):
    layer = build(case)
    x, state, lengths, reset = inputs(layer, "lengths and resets")
    expected = flat(layer(x, state, lengths=lengths, reset=reset))
    for a, b in zip(flat(layer(x, state, lengths=lengths.to(dtype), reset=reset)), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16])
def test_as_many_rows_as_steps_make_no_mask_of_lengths(dtype):
    layer, x, lengths = GILR(3, 8), torch.randn(8, 8, 3), torch.tensor([8, 7, 6, 5, 4, 3, 2, 2])
    for a, b in zip(flat(layer(x, lengths=lengths.to(dtype))), flat(layer(x, lengths=lengths)), strict=True):
        assert torch.equal(a, b)


def test_eight_bits_are_enough_for_short_rows_of_long_batches():
    layer, lengths = Bidirectional(GILR(3, 4), SRU(3, 4)), torch.tensor([0, 100, 127])
    x = torch.randn(3, 300, 3)
    for a, b in zip(flat(layer(x, lengths=lengths.to(torch.int8))), flat(layer(x, lengths=lengths)), strict=True):
        assert torch.equal(a, b)


def test_products_take_lengths_of_any_integer_dtype():
    layer = GILRLSTM(3, 4)
    x, lengths = torch.randn(4, 4, 3), torch.tensor([4, 0, 2, 3])
    products = nn.functional.linear(x, layer.weight, layer.bias)
    expected = flat(layer.from_products(products, lengths=lengths))
    for a, b in zip(flat(layer.from_products(products, lengths=lengths.to(torch.uint8))), expected, strict=True):
        assert torch.equal(a, b)


def language_model(**options):
    draws.seed(0)
    return LanguageModel(Embedding(WORDS, 8), lambda size: SRU(size, size), num_layers=2, highways=1, **options).eval()


def read(kind, **options):
    draws.seed(0)
    return kind(SRU(8, 6), nn.Linear(6, 2), Embedding(WORDS, 8, **options))


def bag():
    draws.seed(0)
    return SequenceClassifier(LegendreMemory(8, 1, 9.0, return_sequences=False), nn.Linear(8, 2), Embedding(WORDS, 8))


def encoded_inputs():
    """Numbers in place of tokens, behind a matrix whose gradient a NaN would reach."""
    draws.seed(0)
    model = SequenceClassifier(SRU(8, 6), nn.Linear(6, 2), nn.Linear(1, 8))
    return lambda tokens, lengths: model(tokens[..., None].float(), lengths=lengths), model


def of_tokens(model):
    return lambda tokens, lengths: model(tokens, lengths=lengths), model


def of_targets(model):
    return lambda tokens, lengths: model.loss(tokens, tokens, lengths=lengths), model


def of_scores(model):
    return lambda tokens, lengths: model.score(tokens, tokens, lengths=lengths), model


RUNS = {
    "classifier": lambda: of_tokens(read(SequenceClassifier)),
    "regressor": lambda: of_tokens(read(SequenceRegressor)),
    "no padding token": lambda: of_tokens(read(SequenceClassifier, padding_idx=None)),
    "bag of words": lambda: of_tokens(bag()),
    "encoded inputs": encoded_inputs,
    "language model": lambda: of_tokens(language_model()),
    "language model's loss": lambda: of_targets(language_model()),
    "language model's scores": lambda: of_scores(language_model()),
}


@pytest.mark.parametrize("padding", [-1, -100, WORDS, 2**31 - 1])
@pytest.mark.parametrize("make", RUNS.values(), ids=RUNS)
def test_tokens_beyond_lengths_do_not_count(make, padding):
    assert_padding_does_not_count(*make(), padding)


def assert_padding_does_not_count(run, model, padding):
    tokens = torch.randint(4, WORDS, (4, 12))
    outside = torch.arange(12) >= LENGTHS[:, None]
    expected = with_gradients(run(tokens.masked_fill(outside, 0), LENGTHS), model)
    found = with_gradients(run(tokens.masked_fill(outside, padding), LENGTHS), model)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_numbers_beyond_lengths_may_be_nan():
    run, model = encoded_inputs()
    x = torch.randn(4, 12)
    outside = torch.arange(12) >= LENGTHS[:, None]
    expected = with_gradients(run(x.masked_fill(outside, 0), LENGTHS), model)
    for a, b in zip(with_gradients(run(x.masked_fill(outside, torch.nan), LENGTHS), model), expected, strict=True):
        assert torch.equal(a, b)


def with_gradients(result, model):
    """All tensors of a result, and the gradients of their weighted sum."""
    results = [part for part in torch.utils._pytree.tree_leaves(result) if part.is_floating_point()]
    draws.seed(2)
    loss = sum((torch.randn_like(part) * part).sum() for part in results)
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [*results, *(g for g in gradients if g is not None)]


@every_dtype
@pytest.mark.parametrize("make", RUNS.values(), ids=RUNS)
def test_tokens_and_lengths_of_any_integer_dtype_are_the_same(make, dtype):
    assert_any_integers_are_the_same(*make(), dtype)


def assert_any_integers_are_the_same(run, model, dtype):
    tokens = torch.randint(4, WORDS, (4, 12))
    expected = with_gradients(run(tokens, LENGTHS), model)
    for a, b in zip(with_gradients(run(tokens.to(dtype), LENGTHS.to(dtype)), model), expected, strict=True):
        assert torch.equal(a, b)


@every_dtype
def test_what_is_generated_does_not_depend_on_the_dtype(dtype):
    model, tokens = language_model(), torch.randint(4, WORDS, (3, 7))
    assert torch.equal(model.generate(tokens.to(dtype), 5, temperature=0), model.generate(tokens, 5, temperature=0))
    assert model.generate(tokens.to(dtype), 0).dtype == torch.int64


def test_what_counts_must_be_in_the_vocabulary():
    tokens = torch.randint(4, WORDS, (4, 12))
    wrong = tokens.clone()
    wrong[1, 11] = -100  # the last step of the longest row
    for make in RUNS.values():
        if make is encoded_inputs:
            continue
        run, _ = make()
        with pytest.raises(ValueError, match=f"expected (tokens|targets) from 0 to {WORDS - 1}, got -100 to"):
            run(wrong, LENGTHS)
    model = language_model()
    with pytest.raises(ValueError, match="expected targets from 0 to 26, got -100 to"):
        model.loss(tokens, wrong)


def test_no_target_is_ignored_where_values_are_not_read():
    """As in compiled code and on a GPU, where torch stops: its own -100 would count as a probability of one."""
    model = language_model()
    with pytest.raises((IndexError, RuntimeError)):
        model.output(torch.randn(2, 8), torch.tensor([3, -100]))


@pytest.mark.bad_input
@every_layer
def test_lengths_that_are_no_integers_are_refused(case):
    layer = build(case)
    x = inputs(layer)[0]
    for dtype in (torch.bool, torch.float32, torch.complex64):
        with pytest.raises(TypeError, match="integer dtype, got"):
            layer(x, lengths=torch.ones(BATCH, dtype=dtype))
    with pytest.raises(ValueError, match=f"expected lengths from 0 to T = {STEPS}, got -1 to -1"):
        layer(x, lengths=torch.full((BATCH,), -1, dtype=torch.int8))


def test_a_legendre_memory_is_calibrated_by_lengths_of_any_dtype():
    u, lengths = torch.randn(3, 2000, 2), torch.tensor([100, 120, 90])
    found, expected = LegendreMemory(2, 3, 900.0), LegendreMemory(2, 3, 900.0)
    found.calibrate(u, lengths=lengths.to(torch.uint8))
    expected.calibrate(u, lengths=lengths)
    assert torch.equal(found.scale, expected.scale)
    assert LMU(2, 3, order=2, theta=4.0)(u, lengths=lengths.to(torch.int8))[0].isfinite().all()
