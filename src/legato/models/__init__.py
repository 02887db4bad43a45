"""Whole networks: recurrent layers with what stands before and behind them. Each takes any layer of the library.

``embedding.py`` turns tokens into vectors, ``sequence.py`` reads one sequence, ``pair.py`` compares two,
``language.py`` says what comes next.
"""

from .embedding import Embedding, LockedDropout
from .language import LanguageModel
from .pair import PairClassifier
from .sequence import SequenceClassifier, SequenceRegressor

__all__ = ["Embedding", "LanguageModel", "LockedDropout", "PairClassifier", "SequenceClassifier", "SequenceRegressor"]
