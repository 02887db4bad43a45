"""Training and evaluation mode of a tree of modules."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """``eval`` mode inside; afterwards, or after an error, every sub-module is in the mode in which it was.

    ``module.train(mode)`` would give one mode to all of them, and a part that was put in ``eval`` mode by hand, such as
    an encoder that is not trained, would have its dropout again.
    """
    before = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        # By train(), which modules may override, from the outermost inwards: it sets all that lies inside.
        for part, training in before:
            if part.training != training:
                part.train(training)
        for part, training in before:  # what lies inside two of them
            part.training = training
