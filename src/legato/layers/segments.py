"""Long sequences in the memory of a short one: time cut into segments, each computed again in the backward pass."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd import Function
from torch.utils._pytree import tree_flatten, tree_unflatten

from legato._shapes import Shaped, Tensor
from legato.layers._base import positive_int


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
    asked for, nothing is computed twice. First derivatives only, in reverse mode; ``recompute=False`` has them all.

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
    if recompute and torch.is_grad_enabled() and x.shape[1] > steps:
        return _recomputed(layer, x, state, steps, last_only)
    outputs = []
    for segment in x.split(steps, dim=1):
        output, state = layer(segment, state)
        outputs = [output] if last_only else [*outputs, output]
    return outputs[0][:, -1] if last_only else torch.cat(outputs, dim=1), state


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

    def run(segment: Tensor, leaves: list[Tensor], first: bool) -> tuple[Tensor, list[Tensor]]:
        before = tree_unflatten(leaves, form if first else after_form) if leaves else None
        output, state = layer(segment, before)
        return output, tree_flatten(state)[0]

    output, *leaves = _Segments.apply(run, steps, last_only, len(given), x, *given, *parameters)
    return output, tree_unflatten(leaves, after_form)


class _Segments(Function):
    """All segments forward, keeping the states between them; each again, from the last, in the backward.

    What is kept lies in blocks made once. Small tensors made between the large ones of a segment, as
    torch.utils.checkpoint leaves them, pin the heap: it grew by 6 MiB with every segment of 8.
    """

    @staticmethod
    def forward(ctx, run, steps, last_only, count, x, *tensors):
        ctx.run, ctx.steps, ctx.last_only, ctx.count = run, steps, last_only, count
        ctx.autocast = {"dtype": torch.get_autocast_dtype(x.device.type), "enabled": _autocast(x)}
        leaves, kept, output = list(tensors[:count]), [], None
        segments = x.split(steps, dim=1)
        ctx.random = [torch.empty(len(segments), *state.shape, dtype=torch.uint8) for state in _random(x)]
        for number, segment in enumerate(segments):
            for block, state in zip(ctx.random, _random(x), strict=True):
                block[number] = state
            if number:
                kept = kept or [leaf.new_empty(len(segments), *leaf.shape) for leaf in leaves]
                for block, leaf in zip(kept, leaves, strict=True):
                    block[number] = leaf
                leaves = [block[number] for block in kept]
            piece, leaves = run(segment, leaves, number == 0)
            if last_only:
                output = piece[:, -1].clone()
            else:
                output = piece.new_empty(len(x), x.shape[1], *piece.shape[2:]) if output is None else output
                output[:, _part(number, steps)] = piece
        ctx.kept = len(kept)
        ctx.save_for_backward(x, *tensors, *kept)
        return output, *leaves

    @staticmethod
    def backward(ctx, grad_output, *grads):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "expected a backward without create_graph=True: in_segments has first derivatives only, a second would "
                "silently lack its share. Give it recompute=False"
            )
        x, *tensors = ctx.saved_tensors
        cut = len(tensors) - ctx.kept
        given, parameters, kept = tensors[: ctx.count], tensors[ctx.count : cut], tensors[cut:]
        sums = [torch.zeros_like(parameter) for parameter in parameters]
        grad_x = torch.zeros_like(x) if ctx.needs_input_grad[4] else None
        for number in reversed(range(-(-x.shape[1] // ctx.steps))):
            part = _part(number, ctx.steps)
            segment = x[:, part].detach().requires_grad_(grad_x is not None)
            leaves = [
                leaf.detach().requires_grad_() for leaf in ([block[number] for block in kept] if number else given)
            ]
            with torch.enable_grad(), torch.autocast(x.device.type, **ctx.autocast), _as_before(ctx.random, number, x):
                output, after = ctx.run(segment, leaves, number == 0)
                output = output[:, -1] if ctx.last_only else output
            pairs = list(zip(after, grads, strict=True))
            if not ctx.last_only:
                pairs.append((output, grad_output[:, part]))
            elif part.stop >= x.shape[1]:
                pairs.append((output, grad_output))
            # Of a layer whose weights are held fixed, the first segment's state has no gradient.
            pairs = [(output, grad) for output, grad in pairs if output.requires_grad]
            found = torch.autograd.grad(
                [output for output, _ in pairs],
                [*parameters, *leaves, *([] if grad_x is None else [segment])],
                [grad for _, grad in pairs],
                materialize_grads=True,
            )
            for total, grad in zip(sums, found, strict=False):
                total += grad
            grads = found[len(sums) : len(sums) + len(leaves)]
            if grad_x is not None:
                grad_x[:, part] = found[-1]
        return None, None, None, None, grad_x, *grads, *sums


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


def _part(number: int, steps: int) -> slice:
    return slice(number * steps, (number + 1) * steps)


def _autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


def _random(x: Tensor) -> list[Tensor]:
    """The state of every generator that a layer on this device may draw from."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(x.device)] if x.is_cuda else [])]


@contextmanager
def _as_before(random: list[Tensor], number: int, x: Tensor) -> Iterator[None]:
    """Random numbers as they were drawn in the forward pass of this segment."""
    with _forked(x):
        torch.set_rng_state(random[0][number].clone())  # of a view, torch would read beyond the end
        if x.is_cuda:
            torch.cuda.set_rng_state(random[1][number].clone(), x.device)
        yield


def _forked(x: Tensor) -> AbstractContextManager[None]:
    """The context after which the generators are as they were."""
    return torch.random.fork_rng([x.device] if x.is_cuda else [])
