"""The long dependency: the first of N symbols decides the class, N up to a million (Martin & Cundy 2018, Table 3).

Trained on short sequences first, then on longer ones, with gates whose time scales are spread over the length. Every
gradient runs through the whole sequence: it is cut into segments that are computed again in the backward, exactly.
``--preset paper`` is without curriculum and time scales: the paper needs 550 minibatches at 1,024 steps and 14,000 at
1,048,576, 9.7 hours on a K80.
"""

import itertools
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import nn

from legato._shapes import Float, Int, Tensor
from legato.layers.gilr import GILRLSTM
from legato.layers.segments import in_segments
from legato.layers.time_scales import spread_time_scales

from .. import curriculum
from ..curriculum import Growing, refuse_what_does_not_fit
from ..data.drawn import Drawn
from ..data.long_dependency import long_dependency
from ..ranges import Count, CountOrZero, Depth, Range, Width, Window, check
from ..task import Batch, Paper, Preset, Reported

PAPER = Paper(
    metric="accuracy",
    reported=Reported(100.0, "Martin & Cundy 2018, table 3", verified=True),
    parameters="512 units; 64 at 1,048,576 steps",
    unit=" %",
    scale=100.0,
    digits=2,
)

PRESETS = {
    "paper": Preset(
        "as the paper trains it: no curriculum, all forget gates at a bias of 5; long sequences need a GPU",
        {"model.activation": "identity", "model.forget_bias": 5.0, "training.first_length": None},
    ),
}

# Bytes that a layer keeps or passes on in training, a step and unit: about 40 arrays as wide as its units.
A_STEP = 40 * 4
# A training step that holds no more than this is not computed again in the backward.
WHOLE_BYTES = 2**30
#: Fresh sequences on which a converged network is verified.
TEST_SEQUENCES = 256


@dataclass
class Model:
    """The network: one-hot symbols, recurrent layers, the sign of one number.

    Args:
        kind: gilr-lstm, or lstm (PyTorch's, sequential).
        units: of each layer; null is the paper's: 512, and 64 from 65,536 steps on.
        layers: recurrent layers.
        activation: of the GILR-LSTM's cell on its way out. The paper's is identity; a cell then grows with the length,
            as a sum of a million terms does, and tanh keeps the output in bounds.
        symbols: dimensions of the one-hot vectors.
        forget_bias: of all forget gates at first; null spreads their time scales from 1 step to longest.
        longest: longest time scale in steps, 1 or more; null is the length, and no less than 65,536.
    """

    kind: Literal["gilr-lstm", "lstm"] = "gilr-lstm"
    units: Width | None = None
    layers: Depth = 2
    activation: Literal["tanh", "identity"] = "tanh"
    symbols: Annotated[int, Range(2, 10**6)] = 128
    forget_bias: Annotated[float, Range(-1000, 1000)] | None = None
    longest: Window | None = None


@dataclass
class Curriculum(curriculum.Curriculum):
    """Trained until a streak of minibatches is all right at one length after the other, validation too at the last.

    Args:
        streak: minibatches in a row that must be all right.
        practice: the same at the first length of several; longer ones ask for fewer in proportion, but no fewer than
            ``streak``. Short sequences are cheap, and what is learnt well there holds at the next length.
    """

    epochs: int = 4000
    updates_per_epoch: int | None = 5
    batch_size: int = 8
    learning_rate: float = 3e-3
    schedule: Literal["one-cycle", "linear", "constant"] = "constant"
    max_norm: float | None = 1.0
    first_length: int | None = 128
    growth: float = 8.0
    streak: Count = 5
    practice: CountOrZero = 300


@dataclass
class Config:
    """Long dependency: the sign of the first of N symbols, given at the end.

    Args:
        length: N, steps of the sequences.
    """

    length: Count = 1024
    model: Model = field(default_factory=Model)
    training: Curriculum = field(default_factory=Curriculum)


def build(config: Config, seed: int, data_dir: Path | None = None) -> "LongDependency":
    """The task of this configuration, its weights drawn by ``seed``; sequences are generated, not read.

    Raises:
        ExperimentError: a number is out of its range, or sequences so long would not fit in memory.
    """
    check(config)
    torch.manual_seed(seed)
    return LongDependency(config, seed)


class LongDependency(Growing):
    metric, higher_is_better = "accuracy", True

    def __init__(self, config: Config, seed: int):
        super().__init__(config.length, config.training)
        self.config = config
        self.right_in_a_row = self.updates = 0
        self.model = network(config)
        refuse_what_does_not_fit(config.length, partial(needed_bytes, config))
        size = config.training.batch_size
        self.train = Drawn(size, size, lambda i: self._sequences(i, 3 * seed, self.length), per_epoch=None)
        self.validation_stream = 3 * seed + 1
        self.test = Drawn(TEST_SEQUENCES, 8, lambda i: self._sequences(i, 3 * seed + 2, self.full_length))

    def _sequences(self, indices: Tensor, stream: int, length: int) -> Batch:
        return long_dependency(indices, length, self.config.model.symbols, stream)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        tokens, classes = batch
        scores = model(tokens)
        if model.training:
            self._count(bool(((scores > 0) == (classes > 0)).all()))
        return F.binary_cross_entropy_with_logits(scores, classes)

    def _count(self, all_right: bool) -> None:
        """One more minibatch; after a streak of right ones the curriculum goes on to the next length."""
        self.updates += 1
        self.right_in_a_row = self.right_in_a_row + 1 if all_right else 0
        if not self.all_solved and self.right_in_a_row >= self._streak():
            self.go_on(update=self.updates)
            self.right_in_a_row = 0

    @property
    def validation(self) -> Drawn:
        """64 sequences of the present length; of long ones as many as make four million steps, but a minibatch."""
        size = max(self.config.training.batch_size, min(64, 2**22 // self.length))
        return Drawn(size, 8, lambda i: self._sequences(i, self.validation_stream, self.length))

    def finished(self, figures: dict[str, float]) -> bool:
        if self.all_solved and figures["accuracy"] < 1:  # an update after the streak undid it
            self.stage -= 1
            self.solved.pop()
        return self.all_solved

    def _streak(self) -> int:
        """Right minibatches in a row that this stage asks for."""
        training, first = self.config.training, self.lengths[0]
        is_last = self.stage == len(self.lengths) - 1
        return training.streak if is_last else max(training.streak, training.practice * first // self.length)

    def state(self) -> dict[str, Any]:
        return super().state() | {"right_in_a_row": self.right_in_a_row, "updates": self.updates}

    def outcome(self) -> dict[str, Any]:
        return {"converged": self.all_solved, "curriculum": self.solved}

    def totals(self, model: nn.Module, batch: Batch) -> Tensor:
        tokens, classes = batch
        right = (model(tokens) > 0) == (classes > 0)
        return torch.stack([right.sum(), torch.tensor(len(classes), device=right.device)])

    def metrics(self, totals: Tensor) -> dict[str, float]:
        right, count = totals.tolist()
        return {"accuracy": right / count}


def network(config: Config) -> nn.Module:
    """The network of one kind with its gate biases."""
    model = config.model
    longest = float(model.longest or max(config.length, 65_536))
    if model.kind == "lstm":
        return SignLSTM(model, _units(config), longest)
    return SignGILRLSTM(model, _units(config), longest, config.training)


class SignGILRLSTM(nn.Module):
    """score = w . h_T + b, h = GILRLSTM(... GILRLSTM(one-hot symbols)), without ever making the one-hot vectors."""

    def __init__(self, config: Model, units: int, longest: float, training: Curriculum):
        super().__init__()
        sizes = [config.symbols] + [units] * config.layers
        self.layers = nn.ModuleList(GILRLSTM(*pair, activation=config.activation) for pair in itertools.pairwise(sizes))
        self.head = nn.Linear(units, 1)
        self.segment = training.segment or segment_steps(training.batch_size, units)
        for layer in self.layers:
            for bias in layer.forget_biases():  # type: ignore[operator]
                _start(bias, config.forget_bias, longest)

    def forward(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B"]:
        """The score of each sequence, above zero for +e_0."""
        state = tuple(layer.initial_state(len(tokens)) for layer in self.layers)  # type: ignore[operator]
        whole = tokens.numel() * len(self.layers) * A_STEP * self.head.in_features
        recompute = whole > WHOLE_BYTES
        last, _ = in_segments(self._read, tokens, state, steps=self.segment, last_only=True, recompute=recompute)
        return self.head(last)[:, 0]

    def _read(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        first, *rest = cast(list[GILRLSTM], list(self.layers))
        columns = first.weight.mT
        table = torch.cat([columns, -columns[:1]]) + first.bias  # row k: the products of e_k, the last row: of -e_0
        x, new = first.from_products(F.embedding(tokens, table), state[0])
        states = [new]
        for layer, old in zip(rest, state[1:], strict=True):
            x, new = layer(x, old)
            states.append(new)
        return x, tuple(states)


class SignLSTM(nn.Module):
    """The same with ``torch.nn.LSTM``, sequential over time, whose one-hot vectors are made."""

    def __init__(self, config: Model, units: int, longest: float):
        super().__init__()
        self.lstm = nn.LSTM(config.symbols, units, config.layers, batch_first=True)
        self.head = nn.Linear(units, 1)
        for layer in range(config.layers):
            _start(getattr(self.lstm, f"bias_ih_l{layer}").detach()[units : 2 * units], config.forget_bias, longest)
            getattr(self.lstm, f"bias_hh_l{layer}").detach()[units : 2 * units] = 0

    def forward(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B"]:
        """The score of each sequence, above zero for +e_0."""
        size = self.lstm.input_size
        vectors = torch.eye(size, device=tokens.device, dtype=self.head.weight.dtype)
        x = F.embedding(tokens, torch.cat([vectors, -vectors[:1]]))  # (B, T, p)
        return self.head(self.lstm(x)[0][:, -1])[:, 0]


def segment_steps(batch_size: int, units: int) -> int:
    """Steps whose gate products, the widest array of a layer, take 8 MiB: several fit the cache, none is returned to
    the system."""
    return max(64, 2**23 // (4 * 6 * units * batch_size))


def _start(bias: Tensor, forget_bias: float | None, longest: float) -> None:
    if forget_bias is None:
        spread_time_scales(bias, 1.0, longest, shuffle=True)
    else:
        bias.fill_(forget_bias)


def _units(config: Config) -> int:
    return config.model.units or (512 if config.length < 65_536 else 64)


def needed_bytes(config: Config, length: int) -> int:
    """What a training step holds at the most: symbols, the states between segments, and one segment's arrays."""
    batch, units, layers = max(8, config.training.batch_size), _units(config), config.model.layers
    if config.model.kind == "lstm":
        a_step = 4 * (2 * config.model.symbols + layers * 8 * units)
        return length * batch * a_step
    segment = min(length, config.training.segment or segment_steps(batch, units))
    states = -(-length // segment) * batch * layers * 2 * units * 4
    kept = segment if length * batch * layers * units * A_STEP > WHOLE_BYTES else length
    return 2 * length * batch * 4 + states + kept * batch * layers * units * A_STEP  # the symbols: a batch and the next
