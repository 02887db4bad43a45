"""Training and evaluation mode of a tree of modules."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """A context in ``eval`` mode; on exit every sub-module gets its previous mode, also on an error.

    ``module.train(mode)`` would set all sub-modules to one mode, and would switch dropout on again
    in a sub-module that the user has set to ``eval`` mode, such as a fixed encoder.
    """
    before = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        # By train(), which modules may override; the outermost first, because it also sets its
        # children.
        for part, training in before:
            if part.training != training:
                part.train(training)
        for part, training in before:  # sub-modules that an outer train() has changed
            part.training = training
