"""The recurrence run serially over time: what benchmarks hold the parallel kernels against.

Both are contexts, inside which every ``linear_recurrence`` runs so, its derivatives included.
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
    """A loop over time of PyTorch operations, one a step: what one writes without a kernel."""
    # Gated units have no kernel of this backend: their definition runs, which is a linear_recurrence.
    register("loop", SimpleNamespace(forward=_forward))
    with use_backend("loop"):
        yield


@contextmanager
def swept(device: torch.device) -> Iterator[None]:
    """One sweep over time by our own kernel: on the CPU in one thread, on CUDA with one thread a feature.

    On CUDA that is the paper's serial kernel. On the CPU our kernel always sweeps over time, features side by side in
    vectors, and threads share batch and features: what remains to be taken away is the threads.
    """
    if device.type == "cuda":
        from legato.ops.kernels import triton_recurrence

        uncut = triton_recurrence.TUNING._replace(few_programs=0)  # no shape is cut into chunks of time
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
    """As ``kernels.reference.forward``, at less than half its time: no resets, one dtype, a decay for every step."""
    if reset is not None:
        raise ValueError("expected no reset, got one: the loop of the benchmarks has none")
    h = impulse.new_zeros(impulse.shape[0], *impulse.shape[2:]) if initial_state is None else initial_state
    states, steps = [], list(zip(decay.unbind(1), impulse.unbind(1), strict=True))
    for a, x in reversed(steps) if reverse else steps:
        h = torch.addcmul(x, a, h)
        states.append(h)
    return torch.stack(states[::-1] if reverse else states, 1), h.clone()
