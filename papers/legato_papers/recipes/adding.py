"""Adding: the sum of two marked numbers among 10,000, given at the end (Hochreiter & Schmidhuber 1997).

Every step has a number, uniform from 0 to 1, and a marker, which is one at a step of the first half and one of the
second. Whoever remembers nothing does best to say 1, with a mean squared error of 1/6. Solved is an error below 1e-3;
training stops at half of that in validation, so that the test is not at the border.
"""

import itertools
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, cast

import numpy as np
import torch
from torch import nn

from legato._shapes import Float, Tensor
from legato.layers.base import RecurrentLayer
from legato.layers.gilr import GILRLSTM
from legato.layers.segments import in_segments
from legato.layers.stack import Stack
from legato.layers.time_scales import spread_time_scales

from ..baselines import LSTM
from ..curriculum import GrowingByValidation, ValidatedCurriculum, refuse_what_does_not_fit
from ..data.drawn import drawn
from ..ranges import Depth, Factor, Range, Width, check
from ..task import Batch, Paper, Reported
from .long_dependency import segment_steps

PAPER = Paper(
    metric="mse",
    reported=Reported(0.1667, "remembering nothing: 1/6, the variance of a sum of two", verified=True),
    parameters="0",
    digits=5,
)


@dataclass
class Model:
    """The network: recurrent layers, one number read from the last output.

    Args:
        kind: gilr-lstm, or lstm (PyTorch's, sequential).
        units: of each layer.
        layers: recurrent layers.
        longest: longest time scale of a cell at first, in steps, the shortest is a hundredth; null is ten times the
            length. Input gates start as open as forget gates are shut, so that cells start as running means.
        marker_scale: factor on the marker's weights in the input gates at first: one step of 10,000 must be heard.
    """

    kind: Literal["gilr-lstm", "lstm"] = "gilr-lstm"
    units: Width = 32
    layers: Depth = 1
    longest: Annotated[float, Range(100, 10**9)] | None = None
    marker_scale: Factor = 30.0


@dataclass
class Adding(ValidatedCurriculum):
    """Trained at 300 steps, then 1,800, then 10,000.

    Args:
        good: validation error at which a shorter length is left for the next.
        solved: validation error at the full length at which training ends.
    """

    epochs: int = 50
    updates_per_epoch: int | None = 20
    learning_rate: float = 0.01
    schedule: Literal["one-cycle", "linear", "constant"] = "linear"
    warmup: float = 0.0
    max_norm: float | None = 1.0
    average: float = 0.9
    batch_size: int = 8
    first_length: Annotated[int, Range(2, 10**9)] | None = 300
    good: Factor = 1e-3
    solved: Factor = 5e-4


@dataclass
class Config:
    """Adding: the sum of two marked numbers in a sequence, given at the end.

    Args:
        length: steps of the sequences.
    """

    length: Annotated[int, Range(2, 10**9)] = 10_000
    model: Model = field(default_factory=Model)
    training: Adding = field(default_factory=Adding)


def build(config: Config, seed: int, data_dir: Path | None = None) -> "AddingTask":
    """The task of this configuration, its weights drawn by ``seed``; sequences are generated, not read."""
    check(config)
    torch.manual_seed(seed)
    return AddingTask(config, seed)


class AddingTask(GrowingByValidation):
    metric, higher_is_better = "mse", False

    def __init__(self, config: Config, seed: int) -> None:
        super().__init__(config.length, config.training)
        self.config = config
        refuse_what_does_not_fit(config.length, partial(needed_bytes, config))
        self.model = Adder(config)
        self.train = drawn(self._now, "train", seed, self.batch_size, self.batch_size)
        self.validation = drawn(self._now, "validation", 0, 64, 16)
        self.test = drawn(lambda random: adding(random, self.full_length), "test", 0, 256, 16)

    def _now(self, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return adding(random, self.length)

    def is_good(self, figures: dict[str, float], *, at_the_end: bool) -> bool:
        training = self.config.training
        return figures["mse"] < (training.solved if at_the_end else training.good)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        sequences, sums = batch
        return (model(sequences) - sums).square().mean()

    def totals(self, model: nn.Module, batch: Batch) -> Tensor:
        sequences, sums = batch
        errors = (model(sequences) - sums).double().square()
        return torch.stack([errors.sum(), errors.new_tensor(len(sums))])

    def metrics(self, totals: Tensor) -> dict[str, float]:
        squares, count = totals.tolist()
        return {"mse": squares / count}


def adding(random: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
    """x (length, 2): numbers from 0 to 1, and a marker of one in either half; the sum of the two marked, (1,)."""
    sequence = np.zeros((length, 2), dtype=np.float32)
    sequence[:, 0] = random.random(length, dtype=np.float32)
    marked = [random.integers(length // 2), random.integers(length // 2, length)]
    sequence[marked, 1] = 1
    return sequence, sequence[marked, 0].sum(keepdims=True)


def needed_bytes(config: Config, length: int) -> int:
    """What training holds at the most: two batches of two numbers a step; of PyTorch's LSTM eight a unit too."""
    kept = 8 * config.model.units * config.model.layers if config.model.kind == "lstm" else 0
    return max(16, config.training.batch_size) * length * 4 * (2 * 2 + kept)


class Adder(nn.Module):
    """sum = w . h_T + b, h the outputs of the recurrent layers."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        model, training = config.model, config.training
        kinds = {"gilr-lstm": GILRLSTM, "lstm": LSTM}
        sizes = [2] + [model.units] * model.layers
        layers = [kinds[model.kind](*pair) for pair in itertools.pairwise(sizes)]
        self.stack = Stack(*layers)
        self.head = nn.Linear(model.units, 1)
        self.segment = training.segment or segment_steps(training.batch_size, model.units)
        longest = model.longest or 10.0 * config.length
        first, *_ = [running_means(layer, longest / 100, longest) for layer in layers]
        first[:, 1] *= model.marker_scale

    def forward(self, x: Float[Tensor, "B T 2"]) -> Float[Tensor, "B 1"]:
        """The sum for each sequence."""
        last, _ = in_segments(self.stack, x, self.stack.initial_state(len(x)), steps=self.segment, last_only=True)
        return self.head(last)


def running_means(layer: RecurrentLayer, shortest: float, longest: float) -> Tensor:
    """Biases with which the cells are running means over shortest to longest steps: b_i = -b_f. Returns V_i.

    Of a ``GILRLSTM`` the surrogate, which is such a mean already, has time scales from one step to longest.

    Source: Tallec & Ollivier 2018, "Can recurrent neural networks warp time?" (chrono initialisation).
    """
    if isinstance(layer, GILRLSTM):
        surrogate, forget = layer.forget_biases()
        spread_time_scales(surrogate, 1.0, longest, shuffle=True)
        write, weight = layer.bias.detach().chunk(6)[3], layer.weight.detach().chunk(6)[3]
    else:
        lstm = cast(LSTM, layer).lstm
        write, forget = cast(Tensor, lstm.bias_ih_l0).detach().chunk(4)[:2]
        weight = cast(Tensor, lstm.weight_ih_l0).detach().chunk(4)[0]
    write.copy_(-spread_time_scales(forget, shortest, longest))
    return weight
