"""Complete networks around any recurrent layer of the library, with embeddings and output heads.

``embedding.py`` maps tokens to vectors, ``sequence.py`` has a classifier and a regressor of
sequences, ``language.py`` predicts the next token.
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
