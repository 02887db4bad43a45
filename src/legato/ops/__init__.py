"""The recurrences: diagonal (``recurrence.py``), time-invariant (``lti.py``), square matrices (``matrix.py``)."""

from legato.ops.lti import lti
from legato.ops.matrix import matrix_recurrence
from legato.ops.recurrence import linear_recurrence

__all__ = ["linear_recurrence", "lti", "matrix_recurrence"]
