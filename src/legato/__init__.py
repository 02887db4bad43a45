"""Linear recurrent networks: trained in parallel over time, run one step at a time."""

from legato.layers import LMU, LegendreMemory, RecurrentLMU
from legato.legendre import delay_network, window_decoder
from legato.ops.lti import lti

__all__ = [
    "LMU",
    "LegendreMemory",
    "RecurrentLMU",
    "delay_network",
    "lti",
    "window_decoder",
]

__version__ = "0.1.0"
