"""Biases that give forget gates their time scales."""

import math

import pytest
import torch

import bounds
from legato import spread_time_scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("shortest", "longest"), [(1.0, 100.0), (0.01, 0.1), (1e3, 1e6), (7.0, 7.0)])
def test_the_decay_of_unit_i_is_exp_of_minus_one_over_tau_i(shortest, longest, dtype):
    """A bias b is right to eps |b|; -log sigmoid(b), which is 1 / tau, is then right to eps |b| of itself or of one."""
    bias = spread_time_scales(torch.empty(13, dtype=dtype), shortest, longest)
    assert bias.dtype == dtype
    taus = [shortest * (longest / shortest) ** (i / 12) for i in range(13)]
    rates = -torch.nn.functional.logsigmoid(bias.double())
    # Powers, exp and log, of 4 roundings each, before the bias and behind it.
    taus = torch.tensor(taus, dtype=torch.float64)
    magnitude = taus * bias.double().abs().clamp(min=1)
    bounds.assert_close(rates.reciprocal(), taus, magnitude=magnitude, roundings=32, dtype=dtype)


def test_a_million_step_time_scale_is_exact_in_float32():
    """Its decay, 0.999999, has one digit of float32 left; its bias, 13.8, has all."""
    bias = spread_time_scales(torch.empty(1), 1e6, 1e6)
    expected = torch.tensor([-math.log(math.expm1(1e-6))], dtype=torch.float64)
    bounds.assert_close(bias, expected, magnitude=expected, roundings=1)
    # 1 - f, as the layers form it: the error of the bias, and 4 roundings of a sigmoid.
    rate = torch.tensor([-math.expm1(-1e-6)], dtype=torch.float64)
    bounds.assert_close((-bias).sigmoid(), rate, magnitude=rate, roundings=2 * expected.item() + 4)


def test_time_scales_rise_unless_shuffled():
    taus = spread_time_scales(torch.empty(50), 2.0, 2000.0)
    assert (taus.diff() > 0).all()
    shuffled = spread_time_scales(torch.empty(50), 2.0, 2000.0, shuffle=True)
    assert not torch.equal(shuffled, taus)
    assert torch.equal(shuffled.sort().values, taus)


def test_a_view_of_a_parameter_is_changed_in_place():
    bias = torch.nn.Parameter(torch.zeros(6))
    given = bias[:3]
    assert spread_time_scales(given, 1, 10) is given
    assert bias[:3].all()
    assert not bias[3:].any()
    assert bias.requires_grad


def test_no_units_are_fine():
    assert spread_time_scales(torch.empty(0), 1.0, 10.0).shape == (0,)


def test_time_scales_far_below_a_step_have_a_finite_bias():
    bias = spread_time_scales(torch.empty(2, dtype=torch.float64), 1e-4, 1e-3)
    # log(f / (1 - f)) with f = exp(-1 / tau) too small to matter beside one.
    expected = torch.tensor([-1e4, -1e3], dtype=torch.float64)
    bounds.assert_close(bias, expected, magnitude=expected.abs(), roundings=16)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("bias", "error", "message"),
    [
        (torch.zeros(4, dtype=torch.int64), TypeError, "expected bias to be floating, got torch.int64"),
        (torch.zeros(2, 2), ValueError, r"expected bias of shape \(channels,\), got \(2, 2\)"),
        ([0.0, 0.0], TypeError, "expected bias to be a tensor, got list"),
    ],
)
def test_what_is_no_bias_raises(bias, error, message):
    with pytest.raises(error, match=message):
        spread_time_scales(bias, 1.0, 10.0)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("shortest", "longest"), [(0.0, 1.0), (-1.0, 1.0), (2.0, 1.0), (1.0, math.inf), (math.nan, 1.0), (1.0, math.nan)]
)
def test_a_range_that_is_none_raises(shortest, longest):
    with pytest.raises(
        ValueError,
        match=r"expected (time scales with 0 < shortest|\w+ to be a finite number)",
    ):
        spread_time_scales(torch.empty(3), shortest, longest)
