"""What is particular to MinGRU and MinLSTM: their equations. The contract is in tests/test_contract.py."""

import pytest
import torch

import bounds
from legato import MinGRU, MinLSTM, spread_time_scales


def min_gru(layer, x, h):
    """Section 3.1, whose gate is z = 1 - f, with weights of the other sign."""
    (V, W), (b_f, b_h) = layer.weight.chunk(2), layer.bias.chunk(2)
    outputs = []
    for x_t in x.unbind(1):
        z = 1 / (1 + torch.exp(-(x_t @ -V.T - b_f)))
        h = (1 - z) * h + z * (x_t @ W.T + b_h)
        outputs.append(h)
    return torch.stack(outputs, dim=1), h


def min_lstm(layer, x, h):
    """Section 3.2, with the two gates divided by their sum."""
    (W_f, W_i, W), (b_f, b_i, b_h) = layer.weight.chunk(3), layer.bias.chunk(3)
    outputs = []
    for x_t in x.unbind(1):
        f = 1 / (1 + torch.exp(-(x_t @ W_f.T + b_f)))
        i = 1 / (1 + torch.exp(-(x_t @ W_i.T + b_i)))
        h = f / (f + i) * h + i / (f + i) * (x_t @ W.T + b_h)
        outputs.append(h)
    return torch.stack(outputs, dim=1), h


@pytest.mark.parametrize(("layer", "equations"), [(MinGRU, min_gru), (MinLSTM, min_lstm)])
def test_values_and_gradients_are_those_of_the_equations(layer, equations, agree):
    agree(layer(3, 5, dtype=torch.float64), equations)


@pytest.mark.parametrize(("layer", "gates"), [(MinGRU, 2), (MinLSTM, 3)])
def test_they_have_the_paper_s_parameters(layer, gates):
    assert sum(p.numel() for p in layer(4, 256).parameters()) == gates * 256 * (4 + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gates_that_are_both_closed_keep_their_ratio(dtype):
    """sigmoid(-200) is zero in float32, and 0 / (0 + 0) is not a number."""
    layer = MinLSTM(1, 1, dtype=dtype)
    with torch.no_grad():
        layer.bias[:] = torch.tensor([-200.0, -201.0, 0.0])
    memory = torch.ones(1, 1, dtype=dtype, requires_grad=True)
    output, _ = layer(torch.zeros(1, 1, 1, dtype=dtype), layer.State(memory))
    # log f - log i is 1 to two roundings of 200, and the slope of the sigmoid at most 1 / 4; it has 4 of its own.
    exact = torch.ones(1, dtype=torch.float64).sigmoid()
    bounds.assert_close(output.flatten(), exact, magnitude=1, roundings=2 * 200 / 4 + 4, dtype=dtype)
    output.backward()
    assert memory.grad is not None
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("layer", [MinGRU, MinLSTM])
@pytest.mark.parametrize("forget_bias", [-3.0, 0.0, 5.0])
def test_the_forget_bias_is_that_of_the_decay(layer, forget_bias):
    layer = layer(2, 3, forget_bias=forget_bias, dtype=torch.float64)
    _, state = layer.step(torch.zeros(1, 2, dtype=torch.float64), layer.State(torch.ones(1, 3, dtype=torch.float64)))
    expected = torch.full((1, 3), forget_bias, dtype=torch.float64).sigmoid()
    # Two gates of 4 roundings and their quotient.
    bounds.assert_close(state.memory, expected, magnitude=expected, roundings=16)


@pytest.mark.parametrize("layer", [MinGRU, MinLSTM])
def test_the_units_take_time_scales(layer):
    layer = layer(2, 3, dtype=torch.float64)
    bias = spread_time_scales(layer.bias.data[:3], 10.0, 1000.0)
    if isinstance(layer, MinLSTM):
        layer.bias.data[3:6] = -bias
    _, state = layer(torch.zeros(1, 50, 2, dtype=torch.float64), layer.State(torch.ones(1, 3, dtype=torch.float64)))
    decays = torch.exp(-50 / torch.tensor([10.0, 100.0, 1000.0], dtype=torch.float64))
    # 50 products, of a decay that is right to 16 roundings: two gates and their quotient.
    bounds.assert_close(state.memory[0], decays, magnitude=decays, roundings=50 * (16 + 1))
