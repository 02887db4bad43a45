"""A language model on the 75,000 film reviews that are not IMDB's test texts; ``imdb_pretrained.py`` reads on from it.

The reviews of the training set, less those that validate, and the unlabelled ones stand one after another, an end
symbol behind each. The validation reviews choose the weights, and as many of the unlabelled ones are held out for the
test metric: no test text and no label is ever read. ``--preset large`` is the paper's size, for a GPU.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from legato.layers.base import RecurrentLayer
from legato.models import Embedding, LanguageModel

from ..data.encoded import Encoded, encoded
from ..data.imdb import imdb, imdb_files
from ..data.words import END, Texts
from ..kinds import Kind, layer_of
from ..language import LanguageTask, Reading, Streams, Windows
from ..models import adaptive_softmax
from ..ranges import Count, CountOrZero, Depth, DepthOrZero, FractionBelowOne, Order, Positive, Range, Width, Window
from ..task import ExperimentError, Paper, Preset, Reported
from ._classification import Fingerprint

# The paper pre-trains on Amazon's reviews and reports what fine-tuning makes of it: see imdb_pretrained.py.
PAPER = Paper(
    metric="perplexity",
    reported=Reported(20_000.0, "all 20,000 words of the default vocabulary alike", verified=True),
    parameters="0",
    digits=1,
)
PRESETS = {
    "large": Preset(
        "the paper's 34 million parameters, 12 of them in word vectors, for one GPU; not measured",
        {
            "data.vocabulary": 30_000,
            "data.streams": 256,
            "model.kind": "lmu",
            "model.width": 400,
            "model.channels": 512,
            "model.blocks": 5,
            "model.highways": 3,
            "model.order": 5,
            "model.theta": 10.0,
            "model.growth": 1.0,
            "model.cutoffs": [4000, 12000],
            "model.dropout": 0.1,
            "model.word_dropout": 0.05,
            "training.epochs": 20,
            "training.batch_size": 128,
            "training.learning_rate": 1e-3,
            "training.weight_decay": 0.01,
            "training.window": 140,
        },
    ),
    "smoke": Preset(
        "a few real examples, in seconds",
        {
            "data.examples": 40,
            "data.held_out": 10,
            "data.vocabulary": 500,
            "data.streams": 4,
            "data.warm_up": 20,
            "model.channels": 16,
            "model.width": 8,
            "model.blocks": 2,
            "model.cutoffs": [100],
            "training.batch_size": 4,
            "training.window": 32,
            "training.epochs": 2,
            "training.updates_per_epoch": 3,
        },
    ),
}


@dataclass
class Data:
    """The reviews as one long text of words.

    Args:
        examples: so many reviews of each split only; null is all.
        vocabulary: words at most, the most frequent of the training and the unlabelled reviews, four symbols included.
        validation_words: of the validation reviews, those that choose the best weights.
        held_out: unlabelled reviews, the last ones, for the test figure.
        vectors: initial word vectors: glove.840B.300d, glove.6B.300d, or a file in GloVe's format; null draws them.
        streams: parts of the validation and of the test text that are read side by side.
        warm_up: words before each part that are read first and do not count.
    """

    examples: Count | None = None
    vocabulary: Annotated[int, Range(5, 10**7)] = 20_000
    validation_words: Count = 100_000
    held_out: Count = 2_500
    vectors: str | None = None
    streams: Count = 64
    warm_up: CountOrZero = 100


@dataclass
class Model:
    """The network: word vectors, blocks of memory, dense and highway layers, a weighted sum of all depths, softmax.

    Args:
        kind: of the layer in the memory's place: lmu, gilr-lstm, sru, lstm or transformer. The other fields suit a
            gilr-lstm; an lmu wants two blocks or more and half the learning rate.
        width: of the word vectors.
        channels: of every layer.
        blocks: of memory, dense and highways.
        highways: in each block and above the sum.
        order: numbers that the memory keeps for each channel.
        theta: window of the memory in the lowest block, in words.
        growth: window of a block's memory, in windows of the block below.
        cutoffs: where the clusters of rarer words begin, for adaptive softmax; empty is plain softmax.
        tied: the softmax reads with the word vectors, which needs plain softmax.
        dropout: share of the channels dropped in training.
        word_dropout: share of the vocabulary left out of each update.
    """

    kind: Kind = "gilr-lstm"
    width: Width = 128
    channels: Width = 256
    blocks: Depth = 1
    highways: DepthOrZero = 1
    order: Order = 4
    theta: Window = 5.0
    growth: Positive = 3.0
    cutoffs: Annotated[list[int], Range(1, 10**7)] = field(default_factory=lambda: [2000, 8000])
    tied: bool = False
    dropout: FractionBelowOne = 0.0
    word_dropout: FractionBelowOne = 0.0


@dataclass
class Config:
    """A language model on IMDB's 75,000 reviews without the test texts, to be fine-tuned by imdb-pretrained."""

    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    training: Reading = field(default_factory=lambda: Reading(epochs=7, updates_per_epoch=1000, window=128))


def build(config: Config, seed: int, data_dir: Path | None = None) -> "NextWord":
    """The task of this configuration, its weights drawn by ``seed``."""
    reviews = encoded_reviews(config.data, data_dir)
    torch.manual_seed(seed)
    return NextWord(config, reviews)


class NextWord(LanguageTask):
    metric = "perplexity"

    def __init__(self, config: Config, reviews: Encoded) -> None:
        super().__init__()
        data, training, texts = config.data, config.training, reviews.texts
        self.source = f"{reviews.source} reviews"
        unlabelled = texts["unlabelled"]
        kept = len(unlabelled) - data.held_out
        if kept < 1:
            raise ExperimentError(
                f"expected fewer reviews held out than the {len(unlabelled):,} unlabelled ones, got {data.held_out:,}: "
                "lower --data.held_out"
            )
        train = np.concatenate([end_to_end(texts["train"]), end_to_end(unlabelled, slice(kept))])
        validation, test = end_to_end(texts["validation"]), end_to_end(unlabelled, slice(kept, None))
        self.train = Windows(train, training.batch_size, training.window)
        self.validation = Streams(validation[: data.validation_words], train, data.streams, data.warm_up)
        self.test = Streams(test, train, data.streams, data.warm_up)
        self.model = network(config.model, reviews)
        if config.model.kind == "lmu":
            self.model.calibrate(self.train.spread())


def encoded_reviews(data: Data, data_dir: Path | None) -> Encoded:
    """Every review as numbers, by a vocabulary in which no test text has a part."""
    return encoded(
        "imdb-unlabelled",
        lambda: imdb(data_dir, unlabelled=True),
        lambda: imdb_files(data_dir, unlabelled=True),
        vocabulary={"largest": data.vocabulary},
        learnt_from=("train", "unlabelled"),
        examples=data.examples,
        vectors=data.vectors,
        data_dir=data_dir,
    )


def end_to_end(texts: Texts, which: slice = slice(None)) -> np.ndarray:
    """These texts as one, an end symbol behind each."""
    first, last, _ = which.indices(len(texts))
    begin, end = texts.offsets[first], texts.offsets[last]
    return np.insert(texts.ids[begin:end], texts.offsets[first + 1 : last + 1] - begin, END)


def network(config: Model, reviews: Encoded) -> LanguageModel:
    """The language model, with its vocabulary's digest beside the weights."""
    if reviews.vectors is not None and reviews.vectors.shape[1] != config.width:
        raise ExperimentError(
            f"the word vectors are {reviews.vectors.shape[1]} wide, and the network reads {config.width}: "
            f"set --model.width {reviews.vectors.shape[1]}, or choose other --data.vectors"
        )
    words, size = reviews.vocabulary.size, config.channels

    def layer(block: int) -> RecurrentLayer:
        options: dict[str, Any] = {}
        if config.kind == "lmu":
            options = {"order": config.order, "theta": config.theta * config.growth**block}
        elif config.kind == "gilr-lstm":
            options = {"forget_bias": 1.0}  # 5, as for long sequences, is a time scale of 150 words
        return layer_of(config.kind, size, size, **options)

    # Of variance one, which all kinds learn from sooner; a tied softmax would start with scores as large.
    drawn = None if config.tied else torch.randn(words, config.width)
    vectors = drawn if reviews.vectors is None else reviews.vectors
    cutoffs = [cutoff for cutoff in config.cutoffs if cutoff < words]
    model = LanguageModel(
        Embedding(words, config.width, vectors=vectors, dropout=config.word_dropout),
        [layer(block) for block in range(config.blocks)],
        hidden_size=size,
        dense=config.kind != "lmu",  # an LMU reads its memory with a dense layer of its own
        highways=config.highways,
        tied=config.tied,
        output=adaptive_softmax(cutoffs) if cutoffs else None,
        dropout=config.dropout,
    )
    model.vocabulary = Fingerprint(reviews.vocabulary)
    return model
