"""What is particular to RecurrentLMU: its equations, written out. The contract is in tests/test_contract.py."""

import pytest
import torch

import bounds
from legato.layers import RecurrentLMU
from legato.legendre import delay_network


def equations(layer, x):
    """The 2019 unit, a step at a time, each term in its own product."""
    A, B = delay_network(layer.memory.order, layer.memory.window())
    channels, order, H = layer.memory.input_size, layer.memory.order, layer.hidden_size
    A, B = A.expand(channels, order, order), B.expand(channels, order)
    m = torch.zeros(len(x), channels, order, dtype=x.dtype)
    h = c = torch.zeros(len(x), H, dtype=x.dtype)
    outputs = []
    for t in range(x.shape[1]):
        u = layer.input_to_memory(x[:, t]) + layer.hidden_to_memory(h)
        u = u + layer.memory_to_memory((m * layer.memory.scale).flatten(1))
        m = torch.einsum("cnk,bck->bcn", A, m) + B * u[..., None]
        of_x = layer.input_to_hidden(x[:, t]) + layer.memory_to_hidden((m * layer.memory.scale).flatten(1))
        of_h = layer.hidden_to_hidden(h)
        if layer.hidden_cell == "lstm":
            i, f, g, o = (of_x + of_h).chunk(4, dim=1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        elif layer.hidden_cell == "gru":
            r, v = torch.sigmoid((of_x + of_h)[:, : 2 * H]).chunk(2, dim=1)
            n = torch.tanh(of_x[:, 2 * H :] + r * of_h[:, 2 * H :])
            h = v * h + (1 - v) * n
        else:
            h = {"tanh": torch.tanh, "relu": torch.relu}[layer.hidden_cell](of_x + of_h)
        outputs.append(h)
    return torch.stack(outputs, dim=1), m


@pytest.mark.parametrize("cell", ["tanh", "relu", "gru", "lstm"])
@pytest.mark.parametrize("theta", [8.0, [5.0, 9.0]])
def test_the_output_is_that_of_the_equations(cell, theta):
    layer = RecurrentLMU(3, 6, memory_size=2, order=5, theta=theta, hidden_cell=cell, bias=True, dtype=torch.float64)
    torch.nn.init.normal_(layer.memory_to_memory.weight, std=0.1)
    torch.nn.init.normal_(layer.memory_to_hidden.bias)
    layer.memory.scale.uniform_(0.5, 2)
    x = torch.randn(2, 25, 3, dtype=torch.float64)
    output, state = layer(x)
    bounds.assert_agrees((output, state.memory), lambda x: equations(layer, x), x, terms=25 * 16)


def test_the_paper_s_network_has_its_parameters():
    layer = RecurrentLMU(1, 212, order=256, theta=784)
    assert sum(p.numel() for p in layer.parameters()) + 212 * 10 + 10 == 102_027


def test_the_weights_start_as_in_the_paper():
    layer = RecurrentLMU(4, 300, order=20, theta=30, hidden_cell="lstm")
    assert not layer.memory_to_memory.weight.any()
    bound = (3 / 300) ** 0.5
    assert 0.9 * bound < layer.hidden_to_memory.weight.abs().max() <= bound
    # Glorot for each gate by itself: its spread over 300 x 300 draws is within 2 %.
    for gate in layer.hidden_to_hidden.weight.chunk(4):
        assert gate.std().item() == pytest.approx((2 / 600) ** 0.5, rel=0.02)


def test_connections_can_be_left_out():
    layer = RecurrentLMU(2, 5, order=4, theta=6, hidden_to_memory=False, memory_to_memory=False, input_to_hidden=False)
    names = {name.split(".")[0] for name, _ in layer.named_parameters()}
    assert names == {"input_to_memory", "hidden_to_hidden", "memory_to_hidden"}


def test_an_unknown_cell_raises():
    with pytest.raises(ValueError, match="expected hidden_cell to be one of tanh, relu, gru, lstm, got 'rnn'"):
        RecurrentLMU(2, 5, order=4, theta=6, hidden_cell="rnn")
