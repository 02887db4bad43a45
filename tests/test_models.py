"""Whole networks keep the layers' contract."""

import copy

import pytest
import torch
from torch import nn

import bounds
from legato.layers import LMU, LegendreMemory, Stack
from legato.models import Embedding, LockedDropout, SequenceClassifier, SequenceRegressor


def layers(last: bool = True):
    return LMU(2, 5, order=3, theta=6.0), LMU(5, 4, order=3, theta=6.0, return_sequences=last)


def test_a_stack_streams_what_it_computes_at_once():
    model = SequenceRegressor(Stack(*layers()), nn.Linear(4, 1))
    x = torch.randn(3, 12, 2)
    state, outputs = model.initial_state(3), []
    for x_t in x.unbind(1):
        y_t, state = model.step(x_t, state)
        outputs.append(y_t)
    # Sums of at most 16 products a step.
    bounds.assert_agrees((torch.stack(outputs, 1), state), copy.deepcopy(model).double(), x, terms=16 * 12)


def test_a_stack_classifies_by_its_last_output():
    stack = Stack(*layers(last=False))
    model = SequenceClassifier(stack, nn.Linear(4, 10))
    scores, state = model(torch.randn(3, 12, 2), lengths=torch.tensor([12, 5, 1]))
    assert scores.shape == (3, 10)
    assert [s.memory.shape for s in state] == [(3, 1, 3), (3, 1, 3)]


@pytest.mark.parametrize(
    "layer",
    [
        LegendreMemory(3, 2, 6.0, return_sequences=False),
        LegendreMemory(3, 2, 6.0),
        LegendreMemory(3, 1, 6.0, return_sequences=False),
    ],
)
def test_a_classifier_takes_the_last_output_of_any_layer(layer):
    model = SequenceClassifier(layer, nn.Linear(3 * layer.order, 2), Embedding(11, 3))
    tokens = torch.randint(1, 11, (3, 12))
    scores, state = model(tokens, lengths=torch.tensor([12, 5, 0]))
    wide = copy.deepcopy(model).double()

    def agrees(found, run, *tensors):
        bounds.assert_agrees(found, run, *tensors, terms=16 * 12)

    for row, length in ((0, 12), (1, 5)):
        alone = slice(row, row + 1)
        agrees((scores[alone], state.memory[alone]), lambda x: (wide(x)[0], wide(x)[1].memory), tokens[alone, :length])
    nothing = torch.zeros(1, 3 * layer.order)
    agrees(scores[2:], wide.head, nothing)
    streamed = model.initial_state(1)
    for token in tokens[0]:
        score, streamed = model.step(token[None], streamed)
    agrees(score, lambda x: wide(x)[0], tokens[:1])
    agrees(model(tokens[:1, :0])[0], wide.head, nothing)


@pytest.mark.parametrize("lengths", [None, torch.tensor([7, 0, 4])])
def test_a_bag_of_words_is_the_memory_of_order_one(lengths):
    layer = LegendreMemory(4, 1, 9.0, trainable_theta=True, return_sequences=False).double()
    layer.scale.uniform_()
    model = SequenceClassifier(layer, nn.Linear(4, 2), Embedding(11, 4)).double()
    tokens = torch.randint(11, (3, 7))
    sources = [*model.parameters()]

    def with_gradients(scores, state):
        return [scores, state.memory, *torch.autograd.grad(scores.square().sum() + state.memory.sum(), sources)]

    def written_out(tokens):
        output, state = SequenceRegressor(layer, nn.Identity(), model.embedding)(tokens, lengths=lengths)
        return with_gradients(model.head(output.flatten(1)), state)

    bounds.assert_agrees(with_gradients(*model(tokens, lengths=lengths)), written_out, tokens, terms=32 * 7)


def test_an_embedding_gives_the_vectors_it_was_given():
    vectors = torch.randn(5, 3)
    embedding = Embedding(5, 3, vectors=vectors.numpy(), trainable=False)
    tokens = torch.tensor([[4, 0, 1]])
    assert torch.equal(embedding(tokens), torch.stack([vectors[4], torch.zeros(3), vectors[1]])[None])
    assert not embedding.weight.requires_grad
    learned = Embedding(5, 3)
    learned(tokens).sum().backward()
    assert learned.weight.grad is not None
    assert learned.weight.grad.sum(1).tolist() == [0, 3, 0, 0, 3]


def test_a_dropped_word_is_dropped_everywhere():
    embedding = Embedding(50, 2, vectors=torch.ones(50, 2), padding_idx=None, dropout=0.4)
    tokens = torch.arange(50).repeat(3, 1)
    output = embedding(tokens)
    assert {round(v, 4) for v in output.flatten().tolist()} == {0.0, round(1 / 0.6, 4)}
    assert torch.equal(output[0], output[2])
    assert torch.equal(embedding.eval()(tokens), torch.ones(3, 50, 2))


def test_locked_dropout_is_the_same_at_every_step():
    dropout = LockedDropout(0.5)
    y = dropout(torch.ones(4, 9, 20))
    assert set(y.flatten().tolist()) == {0.0, 2.0}
    assert torch.equal(y, y[:, :1].expand_as(y))
    assert not torch.equal(y[0], y[1])
    assert torch.equal(dropout.eval()(y), y)


@pytest.mark.bad_input
def test_wrong_parts_get_a_clear_error():
    with pytest.raises(
        ValueError, match=r"vectors of shape \(num_embeddings, embedding_dim\) = \(5, 3\), got \(5, 4\)"
    ):
        Embedding(5, 3, vectors=torch.ones(5, 4))
    with pytest.raises(ValueError, match="padding_idx as a token from 0 to 4, or None, got 5"):
        Embedding(5, 3, padding_idx=5)
    for wrong in (lambda: Embedding(5, 3, dropout=1.0), lambda: LockedDropout(-0.1)):
        with pytest.raises(ValueError, match="expected dropout from 0 to below 1"):
            wrong()
    with pytest.raises(ValueError, match="tokens from 0 to 4, got 2 to 5: encode the text with the vocabulary"):
        Embedding(5, 3)(torch.tensor([[2, 5]]))
    bag = SequenceClassifier(LegendreMemory(3, 1, 6.0, return_sequences=False), nn.Linear(3, 1), Embedding(5, 3))
    with pytest.raises(ValueError, match="tokens from 0 to 4, got 2 to 5: encode the text with the vocabulary"):
        bag(torch.tensor([[2, 5]]))
    with pytest.raises(ValueError, match="lengths from 0 to T = 2, got 3 to 3"):
        bag(torch.tensor([[2, 4]]), lengths=torch.tensor([3]))
    with pytest.raises(ValueError, match="an embedding of 2 channels, the layer's input_size, got 3"):
        SequenceClassifier(Stack(*layers()), nn.Linear(4, 10), Embedding(5, 3))
    with pytest.raises(ValueError, match="method=None with return_sequences=False"):
        LegendreMemory(2, 3, 6.0, method="fft", return_sequences=False)
