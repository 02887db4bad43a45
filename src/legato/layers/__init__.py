"""Layers of one contract, ``layer(x, state) -> (output, state)``; ``_base.py`` states it and says how to add one."""

from legato.layers.legendre_memory import LegendreMemory
from legato.layers.lmu import LMU
from legato.layers.recurrent_lmu import RecurrentLMU

__all__ = [
    "LMU",
    "LegendreMemory",
    "RecurrentLMU",
]
