"""Random numbers of the tests: all of them follow ``pytest --seed N``, so that another N is another run of the suite.

``torch.manual_seed`` and ``torch.Generator`` are called here only: a seed that is written into a test would be the same
in every run.
"""

import torch

run = 0  # set by conftest.py from the option


def seed(number: int = 0) -> None:
    """The global generator begins again, at a place of its own for each number and each run."""
    torch.manual_seed(_place(number))


def generator(number: int = 0) -> torch.Generator:
    """A generator that begins at a place of its own for each number and each run."""
    return torch.Generator().manual_seed(_place(number))


def _place(number: int) -> int:
    return number + 1_000_003 * run
