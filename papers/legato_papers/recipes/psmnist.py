"""psMNIST: a digit from its 784 pixels, read one at a time in a random order (Chilkuri & Eliasmith 2021, Table 1)."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, cast

import torch
import torch.nn.functional as F
from torch import nn

from legato._shapes import Tensor
from legato.layers.lmu import LMU
from legato.models import SequenceClassifier

from ..data.mnist import MNIST, mnist
from ..ranges import Factor, Fraction, FractionBelowOne, Order, Range, Seed, Width, WidthOrZero, Window
from ..task import Batch, Examples, Paper, Reported, Task, Training

PAPER = Paper(
    metric="accuracy",
    reported=Reported(98.49, "Chilkuri & Eliasmith 2021, table 1", verified=True),
    parameters="165k",
    unit=" %",
    scale=100.0,
    digits=2,
    baselines={
        name: Reported(value, "Chilkuri & Eliasmith 2021, table 1", verified=True)
        for name, value in {"LSTM": 89.86, "NRU": 95.38, "LMU 2019": 97.15, "HiPPO-LegS": 98.3}.items()
    },
    labels={"accuracy": "parallel LMU, here"},
)


@dataclass
class Data:
    """The images: 60,000 to train and validate on, 10,000 to test.

    Args:
        permutation_seed: of the order in which the pixels are read, the same for every seed of a run.
        validation_images: the last of the 60,000, which choose the best weights.
    """

    permutation_seed: Seed = 0
    validation_images: Annotated[int, Range(1, 59_999)] = 10_000


@dataclass
class Model:
    """The network: parallel LMU, its last output, ten scores.

    Args:
        order: of the memory.
        theta: window of the memory, in pixels.
        units: ReLU units that read the memory.
        head_units: ReLU units between those and the ten scores; 0 is none, as in the paper.
        memory_dropout: share of the memory dropped in training.
        dropout: share of the units dropped in training.
    """

    order: Order = 468
    theta: Window = 784.0
    units: Width = 346
    head_units: WidthOrZero = 0
    memory_dropout: FractionBelowOne = 0.0
    dropout: FractionBelowOne = 0.0


@dataclass
class Adversarial(Training):
    """Trained on every image twice: as it is, and moved a little in the direction that raises its loss the most.

    Args:
        shift: length of the move, in the Euclidean norm of an image of pixels from 0 to 1; 0 leaves it out.
        shift_weight: share of the moved images in the loss.
        label_smoothing: probability taken from the true digit and spread over all.
    """

    epochs: int = 30
    learning_rate: float = 2e-3
    warmup: float = 0.05
    weight_decay: float = 0.01
    shift: Factor = 0.6
    shift_weight: Fraction = 0.5
    label_smoothing: Fraction = 0.0


@dataclass
class Config:
    """psMNIST: a digit from its 784 pixels, read one at a time in a random order."""

    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    training: Adversarial = field(default_factory=Adversarial)


def build(config: Config, seed: int, data_dir: Path | None = None) -> "PermutedDigits":
    """The task of this configuration, its weights drawn by ``seed``."""
    images = mnist(data_dir)
    torch.manual_seed(seed)
    return PermutedDigits(config, images)


class PermutedDigits(Task):
    metric, higher_is_better = "accuracy", True

    def __init__(self, config: Config, images: MNIST) -> None:
        self.training = config.training
        generator = torch.Generator().manual_seed(config.data.permutation_seed)
        order = torch.randperm(images.train_images[0].numel(), generator=generator)

        def examples(pixels: Tensor, digits: Tensor, batch_size: int) -> Examples:
            sequences = (pixels.flatten(1)[:, order].float() / 255).unsqueeze(-1)  # (images, 784, 1)
            digits = digits.long()
            return Examples(len(digits), batch_size, lambda indices: (sequences[indices], digits[indices]))

        cut = len(images.train_labels) - config.data.validation_images
        self.train = examples(images.train_images[:cut], images.train_labels[:cut], config.training.batch_size)
        self.validation = examples(images.train_images[cut:], images.train_labels[cut:], 1000)
        self.test = examples(images.test_images, images.test_labels, 1000)
        self.model = network(config.model)
        calibrate(cast(LMU, self.model.layer), self.train)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        sequences, digits = batch
        smoothing = self.training.label_smoothing
        if not self.training.shift or not model.training:
            return F.cross_entropy(model(sequences)[0], digits, label_smoothing=smoothing)
        sequences = sequences.requires_grad_()
        clean = F.cross_entropy(model(sequences)[0], digits, label_smoothing=smoothing)
        (uphill,) = torch.autograd.grad(clean, sequences, retain_graph=True)
        moved = sequences.detach() + self.training.shift * F.normalize(uphill, dim=1)
        attacked = F.cross_entropy(model(moved)[0], digits, label_smoothing=smoothing)
        return torch.lerp(clean, attacked, self.training.shift_weight)

    def totals(self, model: nn.Module, batch: Batch) -> Tensor:
        sequences, digits = batch
        right = model(sequences)[0].argmax(dim=1) == digits
        return torch.stack([right.sum(), torch.tensor(len(digits), device=right.device)])

    def metrics(self, totals: Tensor) -> dict[str, float]:
        right, count = totals.tolist()
        return {"accuracy": right / count}


def network(config: Model) -> SequenceClassifier:
    """166,092 parameters with the defaults; He's weights before every ReLU, no biases at first."""
    layer = LMU(
        1,
        config.units,
        order=config.order,
        theta=config.theta,
        activation="relu",
        memory_dropout=config.memory_dropout,
        return_sequences=False,
    )
    head: list[nn.Module] = [nn.Dropout(config.dropout)]
    size = config.units
    if config.head_units:
        head += [nn.Linear(size, config.head_units), nn.ReLU(), nn.Dropout(config.dropout)]
        size = config.head_units
    head.append(nn.Linear(size, 10))
    # W_m and W_x read one vector, the memory and the last pixel; torch would draw each as if it were alone.
    for linear in (layer.memory_to_output, cast(nn.Linear, layer.input_to_output)):
        _draw(linear, config.order + 1, 2.0)
    for linear in head[1:]:
        if isinstance(linear, nn.Linear):
            _draw(linear, linear.in_features, 1.0 if linear is head[-1] else 2.0)
    return SequenceClassifier(layer, nn.Sequential(*head))


@torch.no_grad()
def calibrate(layer: LMU, train: Examples) -> None:
    """Scale each order of the memory to a standard deviation of one after the last pixel, when it is read."""
    finals = [layer(train.take(indices)[0])[1].memory for indices in torch.arange(train.size).split(1000)]
    layer.memory.scale.copy_(1 / torch.cat(finals).std(dim=0))


def _draw(linear: nn.Linear, inputs: int, gain: float) -> None:
    """Uniform weights of variance gain / inputs, and a zero bias."""
    bound = (3 * gain / inputs) ** 0.5
    nn.init.uniform_(linear.weight, -bound, bound)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
