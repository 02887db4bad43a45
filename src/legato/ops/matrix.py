"""The recurrence with square matrices, constant or one per time step, in plain torch.

    h_t = A_t h_{t-1} + x_t

Where A_t is diagonal use ``linear_recurrence``; where A is constant and x_t = B u_t use ``lti``, which never builds x.
"""

import torch
import torch.nn.functional as F

from legato import _dtypes
from legato._checks import check_device, check_initial_state, check_numbers, check_reset
from legato._dtypes import without_autocast
from legato._shapes import Bool, Inexact, Tensor
from legato._values import examinable, in_range

# Steps per chunk. About 2 * 16 * log16(T) batched matrix products are computed in sequence; each
# batch has up to T / 16 products.
_CHUNK = 16


def matrix_recurrence(
    transition: Inexact[Tensor, "*steps N N"],
    impulse: Inexact[Tensor, "B T *channels N"],
    initial_state: Inexact[Tensor, "B *channels N"] | None = None,
    *,
    reset: Bool[Tensor, "B T"] | None = None,
    reverse: bool = False,
) -> tuple[Inexact[Tensor, "B T *channels N"], Inexact[Tensor, "B *channels N"]]:
    """h_t = A_t h_{t-1} + x_t for t = 1 .. T, with all chunks of time in parallel.

    Differentiable in transition, impulse and initial_state, to any order, in reverse and forward mode; works under
    vmap, torch.compile(fullgraph=True) and autocast. Cost per step: N^2 for a constant A, N^3 for
    one A per step.

    Args:
        transition: A, (N, N), or A_t, (batch, time, N, N). Stable where its products stay bounded;
            this is not checked.
        impulse: x, (batch, time, *channels, N): each channel has its own state vector, under the
            same A.
        initial_state: h before the first step, (batch, *channels, N); zeros by default.
        reset: True at a step before which the state is reset to zero: h_t = x_t.
        reverse: Compute from the last step to the first: h_t = A_t h_{t+1} + x_t. ``initial_state``
            is then the state before step T, and ``reset`` resets the state that comes from step t +
            1.

    Returns:
        The states h_t in the common dtype of transition and impulse, and the state after the last
        step that was computed, in the dtype of the carry: the common dtype, but at least 32 bits
            wide.

    Raises:
        TypeError: an argument is not a tensor, or not of a floating, complex or (reset) boolean dtype.
        ValueError: shapes or devices do not match.

    Example:
        >>> import torch, legato
        >>> quarter_turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
        >>> states, last = legato.matrix_recurrence(quarter_turn, torch.zeros(1, 3, 2), torch.tensor([[1.0, 1.0]]))
        >>> last.tolist()
        [[1.0, -1.0]]

    Source: Martin & Cundy (2018), section 2.2: reduce the chunks, scan the reduced states, then
    compute each chunk.
    """
    _check(transition, impulse, initial_state, reset)
    dtype = torch.promote_types(transition.dtype, impulse.dtype)
    carry_dtype = _dtypes.carry_dtype(dtype)
    state_shape = (impulse.shape[0], *impulse.shape[2:])
    h = impulse.new_zeros(state_shape) if initial_state is None else initial_state
    h = h.to(carry_dtype)
    if impulse.shape[1] == 0:
        return impulse.to(dtype, copy=True), h.clone()
    A, x = transition.to(carry_dtype), impulse.to(carry_dtype)
    x, h = x.unsqueeze(2).flatten(2, -2), h.unsqueeze(1).flatten(1, -2)  # (B, T, M, N), (B, M, N)
    if reverse:
        A, x = A.flip(1) if A.ndim == 4 else A, x.flip(1)
        reset = None if reset is None else reset.flip(1)
    with without_autocast(impulse):
        states = _scan(A, x, h, reset)
    final_state = states[:, -1].reshape(state_shape).clone()
    states = states.flip(1) if reverse else states
    return states.reshape(impulse.shape).to(dtype), final_state


def _check(transition: Tensor, impulse: Tensor, initial_state: Tensor | None, reset: Tensor | None) -> None:
    check_numbers(transition=transition, impulse=impulse, initial_state=initial_state)
    check_device("transition", transition, "impulse", impulse)
    if impulse.ndim < 3:
        raise ValueError(f"impulse must be (batch, time, *channels, N), got shape {tuple(impulse.shape)}: add the axes")
    B, T, N = impulse.shape[0], impulse.shape[1], impulse.shape[-1]
    if tuple(transition.shape) not in ((N, N), (B, T, N, N)):
        raise ValueError(
            f"transition must be (N, N) = {(N, N)} or (batch, time, N, N) = {(B, T, N, N)} for this impulse,"
            f" got {tuple(transition.shape)}: the last axis of the impulse is N"
        )
    state_shape = (B, *impulse.shape[2:])
    check_initial_state(initial_state, "(batch, *channels, N)", state_shape, impulse=impulse, transition=transition)
    check_reset(reset, "impulse", impulse)


def _scan(A: Tensor, x: Tensor, h: Tensor, reset: Tensor | None) -> Tensor:
    """All states, from A (N, N) or (B, T, N, N), x (B, T, M, N), h (B, M, N) and reset (B, T)."""
    T, M, N = x.shape[1:]
    if T <= _CHUNK:
        # Compiled code pads to a full chunk, so that one graph serves every short length.
        missing = _CHUNK - T if torch.compiler.is_compiling() else 0
        A = _pad(A, missing) if A.ndim == 4 else A
        return _steps(A, _pad(x, missing), h, None if reset is None else _pad(reset, missing))[:, :T]
    arguments = A, x, h, reset
    x, reset = _chunks(x), None if reset is None else _chunks(reset)  # (B, K, L, M, N), (B, K, L)
    zeros = torch.zeros_like(x[:, :, 0])
    if A.ndim == 4:
        # The transposed products A_1^T, A_1^T A_2^T, ... follow the same recurrence: N more rows
        # that start from the identity.
        identity = torch.eye(N, dtype=x.dtype, device=x.device).expand(*x.shape[:2], N, N)
        start = torch.cat([zeros, identity], 2)  # (B, K, M + N, N)
        local, products = _steps(_chunks(A), F.pad(x, (0, 0, 0, N)), start, reset).split([M, N], -2)
        across = products[:, :-1, -1].mT
        # A product that overflows is still out of range at the end of its chunk, unless a reset
        # follows it.
        checked = products[:, :, -1] if reset is None else products
    else:
        local, products = _steps(A, x, zeros, reset), _powers(A.mT)  # (B, K, L, M, N), (L, N, N)
        across = products[-1].mT
        checked = products
    if examinable(checked) and not in_range(checked):
        return _steps(*arguments)
    # Only the last chunk is padded, and no chunk reads its final state, so padding never affects a
    # state.
    has_reset = None if reset is None else reset[:, :-1].any(-1)
    entering = torch.cat([h.unsqueeze(1), _scan(across, local[:, :-1, -1], h, has_reset)], 1)  # (B, K, M, N)
    after_reset = None if reset is None else (reset.cumsum(-1) > 0)[..., None, None]  # (B, K, L, 1, 1)
    # The state is masked before the product. Otherwise a NaN that a reset removes would return
    # through the gradient of the product.
    if A.ndim == 4:
        entering = entering.unsqueeze(2)
        arriving = (entering if after_reset is None else entering.masked_fill(after_reset, 0)) @ products
    else:
        # A state that is reset later in the chunk is multiplied by A in the sequential loop too.
        entering = entering if after_reset is None else entering.masked_fill(after_reset[:, :, 0], 0)
        arriving = torch.einsum("bkmi,lij->bklmj", entering, products)
        arriving = arriving if after_reset is None else arriving.masked_fill(after_reset, 0)
    return (local + arriving).flatten(1, 2)[:, :T]


def _steps(A: Tensor, x: Tensor, h: Tensor, reset: Tensor | None) -> Tensor:
    """The definition: a loop over time steps, along the third axis of x from the end."""
    states = []
    for t, x_t in enumerate(x.unbind(-3)):
        if reset is not None:
            h = h.masked_fill(reset[..., t, None, None], 0)
        h = h @ (A if A.ndim == 2 else A.select(-3, t)).mT + x_t
        states.append(h)
    return torch.stack(states, -3)


def _powers(A: Tensor) -> Tensor:
    """A, A^2, .., A^L by doubling, (L, N, N)."""
    powers = A.unsqueeze(0)
    while powers.shape[0] < _CHUNK:
        powers = torch.cat([powers, powers @ powers[-1]])
    return powers


def _chunks(x: Tensor) -> Tensor:
    """(B, T, ...) -> (B, K, L, ...), padded with zeros at the end."""
    return _pad(x, -x.shape[1] % _CHUNK).unflatten(1, (-1, _CHUNK))


def _pad(x: Tensor, missing: int) -> Tensor:
    return F.pad(x, (0, 0) * (x.ndim - 2) + (0, missing))
