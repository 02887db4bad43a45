"""The layers, all called as ``layer(x, state) -> (output, state)``; see ``base.py``."""

from legato.layers.base import RecurrentLayer
from legato.layers.bidirectional import Bidirectional
from legato.layers.gilr import GILR, GILRLSTM
from legato.layers.highway import Highway
from legato.layers.legendre_memory import LegendreMemory
from legato.layers.linear_rnn import LinearRNN
from legato.layers.lmu import LMU
from legato.layers.lru import LRU
from legato.layers.min_rnn import MinGRU, MinLSTM
from legato.layers.qrnn import QRNN
from legato.layers.recurrent_lmu import RecurrentLMU
from legato.layers.segments import in_segments
from legato.layers.sru import SRU
from legato.layers.stack import Stack
from legato.layers.strongly_typed import StronglyTypedRNN
from legato.layers.surrogate import LinearSurrogate
from legato.layers.time_scales import spread_time_scales

__all__ = [
    "GILR",
    "GILRLSTM",
    "LMU",
    "LRU",
    "QRNN",
    "SRU",
    "Bidirectional",
    "Highway",
    "LegendreMemory",
    "LinearRNN",
    "LinearSurrogate",
    "MinGRU",
    "MinLSTM",
    "RecurrentLMU",
    "RecurrentLayer",
    "Stack",
    "StronglyTypedRNN",
    "in_segments",
    "spread_time_scales",
]
