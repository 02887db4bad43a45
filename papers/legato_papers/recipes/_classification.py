"""What the recipes that classify texts share: their fields, the network and the task. A recipe adds its data.

``imdb.py`` classifies single texts, ``qqp.py`` and ``snli.py`` pairs; ``imdb_pretrained.py`` shares ``Classes``. The
paper's network reads word vectors with a delay network of order 1 each, a leaky sum over a window of ``theta`` words,
and scores them by one linear layer.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from legato._shapes import Tensor
from legato.layers import LegendreMemory
from legato.layers.base import RecurrentLayer
from legato.models import Embedding, SequenceClassifier
from legato.models.sequence import last_output

from ..data.buckets import Bucketed, padded
from ..data.encoded import Encoded, encoded
from ..data.vectors import GLOVE
from ..data.words import Texts, Vocabulary
from ..kinds import Kind, layer_of
from ..models import PairClassifier
from ..ranges import Count, Depth, Factor, Fraction, FractionBelowOne, Width, Window
from ..task import Batch, ExperimentError, Task, Training

SPLITS = ("train", "validation", "test")
#: Texts in a batch of validation and test.
TESTED_AT_ONCE = 250
#: Texts on which the memory is scaled.
CALIBRATED_ON = 1000


@dataclass
class Data:
    """The texts, and the words that are read of them.

    Args:
        examples: so many of each split only, the first ones and as many of each class; null is all.
        longest: words kept of a text.
        truncate: where a longer text is cut: front drops its first words, back its last.
        words_of: whose words are known: of the training texts, or of all. Those that no training text has keep the
            vector they were given, as they would in a table of all vectors.
        least_count: words that occur more rarely in these texts are unknown.
        train_on_validation: train on the validation texts too, when all is chosen, and test the weights of the last
            epoch; the validation figure is then one of training.
        vectors: initial word vectors: glove.840B.300d (2.2 GB to download), glove.6B.300d (0.9 GB), or a file in
            GloVe's format; null draws them.
    """

    examples: Count | None = None
    longest: Count = 1024
    truncate: Literal["front", "back"] = "front"
    words_of: Literal["train", "all"] = "train"
    least_count: Count = 3
    train_on_validation: bool = False
    vectors: str | None = GLOVE


@dataclass
class Model:
    """The network: word vectors, a recurrent layer, its last output, a linear layer.

    Args:
        kind: lmu is the paper's, a Legendre memory of order 1 for each channel of the word vectors and nothing learned
            in it; gilr-lstm, sru, lstm (PyTorch's) and transformer stand in its place.
        channels: of the word vectors.
        theta: window of the memory, in words; null is ``data.longest``, as in the paper.
        train_vectors: learn the word vectors too.
        word_dropout: share of the vocabulary left out of each update.
        units: of the other kinds; the memory has none.
        layers: of the other kinds.
        heads: of a transformer.
        dropout: between the layers of the other kinds.
    """

    kind: Kind = "lmu"
    channels: Width = 300
    theta: Window | None = None
    train_vectors: bool = True
    word_dropout: FractionBelowOne = 0.0
    units: Width = 36
    layers: Depth = 1
    heads: Width = 4
    dropout: FractionBelowOne = 0.0


@dataclass
class FineTuning(Training):
    """Word vectors are trained with a learning rate of their own.

    Args:
        vector_rate: theirs, in learning rates of the others.
        label_smoothing: probability taken from the true class and spread over all.
    """

    vector_rate: Factor = 1.0
    label_smoothing: Fraction = 0.0


@dataclass
class Config:
    """A class for a text, or for a pair of them."""

    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    training: FineTuning = field(default_factory=FineTuning)


def numbers(
    config: Config, name: str, load: Callable[[], Any], files: Callable[[], Sequence[Path]], data_dir: Path | None
) -> Encoded:
    """The texts that ``load`` reads from ``files`` as numbers, and the vectors of their words."""
    data = config.data
    return encoded(
        name,
        load,
        files,
        vocabulary={"least_count": data.least_count, "join_contractions": True},
        learnt_from=("train",) if data.words_of == "train" else SPLITS,
        only=SPLITS,
        examples=data.examples,
        vectors=data.vectors,
        data_dir=data_dir,
    )


class Classes(Task):
    """Texts in classes; a recipe says how a batch, whose last part are the labels, is scored."""

    metric, higher_is_better = "accuracy", True

    @abstractmethod
    def scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """Of every class, (B, classes); or of two, one score (B, 1), which is above zero for class 1."""

    def totals(self, model: nn.Module, batch: Batch) -> Tensor:
        scores, labels = self.scores(model, batch), batch[-1]
        found = (scores[:, 0] > 0) if scores.shape[1] == 1 else scores.argmax(1)
        return torch.stack([(found == labels).sum(), torch.tensor(len(labels), device=labels.device)])

    def metrics(self, totals: Tensor) -> dict[str, float]:
        right, count = totals.tolist()
        return {"accuracy": right / count}


class Classification(Classes):
    """The class of a text, or of a pair of texts.

    Args:
        config: its fields.
        data: the texts of each split as numbers, with their classes.
        classes: how many; of two, one score above zero is class 1.

    Raises:
        ExperimentError: a label outside the classes, vectors of another width.
    """

    def __init__(self, config: Config, data: Encoded, classes: int) -> None:
        # Through 200 steps of an LSTM gradients fade below 1e-38, where a CPU takes five times as long.
        torch.set_flush_denormal(True)
        self.config, self.data, self.source = config, data, data.source
        for split in SPLITS:
            check_labels(data.labels[split], classes, f"{data.source}, {split}")
        self.keeps_last = config.data.train_on_validation
        self.train = self._examples(SPLITS[: 1 + self.keeps_last], config.training.batch_size)
        self.validation = self._examples(("validation",), TESTED_AT_ONCE)
        self.test = self._examples(("test",), TESTED_AT_ONCE)
        self.model = network(config, data, classes)
        self.model.vocabulary = Fingerprint(data.vocabulary)
        if config.model.kind == "lmu":
            self._calibrate()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        scores, labels = self.scores(model, batch), batch[-1]
        smoothing = self.config.training.label_smoothing if model.training else 0.0
        if scores.shape[1] == 1:
            return F.binary_cross_entropy_with_logits(scores[:, 0], labels * (1 - smoothing) + smoothing / 2)
        return F.cross_entropy(scores, labels, label_smoothing=smoothing)

    def scores(self, model: nn.Module, batch: Batch) -> Tensor:
        if len(batch) == 3:
            return model(batch[0], lengths=batch[1])[0]
        return model(batch[0], batch[2], lengths=(batch[1], batch[3]))

    def rate(self, name: str) -> float:
        return self.config.training.vector_rate if name.startswith("embedding.") else 1.0

    def tokens(self, batch: Batch) -> int:
        return sum(int(lengths.sum()) for lengths in batch[1:-1:2])

    def outcome(self) -> dict[str, Any]:
        """The vectors, the words that have one, and how many texts of each split were cut or have no word."""
        lengths = {split: np.concatenate([texts.lengths for texts in self._columns(split)]) for split in SPLITS}
        embedding = cast(Embedding, self.model.embedding)
        return {
            "vectors": self.config.data.vectors,
            "words": embedding.num_embeddings,
            "truncated": {split: int((of > self.config.data.longest).sum()) for split, of in lengths.items()},
            "empty": {split: int((of == 0).sum()) for split, of in lengths.items()},
        }

    def _columns(self, split: str) -> list[Texts]:
        """The texts of a split, or the first and the second of its pairs."""
        texts = self.data.texts
        return [texts[split]] if split in texts else [texts[f"{split}.first"], texts[f"{split}.second"]]

    def _examples(self, splits: Sequence[str], batch_size: int) -> Bucketed:
        data = self.config.data
        columns = [joined(parts) for parts in zip(*map(self._columns, splits), strict=True)]
        labels = torch.from_numpy(np.concatenate([self.data.labels[split] for split in splits]))

        def take(indices: Tensor) -> Batch:
            batch: list[Tensor] = []
            for texts in columns:
                words, lengths, _ = padded([texts[i] for i in indices.tolist()], data.longest, data.truncate)
                batch += [words, lengths]
            return (*batch, labels[indices])

        lengths = np.stack([texts.lengths for texts in columns]).max(0)
        return Bucketed(len(labels), batch_size, take, lengths=torch.from_numpy(lengths).clamp(max=data.longest))

    @torch.no_grad()
    def _calibrate(self) -> None:
        """Scale the memory to a standard deviation of one, over channels and texts, after the last word."""
        layer, embedding = cast(LegendreMemory, self.model.layer), cast(Embedding, self.model.embedding)
        tokens, lengths, *_ = self.train.take(torch.arange(min(self.train.size, CALIBRATED_ON)))
        _, state = last_output(layer, embedding, tokens, lengths=lengths)  # no vector of a token is written out
        layer.scale.fill_(1 / state.memory.std().item())


def network(config: Config, data: Encoded, classes: int) -> nn.Module:
    """301 parameters beside the word vectors with the defaults; 1,201 and 3,603 for pairs in two and three classes."""
    model, vectors = config.model, data.vectors
    if vectors is not None and vectors.shape[1] != model.channels:
        raise ExperimentError(
            f"the vectors of {config.data.vectors} are {vectors.shape[1]} wide, and the network reads {model.channels} "
            f"channels: set --model.channels {vectors.shape[1]}, or choose other --data.vectors"
        )
    layer = recurrent_layer(config)
    embedding = Embedding(
        data.vocabulary.size,
        model.channels,
        vectors=vectors,
        trainable=model.train_vectors,
        dropout=model.word_dropout,
    )
    size, scores = math.prod(np.atleast_1d(layer.output_size).tolist()), 1 if classes == 2 else classes
    if "train" in data.texts:
        return SequenceClassifier(layer, nn.Linear(size, scores), embedding)
    return PairClassifier(layer, nn.Linear(4 * size, scores), embedding)


def recurrent_layer(config: Config) -> RecurrentLayer:
    """The layer of this kind; of lmu the paper's delay network, one per channel."""
    model, longest = config.model, config.data.longest
    if model.kind == "lmu":
        return LegendreMemory(model.channels, 1, model.theta or longest, return_sequences=False)
    return layer_of(
        model.kind,
        model.channels,
        model.units,
        return_sequences=False,
        layers=model.layers,
        heads=model.heads,
        dropout=model.dropout,
    )


class Fingerprint(nn.Module):
    """Keeps the digest of the vocabulary beside the weights, and refuses weights that belong to another one."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.words = vocabulary

    def get_extra_state(self) -> Tensor:
        return torch.tensor(list(bytes.fromhex(self.words.digest)), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        self.words.check(bytes(state.tolist()).hex())


def joined(parts: Sequence[Texts]) -> Texts:
    """All texts of all parts."""
    if len(parts) == 1:
        return parts[0]
    lengths = np.concatenate([[0], *(part.lengths for part in parts)])
    return Texts(np.concatenate([part.ids for part in parts]), lengths.cumsum())


def check_labels(labels: np.ndarray, classes: int, where: str) -> None:
    """Raise where a label is not a class."""
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        raise ExperimentError(
            f"{where}: expected labels from 0 to {classes - 1}, got {labels[wrong[0]]} in example {wrong[0]}: correct "
            "the file"
        )
