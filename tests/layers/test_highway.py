"""The highway layer is its equation."""

import copy

import pytest
import torch

import bounds
from legato.layers import Highway

SIZE = 5


def by_hand(layer, x, f):
    """y = g f(W x + b) + (1 - g) x, a row at a time."""
    W_g, W = layer.weight[:SIZE], layer.weight[SIZE:]
    b_g, b = layer.bias[:SIZE], layer.bias[SIZE:]
    rows = []
    for row in x.reshape(-1, SIZE):
        g = torch.sigmoid(W_g @ row + b_g)
        rows.append(g * f(W @ row + b) + (1 - g) * row)
    return torch.stack(rows).view(x.shape)


@pytest.mark.parametrize("shape", [(SIZE,), (3, SIZE), (2, 7, SIZE)])
@pytest.mark.parametrize(("name", "f"), [("relu", torch.relu), ("identity", lambda z: z), (torch.sin, torch.sin)])
def test_it_is_its_equation_with_all_gradients(name, f, shape):
    layer = Highway(SIZE, activation=name).double()
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x)

    def with_gradients(y, x):
        return [y, *torch.autograd.grad((weight * y).sum(), [x, *layer.parameters()])]

    # Sums over at most 14 rows, or 4 roundings of a gate.
    found = with_gradients(layer(x), x)
    bounds.assert_agrees(found, lambda x: with_gradients(by_hand(layer, x, f), x), x, terms=16)


def test_it_starts_near_its_input():
    x = torch.randn(4, 100, SIZE)
    layer = Highway(SIZE, gate_bias=-20.0)
    # g is exp(-20) and moves the output by at most so much of what the weights make of x.
    assert ((layer(x) - x).abs() <= 1e-7 * (layer.weight.abs().sum(1).max() + 1) * x.abs().max()).all()
    assert (layer.bias[:SIZE] == -20).all()
    assert not layer.bias[SIZE:].any()
    assert (Highway(SIZE).bias[:SIZE] < 0).all()


def test_one_product_makes_gate_and_candidate(monkeypatch):
    calls, linear = [], torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *a: calls.append(a) or linear(*a))
    Highway(SIZE)(torch.randn(2, SIZE))
    assert len(calls) == 1


@pytest.mark.parametrize("kind", ["weights", "autocast"])
def test_sixteen_bits_keep_the_dtype_of_the_input(kind):
    layer, x = Highway(SIZE), torch.randn(3, SIZE)
    given, wide = x, copy.deepcopy(layer).double()
    if kind == "weights":
        layer, x = layer.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        found = layer(x)
    assert found.dtype == x.dtype
    # Rounded to 16 bits: weights and input, and the result of every operation.
    bounds.assert_agrees(found, wide, given, terms=4, dtype=torch.bfloat16)


def test_a_copy_and_an_empty_batch():
    layer = Highway(SIZE, activation="tanh")
    x = torch.randn(2, SIZE)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert layer(x[:0]).shape == (0, SIZE)
    assert Highway(SIZE, device="meta")(x.to("meta")).is_meta


@pytest.mark.compiled
def test_a_compiled_layer_equals_the_layer():
    layer, x = Highway(SIZE), torch.randn(2, 7, SIZE)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    bounds.assert_agrees(compiled(x), copy.deepcopy(layer).double(), x, terms=16)


@pytest.mark.bad_input
def test_wrong_arguments_get_a_clear_error():
    with pytest.raises(ValueError, match="size to be an int of at least 1, got 0"):
        Highway(0)
    with pytest.raises(ValueError, match=r"expected an activation among .* got 'rleu'"):
        Highway(4, activation="rleu")
    with pytest.raises(ValueError, match=r"expected x of shape \(..., 5\), got \(2, 4\): the last axis is channels"):
        Highway(SIZE)(torch.randn(2, 4))
