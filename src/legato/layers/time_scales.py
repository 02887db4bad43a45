"""Initial gate biases for long memories: time scales spread over a range of steps."""

import math

import torch

from legato._checks import check_floating, check_tensor, real_number
from legato._shapes import Float, Tensor


@torch.no_grad()
def spread_time_scales(
    bias: Float[Tensor, "C"], shortest: float | int, longest: float | int, *, shuffle: bool = False
) -> Float[Tensor, "C"]:
    """bias_i = log(f_i / (1 - f_i)), f_i = exp(-1 / tau_i), log tau_i evenly spaced.

    tau_i goes from ``shortest`` to ``longest``. With this bias and no other input, a sigmoid forget
    gate is f_i: the state of unit i decays to 1/e in tau_i steps.

    Args:
        bias: of the forget gates, (channels,); changed in place. It may be a view of a part of a
            layer's bias.
        shortest, longest: the range of time constants, in steps, above zero. For a task whose
            longest dependency is T steps, T is a good ``longest``.
        shuffle: assign the time scales to the units in random order, in place of increasing order.

    Returns:
        The bias.

    Raises:
        TypeError: the bias is not a floating tensor.
        ValueError: the range is not 0 < shortest <= longest, or the bias has more than one axis.

    Example:
        >>> spread_time_scales(torch.empty(3), 1, 100).sigmoid().log().neg().reciprocal()
        tensor([  1.0000,  10.0000, 100.0000])

    Source: Tallec & Ollivier 2018, "Can recurrent neural networks warp time?" (chrono
    initialisation), which draws tau uniformly and takes f = 1 - 1 / tau. Ours: even spacing of
    log tau, so that short and long time scales have equally many units.
    """
    shortest, longest = real_number(shortest, "shortest"), real_number(longest, "longest")
    if not 0 < shortest <= longest:
        raise ValueError(f"expected time scales with 0 < shortest <= longest, got {shortest} and {longest} steps")
    check_tensor("bias", bias)
    check_floating("bias", bias)
    if bias.ndim != 1:
        raise ValueError(
            f"expected bias of shape (channels,), got {tuple(bias.shape)}: pass the bias of the forget gates"
        )
    # On the CPU, whatever torch's default device is: copy_ moves the result to the bias.
    ends = math.log10(shortest), math.log10(longest)
    taus = torch.logspace(*ends, bias.numel(), dtype=torch.float64, device="cpu")
    if shuffle:
        taus = taus[torch.randperm(len(taus), device="cpu")]
    # log f - log(1 - f), without loss of digits where f is close to one.
    return bias.copy_(-1 / taus - torch.expm1(-1 / taus).neg().log())
