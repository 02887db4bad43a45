"""SNLI: whether one sentence follows from another (Chilkuri & Eliasmith 2021): 3,603 parameters beside the vectors."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..data.snli import snli, snli_files
from ..task import Paper, Preset, Reported
from . import _classification
from ._classification import Classification, Data, FineTuning, Model, numbers

PAPER = Paper(
    metric="accuracy",
    reported=Reported(78.85, "Chilkuri & Eliasmith 2021", verified=True),
    parameters="3.6k",
    unit=" %",
    scale=100.0,
    digits=2,
    data="snli",
    baselines={"LSTM": Reported(77.6, "Bowman et al. 2015, '100D LSTM encoders'", verified=True)},
    kinds={"lstm": "LSTM"},
    labels={"accuracy": "delay network of order 1, here"},
)
PRESETS = {
    "smoke": Preset(
        "a few real examples, in seconds, with drawn word vectors",
        {
            "data.examples": 200,
            "data.vectors": None,
            "model.units": 8,
            "training.epochs": 1,
            "training.batch_size": 20,
        },
    ),
}


@dataclass
class Config(_classification.Config):
    """SNLI: entailment, neutral or contradiction, from two sentences' word vectors by a delay network of order 1."""

    data: Data = field(default_factory=lambda: Data(longest=50, truncate="back", words_of="all", least_count=1))
    model: Model = field(default_factory=lambda: Model(units=128))
    training: FineTuning = field(
        default_factory=lambda: FineTuning(epochs=12, batch_size=64, learning_rate=2e-3, vector_rate=3.0, warmup=0.1)
    )


def build(config: Config, seed: int, data_dir: Path | None = None) -> Classification:
    """The task of this configuration, its weights drawn by ``seed``.

    Raises:
        ExperimentError: a data file is missing or not whole; the vectors have another width than the network.
    """
    data = numbers(config, "snli", lambda: snli(data_dir), lambda: snli_files(data_dir), data_dir)
    torch.manual_seed(seed)
    return Classification(config, data, classes=3)
