"""Linear recurrent networks: trained in parallel over time, run one step at a time."""

from legato import models  # noqa: F401 - so that legato.models works after import legato
from legato.layers import (
    GILR,
    GILRLSTM,
    LMU,
    LRU,
    QRNN,
    SRU,
    Bidirectional,
    Highway,
    LegendreMemory,
    LinearRNN,
    LinearSurrogate,
    MinGRU,
    MinLSTM,
    RecurrentLayer,
    RecurrentLMU,
    Stack,
    StronglyTypedRNN,
    in_segments,
    spread_time_scales,
)
from legato.legendre import delay_network, window_decoder
from legato.ops import linear_recurrence, lti, matrix_recurrence
from legato.ops.backends import explain, use_backend

__version__ = "0.1.0"
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
    "delay_network",
    "explain",
    "in_segments",
    "linear_recurrence",
    "lti",
    "matrix_recurrence",
    "spread_time_scales",
    "use_backend",
    "window_decoder",
]

# Pickles, error messages and the documentation then name what a user imports.
for _name in __all__:
    globals()[_name].__module__ = __name__
