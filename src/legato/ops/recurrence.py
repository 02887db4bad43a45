"""The diagonal recurrence, for any channel axes, dtype, device and kind of derivative.

    h_t = decay_t * h_{t-1} + impulse_t

In the order of this file: ``linear_recurrence`` checks its arguments and reshapes them to the axes
that all kernels take; ``_Recurrence`` defines the derivatives; the registered op
``torch.ops.legato.recurrence``, which torch.compile and torch.export record, calls a kernel of
``ops/kernels``. docs/maths/recurrence.md has the derivations.
"""

import torch
from torch.autograd import Function

from legato import _dtypes
from legato._checks import check_device, check_initial_state, check_numbers, check_reset
from legato._shapes import Bool, Inexact, Tensor
from legato.ops import backends


def linear_recurrence(
    decay: Inexact[Tensor, "..."],
    impulse: Inexact[Tensor, "B T *channels"],
    initial_state: Inexact[Tensor, "B *channels"] | None = None,
    *,
    reset: Bool[Tensor, "B T"] | None = None,
    reverse: bool = False,
    backend: str | None = None,
) -> tuple[Inexact[Tensor, "B T *channels"], Inexact[Tensor, "B *channels"]]:
    """h_t = decay_t * h_{t-1} + impulse_t for t = 1 .. T, in parallel over time if possible.

    Differentiable in decay, impulse and initial_state, to any order, in reverse and forward mode; works under vmap,
    torch.compile(fullgraph=True), torch.export and autocast.

    Args:
        decay: The factor on the previous state. Any shape that broadcasts to the impulse's: (C,) is
            constant in time, (B, T, 1) is the same for all channels. A broadcast decay is never
            expanded in memory. The recurrence is stable where abs(decay) <= 1; this is not checked.
        impulse: The term added to the state at each step, (batch, time, *channels); any strides.
            Real or complex.
        initial_state: The state before the first step, (batch, *channels); zeros by default.
        reset: True at a step before which the state is reset to zero: h_t = impulse_t.
        reverse: Compute from the last step to the first: h_t = decay_t * h_{t+1} + impulse_t.
            ``initial_state`` is then the state before step T, and ``reset`` resets the state that
            comes from step t + 1.
        backend: "reference", "torch", "numba" (CPU) or "triton" (CUDA); an error is raised if that
            backend cannot run. None uses the backend of ``legato.use_backend``, or else chooses by
            device; ``legato.explain()`` reports the choice.

    Returns:
        The states h_t, in the common dtype of decay and impulse, and the state after the last step
        that was computed, in the dtype of the carry. That is the common dtype, but at least 32 bits
        wide, so that a stream of 16-bit chunks is rounded no more often than one parallel pass.

    Raises:
        TypeError: an argument is not a tensor, or not of a floating, complex or (reset) boolean dtype.
        ValueError: shapes or devices do not match, no backend has that name, or the backend does
            not run on that device.
        RuntimeError: the named backend needs a package that is not installed or does not work.

    Example:
        >>> import torch, legato
        >>> states, last = legato.linear_recurrence(torch.tensor([0.5]), torch.ones(1, 3, 1))
        >>> states.flatten().tolist()
        [1.0, 1.5, 1.75]

    Source: Martin & Cundy (2018), section 2; the adjoint is the same recurrence in reverse time.
    """
    _check(decay, impulse, initial_state, reset)
    backend = backends.resolve(backend, impulse.device)
    dtype = torch.promote_types(decay.dtype, impulse.dtype)
    carry_dtype = _dtypes.carry_dtype(dtype)
    channels = impulse.shape[2:]
    decay, impulse = _canonical(decay.to(dtype), impulse.to(dtype))
    if initial_state is not None:
        initial_state = initial_state.to(carry_dtype).reshape(impulse.shape[0], *impulse.shape[2:])
    # Dynamo rejects Functions with a forward-mode rule, so compiled code uses the one without it.
    function = _Recurrence if torch.compiler.is_compiling() else _ForwardModeRecurrence
    states, final_state = function.apply(decay, impulse, initial_state, reset, reverse, backend)
    return states.reshape(*states.shape[:2], *channels), final_state.reshape(states.shape[0], *channels)


def _check(decay: Tensor, impulse: Tensor, initial_state: Tensor | None, reset: Tensor | None) -> None:
    check_numbers(impulse=impulse, decay=decay, initial_state=initial_state)
    check_device("decay", decay, "impulse", impulse)
    if impulse.ndim < 2:
        raise ValueError(f"impulse must be (batch, time, *channels), got shape {tuple(impulse.shape)}: add the axes")
    padded = (1,) * (impulse.ndim - decay.ndim) + tuple(decay.shape)
    if len(padded) != impulse.ndim or any(n not in (1, m) for n, m in zip(padded, impulse.shape, strict=True)):
        raise ValueError(
            f"decay must broadcast to the impulse's shape {tuple(impulse.shape)}, got {tuple(decay.shape)}:"
            " each of its axes, counted from the last, must be 1 or that of the impulse"
        )
    if initial_state is not None:
        state_shape = (impulse.shape[0], *impulse.shape[2:])
        check_initial_state(initial_state, "(batch, *channels)", state_shape, impulse=impulse, decay=decay)
    if reset is not None:
        check_reset(reset, "impulse", impulse)


def _canonical(decay: Tensor, impulse: Tensor) -> tuple[Tensor, Tensor]:
    """Impulse as (B, T, H, D), decay as (Bd, Td, Hd, Dd) whose sizes are 1 or the full size.

    Adjacent channel axes are merged where the decay broadcasts over all of them or over none. Two
    groups remain, except for unusual broadcasts such as a decay (H, 1, K): only then is the decay
    expanded, and over the channel axes only.
    """
    decay = decay.reshape((1,) * (impulse.ndim - decay.ndim) + tuple(decay.shape))
    groups: list[list[int]] = []  # [size, the decay's size], outermost first
    for size, own in zip(impulse.shape[2:], decay.shape[2:], strict=True):
        if groups and (groups[-1][1] == 1) == (own == 1):
            groups[-1][0] *= size
            groups[-1][1] *= own
        elif size != 1:
            groups.append([size, own])
    if len(groups) > 2:
        decay = decay.expand(*decay.shape[:2], *impulse.shape[2:])
        size = decay.shape[2:].numel()
        groups = [[size, size]]
    (H, Hd), (D, Dd) = [[1, 1]] * (2 - len(groups)) + groups
    return decay.reshape(*decay.shape[:2], Hd, Dd), impulse.reshape(*impulse.shape[:2], H, D)


class _Recurrence(Function):
    """The recurrence with its adjoint; saves decay, states, initial_state and reset only."""

    @staticmethod
    def forward(decay, impulse, initial_state, reset, reverse, backend):
        return torch.ops.legato.recurrence(decay, impulse, initial_state, reset, reverse, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        decay, _, initial_state, reset, ctx.reverse, ctx.backend = inputs
        ctx.save_for_backward(decay, output[0], initial_state, reset)

    @staticmethod
    def backward(ctx, grad_states, grad_final):
        decay, states, initial_state, reset = ctx.saved_tensors
        arguments = (grad_states, grad_final, decay, states, initial_state, reset, ctx.reverse, ctx.backend)
        # With create_graph the adjoint must be differentiable, so it is computed as a recurrence.
        # Otherwise one kernel computes it.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = _adjoint(_ForwardModeRecurrence.apply, *arguments)
        else:
            grads = torch.ops.legato.recurrence_backward(*arguments)
        return (*grads[:2], None if initial_state is None else grads[2], None, None, None)


class _ForwardModeRecurrence(_Recurrence):
    """``_Recurrence`` with a forward-mode rule and a vmap rule."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx, inputs, output):
        _Recurrence.setup_context(ctx, inputs, output)
        decay, _, initial_state, reset, _, _ = inputs
        ctx.save_for_forward(decay, output[0], initial_state, reset)

    @staticmethod
    def jvp(ctx, d_decay, d_impulse, d_initial, *_):
        """dh_t = decay_t dh_{t-1} + (d_decay_t h_{t-1} + d_impulse_t)"""
        decay, states, initial_state, reset = ctx.saved_tensors
        drive = torch.zeros_like(states) if d_impulse is None else d_impulse
        if d_decay is not None:
            drive = drive + d_decay * _states_before(states, initial_state, reset, ctx.reverse)
        return _ForwardModeRecurrence.apply(decay, drive, d_initial, reset, ctx.reverse, ctx.backend)


def _states_before(states: Tensor, initial_state: Tensor | None, reset: Tensor | None, reverse: bool) -> Tensor:
    """h_{t-1} for every step t: the initial state at the first step, zero at a reset."""
    first = torch.zeros_like(states[:, :1]) if initial_state is None else initial_state.to(states.dtype).unsqueeze(1)
    if states.shape[1] == 0:
        return states
    before = torch.cat([states[:, 1:], first] if reverse else [first, states[:, :-1]], 1)
    return before if reset is None else before.masked_fill(reset[..., None, None], 0)


def _adjoint(recurrence, grad_states, grad_final, decay, states, initial_state, reset, reverse, backend):
    """g_t = grad_states_t + conj(decay_{t+1}) g_{t+1}, a recurrence in the other direction.

    Returns the gradients of decay, impulse and initial_state: conj(h_{t-1}) g_t, g_t and conj(decay_1) g_1.
    """
    if states.shape[1] == 0:
        return torch.zeros_like(decay), torch.zeros_like(states), grad_final.clone()
    first, last = (-1, 0) if reverse else (0, -1)  # in the order in which the steps were computed

    def next_step(x: Tensor) -> Tensor:
        """x shifted by one step: x_{t+1} at step t, and zero at the last step."""
        none = torch.zeros_like(x[:, :1])
        return torch.cat([none, x[:, :-1]] if reverse else [x[:, 1:], none], 1)

    arriving = grad_states.select(1, last) + grad_final.to(grad_states.dtype)
    rest = grad_states[:, 1:] if reverse else grad_states[:, :-1]
    grad_states = torch.cat([arriving.unsqueeze(1), rest] if reverse else [rest, arriving.unsqueeze(1)], 1)
    next_decay = next_step(decay) if decay.shape[1] > 1 else decay
    next_reset = None if reset is None else next_step(reset)
    g, _ = recurrence(next_decay.conj().resolve_conj(), grad_states, None, next_reset, not reverse, backend)
    grad_decay = (_states_before(states, initial_state, reset, reverse).conj() * g).sum_to_size(decay.shape)
    grad_initial = (decay[:, first if decay.shape[1] > 1 else 0].conj() * g[:, first]).to(grad_final.dtype)
    if reset is not None:
        grad_initial = grad_initial.masked_fill(reset[:, first, None, None], 0)
    return grad_decay, g, grad_initial


# --- the registered ops, which torch.compile, torch.export and vmap record ---

_library = torch.library.Library("legato", "DEF")
_library.define(
    "recurrence(Tensor decay, Tensor impulse, Tensor? initial_state, Tensor? reset, bool reverse, str? backend)"
    " -> (Tensor, Tensor)"
)
_library.define(
    "recurrence_backward(Tensor grad_states, Tensor grad_final, Tensor decay, Tensor states, Tensor? initial_state,"
    " Tensor? reset, bool reverse, str? backend) -> (Tensor, Tensor, Tensor)"
)


def _run(decay, impulse, initial_state, reset, reverse, backend):
    kernel, name, why = backends.choose("linear_recurrence", impulse.device, backend, impulse.dtype)
    backends.record("linear_recurrence", name, why)
    return kernel.forward(*map(_contiguous, (decay, impulse, initial_state, reset)), reverse)


def _run_backward(grad_states, grad_final, decay, states, initial_state, reset, reverse, backend):
    kernel, name, why = backends.choose("linear_recurrence", states.device, backend, states.dtype, True)
    backends.record("linear_recurrence", name, why)
    grad_states, grad_final, decay, states, initial_state, reset = map(
        _contiguous, (grad_states, grad_final, decay, states, initial_state, reset)
    )
    if hasattr(kernel, "backward"):
        return kernel.backward(grad_states, grad_final, decay, states, initial_state, reset, reverse)

    def recurrence(decay, impulse, initial_state, reset, reverse, backend):
        return kernel.forward(decay, impulse, initial_state, reset, reverse)

    return _adjoint(recurrence, grad_states, grad_final, decay, states, initial_state, reset, reverse, backend)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.resolve_conj().resolve_neg().contiguous()


def _fake_run(decay, impulse, initial_state, reset, reverse, backend):
    B, _, H, D = impulse.shape
    carry_dtype = _dtypes.carry_dtype(impulse.dtype)
    return impulse.new_empty(impulse.shape), impulse.new_empty((B, H, D), dtype=carry_dtype)


def _fake_run_backward(grad_states, grad_final, decay, states, initial_state, reset, reverse, backend):
    return decay.new_empty(decay.shape), states.new_empty(states.shape), grad_final.new_empty(grad_final.shape)


def _vmap_run(info, in_dims, decay, impulse, initial_state, reset, reverse, backend):
    """Merge a mapped axis into the batch; a decay neither mapped nor batched stays one row."""
    V, B = info.batch_size, _size(impulse, in_dims[1], 0)
    decay = _fold(decay, in_dims[0], V, None if in_dims[0] is None and decay.shape[0] == 1 else B)
    impulse, initial_state, reset = (
        _fold(x, dim, V, B) for x, dim in zip((impulse, initial_state, reset), in_dims[1:4], strict=True)
    )
    states, final_state = torch.ops.legato.recurrence(decay, impulse, initial_state, reset, reverse, backend)
    return (states.unflatten(0, (V, B)), final_state.unflatten(0, (V, B))), (0, 0)


def _vmap_run_backward(info, in_dims, *arguments):
    """As above; a decay without batch axis is expanded, and its gradient summed over the batch."""
    V, B = info.batch_size, _size(arguments[3], in_dims[3], 0)
    rows = _size(arguments[2], in_dims[2], 0)
    tensors = [_fold(x, dim, V, B) for x, dim in zip(arguments[:6], in_dims[:6], strict=True)]
    grad_decay, grad_impulse, grad_initial = torch.ops.legato.recurrence_backward(*tensors, *arguments[6:])
    grad_decay = grad_decay.unflatten(0, (V, B))
    if rows == 1:
        grad_decay = grad_decay.sum(1, keepdim=True)
    return (grad_decay, grad_impulse.unflatten(0, (V, B)), grad_initial.unflatten(0, (V, B))), (0, 0, 0)


def _size(x: Tensor, mapped: int | None, axis: int) -> int:
    return x.shape[axis] if mapped is None else x.movedim(mapped, 0).shape[axis + 1]


def _fold(x: Tensor | None, mapped: int | None, V: int, B: int | None) -> Tensor | None:
    """(B or 1, ...) with a mapped axis of size V, or none, to (V * B, ...); B None returns x."""
    if x is None or B is None:
        return x
    x = x.unsqueeze(0) if mapped is None else x.movedim(mapped, 0)
    return x.expand(V, B, *x.shape[2:]).reshape(V * B, *x.shape[2:])


_library.impl("recurrence", _run, "CompositeExplicitAutograd")
_library.impl("recurrence_backward", _run_backward, "CompositeExplicitAutograd")
torch.library.register_fake("legato::recurrence", _fake_run, lib=_library)
torch.library.register_fake("legato::recurrence_backward", _fake_run_backward, lib=_library)
torch.library.register_vmap("legato::recurrence", _vmap_run, lib=_library)
torch.library.register_vmap("legato::recurrence_backward", _vmap_run_backward, lib=_library)
