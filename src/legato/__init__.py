"""Linear recurrent networks: trained in parallel over time, run one step at a time."""

from legato._choices import explain
from legato.layers import LMU, LegendreMemory, RecurrentLMU
from legato.legendre import delay_network, window_decoder
from legato.ops import linear_recurrence, lti, matrix_recurrence

__version__ = "0.1.0"
__all__ = [
    "LMU",
    "LegendreMemory",
    "RecurrentLMU",
    "delay_network",
    "explain",
    "linear_recurrence",
    "lti",
    "matrix_recurrence",
    "window_decoder",
]
