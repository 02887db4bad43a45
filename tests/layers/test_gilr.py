"""What is particular to GILR and GILRLSTM: the paper's equations. The contract is in tests/test_contract.py."""

import pytest
import torch

import bounds
from legato import GILR, GILRLSTM, spread_time_scales


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def gilr(layer, x, h):
    """(7) of the paper, a step at a time."""
    (U, V), (b_g, b_z) = layer.weight.chunk(2), layer.bias.chunk(2)
    outputs = []
    for x_t in x.unbind(1):
        g = sigmoid(x_t @ U.T + b_g)
        h = g * h + (1 - g) * torch.tanh(x_t @ V.T + b_z)
        outputs.append(h)
    return torch.stack(outputs, dim=1), h


def gilr_lstm(layer, x, c, h=None, reset=None, lengths=None):
    """Section 3.2: an LSTM a step at a time, each gate in its own products, whose gates see the surrogate."""
    n = layer.hidden_size
    U_g, V_g, *V = layer.weight.split(n)
    b_g, b_i, *b = layer.bias.split(n)
    U = layer.weight_surrogate.split(n)
    h = torch.zeros_like(c) if h is None else h
    outputs = []
    for t, x_t in enumerate(x.unbind(1)):
        counts = torch.ones(len(x), 1, dtype=torch.bool) if lengths is None else (t < lengths)[:, None]
        if reset is not None:
            c, h = (torch.where(reset[:, t, None] & counts, 0, s) for s in (c, h))
        f, i, o = (sigmoid(h @ U[j].T + x_t @ V[j].T + b[j]) for j in range(3))
        z = torch.tanh(h @ U[3].T + x_t @ V[3].T + b[3])
        c = torch.where(counts, f * c + i * z, c)
        shown = c if layer.activation == "identity" else torch.tanh(c)
        outputs.append(torch.where(counts, o * shown, 0))
        g = sigmoid(x_t @ U_g.T + b_g)
        h = torch.where(counts, g * h + (1 - g) * torch.tanh(x_t @ V_g.T + b_i), h)
    return torch.stack(outputs, dim=1), c


def test_values_and_gradients_of_gilr_are_those_of_the_equations(agree):
    agree(GILR(3, 5, dtype=torch.float64), gilr)


@pytest.mark.parametrize("activation", ["identity", "tanh"])
def test_gilr_lstm_equals_its_equations_with_all_gradients(activation, agree):
    layer = GILRLSTM(3, 5, activation=activation, dtype=torch.float64)
    agree(layer, gilr_lstm, terms=32)
    agree(layer, gilr_lstm, 3, terms=32, lengths=torch.tensor([0, 7, 25]), reset=torch.rand(3, 25) < 0.2)


def test_the_surrogate_s_state_enters_and_leaves():
    layer = GILRLSTM(3, 5, dtype=torch.float64)
    x = torch.randn(2, 9, 3, dtype=torch.float64)
    c, h = torch.randn(2, 2, 5, dtype=torch.float64)
    output, state = layer(x, layer.State(c, h))
    surrogate = GILR(3, 5, dtype=torch.float64)
    surrogate.load_state_dict({"weight": layer.weight[:10], "bias": layer.bias[:10]})

    def equations(x, c, h):
        return *gilr_lstm(layer, x, c, h), gilr(surrogate, x, h)[1]

    bounds.assert_agrees((output, state.memory, state.surrogate), equations, x, c, h, terms=32 * 9)


def test_products_that_the_caller_formed_give_the_same():
    layer = GILRLSTM(3, 5, dtype=torch.float64)
    x = torch.nn.functional.one_hot(torch.randint(3, (2, 9)), 3).double()
    table = (layer.weight.mT + layer.bias)[x.argmax(-1)]
    output, state = layer.from_products(table)
    bounds.assert_agrees((output, state), layer, x, terms=32 * 9)


def test_products_are_padded_as_inputs_are():
    layer = GILRLSTM(3, 5, dtype=torch.float64)
    x, lengths, reset = torch.randn(3, 9, 3, dtype=torch.float64), torch.tensor([0, 4, 9]), torch.rand(3, 9) < 0.3
    state = layer.State(*torch.randn(2, 3, 5, dtype=torch.float64))
    products = torch.nn.functional.linear(x, layer.weight, layer.bias)
    products[1, 4:] = torch.nan
    output, final = layer.from_products(products, state, lengths=lengths, reset=reset)

    def one_pass(x, state):
        return layer(x, state, lengths=lengths, reset=reset)

    bounds.assert_agrees((output, final), one_pass, x, state, terms=32 * 9)


@pytest.mark.bad_input
def test_products_that_do_not_fit_raise():
    layer, products = GILRLSTM(3, 5), torch.randn(2, 4, 30)
    for given, state, message in (
        (products[..., :-1], None, r"expected products of shape \(B, T, 6 hidden_size\) = \(.*30\), got \(2, 4, 29\)"),
        (products.double(), None, "expected products in torch.float32"),
        (products, torch.zeros(2, 5), "expected a GILRLSTMState, got Tensor"),
        (products, layer.initial_state(1), r"expected state.memory of shape \(2, 5\), got \(1, 5\)"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            layer.from_products(given, state)
    with pytest.raises(ValueError, match="expected lengths from 0 to T = 4, got 5 to 5"):
        layer.from_products(products, lengths=torch.tensor([5, 5]))


def test_gilr_lstm_has_as_many_parameters_as_gilr_and_lstm():
    """2 n (m + 1), as the equations have it; the paper counts 2 n (n + m). torch.nn.LSTM has each bias twice."""
    n, m = 256, 4
    assert sum(p.numel() for p in GILR(m, n).parameters()) == 2 * n * (m + 1)
    lstm = sum(p.numel() for p in torch.nn.LSTM(m, n).parameters()) - 4 * n
    surrogate = sum(p.numel() for p in GILRLSTM(m, n).parameters()) - lstm
    assert surrogate == 2 * n * (m + 1)


def test_forget_gates_start_at_the_authors_bias():
    layer = GILRLSTM(2, 3)
    assert GILR(2, 3).bias.tolist() == [5.0] * 3 + [0.0] * 3
    assert layer.bias.tolist() == [5.0] * 3 + [0.0] * 3 + [5.0] * 3 + [0.0] * 9
    assert not GILRLSTM(2, 3, forget_bias=0.0).bias.any()


def test_each_gate_starts_glorot_uniform_by_itself():
    layer = GILRLSTM(40, 200)
    for matrix in (*GILR(40, 200).weight.chunk(2), *layer.weight.chunk(6), *layer.weight_surrogate.chunk(4)):
        bound = (6 / sum(matrix.shape)) ** 0.5
        # The largest of 8,000 uniform numbers is below 0.99 of the bound once in exp(80).
        assert 0.99 * bound < matrix.abs().max() <= bound


def test_the_units_take_time_scales():
    layer = GILRLSTM(2, 3, dtype=torch.float64)
    gilr = GILR(2, 3, dtype=torch.float64)
    for bias in (*layer.forget_biases(), gilr.bias[:3]):
        spread_time_scales(bias, 10.0, 1000.0)
    decays = torch.exp(-50 / torch.tensor([10.0, 100.0, 1000.0], dtype=torch.float64))
    x, ones = torch.zeros(1, 50, 2, dtype=torch.float64), torch.ones(1, 3, dtype=torch.float64)
    layer.weight_surrogate.data.zero_()
    for state in (*layer(x, layer.State(ones, ones))[1], gilr(x, gilr.State(ones))[1].memory):
        # 50 products, of a decay that is right to 8 roundings.
        bounds.assert_close(state[0], decays, magnitude=decays, roundings=50 * (8 + 1))


@pytest.mark.bad_input
def test_what_they_cannot_be_built_of_raises():
    with pytest.raises(ValueError, match=r"expected an activation among identity, .*, got 'step'"):
        GILRLSTM(4, 4, activation="step")
    for layer in (GILR, GILRLSTM):
        with pytest.raises(ValueError, match="expected hidden_size to be an int of at least 1, got 0"):
            layer(4, 0)
        with pytest.raises(ValueError, match="expected input_size to be an int of at least 1, got -1"):
            layer(-1, 4)
