"""Long sequences in the memory of a short one: time cut into segments, each computed again in the backward pass."""

from collections.abc import Callable, Iterable, Iterator, Sequence
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
    asked for, nothing is computed twice. A backward with create_graph=True holds all segments at once; forward mode,
    ``torch.func`` and compiled graphs do from the start, as ``recompute=False`` does.

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
    """
    if sequences[0].shape[1] <= steps or not recomputable():
        return _in_turn(run, sequences, leaves, tensors, steps, last_only)
    counts = len(sequences), len(leaves)
    output, *leaves = _Segments.apply(run, steps, last_only, random, counts, *sequences, *leaves, *tensors)
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

    output, leaves = over_segments(run, [x], given, parameters, steps=steps, last_only=last_only)
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
    def forward(ctx, run, steps, last_only, random, counts, *given):
        ctx.run, ctx.steps, ctx.last_only, ctx.counts = run, steps, last_only, counts
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
        ctx.save_for_backward(*given, *kept)
        return output, *leaves

    @staticmethod
    def backward(ctx, grad_output, *grads):
        wanted = ctx.needs_input_grad[5:]
        given, kept = ctx.saved_tensors[: len(wanted)], ctx.saved_tensors[len(wanted) :]
        # With create_graph the gradient is itself differentiated, with is_grads_batched it is mapped.
        if torch.is_grad_enabled() or any(map(is_legacy_batchedtensor, (grad_output, *grads))):
            return *[None] * 5, *_gradients_in_turn(ctx, given, (grad_output, *grads), wanted)
        sequences, first, tensors = _split(given, ctx.counts)
        of_sequences, of_first, of_tensors = _split(wanted, ctx.counts)
        trained = [tensor for tensor, wants in zip(tensors, of_tensors, strict=True) if wants]
        sums = [torch.zeros_like(tensor) for tensor in trained]
        blocks = [torch.empty_like(s) for s, wants in zip(sequences, of_sequences, strict=True) if wants]
        parts = _parts(sequences[0], ctx.steps)
        for number, part in reversed(list(enumerate(parts))):
            segments = [s[:, part].detach().requires_grad_(w) for s, w in zip(sequences, of_sequences, strict=True)]
            leaves = [leaf.detach().requires_grad_() for leaf in ([b[number] for b in kept] if number else first)]
            with torch.enable_grad(), torch.autocast(segments[0].device.type, **ctx.autocast), _as_before(ctx, number):
                output, after = ctx.run(segments, leaves, part, tensors)
                output = output[:, -1] if ctx.last_only else output
            pairs = list(zip(after, grads, strict=True))
            if not ctx.last_only:
                pairs.append((output, grad_output[:, part]))
            elif part == parts[-1]:
                pairs.append((output, grad_output))
            found = _gradients(pairs, [*trained, *leaves, *(s for s in segments if s.requires_grad)])
            for total, grad in zip(sums, found, strict=False):
                total += grad
            found = found[len(sums) :]
            grads = found[: len(leaves)]
            for block, grad in zip(blocks, found[len(leaves) :], strict=True):
                block[:, part] = grad
        of_first = [grad if wants else None for grad, wants in zip(grads, of_first, strict=True)]
        return *[None] * 5, *_where(of_sequences, blocks), *of_first, *_where(of_tensors, sums)


def _gradients_in_turn(ctx, given, grads, wanted) -> list[Tensor | None]:
    """The gradients of ``_in_turn``, with a graph of their own where one is asked for."""

    def run(segments, leaves, part, tensors):
        with _as_before(ctx, part.start // ctx.steps):
            return ctx.run(segments, leaves, part, tensors)

    sequences, leaves, tensors = _split(given, ctx.counts)
    with torch.enable_grad(), torch.autocast(sequences[0].device.type, **ctx.autocast):
        output, leaves = _in_turn(run, sequences, leaves, tensors, ctx.steps, ctx.last_only)
    sources = [source for source, wants in zip(given, wanted, strict=True) if wants]
    pairs = list(zip([output, *leaves], grads, strict=True))
    return _where(wanted, _gradients(pairs, sources, create_graph=torch.is_grad_enabled()))


def _gradients(pairs: list[tuple[Tensor, Tensor]], sources: list[Tensor], **options: Any) -> tuple[Tensor, ...]:
    # Of a layer whose weights are held fixed, the first segment's state has no gradient.
    pairs = [(output, grad) for output, grad in pairs if output.requires_grad]
    outputs, grads = [output for output, _ in pairs], [grad for _, grad in pairs]
    return torch.autograd.grad(outputs, sources, grads, materialize_grads=True, **options)


def _where(wanted: Sequence[bool], found: Iterable[Tensor]) -> list[Tensor | None]:
    """One of ``found`` after the other where one is wanted, None elsewhere."""
    rest = iter(found)
    return [next(rest) if wants else None for wants in wanted]


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
