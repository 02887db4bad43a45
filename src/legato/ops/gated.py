"""The diagonal recurrence behind sigmoid gates, as gated layers use it.

    h_t = f_t * h_{t-1} + w_t * g(candidate_t),  f_t = sigmoid(forget_t),  w_t = 1 - f_t, or sigmoid(write_t)

The definition is ``linear_recurrence`` of decay f_t and impulse w_t g(candidate_t); see ``recurrence.py``.
"""

import torch

from legato._autocast import without_autocast
from legato._shapes import Bool, Float, Tensor
from legato.ops.recurrence import linear_recurrence


def gated_recurrence(
    forget: Float[Tensor, "B T C"],
    candidate: Float[Tensor, "B T C"],
    write: Float[Tensor, "B T C"] | None = None,
    initial_state: Float[Tensor, "B C"] | None = None,
    *,
    squash: bool = False,
    reset: Bool[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B T C"], Float[Tensor, "B C"]]:
    """h_t = f_t h_{t-1} + w_t g(candidate_t), f_t = sigmoid(forget_t), w_t = sigmoid(write_t) or, without it, 1 - f_t.

    Gates are formed in float32 or wider whatever the inputs: in 16 bits a decay above 0.998 rounds to one, and a
    memory of 1,000 steps needs 0.999. 1 - f_t is formed as sigmoid(-forget_t), which keeps its digits near f_t = 1.

    Args:
        forget: the forget gate before its sigmoid, (batch, time, channels).
        candidate: what is written, before g, likewise.
        write: the input gate before its sigmoid; None ties it to the forget gate.
        initial_state: the state before the first step, (batch, channels); zeros by default.
        squash: g is tanh; else g is the identity.
        reset: True where the state is dropped before that step, (batch, time).

    Returns:
        The states, and the state after the last step, both in float32 or wider.

    Raises:
        ValueError: shapes or devices do not fit together.

    Example:
        >>> states, last = gated_recurrence(torch.zeros(1, 3, 1), torch.ones(1, 3, 1))
        >>> states.flatten().tolist()
        [0.5, 0.75, 0.875]

    Source: Martin & Cundy 2018, section 3 (GILR); with ``write``, the cell of their GILR-LSTM.
    """
    dtype = torch.promote_types(candidate.dtype, torch.float32)
    with without_autocast(candidate):
        forget, candidate = forget.to(dtype), candidate.to(dtype)
        decay = forget.sigmoid()
        gate = (-forget if write is None else write.to(dtype)).sigmoid()
        impulse = gate * (candidate.tanh() if squash else candidate)
        return linear_recurrence(decay, impulse, initial_state, reset=reset)
