"""``RecurrentLayer``, the base class and interface of every layer, and common functions.

Next: ``legendre_memory.py``, a layer whose state has two axes, and ``_gated.py``, a family.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from legato._checks import check_floating, check_plain, check_reset, check_tensor, checked_lengths, positive_int
from legato._dtypes import carry_dtype
from legato._modes import evaluating
from legato._shapes import Bool, Float, Int, Shaped, Tensor
from legato.layers._repr import constructor_arguments
from legato.layers._states import StateT, own_storage, rebuilt, register_state, state_names

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "tanh": torch.tanh,
}

#: An activation function, by its name in ``ACTIVATIONS``, "identity", or as a callable.
Activation = str | Callable[[Tensor], Tensor]

#: The shape of each tensor of a state, without the batch axis, in the order of the fields.
StateShapes = tuple[tuple[int, ...], ...]


class RecurrentLayer(nn.Module, Generic[StateT]):
    """(output, state) = layer(x, state): the base class of the layers, including user-defined ones.

    A subclass sets ``State``, a NamedTuple of tensors, and ``hidden_size``, and defines two methods:

        _state_shapes()                        the shape of each tensor of the state, without the batch axis
        _sequence(x, state, lengths, reset)    (output, states, final) of a sequence

    ``states`` is a ``State`` whose tensors have a time axis, (B, T, ...): the state after every
    step. From it the base class selects the state at the length of each row. The base class also
    checks the arguments, sets padded steps to zero, makes sure that the results share no storage,
    and registers the state class with pickle, ``torch.load`` and ``torch.export``.

    Optional methods: ``_step``, if one step can be computed faster than a sequence of length one;
    ``_weight``, if the first parameter does not have the dtype of the input; ``output_size``, if
    the output does not have ``hidden_size`` channels. All layers in ``legato.layers`` use this base
    class.

    Args:
        input_size: channels of x.

    Example:
        >>> import torch
        >>> from typing import NamedTuple
        >>> from legato import RecurrentLayer, linear_recurrence
        >>> class LeakyState(NamedTuple):
        ...     memory: torch.Tensor  # (B, C)
        >>> class Leaky(RecurrentLayer[LeakyState]):
        ...     '''h_t = a * h_{t-1} + (1 - a) * (W x_t), one learned decay a = sigmoid(d) per channel.'''
        ...
        ...     State = LeakyState
        ...
        ...     def __init__(self, input_size: int, hidden_size: int):
        ...         super().__init__(input_size)
        ...         self.hidden_size = hidden_size
        ...         self.decay = torch.nn.Parameter(torch.zeros(hidden_size))
        ...         self.weight = torch.nn.Parameter(torch.randn(hidden_size, input_size) / input_size**0.5)
        ...
        ...     def _state_shapes(self):
        ...         return ((self.hidden_size,),)
        ...
        ...     def _sequence(self, x, state, lengths, reset):
        ...         decay = self.decay.sigmoid()
        ...         impulse = (1 - decay) * (x @ self.weight.mT)
        ...         initial = None if state is None else state.memory
        ...         states, final = linear_recurrence(decay, impulse, initial, reset=reset)
        ...         return states, LeakyState(states), LeakyState(final)
        >>> output, state = Leaky(4, 8)(torch.randn(2, 100, 4), lengths=torch.tensor([100, 60]))
        >>> output.shape, state.memory.shape
        (torch.Size([2, 100, 8]), torch.Size([2, 8]))
    """

    #: A NamedTuple of tensors, memory first; each has shape (B, *shape) with the shapes of ``_state_shapes``.
    State: type[StateT]
    #: False: the output is that of the last step only, (B, channels) in place of (B, T, channels).
    return_sequences: bool = True
    #: True: outputs depend on later steps, and ``step`` is not available.
    bidirectional: bool = False
    #: Channels of the output, unless the layer defines ``output_size``.
    hidden_size: int
    #: True: ``_step`` never returns a tensor of its arguments. Set for each class, not inherited.
    _steps_are_new: bool = False

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        register_state(cls.__dict__.get("State"))
        if "_steps_are_new" not in cls.__dict__:
            cls._steps_are_new = cls.__module__.startswith("legato.layers.")

    def __init__(self, input_size: int):
        super().__init__()
        self.input_size = positive_int(input_size, "input_size")

    @property
    def output_size(self) -> int | tuple[int, ...]:
        """Channels of the output; a tuple if it has more axes than (batch, time, channels)."""
        return self.hidden_size

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        state: StateT | None = None,
        *,
        lengths: Int[Tensor, "B"] | None = None,
        reset: Bool[Tensor, "B T"] | None = None,
    ) -> tuple[Tensor, StateT]:
        """output_t, state_t = step(x_t, state_{t-1}) for every t, in parallel where possible.

        Args:
            x: the input, (B, T, input_size), with the dtype and device of the layer; any float
                dtype under autocast.
            state: returned by an earlier call or by ``initial_state``; None is a state of zeros.
            lengths: number of valid steps of each row, 0 to T, for batches padded on the right. The
                values in the padding, NaN included, have no effect. A tensor on the CPU avoids a
                synchronisation with the device.
            reset: True sets the state of that row to zero before that step.

        Returns:
            output: (B, T, channels), zero from ``lengths`` on; with ``return_sequences=False``
                (B, channels), the output of the last valid step, zero for a row without valid
                steps.
            state: the state after the last valid step, in float32 or wider; pass it with the next
                chunk. It shares no memory with any other tensor: you may write to it, as in
                ``state.memory[done] = 0``, also in training.

        Raises:
            TypeError: an argument is not a tensor, its dtype is of a wrong kind, or the state has
                another class.
            ValueError: a shape, precision, device or range is wrong; the message says which one and
                what to do.
        """
        lengths = self._check_arguments(x, state, lengths, reset)
        if lengths is None:
            output, _, new = self._sequence(x, state, None, reset)
            return self._own(output, new, x, state)
        return self._padded(self._sequence, x, state, lengths, reset)

    def step(self, x_t: Float[Tensor, "B C"], state: StateT) -> tuple[Tensor, StateT]:
        """output_t, state_t = step(x_t, state_{t-1}): one step of a stream.

        Args:
            x_t: the input at this step, (B, input_size).
            state: returned by the previous step; at the start ``initial_state(batch_size)``.

        Returns:
            output_t: (B, channels).
            state: pass it to the next step; it shares no memory with any other tensor, as in
                ``forward``.
        """
        if self._forward_pre_hooks:
            remake_weights(self, x_t)
        self._check_input(x_t, "(B, input_size)", 2)
        self._check_state(state, x_t.shape[0])
        output, new = self._step(x_t, state)
        return own_storage(output, new, ()) if self._steps_are_new else self._own(output, new, x_t, state)

    def initial_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> StateT:
        """state_0 = 0 for ``batch_size`` rows; by default on the layer's device, float32 or wider."""
        device, dtype = device or self._weight().device, dtype or self._carry_dtype()
        zeros = (torch.zeros(batch_size, *shape, device=device, dtype=dtype) for shape in self._state_shapes())
        return self.State(*zeros)

    @torch.no_grad()
    def calibrate(self, x: Float[Tensor, "B T C"], *, lengths: Int[Tensor, "B"] | None = None) -> None:
        """scale[c, i] = 1 / std(m[c, i]) over rows and steps of x, for every ``LegendreMemory``.

        The memories in this layer are calibrated in the order in which they run, each on its own
        input, from a memory of zeros and without dropout. A layer without a ``LegendreMemory`` is
        unchanged, and so is a ``RecurrentLMU``, because its memory depends on its own scale. Call
        it before training, after any manual change of the weights.

        Args:
            x: typical input, (B, T, input_size); at least as many steps in total as the order of
                the memory.
            lengths: number of valid steps of each row, as in ``forward``.

        Raises:
            ValueError: too few steps, or the standard deviation of an order is zero or not finite.

        Source: measured in this project: on Mackey-Glass the NRMSE falls from 0.0197 to 0.0070.
        """
        lengths = self._check_arguments(x, None, lengths, None)
        if lengths is not None:
            x = zero_padding(x, lengths)
        with evaluating(self):
            self._calibrate(x, lengths)

    def extra_repr(self) -> str:
        """The positional arguments of the constructor, then the options that differ from their defaults."""
        return constructor_arguments(self, self._arguments())

    # Methods that a layer defines.

    def _state_shapes(self) -> StateShapes:
        """The shape of each tensor of the state, without the batch axis, in the order of the fields of ``State``."""
        raise NotImplementedError

    def _sequence(
        self, x: Tensor, state: StateT | None, lengths: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, StateT | None, StateT]:
        """The output, the state after every step, (B, T, ...), and the state after step T.

        The arguments are checked. ``state`` None means zeros. ``x`` and ``reset`` are zero from
        ``lengths`` on; the base class sets the output to zero there and selects the final state. A
        layer that does not compute the states of all steps returns None in place of ``states``, or
        in place of one of its tensors; its final state must then be the state at ``lengths``.
        """
        raise NotImplementedError

    def _step(self, x_t: Tensor, state: StateT) -> tuple[Tensor, StateT]:
        """One step, for checked arguments; by default a sequence of length one."""
        output, _, state = self._sequence(x_t[:, None], state, None, None)
        return (output[:, 0] if self.return_sequences else output), state

    def _weight(self) -> Tensor:
        """A tensor with the dtype and device that inputs must have."""
        return next(self.parameters())

    def _arguments(self) -> dict[str, Any]:
        """For ``repr``: the constructor arguments that are not attributes of the same name."""
        return {}

    def _calibrate(self, x: Tensor, lengths: Tensor | None) -> None:
        """``calibrate`` for checked arguments; ``x`` is zero from ``lengths`` on."""

    # Methods of the base class.

    def _padded(
        self,
        sequence: Callable[..., tuple[Tensor, StateT | None, StateT]],
        x: Tensor,
        state: StateT | None,
        lengths: Tensor,
        reset: Tensor | None,
    ) -> tuple[Tensor, StateT]:
        """Apply ``sequence``, such as ``_sequence``, to rows that end at their ``lengths``."""
        reset = None if reset is None else zero_padding(reset, lengths)
        output, states, final = sequence(zero_padding(x, lengths), state, lengths, reset)
        if states is not None:
            final = _at_lengths(states, state, final, lengths)
        if self.return_sequences:
            output = zero_padding(output, lengths)
        else:
            output = torch.where((lengths > 0).view(-1, *[1] * (output.ndim - 1)), output, 0)
        return self._own(output, final, x, state)

    def _own(self, output: Tensor, state: StateT, x: Tensor, before: StateT | None) -> tuple[Tensor, StateT]:
        """Both, copied if they share storage with each other, an argument or a tensor of the layer."""
        return own_storage(output, state, (x, before, *self._parameters.values(), *self._buffers.values()))

    def _carry_dtype(self) -> torch.dtype:
        return carry_dtype(self._weight().dtype)

    # The checks.

    def _check_arguments(self, x: Tensor, state: object, lengths: Tensor | None, reset: Tensor | None) -> Tensor | None:
        """Returns lengths in int64 on the device of x, for use in computations."""
        self._check_input(x, "(B, T, input_size)", 3)
        return self._check_options(x, state, lengths, reset)

    def _check_options(self, x: Tensor, state: object, lengths: Tensor | None, reset: Tensor | None) -> Tensor | None:
        if state is not None:
            self._check_state(state, x.shape[0])
        if reset is not None:
            check_reset(reset, "x", x)
        return None if lengths is None else checked_lengths(lengths, x)

    def _check_input(self, x: Tensor, axes: str, ndim: int) -> None:
        name = "x" if ndim == 3 else "x_t"
        check_plain(name, x)
        if x.ndim != ndim or x.shape[-1] != self.input_size:
            raise ValueError(
                f"expected {name} of shape {axes} with input_size {self.input_size}, got {tuple(x.shape)}: "
                "axes are batch, time, channels"
            )
        self._check_kind(name, x)

    def _check_kind(self, name: str, x: Tensor) -> None:
        weight = self._weight()
        if x.dtype == weight.dtype and x.device == weight.device and x.is_floating_point():
            return
        check_floating(name, x)
        if x.device != weight.device:
            raise ValueError(f"expected {name} on {weight.device} like the layer, got {x.device}: move one with .to()")
        if type(weight) not in (Tensor, nn.Parameter):  # sharded: has the compute dtype once gathered
            return
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(f"expected {name} in {weight.dtype} like the layer, got {x.dtype}: convert one with .to()")

    def _check_state(self, state: object, batch: int) -> None:
        tensors = self._checked_state(state)
        weight = self._weight()
        dtype, device = carry_dtype(weight.dtype), weight.device
        for number, shape in enumerate(self._state_shapes()):
            tensor, shape = tensors[number], (batch, *shape)
            if not isinstance(tensor, Tensor) or (tensor.shape, tensor.dtype, tensor.device) != (shape, dtype, device):
                self._check_state_tensor(state_names(tensors)[number], tensor, shape)

    def _checked_state(self, state: object) -> StateT:
        if type(state) is not self.State:
            raise TypeError(
                f"expected a {self.State.__name__}, got {type(state).__name__}: "
                f"use initial_state() or what this {type(self).__name__} returned"
            )
        return cast("StateT", state)

    def _check_state_tensor(self, name: str, tensor: Any, shape: tuple[int, ...]) -> None:
        check_tensor(name, tensor)
        check_floating(name, tensor)
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"expected {name} of shape {shape}, got {tuple(tensor.shape)}: "
                "use a state of this layer and of this batch, such as initial_state(batch_size)"
            )
        dtype, device = self._carry_dtype(), self._weight().device
        if tensor.dtype != dtype or tensor.device != device:
            raise ValueError(
                f"expected {name} in {dtype} on {device}, got {tensor.dtype} on {tensor.device}: convert it with .to()"
            )


def check_layer(layer: object, name: str) -> None:
    """Raise TypeError unless ``layer`` is a RecurrentLayer."""
    if not isinstance(layer, RecurrentLayer):
        raise TypeError(
            f"expected {name} to be a RecurrentLayer, got {type(layer).__name__}: pass a layer such as "
            "GILR(4, 256), not its class, or a subclass of legato.RecurrentLayer"
        )


def flat_output_size(layer: RecurrentLayer[Any], name: str) -> int:
    """``layer.output_size``; ValueError unless the output is (batch, time, channels)."""
    size = getattr(layer, "output_size", None)
    if not isinstance(size, int):
        raise ValueError(
            f"expected {name} to return outputs of shape (B, T, channels), got a {type(layer).__name__} whose "
            f"output_size is {size}: use a layer with one axis of channels"
        )
    return size


# Pruning and torch's older weight and spectral norms compute a weight in a forward pre-hook.
_WEIGHT_HOOKS = (BasePruningMethod, SpectralNorm, WeightNorm)


def remake_weights(layer: nn.Module, x: Tensor) -> None:
    """Run the hooks that compute a weight of ``layer``: torch does not run them for ``step``."""
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, _WEIGHT_HOOKS):
            hook(layer, (x,))


def never_narrowed(fn: Callable[[Tensor], Tensor], *tensors: Tensor) -> Callable[[Tensor], Tensor]:
    """``fn`` for ``nn.Module._apply``, with an exception for ``tensors`` and their gradients.

    These parameters or buffers move with the layer, but stay in float32 where ``fn`` would give 16
    bits.
    """
    wide = [part for tensor in tensors for part in (tensor, tensor.grad) if part is not None]

    def applied(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        if moved.dtype.itemsize < 4 and any(tensor is part for part in wide):
            return tensor.to(moved.device, torch.float32)
        return moved

    return applied


@contextmanager
def full_parameter(parameter: Tensor) -> Iterator[Tensor]:
    """The parameter, to be set in place; if it is sharded over processes, a full tensor.

    The shards are set from the full tensor on exit. A slice of a sharded tensor is a copy: values
    written to it would be lost.
    """
    if type(parameter) in (Tensor, nn.Parameter):
        yield parameter
        return
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(parameter, DTensor):
        yield parameter
        return
    full = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
    yield full
    # Each process has drawn its own random numbers: distribute_tensor takes those of the first
    # process.
    parameter.copy_(distribute_tensor(full, parameter.device_mesh, parameter.placements))


def zero_padding(x: Shaped[Tensor, "B T *channels"], lengths: Int[Tensor, "B"]) -> Shaped[Tensor, "B T *channels"]:
    """x where t < lengths[b], else 0 with no gradient, so NaN in the padding has no effect."""
    outside = torch.arange(x.shape[1], device=x.device) >= lengths.to(x.device, torch.int64)[:, None]  # (B, T)
    return x.masked_fill(outside.view(*outside.shape, *[1] * (x.ndim - 2)), 0)


def _at_lengths(states: StateT, initial: StateT | None, final: StateT, lengths: Tensor) -> StateT:
    """The state after ``lengths`` steps; the tensor of ``final`` where that of ``states`` is None."""
    starts = (None,) * len(final) if initial is None else initial
    parts = [
        last if of_steps is None else at_length(of_steps, start, last, lengths)
        for of_steps, start, last in zip(states, starts, final, strict=True)
    ]
    return rebuilt(final, parts)


def at_length(
    states: Shaped[Tensor, "B T *channels"],
    initial: Shaped[Tensor, "B *channels"] | None,
    final: Shaped[Tensor, "B *channels"],
    lengths: Int[Tensor, "B"],
) -> Shaped[Tensor, "B *channels"]:
    """The state after ``lengths`` steps: states[b, lengths[b] - 1], or ``initial`` for length 0.

    ``initial`` None means zeros.
    """
    if states.shape[1] == 0:
        return final
    rows = torch.arange(states.shape[0], device=states.device)
    selected = states[rows, (lengths - 1).clamp(min=0)].to(final.dtype)
    not_empty = (lengths > 0).view(-1, *[1] * (final.ndim - 1))
    return torch.where(not_empty, selected, 0 if initial is None else initial)


def activation_function(activation: Activation) -> Callable[[Tensor], Tensor] | None:
    """The function of a name in ACTIVATIONS, or the callable itself; None for "identity"."""
    if isinstance(activation, str):
        if activation == "identity":
            return None
        if activation in ACTIVATIONS:
            return ACTIVATIONS[activation]
        raise ValueError(
            f"expected an activation among {', '.join(['identity', *ACTIVATIONS])} or a callable, got {activation!r}"
        )
    if not callable(activation):
        raise TypeError(f"expected an activation by its name or as a callable, got {type(activation).__name__}")
    return activation
