import json
from typing import cast

import numpy as np
import pytest
import torch

import bounds
from legato.layers.lmu import LMU
from legato.legendre import window_decoder
from legato_papers.cli import main
from legato_papers.recipes.capacity import Config, band_limited, build, network, read_out
from legato_papers.run import open_checkpoint
from legato_papers.task import ExperimentError

SMALL = (  # noqa: SIM905 - as one types it
    "--model.theta 400 --model.order 16 --data.cutoff 2 --data.test_signals 3 --data.validation_signals 1"
).split()


def small(**fields):
    """A window of 400 steps and a memory of order 16, which holds about 4 cycles."""
    config = Config()
    config.model.theta, config.model.order, config.data.cutoff = 400, 16, 2.0
    config.data.test_signals, config.data.validation_signals = 3, 1
    for name, value in fields.items():
        setattr(config.data if hasattr(config.data, name) else config.model, name, value)
    return config


def read_out_of(task):
    return cast(LMU, task.model).memory_to_output.weight


class Perfect(torch.nn.Module):
    """Recalls everything: it keeps the whole signal."""

    def __init__(self, delays):
        super().__init__()
        self.delays, self.unused = delays, torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x):
        padded = [torch.nn.functional.pad(x, (0, 0, delay, 0))[:, : x.shape[1]] for delay in self.delays]
        return torch.cat(padded, dim=-1), None


def test_the_signal_has_its_cutoff_zero_mean_and_unit_peak():
    wave = band_limited(np.random.default_rng(0), 1000, 10 / 400)
    power = np.abs(np.fft.rfft(wave)) ** 2
    # 25 cycles in 1000 steps; roundings of 1000 numbers of at most one.
    assert power[26:].max() < (1000 * np.finfo(float).eps) ** 2
    assert abs(wave.mean()) < 1000 * np.finfo(float).eps
    assert (power[1:26] > 0).all()
    assert np.abs(wave).max() == 1
    assert np.abs(wave[0]) == np.abs(wave).min()


def test_a_perfect_recall_has_no_error():
    task = build(small(), 0)
    figures = task.metrics(task.total(Perfect(task.delays.tolist()), task.test))
    assert figures == {"mse_longest": 0, "mse": 0, "mse_settled": 0}


def test_recalling_nothing_errs_by_the_power_of_the_signal():
    task = build(small(delays=1), 0)
    with torch.no_grad():
        read_out_of(task).zero_()
    (signals,) = task.test.take(torch.arange(3))
    expected = signals[:, 400:].square().mean().item()
    assert task.metrics(task.total(task.model, task.test))["mse"] == pytest.approx(expected, rel=1e-12)


def test_the_read_out_without_half_a_step_is_window_decoder():
    delays = np.array([0, 100, 200, 300, 400])
    expected = window_decoder(16, 5)
    # Legendre polynomials of at most 1 by a recurrence of 4 roundings an order; a rounding of the delay moves the last
    # by 16 * 17 / 2; in both.
    found = read_out(16, delays, 400, half_step=False)
    bounds.assert_close(found, expected, magnitude=1, roundings=2 * (4 * 16 + 16 * 17 / 2))


def test_reading_half_a_step_off_costs_half_a_step_of_the_slope():
    shape = {"order": 32, "theta": 1000, "delays": 3}
    right, off = build(small(**shape), 0), build(small(**shape, half_step=False), 0)
    # Settled, at the delay of half a window: it meets steps 1000 to 2000 of the signal.
    good, plain = (task.total(task.model.double(), task.test)[4].item() for task in (right, off))
    (signals,) = off.test.take(torch.arange(3))
    slope = (signals[:, 2:] - signals[:, :-2]) / 2
    expected = (slope / 2).square()[:, 1000:2000].mean(1).sum().item()
    # Of w = 4 pi / 1000 radians a step the next term, (w^2 / 24)^2, is (w / 12)^2 = 1e-6 of the first, (w / 2)^2.
    assert plain == pytest.approx(expected, rel=1e-2)
    assert good < 1e-5 * plain


def test_an_untrained_memory_recalls_a_window_of_5000_steps():
    task = build(small(order=100, theta=5000, cutoff=10.0), 0)
    figures = task.metrics(task.total(task.model, task.test))
    assert figures["mse_settled"] < figures["mse"] < 1e-6


def test_a_stream_of_signals_is_fixed_and_streams_differ():
    task, again = build(small(), 0), build(small(), 0)
    first = [examples.take(torch.arange(2))[0] for examples in (task.train, task.validation, task.test)]
    assert all(
        torch.equal(wave, examples.take(torch.arange(2))[0])
        for wave, examples in zip(first, (again.train, again.validation, again.test), strict=True)
    )
    assert len({wave[row, 5].item() for wave in first for row in range(2)}) == 6
    assert not torch.equal(first[0], build(small(), 1).train.take(torch.arange(2))[0])


def test_only_the_read_out_could_be_trained():
    layer = network(Config().model, np.linspace(0, 100_000, 5).astype(int))
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == 500


def test_the_command_trains_only_with_a_learning_rate(tmp_path):
    before = read_out_of(build(small(), 0))
    assert main(["train", "capacity", *SMALL, "--run-dir", str(tmp_path / "a")]) == 0
    assert torch.equal(read_out_of(open_checkpoint(tmp_path / "a/seed-0/best.ckpt")[0]), before)
    assert (tmp_path / "a/seed-0/recall.png").exists()
    words = [*SMALL, "--training.learning_rate", "1e-3", "--training.updates_per_epoch", "3"]
    assert main(["train", "capacity", *words, "--run-dir", str(tmp_path / "b")]) == 0
    assert not torch.equal(read_out_of(open_checkpoint(tmp_path / "b/seed-0/best.ckpt")[0]), before)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"windows": 1.5}, "expected --data.windows above 1.5"),
        ({"cutoff": 0.1}, "expected --data.cutoff from 0.4"),
        ({"cutoff": 200.0}, "to below 200, two steps a cycle"),
        ({"order": 0}, "expected --model.order to be 1 or more, got 0"),
        ({"test_signals": 0}, "expected --data.test_signals to be 1 or more, got 0"),
    ],
)
def test_what_cannot_be_recalled_is_refused_in_words(fields, message):
    with pytest.raises(ExperimentError, match=message):
        build(small(**fields), 0)


def test_a_signal_in_double_precision_is_recalled_in_it(tmp_path):
    assert main(["train", "capacity", *SMALL, "--precision", "64-true", "--run-dir", str(tmp_path / "run")]) == 0
    outcome = json.loads((tmp_path / "run/seed-0/result.json").read_text())
    task = build(small(), 0)
    exact = task.metrics(task.total(task.model.double(), task.test))
    assert outcome["test"]["mse_settled"] == pytest.approx(exact["mse_settled"], rel=1e-9)
