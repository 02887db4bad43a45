"""The three forms a data set of texts has: labelled, in labelled pairs, and line by line in two languages.

Texts are as the files have them: nothing is lower-cased, stripped of marks or cut. Next: ``words.py`` makes tokens.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple


class Labelled(NamedTuple):
    """``labels[i]`` is the class of ``texts[i]``, counted from 0."""

    texts: list[str]
    labels: list[int]


class Pairs(NamedTuple):
    """``labels[i]`` is the class, counted from 0, of how ``second[i]`` relates to ``first[i]``."""

    first: list[str]
    second: list[str]
    labels: list[int]


class Parallel(NamedTuple):
    """``target[i]`` is a translation of ``source[i]``."""

    source: list[str]
    target: list[str]


def chosen(names: Sequence[str], count: int) -> set[int]:
    """The indices of the ``count`` names with the smallest SHA-256: a draw that no machine or version changes.

    Example:
        >>> sorted(chosen(["a", "b", "c", "d"], 2))
        [1, 2]
    """
    return set(sorted(range(len(names)), key=lambda i: hashlib.sha256(names[i].encode()).digest())[:count])
