"""A translator decodes by step what it learned in parallel."""

import itertools

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import bounds
import draws
from legato.layers import GILRLSTM, LMU, SRU, Bidirectional, Stack
from legato.models import Embedding
from legato_papers.baselines import LSTM, Transformer
from legato_papers.models import Translator

PADDING, START, END = 0, 2, 3
LAYERS = {
    "lmu": lambda c, h: LMU(c, h, order=3, theta=5.0, memory_size=4),
    "gilr-lstm": lambda c, h: GILRLSTM(c, h, forget_bias=1.0),
    "sru": SRU,
    "lstm": LSTM,
    "transformer": lambda c, h: Transformer(c, h, layers=1, heads=2, window=4),
    "stack": lambda c, h: Stack.of(SRU, c, h, num_layers=2),
}


def translator(kind="gilr-lstm", words=9, **options):
    draws.seed(0)
    layer = LAYERS[kind]
    encoder = Bidirectional(layer(5, 8), layer(5, 8))
    model = Translator(encoder, layer(7, 8), Embedding(11, 5), Embedding(words, 7), **options).double().eval()
    with torch.no_grad():  # far from even, so that the words differ in probability
        for module in (model.head, model.source, model.target, model.summary, model.query, model.combine):
            module.weight.mul_(4)
        model.head.bias[END] = 1
    return model


def assert_agrees(found, run, *tensors):
    """Sums of at most 16 products a step, through 8 steps of source and target."""
    bounds.assert_agrees(found, run, *tensors, terms=16 * 16)


def sentences(rows=4, steps=6, words=11, seed=1):
    generator = draws.generator(seed)
    lengths = torch.randint(1, steps + 1, (rows,), generator=generator)
    lengths[0] = steps
    return torch.randint(1, words, (rows, steps), generator=generator), lengths


def log_probability(model, source, lengths, target):
    """log P(target, end | source) of one row by the parallel pass."""
    given = torch.tensor([[START, *target]])
    log_p = model(source, given, lengths)[0]
    return sum(log_p[t, word] for t, word in enumerate([*target, END]))


def assert_adds_up(log_p):
    """A probability is right to the roundings of its logarithm and 4 of exp; the sum has one for each word."""
    total, roundings = log_p.exp().sum(-1), log_p.shape[-1] + 4 + 4 * log_p.abs().max().item()
    bounds.assert_close(total, torch.ones_like(total).double(), magnitude=1, roundings=roundings)


@pytest.mark.parametrize("kind", LAYERS)
def test_stepwise_word_probabilities_equal_the_parallel_pass(kind):
    model = translator(kind)
    source, lengths = sentences()
    target, target_lengths = sentences(steps=7, words=9, seed=2)
    at_once = model(source, target, lengths, target_lengths)
    encoded, state = model.encode(source, lengths), model.initial_state(4)
    sizes, stepped = [s.shape for s in tree_leaves(state)], []
    for t in range(7):
        log_p, state = model.step(target[:, t], state, encoded)
        stepped.append(log_p)
    known = torch.arange(7) < target_lengths[:, None]
    assert_agrees(torch.stack(stepped, 1)[known], lambda *x: model(*x)[known], source, target, lengths, target_lengths)
    assert [s.shape for s in tree_leaves(state)] == sizes
    assert_adds_up(at_once)


def test_scaled_vectors_enter_with_a_variance_of_one_by_step_too():
    model = translator(scaled=True)
    assert model.scales == [5**0.5, 7**0.5]
    source, lengths = sentences()
    encoded, state, stepped = model.encode(source, lengths), model.initial_state(4), []
    for t in range(6):
        log_p, state = model.step(source[:, t] % 9, state, encoded)
        stepped.append(log_p)
    assert_agrees(torch.stack(stepped, 1), model, source, source % 9, lengths)
    plain = translator()
    with torch.no_grad():
        plain.source.weight.mul_(5**0.5)
        plain.target.weight.mul_(7**0.5)
    assert_agrees(plain(source, source % 9, lengths), model, source, source % 9, lengths)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("how", ["greedy", "beam"])
def test_a_translation_has_the_probability_of_the_parallel_pass(kind, how):
    model = translator(kind)
    source, lengths = sentences(rows=6)
    decoded = getattr(model, how)(source, lengths, longest=8)
    for row in range(6):
        target = decoded.words[row, : decoded.lengths[row]].tolist()
        assert not {PADDING, START, END} & set(target)
        assert not decoded.words[row, decoded.lengths[row] :].any()
        one = source[row : row + 1], lengths[row : row + 1]
        assert_agrees(decoded.log_probability[row], lambda *x, t=target: log_probability(model, *x, t), *one)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_beam_of_one_is_greedy(kind):
    model = translator(kind)
    source, lengths = sentences(rows=20)
    greedy, beam = model.greedy(source, lengths, longest=8), model.beam(source, lengths, width=1, longest=8)
    assert torch.equal(beam.lengths, greedy.lengths)
    assert torch.equal(beam.words[:, : greedy.words.shape[1]], greedy.words)
    exact = greedy.log_probability
    # Sums of at most 9 logarithms, each of a sum through at most 16 steps of 16 products.
    bounds.assert_close(beam.log_probability, exact, magnitude=exact.abs().max(), roundings=2 * 9 * 16 * 16)


@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 1.0, 3.0])
def test_a_beam_of_all_sentences_finds_the_best(length_penalty):
    model = translator(words=6)  # of which 1, 4 and 5 are words: 40 sentences of up to 3
    source, lengths = sentences(rows=3)
    decoded = model.beam(source, lengths, width=27, length_penalty=length_penalty, longest=3)
    every = [words for n in range(4) for words in itertools.product([1, 4, 5], repeat=n)]
    assert len(every) == 40
    for row in range(3):
        one = source[row : row + 1], lengths[row : row + 1]
        scores = {
            words: log_probability(model, *one, words) / ((6 + len(words)) / 6) ** length_penalty for words in every
        }
        assert tuple(decoded.words[row, : decoded.lengths[row]].tolist()) == max(scores, key=scores.__getitem__)


def test_a_wider_beam_finds_what_the_greedy_choice_hides():
    model = translator()
    source, lengths = sentences(rows=50)
    found = [model.beam(source, lengths, width=w, length_penalty=0.0, longest=6).log_probability for w in (1, 10)]
    assert found[1].mean() > found[0].mean()
    same = 2 * 9 * 16 * 16 * bounds.roundoff(torch.float64) * found[0].abs()
    assert (found[1] >= found[0] - same).float().mean() > 0.9  # a beam may lose a sentence, but rarely


@pytest.mark.parametrize("how", ["greedy", "beam"])
def test_a_sentence_is_translated_alike_alone_and_in_a_batch(how):
    model = translator()
    source, lengths = sentences(rows=8)
    together = getattr(model, how)(source, lengths, longest=8)
    source[torch.arange(6) >= lengths[:, None]] = 7  # what the padding holds changes nothing
    for row in range(8):
        alone = getattr(model, how)(source[row : row + 1, : lengths[row]], longest=8)
        n = int(together.lengths[row])
        assert alone.lengths.item() == n
        assert torch.equal(alone.words[0, :n], together.words[row, :n])


def test_the_loss_is_the_mean_over_words_without_padding():
    model = translator()
    source, lengths = sentences(rows=3)
    target, target_lengths = torch.tensor([[4, 5, 6], [7, 0, 0], [0, 0, 0]]), torch.tensor([3, 1, 0])
    rows = [[4, 5, 6], [7], []]

    def mean(source, lengths):
        each = [log_probability(model, source[i : i + 1], lengths[i : i + 1], words) for i, words in enumerate(rows)]
        return -sum(each) / 7

    loss = model.loss(source, target, lengths, target_lengths)
    assert_agrees(loss, mean, source, lengths)
    target[1:, 1:] = 8
    assert torch.equal(model.loss(source, target, lengths, target_lengths), loss)


@pytest.mark.parametrize("whole", [True, False], ids=["weights", "autocast"])
@pytest.mark.parametrize("how", ["greedy", "beam"])
def test_in_bfloat16_log_probabilities_are_summed_in_float32(how, whole):
    model = translator().to(torch.bfloat16 if whole else torch.float32)
    source, lengths = sentences()
    with torch.autocast("cpu", torch.bfloat16, enabled=not whole):
        found = getattr(model, how)(source, lengths, longest=8).log_probability
        log_p = model(source, source.clamp(max=8), lengths, lengths)
        assert model.loss(source, source.clamp(max=8), lengths, lengths).dtype == torch.float32
    assert found.dtype == log_p.dtype == torch.float32
    assert not torch.equal(found, found.bfloat16().float())
    assert_adds_up(log_p)


def test_label_smoothing_takes_probability_from_the_true_words():
    model = translator()
    source, target = torch.tensor([[4, 5]]), torch.tensor([[6]])

    def smoothed(source):
        log_p = model(source, torch.tensor([[START, 6]]))[0]
        true = log_p[[0, 1], [6, END]].mean()
        return -(0.9 * true + 0.1 * log_p.mean())

    assert_agrees(model.loss(source, target, label_smoothing=0.1), smoothed, source)


@pytest.mark.parametrize("kind", LAYERS)
def test_sentences_of_no_words_are_read_written_and_learned_from(kind):
    model = translator(kind)
    for source in (torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 3, dtype=torch.long)):
        lengths = torch.zeros(2, dtype=torch.long)
        loss = model.loss(source, source, lengths, lengths)
        loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        start = torch.full((2, 1), START)
        assert_agrees(loss, lambda *x: -model(*x)[0, 0, END], source, start, lengths)
        assert model.beam(source, lengths, longest=3).log_probability.isfinite().all()


def test_a_tied_translator_has_one_matrix_for_vectors_and_scores():
    model, other = translator(tied=True), translator()
    assert model.head.weight is model.target.weight
    counts = [sum(p.numel() for p in m.parameters()) for m in (model, other)]
    assert counts[1] - counts[0] == 9 * 7


@pytest.mark.parametrize("kind", ["lmu", "gilr-lstm"])
def test_a_translator_learns_to_turn_sentences_round(kind):
    draws.seed(0)
    layer = LAYERS[kind]
    encoder = Bidirectional(layer(16, 16), layer(16, 16))
    model = Translator(encoder, layer(16, 32), Embedding(10, 16), Embedding(10, 16))
    lengths = torch.randint(1, 5, (40,))
    source = torch.randint(4, 10, (40, 4)) * (torch.arange(4) < lengths[:, None])
    target = torch.stack([torch.cat([row[:n].flip(0), row[n:]]) for row, n in zip(source, lengths, strict=True)])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        model.loss(source, target, lengths, lengths).backward()
        optimizer.step()
    decoded = model.eval().greedy(source, lengths, longest=4)
    assert (decoded.words == target).all(1).float().mean() > 0.95


@pytest.mark.bad_input
def test_parts_that_do_not_go_together_get_a_clear_error():
    embeddings = nn.Embedding(9, 4), nn.Embedding(9, 4)
    both = Bidirectional(SRU(4, 4), SRU(4, 4))
    with pytest.raises(ValueError, match="expected decoder to read forward, got a bidirectional Bidirectional"):
        Translator(both, both, *embeddings)
    with pytest.raises(ValueError, match="expected encoder to give"):
        Translator(LMU(4, 4, order=2, theta=3, return_sequences=False), SRU(4, 4), *embeddings)
    with pytest.raises(ValueError, match="expected decoder to be a RecurrentLayer, got GRU"):
        Translator(both, nn.GRU(4, 4), *embeddings)
    with pytest.raises(ValueError, match="three of the target's 9 words, got 0, 2 and 9"):
        Translator(both, SRU(4, 4), *embeddings, end=9)
    with pytest.raises(ValueError, match="dropout from 0 to below 1, got 1"):
        Translator(both, SRU(4, 4), *embeddings, dropout=1)
    model = Translator(both, SRU(4, 4), *embeddings)
    with pytest.raises(ValueError, match="lengths from 0 to T = 2, got 3 to 3"):
        model.loss(torch.ones(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.long), None, torch.tensor([3]))
    with pytest.raises(ValueError, match="an embedding of 4 channels, the layer's input_size, got 5"):
        Translator(both, SRU(4, 4), Embedding(9, 4), Embedding(9, 5))
    with pytest.raises(ValueError, match="expected width to be an int of at least 1, got 0"):
        model.beam(torch.ones(1, 1, dtype=torch.long), width=0)
    with pytest.raises(ValueError, match="length_penalty of at least 0, got -1"):
        model.beam(torch.ones(1, 1, dtype=torch.long), length_penalty=-1)
