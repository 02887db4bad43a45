"""The experiments, by name. To add one: a module with ``PAPER``, ``Config`` and ``build``, and its line in _MODULES.

``SMOKE`` in a module, values by dotted field such as ``{"training.epochs": 1}``, is what ``--smoke`` makes of it: the
whole way in seconds, on a few real examples.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..task import Paper, Task

_MODULES = {
    "adding": "adding",
    "capacity": "capacity",
    "copy-memory": "copy_memory",
    "imdb": "imdb",
    "imdb-language-model": "imdb_language_model",
    "imdb-language-model-large": "imdb_language_model_large",
    "imdb-pretrained": "imdb_pretrained",
    "imdb-pretrained-large": "imdb_pretrained_large",
    "iwslt15": "iwslt15",
    "long-dependency": "long_dependency",
    "long-dependency-paper": "long_dependency_paper",
    "mackey-glass": "mackey_glass",
    "psmnist": "psmnist",
    "qqp": "qqp",
    "snli": "snli",
    "text8": "text8",
    "text8-large": "text8_large",
}


@dataclass
class Recipe:
    """A recipe module, opened: its configuration, what its paper reports, and the function that builds the task.

    ``smoke`` are the fields of its smallest size; empty where it has none.
    """

    name: str
    config: type
    paper: Paper
    build: Callable[[Any, int, Path | None], Task]
    smoke: dict[str, Any]

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
    return Recipe(name, module.Config, module.PAPER, module.build, getattr(module, "SMOKE", {}))
