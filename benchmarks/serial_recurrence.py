"""The recurrence computed serially over time, for comparison with the parallel kernels.

Both functions are contexts. Inside, every ``linear_recurrence`` and its derivatives are serial.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import torch

from legato._shapes import Bool, Inexact, Tensor
from legato.ops.backends import register, use_backend

LOOP = "a loop of PyTorch operations over time"
SWEEP = {"cpu": "our compiled kernel in one thread", "cuda": "our compiled kernel in one pass over time"}


@contextmanager
def looped() -> Iterator[None]:
    """A loop over time with one PyTorch operation per step, as written without a kernel."""
    # This backend has no kernel for gated units: they compute their definition by
    # linear_recurrence.
    register("loop", SimpleNamespace(forward=_forward))
    with use_backend("loop"):
        yield


@contextmanager
def swept(device: torch.device) -> Iterator[None]:
    """One pass over time by our own kernel: one thread on the CPU, one per feature on CUDA.

    On CUDA that is the serial kernel of the paper. On the CPU our kernel always runs serially over
    time, with features in vectors and with threads over batch and features, so this uses a single
    thread.
    """
    if device.type == "cuda":
        from legato.ops.kernels import triton_recurrence

        uncut = triton_recurrence.TUNING._replace(few_programs=0)  # no shape is divided into chunks of time
        passes = {name: partial(getattr(triton_recurrence, name), tuning=uncut) for name in ("forward", "backward")}
        register("sweep", SimpleNamespace(**passes))
        with use_backend("sweep"):
            yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _forward(
    decay: Inexact[Tensor, "Bd T Hd Dd"],
    impulse: Inexact[Tensor, "B T H D"],
    initial_state: Inexact[Tensor, "B H D"] | None,
    reset: Bool[Tensor, "B T"] | None,
    reverse: bool,
) -> tuple[Inexact[Tensor, "B T H D"], Inexact[Tensor, "B H D"]]:
    """As ``kernels.reference.forward``, over twice as fast: no resets, one dtype, all decays."""
    if reset is not None:
        raise ValueError("expected no reset, got one: the loop of the benchmarks has none")
    h = impulse.new_zeros(impulse.shape[0], *impulse.shape[2:]) if initial_state is None else initial_state
    states, steps = [], list(zip(decay.unbind(1), impulse.unbind(1), strict=True))
    for a, x in reversed(steps) if reverse else steps:
        h = torch.addcmul(x, a, h)
        states.append(h)
    return torch.stack(states[::-1] if reverse else states, 1), h.clone()
