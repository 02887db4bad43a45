"""100 million characters of Wikipedia, letters and spaces only. ``recipes/text8.py`` models them."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..task import ExperimentError
from .encoded import arrays
from .files import File, check, compare, find, need, read, zip_member

FOLDER = "text8"
ARCHIVE = File(
    "text8.zip",
    31_344_016,
    "sha256:a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232",
    "http://mattmahoney.net/dc/text8.zip",
)
TEXT8 = File("text8", 100_000_000, "sha256:6e890197040d37d85beb962ae1f041ff1d9a9ca8d20c7d99c85027eebf51dca7")

STAND_IN_FOLDER = "wiki100m"
STAND_IN = File("wiki100m.txt", 100_000_000, "sha256:4bf6624318acf3cc1077761b4efa04fb91b1313fff4d1f9bfba34555f26e906d")

_ALPHABET = b" abcdefghijklmnopqrstuvwxyz"
_VALIDATION = _TEST = 20  # one part in so many of the characters


class Text8(NamedTuple):
    """90, 5 and 5 million characters as uint8: 0 is the space, 1 to 26 are a to z. ``source`` says of which data."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    source: str


def text8(data_dir: Path | None = None) -> Text8:
    """The first 90 million characters for training, 5 for validation, the last 5 for the test.

    ``text8``: Mahoney's text, of the English Wikipedia of 2006; as ``text8.zip`` or unpacked.
    ``wiki100m``, a stand-in: ``wiki100m.txt``, the same leading articles nine years later, brought into the same form.
    Either text may be packed by xz or gzip.

    Unpacked and checked once; later read from the cache of ``prepared.py``, memory-mapped.

    Args:
        data_dir: folder that holds one of the files, or holds it in ``text8/`` or ``wiki100m/``; text8 wins. By default
            $LEGATO_DATA; else text8.zip is downloaded into the user's cache (31 MB).

    Raises:
        ExperimentError: no file is there, or it is damaged, has another content or a character outside of a to z.

    Source: M. Mahoney, About the Test Data; the split of Mikolov et al. 2012.
    """
    source, path = text8_file(data_dir)
    return Text8(**arrays(source, lambda: _split(source, path), lambda: [path]))


def text8_file(data_dir: Path | None = None) -> tuple[str, Path]:
    """Which data are there, and the file."""
    path = find(TEXT8, FOLDER, data_dir) or find(ARCHIVE, FOLDER, data_dir)
    stand_in = None if path else find(STAND_IN, STAND_IN_FOLDER, data_dir)
    if stand_in is not None:
        return STAND_IN_FOLDER, stand_in
    return FOLDER, path or need(ARCHIVE, FOLDER, data_dir, otherwise="text8, nor wiki100m.txt")


def characters(source: str, path: Path) -> bytes:
    """The text in the file of ``text8_file``, which is checked."""
    if path.name != ARCHIVE.name:
        return read(path, STAND_IN if source == STAND_IN_FOLDER else TEXT8)
    check(path, ARCHIVE)
    content = zip_member(path, TEXT8.name)
    compare(content, TEXT8, path)
    return content


def _split(source: str, path: Path) -> Text8:
    codes = _codes(characters(source, path), path)
    validation, test = len(codes) // _VALIDATION, len(codes) // _TEST
    ends = len(codes) - validation - test, len(codes) - test
    return Text8(codes[: ends[0]], codes[ends[0] : ends[1]], codes[ends[1] :], source)


def _codes(content: bytes, path: Path) -> np.ndarray:
    codes = np.frombuffer(content.translate(bytes(_code(byte) for byte in range(256))), np.uint8)
    if codes.size and codes.max() >= len(_ALPHABET):
        at = int((codes >= len(_ALPHABET)).argmax())
        raise ExperimentError(
            f"{path}, character {at:,}: expected a space or a letter from a to z, got {content[at : at + 1]!r}"
        )
    return codes


def _code(byte: int) -> int:
    found = _ALPHABET.find(byte)
    return found if found >= 0 else 255
