"""IMDB with pre-training: a review's sentiment, read from the features of a language model that is trained further.

``legato-papers train imdb-language-model`` first, then ``legato-papers train imdb-pretrained --language_model RUN``;
without ``--language_model`` the newest run is read. ``--pretrained false`` trains the same network from drawn weights.
``--preset large``, given to both, is the paper's size, for a GPU.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from legato._shapes import Float, Int, Tensor
from legato.models import LanguageModel

from .. import checkpoint as checkpoints
from ..data.buckets import Bucketed, padded
from ..data.encoded import Encoded
from ..language import Windows
from ..ranges import Count, Factor, FractionBelowOne
from ..task import Batch, ExperimentError, Paper, Preset, Reported, Training
from . import imdb_language_model
from ._classification import Classes, check_labels
from .imdb_language_model import Model, encoded_reviews, end_to_end, network

PAPER = Paper(
    metric="accuracy",
    reported=Reported(93.20, "Chilkuri & Eliasmith 2021, table 3", verified=True),
    parameters="34M",
    unit=" %",
    scale=100.0,
    digits=2,
    data="IMDB",
    baselines={
        "LSTM": Reported(92.88, "Radford et al. 2017, error 7.12 %, a byte-level multiplicative LSTM", verified=True),
        "DistilBERT": Reported(92.82, "Chilkuri & Eliasmith 2021, table 3", verified=True),
    },
    kinds={"lmu": "", "lstm": "LSTM"},
)


def _of_the_language_model(preset: str, *parts: str) -> dict[str, Any]:
    """The fields of these parts in a preset of the language model: both networks must agree in them."""
    fields = imdb_language_model.PRESETS[preset].fields
    return {name: value for name, value in fields.items() if name.startswith(parts)}


PRESETS = {
    "large": Preset(
        "the paper's 34 million parameters, for one GPU, after the language model of this preset; not measured",
        _of_the_language_model("large", "data.vocabulary", "model.")
        | {
            "data.longest": 1000,
            "training.epochs": 5,
            "training.body_rate": 0.2,
            "training.vector_rate": 1.0,
            "training.dropout": 0.4,
        },
    ),
    "smoke": Preset(
        "a few real examples, in seconds; without pre-training, which --pretrained true switches on",
        _of_the_language_model("smoke", "data.", "model.")
        | {"data.longest": 30, "pretrained": False, "training.batch_size": 8, "training.epochs": 2},
    ),
}
#: The recipe whose runs have the weights to start from.
LANGUAGE_MODEL = "imdb-language-model"
# The fields of a language model on which the shapes of its weights depend.
_SHAPE = ("kind", "width", "channels", "blocks", "highways", "order", "theta", "growth", "cutoffs", "tied")


@dataclass
class Data(imdb_language_model.Data):
    """The reviews, 22,500 to train, 2,500 to validate, 25,000 to test; the vocabulary is the language model's.

    Args:
        longest: words kept of a review; of a longer one its first words are dropped.
    """

    longest: Count = 200


@dataclass
class FineTuning(Training):
    """The language model's weights are trained further, with a learning rate of their own.

    Args:
        body_rate: theirs, in learning rates of the head; 1 without pre-training.
        vector_rate: that of the word vectors, in learning rates of the body.
        dropout: share of the pooled features dropped before the head.
    """

    epochs: int = 2
    batch_size: int = 32
    learning_rate: float = 2e-3
    warmup: float = 0.1
    weight_decay: float = 0.01
    max_norm: float | None = 1.0
    body_rate: Factor = 1.0
    vector_rate: Factor = 8.0
    dropout: FractionBelowOne = 0.2


@dataclass
class Config:
    """IMDB: the sentiment of a review, after pre-training as a language model on reviews.

    Args:
        pretrained: start from the language model's weights; false draws the same network's.
        language_model: run of imdb-language-model, or its best.ckpt; null is the newest one in runs.
    """

    #: Fields whose null a run fills in when it begins.
    chosen: ClassVar[tuple[str, ...]] = ("language_model",)

    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    training: FineTuning = field(default_factory=FineTuning)
    pretrained: bool = True
    language_model: str | None = None


def build(config: Config, seed: int, data_dir: Path | None = None) -> "Sentiment":
    """The task of this configuration; ``seed`` draws all weights, before ``start`` reads the language model's."""
    reviews = encoded_reviews(config.data, data_dir)
    torch.manual_seed(seed)
    body = network(config.model, reviews)
    if config.pretrained:
        # A run says which it was, however many follow. An old run can be evaluated and resumed without.
        if config.language_model is None and (found := checkpoints_of(config)):
            config.language_model = str(found[0])
    elif config.model.kind == "lmu":  # as the language model was before its training
        body.calibrate(Windows(end_to_end(reviews.texts["train"]), 64, 64).spread())
    return Sentiment(config, reviews, body)


class Sentiment(Classes):
    def __init__(self, config: Config, reviews: Encoded, body: LanguageModel) -> None:
        self.config, self.reviews = config, reviews
        self.source = reviews.source
        self.train = self._examples("train", config.training.batch_size)
        self.validation = self._examples("validation", 250)
        self.test = self._examples("test", 250)
        self.model = PooledClassifier(body, 2, config.training.dropout)

    def start(self) -> None:
        if self.config.pretrained:
            path = language_model(self.config)
            read_language_model(cast(PooledClassifier, self.model).body, path, self.config)
            self.config.language_model = str(path)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(self.scores(model, batch), batch[-1])

    def scores(self, model: nn.Module, batch: Batch) -> Tensor:
        tokens, lengths, _ = batch
        return model(tokens, lengths)

    def rate(self, name: str) -> float:
        training = self.config.training
        rate = training.body_rate if self.config.pretrained and name.startswith("body.") else 1.0
        return rate * training.vector_rate if name.startswith("body.embedding.") else rate

    def tokens(self, batch: Batch) -> int:
        return int(batch[1].sum())

    def outcome(self) -> dict[str, Any]:
        longest = self.config.data.longest
        cut = {
            name: int((self.reviews.texts[name].lengths > longest).sum()) for name in ("train", "validation", "test")
        }
        return {"truncated": cut}

    def _examples(self, split: str, batch_size: int) -> Bucketed:
        texts, labels = self.reviews.texts[split], torch.from_numpy(self.reviews.labels[split])
        check_labels(self.reviews.labels[split], 2, f"{self.source}, {split}")
        longest = self.config.data.longest

        def take(indices: Tensor) -> Batch:
            tokens, lengths, _ = padded([texts[i] for i in indices.tolist()], longest, "front")
            return tokens, lengths, labels[indices]

        return Bucketed(len(texts), batch_size, take, torch.from_numpy(np.asarray(texts.lengths)).clamp(max=longest))


class PooledClassifier(nn.Module):
    """scores = W [y_T, mean_t y_t, max_t y_t] + b: y are the features of a language model, whose softmax is left out.

    Args:
        body: the language model; its ``output`` is taken away.
        classes: how many.
        dropout: share of the pooled features dropped in training.
    """

    def __init__(self, body: LanguageModel, classes: int, dropout: float) -> None:
        super().__init__()
        self.body = body
        body.output = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(3 * body.hidden_size, classes)

    def forward(self, tokens: Int[Tensor, "B T"], lengths: Int[Tensor, "B"]) -> Float[Tensor, "B classes"]:
        """Scores of every class; a text without a word is scored by the biases."""
        y, _ = self.body.features(tokens, lengths=lengths)
        lengths = lengths.to(y.device)
        some = (lengths > 0)[:, None]
        last = y[torch.arange(len(y), device=y.device), (lengths - 1).clamp(min=0)]
        mean = y.sum(1) / lengths.clamp(min=1)[:, None]
        outside = torch.arange(y.shape[1], device=y.device) >= lengths[:, None]
        largest = y.masked_fill(outside[..., None], -torch.inf).amax(1)
        pooled = torch.cat([last, mean, largest], 1).where(some, 0)
        return self.head(self.dropout(pooled.to(self.head.weight.dtype)))


def language_model(config: Config) -> Path:
    """The checkpoint of the language model to start from.

    Raises:
        ExperimentError: there is none.
    """
    found = checkpoints_of(config)
    if not found:
        place = config.language_model or Path("runs") / LANGUAGE_MODEL
        raise ExperimentError(
            f"expected a run of {LANGUAGE_MODEL} with seed-*/best.ckpt, found none in {place}: make one with "
            f"legato-papers train {LANGUAGE_MODEL} and the same --preset, name one with --language_model, or use "
            "--pretrained false"
        )
    return found[0]


def checkpoints_of(config: Config) -> list[Path]:
    """Those of the language model that is named, else of all there are, the newest run's first."""
    runs = (Path("runs") / LANGUAGE_MODEL).glob("*")
    places = [Path(config.language_model)] if config.language_model else sorted(runs, key=_time, reverse=True)
    found: list[Path] = []
    for place in places:
        found += [place] if place.is_file() else [*place.glob("best.ckpt"), *sorted(place.glob("seed-*/best.ckpt"))]
    return found


def read_language_model(body: LanguageModel, path: Path, config: Config) -> None:
    """Put the weights of a language model's checkpoint into a network of the same shape that has no softmax any more.

    Raises:
        ExperimentError: the file is missing, of another recipe, of another network or another vocabulary.
    """
    content = checkpoints.load(path)
    about = content.get("about") or {}
    if about.get("recipe") != LANGUAGE_MODEL or "model" not in content:
        raise ExperimentError(
            f"{path} is of recipe {about.get('recipe')}: expected the best.ckpt of a run of {LANGUAGE_MODEL}: "
            "name one with --language_model"
        )
    theirs, ours = about["config"], {"data": vars(config.data), "model": vars(config.model)}
    same = [("data", "vocabulary"), ("data", "examples")] + [("model", name) for name in _SHAPE]
    wrong = [
        f"--{part}.{name} {theirs[part].get(name)} (here {ours[part][name]})"
        for part, name in same
        if theirs[part].get(name) != ours[part][name]
    ]
    if wrong:
        raise ExperimentError(
            f"the language model in {path} does not fit this network: it was trained with {', '.join(wrong)}: "
            "give the same --preset and options here, or name another run with --language_model"
        )
    try:
        body.load_state_dict({n: x for n, x in content["model"].items() if not n.startswith("output.")})
    except (RuntimeError, ExperimentError) as error:
        raise ExperimentError(f"the weights in {path} do not fit this network: {error}") from error


def _time(path: Path) -> float:
    return path.stat().st_mtime
