"""Convert official files of a data set to the compact form that the loaders read: ``legato-papers data convert``."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

from ..locks import locked
from ..task import ExperimentError
from . import imdb, qqp, snli, text8, translation
from .files import as_lines, need, read, write

Converted = Iterator[tuple[str, bytes]]


def convert(name: str, source: Path, target: Path) -> list[Path]:
    """Write the compact form of a data set; the same input gives the same bytes. The loaders' docstrings describe it.

    ======================  ==================================================================
    name                    files
    ======================  ==================================================================
    imdb                    ``imdb/train.jsonl.xz``, ``test.jsonl.xz``, ``unsup.jsonl.xz``
    qqp                     ``qqp/pairs.jsonl.xz``
    snli                    ``snli/train.jsonl.xz``, ``dev.jsonl.xz``, ``test.jsonl.xz``
    text8                   ``text8/text8.xz``
    iwslt15-en-vi           ``iwslt15-en-vi/train.en.xz`` and the seven others
    ======================  ==================================================================

    Args:
        name: of the data set.
        source: folder with the official files, or one of them.
        target: folder of data, where the data set's folder is made; files of these names are replaced.

    Returns:
        list: the files, each of which is there whole or not at all.

    Raises:
        ExperimentError: the official files are missing or damaged, or there is no such data set.
    """
    if name not in CONVERTERS:
        raise ExperimentError(f"there is no data set {name} to convert: expected one of {', '.join(CONVERTERS)}")
    if not source.exists():
        raise ExperimentError(f"there is no {source}: name the folder of the official files or one of them")
    written = []
    with ExitStack() as held:
        for path, content in CONVERTERS[name](source if source.is_dir() else source.parent):
            if not written:  # not before there is something to write
                target.mkdir(parents=True, exist_ok=True)
                held.enter_context(locked(target / f".{name}.lock", f"converts {name} to {target}"))
            write(target / path, [content])
            written.append(target / path)
    return written


def _imdb(source: Path) -> Converted:
    folder = source.parent if source.name == "aclImdb" else source
    for part, rows in imdb.reviews(folder, unlabelled=True).items():
        yield f"{imdb.FOLDER}/{imdb.PARTS[part].name}.xz", as_lines(rows)


def _qqp(source: Path) -> Converted:
    paths = qqp.qqp_files(source)
    if len(paths) > 1:
        raise _stand_in(source, qqp.OFFICIAL.name)
    yield f"{qqp.FOLDER}/{qqp.PAIRS.name}.xz", as_lines(qqp.questions(paths[0]))


def _snli(source: Path) -> Converted:
    paths = snli.snli_files(source)
    if len(paths) == len(snli.STAND_IN):
        raise _stand_in(source, snli.ARCHIVE.name)
    for part, rows in snli.inferences(paths).items():
        yield f"{snli.FOLDER}/{part}.jsonl.xz", as_lines(rows)


def _text8(source: Path) -> Converted:
    name, path = text8.text8_file(source)
    if name != text8.FOLDER:
        raise _stand_in(source, text8.ARCHIVE.name)
    yield f"{text8.FOLDER}/{text8.TEXT8.name}.xz", text8.characters(name, path)


def _iwslt15(source: Path) -> Converted:
    for file in translation.IWSLT15.values():
        path = need(file, translation.IWSLT15_FOLDER, source)
        yield f"{translation.IWSLT15_FOLDER}/{file.name}.xz", read(path, file)


def _stand_in(source: Path, wanted: str) -> ExperimentError:
    return ExperimentError(
        f"expected {wanted} in {source}: what is there is a stand-in, and in its compact form already"
    )


CONVERTERS: dict[str, Callable[[Path], Converted]] = {
    "imdb": _imdb,
    "qqp": _qqp,
    "snli": _snli,
    "text8": _text8,
    translation.IWSLT15_FOLDER: _iwslt15,
}
