"""Configurations of a recipe, built from its presets."""

from typing import Any


def preset(module: Any, *presets: str, **fields: Any) -> Any:
    """The configuration of a recipe with the fields of these presets in order, then with these: model__units=8."""
    config, values = module.Config(), {}
    for name in presets:
        values |= module.PRESETS[name].fields
    for path, value in (values | {name.replace("__", "."): value for name, value in fields.items()}).items():
        *parents, last = path.split(".")
        part = config
        for parent in parents:
            part = getattr(part, parent)
        assert hasattr(part, last), path
        setattr(part, last, value)
    return config
