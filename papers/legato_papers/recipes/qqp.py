"""QQP: whether two questions ask the same (Chilkuri & Eliasmith 2021): 1,201 parameters beside the word vectors."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..data.qqp import qqp, qqp_files
from ..task import Paper, Preset, Reported
from . import _classification
from ._classification import Classification, Data, FineTuning, Model, numbers

PAPER = Paper(
    metric="accuracy",
    reported=Reported(86.95, "Chilkuri & Eliasmith 2021", verified=True),
    parameters="1,201",
    unit=" %",
    scale=100.0,
    digits=2,
    data="qqp",
    baselines={"LSTM": Reported(82.58, "Chilkuri & Eliasmith 2021", verified=False)},
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
    """QQP: whether two questions ask the same, from their word vectors by a delay network of order 1."""

    data: Data = field(default_factory=lambda: Data(longest=50, truncate="back", words_of="all", least_count=1))
    model: Model = field(default_factory=lambda: Model(units=320))
    training: FineTuning = field(
        default_factory=lambda: FineTuning(epochs=6, batch_size=64, learning_rate=2e-3, vector_rate=0.25)
    )


def build(config: Config, seed: int, data_dir: Path | None = None) -> Classification:
    """The task of this configuration, its weights drawn by ``seed``.

    Raises:
        ExperimentError: a data file is missing or not whole; the vectors have another width than the network.
    """
    data = numbers(config, "qqp", lambda: qqp(data_dir), lambda: qqp_files(data_dir), data_dir)
    torch.manual_seed(seed)
    return Classification(config, data, classes=2)
