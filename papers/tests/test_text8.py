"""The recipe text8: sizes that can be compared, whole runs on a short text, and what it says about its data."""

import copy
import json
import math

import numpy as np
import pytest
import torch

import bounds
import configs
from legato_papers.data.text8 import Text8
from legato_papers.kinds import KINDS
from legato_papers.recipes import recipe, text8
from legato_papers.run import Options, evaluate, train

WORDS = ["river", "stone", "lamp", "the", "of", "a", "green", "moss"]


def letters(count, seed):
    """Words of our own: what follows a letter can be learned in part."""
    text = " ".join(np.random.default_rng(seed).choice(WORDS, count))[:count]
    return np.array([0 if c == " " else ord(c) - 96 for c in text], np.uint8)


@pytest.fixture(autouse=True)
def short_text(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    text = Text8(letters(20_000, 0), letters(3000, 1), letters(3000, 2), "wiki100m")
    monkeypatch.setattr(text8, "text8", lambda data_dir=None: text)


def smoke(**fields):
    return configs.preset(text8, "smoke", **fields)


def run(config, precision="32-true", **options):
    chosen = {"seeds": [], "seed": 0, "run_dir": None, "resume": False, "overwrite": False, "data_dir": None}
    chosen |= {"accelerator": "cpu", "devices": 1, "precision": precision}
    return train(recipe("text8"), config, Options(**(chosen | options)))[0]


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_every_kind_has_as_many_parameters_as_the_lstm():
    sizes = {kind: count(text8.network(text8.Model(kind=kind))) for kind in KINDS}
    assert all(abs(size / sizes["lstm"] - 1) < 0.02 for size in sizes.values()), sizes


def test_an_lmu_learns_at_half_the_rate():
    tasks = {kind: text8.build(smoke(model__kind=kind), 0) for kind in ("lmu", "lstm")}
    assert {kind: task.rate("output.weight") for kind, task in tasks.items()} == {"lmu": 0.5, "lstm": 1}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_streams_what_it_computes_at_once(kind):
    model = text8.build(smoke(model__kind=kind), 0).model.eval()
    tokens = torch.randint(27, (2, 40))
    state, log_p = model.initial_state(2), []
    for token in tokens.unbind(1):
        now, state = model.step(token, state)
        log_p.append(now)
    wide = copy.deepcopy(model).double()
    # Sums over the channels of a step, at most 64, and through 40 steps.
    bounds.assert_agrees(torch.stack(log_p, 1), lambda tokens: wide(tokens)[0], tokens, terms=64 * 40)


def test_a_run_is_tested_evaluated_again_and_writes_a_sample(tmp_path):
    result = run(smoke(), run_dir=tmp_path / "run")
    assert result["data"] == "wiki100m"
    assert result["test"].keys() == {"bits_per_character"}
    assert result["tokens_per_second"] > 0
    again = evaluate(tmp_path / "run")[0]
    assert again["test"] == result["test"]
    assert again["data"] == "wiki100m"
    sample = (tmp_path / "run" / "seed-0" / "sample.txt").read_text()
    assert len(sample) == 501
    assert set(sample.strip("\n")) <= set(" abcdefghijklmnopqrstuvwxyz")
    assert json.loads((tmp_path / "run" / "seed-0" / "result.json").read_text())["recipe"] == "text8"


def test_training_finds_the_words():
    longer = {"training__epochs": 4, "training__updates_per_epoch": 40, "training__learning_rate": 0.01}
    result = run(smoke(data__examples=None, **longer))
    # A word is one of eight, and its letters follow but for a few: 3 bits a word of 5.1 characters on average.
    assert result["test"]["bits_per_character"] < 1.5


def test_the_test_text_follows_the_validation_text():
    task = text8.build(smoke(data__validation_characters=1000), 0)
    assert task.validation.tokens == 1000
    assert task.test.tokens == 3000
    tokens, targets, counted = task.test.take(torch.arange(1))
    assert tokens[0, : counted[0].int().argmax() + 1].tolist() == letters(3000, 1)[-51:].tolist()
    assert targets[0][counted[0]].tolist() == letters(3000, 2)[:750].tolist()


def test_a_network_that_knows_nothing_needs_the_logarithm_of_27():
    task = text8.build(smoke(), 0)
    torch.nn.init.zeros_(task.model.output.weight)
    task.model.eval()
    assert task.metrics(task.total(task.model, task.test))["bits_per_character"] == pytest.approx(math.log2(27))


def test_the_size_for_a_gpu_runs_in_mixed_precision():
    large = configs.preset(text8, "large")
    assert count(text8.network(large.model)) == pytest.approx(18.7e6, rel=0.01)
    result = run(configs.preset(text8, "large", "smoke"), precision="bf16-mixed")
    assert result["config"]["model"]["blocks"] == 5
    assert 3 < result["test"]["bits_per_character"] < 6


def test_numbers_are_written_as_letters():
    assert text8.as_text(torch.tensor([0, 1, 26, 0])) == " az "
