"""Vectors of words from disk: ``vectors300``, made for this project, and GloVe as its authors distribute it."""

import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from legato._shapes import Bool, Float

from ..task import ExperimentError

#: Where the vectors of a name may lie, first choice first.
FILES = {
    "vectors300": ("vectors300/sg300_wiki_imdb.npz", "sg300_wiki_imdb.npz"),
    "glove.840B.300d": ("glove.840B.300d.txt", "glove.840B.300d.zip"),
    "glove.6B.300d": ("glove.6B.300d.txt", "glove.6B.zip"),
}


class WordVectors(NamedTuple):
    """Row i of ``matrix`` (float32) is the vector of word i where ``found[i]``, else zero. ``source``: its name."""

    matrix: Float[np.ndarray, "words width"]
    found: Bool[np.ndarray, " words"]
    source: str


def word_vectors(
    words: Sequence[str], data_dir: Path | None = None, name: str = "vectors300", *, width: int = 300
) -> WordVectors:
    """The vectors of these words; of a file of any size only their rows are kept in memory.

    Args:
        words: as a vocabulary has them. They are looked for as they are: the vectors of ``vectors300`` and of
            glove.6B are of lower-cased words, those of glove.840B of both.
        data_dir: folder with the files. By default $LEGATO_DATA, else ../shared/data.
        name: one of ``FILES``.
        width: numbers in a vector.

    Raises:
        ExperimentError: the name is unknown, the file is missing, cut short or another kind of file, or its vectors
            have another width.

    Source: Pennington, Socher & Manning 2014, GloVe: global vectors for word representation.
    """
    path = vectors_file(data_dir, name)
    matrix, found = np.zeros((len(words), width), np.float32), np.zeros(len(words), bool)
    rows = {word.encode(): row for row, word in enumerate(words)}
    try:
        for word, vector in (_in_arrays if path.suffix == ".npz" else _in_lines)(path, name, rows, width):
            if not found[row := rows[word]]:  # GloVe has a few words twice: the first is the more frequent
                matrix[row], found[row] = vector, True
    except (OSError, EOFError, KeyError, ValueError, zlib.error, zipfile.BadZipFile) as error:
        raise ExperimentError(
            f"{path} cannot be read as the vectors {name}: {error}: put an intact copy there"
        ) from error
    return WordVectors(matrix, found, name)


def vectors_file(data_dir: Path | None, name: str) -> Path:
    """The file in which ``word_vectors`` finds these vectors.

    Raises:
        ExperimentError: the name is unknown or the file is missing.
    """
    if name not in FILES:
        raise ExperimentError(f"there are no vectors {name!r}: expected one of {', '.join(FILES)}")
    root = data_dir or Path(os.environ.get("LEGATO_DATA") or "../shared/data")
    for file in FILES[name]:
        if (root / file).is_file():
            return root / file
    raise ExperimentError(
        f"there are no vectors {name} in {root}: expected {' or '.join(FILES[name])}: put the file there, or name its "
        "folder with --data-dir or LEGATO_DATA"
    )


def _in_arrays(path: Path, name: str, rows: dict[bytes, int], width: int) -> Iterator[tuple[bytes, np.ndarray]]:
    """Arrays ``words`` (bytes) and ``vectors`` of one length."""
    with np.load(path, allow_pickle=False) as file:
        words, vectors = file["words"], file["vectors"]
    if vectors.ndim != 2 or words.shape != vectors.shape[:1]:
        raise ValueError(f"expected a vector for each word, got {words.shape} words and vectors {vectors.shape}")
    _expect(width, vectors.shape[1], path)
    for index, word in enumerate(words.tolist()):
        if word in rows:
            yield word, vectors[index]


def _in_lines(path: Path, name: str, rows: dict[bytes, int], width: int) -> Iterator[tuple[bytes, np.ndarray]]:
    """Lines of a word and its numbers, between spaces."""
    number = 0
    with _text(path, name) as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                _expect(width, line.count(b" "), path)
            if line.partition(b" ")[0] not in rows:
                continue
            # Some words of glove.840B have spaces in them, so the numbers are counted from the end.
            word, *numbers = line.rsplit(b" ", width)
            if len(numbers) != width:
                raise ValueError(f"expected a word and {width} numbers in line {number:,}, got {len(numbers)} numbers")
            if word in rows:
                yield word, np.array(numbers, np.float32)
    if not number:
        raise ValueError("expected lines of a word and its numbers, got an empty file")


@contextmanager
def _text(path: Path, name: str) -> Iterator[BinaryIO]:
    """The lines of a text file, or of the text file of this name in a zip file."""
    if path.suffix != ".zip":
        with open(path, "rb") as file:
            yield file
        return
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.txt") as file:
        yield file  # type: ignore[misc]


def _expect(width: int, found: int, path: Path) -> None:
    if found != width:
        raise ExperimentError(
            f"{path} has vectors of another width: expected {width} numbers for a word, got {found}: use a file "
            "of that width, or set the size of the embedding to it"
        )
