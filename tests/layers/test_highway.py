"""The highway layer is its equation."""

import copy

import pytest
import torch

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
    found, expected = layer(x), by_hand(layer, x, f)
    sources = [x, *layer.parameters()]
    values = [[y, *torch.autograd.grad((weight * y).sum(), sources)] for y in (found, expected)]
    for a, b in zip(*values, strict=True):
        # Sums of at most 14 rows of 16 products, each right to a rounding of the largest.
        torch.testing.assert_close(
            a, b, rtol=0, atol=14 * 16 * torch.finfo(x.dtype).eps * max(1.0, b.abs().max().item())
        )


def test_it_starts_near_its_input():
    x = torch.randn(4, 100, SIZE)
    layer = Highway(SIZE, gate_bias=-20.0)
    torch.testing.assert_close(layer(x), x)
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
    expected = layer(x)
    if kind == "weights":
        layer, x = layer.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        found = layer(x)
    assert found.dtype == x.dtype
    # Rounded: weights, input, products, gate, candidate, difference, product, sum.
    assert (found.float() - expected).norm() <= 8 * torch.finfo(torch.bfloat16).eps * expected.norm()


def test_a_copy_and_an_empty_batch():
    layer = Highway(SIZE, activation="tanh")
    x = torch.randn(2, SIZE)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert layer(x[:0]).shape == (0, SIZE)
    assert Highway(SIZE, device="meta")(x.to("meta")).is_meta


@pytest.mark.compiled
def test_a_compiled_layer_equals_the_layer():
    layer, x = Highway(SIZE), torch.randn(2, 7, SIZE)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


@pytest.mark.bad_input
def test_wrong_arguments_get_a_clear_error():
    with pytest.raises(ValueError, match="size to be an int of at least 1, got 0"):
        Highway(0)
    with pytest.raises(ValueError, match=r"expected an activation among .* got 'rleu'"):
        Highway(4, activation="rleu")
    with pytest.raises(ValueError, match=r"expected x of shape \(..., 5\), got \(2, 4\): the last axis is channels"):
        Highway(SIZE)(torch.randn(2, 4))
