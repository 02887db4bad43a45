"""``calibrate`` brings every Legendre memory to a standard deviation of one, wherever it is in a network."""

import pytest
import torch
from torch import nn

import bounds
import draws
from legato.layers import GILR, LMU, Bidirectional, LegendreMemory, LinearSurrogate, RecurrentLMU, Stack
from legato.models import Embedding, LanguageModel, SequenceClassifier, SequenceRegressor

BATCH, STEPS, WIDTH, WORDS = 3, 40, 4, 20


def lmu(input_size=WIDTH, return_sequences=True):
    return LMU(input_size, WIDTH, order=4, theta=9.0, return_sequences=return_sequences)


def flat():
    """A memory whose output has one axis of channels."""
    return Stack(lmu(), lmu(), dropout=0.5)


NETWORKS = {
    "LegendreMemory": (lambda: LegendreMemory(WIDTH, 4, 9.0), 1),
    "LMU": (lmu, 1),
    "LMU, last output": (lambda: lmu(return_sequences=False), 1),
    "Stack": (lambda: Stack(lmu(), GILR(WIDTH, WIDTH), lmu(), dropout=0.5), 2),
    "Bidirectional": (lambda: Bidirectional(lmu(), Stack(GILR(WIDTH, WIDTH), lmu())), 2),
    "LinearSurrogate": (lambda: LinearSurrogate(nn.GRUCell(WIDTH, WIDTH), flat()), 2),
    "SequenceRegressor": (lambda: SequenceRegressor(flat(), nn.Identity()), 2),
    "SequenceClassifier": (lambda: SequenceClassifier(lmu(return_sequences=False), nn.Identity()), 1),
    "words": (lambda: SequenceClassifier(flat(), nn.Identity(), Embedding(WORDS, WIDTH, dropout=0.5)), 2),
    "LanguageModel": (
        lambda: LanguageModel(Embedding(WORDS, WIDTH), lambda size: flat(), num_layers=2, dropout=0.5),
        4,
    ),
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("build", "count"), NETWORKS.values(), ids=NETWORKS)
def test_every_memory_gets_a_deviation_of_one(build, count, padded):
    network = build().double()
    draws.seed(1)
    reads_words = any(isinstance(module, Embedding) for module in network.modules())
    x = torch.randint(WORDS, (BATCH, STEPS)) if reads_words else torch.randn(BATCH, STEPS, WIDTH, dtype=torch.float64)
    lengths = torch.tensor([STEPS, 7, 25]) if padded else None
    if lengths is not None:
        outside = torch.arange(STEPS) >= lengths[:, None]
        x[outside] = -1 if reads_words else torch.nan
    network.calibrate(x, lengths=lengths)
    assert all(module.training for module in network.modules())
    memories, inputs = [m for m in network.modules() if isinstance(m, LegendreMemory)], {}
    for memory in memories:
        memory.register_forward_pre_hook(lambda memory, given: inputs.setdefault(memory, given[0]))
    network.eval()(x, lengths=lengths)
    assert len(inputs) == len(memories) == count
    for memory, u in inputs.items():
        memory.return_sequences = True
        counts = torch.ones(BATCH, STEPS, dtype=torch.bool) if lengths is None else ~outside
        deviation = memory(u)[0][counts].std(0, correction=0)
        # A sum over at most 120 memories, each a sum through 40 steps of order 4, in networks of up to 4 of them.
        bounds.assert_close(deviation, torch.ones_like(deviation), magnitude=1, roundings=8 * (120 + 40 * 16))


@pytest.mark.parametrize("build", [lambda: GILR(WIDTH, WIDTH), lambda: RecurrentLMU(WIDTH, 3, order=4, theta=9.0)])
def test_other_layers_are_unchanged(build):
    layer = build()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.calibrate(torch.randn(BATCH, STEPS, WIDTH))
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


def test_calibration_uses_no_dropout():
    network, x, scales = flat(), torch.randn(BATCH, STEPS, WIDTH), []
    for _ in range(2):
        network.calibrate(x)
        scales.append([layer.memory.scale.clone() for layer in network.layers])
    assert all(map(torch.equal, *scales))
