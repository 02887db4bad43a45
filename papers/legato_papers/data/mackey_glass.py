"""The Mackey-Glass series of the Legendre Memory Unit papers: a chaotic delay equation, generated in a second.

Next: ``recipes/mackey_glass.py`` trains on it.
"""

from typing import NamedTuple

import numpy as np
import torch

from legato._shapes import Float, Tensor

_STEPS_PER_UNIT = 10  # Euler steps in a unit of time; one sample is kept per unit
_WASHOUT = 100  # samples dropped from the beginning of every series


class Series(NamedTuple):
    """``targets[:, t]`` is the input ``ahead`` steps after ``inputs[:, t]``; ``warm_up`` came before. All float32."""

    inputs: Float[Tensor, "B T 1"]
    targets: Float[Tensor, "B T 1"]
    warm_up: Float[Tensor, "B W 1"]


def mackey_glass(series: int = 128, steps: int = 5000, *, ahead: int = 15, tau: int = 17, seed: int = 0) -> Series:
    """x' = 0.2 x(t - tau) / (1 + x(t - tau)^10) - 0.1 x, squashed by tanh(x - 1), its mean over all series removed.

    Args:
        series: how many. The running value of one is carried on into the next.
        steps: length of each, in units of time.
        ahead: how far the targets lie in the future, in steps.
        tau: delay of the equation, in units of time; chaotic from about 17.
        seed: of the random histories 1.2 + 0.2 (U[0, 1] - 0.5) that every series begins with.

    Returns:
        Series: ``inputs`` and ``targets``, (series, steps, 1), and ``warm_up``, the 100 dropped points before them.

    Raises:
        ValueError: a size is not positive, or ``ahead`` is negative.

    Example:
        >>> inputs, targets, warm_up = mackey_glass(series=2, steps=100)
        >>> inputs.shape
        torch.Size([2, 100, 1])

    Source:
        Voelker, Kajic & Eliasmith 2019 (data), as corrected for Chilkuri & Eliasmith 2021: the task is to predict.
    """
    if series < 1 or steps < 1 or tau < 1 or ahead < 0:
        raise ValueError(
            f"series, steps and tau must be at least 1 and ahead at least 0, "
            f"got series={series}, steps={steps}, tau={tau}, ahead={ahead}"
        )
    samples = np.tanh(_integrate(series, _WASHOUT + steps + ahead, tau, seed) - 1)
    samples -= samples[:, _WASHOUT:].mean()
    wave = torch.from_numpy(samples.astype(np.float32)).unsqueeze(-1)
    return Series(wave[:, _WASHOUT : -ahead or None], wave[:, _WASHOUT + ahead :], wave[:, :_WASHOUT])


def _integrate(series: int, samples: int, tau: int, seed: int) -> np.ndarray:
    """The raw series (series, samples) by Euler's method. Each begins where the one before ended."""
    random = np.random.RandomState(seed)
    delay = tau * _STEPS_PER_UNIT
    end = delay + samples * _STEPS_PER_UNIT
    out = np.empty((series, samples))
    x = 1.2
    for row in out:
        # The path grows while it is read: the reader is always `delay` steps behind the writer.
        path = (1.2 + 0.2 * (random.rand(delay) - 0.5)).tolist()
        append = path.append
        for past in path:
            append(x)
            if len(path) > end:
                break
            x += (0.2 * past / (1.0 + past**10) - 0.1 * x) / _STEPS_PER_UNIT
        row[:] = path[delay + _STEPS_PER_UNIT :: _STEPS_PER_UNIT]
    return out
