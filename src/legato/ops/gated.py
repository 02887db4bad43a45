"""The diagonal recurrence with sigmoid gates, as used by gated layers.

    h_t = f_t * h_{t-1} + w_t * g(candidate_t),  f_t = sigmoid(forget_t),  w_t = 1 - f_t, or sigmoid(write_t)

The definition is ``linear_recurrence`` with decay f_t and impulse w_t g(candidate_t); see
``recurrence.py``. ``gated_unit`` also computes the matrix product before the recurrence and the
output gate after it, which is everything that a gated layer computes. On a CPU in float32,
``kernels/numba_gated.py`` computes it one chunk of the sequence at a time, so that intermediate
results are still in the cache when they are used. In all other cases the definition is computed.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import Function, forward_ad

from legato._checks import check_device, check_numbers, check_reset
from legato._dtypes import carry_dtype, without_autocast
from legato._gate_spec import GateSpec
from legato._shapes import Bool, Float, Tensor
from legato.ops import backends
from legato.ops.recurrence import linear_recurrence


def gated_recurrence(
    forget: Float[Tensor, "B T C"],
    candidate: Float[Tensor, "B T C"],
    write: Float[Tensor, "B T C"] | None = None,
    initial_state: Float[Tensor, "B C"] | None = None,
    *,
    candidate_tanh: bool = False,
    reset: Bool[Tensor, "B T"] | None = None,
    backend: str | None = None,
) -> tuple[Float[Tensor, "B T C"], Float[Tensor, "B C"]]:
    """h_t = f_t h_{t-1} + w_t g(candidate_t), f_t = sigmoid(forget_t), w_t = sigmoid(write_t) or, without it, 1 - f_t.

    Gates are computed in float32 or wider for all input dtypes: in 16 bits a decay above 0.998
    rounds to one, but a memory of 1,000 steps needs a decay of 0.999. 1 - f_t is computed as
    sigmoid(-forget_t), which is accurate near f_t = 1.

    Args:
        forget: the forget gate before its sigmoid, (batch, time, channels).
        candidate: the candidate before g, (batch, time, channels).
        write: the input gate before its sigmoid, (batch, time, channels); None uses 1 - f_t.
        initial_state: the state before the first step, (batch, channels); zeros by default.
        candidate_tanh: whether g is tanh; otherwise g is the identity.
        reset: True at a step before which the state is reset to zero, (batch, time).
        backend: as for ``linear_recurrence``.

    Returns:
        The states, and the state after the last step, both in float32 or wider.

    Raises:
        TypeError, ValueError: as ``linear_recurrence``. TypeError also if a gate is complex.

    Example:
        >>> states, last = gated_recurrence(torch.zeros(1, 3, 1), torch.ones(1, 3, 1))
        >>> states.flatten().tolist()
        [0.5, 0.75, 0.875]

    Source: Martin & Cundy 2018, section 3 (GILR); with ``write``, the cell of their GILR-LSTM.
    """
    check_numbers(real=True, forget=forget, candidate=candidate, write=write)
    for name, x in {"forget": forget, "write": write}.items():
        check_device(name, x, "candidate", candidate)
        if x is not None and x.shape != candidate.shape:
            raise ValueError(f"{name} must be of the candidate's shape {tuple(candidate.shape)}, got {tuple(x.shape)}")
    with without_autocast(candidate):
        decay, impulse = _decay_and_impulse(forget, candidate, write, candidate_tanh)
        return linear_recurrence(decay, impulse, initial_state, reset=reset, backend=backend)


def gated_step(
    forget: Float[Tensor, "B C"],
    candidate: Float[Tensor, "B C"],
    write: Float[Tensor, "B C"] | None,
    state: Float[Tensor, "B C"],
    *,
    candidate_tanh: bool = False,
) -> Float[Tensor, "B C"]:
    """One step of ``gated_recurrence`` in plain torch: the next state, in float32 or wider."""
    with without_autocast(candidate):
        decay, impulse = _decay_and_impulse(forget, candidate, write, candidate_tanh)
        return torch.addcmul(impulse, decay, state)


def _decay_and_impulse(
    forget: Tensor, candidate: Tensor, write: Tensor | None, candidate_tanh: bool
) -> tuple[Tensor, Tensor]:
    dtype = carry_dtype(candidate.dtype)
    forget, candidate = forget.to(dtype), candidate.to(dtype)
    gate = (-forget if write is None else write.to(dtype)).sigmoid()
    return forget.sigmoid(), gate * (candidate.tanh() if candidate_tanh else candidate)


def gated_unit(
    inputs: tuple[Float[Tensor, "..."], ...],
    weights: tuple[Float[Tensor, "..."], ...],
    bias: Float[Tensor, "K"] | None,
    spec: GateSpec,
    initial_state: Float[Tensor, "B C"] | None = None,
    *,
    products: Float[Tensor, "B T K"] | None = None,
    activation: Callable[[Tensor], Tensor] | None = None,
    reset: Bool[Tensor, "B T"] | None = None,
    backend: str | None = None,
) -> tuple[Float[Tensor, "B T C"], Float[Tensor, "B T C"], Float[Tensor, "B C"]]:
    """z_t = products_t + sum_i W_i x_i,t + b; c_t = f_t c_{t-1} + w_t g(candidate_t);
    h_t = o_t activation(c_t) + (1 - o_t) skip_t.

    Args:
        inputs: x_i, each (batch, time, channels of x_i).
        weights: W_i, each (K, channels of x_i).
        bias: b, (K,).
        spec: the names of the K / C blocks of z, and the choice of g and skip_t.
        initial_state: c_0, (batch, C); zeros by default.
        products: a term of z that is already computed, (batch, time, K).
        activation: applied to c_t before the output gate; None is the identity. The kernel computes
            None and ``torch.tanh``.
        reset: True at a step before which the state is reset to zero, (batch, time).
        backend: as for ``linear_recurrence``. The definition is computed for a backend without a
            kernel of this op.

    Returns:
        h_t, c_t and the last c, all in float32 or wider.

    Raises:
        TypeError, ValueError: as ``linear_recurrence``. TypeError also if a dtype is complex;
            ValueError also if an activation is given without an "output" block.
    """
    if activation is not None and "output" not in spec.blocks:
        raise ValueError("activation needs an 'output' block: add the block or drop the activation")
    _check(inputs, weights, spec, bias, initial_state, products, reset)
    tensors = (*inputs, *weights, bias, products, initial_state)
    like: Any = (*inputs, products)[0]
    backend = backends.resolve(backend, like.device)
    if not _fusible(tensors, activation, backend):
        return _definition(inputs, weights, bias, products, initial_state, reset, spec, activation, backend)
    others, output_tanh = (bias, products, initial_state, reset), activation is not None
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        options = spec, output_tanh, backend, _saves_products(inputs), len(inputs)
        found = _GatedUnit.apply(*options, *others, *inputs, *weights)
    else:  # without gradients torch.compile shifts the arguments of the Function's forward by one
        options = *_fields(spec), output_tanh, backend, False
        found = torch.ops.legato.gated_unit(list(inputs), list(weights), *others, *options)
    _, output, states, final = found
    return (output if "output" in spec.blocks else states), states, final


def gated_unit_step(
    inputs: tuple[Float[Tensor, "..."], ...],
    weights: tuple[Float[Tensor, "..."], ...],
    bias: Float[Tensor, "K"],
    spec: GateSpec,
    state: Float[Tensor, "B C"],
    *,
    activation: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B C"]]:
    """One step of ``gated_unit`` in plain torch, without the time axis: h_t and c_t.

    Launching a kernel costs more than the few operations of one step. ``spec.delayed`` has no
    effect on a single step.
    """
    block = _blocks(_products(inputs, weights, bias, None), spec)
    state = gated_step(
        block["forget"], block["candidate"], block.get("write"), state, candidate_tanh=spec.candidate_tanh
    )
    return _gated_output(state, block, inputs, spec, activation), state


def _check(inputs, weights, spec, bias, initial_state, products, reset) -> None:
    """Check all shapes: the kernel would read beyond the end of a smaller tensor."""
    given = {"bias": bias, "products": products, "initial_state": initial_state}
    for i, (x, weight) in enumerate(zip(inputs, weights, strict=True)):
        given |= {f"inputs[{i}]": x, f"weights[{i}]": weight}
    check_numbers(real=True, **given)
    like = (*inputs, products)[0]
    (B, T), K = like.shape[:2], weights[0].shape[0] if weights else products.shape[-1]
    C = K // len(spec.blocks)
    shapes = {"bias": (K,), "products": (B, T, K), "initial_state": (B, C)}
    for i, x in enumerate(inputs):
        width = C if spec.skips_input and i == 0 else x.shape[-1]
        shapes |= {f"inputs[{i}]": (B, T, width), f"weights[{i}]": (K, width)}
    for name, x in given.items():
        if x is not None and x.shape != shapes[name]:
            raise ValueError(
                f"{name} must be of shape {tuple(shapes[name])}, got {tuple(x.shape)}: batch, time and channels must "
                "be those of the other tensors"
            )
        check_device(name, x, "inputs[0]" if inputs else "products", like)
    check_reset(reset, "inputs[0]" if inputs else "products", like)


# Up to this many input channels in total, the backward recomputes the products, which costs less
# than saving them.
_FEW_CHANNELS = 32


def _saves_products(inputs: tuple[Tensor, ...]) -> bool:
    return sum(x.shape[-1] for x in inputs) > _FEW_CHANNELS


def _fusible(tensors: tuple[Tensor | None, ...], activation: Callable | None, backend: str | None) -> bool:
    """Whether the kernel can compute this, with the derivatives that may be taken."""
    given = [x for x in tensors if x is not None]
    why = _unsupported(given, activation, backend)
    if torch.compiler.is_compiling():
        return why is None
    if why is None:
        why = _unsupported_eagerly(given, backend)
    if why is not None:
        backends.record("gated_unit", "definition", why)
    return why is None


def _unsupported(given: list[Tensor], activation: Callable | None, backend: str | None) -> str | None:
    """Why the kernel cannot compute this, or None; also evaluated in compiled code."""
    if given[0].device.type != "cpu":
        return f"no kernel for {given[0].device.type}"
    if backend not in (None, "numba"):
        return f"no kernel in backend {backend!r}"
    if activation not in (None, torch.tanh):
        return "the kernel does not compute this activation"
    if any(x.dtype != torch.float32 for x in given):
        return "the kernel is for float32"
    if any(x.numel() == 0 for x in given):
        return "nothing to compute"
    if torch.is_autocast_enabled("cpu"):
        return "autocast"
    return "torch.func" if torch._C._are_functorch_transforms_active() else None


def _unsupported_eagerly(given: list[Tensor], backend: str | None) -> str | None:
    kernel, _, why = backends.choose("gated_unit", given[0].device, backend, torch.float32)
    if kernel is None:
        return why
    if forward_ad._current_level >= 0:
        return "a forward-mode derivative"
    if any(type(x) not in (Tensor, torch.nn.Parameter) for x in given):
        return "a tensor subclass"
    return None


def _definition(inputs, weights, bias, products, initial_state, reset, spec, activation, backend):
    z = _products(inputs, weights, bias, products)
    return _definition_of_products(z, inputs, initial_state, reset, spec, activation, backend)


def _definition_of_products(z, inputs, initial_state, reset, spec, activation, backend):
    block = _blocks(z, spec)
    gates = block["forget"], block["candidate"], block.get("write")
    options = {"candidate_tanh": spec.candidate_tanh, "reset": reset, "backend": backend}
    states, final = gated_recurrence(*gates, initial_state, **options)
    if spec.delayed:
        states = one_step_later(states, initial_state, reset)
    return _gated_output(states, block, inputs, spec, activation), states, final


def _products(inputs, weights, bias, products) -> Tensor:
    z = products
    for x, weight in zip(inputs, weights, strict=True):
        z = F.linear(x, weight, bias) if z is None else z + F.linear(x, weight)
    return z if products is None or bias is None else z + bias


def _blocks(z: Tensor, spec: GateSpec) -> dict[str, Tensor]:
    return dict(zip(spec.blocks, z.chunk(len(spec.blocks), dim=-1), strict=True))


def _gated_output(states: Tensor, block: dict[str, Tensor], inputs, spec: GateSpec, activation) -> Tensor:
    """o_t activation(c_t) + (1 - o_t) skip_t, or c_t without an output gate."""
    if "output" not in block:
        return states
    output = states if activation is None else activation(states)
    gate, skip = block["output"].to(states.dtype).sigmoid(), inputs[0] if spec.skips_input else block.get("skip")
    return gate * output if skip is None else torch.lerp(skip.to(states.dtype), output, gate)


def one_step_later(
    states: Float[Tensor, "B T C"], initial: Float[Tensor, "B C"] | None, reset: Bool[Tensor, "B T"] | None
) -> Float[Tensor, "B T C"]:
    """s_{t-1} at step t: ``initial`` (None: zeros) at the first step, zero where it is reset."""
    first = torch.zeros_like(states[:, :1]) if initial is None else initial[:, None].to(states.dtype)
    before = torch.cat([first, states[:, :-1]], dim=1) if states.shape[1] else states
    return before if reset is None else before.masked_fill(reset[..., None], 0)


class _GatedUnit(Function):
    """The kernel and its adjoint. Saves products and states; the adjoint recomputes the gates."""

    @staticmethod
    def forward(spec, output_tanh, backend, save_products, count, bias, products, initial_state, reset, *matrices):
        inputs, weights = list(matrices[:count]), list(matrices[count:])
        options = *_fields(spec), output_tanh, backend, save_products
        return torch.ops.legato.gated_unit(inputs, weights, bias, products, initial_state, reset, *options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.spec, ctx.output_tanh, ctx.backend, _, ctx.count, *tensors = inputs
        saved_products, _, states, _ = output
        ctx.mark_non_differentiable(saved_products)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(saved_products, states, *tensors)

    @staticmethod
    def backward(ctx, _, grad_output, grad_states, grad_final):
        saved_products, states, bias, products, initial_state, reset, *matrices = ctx.saved_tensors
        if "output" not in ctx.spec.blocks:
            grad_output = None
        grads = grad_output, grad_states, grad_final
        if all(grad is None for grad in grads):
            return (None,) * (9 + len(matrices))
        inputs, weights = matrices[: ctx.count], matrices[ctx.count :]
        tensors = inputs, weights, bias, products, initial_state, reset
        if not torch.compiler.is_compiling() and (torch.is_grad_enabled() or any(map(_mapped, grads))):
            # create_graph differentiates the gradient and is_grads_batched maps it: only the
            # gradient of the definition supports both.
            options = ctx.spec, _activation(ctx.output_tanh), ctx.backend
            return (None,) * 5 + _gradients_of_definition(grads, *tensors, *options)
        wanted = ctx.needs_input_grad[9:]
        options = *_fields(ctx.spec), ctx.output_tanh, ctx.backend
        found = torch.ops.legato.gated_unit_backward(
            *grads, saved_products, states, wanted[: ctx.count], *tensors, *options
        )
        matrices, others = found[: 2 * ctx.count], found[2 * ctx.count :]
        matrices = [grad if needed else None for grad, needed in zip(matrices, wanted, strict=True)]
        given = bias, products, initial_state
        others = [None if x is None else grad for x, grad in zip(given, others, strict=True)]
        return *(None,) * 5, *others, None, *matrices


def _mapped(grad: Tensor | None) -> bool:
    return grad is not None and is_legacy_batchedtensor(grad)


def _gradients_of_definition(grads, inputs, weights, bias, products, initial_state, reset, spec, activation, backend):
    """The gradients of bias, products, initial state, resets, inputs and weights, as a graph."""
    with torch.enable_grad():
        # Aliases, so that a tensor that is passed as two arguments gets one gradient for each.
        given = [x if x is None else x.view_as(x) for x in (bias, products, initial_state, *inputs, *weights)]
        bias, products, initial_state, *matrices = given
        inputs, weights = matrices[: len(inputs)], matrices[len(inputs) :]
        outputs = _definition(inputs, weights, bias, products, initial_state, reset, spec, activation, backend)
        outputs, grads = zip(*((y, g) for y, g in zip(outputs, grads, strict=True) if g is not None), strict=True)
        wanted = [x for x in given if x is not None and x.requires_grad]
        found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True, allow_unused=True))
    result = [next(found) if x is not None and x.requires_grad else None for x in given]
    return *result[:3], None, *result[3:]


# --- the registered ops, which torch.compile and torch.export record ---
# They take simple types only, so each field of the spec is a separate argument.

_library = torch.library.Library("legato", "FRAGMENT")
_arguments = (
    "Tensor[] inputs, Tensor[] weights, Tensor? bias, Tensor? products, Tensor? initial_state, Tensor? reset,"
    " str[] blocks, bool candidate_tanh, bool delayed, bool skips_input, bool output_tanh, str? backend"
)
_library.define(f"gated_unit({_arguments}, bool save_products) -> (Tensor, Tensor, Tensor, Tensor)")
_library.define(
    "gated_unit_backward(Tensor? grad_output, Tensor? grad_states, Tensor? grad_final, Tensor saved_products,"
    f" Tensor states, bool[] wanted, {_arguments}) -> Tensor[]"
)


def _fields(spec: GateSpec) -> tuple[tuple[str, ...], bool, bool, bool]:
    """The spec as arguments of the registered ops."""
    return spec.blocks, spec.candidate_tanh, spec.delayed, spec.skips_input


_spec = cache(GateSpec)


def _activation(output_tanh: bool) -> Callable[[Tensor], Tensor] | None:
    """The activations that the registered ops support."""
    return torch.tanh if output_tanh else None


def _run(
    inputs, weights, bias, products, initial_state, reset,
    blocks, candidate_tanh, delayed, skips_input, output_tanh, backend, save_products,
):  # fmt: skip
    """Products (size 0 if not saved), h_t (size 0 without output gate), c_t and the last c."""
    spec = _spec(tuple(blocks), candidate_tanh, delayed, skips_input)
    like = (*inputs, products)[0]
    kernel, name, why = backends.choose("gated_unit", like.device, backend, like.dtype)
    backends.record("gated_unit", name, why)
    if kernel is None:
        z = _products(inputs, weights, bias, products)
        options = spec, _activation(output_tanh), backend
        output, *rest = _definition_of_products(z, inputs, initial_state, reset, *options)
        found = z if save_products else z.new_empty(0), output if "output" in blocks else z.new_empty(0), *rest
        return tuple(x.clone(memory_format=torch.contiguous_format) for x in found)
    products, initial_state = _resolved(products), _resolved(initial_state)
    tensors = inputs, weights, bias, products, initial_state, reset
    saved, output, *rest = kernel.forward(*tensors, spec, output_tanh, save_products)
    return *(like.new_empty(0) if x is None else x for x in (saved, output)), *rest


def _run_backward(
    grad_output, grad_states, grad_final, saved_products, states, wanted,
    inputs, weights, bias, products, initial_state, reset,
    blocks, candidate_tanh, delayed, skips_input, output_tanh, backend,
):  # fmt: skip
    """Gradients of inputs, weights, bias, products and initial state; size 0 if not needed."""
    spec = _spec(tuple(blocks), candidate_tanh, delayed, skips_input)
    kernel, name, why = backends.choose("gated_unit", states.device, backend, states.dtype, True)
    backends.record("gated_unit", name, why)
    grads = grad_output, grad_states, grad_final
    if kernel is None:
        bias, products, initial_state = map(_leaf, (bias, products, initial_state))
        inputs, weights = [_leaf(x) for x in inputs], [_leaf(x) for x in weights]
        tensors = inputs, weights, bias, products, initial_state, reset
        options = spec, _activation(output_tanh), backend
        bias, products, initial_state, _, *matrices = _gradients_of_definition(grads, *tensors, *options)
    else:
        products, initial_state = _resolved(products), _resolved(initial_state)
        saved = saved_products if saved_products.numel() else None
        tensors = inputs, weights, bias, products, initial_state, reset
        inputs, weights, bias, products, initial_state = kernel.backward(
            *map(_resolved, grads), saved, states, wanted, *tensors, spec, output_tanh
        )
        matrices = [*inputs, *weights]
    given = (*matrices, bias, products, initial_state)
    return [states.new_empty(0) if x is None else x.detach() for x in given]


def _leaf(x: Any) -> Any:
    return x if x is None else x.detach().requires_grad_()


def _resolved(x: Tensor | None) -> Tensor | None:
    return x if x is None else x.resolve_neg()


def _fake_run(inputs, weights, bias, products, initial_state, reset, blocks, *options):
    like, save_products = (*inputs, products)[0], options[-1]
    B, T = like.shape[:2]
    K = products.shape[-1] if products is not None else weights[0].shape[0]
    C = K // len(blocks)
    saved_products = like.new_empty((B, T, K) if save_products else (0,))
    output = like.new_empty((B, T, C) if "output" in blocks else (0,))
    return saved_products, output, like.new_empty((B, T, C)), like.new_empty((B, C))


def _fake_run_backward(
    grad_output, grad_states, grad_final, saved_products, states, wanted, inputs, weights, bias, products, *options
):
    inputs = [x if want else None for x, want in zip(inputs, wanted, strict=True)]
    given = (*inputs, *weights, bias, products, states[:, 0])
    return [states.new_empty(0) if x is None else x.new_empty(x.shape) for x in given]


_library.impl("gated_unit", _run, "CompositeExplicitAutograd")
_library.impl("gated_unit_backward", _run_backward, "CompositeExplicitAutograd")
torch.library.register_fake("legato::gated_unit", _fake_run, lib=_library)
torch.library.register_fake("legato::gated_unit_backward", _fake_run_backward, lib=_library)
