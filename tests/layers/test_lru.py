"""What is particular to LRU: its equations in complex numbers, its ring. The contract is in tests/test_contract.py."""

import math

import pytest
import torch

import bounds
import draws
from legato import LRU


def equations(layer, x, memory):
    """Section 3 and appendix A of the paper, in complex128, a step at a time."""
    B, C = (torch.view_as_complex(pairs.contiguous()) for pairs in (layer.B.mT, layer.C))
    decay = torch.exp(-torch.exp(layer.nu_log) + 1j * torch.exp(layer.theta_log))
    D = torch.diag(layer.D) if layer.D.ndim == 1 else layer.D
    h = torch.view_as_complex(memory)
    outputs = []
    for x_t in x.unbind(1):
        h = decay * h + torch.exp(layer.gamma_log) * (x_t.to(B.dtype) @ B.T)
        outputs.append((h @ C.T).real + x_t @ D.T)
    return torch.stack(outputs, dim=1), torch.view_as_real(h)


@pytest.mark.parametrize("output_size", [None, 3, 4])
def test_values_and_gradients_are_those_of_the_equations(output_size, agree):
    agree(LRU(3, 5, output_size=output_size, dtype=torch.float64), equations)


def test_it_has_the_paper_s_parameters():
    """With as many outputs as inputs: B and C complex, D a number a channel, nu, theta and gamma a number a unit."""
    assert sum(p.numel() for p in LRU(8, 16, output_size=8).parameters()) == 2 * 16 * 8 + 2 * 8 * 16 + 8 + 3 * 16
    assert sum(p.numel() for p in LRU(8, 16).parameters()) == 2 * 16 * 8 + 2 * 16 * 16 + 16 * 8 + 3 * 16
    assert LRU(8, 16).output_size == 16


@pytest.mark.parametrize(("r_min", "r_max", "max_phase"), [(0.0, 1.0, 2 * math.pi), (0.9, 0.999, 0.3), (0.5, 0.5, 1.0)])
def test_decays_start_on_the_ring(r_min, r_max, max_phase):
    layer = LRU(2, 4000, r_min=r_min, r_max=r_max, max_phase=max_phase, dtype=torch.float64)
    assert all(p.isfinite().all() for p in layer.parameters())
    squares = layer.decay().abs() ** 2
    roundings = 64 * torch.finfo(torch.float64).eps
    assert (squares >= r_min**2 - roundings).all()
    assert (squares <= r_max**2 + roundings).all()
    # Uniform over the area: the mean of 4,000 squares is that of their ends, within 4 of its deviations.
    deviation = (r_max**2 - r_min**2) / math.sqrt(12 * 4000)
    assert squares.mean().item() == pytest.approx((r_min**2 + r_max**2) / 2, abs=4 * deviation + roundings)
    phases = layer.theta_log.exp()
    assert (phases > 0).all()
    assert (phases <= max_phase * (1 + roundings)).all()
    assert phases.mean().item() == pytest.approx(max_phase / 2, abs=4 * max_phase / math.sqrt(12 * 4000))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gamma_starts_at_what_gives_white_noise_one_variance(dtype):
    layer = LRU(2, 50, r_min=0.9, r_max=0.9999999, dtype=dtype)
    nu = layer.nu_log.double().exp()
    expected = (-torch.expm1(-2 * nu)).sqrt()  # sqrt(1 - abs(lambda)^2)
    # Logarithms up to 16, of the decay and of gamma, each right to 4 roundings.
    bounds.assert_close(layer.gamma_log.double().exp(), expected, magnitude=16 * expected, roundings=8, dtype=dtype)


def test_a_16_bit_layer_keeps_its_decays_in_32_bits():
    draws.seed(0)
    single = LRU(3, 6, r_min=0.999, r_max=0.9999)
    for layer in (single, LRU(3, 6, r_min=0.999, r_max=0.9999, dtype=torch.bfloat16)):
        before = layer.decay()
        layer.to(torch.bfloat16)
        assert torch.equal(layer.decay(), before)
        assert layer.decay().dtype == torch.complex64
        assert layer.B.dtype == layer.C.dtype == layer.D.dtype == torch.bfloat16
        assert {name for name, p in layer.named_parameters() if p.dtype == torch.float32} == {
            "nu_log",
            "theta_log",
            "gamma_log",
        }


def test_its_parameters_are_real_tensors():
    assert not any(p.is_complex() for p in LRU(3, 6).state_dict().values())


@pytest.mark.bad_input
def test_what_it_cannot_be_built_of_raises():
    for r_min, r_max in [(0.9, 0.8), (-0.1, 0.5), (0.5, 1.1), (1.0, 1.0), (0.0, 0.0)]:
        with pytest.raises(ValueError, match="expected 0 <= r_min <= r_max <= 1, with r_min < 1 and r_max > 0, got"):
            LRU(3, 4, r_min=r_min, r_max=r_max)
    for max_phase in (0.0, -1.0):
        with pytest.raises(ValueError, match="expected max_phase above 0 radians per step"):
            LRU(3, 4, max_phase=max_phase)
    for name, value in (("r_min", math.nan), ("max_phase", math.inf), ("max_phase", math.nan)):
        with pytest.raises(ValueError, match=f"expected {name} to be a finite number, got"):
            LRU(3, 4, **{name: value})
    for name, arguments in {"input_size": (0, 4), "hidden_size": (3, 0), "output_size": (3, 4)}.items():
        with pytest.raises(ValueError, match=f"expected {name} to be an int of at least 1, got 0"):
            LRU(*arguments, output_size=0)
