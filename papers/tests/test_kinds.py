"""Every kind of layer that a recipe offers keeps the contract: parallel = chunked = streamed, and lengths."""

import pytest
import torch
from torch.utils import _pytree as pytree

import bounds
import draws
from legato.models import SequenceClassifier
from legato_papers.kinds import KINDS, layer_of
from legato_papers.models import PairClassifier
from legato_papers.task import ExperimentError

STEPS, SPLIT = 19, 8
every_kind = pytest.mark.parametrize("kind", KINDS)
both_ways = pytest.mark.parametrize("sequences", [True, False], ids=["all outputs", "last output"])


def build(kind, sequences=True, **changes):
    draws.seed(0)
    options = {"theta": 9.0, "order": 3, "window": 5, "heads": 2, "layers": 2} | changes
    return layer_of(kind, 3, 8, return_sequences=sequences, **options).double().eval()


def assert_agrees(found, run, *tensors):
    """Each value is a sum of fewer than 64 products a step, in two layers."""
    bounds.assert_agrees(found, run, *tensors, terms=2 * 64 * STEPS)


@every_kind
@pytest.mark.parametrize("chunks", [[SPLIT, STEPS - SPLIT], [1] * STEPS, [0, 3, STEPS - 3]])
def test_chunks_equal_one_pass(kind, chunks):
    layer = build(kind)
    x = torch.randn(2, STEPS, 3, dtype=torch.float64)
    outputs, state = [], layer.initial_state(2)
    for part in x.split(chunks, dim=1):
        output, state = layer(part, state)
        outputs.append(output)
    assert_agrees((torch.cat(outputs, 1), state), layer, x)


@every_kind
@both_ways
def test_steps_equal_one_pass(kind, sequences):
    layer = build(kind, sequences)
    x = torch.randn(2, STEPS, 3, dtype=torch.float64)
    outputs, state = [], layer.initial_state(2)
    for x_t in x.unbind(1):
        output, state = layer.step(x_t, state)
        outputs.append(output)
    assert_agrees((torch.stack(outputs, 1) if layer.return_sequences else outputs[-1], state), layer, x)


@every_kind
@both_ways
def test_padding_changes_nothing_even_when_it_is_nan(kind, sequences):
    layer = build(kind, sequences)
    lengths = torch.tensor([0, 7, STEPS])
    x = torch.randn(3, STEPS, 3, dtype=torch.float64)
    before = layer(torch.randn(3, 4, 3, dtype=torch.float64))[1]
    x[torch.arange(STEPS) >= lengths[:, None]] = torch.nan
    x.requires_grad_()
    output, state = layer(x, before, lengths=lengths)
    output.sum().backward()
    assert x.grad is not None
    assert not x.grad[torch.arange(STEPS) >= lengths[:, None]].any()
    for row, length in enumerate(lengths.tolist()):
        one = pytree.tree_map(lambda s, row=row: s[row : row + 1], before)
        found = output[row : row + 1]
        of_row = found[:, :length] if layer.return_sequences else found
        of_row = of_row, pytree.tree_map(lambda s, row=row: s[row : row + 1], state)
        assert_agrees(of_row, layer, x[row : row + 1, :length], one)
        assert not (found[:, length:] if layer.return_sequences else found[: length == 0]).any()


@every_kind
def test_no_output_depends_on_what_comes_later(kind):
    layer = build(kind)
    x = torch.randn(1, STEPS, 3, dtype=torch.float64, requires_grad=True)
    # Weighted: a plain sum over the channels of a LayerNorm has a gradient of zero.
    (gradient,) = torch.autograd.grad((layer(x)[0] * torch.randn(8).double())[:, :SPLIT].sum(), x)
    assert gradient[:, :SPLIT].any()
    assert not gradient[:, SPLIT:].any()


@every_kind
def test_gradients_are_those_of_finite_differences(kind):
    layer = build(kind)
    x = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([6, 4])
    assert torch.autograd.gradcheck(lambda x: layer(x, lengths=lengths)[0], x, fast_mode=True)


def test_a_transformer_sees_its_window_and_no_more():
    layer = build("transformer", layers=1)
    x = torch.randn(1, STEPS, 3, dtype=torch.float64, requires_grad=True)
    # Weighted: a plain sum over the channels of a LayerNorm has a gradient of zero.
    (gradient,) = torch.autograd.grad((layer(x)[0][:, -1] * torch.randn(8).double()).sum(), x)
    assert gradient.any(dim=2).tolist() == [[False] * (STEPS - 6) + [True] * 6]


def test_a_transformer_sees_distances_not_positions():
    layer = build("transformer", layers=1)
    x = torch.randn(1, STEPS, 3, dtype=torch.float64)
    assert_agrees(layer(x[:, 7:])[0][:, 5:], lambda x: layer(x)[0][:, 12:], x)


def test_a_transformer_attends_as_its_equation_says():
    layer = build("transformer", layers=1, window=4)
    x = torch.randn(2, STEPS, 3, dtype=torch.float64)
    block = layer.blocks[0]
    h = layer.embed(x)
    q, k, v = (part.unflatten(-1, (2, 4)) for part in block.read(block.norms[0](h)).chunk(3, dim=-1))

    def turned(a, position):  # a complex number a pair of channels: i and i + 2
        angle = position * 10_000 ** -(torch.arange(2, dtype=torch.float64) / 2)
        pairs = torch.complex(*a.chunk(2, dim=-1)) * torch.polar(torch.ones(2, dtype=torch.float64), angle)
        return torch.cat([pairs.real, pairs.imag], -1)

    rows = []
    for t in range(STEPS):
        past = range(max(0, t - 4), t + 1)
        scores = torch.stack([(turned(q[:, t], t) * turned(k[:, s], s)).sum(-1) / 2 for s in past])
        rows.append((scores.softmax(0)[..., None] * v[:, list(past)].transpose(0, 1)).sum(0).flatten(1))
    y = h + block.write(torch.stack(rows, 1))
    y = layer.norm(y + block.mlp(block.norms[1](y)))
    assert_agrees(y, lambda x: layer(x)[0], x)


@every_kind
def test_every_kind_stands_in_both_classifiers(kind):
    layer = build(kind, False).float()
    one = SequenceClassifier(layer, torch.nn.Linear(8, 1))
    assert one(torch.randn(2, 9, 3), lengths=torch.tensor([9, 0]))[0].shape == (2, 1)
    two = PairClassifier(layer, torch.nn.Linear(32, 3))
    assert two(torch.randn(2, 9, 3), torch.randn(2, 4, 3)).shape == (2, 3)


@pytest.mark.bad_input
def test_a_wrong_kind_or_size_gets_a_clear_error():
    with pytest.raises(ExperimentError, match="no kind 'rnn': expected one of lmu, gilr-lstm"):
        layer_of("rnn", 3, 8)
    with pytest.raises(ValueError, match="multiple of 2 \\* heads = 8, got 6"):
        layer_of("transformer", 3, 6)
    for kind in KINDS:
        with pytest.raises(ValueError, match="layers to be an int of at least 1, got 0"):
            layer_of(kind, 3, 8, layers=0)
    for kind in ("lstm", "transformer"):
        with pytest.raises(ValueError, match="leave reset out"):
            build(kind)(torch.randn(1, 3, 3, dtype=torch.float64), reset=torch.zeros(1, 3, dtype=torch.bool))
