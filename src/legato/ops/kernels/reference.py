"""The diagonal recurrence as a loop over time: the definition that every kernel is tested against.

All kernels take the shapes that ``ops/recurrence.py`` prepares: the impulse (B, T, H, D), with two
channel axes, and the decay (Bd, Td, Hd, Dd), each of whose sizes is 1 or the full size, so that a
broadcast decay is never expanded.
"""

import torch

from legato import _dtypes
from legato._shapes import Bool, Inexact, Tensor


def forward(
    decay: Inexact[Tensor, "Bd Td Hd Dd"],
    impulse: Inexact[Tensor, "B T H D"],
    initial_state: Inexact[Tensor, "B H D"] | None,
    reset: Bool[Tensor, "B T"] | None,
    reverse: bool,
) -> tuple[Inexact[Tensor, "B T H D"], Inexact[Tensor, "B H D"]]:
    """h_t = decay_t * h_{t-1} + impulse_t, with h_{t-1} = 0 where reset_t; reverse: from T to 1.

    The carry h is in float32 for 16-bit inputs. Returns all states in the dtype of the impulse, and
    the last carry.
    """
    carry_dtype = _dtypes.carry_dtype(impulse.dtype)
    B, T, H, D = impulse.shape
    decay = decay.expand(-1, T, -1, -1)
    h = impulse.new_zeros((B, H, D), dtype=carry_dtype) if initial_state is None else initial_state.clone()
    states = torch.empty_like(impulse)
    steps = range(T)
    for t in reversed(steps) if reverse else steps:
        if reset is not None:
            h = h.masked_fill(reset[:, t, None, None], 0)
        h = decay[:, t].to(carry_dtype) * h + impulse[:, t].to(carry_dtype)
        states[:, t] = h.to(impulse.dtype)
    return states, h
