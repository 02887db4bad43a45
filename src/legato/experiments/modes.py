"""A network in evaluation, and back as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """``model.eval()`` until the context ends; then every module inside it has its own mode again.

    ``model.train()`` would also switch modules on that were switched to evaluation on purpose, such as frozen ones.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
