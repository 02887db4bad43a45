"""A language model says the same at once, in pieces and step by step, whatever layer stands in the memory's place."""

import pytest
import torch
from torch import nn

import bounds
import draws
from legato.layers import GILRLSTM, LMU, SRU, LegendreMemory, Stack
from legato.models import Embedding, LanguageModel

VOCABULARY = 30
MEMORIES = {
    "delay network": lambda size: LegendreMemory(size, 3, 5),
    "lmu": lambda size: LMU(size, 7, memory_size=4, order=3, theta=6),
    "gilr-lstm": lambda size: GILRLSTM(size, 9),
    "sru": lambda size: SRU(size, size),
    "stack": lambda size: Stack(SRU(size, 5), GILRLSTM(5, 6)),
}


class Custom(nn.Linear):
    """The least that an output of a user's own has."""

    def forward(self, features, targets=None):
        log_p = super().forward(features).log_softmax(1, dtype=torch.promote_types(features.dtype, torch.float32))
        return log_p if targets is None else log_p.gather(1, targets[:, None])[:, 0]


OUTPUTS = {
    "plain": {},
    "custom": {"output": Custom},
    "tied": {"tied": True, "hidden_size": 10},
}


def model_of(memory="lmu", output="plain", **options):
    """A small model in float64, all of whose weights are drawn, biases included."""
    model = LanguageModel(
        Embedding(VOCABULARY, 8, padding_idx=None), MEMORIES[memory], num_layers=2, **OUTPUTS[output], **options
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.double()


def text(batch=3, steps=17):
    return torch.randint(VOCABULARY, (batch, steps))


def assert_agrees(found, run, *tensors, steps=17):
    """Sums over at most the vocabulary in one step, and through the steps."""
    bounds.assert_agrees(found, run, *tensors, terms=VOCABULARY * steps)


def step_by_step(model, tokens):
    state, log_p = model.initial_state(len(tokens)), []
    for token in tokens.unbind(1):
        now, state = model.step(token, state)
        log_p.append(now)
    return torch.stack(log_p, 1), state


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("memory", MEMORIES)
def test_a_stream_has_the_log_probabilities_of_the_parallel_pass(memory, output):
    model, tokens = model_of(memory, output), text()
    assert_agrees(step_by_step(model, tokens), model, tokens)
    at_once, _ = model(tokens)
    # A probability is right to the roundings of its logarithm and 4 of exp; the sum has one for each word.
    roundings = VOCABULARY + 4 + 4 * at_once.abs().max().item()
    total = at_once.exp().sum(-1)
    bounds.assert_close(total, torch.ones_like(total), magnitude=1, roundings=roundings)


@pytest.mark.parametrize("memory", MEMORIES)
def test_two_pieces_of_a_text_equal_the_whole(memory):
    model, tokens = model_of(memory), text()
    first, state = model(tokens[:, :6])
    second, _ = model(tokens[:, 6:], state)
    assert_agrees(torch.cat([first, second], 1), lambda tokens: model(tokens)[0], tokens)


@pytest.mark.parametrize("output", OUTPUTS)
def test_the_score_of_a_target_is_its_log_probability(output):
    model, tokens, targets = model_of(output=output), text(), text()

    def gathered(tokens):
        log_p, final = model(tokens)
        expected = log_p.gather(2, targets[..., None])[..., 0]
        return expected, -expected.mean(), final

    score, state = model.score(tokens, targets)
    assert_agrees((score, model.loss(tokens, targets)[0], state), gathered, tokens)


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("memory", ["delay network", "lmu", "gilr-lstm", "sru"])
def test_padding_changes_nothing(memory, output):
    model, tokens, targets = model_of(memory, output), text(), text()
    lengths = torch.tensor([17, 5, 0])
    score, state = model.score(tokens, targets, lengths=lengths)
    log_p, _ = model(tokens, lengths=lengths)
    for row, length in enumerate(lengths.tolist()[:2]):
        alone = slice(row, row + 1), slice(length)

        def of_row(tokens, targets):
            expected, final = model.score(tokens, targets)
            return expected, model(tokens)[0], [part.memory for part in final]

        found = score[alone], log_p[alone], [part.memory[row : row + 1] for part in state]
        assert_agrees(found, of_row, tokens[alone], targets[alone])
    outside = torch.arange(17) >= lengths[:, None]
    assert not score[outside].any()
    assert not log_p[outside].any()
    loss = model.loss(tokens, targets, lengths=lengths)[0]
    bounds.assert_close(loss, -score.sum() / 22, magnitude=score.abs().sum() / 22, roundings=2 * 22)


def test_padding_alone_has_no_loss_and_finite_gradients():
    for output in OUTPUTS:
        model, tokens = model_of(output=output), text()
        loss, _ = model.loss(tokens, tokens, lengths=torch.zeros(3, dtype=torch.int64))
        loss.backward()
        assert loss.item() == 0
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("memory", MEMORIES)
def test_every_weight_is_trained(memory, output):
    model = model_of(memory, output)
    every = torch.arange(VOCABULARY).repeat(3, 1)
    model.loss(every, every.flip(1))[0].backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not idle


def test_a_tied_output_is_the_embedding():
    model = model_of(output="tied")
    assert model.output.weight is model.embedding.weight
    assert sum(p.shape == (VOCABULARY, 8) for p in model.parameters()) == 1


@pytest.mark.parametrize("memory", MEMORIES)
def test_greedy_generation_is_the_parallel_argmax(memory):
    model, prompt = model_of(memory), text(steps=4)
    drawn = model.generate(prompt, 12, temperature=0)
    log_p, _ = model(torch.cat([prompt, drawn[:, :-1]], 1))
    assert torch.equal(drawn, log_p[:, 3:].argmax(-1))
    assert torch.equal(model.generate(prompt, 12, top_k=1), drawn)


def test_generation_follows_the_distribution_and_its_generator():
    model, prompt = model_of(), text(batch=1, steps=4).repeat(20_000, 1)
    drawn = model.generate(prompt, 1, generator=draws.generator(1))[:, 0]
    assert torch.equal(drawn, model.generate(prompt, 1, generator=draws.generator(1))[:, 0])
    p = model(prompt[:1])[0][0, -1].exp()
    share = drawn.bincount(minlength=VOCABULARY) / len(drawn)
    assert ((share - p).abs() < 5 * (p * (1 - p) / len(drawn)).sqrt() + 1 / len(drawn)).all()
    few = model.generate(prompt, 1, top_k=3, generator=draws.generator(1))
    assert set(few.flatten().tolist()) == set(p.topk(3).indices.tolist())


def test_generation_holds_a_state_of_one_size_and_no_graph():
    model = model_of()
    tokens = text(steps=40)
    sizes = {sum(t.numel() for s in model(tokens[:, :n])[1] for t in s) for n in (1, 10, 40)}
    assert len(sizes) == 1
    assert not model.generate(tokens, 3).requires_grad
    assert model.training
    assert model.generate(tokens, 0).shape == (3, 0)


def test_dropout_is_per_channel_and_in_training_only():
    model, tokens = model_of(dropout=0.5, activation="tanh"), text()
    features, _ = model.features(tokens)
    dropped = features == 0
    assert dropped.any()
    assert (dropped.all(1) == dropped.any(1)).all()
    model.eval()
    assert_agrees(step_by_step(model, tokens)[0], lambda tokens: model(tokens)[0], tokens)


def test_calibration_brings_every_memory_to_a_deviation_of_one():
    model, tokens = model_of("delay network"), text(steps=50)
    model.calibrate(tokens)
    h = model.into(model.embedding(tokens))
    for block in model.blocks:
        memory, _ = block.layer(h)
        # A sum over 150 memories, each of which is a sum through 50 steps.
        deviation = memory.std((0, 1), correction=0)
        bounds.assert_close(deviation, torch.ones_like(deviation), magnitude=1, roundings=2 * 150 + 50 * 16)
        h, _ = block(h, None, None)


def test_calibration_drops_no_words():
    model = LanguageModel(Embedding(VOCABULARY, 8, dropout=0.5), MEMORIES["lmu"], num_layers=2)
    tokens, scales = text(steps=50), []
    for _ in range(2):
        model.calibrate(tokens)
        scales.append([layer.memory.scale.clone() for layer in model.layers])
    assert all(map(torch.equal, *scales))
    assert model.training


@pytest.mark.parametrize("output", OUTPUTS)
def test_a_target_outside_the_vocabulary_never_has_a_score(output):
    """On a GPU too, where ``score`` does not look at the targets itself."""
    softmax = model_of(output=output).output
    width = 10 if output == "tied" else 8
    for target in (-1, VOCABULARY):
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            softmax(torch.zeros(2, width, dtype=torch.float64), torch.tensor([1, target]))


@pytest.mark.compiled
def test_the_loss_compiles_to_one_graph():
    model, tokens = model_of("sru"), text()
    compiled = torch.compile(model.loss, backend="eager", fullgraph=True)
    assert_agrees(compiled(tokens, tokens)[0], lambda tokens: model.loss(tokens, tokens)[0], tokens)


def test_a_layer_may_be_read_as_it_is():
    layers = [SRU(8, 8), SRU(8, 8)]
    model = LanguageModel(Embedding(VOCABULARY, 8), layers, dense=False, highways=0)
    assert model.layers == layers
    names = [name for name, _ in model.named_parameters() if "layer" not in name]
    assert names == ["depths", "embedding.weight", "output.weight", "output.bias"]


@pytest.mark.parametrize("output", OUTPUTS)
def test_it_trains_in_bfloat16_with_log_probabilities_in_float32(output):
    model, tokens = model_of(output=output).float(), text()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = model.loss(tokens, tokens)
        log_p, _ = model(tokens)
    loss.backward()
    assert log_p.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.bad_input
def test_parts_that_do_not_fit_get_a_clear_error():
    embedding = Embedding(VOCABULARY, 8)
    with pytest.raises(ValueError, match="take 8 channels, got 6 and 7"):
        LanguageModel(embedding, lambda size: SRU(6, 7))
    with pytest.raises(ValueError, match="to return 8, because there is no dense layer"):
        LanguageModel(embedding, lambda size: SRU(8, 7), dense=False)
    with pytest.raises(ValueError, match="an output at every step"):
        LanguageModel(embedding, lambda size: LMU(8, 8, order=2, theta=3, return_sequences=False))
    with pytest.raises(TypeError, match="got Linear"):
        LanguageModel(embedding, [nn.Linear(8, 8)])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="at least one block"):
        LanguageModel(embedding, [])
    with pytest.raises(ValueError, match="tied=True cannot be combined with output"):
        LanguageModel(embedding, MEMORIES["sru"], tied=True, output=Custom)


@pytest.mark.bad_input
def test_wrong_arguments_get_a_clear_error():
    model = model_of()
    with pytest.raises(TypeError, match="expected tokens in an integer dtype, got torch"):
        model(torch.rand(3, 17))
    with pytest.raises(ValueError, match="tokens from 0 to 29, got 0 to 30"):
        model(torch.tensor([[0, 30]]))
    with pytest.raises(ValueError, match="targets from 0 to 29, got 0 to 30"):
        model.score(torch.tensor([[0, 29]]), torch.tensor([[0, 30]]))
    with pytest.raises(ValueError, match="a tuple of 2 states, one per block, got 1 states"):
        model(text(), model.initial_state(3)[:1])
    with pytest.raises(ValueError, match="lengths from 0 to T = 17"):
        model(text(), lengths=torch.tensor([18, 1, 1]))
    with pytest.raises(ValueError, match="T at least 1"):
        model.generate(text()[:, :0], 3)
    with pytest.raises(ValueError, match="tokens from 0 to 29, got 30 to 30"):
        model.generate(torch.tensor([[30]]), 3)
    assert model.training
    for name, wrong in (
        ("steps", {"steps": -1}),
        ("temperature", {"steps": 1, "temperature": -0.1}),
        ("top_k", {"steps": 1, "top_k": 0}),
    ):
        with pytest.raises(ValueError, match=f"expected {name} (of|to be an int of) at least [01], got"):
            model.generate(text(), **wrong)
