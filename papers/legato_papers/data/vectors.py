"""Word vectors: GloVe as its authors distribute it, or any file in one of two formats."""

import gzip
import lzma
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BufferedIOBase
from pathlib import Path
from typing import NamedTuple

import numpy as np

from legato._shapes import Bool, Float

from ..task import ExperimentError
from .files import UNREADABLE, File, check, find, need

#: The vectors that the recipes read unless others are named.
GLOVE = "glove.840B.300d"

#: Folder and files of the vectors of a name, first choice first; the last is downloaded if none is there.
FILES = {
    "glove.840B.300d": (
        "glove",
        (
            File("glove.840B.300d.txt", 5_646_236_541),
            File(
                "glove.840B.300d.zip",
                2_176_768_927,
                "sha256:c06db255e65095393609f19a4cfca20bf3a71e20cc53e892aafa490347e3849f",
                "https://nlp.stanford.edu/data/glove.840B.300d.zip",
            ),
        ),
    ),
    "glove.6B.300d": (
        "glove",
        (
            File("glove.6B.300d.txt", 1_037_962_819),
            File(
                "glove.6B.zip",
                862_182_613,
                "sha256:617afb2fe6cbd085c235baf7a465b96f4112bd7f7ccb2b2cbd649fed9cbcf2fb",
                "https://nlp.stanford.edu/data/glove.6B.zip",
            ),
        ),
    ),
}


class WordVectors(NamedTuple):
    """Row i of ``matrix`` (float32) is the vector of word i where ``found[i]``, else zero. ``source``: its name."""

    matrix: Float[np.ndarray, "words width"]
    found: Bool[np.ndarray, " words"]
    source: str


def word_vectors(
    words: Sequence[str], data_dir: Path | None = None, name: str = GLOVE, *, width: int = 300
) -> WordVectors:
    """The vectors of these words; of a file of any size only their rows are kept in memory.

    Args:
        words: as a vocabulary has them, compared as they are: glove.6B has vectors of lower-cased words only,
            glove.840B of both.
        data_dir: folder that holds the file, or holds it in ``glove/``. By default $LEGATO_DATA; else GloVe is
            downloaded into the user's cache (2.2 GB, or 0.9 GB of 6B).
        name: one of ``FILES``, whose archives are checked by SHA-256 and whose unpacked texts by size; or the path of
            a file, which is not checked: lines of a word and its numbers between spaces, as GloVe's, packed by gzip or
            xz or not; a zip archive NAME.zip with such a text NAME.txt; or NAME.npz with the arrays ``words`` (bytes)
            and ``vectors``.
        width: numbers in a vector.

    Raises:
        ExperimentError: the name is unknown, the file is missing, cut short or another kind of file, or its vectors
            have another width.

    Source: Pennington, Socher & Manning 2014, GloVe: global vectors for word representation.
    """
    path, file = _find(data_dir, name)
    check(path, file)
    matrix, found = np.zeros((len(words), width), np.float32), np.zeros(len(words), bool)
    rows = {word.encode(): row for row, word in enumerate(words)}
    try:
        with _opened(path, name) as stream:
            arrays = file.name.endswith(".npz")
            for word, vector in (_in_arrays if arrays else _in_lines)(stream, rows, width, path):
                if not np.isfinite(vector).all():
                    raise ValueError(f"expected finite numbers, got NaN or infinity in the vector of {word!r}")
                if not found[row := rows[word]]:  # GloVe has a few words twice: the first is the more frequent
                    matrix[row], found[row] = vector, True
    except UNREADABLE as error:
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise ExperimentError(
            f"{path} cannot be read as the vectors {name}: {why}: put an intact copy there"
        ) from error
    return WordVectors(matrix, found, name)


def vectors_file(data_dir: Path | None, name: str) -> Path:
    """The file in which ``word_vectors`` finds these vectors, which is downloaded if need be.

    Raises:
        ExperimentError: the name is unknown, or the file is missing and cannot be downloaded.
    """
    return _find(data_dir, name)[0]


def _find(data_dir: Path | None, name: str) -> tuple[Path, File]:
    if name not in FILES:
        path = Path(name)
        if path.is_file():
            return path, File(path.name)
        raise ExperimentError(
            f"there are no vectors {name!r}: expected one of {', '.join(FILES)}, or the path of a file"
        )
    folder, files = FILES[name]
    for file in files:
        path = find(file, folder, data_dir)
        if path is not None:
            return path, file
    others = " or ".join(file.name for file in files[:-1])
    return need(files[-1], folder, data_dir, otherwise=others), files[-1]


@contextmanager
def _opened(path: Path, name: str) -> Iterator[BufferedIOBase]:
    """The bytes of a file, unpacked; of an archive, those of the text of this name."""
    if path.suffix == ".zip":
        member = f"{name if name in FILES else path.stem}.txt"
        with zipfile.ZipFile(path) as archive, archive.open(member) as file:
            yield file  # type: ignore[misc]
    else:
        with {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)(path, "rb") as file:
            yield file  # type: ignore[misc]


def _in_arrays(
    stream: BufferedIOBase, rows: dict[bytes, int], width: int, path: Path
) -> Iterator[tuple[bytes, np.ndarray]]:
    """Arrays ``words`` (bytes) and ``vectors`` of one length."""
    arrays = np.load(stream, allow_pickle=False)
    if not isinstance(arrays, np.lib.npyio.NpzFile):
        raise ValueError("expected an archive of two arrays, got one array")
    with arrays:
        words, vectors = arrays["words"], arrays["vectors"]
    if vectors.ndim != 2 or words.shape != vectors.shape[:1] or words.dtype.kind != "S" or vectors.dtype.kind != "f":
        raise ValueError(
            f"expected a vector for each word, got {words.dtype} {words.shape} and {vectors.dtype} {vectors.shape}"
        )
    _expect(width, vectors.shape[1], path)
    for index, word in enumerate(words.tolist()):
        if word in rows:
            yield word, vectors[index]


def _in_lines(
    stream: BufferedIOBase, rows: dict[bytes, int], width: int, path: Path
) -> Iterator[tuple[bytes, np.ndarray]]:
    """Lines of a word and its numbers, between spaces."""
    number = 0
    for number, line in enumerate(stream, start=1):
        if number == 1:
            _expect(width, line.count(b" "), path)
        if line.partition(b" ")[0] not in rows:
            continue
        # Some words of glove.840B have spaces in them, so the numbers are counted from the end.
        word, *numbers = line.rsplit(b" ", width)
        if len(numbers) != width:
            raise ValueError(f"expected a word and {width} numbers in line {number:,}, got {len(numbers)} numbers")
        if word in rows:
            with np.errstate(over="ignore"):  # an infinity is told by the caller
                vector = np.array(numbers, np.float32)
            yield word, vector
    if not number:
        raise ValueError("expected lines of a word and its numbers, got an empty file")


def _expect(width: int, found: int, path: Path) -> None:
    if found != width:
        raise ExperimentError(
            f"{path} has vectors of another width: expected {width} numbers for a word, got {found}: use a file "
            "of that width, or set the size of the embedding to it"
        )
