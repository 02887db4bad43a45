"""What an experiment is: a model, examples in memory, a loss and a metric. Next: ``training.py`` trains it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import nn

from legato._shapes import Int, Tensor

from .errors import ExperimentError as ExperimentError
from .ranges import Fraction, FractionBelowOne, Positive, Range

Batch = tuple[Tensor, ...]
#: Where and in which arithmetic a network is trained, in Lightning's words.
Accelerator = Literal["auto", "cpu", "gpu", "cuda", "mps", "tpu"]
Precision = Literal["32-true", "bf16-mixed", "16-mixed", "64-true"]


@dataclass
class Training:
    """How a network is trained. Batch sizes are totals over all devices.

    Args:
        epochs: the network is validated and a checkpoint is kept after each.
        updates_per_epoch: updates of the weights in an epoch; null is one pass over the training data.
        batch_size: examples in an update.
        learning_rate: the peak of the schedule.
        schedule: one-cycle (a rise over ``warmup``, then half a cosine to zero), linear (a straight line) or constant.
        warmup: share of all updates in which the learning rate rises.
        weight_decay: of AdamW, on matrices only.
        epsilon: of AdamW. A weight whose gradients are smaller than this moves in proportion to them, hence a rare
            word's vector less than a frequent one's; with 1e-8 all move alike.
        max_norm: gradients longer than this are cut to it; null leaves them.
        average: decay of the running mean of the weights that is validated and tested; 0 uses the weights themselves.
    """

    epochs: Annotated[int, Range(1, 10**6)] = 20
    updates_per_epoch: Annotated[int, Range(1, 10**7)] | None = None
    batch_size: Annotated[int, Range(1, 10**6)] = 100
    learning_rate: Annotated[float, Range(0, 1000, above=True)] = 1e-3
    schedule: Literal["one-cycle", "linear", "constant"] = "one-cycle"
    warmup: Fraction = 0.3
    weight_decay: Annotated[float, Range(0, 1000)] = 0.0
    epsilon: Annotated[float, Range(0, 1, above=True)] = 1e-8
    max_norm: Positive | None = None
    average: FractionBelowOne = 0.0


@dataclass(frozen=True)
class Preset:
    """Another size of a recipe, chosen by ``--preset``.

    Args:
        description: of the size, for ``--help``.
        fields: values that differ from the defaults of ``Config``, by dotted name such as ``training.epochs``.
    """

    description: str
    fields: dict[str, Any]


@dataclass(frozen=True)
class Reported:
    """A value that a paper reports.

    Args:
        value: as printed there, in the unit of ``Paper.unit``.
        source: paper and table.
        verified: the value has been compared with its source. An unverified one is marked as such wherever it is
            printed, and is never a target.
    """

    value: float
    source: str
    verified: bool


@dataclass
class Paper:
    """What a paper reports for an experiment, and how our results are printed beside it.

    Args:
        metric: the metric of ours that is comparable.
        reported: the paper's value of it.
        parameters: of the paper's network.
        unit: printed behind every value.
        scale: factor from our value to the printed one, such as 100 for percent.
        digits: decimals of the printed value.
        data: data set of the paper's value, as ``Task.source`` names it. Results on other data are not compared with
            it. Empty where the task needs no data set.
        baselines: values of other networks, by the name of the network.
        kinds: the baseline with which a network of that ``model.kind`` is compared; "" is ``reported``, with which the
            default kind of a recipe is always compared.
        labels: names of our metrics in the table of the demonstration.
    """

    metric: str
    reported: Reported
    parameters: str
    unit: str = ""
    scale: float = 1.0
    digits: int = 4
    data: str = ""
    baselines: dict[str, Reported] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)


@dataclass
class Examples:
    """Examples that lie in memory: ``take(indices)`` is the batch of these examples."""

    size: int
    batch_size: int
    take: Callable[[Int[Tensor, " B"]], Batch]

    def in_order(self) -> Iterator[Tensor]:
        """The indices of every batch, each example once; the last batch may be smaller."""
        yield from torch.arange(self.size).split(self.batch_size)

    def shuffled(self, seed: int, epoch: int, updates: int) -> Iterator[Tensor]:
        """The indices of ``updates`` batches: a pure function of seed and epoch, so resumed runs see the same."""
        generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
        batches: list[Tensor] = []
        for _ in range(updates):
            if not batches:
                order = torch.randperm(self.size, generator=generator)
                batches = list(order[: self.updates_per_pass * self.batch_size].split(self.batch_size))
            yield batches.pop()

    @property
    def updates_per_pass(self) -> int:
        """Full batches in one pass over the data; what is left over is not used in this pass."""
        return max(1, self.size // self.batch_size)


class Task(ABC):
    """One experiment, ready to be trained. A recipe's ``build`` returns it.

    Attributes:
        model: the network, with the weights of its seed.
        train, validation, test: the examples.
        metric: name of the figure that chooses the best weights.
        higher_is_better: of that figure.
        source: the data set in use, by the name that its figures are reported under; empty where there is none.
        keeps_last: the weights after the last epoch are tested, not those with the best figure: right where an epoch's
            figure is about an easier problem than the last one's.
    """

    model: nn.Module
    train: Examples
    validation: Examples
    test: Examples
    metric: str
    higher_is_better: bool
    source: str = ""
    keeps_last: bool = False

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The number to make small, averaged over the batch."""

    @abstractmethod
    def totals(self, model: nn.Module, batch: Batch) -> Tensor:
        """Sums over the batch, one vector; they are added over all batches and devices."""

    @abstractmethod
    def metrics(self, totals: Tensor) -> dict[str, float]:
        """The figures, by name, that follow from the sums."""

    def total(
        self,
        model: nn.Module,
        examples: Examples,
        rank: int = 0,
        world: int = 1,
        convert: Callable[[Batch], Batch] = lambda batch: batch,
    ) -> Tensor:
        """``totals`` added over all batches, of each every world-th example from ``rank`` on, in float64.

        ``convert`` brings a batch into the dtype of the network.
        """
        device = next(model.parameters()).device
        sums: list[Tensor] = []
        with torch.no_grad():
            for indices in examples.in_order():
                batch = tuple(part.to(device) for part in examples.take(indices[rank::world]))
                sums.append(self.totals(model, convert(batch)).double().cpu())
        return torch.stack(sums).sum(0)

    def start(self) -> None:  # noqa: B027 - most networks start as they were drawn
        """Called before the first update of a new run, not when it is resumed or evaluated: read weights to go on from.

        Raises:
            ExperimentError: they are missing or do not fit.
        """

    def rate(self, name: str) -> float:
        """Factor on the learning rate of the parameter of this name in ``model``."""
        return 1.0

    def tokens(self, batch: Batch) -> int:
        """Words or characters that a training batch has, without padding; of other data none."""
        return 0

    def finished(self, figures: dict[str, float]) -> bool:
        """Whether there is nothing left to train for, given the epoch's validation figures; asked after every epoch."""
        return False

    def status(self) -> str:
        """What the line of progress should say beside the figures."""
        return ""

    def state(self) -> dict[str, Any]:
        """What the task itself has learnt in training, such as how far a curriculum has come; kept in checkpoints."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:  # noqa: B027 - most tasks learn nothing of their own
        """Go on from what ``state`` returned."""

    def outcome(self) -> dict[str, Any]:
        """What ``result.json`` should say beside the figures."""
        return {}

    def plot(self, model: nn.Module, folder: Path) -> None:  # noqa: B027 - an experiment may have nothing to draw
        """Draw the trained network's work into files in ``folder``."""
