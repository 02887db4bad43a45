"""Sentences with translations: IWSLT'15 English-Vietnamese and two stand-ins. ``recipes/iwslt15.py`` translates."""

import hashlib
import re
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from ..task import ExperimentError
from .files import File, columns, find, lines, need, read_text, zip_member
from .files import compare as compare_content
from .texts import Parallel

Pair = Literal["en-vi", "fra-eng", "multi30k-en-de"]

IWSLT15_FOLDER = "iwslt15-en-vi"
_STANFORD = "https://nlp.stanford.edu/projects/nmt/data/iwslt15.en-vi/"


def _iwslt15(name: str, size: int | None, checksum: str) -> File:
    return File(name, size, checksum, _STANFORD + name)


#: The training files are known by the names that git gives them in two public repositories.
IWSLT15 = {
    file.name: file
    for file in (
        _iwslt15("train.en", None, "git:15ead8ee3fb979c06b314594e1d2602d4308c1e5"),
        _iwslt15("train.vi", None, "git:985cf3b6bb7aeda61cc06f439e3a7e0327470661"),
        _iwslt15("tst2012.en", 140_250, "sha256:b8fbcd0d4199d41276421d1f7228298df67dd9e2c5c134c2ee8cdf3ec27801e2"),
        _iwslt15("tst2012.vi", 188_396, "sha256:01004078b3f36b0c46e81b65fc6851230b3c823405c76d1d82ef3b786b512ff0"),
        _iwslt15("tst2013.en", 132_264, "sha256:3860ce60bc5b85d96cc2d3d580cf1bc9d62440e939c1b964676d3607c4e8f1df"),
        _iwslt15("tst2013.vi", 183_855, "sha256:29af16842808da2812b8fd4d47fc05d082ba870e60ab7755090ad04b380994cd"),
        _iwslt15("vocab.en", 139_741, "sha256:827ac2c6d51c50014376cefc1d7b6b01c412f227c4dfbc6dbcb0e88891c0b759"),
        _iwslt15("vocab.vi", 46_767, "sha256:383628b92b1dcbce472fa9857724add8b2976c2ed2bbe1d76ea8dca108c3396a"),
    )
}

MULTI30K_FOLDER = "multi30k"
_RAW = "https://raw.githubusercontent.com/multi30k/dataset/a3d2e0d26b56f3846f66a952536ffed4e401d05a/data/task1/raw/"


def _raw(name: str, size: int, checksum: str) -> File:
    return File(name, size, checksum, f"{_RAW}{name}.gz")


MULTI30K = {
    file.name: file
    for file in (
        _raw("train.en", 1_801_238, "sha256:460a15fbd157e34a7a9957ee388c1ca247fe47af3ef25fb50442af6c274e0fc6"),
        _raw("train.de", 2_110_398, "sha256:2c2b73fd2b548fbcde3a875e0a78d6ee94d498bfdee6bd3eae3945779e9ddf72"),
        _raw("val.en", 63_297, "sha256:1f2a23d992769b5b3d209b0a10dd0b77c08cceb1f20dfb97ed0aafa49d107227"),
        _raw("val.de", 75_981, "sha256:660e09eb7e1da2f856ea13ee5ad3cf6d36b3d5b0b733c857e94c5747a3dfc660"),
        _raw("test_2016_flickr.en", 62_076, "sha256:399a4382932c1aadd3ceb9bef1008d388a64c76d4ae4e9d4728c6f4301cac182"),
        _raw("test_2016_flickr.de", 70_649, "sha256:4be6b5b3236b79c25475c6bb829800a7ce559e9ba7a1f6c2394fe4d40be46d16"),
    )
}

FRA_ENG_FOLDER = "fra-eng"
FRA_ENG_ARCHIVE = File(
    "fra-eng.zip",
    2_951_390,
    "sha256:16c4f7d0df9e7c5e6c54cdb0447f3f4a18a55052ff5e2e0b27dd4a06c0e49d04",
    origin="it is of 2017-09-29 and not published any more: the one at www.manythings.org/anki is newer and other",
)
FRA_ENG = File("fra.txt", 10_009_515, "sha256:2546838ae46e0eac4c02ab7032ea0a02a006074a5340077a36a9444f41e02888")
_SHARES = 64  # validation and test are one share each of the English sentences


class Translation(NamedTuple):
    """Sentences of three parts in two languages. ``source`` says of which data."""

    train: Parallel
    validation: Parallel
    test: Parallel
    source: str


def translation(pair: Pair, data_dir: Path | None = None, *, train: bool = True) -> Translation:
    """Sentences of one language and their translations, as the files have them.

    ``en-vi``, 133,317 / 1,553 / 1,268: IWSLT'15 as Stanford prepared it, split into words; tst2012 validates, tst2013
    tests. Eight files, ``train.en``, ``tst2012.vi`` and so on.

    ``fra-eng``, English to French, from the 142,787 pairs of ``fra.txt`` or ``fra-eng.zip``. The SHA-256 of an English
    sentence's words, in small letters and without marks, modulo 64 says where it goes: 0 validates, 1 tests, all others
    train, so no English sentence is on two sides (a French one may be). Validation and test keep the first French side
    of each English one.

    ``multi30k-en-de``, 29,000 / 1,014 / 1,000: captions of pictures; val validates, test_2016_flickr tests.

    Args:
        pair: en-vi, or its stand-ins fra-eng and multi30k-en-de.
        data_dir: folder that holds the files, or holds them in ``iwslt15-en-vi/``, ``fra-eng/`` or ``multi30k/``,
            packed by xz or gzip or not. By default $LEGATO_DATA; else those of en-vi (31 MB) and
            of multi30k-en-de (2 MB) are downloaded into the user's cache; those of fra-eng are not published any more.
        train: False leaves the training part of en-vi empty and needs no file of it: enough to score translations.

    Raises:
        ExperimentError: a file is missing, damaged, or has another content; or there is no such pair.

    Source: Luong & Manning 2015 (en-vi), Elliott et al. 2016 (multi30k), tatoeba.org by manythings.org (fra-eng).
    """
    if pair == "en-vi":
        dev, test = (_parallel(IWSLT15, part, "vi", IWSLT15_FOLDER, data_dir) for part in ("tst2012", "tst2013"))
        learnt = _parallel(IWSLT15, "train", "vi", IWSLT15_FOLDER, data_dir) if train else Parallel([], [])
        return Translation(learnt, dev, test, pair)
    if pair == "multi30k-en-de":
        names = ("train", "val", "test_2016_flickr")
        learnt, dev, test = (_parallel(MULTI30K, part, "de", MULTI30K_FOLDER, data_dir) for part in names)
        return Translation(learnt, dev, test, pair)
    if pair == "fra-eng":
        return _fra_eng(data_dir)
    raise ExperimentError(f"there is no pair {pair}: expected one of {', '.join(get_args(Pair))}")


def vocabulary(language: Literal["en", "vi"], data_dir: Path | None = None) -> list[str]:
    """The words of Stanford's IWSLT'15 vocabulary, 17,191 English or 7,709 Vietnamese; first <unk>, <s> and </s>."""
    return _lines(IWSLT15[f"vocab.{language}"], IWSLT15_FOLDER, data_dir)


def _parallel(files: dict[str, File], part: str, target: str, folder: str, data_dir: Path | None) -> Parallel:
    """English and another language, from ``PART.en`` and its like."""
    both = Parallel(*(_lines(files[f"{part}.{language}"], folder, data_dir) for language in ("en", target)))
    if len(both.source) != len(both.target):
        raise ExperimentError(
            f"{part}.en and {part}.{target} in {folder} do not fit together: expected as many lines in both, "
            f"got {len(both.source):,} and {len(both.target):,}"
        )
    return both


def _lines(file: File, folder: str, data_dir: Path | None) -> list[str]:
    return read_text(need(file, folder, data_dir), file)


def _fra_eng(data_dir: Path | None) -> Translation:
    path = find(FRA_ENG, FRA_ENG_FOLDER, data_dir)
    if path is not None:
        rows = read_text(path, FRA_ENG)
    else:
        path = need(FRA_ENG_ARCHIVE, FRA_ENG_FOLDER, data_dir, otherwise="fra.txt")
        content = zip_member(path, FRA_ENG.name)
        compare_content(content, FRA_ENG, path / FRA_ENG.name)
        rows = lines(content, path / FRA_ENG.name)
    parts = Parallel([], []), Parallel([], []), Parallel([], [])
    seen: set[str] = set()
    for english, french in columns(rows, 2, path):
        part = {0: 1, 1: 2}.get(_share(english), 0)
        if part == 0 or english not in seen:
            parts[part].source.append(english)
            parts[part].target.append(french)
        seen.add(english)
    return Translation(parts[0], parts[1], parts[2], "fra-eng")


def _share(sentence: str) -> int:
    words = " ".join(re.findall(r"\w+", sentence.lower()))
    return hashlib.sha256(words.encode()).digest()[-1] % _SHARES
