"""text8 at a size for one GPU, in the paper's form: five blocks with three highways each, aiming at its 1.61.

    legato-papers train text8-large --precision bf16-mixed

Meant to take under nine minutes on an H200; not measured yet. Task and network are those of ``text8.py``.
"""

from dataclasses import dataclass, field

from ..kinds import Kind
from ..language import Reading
from . import text8
from .text8 import PAPER, SMOKE, Model, build

__all__ = ["PAPER", "SMOKE", "Config", "build"]


@dataclass
class LargeModel(Model):
    """The network, as in ``text8``: 18.7 million parameters."""

    kind: Kind = "lmu"
    channels: int | None = 512
    units: int | None = 512
    blocks: int | None = 5
    highways: int | None = 3
    order: int = 5


@dataclass
class LongReading(Reading):
    """Trained as in ``text8``: 461 million characters, five times the text, in windows of 180 as in the paper."""

    epochs: int = 20
    updates_per_epoch: int | None = 500
    batch_size: int = 256
    learning_rate: float = 4e-3
    window: int = 180


@dataclass
class Config(text8.Config):
    """text8 at a size for a GPU: the next of 27 characters of Wikipedia.

    ``training.learning_rate`` is as in ``text8``: an lmu takes half of it.
    """

    model: LargeModel = field(default_factory=LargeModel)
    training: LongReading = field(default_factory=LongReading)
