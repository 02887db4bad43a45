"""``repr`` of a layer is the call that builds it: sizes, then the options that differ from their defaults."""

import pytest
import torch
from torch import nn

import legato
from legato import (
    GILR,
    GILRLSTM,
    LMU,
    LRU,
    QRNN,
    SRU,
    Bidirectional,
    Highway,
    LegendreMemory,
    LinearRNN,
    LinearSurrogate,
    MinGRU,
    MinLSTM,
    RecurrentLMU,
    Stack,
    StronglyTypedRNN,
)

LINES = [
    (lambda: GILR(4, 8), "GILR(4, 8)"),
    (lambda: GILR(4, 8, forget_bias=1.0), "GILR(4, 8, forget_bias=1)"),
    (lambda: GILRLSTM(4, 8), "GILRLSTM(4, 8)"),
    (lambda: GILRLSTM(4, 8, activation=torch.sin), "GILRLSTM(4, 8, activation=sin)"),
    (lambda: Highway(8), "Highway(8)"),
    (lambda: Highway(8, activation="tanh", gate_bias=-3.0), "Highway(8, activation='tanh', gate_bias=-3)"),
    (lambda: LMU(1, 8, order=4, theta=10), "LMU(1, 8, order=4, theta=10)"),
    (
        lambda: LMU(1, 8, memory_size=2, order=4, theta=[10, 20.5], bias=False, input_to_output=False, method="fft"),
        "LMU(1, 8, memory_size=2, order=4, theta=[10, 20.5], input_to_output=False, bias=False, method='fft')",
    ),
    (lambda: LRU(4, 8), "LRU(4, 8)"),
    (lambda: LRU(4, 8, output_size=2, r_min=0.9), "LRU(4, 8, output_size=2, r_min=0.9)"),
    (lambda: LegendreMemory(2, 4, 10.0), "LegendreMemory(2, 4, theta=10)"),
    (
        lambda: LegendreMemory(2, 4, 10.5, trainable_theta=True, return_sequences=False),
        "LegendreMemory(2, 4, theta=10.5, trainable_theta=True, return_sequences=False)",
    ),
    (lambda: LinearRNN(4, 8, torch.sin), "LinearRNN(4, 8, gates=sin)"),
    (lambda: MinGRU(4, 8), "MinGRU(4, 8)"),
    (lambda: MinLSTM(4, 8, forget_bias=2.0), "MinLSTM(4, 8, forget_bias=2)"),
    (lambda: QRNN(4, 8, kernel_size=3), "QRNN(4, 8, kernel_size=3)"),
    (lambda: RecurrentLMU(1, 8, order=4, theta=10), "RecurrentLMU(1, 8, order=4, theta=10)"),
    (
        lambda: RecurrentLMU(1, 8, order=4, theta=10, hidden_cell="lstm", bias=True, memory_to_memory=False),
        "RecurrentLMU(1, 8, order=4, theta=10, hidden_cell='lstm', memory_to_memory=False, bias=True)",
    ),
    (lambda: SRU(4, 8), "SRU(4, 8)"),
    (lambda: SRU(4, 8, activation=torch.sin, highway_bias=-2.0), "SRU(4, 8, activation=sin, highway_bias=-2)"),
    (lambda: StronglyTypedRNN(4, 8, dtype=torch.float64), "StronglyTypedRNN(4, 8)"),
    (lambda: Stack(GILR(4, 8)), "Stack(\n  (layers): ModuleList(\n    (0): GILR(4, 8)\n  )\n)"),
    (
        lambda: Bidirectional(GILR(4, 8), GILR(4, 8)),
        "Bidirectional(\n  (forward_layer): GILR(4, 8)\n  (backward_layer): GILR(4, 8)\n)",
    ),
    (
        lambda: LinearSurrogate(nn.GRUCell(4, 8), GILR(4, 8)),
        "LinearSurrogate(\n  (cell): GRUCell(4, 8)\n  (surrogate): GILR(4, 8)\n)",
    ),
]


@pytest.mark.parametrize(("build", "expected"), LINES, ids=[expected.replace("\n", " ") for _, expected in LINES])
def test_repr_is_the_call_that_builds_the_layer(build, expected):
    assert repr(build()) == expected


def test_every_layer_has_a_case():
    names = {expected.split("(")[0] for _, expected in LINES}
    layers = [getattr(legato, name) for name in legato.__all__]
    assert {c.__name__ for c in layers if isinstance(c, type) and issubclass(c, nn.Module)} - {
        "RecurrentLayer"
    } <= names


def test_a_layer_of_a_users_own_has_a_repr():
    class Own(legato.RecurrentLayer):
        def __init__(self, input_size, hidden_size, *, rate=0.5, other=None):
            super().__init__(input_size)
            self.hidden_size, self.rate, self.decay = hidden_size, rate, nn.Parameter(torch.zeros(3))

    assert repr(Own(4, 8, rate=0.25)) == "Own(4, 8, rate=0.25)"
