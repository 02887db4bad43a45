"""The diagonal recurrence in plain torch, on any device, for machines without numba or triton.

It makes about 2 sqrt(T) torch calls: time is divided into chunks, all chunks are scanned in
parallel, and then the states are carried from chunk to chunk.
"""

import math

import torch

from legato import _dtypes
from legato._shapes import Bool, Inexact, Tensor


def forward(
    decay: Inexact[Tensor, "Bd Td Hd Dd"],
    impulse: Inexact[Tensor, "B T H D"],
    initial_state: Inexact[Tensor, "B H D"] | None,
    reset: Bool[Tensor, "B T"] | None,
    reverse: bool,
    length: int | None = None,
) -> tuple[Inexact[Tensor, "B T H D"], Inexact[Tensor, "B H D"]]:
    """h_t = decay_t * h_{t-1} + impulse_t; the arguments are those of ``reference.forward``.

    ``length`` is the length of a chunk. Where products of decays overflow or underflow it is 1,
    which is a loop over time.
    """
    B, T, H, D = impulse.shape
    carry_dtype = _dtypes.carry_dtype(impulse.dtype)
    carry = impulse.new_zeros((B, H, D), dtype=carry_dtype) if initial_state is None else initial_state
    if T == 0:
        return impulse.clone(), carry.clone()
    length = length or math.isqrt(T - 1) + 1
    time_varies = decay.shape[1] > 1

    def chunked(x: Tensor) -> Tensor:
        """(., T, ...) -> (., chunks, length, ...), with zeros after the end."""
        x = x.flip(1) if reverse else x
        missing = -T % length
        if missing:
            x = torch.cat([x, x.new_zeros((x.shape[0], missing, *x.shape[2:]))], 1)
        return x.unflatten(1, (-1, length))

    x = chunked(impulse.to(carry_dtype))  # (B, K, L, H, D)
    a = chunked(decay.to(carry_dtype)) if time_varies else decay.to(carry_dtype).unsqueeze(1)
    resets = None if reset is None else chunked(reset)[..., None, None]  # (B, K, L, 1, 1)

    states, products = torch.empty_like(x), []
    h, product, after_reset = torch.zeros_like(x[:, :, 0]), torch.ones_like(a[:, :, 0]), []
    for t in range(length):
        a_t = a[:, :, t if time_varies else 0]
        if resets is not None:
            h = h.masked_fill(resets[:, :, t], 0)
            after_reset.append(resets[:, :, t] | after_reset[-1] if after_reset else resets[:, :, t])
        h = torch.addcmul(x[:, :, t], a_t, h)
        product = product * a_t
        states[:, :, t] = h
        products.append(product)
    products = torch.stack(products, 2)  # (Bd, K, L, Hd, Dd)
    if length > 1 and _overflow(decay, products.flatten(1, 2)[:, : T if time_varies else length]):
        return forward(decay, impulse, initial_state, reset, reverse, length=1)
    carries = []  # the state before each chunk; a constant decay has the same product in every chunk
    for k in range(x.shape[1]):
        carries.append(carry)
        arriving = products[:, k if time_varies else 0, -1] * carry
        if resets is not None:
            arriving = arriving.masked_fill(after_reset[-1][:, k], 0)
        carry = states[:, k, -1] + arriving
    arriving = products * torch.stack(carries, 1).unsqueeze(2)
    if resets is not None:
        arriving = arriving.masked_fill(torch.stack(after_reset, 2), 0)
    states = (states + arriving).flatten(1, 2)[:, :T]
    final_state = states[:, -1].clone()
    return (states.flip(1) if reverse else states).to(impulse.dtype).contiguous(), final_state


def _overflow(decay: Tensor, products: Tensor) -> bool:
    """Whether these products could lose a state: one is out of range and a decay is above 1."""
    if decay.numel() == 0 or (decay.is_cuda and torch.cuda.is_current_stream_capturing()):
        return False
    low, high = (decay.abs() if decay.is_complex() else decay).aminmax()
    if low.item() >= -1 and high.item() <= 1:
        return False
    smallest, largest = products.abs().aminmax()
    return not (smallest.item() >= 2**-60 and largest.item() <= 2**60)
