"""The recurrences: diagonal (``recurrence.py``), time-invariant (``time_invariant.py``), matrices (``matrix.py``)."""

from legato.ops.matrix import matrix_recurrence
from legato.ops.recurrence import linear_recurrence
from legato.ops.time_invariant import lti

__all__ = ["linear_recurrence", "lti", "matrix_recurrence"]
