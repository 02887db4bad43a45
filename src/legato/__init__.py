"""Linear recurrent networks: trained in parallel over time, run one step at a time."""

from legato._choices import explain
from legato.layers import LMU, LegendreMemory
from legato.ops import linear_recurrence, lti

__version__ = "0.1.0"
__all__ = ["LMU", "LegendreMemory", "explain", "linear_recurrence", "lti"]
