"""IMDB: whether a review is positive (Chilkuri & Eliasmith 2021): 301 parameters beside the word vectors."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..data.imdb import imdb, imdb_files
from ..task import Paper, Preset, Reported
from . import _classification
from ._classification import Classification, Data, FineTuning, Model, numbers

PAPER = Paper(
    metric="accuracy",
    reported=Reported(89.10, "Chilkuri & Eliasmith 2021", verified=False),
    parameters="301",
    unit=" %",
    scale=100.0,
    digits=2,
    data="IMDB",
    baselines={"LSTM": Reported(87.29, "Chilkuri & Eliasmith 2021", verified=False)},
    kinds={"lstm": "LSTM"},
    labels={"accuracy": "delay network of order 1, here"},
)
PRESETS = {
    "smoke": Preset(
        "a few real examples, in seconds, with drawn word vectors",
        {
            "data.examples": 200,
            "data.vectors": None,
            "data.longest": 100,
            "model.units": 8,
            "training.epochs": 1,
            "training.batch_size": 20,
        },
    ),
}


@dataclass
class Config(_classification.Config):
    """IMDB: whether a film review is positive, from its word vectors by a delay network of order 1.

    The paper's theta is the longest text; 300 words have a lower validation loss, 0.263 for 0.272. AdamW's epsilon
    keeps the vectors of rare words, names of films among them, from moving as fast as those of frequent ones.
    """

    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=lambda: Model(theta=300.0, word_dropout=0.5))
    training: FineTuning = field(
        default_factory=lambda: FineTuning(
            epochs=14,
            batch_size=256,
            learning_rate=0.005,
            vector_rate=1.0,
            epsilon=1e-5,
            warmup=0.1,
            average=0.99,
        )
    )


def build(config: Config, seed: int, data_dir: Path | None = None) -> Classification:
    """The task of this configuration, its weights drawn by ``seed``.

    Raises:
        ExperimentError: a data file is missing or not whole; the vectors have another width than the network.
    """
    data = numbers(config, "imdb", lambda: imdb(data_dir), lambda: imdb_files(data_dir), data_dir)
    torch.manual_seed(seed)
    return Classification(config, data, classes=2)
