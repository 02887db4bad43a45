"""The experiments, by name. To add one: a module with ``PAPER``, ``Config`` and ``build``, and its line in _MODULES.

``PRESETS`` in a module has its other sizes by name, such as ``large`` and ``smoke``; ``smoke`` runs every part of the
recipe in seconds, on a few real examples.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..task import Paper, Preset, Task

_MODULES = {
    "adding": "adding",
    "capacity": "capacity",
    "copy-memory": "copy_memory",
    "imdb": "imdb",
    "imdb-language-model": "imdb_language_model",
    "imdb-pretrained": "imdb_pretrained",
    "iwslt15": "iwslt15",
    "long-dependency": "long_dependency",
    "mackey-glass": "mackey_glass",
    "psmnist": "psmnist",
    "qqp": "qqp",
    "snli": "snli",
    "text8": "text8",
}


@dataclass
class Recipe:
    """An imported recipe module: its configuration, what its paper reports, the function that builds its task, and its
    presets by name."""

    name: str
    config: type
    paper: Paper
    build: Callable[[Any, int, Path | None], Task]
    presets: dict[str, Preset]

    @property
    def description(self) -> str:
        """One line: what is learned from what."""
        return (self.config.__doc__ or "").splitlines()[0]


def names() -> list[str]:
    """The names that ``legato-papers train`` takes."""
    return list(_MODULES)


def recipe(name: str) -> Recipe:
    """The recipe of this name, its module imported."""
    module = importlib.import_module(f".{_MODULES[name]}", __name__)
    return Recipe(name, module.Config, module.PAPER, module.build, getattr(module, "PRESETS", {}))
