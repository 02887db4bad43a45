"""IMDB after pre-training at the paper's 34 million parameters, for one GPU, aiming at its 93.20 %.

    legato-papers train imdb-language-model-large --precision bf16-mixed
    legato-papers train imdb-pretrained-large --precision bf16-mixed

Not measured yet. Task and network are those of ``imdb_pretrained.py``.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from . import imdb_language_model_large, imdb_pretrained
from .imdb_language_model_large import LargeModel
from .imdb_pretrained import PAPER, SMOKE, FineTuning, build

__all__ = ["PAPER", "SMOKE", "Config", "build"]


@dataclass
class LargeData(imdb_pretrained.Data):
    """The reviews, as in ``imdb_pretrained``, whole but for the longest."""

    vocabulary: int = imdb_language_model_large.LargeData.vocabulary
    longest: int = 1000


@dataclass
class LongFineTuning(FineTuning):
    """Trained as in ``imdb_pretrained``, longer."""

    epochs: int = 5
    body_rate: float = 0.2
    vector_rate: float = 1.0
    dropout: float = 0.4


@dataclass
class Config(imdb_pretrained.Config):
    """IMDB after pre-training at the paper's size, for a GPU: the sentiment of a review."""

    source: ClassVar[str] = "imdb-language-model-large"

    data: LargeData = field(default_factory=LargeData)
    model: LargeModel = field(default_factory=LargeModel)
    training: LongFineTuning = field(default_factory=LongFineTuning)
