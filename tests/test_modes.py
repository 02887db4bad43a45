"""What runs in evaluation mode leaves every part of a model in the mode in which it was."""

import pytest
import torch
from torch import nn

import draws
from legato._modes import evaluating
from legato.layers import LMU
from legato.models import Embedding, LanguageModel


def modes(model):
    return {name: module.training for name, module in model.named_modules()}


def language_model():
    make = lambda size: LMU(size, size, order=2, theta=4.0)  # noqa: E731
    return LanguageModel(Embedding(27, 8, dropout=0.5), make, num_layers=2, highways=1, dropout=0.5)


tokens = torch.randint(4, 27, (2, 12))
RUNS = {
    "generate": (language_model, lambda model: model.generate(tokens, 3, temperature=0)),
    "calibrate": (language_model, lambda model: model.calibrate(tokens)),
}
every_run = pytest.mark.parametrize(("make", "run"), RUNS.values(), ids=RUNS)


@every_run
@pytest.mark.parametrize("frozen", ["first", "all but the first", "none", "all"])
def test_every_part_keeps_its_mode(make, run, frozen):
    model = make().train(frozen != "all")
    first = next(model.children())
    if frozen != "none":
        first.eval()
    if frozen == "all but the first":
        model.eval()
        first.train()
    before = modes(model)
    run(model)
    assert modes(model) == before


@every_run
def test_every_part_keeps_its_mode_after_an_error(make, run):
    model = make().train()
    part = next(model.children()).eval()
    before = modes(model)
    broken = model.blocks[0]

    def fail(*_):
        raise KeyError("broken")

    broken.register_forward_pre_hook(fail)
    broken.step = fail
    with pytest.raises(KeyError, match="broken"):
        run(model)
    assert modes(model) == before
    assert not part.training


@every_run
def test_nothing_is_dropped_whatever_the_mode(make, run):
    draws.seed(0)
    model = make().train()
    found = run(model)
    expected = run(model.eval())
    if found is not None:
        assert torch.equal(found, expected)


def test_a_module_that_overrides_train_is_told():
    """As adapters do that merge their weights for evaluation."""

    class Merging(nn.Linear):
        merged = False

        def train(self, mode=True):
            self.merged = not mode
            return super().train(mode)

    model = nn.Sequential(Merging(2, 2), nn.Sequential(Merging(2, 2), nn.Dropout()))
    model[1].eval()
    with evaluating(model):
        assert [m.merged for m in model.modules() if isinstance(m, Merging)] == [True, True]
    assert [m.merged for m in model.modules() if isinstance(m, Merging)] == [False, True]
    assert modes(model) == {"": True, "0": True, "1": False, "1.0": False, "1.1": False}


def test_a_part_inside_two_others_keeps_its_mode():
    shared = nn.Dropout()
    model = nn.Sequential(nn.Sequential(shared), nn.Sequential(shared))
    model[1].eval()
    model[0].train()
    before = modes(model)
    with evaluating(model):
        assert not any(modes(model).values())
    assert modes(model) == before
