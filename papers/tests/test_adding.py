import json
from typing import Any, cast

import numpy as np
import pytest
import torch

from legato_papers.cli import main
from legato_papers.curriculum import lengths
from legato_papers.recipes.adding import Adder, Adding, Config, Model, adding, build
from legato_papers.task import ExperimentError

SHORT = (  # noqa: SIM905 - as one types it
    "--length 60 --training.first_length 20 --training.growth 3 --model.units 16 --training.epochs 12 "
    "--training.good 0.05"
).split()


def small(length=60, **training):
    config = Config(length, Model(units=8), Adding(first_length=None))
    for name, value in training.items():
        setattr(config.training, name, value)
    return config


class Perfect(torch.nn.Module):
    """The sum by the definition: the numbers where the marker is one."""

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return (x[..., 0] * x[..., 1]).sum(1, keepdim=True)


class One(Perfect):
    def forward(self, x):
        return torch.ones(len(x), 1)


def test_one_number_is_marked_in_either_half():
    for seed in range(20):
        sequence, total = adding(np.random.default_rng(seed), 7)
        (places,) = sequence[:, 1].nonzero()
        assert sequence.shape == (7, 2)
        assert len(places) == 2
        assert places[0] < 3 <= places[1]
        assert set(sequence[:, 1]) == {0, 1}
        assert total == sequence[places[0], 0] + sequence[places[1], 0]
    assert 0 <= sequence[:, 0].min() <= sequence[:, 0].max() < 1


def test_every_place_is_marked_sometimes():
    marked = np.stack([adding(np.random.default_rng(seed), 6)[0][:, 1] for seed in range(100)])
    assert marked.any(0).all()


def test_a_perfect_adder_has_no_error_and_the_mean_one_sixth():
    task = build(small(), 0)
    assert task.metrics(task.total(Perfect(), task.test))["mse"] == 0
    _, sums = task.test.take(torch.arange(256))
    says_one = task.metrics(task.total(One(), task.test))["mse"]
    assert says_one == pytest.approx((sums.double() - 1).square().mean().item())
    # Squares of a sum of two less one have mean 1/6 and standard deviation sqrt(1/15 - 1/36) = 0.197.
    assert says_one == pytest.approx(1 / 6, abs=4 * 0.197 / 16)


def test_lengths_grow_by_the_factor_up_to_the_last():
    assert lengths(300, 10_000, 6.0) == [300, 1800, 10_000]
    assert lengths(100, 1000, 3) == [100, 300, 900, 1000]
    assert lengths(50, 50, 6.0) == lengths(128, 50, 8.0) == [50]


def test_a_solved_length_leads_to_the_next_of_equal_batch_steps():
    task = build(small(120, first_length=20, growth=2.0, batch_size=3, largest_batch=10), 0)
    seen = []
    for mse in (0.5, 0.0, 0.5, 0.0, 0.0):
        seen.append((task.length, task.train.batch_size, task.train.take(torch.arange(1))[0].shape[1]))
        assert not task.finished({"mse": mse})
    assert seen == [(20, 10, 20), (20, 10, 20), (40, 9, 40), (40, 9, 40), (80, 4, 80)]
    assert not task.finished({"mse": 0.01})  # good enough for no length
    assert task.finished({"mse": 0.0})
    assert task.outcome()["curriculum"][-1] == {"length": 120, "epochs": 7}
    assert task.outcome()["solved"]


@pytest.mark.parametrize("kind", ["gilr-lstm", "lstm"])
def test_cells_start_as_running_means_that_open_for_the_marker(kind):
    config = small()
    config.model.kind, config.model.layers = kind, 2
    model = cast(Adder, build(config, 0).model)
    assert model(torch.rand(3, 60, 2)).shape == (3, 1)
    layer: Any = model.stack.layers[0]
    if kind == "lstm":
        write, forget = layer.lstm.bias_ih_l0.chunk(4)[:2]
        weight = layer.lstm.weight_ih_l0.chunk(4)[0]
    else:
        write, forget, weight = layer.bias.chunk(6)[3], layer.bias.chunk(6)[2], layer.weight.chunk(6)[3]
    assert torch.equal(write, -forget)
    # Time constants from 6 to 600 steps; a float32 bias of size 6 is known to 6 eps.
    taus = -1 / forget.double().sigmoid().log()
    assert taus[[0, -1]].tolist() == pytest.approx([6, 600], rel=1e-5)
    assert weight[:, 1].abs().max() > 10 * weight[:, 0].abs().max()


def test_a_short_training_beats_remembering_nothing(tmp_path):
    assert main(["train", "adding", *SHORT, "--run-dir", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "seed-0/result.json").read_text())
    assert result["test"]["mse"] < 0.1
    assert result["curriculum"][0]["length"] == 20


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--length 1", "expected --length to be 2 or more, got 1"),
        ("--model.units 0", "expected --model.units to be 1 or more, got 0"),
        ("--training.growth 1", "expected --training.growth to be 1.1 or more"),
        ("--training.first_length 1", "expected --training.first_length to be 2 or more"),
    ],
)
def test_sizes_out_of_range_are_refused_in_words(capsys, tmp_path, words, message):
    assert main(["train", "adding", *words.split(), "--run-dir", str(tmp_path / "run")]) == 1
    assert message in capsys.readouterr().err


def test_a_first_length_beyond_the_full_one_is_the_full_one():
    task = build(small(60, first_length=300), 0)
    assert task.lengths == [60]
    with pytest.raises(ExperimentError, match="batch_size"):
        build(small(batch_size=0), 0)
