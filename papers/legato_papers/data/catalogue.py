"""Which data sets there are, what of them is on this machine, and under which licence: ``legato-papers data list``."""

import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..task import ExperimentError
from . import imdb, mnist, qqp, snli, text8, translation
from .files import UNREADABLE, File, check, find, named_folder
from .vectors import FILES as VECTORS

Form = list[tuple[str, File]]  # files with their folders, all of which it takes


@dataclass(frozen=True)
class Entry:
    """A data set.

    Args:
        name: of the data set, as results name it.
        what: how much of what it is.
        licence: of the data, which are not ours.
        forms: what its loader reads, the first that is there.
        stands_for: the data set in whose place it is used; "" for the data that the papers used.
        origin: where to get it, or what takes its place, if its files do not say it.
    """

    name: str
    what: str
    licence: str
    forms: list[Form]
    stands_for: str = ""
    origin: str = ""

    def how_to_get_it(self) -> str:
        """One sentence."""
        folder, first = self.forms[0][0]
        addresses = [file.url for _, file in self.forms[0] if file.url]
        if not addresses:
            return self.origin or first.origin
        where = addresses[0] + " and the others there" * (len(addresses) > 1)
        return (
            f"put {where} in {folder}/, or leave --data-dir and LEGATO_DATA out: it is then downloaded when first used"
        )


@dataclass(frozen=True)
class Found:
    """What is there of a data set: nothing if ``folder`` is None; which files are missing or damaged.

    ``compared`` is False if of a file that is there neither size nor checksum was compared.
    """

    entry: Entry
    folder: Path | None
    missing: list[str]
    damaged: list[str]
    compared: bool

    @property
    def whole(self) -> bool:
        return self.folder is not None and not self.missing and not self.damaged


def catalogue() -> list[Entry]:
    """Every data set that a recipe reads."""
    iwslt15 = [(translation.IWSLT15_FOLDER, file) for file in translation.IWSLT15.values()]
    return [
        Entry("MNIST", "70,000 images", "none stated", [[(mnist.FOLDER, file) for file in mnist.files()]]),
        Entry(
            "IMDB",
            "50,000 reviews with labels, 50,000 without",
            "none stated; cite Maas et al. 2011",
            [
                [(imdb.FOLDER, imdb.ARCHIVE)],
                [(imdb.FOLDER, imdb.REVIEW)],
                [(imdb.FOLDER, file) for file in imdb.PARTS.values()],
            ],
        ),
        Entry(
            "qqp",
            "404,290 pairs of questions",
            "Quora's terms, non-commercial",
            [[(qqp.FOLDER, qqp.OFFICIAL)], [(qqp.FOLDER, qqp.PAIRS)]],
        ),
        Entry(
            "qqp-20k",
            "20,000 pairs of questions",
            "Quora's terms, non-commercial",
            [[(qqp.SMALL_FOLDER, file) for file in qqp.SMALL.values()]],
            stands_for="qqp",
            origin="they are not published; qqp, all of these pairs, takes their place",
        ),
        Entry(
            "snli",
            "569,033 pairs of sentences",
            "CC BY-SA 4.0",
            [
                [(snli.FOLDER, snli.ARCHIVE)],
                *([(snli.FOLDER, File(form.format(part))) for part in snli.COUNTS] for form in snli.FORMS),
            ],
        ),
        Entry(
            "cad+sick",
            "12,830 pairs to train on, with SNLI's dev and test",
            "Apache 2.0 (CAD), CC BY-NC-SA 3.0 (SICK), CC BY-SA 4.0 (SNLI)",
            [[(folder, file) for file, folder in snli.STAND_IN.items()]],
            stands_for="snli",
            origin="they are not published in this form; snli takes their place",
        ),
        Entry(
            "text8",
            "100,000,000 characters",
            "CC BY-SA, GFDL",
            [[(text8.FOLDER, text8.ARCHIVE)], [(text8.FOLDER, text8.TEXT8)]],
        ),
        Entry(
            "wiki100m",
            "100,000,000 characters",
            "CC BY-SA 3.0",
            [[(text8.STAND_IN_FOLDER, text8.STAND_IN)]],
            stands_for="text8",
            origin="it is not published; text8 takes its place",
        ),
        Entry("en-vi", "IWSLT'15, 136,138 pairs of sentences", "CC BY-NC-ND", [iwslt15]),
        Entry(
            "fra-eng",
            "142,787 pairs of sentences",
            "CC BY 2.0 FR",
            [
                [(translation.FRA_ENG_FOLDER, translation.FRA_ENG_ARCHIVE)],
                [(translation.FRA_ENG_FOLDER, translation.FRA_ENG)],
            ],
            stands_for="en-vi",
        ),
        Entry(
            "multi30k-en-de",
            "31,014 pairs of captions",
            "for research",
            [[(translation.MULTI30K_FOLDER, file) for file in translation.MULTI30K.values()]],
            stands_for="en-vi",
        ),
        *(
            Entry(
                name,
                "word vectors",
                "PDDL 1.0",
                [[(folder, file)] for file in sorted(files, key=lambda file: not file.url)],
            )
            for name, (folder, files) in VECTORS.items()
        ),
    ]


def look(entry: Entry, data_dir: Path | None = None, *, thorough: bool = False) -> Found:
    """What is there of a data set.

    Args:
        entry: the data set.
        data_dir: folder of data, as loaders take it.
        thorough: compare checksums; else only sizes, as the ends of packed files tell them, which takes no time.
    """
    forms = [[(file, find(file, folder, data_dir)) for folder, file in form] for form in entry.forms]
    # A form that is there in part says more than one that is not there at all.
    form = min(forms, key=lambda form: sum(path is None for _, path in form) / len(form))
    there = [(path, file) for file, path in form if path is not None]
    return Found(
        entry,
        there[0][0].parent if there else None,
        [file.name for file, path in form if path is None],
        [problem for path, file in there for problem in _problems(path, file, thorough)],
        all(file.size is not None or (thorough and file.checksum) for _, file in there),
    )


def show(data_dir: Path | None = None, *, thorough: bool = False) -> None:
    """Print the catalogue with what is there of it.

    Raises:
        ExperimentError: the folder that is named is none.
    """
    from rich.console import Console
    from rich.text import Text

    named_folder(data_dir)
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    for entry in catalogue():
        found = look(entry, data_dir, thorough=thorough)
        state = "not whole"
        if found.whole:
            state = "whole" if found.compared else "unchecked"
        elif found.folder is None:
            state = "not there"
        console.print(Text(f"{entry.name:<16}", "bold"), f"{state:<10} {found.folder or ''}".rstrip())
        instead = f" in place of {entry.stands_for}" if entry.stands_for else ""
        console.print(f"{'':<16} {entry.what}{instead}; licence: {entry.licence}")
        for problem in found.damaged:
            console.print(f"{'':<16} {problem}")
        if found.missing:
            console.print(f"{'':<16} there is no {', '.join(found.missing)}: {entry.how_to_get_it()}")
    if not thorough:
        console.print("Sizes were compared; --check compares every checksum.")
    console.print("What is unchecked is compared when it is read.")


def _problems(path: Path, file: File, thorough: bool) -> Iterator[str]:
    try:
        if thorough:
            check(path, file)
        else:
            size = _size(path, path.name != file.name)
            if file.size not in (None, size):
                yield f"{path} is not whole or another file: expected {file.size:,} bytes of content, got {size:,}"
    except ExperimentError as error:
        yield str(error)
    except (*UNREADABLE, StopIteration) as error:
        yield f"{path} is not whole: {error}"


def _size(path: Path, packed: bool) -> int:
    """Bytes of content, as the file's end tells them."""
    if packed and path.suffix == ".xz":
        return _xz_size(path)
    if packed and path.suffix == ".gz":
        with open(path, "rb") as stream:
            stream.seek(-4, 2)
            return struct.unpack("<I", stream.read())[0]
    if path.suffix == ".zip":
        zipfile.ZipFile(path).close()  # its directory is at its end
    return path.stat().st_size


def _xz_size(path: Path) -> int:
    """From the index of an .xz file of one stream: https://tukaani.org/xz/xz-file-format.txt, sections 2.1.2 and 4."""
    with open(path, "rb") as stream:
        stream.seek(-12, 2)
        _, backward, _, magic = struct.unpack("<IIH2s", stream.read(12))
        if magic != b"YZ":
            raise ValueError("the end of an .xz file is missing")
        stream.seek(-12 - 4 * (backward + 1), 2)
        index = iter(stream.read(4 * (backward + 1)))
    next(index)
    return sum([(_number(index), _number(index))[1] for _ in range(_number(index))])


def _number(index: Iterator[int]) -> int:
    """Seven bits a byte, the lowest first; the top bit says that there are more."""
    value = shift = 0
    for byte in index:
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value
    raise ValueError("the index of an .xz file is cut short")
