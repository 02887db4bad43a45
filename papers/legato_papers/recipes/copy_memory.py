"""Copy memory: ten symbols, 10,000 blanks, then the ten symbols again (Arjovsky, Shah & Bengio 2016).

Ten symbols out of eight, T - 1 blanks, a delimiter, ten blanks more: T + 20 steps. To be said: blanks, and in the last
ten steps the symbols in their order. Whoever remembers nothing reaches a cross-entropy of 10 ln 8 / (T + 20) a step,
and guesses one symbol in eight.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from legato._shapes import Float, Int, Tensor
from legato.layers.gilr import GILRLSTM
from legato.layers.segments import in_segments
from legato.layers.time_scales import spread_time_scales

from ..baselines import LSTM
from ..curriculum import GrowingByValidation, ValidatedCurriculum, refuse_what_does_not_fit
from ..data.drawn import drawn
from ..ranges import Count, Factor, Fraction, Range, Width, Window, check
from ..task import Batch, Paper, Reported
from .long_dependency import segment_steps

PAPER = Paper(
    metric="accuracy",
    reported=Reported(0.125, "remembering nothing: one symbol in eight", verified=True),
    parameters="0",
    digits=6,
)
#: Symbols in the sequence to copy, and how many kinds of them.
MEMORISED, KINDS = 10, 8
BLANK, DELIMITER = KINDS, KINDS + 1


@dataclass
class Model:
    """The network: two recurrent layers and a perceptron; what a layer gets, the next gets too.

    Args:
        kind: gilr-lstm, or lstm (PyTorch's, sequential).
        clock_units: of the first layer, which can tell how long ago the last symbol or delimiter was.
        units: of the second layer, which holds the symbols.
        head_units: ReLU units before the scores.
        clock: longest time scale of the first layer, and of all surrogates, at first, in steps.
        longest: longest time scale of the second layer's cells at first, the shortest is a tenth; null is a hundred
            times the length.
    """

    kind: Literal["gilr-lstm", "lstm"] = "gilr-lstm"
    clock_units: Width = 64
    units: Width = 128
    head_units: Width = 128
    clock: Window = 100.0
    longest: Annotated[float, Range(10, 10**9)] | None = None


@dataclass
class Copying(ValidatedCurriculum):
    """Trained at 10 blanks, then at 40, ..., 10,000.

    Args:
        blank_weight: of the mean loss over all other steps, beside that over the last ten.
        good: share of right symbols in validation from which a shorter length is left for the next.
        solved: share of right symbols at the full length at which training ends.
    """

    epochs: int = 250
    updates_per_epoch: int | None = 20
    batch_size: int = 4
    largest_batch: int = 64
    learning_rate: float = 0.01
    schedule: Literal["one-cycle", "linear", "constant"] = "linear"
    warmup: float = 0.0
    max_norm: float | None = 1.0
    average: float = 0.9
    first_length: int | None = 10
    growth: float = 4.0
    blank_weight: Factor = 0.1
    good: Fraction = 0.98
    solved: Fraction = 1.0


@dataclass
class Config:
    """Copy memory: ten symbols, a long time of blanks, and the symbols again.

    Args:
        length: T, steps from the last symbol to the delimiter.
    """

    length: Count = 10_000
    model: Model = field(default_factory=Model)
    training: Copying = field(default_factory=Copying)


def build(config: Config, seed: int, data_dir: Path | None = None) -> "CopyMemory":
    """The task of this configuration, its weights drawn by ``seed``; sequences are generated, not read."""
    check(config)
    torch.manual_seed(seed)
    return CopyMemory(config, seed)


class CopyMemory(GrowingByValidation):
    metric, higher_is_better = "accuracy", True

    def __init__(self, config: Config, seed: int) -> None:
        super().__init__(config.length, config.training)
        self.config = config
        refuse_what_does_not_fit(config.length, partial(needed_bytes, config))
        self.model = Copier(config)
        self.train = drawn(self._now, "train", seed, self.batch_size, self.batch_size)
        self.validation = drawn(self._now, "validation", 0, 64, 8)
        self.test = drawn(lambda random: copy_memory(random, self.full_length), "test", 0, 128, 8)

    def _now(self, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return copy_memory(random, self.length)

    def is_good(self, figures: dict[str, float], *, at_the_end: bool) -> bool:
        training = self.config.training
        return figures["accuracy"] >= (training.solved if at_the_end else training.good)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        tokens, targets = batch
        losses = self._losses(model(tokens), targets)
        return losses[:, -MEMORISED:].mean() + self.config.training.blank_weight * losses[:, :-MEMORISED].mean()

    def totals(self, model: nn.Module, batch: Batch) -> Tensor:
        tokens, targets = batch
        scores = model(tokens)
        right = scores[:, -MEMORISED:].argmax(-1) == targets[:, -MEMORISED:]
        nats = self._losses(scores, targets).double()
        return torch.stack([right.double().mean(1).sum(), nats.mean(1).sum(), nats.new_tensor(len(tokens))])

    def metrics(self, totals: Tensor) -> dict[str, float]:
        right, nats, count = totals.tolist()
        return {"accuracy": right / count, "cross_entropy": nats / count}

    def outcome(self) -> dict[str, Any]:
        return super().outcome() | {"memoryless_cross_entropy": memoryless(self.full_length)}

    @staticmethod
    def _losses(scores: Tensor, targets: Tensor) -> Float[Tensor, "B T"]:
        return F.cross_entropy(scores.mT, targets, reduction="none")


def copy_memory(random: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Symbols 0 to 7, 8 a blank and 9 the delimiter, and what is to be said, each (length + 20,)."""
    symbols = random.integers(KINDS, size=MEMORISED)
    tokens = np.full(length + 2 * MEMORISED, BLANK)
    targets = tokens.copy()
    tokens[:MEMORISED] = targets[-MEMORISED:] = symbols
    tokens[MEMORISED + length - 1] = DELIMITER
    return tokens, targets


def memoryless(length: int) -> float:
    """10 ln 8 / (T + 20): the cross-entropy, in nats a step, of who knows when to speak, and guesses."""
    return MEMORISED * float(np.log(KINDS)) / (length + 2 * MEMORISED)


def needed_bytes(config: Config, length: int) -> int:
    """What training holds at the most: tokens and targets twice, the scores about six times; of PyTorch's LSTM eight
    numbers a unit too."""
    kept = 8 * 4 * (config.model.units + config.model.clock_units) if config.model.kind == "lstm" else 0
    return max(8, config.training.batch_size) * length * (4 * 8 + 6 * 4 * (KINDS + 1) + kept)


class Copier(nn.Module):
    """y = clock(x); z = store(y, x); scores = W2 relu(W1 (z, y)): what to say at every step, (B, T, 9)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        model, categories = config.model, KINDS + 2
        layer = {"gilr-lstm": GILRLSTM, "lstm": LSTM}[model.kind]
        self.clock = layer(categories, model.clock_units)
        self.store = layer(model.clock_units + categories, model.units)
        self.head = nn.Sequential(
            nn.Linear(model.units + model.clock_units, model.head_units),
            nn.ReLU(),
            nn.Linear(model.head_units, KINDS + 1),
        )
        batch = max(config.training.batch_size, 8)
        self.segment = config.training.segment or segment_steps(batch, max(model.units, model.clock_units))
        longest = model.longest or 100.0 * config.length
        _start(self.clock, model.clock, 1.0, model.clock)
        _start(self.store, model.clock, longest / 10, longest)

    def forward(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T scores"]:
        """Scores of the eight symbols and the blank."""
        state = (self.clock.initial_state(len(tokens)), self.store.initial_state(len(tokens)))
        return in_segments(self._read, tokens, state, steps=self.segment)[0]

    def _read(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        x = F.embedding(tokens, torch.eye(KINDS + 2).to(next(self.parameters())))
        y, clock = self.clock(x, state[0])
        z, store = self.store(torch.cat([y, x], dim=-1), state[1])
        return self.head(torch.cat([z, y], dim=-1)), (clock, store)


@torch.no_grad()
def _start(layer: GILRLSTM | LSTM, clock: float, shortest: float, longest: float) -> None:
    """Time scales of the cells, and of a surrogate; an input gate that is shut until asked."""
    if isinstance(layer, GILRLSTM):
        surrogate, forget = layer.forget_biases()
        spread_time_scales(surrogate, 1.0, clock, shuffle=True)
        write = layer.bias.chunk(6)[3]
    else:
        write, forget = cast(Tensor, layer.lstm.bias_ih_l0).chunk(4)[:2]
    spread_time_scales(forget, shortest, longest, shuffle=True)
    write.fill_(-2 if longest > clock else 0)
