"""Recurrent layers by name, so that a comparison is one option on the command line: ``--model.kind lstm``."""

from collections.abc import Callable
from typing import Any, Literal, get_args

from legato.layers import GILRLSTM, LMU, SRU, Stack
from legato.layers.base import RecurrentLayer, positive_int

from .baselines import LSTM, Transformer
from .task import ExperimentError

Kind = Literal["lmu", "gilr-lstm", "sru", "lstm", "transformer"]
KINDS: tuple[str, ...] = get_args(Kind)


def layer_of(
    kind: str,
    input_size: int,
    hidden_size: int,
    *,
    return_sequences: bool = True,
    layers: int = 1,
    theta: float = 100.0,
    order: int = 8,
    memory_size: int | None = None,
    window: int = 128,
    heads: int = 4,
    dropout: float = 0.0,
    **options: Any,
) -> RecurrentLayer:
    """The layer of this name, or several on one another.

    Args:
        kind: "lmu", "gilr-lstm", "sru", "lstm" (PyTorch's) or "transformer".
        input_size: channels of x.
        hidden_size: channels of the output.
        return_sequences: False: the last output only, where the layer can (an LMU, LSTM or transformer); the
            classifiers in ``legato.models`` take the last output of the others themselves.
        layers: how many on one another.
        theta, order, memory_size: of an LMU; memory_size None is hidden_size.
        window, heads: of a transformer.
        dropout: between layers, and inside those of a transformer.
        options: of the layer's constructor.

    Raises:
        ExperimentError: there is no such kind.
        ValueError: a number does not suit the layer.
    """
    if kind == "transformer":
        return Transformer(
            input_size,
            hidden_size,
            layers=layers,
            window=window,
            heads=heads,
            dropout=dropout,
            return_sequences=return_sequences,
            **options,
        )
    build: dict[str, Callable[[int, bool], RecurrentLayer]] = {
        "lmu": lambda size, sequences: LMU(
            size,
            hidden_size,
            memory_size=memory_size or hidden_size,
            order=order,
            theta=theta,
            return_sequences=sequences,
            **options,
        ),
        "gilr-lstm": lambda size, sequences: GILRLSTM(size, hidden_size, **options),
        "sru": lambda size, sequences: SRU(size, hidden_size, **options),
        "lstm": lambda size, sequences: LSTM(size, hidden_size, return_sequences=sequences, **options),
    }
    if kind not in build:
        raise ExperimentError(f"there is no kind {kind!r}: expected one of {', '.join(KINDS)}")
    positive_int(layers, "layers")
    sizes = [input_size] + [hidden_size] * (layers - 1)
    stack = [build[kind](size, return_sequences or at < layers) for at, size in enumerate(sizes, 1)]
    return stack[0] if layers == 1 else Stack(*stack, dropout=dropout)
