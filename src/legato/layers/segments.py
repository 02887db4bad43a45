"""Long sequences in the memory of a short one: time cut into segments, each computed again in the backward pass."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import Function, forward_ad
from torch.utils._pytree import tree_flatten, tree_unflatten

from legato._shapes import Shaped, Tensor
from legato.layers._base import positive_int

#: run(segments, leaves, part, tensors) -> (output, leaves); see ``over_segments``.
Run = Callable[[list[Tensor], list[Tensor], slice, Sequence[Any]], tuple[Tensor, list[Tensor]]]


def in_segments(
    layer: Callable[[Tensor, Any], tuple[Tensor, Any]],
    x: Shaped[Tensor, "B T *channels"],
    state: Any = None,
    *,
    steps: int,
    last_only: bool = False,
    recompute: bool = True,
) -> tuple[Tensor, Any]:
    """(output, state) = layer(x, state), exactly, with gradients through all of it, holding one segment at a time.

    The states between segments are kept, everything inside them is computed again in the backward: for a third more
    time, training memory is that of one segment, plus x, the outputs and one state a segment. Where no gradient is
    asked for, nothing is computed twice. First derivatives only, in reverse mode; ``recompute=False`` has them all, and
    takes its place in forward mode, in ``torch.func`` and in compiled graphs.

    Args:
        layer: a recurrent layer that reads forward only, a ``Stack``, or any function of (x, state) to (output, state)
            that computes what it needs from its parameters inside, and the same when called again: dropout draws the
            same numbers twice.
        x: (batch, time, *channels), tokens (batch, time) too.
        state: as the layer takes it.
        steps: of a segment, 1 or more. A segment whose arrays stay under 32 MiB each is also quicker: the allocator
            reuses such blocks, and hands larger ones back to the system.
        last_only: return the output of the last step, (batch, ...), in place of all, (batch, time, ...).
        recompute: False keeps what is inside the segments, for sequences that fit: shorter arrays alone are quicker.

    Returns:
        The output and the state after the last step.

    Raises:
        ValueError: steps is below 1, last_only is asked of a sequence without steps, or the layer, or one inside it,
            is bidirectional or gives its last output only.
        RuntimeError: by the backward with create_graph=True, where recompute is not False.

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
        raise ValueError("expected at least one step for the last output, got x with none: leave last_only out")
    if recompute and torch.is_grad_enabled() and x.shape[1] > steps and recomputable():
        return _recomputed(layer, x, state, steps, last_only)
    outputs = []
    for segment in x.split(steps, dim=1):
        output, state = layer(segment, state)
        outputs = [output] if last_only else [*outputs, output]
    return outputs[0][:, -1] if last_only else torch.cat(outputs, dim=1), state


def over_segments(
    run: Run,
    sequences: list[Tensor],
    leaves: list[Tensor],
    tensors: Sequence[Tensor | None],
    *,
    steps: int,
    last_only: bool = False,
    random: bool = True,
    closed: bool = True,
) -> tuple[Tensor, list[Tensor]]:
    """(output, leaves) = run(segments, leaves, part, tensors) from segment to segment, each again in the backward.

    Args:
        run: ``segments`` are those ``sequences[:, part]``, ``leaves`` those of the state after the segment before.
        sequences: one or more, (B, T, *channels) each.
        leaves: of the state before the first segment, or none.
        tensors: all else that a gradient is for; None among them is passed on.
        steps: of a segment.
        last_only: the output of the last step in place of all.
        random: whether ``run`` draws random numbers; it draws the same ones again.
        closed: whether ``run`` has all that it differentiates by from its arguments. Then there are second derivatives
            too, whose backward holds all segments at once.
    """
    if sequences[0].shape[1] <= steps or not recomputable():
        return _in_turn(run, sequences, leaves, tensors, steps, last_only)
    counts = len(sequences), len(leaves)
    output, *leaves = _Segments.apply(run, steps, last_only, random, closed, counts, *sequences, *leaves, *tensors)
    return output, leaves


def recomputable() -> bool:
    """Whether segments can be computed again in the backward: transforms and compilers do not look into ours."""
    return not (
        torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    )


def _check_layer(layer: Callable) -> None:
    """Layers whose segments are not parts of their one pass: a function's own, nobody can see."""
    name = type(layer).__name__
    inside = layer.modules() if isinstance(layer, nn.Module) else ()
    if any(getattr(module, "bidirectional", False) is True for module in inside):
        raise ValueError(
            f"expected a layer that reads forward only, got a {name} that is bidirectional: a segment does not know "
            "what comes after it. Give whole sequences to the layer itself"
        )
    if getattr(layer, "return_sequences", True) is False:
        raise ValueError(
            f"expected a layer that gives all its outputs, got a {name} that gives its last alone: build it with "
            "return_sequences=True and last_only=True gives that of the last segment"
        )


def _recomputed(layer, x, state, steps, last_only):
    given, form = tree_flatten(() if state is None else state)
    with torch.enable_grad(), _forked(x):  # a first look: which parameters there are, and the form of a state
        start = tree_unflatten([leaf.detach() for leaf in given], form) if given else None
        output, after = layer(x[:, :steps].detach(), start)
    leaves, after_form = tree_flatten(after)
    parameters = list(_parameters([output, *leaves]))
    del output, after, leaves

    def run(segments: list[Tensor], leaves: list[Tensor], part: slice, _: Sequence[Any]) -> tuple[Tensor, list[Tensor]]:
        before = tree_unflatten(leaves, after_form if part.start else form) if leaves else None
        output, state = layer(segments[0], before)
        return output, tree_flatten(state)[0]

    output, leaves = over_segments(run, [x], given, parameters, steps=steps, last_only=last_only, closed=False)
    return output, tree_unflatten(leaves, after_form)


def _in_turn(run: Run, sequences, leaves, tensors, steps, last_only) -> tuple[Tensor, list[Tensor]]:
    """``over_segments`` for every kind of derivative: holds what each segment needs for its own."""
    outputs = []
    for part in _parts(sequences[0], steps):
        output, leaves = run([sequence[:, part] for sequence in sequences], leaves, part, tensors)
        outputs = [output] if last_only else [*outputs, output]
    if last_only:
        return outputs[0][:, -1], leaves
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1), leaves


class _Segments(Function):
    """All segments forward, keeping the states between them; each again, from the last, in the backward.

    What is kept, and each result, lies in blocks made once. Small tensors made between the large ones of a segment, as
    torch.utils.checkpoint leaves them, pin the heap: it grew by 6 MiB with every segment of 8.
    """

    @staticmethod
    def forward(ctx, run, steps, last_only, random, closed, counts, *given):
        ctx.run, ctx.steps, ctx.last_only, ctx.closed, ctx.counts = run, steps, last_only, closed, counts
        sequences, leaves, tensors = _split(given, counts)
        x, kept, output = sequences[0], [], None
        parts = _parts(x, steps)
        ctx.autocast = {"dtype": torch.get_autocast_dtype(x.device.type), "enabled": _autocast(x)}
        ctx.random = [torch.empty(len(parts), *s.shape, dtype=torch.uint8) for s in _random(x)] if random else []
        for number, part in enumerate(parts):
            if random:
                for block, state in zip(ctx.random, _random(x), strict=True):
                    block[number] = state
            if number:
                kept = kept or [leaf.new_empty(len(parts), *leaf.shape) for leaf in leaves]
                for block, leaf in zip(kept, leaves, strict=True):
                    block[number] = leaf
                leaves = [block[number] for block in kept]
            piece, leaves = run([sequence[:, part] for sequence in sequences], leaves, part, tensors)
            if last_only:
                output = piece[:, -1].clone()
            else:
                output = piece.new_empty(*x.shape[:2], *piece.shape[2:]) if output is None else output
                output[:, part] = piece
            del piece
        ctx.save_for_backward(*given, *kept)
        return output, *leaves

    @staticmethod
    def backward(ctx, grad_output, *grads):
        wanted = ctx.needs_input_grad[6:]
        given, kept = ctx.saved_tensors[: len(wanted)], ctx.saved_tensors[len(wanted) :]
        if torch.is_grad_enabled() and not ctx.closed:
            raise RuntimeError(
                "expected a backward without create_graph=True: in_segments has first derivatives only, a second would "
                "silently lack its share. Give it recompute=False"
            )
        # With create_graph the gradient is itself differentiated, with is_grads_batched it is mapped.
        if torch.is_grad_enabled() or any(map(is_legacy_batchedtensor, (grad_output, *grads))):
            return *[None] * 6, *_gradients_in_turn(ctx, given, (grad_output, *grads), wanted)
        sequences, leaves, tensors = _split(given, ctx.counts)
        of_sequences, of_leaves, of_tensors = _split(wanted, ctx.counts)
        blocks = [torch.empty_like(x) if wants else None for x, wants in zip(sequences, of_sequences, strict=True)]
        sums = [torch.zeros_like(x) if wants else None for x, wants in zip(tensors, of_tensors, strict=True)]
        grads = [grad.clone() for grad in grads]
        for number, part in reversed(list(enumerate(_parts(sequences[0], ctx.steps)))):
            before = [block[number] for block in kept] if number else leaves
            found = _add_gradients(ctx, number, part, sequences, before, tensors, grad_output, grads, blocks, sums)
            if number:
                for grad, of_before in zip(grads, found, strict=True):
                    grad.copy_(of_before)
                del found
        of_leaves = [grad if wants else None for grad, wants in zip(found, of_leaves, strict=True)]
        return *[None] * 6, *blocks, *of_leaves, *sums


def _add_gradients(ctx, number, part, sequences, leaves, tensors, grad_output, grads, blocks, sums) -> list[Tensor]:
    """Those of one segment, put into ``blocks`` and added to ``sums``; returns those of the state before it."""
    segments = [
        x[:, part].detach().requires_grad_(block is not None) for x, block in zip(sequences, blocks, strict=True)
    ]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    with torch.enable_grad(), torch.autocast(segments[0].device.type, **ctx.autocast), _as_before(ctx, number):
        output, after = ctx.run(segments, leaves, part, tensors)
        output = output[:, -1] if ctx.last_only else output
    pairs = list(zip(after, grads, strict=True))
    if not ctx.last_only:
        pairs.append((output, grad_output[:, part]))
    elif part.stop >= sequences[0].shape[1]:
        pairs.append((output, grad_output))
    trained = [(x, total) for x, total in zip(tensors, sums, strict=True) if total is not None]
    read = [(x, block[:, part]) for x, block in zip(segments, blocks, strict=True) if block is not None]
    found = _gradients(pairs, [*leaves, *(x for x, _ in trained), *(x for x, _ in read)])
    for (_, total), grad in zip(trained, found[len(leaves) :], strict=False):
        total += grad
    for (_, block), grad in zip(read, found[len(leaves) + len(trained) :], strict=True):
        block.copy_(grad)
    return list(found[: len(leaves)])


def _gradients_in_turn(ctx, given, grads, wanted) -> list[Tensor | None]:
    """The gradients of ``_in_turn``, with a graph of their own where one is asked for."""

    def run(segments, leaves, part, tensors):
        with _as_before(ctx, part.start // ctx.steps):
            return ctx.run(segments, leaves, part, tensors)

    device = given[0].device.type
    with torch.enable_grad(), torch.autocast(device, **ctx.autocast):
        # By another name each, as one may be made from another: what is asked for are the shares of this function.
        given = [x.view_as(x) if wants else x for x, wants in zip(given, wanted, strict=True)]
        sequences, leaves, tensors = _split(given, ctx.counts)
        output, leaves = _in_turn(run, sequences, leaves, tensors, ctx.steps, ctx.last_only)
    sources = [source for source, wants in zip(given, wanted, strict=True) if wants]
    pairs = list(zip([output, *leaves], grads, strict=True))
    found = iter(_gradients(pairs, sources, create_graph=torch.is_grad_enabled()))
    return [next(found) if wants else None for wants in wanted]


def _gradients(pairs: list[tuple[Tensor, Tensor]], sources: list[Tensor], **options: Any) -> tuple[Tensor, ...]:
    # Of a layer whose weights are held fixed, the first segment's state has no gradient.
    pairs = [(output, grad) for output, grad in pairs if output.requires_grad]
    outputs, grads = [output for output, _ in pairs], [grad for _, grad in pairs]
    return torch.autograd.grad(outputs, sources, grads, materialize_grads=True, **options)


def _split(given: Sequence, counts: tuple[int, int]) -> tuple[list, list, list]:
    """Sequences, leaves of a state, the others."""
    sequences, leaves = counts
    return list(given[:sequences]), list(given[sequences : sequences + leaves]), list(given[sequences + leaves :])


def _parts(x: Tensor, steps: int) -> list[slice]:
    """One segment after the other; a sequence without steps has one."""
    return [slice(start, start + steps) for start in range(0, max(x.shape[1], 1), steps)]


def _parameters(outputs: list[Tensor]) -> Iterator[Tensor]:
    """The leaves of the graph that made ``outputs``, each once."""
    nodes, seen = [output.grad_fn for output in outputs], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (variable := getattr(node, "variable", None)) is not None:
            yield variable
        nodes += [following for following, _ in node.next_functions]


def _autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


def _random(x: Tensor) -> list[Tensor]:
    """The state of every generator that a layer on this device may draw from."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(x.device)] if x.is_cuda else [])]


@contextmanager
def _as_before(ctx, number: int) -> Iterator[None]:
    """Random numbers as they were drawn in the forward pass of this segment."""
    if not ctx.random:
        yield
        return
    x = ctx.saved_tensors[0]
    with _forked(x):
        torch.set_rng_state(ctx.random[0][number].clone())  # of a view, torch would read beyond the end
        if x.is_cuda:
            torch.cuda.set_rng_state(ctx.random[1][number].clone(), x.device)
        yield


def _forked(x: Tensor) -> AbstractContextManager[None]:
    """The context after which the generators are as they were."""
    return torch.random.fork_rng([x.device] if x.is_cuda else [])
