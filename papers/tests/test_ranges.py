"""Every number that a recipe takes has a range, and what is out of it is told in one line."""

import importlib
import math
from dataclasses import fields, is_dataclass
from typing import get_args

import pytest
import torch

import configs
from legato_papers import recipes
from legato_papers.cli import main
from legato_papers.ranges import Range, check, range_of
from legato_papers.task import ExperimentError, Training


def numbers(config, prefix=""):
    """(dotted name, dataclass that has the field, name of the field) of every number in a configuration."""
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from numbers(value, f"{prefix}{field.name}.")
        elif {int, float} & set(parts(field.type)):
            yield f"{prefix}{field.name}", config, field.name


def parts(annotation):
    """The types that a type is made of."""
    inner = get_args(annotation)
    return [part for one in inner for part in parts(one)] if inner else [annotation]


FIELDS = [(recipe, name) for recipe in recipes.names() for name, *_ in numbers(recipes.recipe(recipe).config())]


def set_to(recipe, name, value):
    config = recipes.recipe(recipe).config()
    found = next((owner, field) for at, owner, field in numbers(config) if at == name)
    before = getattr(*found)
    setattr(*found, [value] if isinstance(before, list) else value)
    return config


@pytest.mark.parametrize(("recipe", "name"), FIELDS)
def test_every_number_has_a_range_around_its_default(recipe, name):
    config = recipes.recipe(recipe).config()
    check(config)
    owner, field = next((owner, field) for at, owner, field in numbers(config) if at == name)
    limits = range_of(type(owner), field)
    assert limits is not None
    assert all(map(math.isfinite, (limits.least, limits.most)))


@pytest.mark.bad_input
@pytest.mark.parametrize(("recipe", "name"), FIELDS)
def test_numbers_out_of_range_are_refused(recipe, name):
    *_, owner, field = next(found for found in numbers(recipes.recipe(recipe).config()) if found[0] == name)
    limits = range_of(type(owner), field)
    wrong = [math.nan, math.inf, -math.inf, 10**30, -(10**30), limits.least - 1, limits.most + 1]
    for value in [*wrong, *[limits.least] * limits.above, *[limits.most] * limits.below]:
        with pytest.raises(ExperimentError, match=rf"^expected --{name} to be .*, got {value}$".replace("+", r"\+")):
            check(set_to(recipe, name, value))


@pytest.mark.bad_input
def test_options_that_never_end_or_diverge_are_refused():
    for recipe in recipes.names():
        for name, value in (("epochs", 0), ("epochs", -1), ("batch_size", 0), ("average", 1.0), ("warmup", 1.1)):
            with pytest.raises(ExperimentError, match=f"expected --training.{name} to be"):
                check(set_to(recipe, f"training.{name}", value))


@pytest.mark.parametrize(
    ("recipe", "preset"), [(name, preset) for name in recipes.names() for preset in recipes.recipe(name).presets]
)
def test_presets_are_in_range_and_differ_from_the_defaults(recipe, preset):
    which = recipes.recipe(recipe)
    module = importlib.import_module(which.build.__module__)
    config = configs.preset(module, preset)
    check(config)
    assert config != which.config()
    assert which.presets[preset].description


def test_a_subclass_keeps_the_range_and_may_narrow_it():
    adding = type(recipes.recipe("adding").config().training)
    assert range_of(adding, "epochs") == range_of(adding.__mro__[-2], "epochs") == Range(1, 10**6)
    assert range_of(adding, "first_length") == Range(2, 10**9)
    assert range_of(adding, "schedule") is None


SMALL = (  # noqa: SIM905 - as one types it
    "--data.train_series 2 --data.validation_series 1 --data.test_series 2 --data.steps 120 --training.epochs 1 "
    "--training.updates_per_epoch 2 --training.crop 24 --training.lead_in 8 --training.batch_size 6 "
    "--model.order 6 --model.theta 20 --model.units 8 --model.head_units 4"
).split()


@pytest.mark.parametrize(
    ("option", "status", "message"),
    [
        ("--training.batch_size 0", 1, "expected --training.batch_size to be 1 or more, got 0"),
        ("--training.epochs -3", 1, "expected --training.epochs to be 1 or more, got -3"),
        ("--training.epochs 1000000000000", 1, "expected --training.epochs to be 1,000,000 or less"),
        ("--training.learning_rate 0", 1, "expected --training.learning_rate to be above 0, got 0"),
        ("--training.learning_rate .nan", 1, "expected --training.learning_rate to be above 0, got nan"),
        ("--training.average 1", 1, "expected --training.average to be below 1, got 1"),
        ("--training.warmup 2", 1, "expected --training.warmup to be 1 or less, got 2"),
        ("--training.max_norm 0", 1, "expected --training.max_norm to be above 0, got 0"),
        ("--training.crop 121", 1, "to be 120 steps or less together, as --data.steps, got 8 and 121"),
        ("--precision garbage", 2, "--precision: expected one of '32-true', 'bf16-mixed', '16-mixed', '64-true'"),
        ("--accelerator gup", 2, "--accelerator: expected one of 'auto', 'cpu'"),
        ("--accelerator tpu", 1, "cannot train with --accelerator tpu --devices 1 --precision 32-true"),
        ("--devices 0", 1, "expected --devices to be 1 or more, got 0"),
        ("--devices -1", 1, "expected --devices to be 1 or more, got -1"),
        ("--seeds 0", 1, "expected --seeds to be a number from 1 to 10,000, or several seeds, got 0"),
        ("--seeds 1 -1", 1, "expected --seeds to be 0 or more, got -1"),
        ("--seed -1", 1, "expected --seed to be 0 or more, got -1"),
        ("--seed 18446744073709551616", 1, "expected --seed to be 4,294,967,295 or less"),
    ],
)
def test_options_out_of_range_end_in_one_line(capsys, tmp_path, option, status, message):
    found = main(["train", "mackey-glass", *SMALL, *option.split(), "--run-dir", str(tmp_path / "run")])
    captured = capsys.readouterr()
    assert (found, captured.err.count("\n")) == (status, 1)
    assert captured.err.startswith("legato-papers: error: ")
    assert message in captured.err
    assert "is finished" not in captured.out


def test_what_does_not_fit_in_memory_is_told(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(recipes.mackey_glass, "network", lambda config: torch.empty(2**60))
    assert main(["train", "mackey-glass", *SMALL, "--run-dir", str(tmp_path / "run")]) == 1
    err = capsys.readouterr().err
    assert err.startswith("legato-papers: error: mackey-glass does not fit in memory: ")
    assert err.count("\n") == 1


def test_a_failed_start_leaves_no_folder(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "mackey-glass", *SMALL, "--training.crop", "121"]) == 1
    assert list(tmp_path.rglob("*-*-*-*")) == []


def test_a_validation_figure_that_is_not_finite_stops_the_run(tmp_path):
    from legato_papers.training import Device, fit
    from test_training import Noisy

    task = Noisy()
    task.metrics = lambda totals: {"error": math.nan}
    training = Training(epochs=1, batch_size=8)
    with pytest.raises(ExperimentError, match="the validation error is nan in epoch 0"):
        fit(task, training, 0, tmp_path, Device("cpu", 1, "32-true"), {})
