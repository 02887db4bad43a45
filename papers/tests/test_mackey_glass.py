import copy

import pytest
import torch

import bounds
from legato_papers.data.mackey_glass import mackey_glass
from legato_papers.recipes.mackey_glass import Config, Model, build, network


@pytest.fixture(scope="module")
def series():
    return mackey_glass()


def rms(x):
    return x.double().square().mean().sqrt()


def test_the_series_have_the_published_sizes(series):
    assert series.inputs.shape == series.targets.shape == (128, 5000, 1)
    assert series.warm_up.shape == (128, 100, 1)


def test_targets_are_the_inputs_fifteen_steps_later(series):
    assert torch.equal(series.targets[:, :-15], series.inputs[:, 15:])


def test_the_removed_mean_is_the_published_one():
    # tanh(x - 1) of the first value of the first series, whose random history is fixed, is 0.0029 before the removal.
    raw = torch.tanh(torch.tensor(first_raw_value()) - 1)
    assert float(raw - mackey_glass().warm_up[0, 0, 0]) == pytest.approx(-0.066, abs=5e-4)


def test_copying_the_input_gives_the_published_error(series):
    assert float(rms(series.inputs - series.targets) / rms(series.targets)) == pytest.approx(1.624, abs=1e-3)


def test_a_linear_model_of_60_values_has_the_published_error(series):
    windows = series.inputs[:, :, 0].double().unfold(1, 60, 1)
    targets = series.targets[:, 59:, 0].double()
    train, test = windows[:32].flatten(0, 1), windows[64:].flatten(0, 1)
    weights = torch.linalg.lstsq(train, targets[:32].flatten()[:, None]).solution
    error = (test @ weights)[:, 0] - targets[64:].flatten()
    assert float(rms(error) / rms(targets[64:])) == pytest.approx(0.383, abs=5e-3)


def test_the_series_are_the_same_every_time():
    assert all(torch.equal(a, b) for a, b in zip(mackey_glass(2, 50), mackey_glass(2, 50), strict=True))
    assert not torch.equal(mackey_glass(2, 50).inputs, mackey_glass(2, 50, seed=1).inputs)


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="series, steps and tau must be at least 1"):
        mackey_glass(0)


def test_the_network_has_the_papers_size():
    parameters = sum(p.numel() for p in network(Model()).parameters())
    assert parameters == 17_241 + 2  # the paper leaves out U_x and b_u


@pytest.mark.parametrize("kind", ["lstm", "recurrent-lmu", "hybrid"])
def test_baselines_have_about_18000_parameters_and_stream(kind):
    model = network(Model(kind=kind))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(18_000, rel=0.05)
    x = torch.randn(2, 12, 1)
    state, outputs = model.initial_state(2), []
    for x_t in x.unbind(1):
        y_t, state = model.step(x_t, state)
        outputs.append(y_t)
    # A step sums at most 200 products.
    wide = copy.deepcopy(model).double()
    bounds.assert_agrees(torch.stack(outputs, 1), lambda x: wide(x)[0], x, terms=200 * 12)


def test_every_crop_holds_its_own_targets():
    config = Config()
    config.data.train_series = config.data.validation_series = config.data.test_series = 1
    config.data.steps = 60
    config.training.crop, config.training.lead_in = 20, 5
    task = build(config, seed=0)
    assert task.train.size == 60 - 25 + 1
    inputs, targets = task.train.take(torch.tensor([0, 35]))
    whole = mackey_glass(3, 60)
    assert torch.equal(inputs[0], whole.inputs[0, :25])
    assert torch.equal(targets[1], whole.targets[0, 35:60])


def first_raw_value():
    """The first sample by the definition, one step after another."""
    import numpy as np

    history = list(1.2 + 0.2 * (np.random.RandomState(0).rand(170) - 0.5))
    x = 1.2
    for _ in range(10):
        past = history.pop(0)
        history.append(x)
        x = x + (0.2 * past / (1 + past**10) - 0.1 * x) / 10
    return x
