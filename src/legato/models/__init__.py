"""Whole networks: recurrent layers with what stands before and behind them. Each takes any layer of the library.

``embedding.py`` turns tokens into vectors, ``sequence.py`` classifies or regresses a sequence, ``language.py`` predicts
the next token.
"""

from .embedding import Embedding, LockedDropout
from .language import LanguageModel
from .sequence import SequenceClassifier, SequenceRegressor

__all__ = [
    "Embedding",
    "LanguageModel",
    "LockedDropout",
    "SequenceClassifier",
    "SequenceRegressor",
]

for _name in __all__:
    globals()[_name].__module__ = __name__
