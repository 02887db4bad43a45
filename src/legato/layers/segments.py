"""Long sequences in the memory of one segment, by recomputation in the backward pass."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_flatten, tree_unflatten

from legato._shapes import Shaped, Tensor
from legato.layers._fused import transforms_are_active
from legato.layers.base import positive_int

AnyState = TypeVar("AnyState")

#: run(segments, leaves, part, tensors) -> (output, leaves); see ``over_segments``.
Run = Callable[[list[Tensor], list[Tensor], slice, Sequence[Any]], tuple[Tensor, list[Tensor]]]


def in_segments(
    layer: Callable[[Tensor, AnyState | None], tuple[Tensor, AnyState]],
    x: Shaped[Tensor, "B T *channels"],
    state: AnyState | None = None,
    *,
    steps: int,
    last_only: bool = False,
    recompute: bool = True,
) -> tuple[Tensor, AnyState]:
    """(output, state) = layer(x, state), with exact gradients, in the memory of one segment.

    The states between segments are stored. All other values are recomputed in the backward pass,
    which takes a third more time. The training memory is that of one segment, plus x, the outputs
    and one state per segment. Without gradients, nothing is computed twice. Supports first
    derivatives in reverse mode only. ``recompute=False`` supports all derivatives, and is always
    used in forward mode, in ``torch.func`` and in compiled graphs.

    Args:
        layer: a recurrent layer that reads forward only, a ``Stack``, or any function from (x,
            state) to (output, state). Such a function must compute all values that depend on
            parameters inside, and give the same result when called again; dropout draws the same
            numbers again.
        x: (batch, time, *channels), or tokens (batch, time).
        state: the initial state of the layer, or None.
        steps: length of a segment, 1 or more. Segments whose arrays are below 32 MiB each are also
            faster: the allocator reuses such blocks, but returns larger ones to the system.
        last_only: return the output of the last step, (batch, ...), in place of all, (batch, time,
            ...).
        recompute: False stores the values inside the segments, for sequences that fit into memory:
            shorter arrays are faster by themselves.

    Returns:
        The output and the state after the last step.

    Raises:
        ValueError: steps is below 1, last_only is given for a sequence without steps, or the layer
            is bidirectional, contains a bidirectional layer, or returns its last output only.
        RuntimeError: in a backward pass with create_graph=True, unless recompute is False.

    Example:
        >>> from legato import GILR
        >>> output, state = in_segments(GILR(4, 8), torch.randn(2, 100_000, 4), steps=4096, last_only=True)
        >>> output.shape
        torch.Size([2, 8])

    Source: recomputation as in Chen et al. 2016, "Training deep nets with sublinear memory cost".
    """
    positive_int(steps, "steps")
    _check_layer(layer)
    if last_only and x.shape[1] == 0:
        raise ValueError("expected at least one step for the last output, got none: drop last_only")
    if recompute and torch.is_grad_enabled() and x.shape[1] > steps and not transforms_are_active():
        return _recomputed_layer(layer, x, state, steps, last_only)
    outputs, after = [], cast("AnyState", state)
    for segment in x.split(steps, dim=1):
        output, after = layer(segment, after)
        outputs = [output] if last_only else [*outputs, output]
    return outputs[0][:, -1] if last_only else torch.cat(outputs, dim=1), after


def over_segments(
    run: Run,
    sequences: list[Tensor],
    leaves: list[Tensor],
    tensors: Sequence[Tensor | None],
    *,
    steps: int,
    random: bool = True,
) -> tuple[Tensor, list[Tensor]]:
    """(output, leaves) = run(segments, leaves, part, tensors), segment by segment, recomputed in the backward pass.

    ``run`` must get every tensor that needs a gradient as an argument. Second derivatives are
    supported; their backward pass stores all segments.

    Args:
        run: gets ``segments``, the slices ``sequences[:, part]``, and ``leaves``, the tensors of
            the state after the previous segment.
        sequences: one or more, (B, T, *channels) each.
        leaves: the tensors of the state before the first segment; an empty list for none.
        tensors: all other tensors that need a gradient; None entries are passed on.
        steps: length of a segment, less than T.
        random: whether ``run`` draws random numbers; the recomputation draws the same ones again.
    """
    if transforms_are_active():
        return _with_graph(run, sequences, leaves, tensors, steps, False)
    return _recomputed(_Plan(run, steps, sequences[0].device, random=random), sequences, leaves, tensors)


def _check_layer(layer: Callable) -> None:
    """Raise if the layer cannot be run in segments; functions cannot be checked."""
    name = type(layer).__name__
    inside = layer.modules() if isinstance(layer, nn.Module) else ()
    if any(getattr(module, "bidirectional", False) is True for module in inside):
        raise ValueError(
            f"expected a layer that reads forward only, got a {name} that is bidirectional: a segment "
            "does not include later steps. Pass complete sequences to the layer itself"
        )
    if getattr(layer, "return_sequences", True) is False:
        raise ValueError(
            f"expected a layer that returns all outputs, got a {name} that returns its last output only: "
            "build it with return_sequences=True and pass last_only=True for the last output"
        )


@dataclass
class _Plan:
    """The options of both passes over the segments, and the data stored by the first pass."""

    run: Run
    steps: int
    device: torch.device
    last_only: bool = False
    random: bool = True
    #: True: ``run`` gets every tensor that needs a gradient as an argument. False: its parameters
    #: are found in its graph.
    closed: bool = True
    autocast: dict[str, Any] = field(default_factory=dict)
    random_states: list[Tensor] = field(default_factory=list)
    counts: tuple[int, int] = (0, 0)


def _recomputed_layer(layer, x, state, steps, last_only):
    given, structure = tree_flatten(() if state is None else state)
    after: list[Any] = [None]  # the structure of the states that the layer returns

    def run(segments: list[Tensor], leaves: list[Tensor], part: slice, _: Sequence[Any]) -> tuple[Tensor, list[Tensor]]:
        before = tree_unflatten(leaves, after[0] if part.start else structure) if leaves else None
        output, state = layer(segments[0], before)
        leaves, after[0] = tree_flatten(state)
        return output, leaves

    output, leaves = _recomputed(_Plan(run, steps, x.device, last_only, closed=False), [x], given, [])
    return output, tree_unflatten(leaves, after[0])


def _recomputed(plan: _Plan, sequences, leaves, tensors) -> tuple[Tensor, list[Tensor]]:
    output, final, stored, parameters = _first_pass(plan, sequences, leaves, tensors)
    plan.counts = len(sequences), len(leaves)
    output, *final = _Segments.apply(plan, output, final, stored, *sequences, *leaves, *(tensors or parameters))
    return output, final


def _first_pass(plan: _Plan, sequences, leaves, tensors):
    """Output, final leaves, the leaves between segments, and the parameters, without a graph.

    Results and states are written to blocks that are allocated once. Small tensors between the
    large ones of each segment, as torch.utils.checkpoint allocates them, fragment the heap: it grew
    by 6 to 9 MiB per segment.
    """
    x, stored, output, parameters = sequences[0], [], None, {}
    parts = _parts(x, plan.steps)
    plan.autocast = {
        "dtype": torch.get_autocast_dtype(x.device.type),
        "enabled": torch.is_autocast_enabled(x.device.type),
    }
    tensors = [None if tensor is None else tensor.detach() for tensor in tensors]
    for number, part in enumerate(parts):
        if plan.random:
            _save_random_states(plan, number, len(parts))
        if number:
            stored = stored or [leaf.new_empty(len(parts), *leaf.shape) for leaf in leaves]
            for block, leaf in zip(stored, leaves, strict=True):
                block[number] = leaf
            leaves = [block[number] for block in stored]
        segments, before = ([part.detach() for part in x] for x in ([x[:, part] for x in sequences], leaves))
        with torch.no_grad() if plan.closed else _graph_without_tensors():
            result, leaves = plan.run(segments, before, part, tensors)
        if not plan.closed:
            parameters |= {id(leaf): leaf for leaf in _graph_leaves([result, *leaves])}
            result, leaves = result.detach(), [leaf.detach() for leaf in leaves]
        if plan.last_only:
            output = result[:, -1].clone()
        else:
            output = result.new_empty(*x.shape[:2], *result.shape[2:]) if output is None else output
            output[:, part] = result
        del result
    return output, leaves, stored, list(parameters.values())


@contextmanager
def _graph_without_tensors() -> Iterator[None]:
    """Build a graph from which the parameters can be found, without saved tensors."""
    with torch.enable_grad(), saved_tensors_hooks(lambda tensor: None, _no_tensor):
        yield


def _no_tensor(_: Any) -> Tensor:
    raise RuntimeError("the graph that finds the parameters of a segment has no backward pass")


class _Segments(Function):
    """The results of the first pass; the backward pass recomputes the segments in reverse order."""

    @staticmethod
    def forward(ctx, plan, output, final, stored, *given):
        ctx.plan = plan
        ctx.save_for_backward(*given, *stored)
        return output, *final

    @staticmethod
    def backward(ctx, grad_output, *grads):
        plan, needs_grads, saved = ctx.plan, ctx.needs_input_grad[4:], ctx.saved_tensors
        given, stored = saved[: len(needs_grads)], saved[len(needs_grads) :]
        # A second derivative would be incomplete, without an error.
        if torch.is_grad_enabled() and not plan.closed:
            raise RuntimeError(
                "expected a backward pass without create_graph=True, got one with it: in_segments supports "
                "first derivatives only. Pass recompute=False for higher ones"
            )
        # create_graph: the gradient is differentiated again; is_grads_batched: it is mapped by
        # vmap.
        if torch.is_grad_enabled() or any(map(is_legacy_batchedtensor, (grad_output, *grads))):
            return *[None] * 4, *_gradients_with_graph(plan, given, (grad_output, *grads), needs_grads)
        sequences, leaves, tensors = _split(given, plan.counts)
        of_sequences, of_leaves, of_tensors = _split(needs_grads, plan.counts)
        blocks = [torch.empty_like(x) if needed else None for x, needed in zip(sequences, of_sequences, strict=True)]
        sums = [torch.zeros_like(x) if needed else None for x, needed in zip(tensors, of_tensors, strict=True)]
        grads = [grad.clone() for grad in grads]
        for number, part in reversed(list(enumerate(_parts(sequences[0], plan.steps)))):
            before = [block[number] for block in stored] if number else leaves
            found = _add_gradients(plan, number, part, sequences, before, tensors, grad_output, grads, blocks, sums)
            if number:
                for grad, of_before in zip(grads, found, strict=True):
                    grad.copy_(of_before)
                del found
        of_leaves = [grad if needed else None for grad, needed in zip(found, of_leaves, strict=True)]
        return *[None] * 4, *blocks, *of_leaves, *sums


def _add_gradients(
    plan: _Plan, number, part, sequences, leaves, tensors, grad_output, grads, blocks, sums
) -> list[Tensor]:
    """Compute the gradients of one segment.

    Writes those of the sequences to ``blocks``, adds those of ``tensors`` to ``sums``, and returns
    those of the state before the segment.
    """
    segments = [
        x[:, part].detach().requires_grad_(block is not None) for x, block in zip(sequences, blocks, strict=True)
    ]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    if plan.closed:  # detached: hooks of the user's tensors must run once, on the complete gradient
        tensors = [
            x if x is None else x.detach().requires_grad_(total is not None)
            for x, total in zip(tensors, sums, strict=True)
        ]
    with torch.enable_grad(), torch.autocast(plan.device.type, **plan.autocast), _as_before(plan, number):
        output, after = plan.run(segments, leaves, part, tensors)
        output = output[:, -1] if plan.last_only else output
    pairs = list(zip(after, grads, strict=True))
    if not plan.last_only:
        pairs.append((output, grad_output[:, part]))
    elif part.stop >= sequences[0].shape[1]:
        pairs.append((output, grad_output))
    trained = [(x, total) for x, total in zip(tensors, sums, strict=True) if total is not None]
    read = [(x, block[:, part]) for x, block in zip(segments, blocks, strict=True) if block is not None]
    sources = [x for x, _ in trained if x is not None]
    with nullcontext() if plan.closed else _hooks_off(sources):
        found = _gradients(pairs, [*leaves, *sources, *(x for x, _ in read)])
    for (_, total), grad in zip(trained, found[len(leaves) :], strict=False):
        total += grad
    for (_, block), grad in zip(read, found[len(leaves) + len(trained) :], strict=True):
        block.copy_(grad)
    return list(found[: len(leaves)])


def _gradients_with_graph(plan: _Plan, given, grads, needs_grads) -> list[Tensor | None]:
    """The gradients of ``_with_graph``, differentiable if gradients are enabled."""

    def run(segments, leaves, part, tensors):
        with _as_before(plan, part.start // plan.steps):
            return plan.run(segments, leaves, part, tensors)

    sequences, leaves, parameters = _split(given, plan.counts)
    named = given if plan.closed else [*sequences, *leaves]
    with torch.enable_grad(), torch.autocast(plan.device.type, **plan.autocast):
        # Aliases, so that a tensor computed from another one gets the gradient of this function
        # only.
        named = [x.view_as(x) if needed else x for x, needed in zip(named, needs_grads, strict=False)]
        sequences, leaves, tensors = _split(named, plan.counts)
        output, leaves = _with_graph(run, sequences, leaves, tensors, plan.steps, plan.last_only)
    given = named if plan.closed else [*named, *parameters]
    sources = [source for source, needed in zip(given, needs_grads, strict=True) if needed]
    pairs = list(zip([output, *leaves], grads, strict=True))
    with nullcontext() if plan.closed else _hooks_off(parameters):
        found = iter(_gradients(pairs, sources, create_graph=torch.is_grad_enabled()))
    return [next(found) if needed else None for needed in needs_grads]


def _with_graph(run: Run, sequences, leaves, tensors, steps, last_only) -> tuple[Tensor, list[Tensor]]:
    """The segments in order with one graph, for all derivatives: stores all segments."""
    outputs = []
    for part in _parts(sequences[0], steps):
        output, leaves = run([sequence[:, part] for sequence in sequences], leaves, part, tensors)
        outputs = [output] if last_only else [*outputs, output]
    if last_only:
        return outputs[0][:, -1], leaves
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1), leaves


def _gradients(pairs: list[tuple[Tensor, Tensor]], sources: list[Tensor], **options: Any) -> tuple[Tensor, ...]:
    # If the weights of a layer are fixed, the state after the first segment has no gradient.
    pairs = [(output, grad) for output, grad in pairs if output.requires_grad]
    outputs, grads = [output for output, _ in pairs], [grad for _, grad in pairs]
    return torch.autograd.grad(outputs, sources, grads, materialize_grads=True, **options)


def _split(given: Sequence, counts: tuple[int, int]) -> tuple[list, list, list]:
    """Sequences, leaves of a state, other tensors."""
    sequences, leaves = counts
    return list(given[:sequences]), list(given[sequences : sequences + leaves]), list(given[sequences + leaves :])


def _parts(x: Tensor, steps: int) -> list[slice]:
    """The segments in order; a sequence without steps has one."""
    return [slice(start, start + steps) for start in range(0, max(x.shape[1], 1), steps)]


def _graph_leaves(outputs: list[Tensor]) -> Iterator[Tensor]:
    """The leaf tensors of the graph of ``outputs``, each once."""
    nodes, visited = [output.grad_fn for output in outputs], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        if (variable := getattr(node, "variable", None)) is not None:
            yield variable
        nodes += [following for following, _ in node.next_functions]


@contextmanager
def _hooks_off(leaves: Sequence[Tensor]) -> Iterator[None]:
    """Disable the hooks of the user's parameters: they must run once, on the complete gradient."""
    hooks = [leaf._backward_hooks for leaf in leaves]
    try:
        for leaf in leaves:
            leaf._backward_hooks = None
        yield
    finally:
        for leaf, before in zip(leaves, hooks, strict=True):
            leaf._backward_hooks = before


def _random_states(device: torch.device) -> list[Tensor]:
    """The state of every generator that a layer on this device may draw from."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _save_random_states(plan: _Plan, number: int, count: int) -> None:
    """Save the state of every generator before segment ``number`` of ``count``, in blocks allocated once."""
    states = _random_states(plan.device)
    if number == 0:
        plan.random_states = [torch.empty(count, *state.shape, dtype=torch.uint8, device="cpu") for state in states]
    for block, state in zip(plan.random_states, states, strict=True):
        block[number] = state


@contextmanager
def _as_before(plan: _Plan, number: int) -> Iterator[None]:
    """Draw the same random numbers as in the forward pass of this segment."""
    if not plan.random:
        yield
        return
    cuda = plan.device.type == "cuda"
    with torch.random.fork_rng([plan.device] if cuda else []):
        torch.set_rng_state(plan.random_states[0][number].clone())  # torch reads past the end of a view
        if cuda:
            torch.cuda.set_rng_state(plan.random_states[1][number].clone(), plan.device)
        yield
