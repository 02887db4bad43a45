"""What is particular to SRU: the paper's equations, its parameters, its biases. The contract is in test_contract.py."""

import pytest
import torch

import bounds
from legato import SRU, spread_time_scales


def equations(layer, x, c):
    """The first version, a step at a time, each term in its own product."""
    W_f, W_r, *P, W = layer.weight.split(layer.hidden_size)
    b_f, b_r = layer.bias.chunk(2)
    outputs = []
    for x_t in x.unbind(1):
        f = 1 / (1 + torch.exp(-(x_t @ W_f.T + b_f)))
        r = 1 / (1 + torch.exp(-(x_t @ W_r.T + b_r)))
        c = f * c + (1 - f) * (x_t @ W.T)
        shown = c if layer.activation == "identity" else torch.tanh(c)
        outputs.append(r * shown + (1 - r) * (x_t @ P[0].T if P else x_t))
    return torch.stack(outputs, dim=1), c


@pytest.mark.parametrize(("input_size", "activation"), [(5, "tanh"), (3, "tanh"), (5, "identity")])
def test_values_and_gradients_are_those_of_the_equations(input_size, activation, agree):
    agree(SRU(input_size, 5, activation=activation, dtype=torch.float64), equations)


def test_parameters_are_the_papers_with_a_projection_if_needed():
    assert sum(p.numel() for p in SRU(256, 256).parameters()) == 3 * 256 * 256 + 2 * 256
    assert sum(p.numel() for p in SRU(4, 256).parameters()) == 4 * 4 * 256 + 2 * 256


def test_the_biases_start_where_they_are_put():
    layer = SRU(4, 8, forget_bias=2.0, highway_bias=-3.0)
    assert layer.bias.tolist() == [2.0] * 8 + [-3.0] * 8
    assert not SRU(4, 8).bias.any()


def test_weights_start_with_a_variance_of_one_over_the_inputs():
    layer = SRU(16, 1000)
    assert layer.weight.abs().max() <= (3 / 16) ** 0.5
    # The variance of n uniform numbers is known to 2 / sqrt(5 n) of itself, one deviation; n is 64,000.
    assert layer.weight.var().item() == pytest.approx(1 / 16, rel=4 * 2 / (5 * 64_000) ** 0.5)


def test_the_units_take_time_scales():
    layer = SRU(3, 3, activation="identity", dtype=torch.float64)
    taus = torch.tensor([10.0, 100.0, 1000.0], dtype=torch.float64)
    spread_time_scales(layer.bias[:3], 10.0, 1000.0)
    _, state = layer(torch.zeros(1, 50, 3, dtype=torch.float64), layer.State(torch.ones(1, 3, dtype=torch.float64)))
    decays = torch.exp(-50 / taus)
    # 50 products, of a decay that is right to 8 roundings.
    bounds.assert_close(state.memory[0], decays, magnitude=decays, roundings=50 * (8 + 1))


@pytest.mark.bad_input
def test_an_unknown_activation_raises():
    with pytest.raises(ValueError, match=r"expected an activation among identity, .*, got 'step'"):
        SRU(4, 4, activation="step")


@pytest.mark.bad_input
@pytest.mark.parametrize("size", [0, -1, 2.0, None])
def test_a_size_that_is_no_positive_int_raises(size):
    error = ValueError if type(size) is int else TypeError
    with pytest.raises(error, match="expected hidden_size to be an int of at least 1"):
        SRU(4, size)
    with pytest.raises(error, match="expected input_size to be an int of at least 1"):
        SRU(size, 4)
