"""Checks of numbers and tensors for all constructors and functions, each with one error message.

NumPy scalars, and arrays and tensors of shape (), are accepted as numbers. The checks return Python
numbers, which ``repr``, ``pickle`` and ``torch.load`` handle without NumPy.
"""

import math
from numbers import Integral, Real
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence

from legato._shapes import Int, Tensor

INTEGER_DTYPES = (
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64
)  # fmt: skip


def whole_number(value: Any, name: str, *, least: int = 0) -> int:
    """``value`` as an int; TypeError unless it is an integer, ValueError if below ``least``."""
    number = _python_number(value)
    if not isinstance(number, Integral):
        raise TypeError(f"expected {name} to be an int of at least {least}, got {value!r}")
    if number < least:
        raise ValueError(f"expected {name} to be an int of at least {least}, got {value!r}")
    return int(number)


def positive_int(value: Any, name: str) -> int:
    """``value`` as an int; TypeError unless it is an integer, ValueError if below 1."""
    return whole_number(value, name, least=1)


def real_number(value: Any, name: str) -> float | int:
    """``value`` as a float or int; TypeError unless it is real, ValueError unless it is finite."""
    number = _python_number(value)
    if not isinstance(number, Real):
        raise TypeError(f"expected {name} to be a finite number, got {value!r}")
    if not math.isfinite(number):
        raise ValueError(f"expected {name} to be a finite number, got {value!r}")
    return int(number) if isinstance(number, Integral) else float(number)


def dropout_rate(value: Any, name: str = "dropout") -> float:
    """``value`` as a float; TypeError unless it is real, ValueError unless 0 <= value < 1."""
    number = _python_number(value)
    if not isinstance(number, Real):
        raise TypeError(f"expected {name} from 0 to below 1, got {value!r}: the fraction that is dropped")
    if not 0 <= float(number) < 1:
        raise ValueError(f"expected {name} from 0 to below 1, got {value!r}: the fraction that is dropped")
    return float(number)


def _python_number(value: Any) -> Any:
    """The number in a scalar of NumPy or torch; None for a bool; any other value unchanged."""
    if type(value) in (int, float):
        return value
    if getattr(value, "shape", None) == () and hasattr(value, "item") and not getattr(value, "is_meta", False):
        value = value.item()
    return None if isinstance(value, bool) else value


def check_tensor(name: str, value: Any) -> None:
    """Raise TypeError, with advice, unless ``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"expected {name} to be a tensor, got {type(value).__name__}: {as_tensor_advice(value)}")


def check_plain(name: str, value: Any) -> None:
    """Raise TypeError unless ``value`` is a tensor, and ValueError unless it is dense and not nested."""
    check_tensor(name, value)
    if value.is_nested:
        raise ValueError(
            f"expected {name} as a padded tensor, got a nested one: pad it with torch.nested.to_padded_tensor({name}, "
            "0.0) and pass the number of steps of each row as lengths="
        )
    if value.layout is not torch.strided:
        raise ValueError(f"expected {name} as a dense tensor, got layout {value.layout}: convert it with .to_dense()")


def check_numbers(*, real: bool = False, **given: Any) -> None:
    """Raise TypeError unless all arguments are None or tensors of a floating dtype.

    Complex dtypes are accepted too, unless ``real``.
    """
    for name, x in given.items():
        if x is None:
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}: {as_tensor_advice(x, lengths=False)}")
        if not x.is_floating_point() and (real or not x.is_complex()):
            kinds = "floating" if real else "floating or complex"
            raise TypeError(f"{name} must be {kinds}, got {x.dtype}: convert it with .float()")


def check_device(name: str, x: Tensor | None, other_name: str, other: Tensor) -> None:
    """Raise ValueError unless both tensors are on the same device."""
    if x is not None and x.device != other.device:
        raise ValueError(
            f"{name} and {other_name} must share a device, got {x.device} and {other.device}: move one with .to()"
        )


def check_initial_state(state: Tensor | None, axes: str, shape: tuple[int, ...], **inputs: Tensor) -> None:
    """Raise ValueError unless ``state`` has ``shape`` and the device of the first of ``inputs``.

    ``axes`` names the axes of the shape. Raise TypeError if ``state`` is complex and the inputs are
    real. Call ``check_numbers`` first.
    """
    if state is None:
        return
    if tuple(state.shape) != shape:
        raise ValueError(f"initial_state must be {axes} = {shape}, got {tuple(state.shape)}: it has no time axis")
    check_device("initial_state", state, *next(iter(inputs.items())))
    if state.is_complex() and not any(x.is_complex() for x in inputs.values()):
        be = "is" if len(inputs) == 1 else "are"
        raise TypeError(f"initial_state is complex but {' and '.join(inputs)} {be} real: convert one of them")


def check_reset(reset: Any, name: str, x: Tensor) -> None:
    """Raise TypeError unless ``reset`` is a boolean tensor, ValueError unless (batch, time) on the device of x."""
    if reset is None:
        return
    check_tensor("reset", reset)
    if reset.dtype != torch.bool:
        raise TypeError(f"reset must be a boolean tensor, got {reset.dtype}: True drops the state before that step")
    if reset.shape != x.shape[:2]:
        raise ValueError(f"reset must be (batch, time) = {tuple(x.shape[:2])}, got {tuple(reset.shape)}")
    check_device("reset", reset, name, x)


def checked_lengths(lengths: Any, x: Tensor) -> Int[Tensor, "B"]:
    """``lengths`` in int64 on the device of x (B, T, ...); an error unless they are from 0 to T.

    int64, because ``lengths - 1`` would overflow in uint8, and torch treats a uint8 index as a
    mask.
    """
    check_tensor("lengths", lengths)
    batch, steps = x.shape[:2]
    if lengths.dtype not in INTEGER_DTYPES:
        raise TypeError(
            f"expected lengths of shape ({batch},) in an integer dtype, got {tuple(lengths.shape)} in {lengths.dtype}: "
            "pass the number of steps of each row"
        )
    if lengths.shape != (batch,):
        raise ValueError(
            f"expected lengths of shape ({batch},), got {tuple(lengths.shape)}: pass the number of steps of each row"
        )
    if lengths.device != x.device and lengths.device.type != "cpu":
        raise ValueError(f"expected lengths on {x.device} or the CPU, got {lengths.device}: move it with .to()")
    lengths = lengths.to(torch.int64)
    # Compiled, fake and meta tensors have no values to check; lengths above T then act as T.
    if torch.compiler.is_compiling() or type(lengths) is not Tensor or lengths.is_meta or lengths.numel() == 0:
        return lengths.to(x.device)
    low, high = (int(v) for v in torch.aminmax(torch.func.debug_unwrap(lengths)))  # the plain tensor under vmap
    if low < 0 or high > steps:
        raise ValueError(
            f"expected lengths from 0 to T = {steps}, got {low} to {high}: clip them or pad x to the longest"
        )
    return lengths.to(x.device)


def check_floating(name: str, x: Tensor) -> None:
    """Raise TypeError unless x has a real floating dtype."""
    if not x.is_floating_point():
        raise TypeError(f"expected {name} to be floating, got {x.dtype}: convert it with .to()")


def as_tensor_advice(value: Any, *, lengths: bool = True) -> str:
    """How to convert ``value`` to a tensor; ``lengths``: the called function has that argument."""
    then = ", and pass lengths=lengths" if lengths else ""
    if isinstance(value, PackedSequence):
        return "unpack it with x, lengths = torch.nn.utils.rnn.pad_packed_sequence(packed, batch_first=True)" + then
    if isinstance(value, tuple | list) and value and all(isinstance(part, Tensor) for part in value):
        rows = "pad rows of several lengths with torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)"
        return rows + (", and pass the number of steps of each as lengths=" if lengths else "")
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], Tensor):
        return "it seems to be the (output, state) of a layer: pass the output, or join layers with legato.Stack"
    return "wrap it with torch.as_tensor()"
