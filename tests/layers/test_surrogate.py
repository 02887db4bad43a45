"""A cell fed by a surrogate is the loop of its definition; what every layer keeps is held in tests/test_contract.py."""

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import bounds
import draws
from legato.layers import (
    GILR,
    GILRLSTM,
    LMU,
    QRNN,
    SRU,
    Bidirectional,
    LegendreMemory,
    LinearSurrogate,
    Stack,
    StronglyTypedRNN,
)

BATCH, STEPS = 3, 21
EPS = torch.finfo(torch.float64).eps


class Cell(nn.Module):
    """s_t = relu(W s_{t-1} + V x_t) + s_{t-1} / 2."""

    def __init__(self, input_size, hidden_size):
        super().__init__()
        self.V, self.W = nn.Linear(input_size, hidden_size), nn.Linear(hidden_size, hidden_size)

    def forward(self, s, x):
        return torch.relu(self.W(s) + self.V(x)) + s / 2


def step_by_step(layer, x, state, lengths, reset):
    """s_t = f(s~_{t-1}, x_t) as it is written, a row and a step at a time."""
    outputs, ends = torch.zeros(BATCH, STEPS, layer.hidden_size, dtype=x.dtype), []
    zeros = layer.initial_state(1)
    for b in range(BATCH):
        memory, before, *cell = pytree.tree_map(lambda s, b=b: s[b : b + 1], state)
        for t in range(int(lengths[b])):
            if reset[b, t]:
                memory, before, *cell = zeros
            x_t = x[b : b + 1, t]
            if isinstance(layer.cell, nn.LSTMCell):
                s, *cell = layer.cell(x_t, (before, *cell))
            elif isinstance(layer.cell, nn.GRUCell | nn.RNNCell):
                s = layer.cell(x_t, before)
            else:
                s = layer.cell(before, x_t)
            before, memory = layer.surrogate.step(x_t, memory)
            outputs[b, t] = s[0]
        ends.append(layer.State(memory, before, *cell))
    return outputs, pytree.tree_map(lambda *rows: torch.cat(rows), *ends)


@pytest.mark.parametrize("surrogate", [GILR, SRU, QRNN, StronglyTypedRNN])
@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell, Cell, "a function"])
def test_every_cell_is_its_definition(cell, surrogate):
    draws.seed(1)
    f = (lambda s, x: torch.sin(2 * s) + x.mean(-1, keepdim=True)) if cell == "a function" else cell(3, 4)
    layer = LinearSurrogate(f, surrogate(3, 4)).double()
    x = torch.randn(BATCH, STEPS, 3, dtype=torch.float64, requires_grad=True)
    state = pytree.tree_map(lambda s: torch.randn_like(s).requires_grad_(), layer.initial_state(BATCH))
    lengths, reset = torch.tensor([STEPS, 9, 0]), torch.rand(BATCH, STEPS) < 0.15

    def in_one_pass(x, state):
        sources = [x, *pytree.tree_leaves(state), *layer.parameters()]
        return with_gradients(layer(x, state, lengths=lengths, reset=reset), sources)

    found = with_gradients(
        step_by_step(layer, x, state, lengths, reset), [x, *pytree.tree_leaves(state), *layer.parameters()]
    )
    compare(found, in_one_pass, x, state)


def test_gilr_lstm_is_the_surrogate_of_an_lstm_cell_with_a_gilr():
    draws.seed(2)
    n = 5
    ours, fused = LinearSurrogate(nn.LSTMCell(3, n), GILR(3, n)).double(), GILRLSTM(3, n, activation="tanh").double()
    nn.init.normal_(fused.bias)
    with torch.no_grad():
        ours.surrogate.weight.copy_(fused.weight[: 2 * n])
        ours.surrogate.bias.copy_(fused.bias[: 2 * n])
        ours.cell.weight_ih.copy_(as_torch(fused.weight[2 * n :]))
        ours.cell.weight_hh.copy_(as_torch(fused.weight_surrogate))
        ours.cell.bias_ih.copy_(as_torch(fused.bias[2 * n :]) - 1)
        ours.cell.bias_hh.fill_(1)
    x = torch.randn(BATCH, STEPS, 3, dtype=torch.float64, requires_grad=True)
    lengths, reset = torch.tensor([STEPS, 9, 0]), torch.rand(BATCH, STEPS) < 0.15
    surrogate, c = (torch.randn(BATCH, n, dtype=torch.float64, requires_grad=True) for _ in range(2))
    output, end = ours(x, ours.State(GILR.State(surrogate), surrogate, c), lengths=lengths, reset=reset)
    assert torch.equal(end.memory.memory, end.surrogate)
    found = with_gradients((output, (end.cell, end.surrogate)), [x, surrogate, c, *ours.parameters()])

    def by_fused(x, surrogate, c):
        weights = [fused.weight, fused.weight_surrogate, fused.bias]
        answer = fused(x, fused.State(c, surrogate), lengths=lengths, reset=reset)
        *expected, of_weight, of_surrogate, of_bias = with_gradients(answer, [x, surrogate, c, *weights])
        of_bias_ih = as_torch(of_bias[2 * n :])
        expected += [as_torch(of_weight[2 * n :]), as_torch(of_surrogate), of_bias_ih, of_bias_ih]
        return [*expected, of_weight[: 2 * n], of_bias[: 2 * n]]

    compare(found, by_fused, x, surrogate, c)


def as_torch(rows):
    """Blocks f, i, o, z in the order of torch, i, f, z, o."""
    f, i, o, z = rows.chunk(4)
    return torch.cat([i, f, z, o])


def with_gradients(result, sources):
    output, state = result
    values = [output, *pytree.tree_leaves(state)]
    draws.seed(3)
    loss = sum((torch.randn_like(value) * value).sum() for value in values)
    return [*values, *torch.autograd.grad(loss, sources)]


def compare(found, run, *tensors):
    """Each value is a sum of at most 16 products a step."""
    bounds.assert_agrees(found, run, *tensors, terms=16 * STEPS)


def test_a_stack_can_be_the_surrogate():
    layer = LinearSurrogate(nn.GRUCell(3, 4), Stack.of(GILR, 3, 4, num_layers=2)).double()
    x = torch.randn(2, 9, 3, dtype=torch.float64)
    state, outputs = layer.initial_state(2), []
    for t in range(9):
        output_t, state = layer.step(x[:, t], state)
        outputs.append(output_t)

    def in_one_pass(x):
        output, final = layer(x)
        return [output, *pytree.tree_leaves(final)]

    compare([torch.stack(outputs, 1), *pytree.tree_leaves(state)], in_one_pass, x)


@pytest.mark.parametrize("cell", [nn.LSTMCell(3, 4), nn.GRUCell(3, 4)], ids=["lstm", "gru"])
def test_the_state_holds_itself_alone(cell):
    """A view of the last step would keep, and save, all steps."""
    _, state = LinearSurrogate(cell, GILR(3, 4))(torch.randn(2, 9, 3))
    for tensor in pytree.tree_leaves(state):
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_a_cell_without_biases_works():
    layer = LinearSurrogate(nn.LSTMCell(3, 4, bias=False), GILR(3, 4))
    assert layer(torch.randn(2, 9, 3))[0].shape == (2, 9, 4)


class OwnLSTM(nn.LSTMCell):
    def forward(self, x, state=None):
        return super().forward(x, state)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("cell", "surrogate", "message"),
    [
        (
            nn.LSTMCell(3, 5),
            GILR(3, 4),
            "a cell of hidden_size 4, the channels that the surrogate returns, .* of 5",
        ),
        (nn.GRUCell(2, 4), GILR(3, 4), "a cell of input_size 3, the channels that the surrogate takes, .* of 2: make"),
        (nn.LSTMCell, GILR(3, 4), "expected cell to compute one step, got the class LSTMCell: pass a cell such as"),
        (nn.LSTM(3, 4), GILR(3, 4), "expected cell to compute one step, got LSTM: pass a cell such as"),
        (GILR(3, 4), GILR(3, 4), "expected cell to compute one step, got GILR"),
        ("lstm", GILR(3, 4), "expected cell to compute one step, got str"),
        (OwnLSTM(3, 4), GILR(3, 4), "got a OwnLSTM with a forward of its own"),
        (
            nn.GRUCell(3, 4, dtype=torch.float64),
            GILR(3, 4),
            "expected a cell in torch.float32 on cpu like the surrogate, got a GRUCell in torch.float64 on cpu",
        ),
        (nn.GRUCell(3, 4), nn.GRU(3, 4), "expected surrogate to be a RecurrentLayer, got GRU: pass a layer"),
        (nn.GRUCell(3, 4), GILR, "expected surrogate to be a RecurrentLayer, got type: pass a layer"),
        (
            nn.GRUCell(3, 4),
            Bidirectional(GILR(3, 2), GILR(3, 2)),
            "expected a surrogate that reads forward only, got a bidirectional Bidirectional",
        ),
        (
            nn.GRUCell(3, 4),
            LMU(3, 4, order=4, theta=5.0, return_sequences=False),
            "expected a surrogate that returns every s_t, got a LMU .* build it with return_sequences=True",
        ),
        (nn.GRUCell(3, 12), LegendreMemory(3, 4, 5.0), r"got a LegendreMemory whose output_size is \(3, 4\)"),
    ],
)
def test_parts_that_do_not_fit_get_a_clear_error(cell, surrogate, message):
    with pytest.raises((TypeError, ValueError), match=message):
        LinearSurrogate(cell, surrogate)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("cell", "got"),
    [
        (lambda s, x: x, r"shape \(18, 3\)"),
        (lambda s, x: s[:-1], r"shape \(17, 4\)"),
        (lambda s, x: (s, s), "tuple"),
        (lambda s, x: None, "NoneType"),
    ],
)
def test_a_function_that_gives_something_else_gets_a_clear_error(cell, got):
    layer = LinearSurrogate(cell, GILR(3, 4))
    with pytest.raises(
        ValueError if "shape" in got else TypeError,
        match=rf"cell to return s_t as a tensor of shape \(18, 4\).*got {got}: make",
    ):
        layer(torch.randn(2, 9, 3))
