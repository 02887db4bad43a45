"""Whole networks: recurrent layers with what stands before and behind them. Each takes any layer of the library.

``embedding.py`` turns tokens into vectors, ``sequence.py`` reads one sequence, ``pair.py`` compares two,
``language.py`` says what comes next, ``translator.py`` what it is in another language.
"""

from .embedding import Embedding, LockedDropout
from .language import LanguageModel
from .pair import PairClassifier
from .sequence import SequenceClassifier, SequenceRegressor
from .translator import Translator

__all__ = [
    "Embedding",
    "LanguageModel",
    "LockedDropout",
    "PairClassifier",
    "SequenceClassifier",
    "SequenceRegressor",
    "Translator",
]
