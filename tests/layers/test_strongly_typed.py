"""What is particular to StronglyTypedRNN: its equations. The contract is in tests/test_contract.py."""

import torch

import bounds
from legato import StronglyTypedRNN, spread_time_scales


def equations(layer, x, h):
    V, W = layer.weight.chunk(2)
    outputs = []
    for x_t in x.unbind(1):
        f = 1 / (1 + torch.exp(-(x_t @ V.T + layer.bias)))
        h = f * h + (1 - f) * (x_t @ W.T)
        outputs.append(h)
    return torch.stack(outputs, dim=1), h


def test_values_and_gradients_are_those_of_the_equations(agree):
    agree(StronglyTypedRNN(3, 5, dtype=torch.float64), equations)


def test_it_has_the_paper_s_parameters():
    assert sum(p.numel() for p in StronglyTypedRNN(4, 256).parameters()) == 2 * 4 * 256 + 256
    assert StronglyTypedRNN(4, 3, forget_bias=2.0).bias.tolist() == [2.0] * 3


def test_the_units_take_time_scales():
    layer = StronglyTypedRNN(2, 3, dtype=torch.float64)
    spread_time_scales(layer.bias, 10.0, 1000.0)
    _, state = layer(torch.zeros(1, 50, 2, dtype=torch.float64), layer.State(torch.ones(1, 3, dtype=torch.float64)))
    decays = torch.exp(-50 / torch.tensor([10.0, 100.0, 1000.0], dtype=torch.float64))
    # 50 products, of a decay that is right to 8 roundings.
    bounds.assert_close(state.memory[0], decays, magnitude=decays, roundings=50 * (8 + 1))
