"""The shape alphabet for the signatures of the library.

    B batch     T time     C channels     N order of a memory     *channels any number of axes

A signature reads ``impulse: Inexact[Tensor, "B T *channels"]``; the test run checks them (jaxtyping + beartype).
"""

from jaxtyping import Bool, Complex, Float, Inexact, Shaped
from jaxtyping import Integer as Int  # signed or not
from torch import Tensor

__all__ = ["Bool", "Complex", "Float", "Inexact", "Int", "Shaped", "Tensor"]
