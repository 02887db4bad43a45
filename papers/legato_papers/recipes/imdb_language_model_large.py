"""The language model on IMDB's reviews at the paper's 34 million parameters, for one GPU.

    legato-papers train imdb-language-model-large --precision bf16-mixed
    legato-papers train imdb-pretrained-large --precision bf16-mixed

Not measured yet. Task and network are those of ``imdb_language_model.py``.
"""

from dataclasses import dataclass, field, replace

from ..kinds import Kind
from ..language import Reading
from . import imdb_language_model
from .imdb_language_model import SMOKE, Data, Model, build

PAPER = replace(imdb_language_model.PAPER, reported=replace(imdb_language_model.PAPER.reported, value=30_000.0))
__all__ = ["PAPER", "SMOKE", "Config", "LargeData", "LargeModel", "build"]


@dataclass
class LargeData(Data):
    """The reviews as one long text of words, as in ``imdb_language_model``, of a larger vocabulary."""

    vocabulary: int = 30_000
    streams: int = 256


@dataclass
class LargeModel(Model):
    """The network, as in ``imdb_language_model``: 34 million parameters, 12 of them in word vectors."""

    kind: Kind = "lmu"
    width: int = 400
    channels: int = 512
    blocks: int = 5
    highways: int = 3
    order: int = 5
    theta: float = 10.0
    growth: float = 1.0
    cutoffs: list[int] = field(default_factory=lambda: [4000, 12000])
    dropout: float = 0.1
    word_dropout: float = 0.05


@dataclass
class LongReading(Reading):
    """Trained as in ``imdb_language_model``: about 20 times all reviews."""

    epochs: int = 20
    updates_per_epoch: int | None = 1000
    batch_size: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    window: int = 140


@dataclass
class Config(imdb_language_model.Config):
    """A language model of 34 million parameters on IMDB's reviews without the test texts, for a GPU."""

    data: LargeData = field(default_factory=LargeData)
    model: LargeModel = field(default_factory=LargeModel)
    training: LongReading = field(default_factory=LongReading)
