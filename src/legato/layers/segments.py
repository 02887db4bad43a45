"""Long sequences in the memory of a short one: time cut into segments, each computed again in the backward pass."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from legato._shapes import Shaped, Tensor
from legato.layers._base import positive_int


def in_segments(
    layer: Callable[[Tensor, Any], tuple[Tensor, Any]],
    x: Shaped[Tensor, "B T *channels"],
    state: Any = None,
    *,
    steps: int,
    last_only: bool = False,
) -> tuple[Tensor, Any]:
    """(output, state) = layer(x, state), exactly, with gradients through all of it, holding one segment at a time.

    The states between segments are kept, everything inside them is computed again in the backward: for a third more
    time, training memory is that of one segment, plus x, the outputs and one state a segment. Where no gradient is
    asked for, nothing is computed twice.

    Args:
        layer: a recurrent layer, a ``Stack``, or any function of (x, state) to (output, state). It must give the same
            result when called again: dropout inside draws the same numbers both times.
        x: (batch, time, *channels), tokens (batch, time) too.
        state: as the layer takes it.
        steps: of a segment, 1 or more. A segment whose arrays stay under 32 MiB each is also quicker: the allocator
            reuses such blocks, and hands larger ones back to the system.
        last_only: return the output of the last step, (batch, ...), in place of all, (batch, time, ...).

    Returns:
        The output and the state after the last step.

    Raises:
        ValueError: steps is below 1, or last_only is asked of a sequence without steps.

    Example:
        >>> from legato import GILR
        >>> output, state = in_segments(GILR(4, 8), torch.randn(2, 100_000, 4), steps=4096, last_only=True)
        >>> output.shape
        torch.Size([2, 8])

    Source: recomputation as in Chen et al. 2016, "Training deep nets with sublinear memory cost".
    """
    positive_int(steps, "steps")
    if last_only and x.shape[1] == 0:
        raise ValueError("expected at least one step for the last output, got x with none: leave last_only out")
    outputs = []
    for segment in x.split(steps, dim=1):
        if torch.is_grad_enabled() and x.shape[1] > steps:
            output, state = checkpoint(_run, layer, segment, state, last_only, use_reentrant=False)
        else:
            output, state = _run(layer, segment, state, last_only)
        outputs = [output] if last_only else [*outputs, output]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1), state


def _run(layer, segment, state, last_only):
    output, state = layer(segment, state)
    return output[:, -1] if last_only else output, state
