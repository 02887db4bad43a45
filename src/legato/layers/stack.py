"""Stacked layers, like ``num_layers`` of ``torch.nn.LSTM``, for every layer of the library."""

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from legato._checks import dropout_rate, positive_int
from legato._shapes import Bool, Float, Int, Tensor
from legato.layers._states import check_states
from legato.layers.base import RecurrentLayer, check_layer
from legato.layers.bidirectional import Bidirectional, refuse_to_step


class Stack(RecurrentLayer[tuple[Any, ...]]):
    """o = layer_n(... dropout(layer_2(dropout(layer_1(x))))), with the tuple of all states.

    ``Stack.of(GILRLSTM, 4, 256, num_layers=2, dropout=0.1, bidirectional=True)`` builds a stack of
    equal layers.

    Args:
        layers: the input_size of each is the output_size of the previous one, and all but the last
            return the outputs of all steps.
        dropout: fraction of each layer's output that is dropped in training, 0 to below 1; the
            output of the last layer has no dropout.

    Shapes: input (B, T, layers[0].input_size); output that of the last layer; state a tuple of the layers' states.

    Raises:
        TypeError: an argument is not a layer.
        ValueError: the sizes of the layers do not match, or dropout is not from 0 to below 1.
        RuntimeError: by ``step``, if a layer is bidirectional.

    Example:
        >>> from legato import GILR, LMU
        >>> stack = Stack(LMU(1, 8, order=4, theta=10), GILR(8, 16), dropout=0.1)
        >>> output, (lowest, highest) = stack(torch.randn(2, 20, 1))
        >>> output.shape, lowest.memory.shape, highest.memory.shape
        (torch.Size([2, 20, 16]), torch.Size([2, 1, 4]), torch.Size([2, 16]))
    """

    State = tuple

    def __init__(self, *layers: RecurrentLayer, dropout: float = 0.0):
        _check_layers(layers)
        dropout = dropout_rate(dropout)
        if dropout and len(layers) == 1:
            warnings.warn(
                f"dropout={dropout} changes nothing in a stack of one layer: dropout is applied between layers",
                stacklevel=2,
            )
        super().__init__(layers[0].input_size)
        self.layers = nn.ModuleList(layers)
        self.dropout = dropout
        self.return_sequences = layers[-1].return_sequences
        self.bidirectional = any(layer.bidirectional for layer in layers)

    @classmethod
    def of(
        cls,
        layer: Callable[..., RecurrentLayer[Any]],
        input_size: int,
        hidden_size: int,
        *,
        num_layers: int = 1,
        dropout: float = 0.0,
        bidirectional: bool = False,
        **options: Any,
    ) -> "Stack":
        """layer(input_size, hidden_size), then layer(hidden_size, hidden_size), num_layers in total.

        Args:
            layer: a class with the constructor layer(input_size, hidden_size, ...), which may be
                user-defined.
            input_size: channels of x.
            hidden_size: of each layer.
            num_layers: 1 or more.
            dropout: fraction dropped between the layers in training, 0 to below 1.
            bidirectional: use a ``Bidirectional`` of two layers in place of each layer, with
                outputs of 2 * hidden_size channels.
            options: other arguments of the layer's constructor, equal for all layers;
                return_sequences is passed to the last layer only.

        Returns:
            A ``Stack``, also for one layer, so that the state is always a tuple of states.

        Raises:
            TypeError: ``layer`` is not the class of a layer, or has no such option.
            ValueError: a number is out of range.

        Example:
            >>> from legato import GILRLSTM
            >>> stack = Stack.of(GILRLSTM, 4, 256, num_layers=2, dropout=0.1, bidirectional=True)
            >>> stack(torch.randn(2, 100, 4))[0].shape
            torch.Size([2, 100, 512])

        Source: the arguments of ``torch.nn.LSTM``; see docs/coming-from-other-libraries.md.
        """
        num_layers = positive_int(num_layers, "num_layers")
        _check_options(layer, options)
        layers: list[RecurrentLayer[Any]] = []
        for number in range(num_layers):
            size = layers[-1].output_size if layers else input_size
            here = options if number == num_layers - 1 else {**options, **_all_outputs(options)}
            pair = [layer(size, hidden_size, **here) for _ in range(2 if bidirectional else 1)]
            layers.append(Bidirectional(*pair) if bidirectional else pair[0])
        return cls(*layers, dropout=dropout)

    @property
    def output_size(self) -> int | tuple[int, ...]:
        """``output_size`` of the last layer."""
        return self._members()[-1].output_size

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        state: Sequence[Any] | None = None,
        *,
        lengths: Int[Tensor, "B"] | None = None,
        reset: Bool[Tensor, "B T"] | None = None,
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """Output of the last layer and all states; every layer gets ``lengths`` and ``reset``."""
        states = []
        for number, (layer, old) in enumerate(zip(self._members(), self._states(state), strict=True)):
            if number:
                x = F.dropout(x, self.dropout, self.training)
            x, new = layer(x, old, lengths=lengths, reset=reset)
            states.append(new)
        return x, tuple(states)

    def step(self, x_t: Float[Tensor, "B C"], state: Sequence[Any]) -> tuple[Tensor, tuple[Any, ...]]:
        """The next output of a stream and the states after it."""
        if self.bidirectional:
            refuse_to_step(self)
        self._check_state(state)
        states = []
        for number, (layer, old) in enumerate(zip(self._members(), state, strict=True)):
            if number:
                x_t = F.dropout(x_t, self.dropout, self.training)
            x_t, new = layer.step(x_t, old)
            states.append(new)
        return x_t, tuple(states)

    def initial_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Any, ...]:
        """Zeros for every layer."""
        return tuple(layer.initial_state(batch_size, device=device, dtype=dtype) for layer in self._members())

    def _calibrate(self, x, lengths):
        *below, last = self._members()
        for layer in below:
            layer.calibrate(x, lengths=lengths)
            x, _ = layer(x, lengths=lengths)
        last.calibrate(x, lengths=lengths)

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}" if self.dropout else ""

    def _members(self) -> list[RecurrentLayer[Any]]:
        return cast("list[RecurrentLayer[Any]]", list(self.layers))

    def _states(self, state: Sequence[Any] | None) -> tuple[Any, ...]:
        if state is None:
            return (None,) * len(self.layers)
        self._check_state(state)
        return tuple(state)

    def _check_state(self, state: object, batch: int | None = None) -> None:
        """Checks the tuple only: each layer checks its own state."""
        check_states(state, len(self.layers), "one per layer", "Stack")

    def _weight(self) -> Tensor:
        return self._members()[0]._weight()


def _check_layers(layers: tuple[RecurrentLayer, ...]) -> None:
    if not layers:
        raise ValueError("expected at least one layer to stack, got none: pass layers to Stack()")
    for number, layer in enumerate(layers):
        check_layer(layer, f"layer {number}")
        if number and not layers[number - 1].return_sequences:
            raise ValueError(
                f"layer {number - 1} of a stack returns its last output only, but layer {number} "
                "needs all outputs: build it with return_sequences=True"
            )
        if number and (size := getattr(layers[number - 1], "output_size", None)) != layer.input_size:
            below = type(layers[number - 1]).__name__
            raise ValueError(
                f"expected layer {number}, a {type(layer).__name__}, to take the {size} channels that layer "
                f"{number - 1}, a {below}, returns, got input_size {layer.input_size}: make them equal"
            )


def _check_options(layer: Callable[..., Any], options: dict[str, Any]) -> None:
    """Raise TypeError for an unknown option and list the known ones, unlike Python's own error."""
    if not (inspect.isclass(layer) and issubclass(layer, RecurrentLayer)):
        name = getattr(layer, "__name__", type(layer).__name__)
        raise TypeError(
            f"expected the class of a layer, such as GILRLSTM, got {name}: pass layer instances to Stack(...)"
        )
    parameters = inspect.signature(layer).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    known = [p.name for p in parameters][2:]
    for name in options:
        if name not in known:
            advice = f"it takes {', '.join(known) or 'none'}"
            if name == "batch_first":
                advice = "axes are always (batch, time, channels), drop it"
            raise TypeError(f"{layer.__name__} has no option {name!r}: {advice}")


def _all_outputs(options: dict[str, Any]) -> dict[str, bool]:
    return {"return_sequences": True} if "return_sequences" in options else {}
