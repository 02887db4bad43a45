"""m_t = A m_{t-1} + B u_t with constant A and B, for every channel of u: one function per method.

    memory, final_state = lti(u, A, B, state)                        # one call
    system = prepare(A, B, steps, dtype=u.dtype)                     # depends on A and B only: cache it
    memory, final_state = apply(u, system, state, reset=reset)       # depends on u

A layer with frozen A and B calls ``prepare`` once and caches the result. A layer with a trainable
theta calls it in each forward pass, and the gradients of A and B flow through it.
``legato.legendre`` makes A and B of the delay network; ``docs/maths/chunked.md`` derives the
chunked method.
"""

import difflib
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from legato._checks import check_device, check_initial_state, check_numbers, check_reset
from legato._dtypes import real_carry_dtype, without_autocast
from legato._shapes import Bool, Float, Inexact, Tensor
from legato._values import all_finite, examinable, in_range, is_mapped
from legato.ops import backends

METHODS = ("sequential", "toeplitz", "fft", "chunked")


class PreparedSystem(NamedTuple):
    """The tensors that ``prepare`` makes of A and B: factors of the inputs and of the states.

    =============  ========================================  =======================================
    method         inputs                                    powers, of A transposed
    =============  ========================================  =======================================
    "sequential"   B                          (1, N)         A                          (1, N, N)
    "toeplitz"     A^(steps-1) B, ..., A B, B (steps, N)     A, A^2, A^4, ...           (levels, N, N)
    "fft"          the transform of B, A B .. (N, F)         A, A^2, A^4, ...           (levels, N, N)
    "chunked"      see ``_chunk_weights``     (L + N, L N)   A^L, A^(2L), A^(4L), ...   (levels, N, N)
    "last"         as for "toeplitz"          (steps, N)     A, A^2, A^4, ...           (levels, N, N)
    =============  ========================================  =======================================

    Each has a leading C axis if A and B have one. With ``last_only``, ``apply`` returns the last
    state only. That is always so for "last", and for "chunked" and "sequential" where they replace
    it because its powers overflow.
    """

    method: str
    why: str
    steps: int
    inputs: Tensor
    powers: Tensor
    last_only: bool = False


def lti(
    u: Inexact[Tensor, "B T C"],
    A: Float[Tensor, "*channels N N"],
    B: Float[Tensor, "*channels N"],
    initial_state: Inexact[Tensor, "B C N"] | None = None,
    *,
    method: str | None = None,
    last_only: bool = False,
    reset: Bool[Tensor, "B T"] | None = None,
) -> tuple[Inexact[Tensor, "B *time C N"], Inexact[Tensor, "B C N"]]:
    """m_t = A m_{t-1} + B u_t for every channel of u; differentiable in u, A, B and initial_state.

    Args:
        u: inputs (B, T, C), real or complex. For float16 and bfloat16 the carry and the computation
            are in float32, except for the one large product of "chunked" on CUDA. Its factors have
            16 bits and its sums are in float32, unless PyTorch's
            ``allow_bf16_reduced_precision_reduction`` or its float16 equivalent, both on by
            default, let cuBLAS reduce them.
        A: (N, N), or (C, N, N) for one system per channel. Its powers are computed in float64: pass
            it in float64.
        B: (N,), or (C, N).
        initial_state: m before the first step, (B, C, N); zeros when None.
        method: "sequential" (equation 19), "toeplitz" (24), "fft" (26), "chunked"; None chooses by ``choose_method``.
        last_only: compute only m after the last step (25), as one matrix product; ``method`` must
            then be None.
        reset: bool (B, T), True at a step before which the state is reset to zero. Not with "fft".

    Returns:
        memory: (B, T, C, N) in the dtype of u, or (B, C, N) if last_only. It is a view of an array
            (C, B, T, N). From "chunked" on a CPU it is a view of an array (B, T, N, C) if 16
            channels or more use one frozen A, N > 1 and there are no resets.
        final_state: (B, C, N), m after the last step in the dtype of the carry.

    Raises:
        TypeError: an argument is not a tensor, or not of a floating, complex (u and initial_state) or boolean (reset)
            dtype.
        ValueError: shapes or devices do not match, the method is unknown, a method is given
            together with last_only, or "fft" with resets.

    Example:
        >>> A, B = legato.delay_network(order=8, theta=100)
        >>> memory, state = lti(torch.randn(4, 300, 2), A, B)
        >>> more, state = lti(torch.randn(4, 50, 2), A, B, state)

    Source: Chilkuri & Eliasmith 2021, equations (19) to (26); docs/maths/chunked.md derives the
    chunked method.
    """
    _check_input(u)
    system = prepare(A, B, u.shape[1], method=method, last_only=last_only, dtype=u.dtype)
    return apply(u, system, initial_state, reset=reset)


def prepare(
    A: Float[Tensor, "*channels N N"],
    B: Float[Tensor, "*channels N"],
    steps: int,
    *,
    method: str | None = None,
    last_only: bool = False,
    dtype: torch.dtype = torch.float32,
) -> PreparedSystem:
    """The powers of A and the impulse response A^k B that ``apply`` uses, in float64 by doubling.

    The result is valid while A and B do not change; prepare a new one after a move to another
    device or dtype. A system of "sequential" or "chunked" can be applied to inputs of any length;
    "chunked" is fastest up to ``steps`` and for lengths that are a multiple of its chunk. Systems
    of the other methods can be applied to at most ``steps`` steps: prepare a new one if
    ``system.steps < u.shape[1]``.

    Args:
        A, B, method, last_only: as for ``lti``.
        steps: the expected length of the inputs.
        dtype: the dtype of the inputs. A system for 16-bit inputs is in float32; a system for
            complex inputs is real.

    Returns:
        The prepared system, differentiable in A and B.

    Raises:
        TypeError, ValueError: as ``lti``.

    Example:
        >>> system = prepare(*legato.delay_network(8, 100), steps=300)
        >>> memory, state = apply(torch.randn(4, 300, 2), system)
    """
    _check_matrices(A, B)
    if method is not None and last_only:
        raise ValueError(
            f"expected method=None with last_only=True, got {method!r}: drop the method, or use last_only=False"
        )
    if method is not None and method not in METHODS:
        nearest = difflib.get_close_matches(str(method), METHODS, n=1, cutoff=0)
        raise ValueError(
            f"method must be one of {', '.join(METHODS)} or None, got {method!r}: did you mean {nearest[0]!r}?"
        )
    why = "named by the caller"
    if last_only:
        method, why = "last", "last_only=True"
    elif method is None:
        method = choose_method(steps)
        why = "one step" if method == "sequential" else "the fastest measured for sequences"
    carry = real_carry_dtype(dtype)
    with without_autocast(A):
        system = _system_of(method, A, B, steps, carry)
        if not _usable(system, A, B):
            why = f"the powers of A overflow in {method!r}"
            system = _system_of("chunked", A, B, steps, carry)
            if not _usable(system, A, B):
                system = _system_of("sequential", A, B, steps, carry)
        return system._replace(why=why, last_only=last_only)


def apply(
    u: Inexact[Tensor, "B T C"],
    system: PreparedSystem,
    initial_state: Inexact[Tensor, "B C N"] | None = None,
    *,
    reset: Bool[Tensor, "B T"] | None = None,
) -> tuple[Inexact[Tensor, "B *time C N"], Inexact[Tensor, "B C N"]]:
    """``lti`` for a prepared ``system``, with the same arguments, results and errors otherwise."""
    _check_input(u)
    _check_fit(u, system, initial_state, reset)
    if not torch.compiler.is_compiling():
        backends.record("lti", system.method, system.why)
    if u.is_complex():
        return _apply_complex(u, system, initial_state, reset)
    with without_autocast(u):
        carry = system.powers.dtype
        # (C, B, T): with channels first, each method is a plain matrix product.
        narrow = system.method == "chunked" and reset is None and _multiplied_in_16_bits(u)
        rows = (u if narrow else u.to(carry)).permute(2, 0, 1)
        state = None if initial_state is None else initial_state.to(carry).transpose(0, 1)
        if state is not None and reset is not None and reset.shape[1] > 0:
            # Reset before any product: otherwise its gradient by A is 0 times a state that is not
            # finite.
            state = torch.where(reset[:, :1], 0, state)
        if u.numel() == 0:
            memory, final_state = _empty_result(rows, system, state)
        elif _channels_last(u, system, reset):
            memory, final_state = _chunked_channels_last(rows.permute(1, 2, 0), system, state)
            return memory.to(u.dtype).mT, final_state.transpose(0, 1)
        else:
            memory, final_state = _APPLY[system.method](rows, system, state, reset)
        final_state = final_state.transpose(0, 1)
        if system.last_only:
            return final_state.to(u.dtype, copy=True), final_state
        return memory.to(u.dtype).permute(1, 2, 0, 3), final_state


def choose_method(steps: int) -> str:
    """The fastest method in the benchmark ``lti``; see docs/maths/chunked.md."""
    return "sequential" if steps <= 1 else "chunked"


def chunk_length(steps: int) -> int:
    """L of the chunked method: near 32 and a divisor of ``steps``, else a power of 2 up to 32."""
    best = 32
    # Padding to full chunks costs a copy of the gradient. A compiled graph must not depend on the
    # divisors of its length.
    if not torch.compiler.is_compiling():
        for length in sorted(range(best // 2, 2 * best + 1), key=lambda length: abs(length - best)):
            if steps % length == 0:
                return length
    while best // 2 >= steps and best > 1:
        best //= 2
    return best


def _system_of(method: str, A: Tensor, B: Tensor, steps: int, carry: torch.dtype) -> PreparedSystem:
    inputs, powers = _PREPARE[method](A.double().mT, B.double(), max(steps, 1), carry)
    spectrum = torch.complex64 if carry == torch.float32 else torch.complex128
    return PreparedSystem(method, "", steps, inputs.to(spectrum if method == "fft" else carry), powers.to(carry))


def _usable(system: PreparedSystem, A: Tensor, B: Tensor) -> bool:
    """Whether products with the system are finite if the loop is; True if it cannot be tested."""
    if system.method == "sequential" or not examinable(system.inputs):
        return True
    # The inputs of "chunked" contain A^L, and its higher powers are computed only until one
    # overflows.
    fits = in_range(system.inputs) and (system.method == "chunked" or in_range(system.powers))
    # Where A or B is not finite, the loop is not finite either.
    return fits or not (all_finite(A) and all_finite(B))


# Preparation, one function per method, from the transpose of A, (..., N, N), and B, (..., N), in
# float64.


def _prepare_sequential(A: Tensor, B: Tensor, steps: int, carry: torch.dtype) -> tuple[Tensor, Tensor]:
    return B.unsqueeze(-2), A.unsqueeze(-3)


def _prepare_response(A: Tensor, B: Tensor, steps: int, carry: torch.dtype) -> tuple[Tensor, Tensor]:
    """H reversed in time, (..., steps, N), by doubling [H, A^k H]; and A^(2^j) for 2^j up to
    ``steps``."""
    H, powers = B.unsqueeze(-2), [A]
    while H.shape[-2] < steps:
        H = torch.cat([H, H[..., : steps - H.shape[-2], :] @ powers[-1]], dim=-2)
        powers.append(powers[-1] @ powers[-1])
    return H.flip(-2), torch.stack(powers, dim=-3)


def _prepare_fft(A: Tensor, B: Tensor, steps: int, carry: torch.dtype) -> tuple[Tensor, Tensor]:
    H, powers = _prepare_response(A, B, steps, carry)
    return torch.fft.rfft(H.flip(-2).mT, n=2 * steps), powers


def _prepare_chunked(A: Tensor, B: Tensor, steps: int, carry: torch.dtype) -> tuple[Tensor, Tensor]:
    length = chunk_length(steps)
    powers = A.unsqueeze(-3)
    while powers.shape[-3] < length:
        further = _times(powers[..., : length - powers.shape[-3], :, :], powers[..., -1, :, :])
        powers = torch.cat([powers, further], dim=-3)
    carries = [powers[..., -1, :, :]]
    while length * 2 ** len(carries) < steps:
        carries.append(carries[-1] @ carries[-1])
    # An overflowed power is removed before it enters the graph: its gradient is NaN even where the
    # incoming gradient is zero.
    while len(carries) > 1 and examinable(A) and not in_range(torch.stack(carries).to(carry)):
        carries.pop()
    return _chunk_weights(powers, B), torch.stack(carries, dim=-3)


def _chunk_weights(powers: Tensor, B: Tensor) -> Tensor:
    """W (..., L + N, L N), such that [u of a chunk, m before it] @ W is m at each of the chunk's L steps.

    Row j < L contains A^(l-j) B at steps l >= j and zeros at earlier steps. The other N rows
    contain A^(l+1), transposed. The last N columns therefore give the state at the end of the
    chunk: A^(L-1) B ... B over A^L.
    """
    length, order = powers.shape[-3], powers.shape[-1]
    b = B.unsqueeze(-2)
    H = torch.cat([b, (b.unsqueeze(-3) @ powers[..., : length - 1, :, :]).squeeze(-2)], dim=-2)
    windows = F.pad(H, (0, 0, length - 1, 0)).unfold(-2, length, 1).flip(-3)  # (..., j, N, l)
    toeplitz = windows.mT.reshape(*B.shape[:-1], length, length * order)
    response = powers.transpose(-3, -2).reshape(*B.shape[:-1], order, length * order)
    return torch.cat([toeplitz, response], dim=-2)


_PREPARE = {
    "sequential": _prepare_sequential,
    "toeplitz": _prepare_response,
    "fft": _prepare_fft,
    "chunked": _prepare_chunked,
    "last": _prepare_response,
}


# The methods. u (C, B, T), state (C, B, N) or None, reset (B, T) or None -> memory (C, B, T, N), final_state (C, B, N).


def _sequential(u: Tensor, system: PreparedSystem, state: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    """(19): m_t = A m_{t-1} + B u_t, one time step after another."""
    A, B = system.powers[..., 0, :, :], system.inputs
    m = u.new_zeros(*u.shape[:2], A.shape[-1]) if state is None else state
    memory = []
    for t in range(u.shape[-1]):
        if reset is not None:
            m = torch.where(reset[:, t, None], 0, m)
        m = m @ A + u[..., t, None] * B
        memory.append(m)
    return torch.stack(memory, dim=2), m


def _toeplitz(u: Tensor, system: PreparedSystem, state: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    """(24): m_{1:T} = H U, where U contains every window of u: (C, B, T, T)."""
    steps = u.shape[-1]
    windows = _windows(u)
    count = None
    if reset is not None:
        count = reset.cumsum(-1)
        windows = torch.where(_windows(count) == count.unsqueeze(-1), windows, 0)
    H = system.inputs[..., -steps:, :]
    memory = _times(windows, H)
    if state is not None:
        memory = memory + _free_response(state, system, steps, count)
    return memory, memory[:, :, -1].clone()


def _fft(u: Tensor, system: PreparedSystem, state: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    """(26): m_{1:T} = irfft(rfft(H) rfft(u)), zero-padded to twice the length."""
    memory = _convolved(u, system)
    bad = _not_finite(u, memory[:, :, -1])
    if bad is not None:
        memory = _with_nan(_convolved(_zeroed(u, bad), system), bad)
    if state is not None:
        memory = memory + _free_response(state, system, u.shape[-1], None)
    return memory, memory[:, :, -1].clone()


def _convolved(u: Tensor, system: PreparedSystem) -> Tensor:
    padded = 2 * max(system.steps, 1)
    # Time is innermost, where the transforms are fastest; the result is a view as (C, B, T, N).
    spectrum = torch.fft.rfft(u, n=padded).unsqueeze(-2) * system.inputs.unsqueeze(-3)
    return torch.fft.irfft(spectrum, n=padded)[..., : u.shape[-1]].mT


def _multiplied_in_16_bits(u: Tensor) -> bool:
    """Whether the large product of "chunked" has 16-bit factors: on a GPU only, a CPU may be slower
    with them."""
    return u.is_cuda and u.dtype in (torch.float16, torch.bfloat16)


def _chunked(
    u: Tensor, system: PreparedSystem, state: Tensor | None, reset: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """[u of the chunk, m before it] @ W for all chunks in one product.

    That product is in the dtype of u. The states carried from chunk to chunk and the final state
    are in the dtype of the system.
    """
    channels, batch, steps = u.shape
    W, order, carry = system.inputs, system.powers.shape[-1], system.powers.dtype
    length = W.shape[-2] - order
    if steps <= length and reset is None:
        # A short input, such as one chunk of a stream, uses the first rows and columns of W.
        W, u = W[..., : steps * order], u.to(carry)
        final_state = _times(u, W[..., :steps, -order:])
        if state is not None:
            final_state = final_state + _times(state, W[..., length:, -order:])
        bad = _not_finite(u, final_state)
        memory = _times(_zeroed(u, bad), W[..., :steps, :])
        if state is not None:
            memory = memory + _times(state, W[..., length:, :])
        return _with_nan(memory.unflatten(-1, (steps, order)), bad), final_state
    chunks = -(-steps // length)
    missing = chunks * length - steps
    u = F.pad(u, (0, missing)).reshape(channels, batch, chunks, length)
    if reset is not None:
        reset = F.pad(reset, (0, missing)).reshape(batch, chunks, length)
        memory = _chunked_with_reset(u, system, state, reset)[:, :, :steps]
        return memory, memory[:, :, -1].clone()
    before = _before_chunks(_times(u.to(carry), W[..., :length, -order:]), system, state)
    # Computed separately, because the gradient of memory[:, :, -1] would be an array of zeros of
    # the size of the memory.
    end = (length - missing) * order
    last = torch.cat([u[:, :, -1].to(carry), before[:, :, -1]], dim=-1)
    final_state = _times(last, W[..., end - order : end])
    if system.last_only:
        return None, final_state
    bad = _not_finite(u, final_state)
    rows = torch.cat([_zeroed(u, bad), before.to(u.dtype)], dim=-1)
    memory = _times(rows, W.to(u.dtype)).reshape(channels, batch, chunks, length, order)
    return _with_nan(memory, bad).flatten(2, 3)[:, :, :steps], final_state


def _channels_last(u: Tensor, system: PreparedSystem, reset: Tensor | None) -> bool:
    """Whether "chunked" multiplies by W from the left, with the channels last, once per row and
    chunk.

    With many channels in one system that is also an efficient matrix product, and neither u nor the
    memory, which is N times as large, is transposed. A W with gradients would be copied for every
    chunk.
    """
    one_system = system.method == "chunked" and system.powers.ndim == 3 and not system.inputs.requires_grad
    many = u.shape[2] >= 16 and system.powers.shape[-1] > 1
    return u.device.type == "cpu" and one_system and many and reset is None and not system.last_only


def _chunked_channels_last(u: Tensor, system: PreparedSystem, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """W^T @ [u of the chunk, m before it] for u (B, T, C): memory (B, T, N, C), final_state (C, B, N)."""
    batch, steps, channels = u.shape
    W, order = system.inputs.mT, system.powers.shape[-1]
    length = W.shape[-1] - order
    if steps <= length:
        length = steps
        W = torch.cat([W[: steps * order, :steps], W[: steps * order, -order:]], dim=-1)
    chunks = -(-steps // length)
    missing = chunks * length - steps
    u = F.pad(u, (0, 0, 0, missing)).unflatten(1, (chunks, length))
    if chunks > 1:
        ends = W[-order:, :length] @ u
        before = _before_chunks(ends.permute(3, 0, 1, 2), system, state)
    else:
        before = u.new_zeros(channels, batch, 1, order) if state is None else state.unsqueeze(2)
    before = before.permute(1, 2, 3, 0)  # (B, chunks, N, C)
    end = (length - missing) * order
    final_state = (W[end - order : end] @ torch.cat([u[:, -1], before[:, -1]], dim=1)).permute(2, 0, 1)
    bad = _not_finite(u, final_state)
    rows = torch.cat([_zeroed(u, bad), before], dim=2)
    memory = W.expand(batch * chunks, -1, -1).bmm(rows.flatten(0, 1))
    memory = _with_nan(memory.view(batch, chunks, length, order, channels), bad, time=2, order=3)
    return memory.flatten(1, 2)[:, :steps], final_state


def _chunked_with_reset(u: Tensor, system: PreparedSystem, state: Tensor | None, reset: Tensor) -> Tensor:
    """The same with resets: all chunks in parallel, one time step after another.

    A product with W would multiply the states before a reset by zero, and 0 times NaN is NaN.
    """
    W, order = system.inputs, system.powers.shape[-1]
    channels, batch, chunks, length = u.shape
    count = reset.cumsum(-1)  # resets since the start of the chunk
    ends = _times(torch.where(count == count[..., -1:], u, 0), W[..., :length, -order:])
    before = _before_chunks(ends, system, state, count[..., -1:] == 0)
    one_step = PreparedSystem("sequential", system.why, length, W[..., :1, :order], W[..., None, length:, :order])
    memory, _ = _sequential(u.flatten(1, 2), one_step, before.flatten(1, 2), reset.flatten(0, 1))
    return memory.reshape(channels, batch, chunks * length, order)


def _before_chunks(ends: Tensor, system: PreparedSystem, state: Tensor | None, mask: Tensor | None = None) -> Tensor:
    """m before each chunk, (C, B, chunks, N), from the end of each chunk with m = 0 before it.

    ``mask`` is False for a chunk across which no state is carried: one with a reset, or padding.
    """
    if state is None:
        state = torch.zeros_like(ends[:, :, 0])
    chunks = ends.shape[2]
    prepared, powers = system.powers.unbind(-3), []
    padded, overflows = 1, False
    while padded < chunks:
        padded *= 2
        if len(powers) < len(prepared):
            powers.append(prepared[len(powers)])
        elif not overflows:
            square = powers[-1] @ powers[-1]
            overflows = examinable(square) and not in_range(square)
            powers += [] if overflows else [square]
    if overflows and mask is None:
        # The state is set to zero in the padding, where it might overflow.
        mask = torch.ones((), dtype=torch.bool, device=ends.device).expand(ends.shape[1], chunks, 1)
    pad = (0, 0, 0, padded - chunks)
    mask = None if mask is None else F.pad(mask, pad)
    return _scan(F.pad(ends, pad), mask, state, powers)[:, :, :chunks]


def _scan(ends: Tensor, mask: Tensor | None, state: Tensor, powers: list[Tensor]) -> Tensor:
    """s_{k+1} = A s_k + ends_k, (C, B, K, N), K a power of 2: 2 K products in 2 log2 K steps.

    If higher powers overflow and are missing, the last one is applied K times in sequence.
    """
    if ends.shape[2] == 1:
        return state.unsqueeze(2)
    A, *further = powers
    if not further:
        states = [state]
        for k in range(ends.shape[2] - 1):
            states.append(_carried(states[-1], A, mask, k) + ends[:, :, k])
        return torch.stack(states, dim=2)
    first, second = ends[:, :, 0::2], ends[:, :, 1::2]
    mask_pair = None if mask is None else mask[:, 0::2] & mask[:, 1::2]
    even = _scan(_carried(first, A, mask, slice(1, None, 2)) + second, mask_pair, state, further)
    odd = _carried(even, A, mask, slice(0, None, 2)) + first
    return torch.stack([even, odd], dim=3).flatten(2, 3)


def _carried(states: Tensor, A: Tensor, mask: Tensor | None, chunks: int | slice) -> Tensor:
    """States times A. A reset zeroes them before the product, so its gradient has no NaN."""
    return _times(states if mask is None else torch.where(mask[:, chunks], states, 0), A)


def _last(u: Tensor, system: PreparedSystem, state: Tensor | None, reset: Tensor | None) -> tuple[None, Tensor]:
    """(25): m_T = H reverse(u), one matrix product; and A^T times the state."""
    steps = u.shape[-1]
    after = None
    if reset is not None:
        count = reset.cumsum(-1)
        after = count == count[:, -1:]
        u = torch.where(after, u, 0)
    final_state = _times(u, system.inputs[..., -steps:, :])
    if state is not None:
        for level, power in enumerate(system.powers.unbind(-3)):
            if steps >> level & 1:
                state = _times(state, power)
        if reset is not None:
            state = torch.where(reset.any(-1, keepdim=True), 0, state)
        final_state = final_state + state
    return None, final_state


_APPLY = {"sequential": _sequential, "toeplitz": _toeplitz, "fft": _fft, "chunked": _chunked, "last": _last}


def _not_finite(u: Tensor, final_state: Tensor) -> Tensor | None:
    """A mask of the values of u that are not finite; None if all are, or if values are not read.

    It is enough to test the final state, which is small: once an input is not finite, no later
    state is finite. The mask is always computed if u is mapped by ``torch.vmap``.
    """
    if examinable(final_state):
        if all_finite(final_state):
            return None
    elif not (u.is_cpu and is_mapped(final_state)):
        return None
    return ~u.isfinite()


def _zeroed(u: Tensor, bad: Tensor | None) -> Tensor:
    """u with zeros where ``bad``. The gradient is passed to every element of u, as in the loop."""
    if bad is None:
        return u
    u = u.clone()
    u.detach().masked_fill_(bad, 0)
    return u


def _with_nan(memory: Tensor, bad: Tensor | None, time: int = -1, order: int = -1) -> Tensor:
    """memory with NaN added from the first bad step on; adding it lets gradients through."""
    if bad is None:
        return memory
    after = (bad.cumsum(time) > 0).unsqueeze(order)
    return memory + torch.where(after, torch.nan, memory.new_zeros(()))


def _free_response(state: Tensor, system: PreparedSystem, steps: int, resets_so_far: Tensor | None) -> Tensor:
    """A^t m_0 for t = 1..T, without input, (C, B, T, N), by doubling [F, A^k F]."""
    powers = system.powers.unbind(-3)
    response = _times(state, powers[0]).unsqueeze(2)
    for power in powers:
        if response.shape[2] < steps:
            further = _times(response[:, :, : steps - response.shape[2]], power)
            response = torch.cat([response, further], dim=2)
    return response if resets_so_far is None else torch.where(resets_so_far.unsqueeze(-1) == 0, response, 0)


def _windows(x: Tensor) -> Tensor:
    """x (..., T) -> (..., T, T): row t has the T steps up to t, with zeros before the first
    step."""
    steps = x.shape[-1]
    return F.pad(x, (steps - 1, 0)).unfold(-1, steps, 1)


def _times(rows: Tensor, matrix: Tensor) -> Tensor:
    """rows (C, ..., K) @ matrix (K, M) or (C, K, M), as one product or one per channel."""
    if matrix.ndim == 2:
        return rows @ matrix
    return (rows.flatten(1, -2) @ matrix).unflatten(1, rows.shape[1:-1])


def _empty_result(u: Tensor, system: PreparedSystem, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """The result for zero steps, sequences or channels: an empty memory and the unchanged state."""
    order = system.powers.shape[-1]
    empty = u.unsqueeze(-1).expand(*u.shape, order).clone()
    return empty, empty.sum(2) if state is None else state.clone()


def _apply_complex(
    u: Tensor, system: PreparedSystem, initial_state: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Complex u: A and B are real, so the real and the imaginary parts are computed as two
    batches."""
    if initial_state is not None:
        imaginary = initial_state.imag if initial_state.is_complex() else torch.zeros_like(initial_state)
        initial_state = torch.cat([initial_state.real, imaginary])
    reset = None if reset is None else torch.cat([reset, reset])
    memory, final_state = apply(torch.cat([u.real, u.imag]), system, initial_state, reset=reset)
    return torch.complex(*memory.chunk(2)), torch.complex(*final_state.chunk(2))


# Checks of the public arguments.


def _check_input(u: Any) -> None:
    check_numbers(u=u)
    if u.ndim != 3:
        raise ValueError(f"u must be (batch, time, channels), got shape {tuple(u.shape)}: add the missing axes")


def _check_matrices(A: Any, B: Any) -> None:
    check_numbers(real=True, A=A, B=B)
    if A.ndim not in (2, 3) or A.shape[-1] != A.shape[-2] or B.shape != A.shape[:-1]:
        raise ValueError(
            f"A must be (N, N) and B (N,), or (C, N, N) and (C, N), got {tuple(A.shape)} and {tuple(B.shape)}:"
            " N, and C if there is one, must be the same in both"
        )
    check_device("A", A, "B", B)


def _check_fit(u: Tensor, system: PreparedSystem, initial_state: Any, reset: Any) -> None:
    _check_system(u, system)
    check_numbers(initial_state=initial_state)
    batch, _, channels = u.shape
    check_initial_state(initial_state, "(B, C, N)", (batch, channels, system.powers.shape[-1]), u=u)
    check_reset(reset, "u", u)
    if reset is not None and system.method == "fft":
        raise ValueError('"fft" does not support reset: use method "chunked", "toeplitz" or "sequential", or None')


def _check_system(u: Tensor, system: PreparedSystem) -> None:
    method, powers, (_, steps, channels) = system.method, system.powers, u.shape
    check_device("u", u, "A", powers)
    if real_carry_dtype(u.dtype) != powers.dtype:
        raise ValueError(
            f"the system was prepared for {powers.dtype}, got u in {u.dtype}: prepare it with dtype=u.dtype"
        )
    if powers.ndim == 4 and powers.shape[0] != channels:
        raise ValueError(f"u must have one channel for each of the {powers.shape[0]} systems in A, got {channels}")
    if method not in ("sequential", "chunked") and steps > system.steps:
        raise ValueError(
            f"a system of method {method!r} was prepared for up to {system.steps} steps, got {steps}: prepare it "
            "for more steps"
        )
