"""The diagonal recurrence behind sigmoid gates, as gated layers use it.

    h_t = f_t * h_{t-1} + w_t * g(candidate_t),  f_t = sigmoid(forget_t),  w_t = 1 - f_t, or sigmoid(write_t)

The definition is ``linear_recurrence`` of decay f_t and impulse w_t g(candidate_t); see ``recurrence.py``.
``gated_unit`` is the same with the matrix product before it and the output gate behind it: what a layer does in all.
On a CPU, in float32, ``kernels/gated_cpu.py`` computes that a part of the sequence at a time, so that what lies between
the products and the output is still in the cache when it is needed; everywhere else the definition is what runs.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import Function, forward_ad

from legato import _choices
from legato._dtypes import carry_dtype, without_autocast
from legato._shapes import Bool, Float, Tensor
from legato.ops import kernels
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
    with without_autocast(candidate):
        return linear_recurrence(*_decay_and_impulse(forget, candidate, write, squash), initial_state, reset=reset)


def gated_step(
    forget: Float[Tensor, "B C"],
    candidate: Float[Tensor, "B C"],
    write: Float[Tensor, "B C"] | None,
    state: Float[Tensor, "B C"],
    *,
    squash: bool = False,
) -> Float[Tensor, "B C"]:
    """One step of ``gated_recurrence`` in plain torch: the state after it, in float32 or wider."""
    with without_autocast(candidate):
        decay, impulse = _decay_and_impulse(forget, candidate, write, squash)
        return torch.addcmul(impulse, decay, state)


def _decay_and_impulse(forget: Tensor, candidate: Tensor, write: Tensor | None, squash: bool) -> tuple[Tensor, Tensor]:
    dtype = carry_dtype(candidate.dtype)
    forget, candidate = forget.to(dtype), candidate.to(dtype)
    gate = (-forget if write is None else write.to(dtype)).sigmoid()
    return forget.sigmoid(), gate * (candidate.tanh() if squash else candidate)


def gated_unit(
    inputs: tuple[Float[Tensor, "..."], ...],
    weights: tuple[Float[Tensor, "..."], ...],
    bias: Float[Tensor, "K"] | None,
    blocks: tuple[str, ...],
    initial_state: Float[Tensor, "B C"] | None = None,
    *,
    products: Float[Tensor, "B T K"] | None = None,
    skip: Float[Tensor, "B T C"] | None = None,
    squash: bool = False,
    activation: Callable[[Tensor], Tensor] | None = None,
    delayed: bool = False,
    reset: Bool[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B T C"], Float[Tensor, "B T C"], Float[Tensor, "B C"]]:
    """z_t = products_t + sum_i W_i x_i,t + b; c_t = f_t c_{t-1} + w_t g(candidate_t);
    h_t = o_t activation(c_t) + (1 - o_t) skip_t.

    Args:
        inputs: x_i, each (batch, time, its own channels).
        weights: W_i, each (K, the channels of x_i).
        bias: b, (K,).
        blocks: what the K / C blocks of z are, in their order: "forget" and "candidate", and where the unit has them
            "write" (else w_t = 1 - f_t), "output" (else h_t = c_t) and "skip"; see ``gated_recurrence``.
        initial_state: c_0, (batch, C); zeros by default.
        products: what is known of z already, (batch, time, K).
        skip: skip_t where it is not a block of z, (batch, time, C). Without either h_t = o_t activation(c_t).
        squash: g is tanh; else the identity.
        activation: of c_t on its way out; None is the identity. ``torch.tanh`` is part of the kernel, others are not.
        delayed: c_{t-1} is returned in place of c_t, zero where the state was dropped; only without an output gate.
        reset: True where the state is dropped before that step, (batch, time).

    Returns:
        h_t, c_t and the last c, all in float32 or wider.

    Raises:
        ValueError: shapes or devices do not fit together, or ``delayed`` with an output gate.
    """
    if "output" not in blocks:
        activation = None
    elif delayed:
        raise ValueError("delayed states have no output gate: leave either away")
    _check_shapes(inputs, weights, len(blocks), bias, initial_state, products, skip, reset)
    skips_input = skip is not None and len(inputs) > 0 and skip is inputs[0]
    form = ("/".join(blocks), squash, activation is not None, delayed, skips_input)
    tensors = (*inputs, *weights, bias, products, initial_state, skip)
    if not _fusible(tensors, activation):
        return _definition(inputs, weights, bias, products, initial_state, skip, reset, activation, form)
    skip = None if form[-1] else skip
    others = bias, products, initial_state, skip, reset
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        found = _GatedUnit.apply((*form, _keeps(inputs)), len(inputs), *others, *inputs, *weights)
    else:  # without gradients torch.compile gives the Function's forward its arguments one place too far
        found = torch.ops.legato.gated_unit(list(inputs), list(weights), *others, *form, False)
    _, shown, states, final = found
    return (shown if "output" in blocks else states), states, final


def gated_unit_step(
    inputs: tuple[Float[Tensor, "..."], ...],
    weights: tuple[Float[Tensor, "..."], ...],
    bias: Float[Tensor, "K"],
    blocks: tuple[str, ...],
    state: Float[Tensor, "B C"],
    *,
    skip: Float[Tensor, "B C"] | None = None,
    squash: bool = False,
    activation: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B C"]]:
    """One step of ``gated_unit`` in plain torch, without the time axis: h_t and c_t.

    A kernel's launch costs more than the few operations on one step.
    """
    part = _parts(_products(inputs, weights, bias, None), blocks)
    state = gated_step(part["forget"], part["candidate"], part.get("write"), state, squash=squash)
    return _shown(state, part, skip, activation), state


def _check_shapes(inputs, weights, blocks, bias, initial_state, products, skip, reset) -> None:
    """The kernel takes addresses: a tensor that is too small would be read beyond its end."""
    (B, T), K = (*inputs, products)[0].shape[:2], weights[0].shape[0] if weights else products.shape[-1]
    given = {"bias": (bias, (K,)), "products": (products, (B, T, K)), "reset": (reset, (B, T))}
    given |= {"initial_state": (initial_state, (B, K // blocks)), "skip": (skip, (B, T, K // blocks))}
    for i, (x, weight) in enumerate(zip(inputs, weights, strict=True)):
        given |= {f"inputs[{i}]": (x, (B, T, x.shape[-1])), f"weights[{i}]": (weight, (K, x.shape[-1]))}
    for name, (x, shape) in given.items():
        if x is not None and x.shape != shape:
            raise ValueError(
                f"expected {name} of shape {tuple(shape)}, got {tuple(x.shape)}: batch, time and channels must be "
                "those of the other tensors"
            )


# The products of so few input channels in all are formed again in the backward: that is less work than to keep them.
_FORMED_AGAIN = 32


def _keeps(inputs: tuple[Tensor, ...]) -> bool:
    return sum(x.shape[-1] for x in inputs) > _FORMED_AGAIN


def _fusible(tensors: tuple[Tensor | None, ...], activation: Callable | None) -> bool:
    """Whether the kernel computes this; kinds of derivative that it does not know go to the definition."""
    given = [x for x in tensors if x is not None]
    compiling = torch.compiler.is_compiling()
    why = None
    if given[0].device.type != "cpu":
        why = f"no kernel for {given[0].device.type}"
    elif activation not in (None, torch.tanh):
        why = "an activation that the kernel does not know"
    elif any(x.dtype != torch.float32 for x in given):
        why = "the kernel is for float32"
    elif any(x.numel() == 0 for x in given):
        why = "nothing to compute"
    elif torch.is_autocast_enabled("cpu"):
        why = "autocast"
    elif torch._C._are_functorch_transforms_active():
        why = "torch.func"
    elif not compiling:
        if kernels.gated(given[0].device, torch.float32) is None:
            why = kernels.why_not_gated(given[0].device)
        elif forward_ad._current_level >= 0:
            why = "a forward-mode derivative"
        elif any(type(x) not in (Tensor, torch.nn.Parameter) for x in given):
            why = "tensors of another kind"
    if why is not None and not compiling:
        _choices.record("gated_unit", "definition", why)
    return why is None


def _definition(inputs, weights, bias, products, initial_state, skip, reset, activation, form):
    blocks, squash, _, delayed, _ = form
    part = _parts(_products(inputs, weights, bias, products), blocks.split("/"))
    gates = part["forget"], part["candidate"], part.get("write")
    states, final = gated_recurrence(*gates, initial_state, squash=squash, reset=reset)
    if delayed:
        states = one_step_later(states, initial_state, reset)
    return _shown(states, part, skip, activation), states, final


def _products(inputs, weights, bias, products) -> Tensor:
    z = products
    for x, weight in zip(inputs, weights, strict=True):
        z = F.linear(x, weight, bias) if z is None else z + F.linear(x, weight)
    return z if products is None or bias is None else z + bias


def _parts(z: Tensor, blocks) -> dict[str, Tensor]:
    return dict(zip(blocks, z.chunk(len(blocks), dim=-1), strict=True))


def _shown(states: Tensor, part: dict[str, Tensor], skip: Tensor | None, activation: Callable | None) -> Tensor:
    """What the output gate, where there is one, lets out of the states."""
    shown = states if activation is None else activation(states)
    if "output" not in part:
        return shown
    gate, skip = part["output"].to(states.dtype).sigmoid(), part.get("skip", skip)
    return gate * shown if skip is None else torch.lerp(skip.to(states.dtype), shown, gate)


def one_step_later(
    states: Float[Tensor, "B T C"], initial: Float[Tensor, "B C"] | None, reset: Bool[Tensor, "B T"] | None
) -> Float[Tensor, "B T C"]:
    """s_{t-1} in the place of s_t; ``initial`` (None: zeros) before the first, zero where the state is dropped."""
    first = torch.zeros_like(states[:, :1]) if initial is None else initial[:, None].to(states.dtype)
    before = torch.cat([first, states[:, :-1]], dim=1) if states.shape[1] else states
    return before if reset is None else before.masked_fill(reset[..., None], 0)


class _GatedUnit(Function):
    """The kernel and its adjoint, which forms the gates again from the products; keeps those, and the states."""

    @staticmethod
    def forward(form, count, bias, products, initial_state, skip, reset, *matrices):
        inputs, weights = list(matrices[:count]), list(matrices[count:])
        return torch.ops.legato.gated_unit(inputs, weights, bias, products, initial_state, skip, reset, *form)

    @staticmethod
    def setup_context(ctx, inputs, output):
        (*ctx.form, _), ctx.count, *tensors = inputs
        kept, _, states, _ = output
        ctx.mark_non_differentiable(kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(kept, states, *tensors)

    @staticmethod
    def backward(ctx, _, grad_shown, grad_states, grad_final):
        kept, states, bias, products, initial_state, skip, reset, *matrices = ctx.saved_tensors
        inputs, weights = matrices[: ctx.count], matrices[ctx.count :]
        if "output" not in ctx.form[0]:
            grad_shown = None
        if grad_shown is None and grad_states is None and grad_final is None:
            return (None,) * (7 + len(matrices))
        if not torch.compiler.is_compiling() and (
            torch.is_grad_enabled() or any(map(_mapped, (grad_shown, grad_states, grad_final)))
        ):
            # With create_graph the gradient is itself differentiated, with is_grads_batched it is mapped: that of the
            # definition can be.
            grads = (grad_shown, grad_states, grad_final)
            found = _gradients_of_definition(
                grads, inputs, weights, bias, products, initial_state, skip, reset, ctx.form
            )
            return None, None, *found
        grads = torch.ops.legato.gated_unit_backward(
            grad_shown, grad_states, grad_final, kept, states, ctx.needs_input_grad[7 : 7 + ctx.count],
            inputs, weights, bias, products, initial_state, skip, reset, *ctx.form,
        )  # fmt: skip
        matrices, others = grads[: 2 * ctx.count], grads[2 * ctx.count :]
        matrices = [grad if wanted else None for grad, wanted in zip(matrices, ctx.needs_input_grad[7:], strict=True)]
        given = (bias, products, initial_state, skip)
        others = [None if x is None else grad for x, grad in zip(given, others, strict=True)]
        return None, None, *others, None, *matrices


def _mapped(grad: Tensor | None) -> bool:
    return grad is not None and is_legacy_batchedtensor(grad)


def _gradients_of_definition(grads, inputs, weights, bias, products, initial_state, skip, reset, form):
    """The gradients of bias, products, initial state, skip, resets, inputs and weights, as a graph."""
    with torch.enable_grad():
        # Aliases, so that a tensor given in two places gets the gradient of each.
        given = [x if x is None else x.view_as(x) for x in (bias, products, initial_state, skip, *inputs, *weights)]
        bias, products, initial_state, skip, *matrices = given
        inputs, weights = matrices[: len(inputs)], matrices[len(inputs) :]
        activation = torch.tanh if form[2] else None
        skip = inputs[0] if form[-1] else skip
        outputs = _definition(inputs, weights, bias, products, initial_state, skip, reset, activation, form)
        outputs, grads = zip(*((y, g) for y, g in zip(outputs, grads, strict=True) if g is not None), strict=True)
        wanted = [x for x in given if x is not None and x.requires_grad]
        found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True, allow_unused=True))
    result = [next(found) if x is not None and x.requires_grad else None for x in given]
    return *result[:4], None, *result[4:]


# --- the registered ops: what torch.compile and export see ---

_library = torch.library.Library("legato", "FRAGMENT")
_arguments = (
    "Tensor[] inputs, Tensor[] weights, Tensor? bias, Tensor? products, Tensor? initial_state, Tensor? skip,"
    " Tensor? reset, str blocks, bool squash, bool show_tanh, bool delayed, bool skips_input"
)
_library.define(f"gated_unit({_arguments}, bool keep) -> (Tensor, Tensor, Tensor, Tensor)")
_library.define(
    "gated_unit_backward(Tensor? grad_shown, Tensor? grad_states, Tensor? grad_final, Tensor kept, Tensor states,"
    f" bool[] wanted, {_arguments}) -> Tensor[]"
)


def _run(inputs, weights, bias, products, initial_state, skip, reset, *form_and_keep):
    """The products that are kept (of size 0: none), h_t (likewise, without an output gate), c_t and the last c."""
    *form, keep = form_and_keep
    like = (*inputs, products)[0]
    kernel = kernels.gated(like.device, like.dtype)
    _choices.record("gated_unit", *_choice(kernel, like))
    if kernel is None:
        activation, skip = torch.tanh if form[2] else None, inputs[0] if form[-1] else skip
        z = _products(inputs, weights, bias, products)
        shown, *rest = _definition((), (), None, z, initial_state, skip, reset, activation, form)
        found = z if keep else z.new_empty(0), shown if "output" in form[0] else z.new_empty(0), *rest
        return tuple(x.clone(memory_format=torch.contiguous_format) for x in found)
    products, initial_state, skip = map(_plain, (products, initial_state, skip))
    form = (tuple(form[0].split("/")), *form[1:])
    tensors = (inputs, weights, bias, products, initial_state, skip, reset)
    kept, shown, *rest = kernel.forward(*tensors, form, keep)
    return *(like.new_empty(0) if x is None else x for x in (kept, shown)), *rest


def _run_backward(grad_shown, grad_states, grad_final, kept, states, wanted, *arguments):
    """The gradients of inputs, weights, bias, products, initial state and skip (of size 0: not wanted or not given)."""
    (inputs, weights, bias, products, initial_state, skip, reset), form = arguments[:7], arguments[7:]
    kernel = kernels.gated(states.device, states.dtype, True)
    _choices.record("gated_unit", *_choice(kernel, states))
    if kernel is None:
        bias, products, initial_state, skip = map(_leaf, (bias, products, initial_state, skip))
        inputs, weights = [_leaf(x) for x in inputs], [_leaf(x) for x in weights]
        grads = (grad_shown, grad_states, grad_final)
        bias, products, initial_state, skip, _, *matrices = _gradients_of_definition(
            grads, inputs, weights, bias, products, initial_state, skip, reset, form
        )
    else:
        grads = map(_plain, (grad_shown, grad_states, grad_final))
        products, initial_state, skip = map(_plain, (products, initial_state, skip))
        form = (tuple(form[0].split("/")), *form[1:])
        inputs, weights, bias, products, initial_state, skip = kernel.backward(
            *grads, kept if kept.numel() else None, states, wanted,
            inputs, weights, bias, products, initial_state, skip, reset, form,
        )  # fmt: skip
        matrices = [*inputs, *weights]
    given = (*matrices, bias, products, initial_state, skip)
    return [states.new_empty(0) if x is None else x.detach() for x in given]


def _choice(kernel, like: Tensor) -> tuple[str, str]:
    if kernel is None:
        return "definition", kernels.why_not_gated(like.device)
    return "numba", "cpu tensors in float32 and numba is installed"


def _leaf(x: Any) -> Any:
    return x if x is None else x.detach().requires_grad_()


def _plain(x: Tensor | None) -> Tensor | None:
    return x if x is None else x.resolve_neg()


def _fake_run(inputs, weights, bias, products, initial_state, skip, reset, *form_and_keep):
    *form, keep = form_and_keep
    like, blocks = (*inputs, products)[0], form[0].split("/")
    B, T = like.shape[:2]
    K = products.shape[-1] if products is not None else weights[0].shape[0]
    C = K // len(blocks)
    kept = like.new_empty((B, T, K) if keep else (0,))
    shown = like.new_empty((B, T, C) if "output" in blocks else (0,))
    return kept, shown, like.new_empty((B, T, C)), like.new_empty((B, C))


def _fake_run_backward(grad_shown, grad_states, grad_final, kept, states, wanted, *arguments):
    inputs, weights, bias, products, _, skip = arguments[:6]
    inputs = [x if want else None for x, want in zip(inputs, wanted, strict=True)]
    given = (*inputs, *weights, bias, products, states[:, 0], skip)
    return [states.new_empty(0) if x is None else x.new_empty(x.shape) for x in given]


_library.impl("gated_unit", _run, "CompositeExplicitAutograd")
_library.impl("gated_unit_backward", _run_backward, "CompositeExplicitAutograd")
torch.library.register_fake("legato::gated_unit", _fake_run, lib=_library)
torch.library.register_fake("legato::gated_unit_backward", _fake_run_backward, lib=_library)
