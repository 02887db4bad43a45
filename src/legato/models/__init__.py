"""Whole networks: recurrent layers with what stands before and behind them. Each takes any layer of the library.

``embedding.py`` turns tokens into vectors, ``sequence.py`` reads one sequence, ``pair.py`` compares two.
"""

from .embedding import Embedding, LockedDropout
from .pair import PairClassifier
from .sequence import SequenceClassifier, SequenceRegressor

__all__ = ["Embedding", "LockedDropout", "PairClassifier", "SequenceClassifier", "SequenceRegressor"]
