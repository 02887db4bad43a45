import json
import math
from typing import Any, cast

import numpy as np
import pytest
import torch

import bounds
from legato_papers.cli import main
from legato_papers.recipes.copy_memory import Config, Copier, Copying, Model, build, copy_memory, memoryless

SMALL = (  # noqa: SIM905 - as one types it
    "--model.clock_units 12 --model.units 16 --model.head_units 16 --length 12 --training.first_length 4"
).split()


def small(length=12, kind: Any = "gilr-lstm"):
    config = Config(length, Model(clock_units=6, units=8, head_units=8), Copying(first_length=None))
    config.model.kind = kind
    return config


class Knows(torch.nn.Module):
    """Knows when to speak, and what: the symbols, or that all are equally likely."""

    def __init__(self, remembers: bool):
        super().__init__()
        self.remembers, self.unused = remembers, torch.nn.Parameter(torch.zeros(1))

    def forward(self, tokens):
        scores = torch.full((*tokens.shape, 9), -100.0)
        scores[:, :-10, 8] = 100.0
        if self.remembers:
            scores[:, -10:].scatter_(2, tokens[:, :10, None], 100.0)
        else:
            scores[:, -10:, :8] = 0.0
        return scores


def test_the_symbols_come_again_after_the_delimiter():
    for length in (1, 2, 7):
        tokens, targets = copy_memory(np.random.default_rng(0), length)
        assert len(tokens) == len(targets) == length + 20
        assert tokens[:10].max() < 8
        assert tokens[10 : 10 + length - 1].tolist() == [8] * (length - 1)
        assert tokens[10 + length - 1] == 9
        assert tokens[10 + length :].tolist() == [8] * 10
        assert targets[: 10 + length].tolist() == [8] * (10 + length)
        assert targets[10 + length :].tolist() == tokens[:10].tolist()


def test_all_symbols_come_up_at_every_place():
    symbols = np.stack([copy_memory(np.random.default_rng(seed), 1)[0][:10] for seed in range(200)])
    assert all(set(column) == set(range(8)) for column in symbols.T)


def test_a_perfect_memory_is_right_and_none_has_the_entropy():
    task = build(small(), 0)
    assert task.metrics(task.total(Knows(True), task.test)) == {"accuracy": 1, "cross_entropy": 0}
    forgets = task.metrics(task.total(Knows(False), task.test))
    assert forgets["cross_entropy"] == pytest.approx(10 * math.log(8) / 32, rel=1e-6)
    assert task.outcome()["memoryless_cross_entropy"] == memoryless(12) == 10 * math.log(8) / 32
    # A guess of one symbol, 1280 times: 1/8 with a standard deviation of 0.0092.
    assert forgets["accuracy"] == pytest.approx(1 / 8, abs=4 * 0.0092)


@pytest.mark.parametrize("kind", ["gilr-lstm", "lstm"])
def test_segments_change_neither_scores_nor_gradients(kind):
    config = small(40, kind)
    model = cast(Copier, build(config, 0).model).double()
    tokens = torch.from_numpy(np.stack([copy_memory(np.random.default_rng(seed), 40)[0] for seed in range(3)]))

    def run(tokens, segment=60):
        model.segment = segment
        scores = model(tokens)
        return scores, *torch.autograd.grad(scores.square().sum(), list(model.parameters()))

    # Sums over 180 outputs, each of sums through 60 steps.
    bounds.assert_agrees(run(tokens, segment=7), run, tokens, terms=180 * 60)


def test_cells_of_the_store_start_with_long_time_scales():
    model = cast(Copier, build(Config(100, Model(units=3)), 0).model)
    _, forget = model.store.forget_biases()  # type: ignore[union-attr]
    taus = -1 / forget.double().sigmoid().log()
    # 1,000 to 10,000 steps; a float32 bias of size 9 is known to 9 eps.
    assert sorted(taus.tolist()) == pytest.approx([1000, 10**3.5, 10_000], rel=1e-5)


def test_ten_symbols_weigh_as_much_as_all_blanks():
    task = build(small(), 0)
    tokens, targets = task.train.take(torch.arange(2))
    expected = 0.1 * math.log(9) + math.log(9)

    class Equal(Knows):
        def forward(self, tokens):
            return torch.zeros(*tokens.shape, 9)

    assert task.loss(Equal(False), (tokens, targets)).item() == pytest.approx(expected, rel=1e-6)


def test_a_short_training_beats_remembering_nothing(tmp_path):
    words = ["--training.epochs", "10", "--training.good", "0.2"]
    assert main(["train", "copy-memory", *SMALL, *words, "--run-dir", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "seed-0/result.json").read_text())
    assert result["test"]["cross_entropy"] < 0.9 * result["memoryless_cross_entropy"]
    assert result["test"]["accuracy"] > 0.2
    assert result["curriculum"][0]["length"] == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--length 0", "expected --length to be 1 or more, got 0"),
        ("--model.units 0", "expected --model.units to be 1 or more, got 0"),
        ("--training.blank_weight -1", "expected --training.blank_weight to be 0 or more, got -1"),
        ("--model.kind gru", "--model.kind: expected one of"),
    ],
)
def test_what_is_out_of_range_is_refused_in_words(capsys, tmp_path, words, message):
    assert main(["train", "copy-memory", *words.split(), "--run-dir", str(tmp_path / "run")]) in (1, 2)
    assert message in capsys.readouterr().err
