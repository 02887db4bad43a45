"""The text of ``repr`` for a module: its constructor arguments."""

import inspect
from typing import Any

from torch import Tensor, nn

_HIDDEN = ("self", "device", "dtype")


def constructor_arguments(module: nn.Module, values: dict[str, Any], named: tuple[str, ...] = ()) -> str:
    """The positional arguments of ``type(module)``, then the options that differ from their defaults.

    Args:
        module: its attributes give the values of the arguments of the same name.
        values: values of other arguments, by name.
        named: positional arguments to print with their names.
    """
    parts = []
    for parameter in inspect.signature(type(module).__init__).parameters.values():
        name, default = parameter.name, parameter.default
        if name in _HIDDEN or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        value = values[name] if name in values else getattr(module, name, default)
        if isinstance(value, Tensor | nn.Module) or inspect.ismethod(value) or value is inspect.Parameter.empty:
            continue  # parameters and sub-modules would not fit on one line
        if default is not inspect.Parameter.empty and value == default:
            continue
        text = _text(value)
        positional = default is inspect.Parameter.empty and parameter.kind is not parameter.KEYWORD_ONLY
        parts.append(text if positional and name not in named else f"{name}={text}")
    return ", ".join(parts)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, float) and value.is_integer():
        return repr(int(value))
    return getattr(value, "__name__", type(value).__name__) if callable(value) else repr(value)
