"""Networks of the papers that few others need: translation with attention, pairs of sequences, adaptive softmax."""

from .adaptive_softmax import AdaptiveSoftmax, adaptive_softmax
from .pair import PairClassifier
from .translator import Decoded, Encoded, Translator

__all__ = ["AdaptiveSoftmax", "Decoded", "Encoded", "PairClassifier", "Translator", "adaptive_softmax"]
