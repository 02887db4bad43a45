"""The bounds that the other tests use: they hold for any order of summation, and fail on a wrong result."""

import pytest
import torch

import bounds

ORDERS = {
    "serial": lambda x: x.cumsum(0)[-1],
    "reversed": lambda x: x.flip(0).cumsum(0)[-1],
    "blocks": lambda x: x.unflatten(0, (-1, 10)).cumsum(1)[:, -1].cumsum(0)[-1],
    "library": lambda x: x.sum(0),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sum_in_any_order_is_within_both_bounds(order, dtype):
    terms = torch.randn(3600, 50).to(dtype).double()
    if dtype == torch.float64:  # so few digits that the sum of float64 is exact
        terms = terms.float().mul(2**20).round().double()
    found, exact = ORDERS[order](terms.to(dtype)), terms.sum(0)
    bounds.assert_close(found, exact, magnitude=terms.abs().sum(0), roundings=3600)
    likely = bounds.likely(50, terms=3600)
    bounds.assert_close(found, exact, magnitude=terms.square().sum(0).sqrt(), roundings=likely)


def test_equal_terms_round_alike_and_need_the_worst_case():
    found, exact = torch.full((2**20,), 0.1).cumsum(0)[-1], torch.tensor(0.1).double() * 2**20
    bounds.assert_close(found, exact, magnitude=exact, roundings=2**20)


def test_the_majorant_of_a_product_is_the_sum_of_absolute_values():
    a, b = torch.randn(3, 4, requires_grad=True), torch.randn(4, 2)

    def run(a, b):
        return a @ b, *torch.autograd.grad((a @ b).sum(), a)

    product, gradient = bounds.majorant(run, a, b)
    torch.testing.assert_close(product, a.detach().double().abs() @ b.double().abs(), rtol=1e-15, atol=0)
    torch.testing.assert_close(gradient, b.double().abs().sum(1).expand(3, 4), rtol=1e-15, atol=0)


def test_the_sensitivity_of_a_sum_is_its_root_of_squares():
    x = torch.randn(1000, 200, dtype=torch.float64)
    expected = (x.square().sum(0) + x.sum(0).square()).sqrt()  # of the terms, and of the result
    found = bounds.sensitivity(lambda x: x.sum(0), x)
    # The largest of 200, each the mean of four squares of nearly normal numbers.
    assert expected.max() <= found <= 3 * expected.max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_the_sensitivity_covers_every_operation_and_the_backward(dtype):
    x = torch.ones(5000, dtype=dtype, requires_grad=True)

    def run(x):
        y = x.clone()
        y[:10] = 1 - y[:10]  # exactly zero, of terms of order one
        y.mul_(1.0)
        return y, *torch.autograd.grad((y * y).abs().sum(), x)

    y, gradient = bounds.sensitivity(run, x)
    assert 1 <= y <= 4 * 5**0.5  # at most five operations, each of one part
    assert gradient >= 2
    assert torch.equal(x, torch.ones_like(x))


def test_a_few_roundings_pass_and_one_in_10_000_fails():
    exact = torch.randn(100, dtype=torch.float64)
    bounds.assert_close(exact.float(), exact, magnitude=0, roundings=0)
    wrong = exact.float()
    wrong[7] *= 1 + 1e-4
    with pytest.raises(AssertionError, match=r"sum: 1 of 100 elements are off, most at \(7,\)"):
        bounds.assert_close(wrong, exact, magnitude=exact.abs(), roundings=bounds.likely(100), name="sum")


def test_what_is_missing_is_not_close():
    exact = torch.tensor([1.0, torch.nan, torch.inf], dtype=torch.float64)
    bounds.assert_close(exact, exact, magnitude=1, roundings=1)
    for wrong in ([torch.nan, torch.nan, torch.inf], [1.0, 1.0, torch.inf], [1.0, torch.nan, -torch.inf]):
        with pytest.raises(AssertionError):
            bounds.assert_close(torch.tensor(wrong), exact, magnitude=1, roundings=1)
    with pytest.raises(AssertionError, match="expected the shape"):
        bounds.assert_close(exact[:2], exact, magnitude=1, roundings=1)
