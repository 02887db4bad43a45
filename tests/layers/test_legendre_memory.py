"""What is particular to LegendreMemory: theta, the scale, what it keeps. The contract is in tests/test_contract.py."""

import copy
import math

import jaxtyping
import pytest
import torch

import bounds
from legato.layers import LegendreMemory
from legato.legendre import delay_network, window_decoder
from legato.ops.time_invariant import lti


@pytest.fixture
def unchecked():
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


def test_the_memory_is_the_recurrence_of_the_delay_network():
    layer = LegendreMemory(2, 5, [7.0, 11.0], dtype=torch.float64)
    u = torch.randn(3, 40, 2, dtype=torch.float64)
    A, B = delay_network(5, torch.tensor([7.0, 11.0]).double())

    def recurrence(u):
        m, memory = torch.zeros(3, 2, 5, dtype=torch.float64), []
        for t in range(40):
            m = torch.einsum("cnk,bck->bcn", A, m) + B * u[:, t, :, None]
            memory.append(m)
        return torch.stack(memory, dim=1), m

    memory, state = layer(u)
    bounds.assert_agrees((memory, state.memory), recurrence, u, terms=40 * 6)


def test_the_decoder_reads_the_past_window_from_the_memory():
    theta, order = 60, 24
    t = torch.arange(300, dtype=torch.float64)
    u = torch.sin(2 * math.pi * t / 80) + 0.5 * torch.cos(2 * math.pi * t / 37)
    _, state = LegendreMemory(1, order, theta, dtype=torch.float64)(u.view(1, -1, 1))
    window = window_decoder(order, 61) @ state.memory[0, 0]
    # A held input jumps at each step, which the polynomials smooth: the error is of the order of a step's change.
    assert (window[3:-3] - u.flip(0)[3:58]).abs().max() < 2 * u.diff().abs().max()


def test_calibration_gives_unit_deviation_and_no_scaled_state():
    layer = LegendreMemory(2, 6, 20, dtype=torch.float64)
    u = torch.randn(4, 1500, 2, dtype=torch.float64)  # longer than the pieces that calibrate works in
    plain, before = layer(u)
    layer.calibrate(u)
    scaled, after = layer(u)
    # Sums over 6,000 memories.
    ones = torch.ones(2, 6, dtype=torch.float64)
    bounds.assert_close(scaled.std((0, 1), correction=0), ones, magnitude=1, roundings=2 * 6000)
    assert torch.equal(before.memory, after.memory)
    expected = plain / plain.std((0, 1), correction=0)
    bounds.assert_close(scaled, expected, magnitude=expected.abs(), roundings=2 * 6000)


def test_calibration_does_not_look_at_padding():
    u = torch.randn(3, 30, 1)
    lengths = torch.tensor([30, 12, 25])
    one, other = LegendreMemory(1, 4, 10), LegendreMemory(1, 4, 10)
    one.calibrate(u, lengths=lengths)
    u[torch.arange(30) >= lengths[:, None]] = torch.nan
    other.calibrate(u, lengths=lengths)
    assert torch.equal(one.scale, other.scale)
    memory = torch.cat([one(u[i : i + 1, :n])[0][0] for i, n in enumerate(lengths.tolist())])
    # Sums over 67 memories, each a sum through 30 steps of order 4.
    deviation = memory.double().std(0, correction=0)
    bounds.assert_close(deviation, torch.ones_like(deviation), magnitude=1, roundings=67 + 30 * 5, dtype=torch.float32)


def test_the_scale_is_saved_with_the_weights():
    layer, other = (LegendreMemory(1, 4, theta, dtype=torch.float64) for theta in (10, 25))
    u = torch.randn(2, 50, 1, dtype=torch.float64)
    layer.calibrate(u)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(u)[0], layer(u)[0])


def test_calibration_refuses_what_does_not_vary():
    layer = LegendreMemory(2, 4, 10)
    u = torch.randn(2, 50, 2)
    with pytest.raises(ValueError, match=r"4 steps to calibrate order 4, got 2: pass a longer input"):
        layer.calibrate(u[:1, :2])
    with pytest.raises(ValueError, match=r"standard deviation of 0 in channel 1, order 0: pass finite input"):
        layer.calibrate(torch.stack([u[..., 0], torch.zeros(2, 50)], dim=-1))
    with pytest.raises(ValueError, match="pass finite input"):
        layer.calibrate(u.fill_(torch.nan))
    assert torch.equal(layer.scale, torch.ones(2, 4))


@pytest.mark.parametrize("theta", [12.0, [5.0, 12.0]])
def test_theta_learns_the_length_of_a_window(theta):
    """Gradient descent moves theta towards the one that made the target."""
    layer = LegendreMemory(2, 3, theta, trainable_theta=True)
    u = torch.randn(4, 60, 2)
    target = LegendreMemory(2, 3, 8.0)(u)[0]
    before = (layer.window() - 8).abs()
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.02)
    for _ in range(40):
        optimiser.zero_grad()
        (layer(u)[0] - target).square().mean().backward()
        optimiser.step()
    assert ((layer.window() - 8).abs() < before / 2).all()


def test_a_trained_theta_stays_above_one_step():
    layer = LegendreMemory(1, 3, 1.5, trainable_theta=True)
    with torch.no_grad():
        layer.log_theta.fill_(-40)
    assert layer.window() >= 1
    assert layer(torch.randn(1, 5, 1))[0].isfinite().all()


def test_a_theta_that_is_loaded_or_written_to_is_noticed():
    u = torch.randn(2, 30, 1)
    other = LegendreMemory(1, 4, 25.0)
    expected = other(u)[0]
    frozen = LegendreMemory(1, 4, 10.0)
    frozen(u)
    frozen.load_state_dict(other.state_dict())
    assert torch.equal(frozen(u)[0], expected)
    trained = LegendreMemory(1, 4, 10.0, trainable_theta=True).eval()
    with torch.no_grad():
        trained(u)
        trained.log_theta.fill_(math.log(24.0))
        found = trained(u)[0]
    # Theta - 1, of which the logarithm is stored in float32: 4 roundings of log 24 and of its exponential.
    wide = LegendreMemory(1, 4, 25.0, dtype=torch.float64)

    def moved(log_theta, u):
        return lti(u, *delay_network(4, 1 + log_theta.exp()), method="chunked")[0]

    log_theta = torch.tensor(math.log(24.0), dtype=torch.float64)
    magnitude = bounds.sensitivity(moved, log_theta, u.double())
    roundings = bounds.likely(found.numel(), terms=30 * 5)
    bounds.assert_close(found, wide(u.double())[0], magnitude=magnitude, roundings=roundings)
    bounds.assert_close(expected, wide(u.double())[0], magnitude=magnitude, roundings=roundings)


@pytest.mark.compiled
@pytest.mark.parametrize("trainable", [False, True])
def test_a_compiled_layer_follows_its_theta(trainable):
    u = torch.randn(2, 30, 1)
    other = LegendreMemory(1, 4, 25.0, trainable_theta=trainable)
    layer = LegendreMemory(1, 4, 10.0, trainable_theta=trainable)
    layer(u)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for source in (LegendreMemory(1, 4, 12.0, trainable_theta=trainable), other):
        layer.load_state_dict(source.state_dict())
        wide = copy.deepcopy(source).double()
        bounds.assert_agrees(compiled(u)[0], lambda u, wide=wide: wide(u)[0], u, terms=30 * 5)


@pytest.mark.bad_input
def test_weights_of_another_number_of_windows_are_refused():
    saved = LegendreMemory(2, 4, [5.0, 10.0]).state_dict()
    with pytest.raises((ValueError, RuntimeError), match=r"theta of shape \(\) in the state_dict, got \(2,\)"):
        LegendreMemory(2, 4, 10.0).load_state_dict(saved)


def test_what_is_prepared_is_kept_and_grows():
    layer = LegendreMemory(1, 4, 10.0)
    assert layer.prepared(40) is layer.prepared(30)
    assert layer.prepared(41).steps == 80
    assert layer.prepared(70) is layer.prepared(80)
    layer.double()
    assert layer.prepared(30).powers.dtype == torch.float64


def test_a_layer_first_used_under_inference_mode_can_be_trained():
    layer = LegendreMemory(1, 4, 10.0)
    with torch.inference_mode():
        layer(torch.randn(1, 9, 1))
    u = torch.randn(1, 9, 1, requires_grad=True)
    layer(u)[0].sum().backward()
    assert u.grad is not None


def test_sixteen_bit_weights_keep_the_window():
    layer = LegendreMemory(1, 4, 999.0).to(torch.bfloat16)
    assert layer.window() == 999
    assert layer.scale.dtype == torch.bfloat16


def test_bad_arguments_raise(unchecked):
    for arguments, options, message in [
        ((0, 4, 10), {}, "expected input_size to be an int of at least 1, got 0"),
        ((1, 0, 10), {}, "expected order to be an int of at least 1, got 0"),
        ((1, 2.5, 10), {}, "expected order to be an int of at least 1, got 2.5"),
        ((1, 4, 0.5), {}, "1 step or more, got 0.5"),
        ((1, 4, -3), {}, "1 step or more, got -3"),
        ((1, 4, math.nan), {}, "theta must be finite"),
        ((2, 4, [1.0, 2.0, 3.0]), {}, "expected theta as one number or 2, one per channel, got shape"),
        ((1, 4, 1.0), {"trainable_theta": True}, "expected a trainable theta to start above 1 step, got 1.0"),
        ((1, 4, 10), {"discretizer": "zog"}, "did you mean 'zoh'"),
        ((1, 4, 10), {"method": "chunk"}, "expected method to be None or one of sequential, toeplitz, fft, chunked"),
        ((1, 40, 10), {"discretizer": "euler"}, "stable from theta"),
    ]:
        with pytest.raises((TypeError, ValueError), match=message):
            LegendreMemory(*arguments, **options)
