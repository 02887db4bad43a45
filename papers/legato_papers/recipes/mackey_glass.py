"""Mackey-Glass: predict a chaotic series 15 steps ahead (Chilkuri & Eliasmith 2021, table 2).

Two figures over the same points, all of the test series. ``nrmse``: the network has seen the 100 points before each
series, which the protocol drops; it chooses the weights. ``nrmse_from_zero``: it has not, as in the paper. That one
cannot fall below about 0.015 for any network: the first value alone says next to nothing about the value 15 steps on,
an error of 1 in one step of 5,000.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, cast

import torch
from torch import nn

from legato._shapes import Tensor
from legato.layers.lmu import LMU
from legato.layers.recurrent_lmu import RecurrentLMU
from legato.layers.stack import Stack
from legato.models import SequenceRegressor

from ..baselines import LSTM
from ..data.mackey_glass import Series, mackey_glass
from ..plots import draw_prediction
from ..ranges import Count, CountOrZero, Depth, Factor, Order, Range, Width, WidthOrZero, Window
from ..task import Batch, Examples, ExperimentError, Paper, Reported, Task, Training

PAPER = Paper(
    metric="nrmse_from_zero",
    reported=Reported(0.044, "Chilkuri & Eliasmith 2021, table 2", verified=False),
    parameters="18k",
    baselines={
        name: Reported(value, "Chilkuri & Eliasmith 2021, table 2", verified=True)
        for name, value in {"LSTM": 0.059, "LMU 2019": 0.049, "LMU-LSTM hybrid": 0.045}.items()
    },
    kinds={"lstm": "LSTM", "recurrent-lmu": "LMU 2019", "hybrid": "LMU-LSTM hybrid"},
    labels={"nrmse": "parallel LMU, here, after 100 points", "nrmse_from_zero": "parallel LMU, here"},
)


@dataclass
class Data:
    """The series. Its random numbers do not depend on the seed of a run.

    Args:
        train_series: series to train on.
        validation_series: series that choose the best weights.
        test_series: series for the final figure.
        steps: length of a series.
        ahead: steps between an input and its target.
        tau: delay of the equation; chaotic from about 17.
    """

    train_series: Width = 32
    validation_series: Width = 32
    test_series: Width = 64
    steps: Annotated[int, Range(1, 10**6)] = 5000
    ahead: Annotated[int, Range(0, 10**6)] = 15
    tau: Annotated[int, Range(1, 10**4)] = 17


@dataclass
class Model:
    """The network: recurrent layer, hidden units, one output.

    Args:
        kind: lmu (parallel, 2021), recurrent-lmu (2019), lstm, or hybrid (recurrent LMU and LSTM alternating, 2019).
        units: of the recurrent layers; null is the size that gives each kind about 18,000 parameters.
        order: of the memory; null is 40 for lmu and 4 in the stacks of the others.
        theta: window of the memory, in steps; null is 50 for lmu and 4 in the stacks of the others.
        layers: recurrent layers; null is 1 for lmu and 4 for the others.
        head_units: tanh units between the recurrent layers and the output; null is 80 for lmu, else 0, which is none.
        calibrate: divide each order of the memory by its standard deviation on the training data.
    """

    kind: Literal["lmu", "recurrent-lmu", "lstm", "hybrid"] = "lmu"
    units: Width | None = None
    order: Order | None = None
    theta: Window | None = None
    layers: Depth | None = None
    head_units: WidthOrZero | None = None
    calibrate: bool = True


@dataclass
class Crops(Training):
    """Trained on windows of the series, cut at random places.

    Args:
        crop: steps of a training example that count in full.
        lead_in: steps before them, from a zero state.
        lead_in_weight: how much a step of the lead-in counts.
    """

    epochs: int = 40
    updates_per_epoch: int | None = 250
    batch_size: int = 16
    learning_rate: float = 0.01
    crop: Count = 256
    lead_in: CountOrZero = 50
    lead_in_weight: Factor = 0.3


@dataclass
class Config:
    """Mackey-Glass: predict a chaotic series 15 steps ahead."""

    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    training: Crops = field(default_factory=Crops)


def build(config: Config, seed: int, data_dir: Path | None = None) -> "MackeyGlass":
    """The task of this configuration, its weights drawn by ``seed``; the series are generated, not read."""
    data = config.data
    series = mackey_glass(
        data.train_series + data.validation_series + data.test_series, data.steps, ahead=data.ahead, tau=data.tau
    )
    torch.manual_seed(seed)
    return MackeyGlass(config, series)


class MackeyGlass(Task):
    metric, higher_is_better = "nrmse", False

    def __init__(self, config: Config, series: Series):
        sizes = [config.data.train_series, config.data.validation_series, config.data.test_series]
        train, validation, test = (
            Series(*waves) for waves in zip(*(wave.split(sizes) for wave in series), strict=True)
        )
        if config.training.lead_in + config.training.crop > config.data.steps:
            raise ExperimentError(
                f"expected --training.lead_in and --training.crop to be {config.data.steps} steps or less together, as "
                f"--data.steps, got {config.training.lead_in} and {config.training.crop}"
            )
        self.model = network(config.model)
        if config.model.calibrate and config.model.kind == "lmu":
            cast(LMU, self.model.layer).calibrate(train.inputs)
        lead_in = config.training.lead_in
        self.ahead = config.data.ahead
        self.weights = torch.ones(lead_in + config.training.crop, 1)
        self.weights[:lead_in] = config.training.lead_in_weight
        self.train = crops(train, lead_in + config.training.crop, config.training.batch_size)
        self.validation, self.test = whole(validation), whole(test)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        inputs, targets = batch
        weights = self.weights.to(inputs.device)
        return ((model(inputs)[0] - targets).square() * weights).sum() / (weights.sum() * len(inputs))

    def totals(self, model: nn.Module, batch: Batch) -> Tensor:
        inputs, targets, warm_up = batch
        from_zero, _ = model(inputs)
        warm, _ = model(inputs, model(warm_up)[1])
        errors = (warm - targets, from_zero - targets, targets)
        return torch.stack([error.double().square().sum() for error in errors])

    def plot(self, model: nn.Module, folder: Path) -> None:
        inputs, targets, warm_up = self.test.take(torch.arange(1))
        with torch.no_grad():
            state = model(warm_up)[1]
        draw_prediction(model, inputs, targets, state, self.ahead, folder / "prediction.png")

    def metrics(self, totals: Tensor) -> dict[str, float]:
        warm, from_zero, power = totals.tolist()
        return {"nrmse": (warm / power) ** 0.5, "nrmse_from_zero": (from_zero / power) ** 0.5}


def crops(series: Series, steps: int, batch_size: int) -> Examples:
    """Every window of ``steps`` steps, at every offset of every series."""
    count, offsets = series.inputs.shape[0], series.inputs.shape[1] - steps + 1
    inputs, targets = (wave.unfold(1, steps, 1)[:, :, 0] for wave in series[:2])  # (series, offsets, steps), views

    def take(indices: Tensor) -> Batch:
        row, offset = indices // offsets, indices % offsets
        return inputs[row, offset].unsqueeze(-1), targets[row, offset].unsqueeze(-1)

    return Examples(count * offsets, batch_size, take)


def whole(series: Series) -> Examples:
    """Whole series, from a zero state."""
    return Examples(len(series.inputs), 16, lambda indices: tuple(wave[indices] for wave in series))


def network(config: Model) -> SequenceRegressor:
    """The network of one kind, about 18,000 parameters with the defaults."""
    if config.kind == "lmu":
        units, order, theta, layers, head_units = 140, 40, 50.0, 1, 80
    else:
        units, order, theta, layers, head_units = (
            {"lstm": 25, "recurrent-lmu": 49, "hybrid": 40}[config.kind],
            4,
            4.0,
            4,
            0,
        )
    units, order = config.units or units, config.order or order
    theta, layers = config.theta or theta, config.layers or layers
    head_units = head_units if config.head_units is None else config.head_units
    stack, size = [], 1
    for number in range(layers):
        if config.kind == "lmu":
            layer, new = LMU(size, units, order=order, theta=theta, activation="tanh"), units
        elif config.kind == "lstm" or (config.kind == "hybrid" and number % 2):
            new = units if config.kind == "lstm" else round(units * 5 / 8)
            layer = LSTM(size, new)
        else:
            layer, new = RecurrentLMU(size, units, order=order, theta=theta), units
        stack.append(layer)
        size = new
    head = nn.Linear(size, 1)
    if head_units:
        head = nn.Sequential(nn.Linear(size, head_units), nn.Tanh(), nn.Linear(head_units, 1))
    return SequenceRegressor(stack[0] if layers == 1 else Stack(*stack), head)
