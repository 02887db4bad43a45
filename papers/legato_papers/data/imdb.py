"""The Large Movie Review Dataset: reviews of films, positive or negative. ``recipes/imdb.py`` classifies them."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from .files import File, as_lines, compare, find, need, read_text, records, tar_members, text
from .texts import Labelled, chosen

FOLDER = "imdb"
ARCHIVE = File(
    "aclImdb_v1.tar.gz",
    84_125_825,
    "sha256:c40f74a18d3b61f90feba1e17730e0d38e8b97c05fe7008942e91923d1658fe",
    "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz",
)
#: Our own form of the three parts; the official ones are held to the same checksums, once they are in it.
PARTS = {
    "train": File("train.jsonl", 34_331_238, "sha256:3f0ba5a294edcd6a756a9e5f06661e53b57f56f810ab654459645b3a7613c8be"),
    "test": File("test.jsonl", 33_549_569, "sha256:52c63e509e62b822a4417871153914b67923d4338dc12b00c317225c93775216"),
    "unsup": File("unsup.jsonl", 68_331_050, "sha256:f710b634eb418095b95fd9524c9431515843eaf4d86f5f1a92f02605daf2f314"),
}
REVIEW = File("aclImdb/train/pos/0_9.txt")
_VALIDATION_PER_CLASS = 1250
_LABELS = {"neg": 0, "pos": 1}
Row = dict[str, Any]


class IMDB(NamedTuple):
    """22,500, 2,500 and 25,000 reviews with label 1 for positive, half of each part; 50,000 without, if asked for."""

    train: Labelled
    validation: Labelled
    test: Labelled
    unlabelled: list[str]
    source: str = "IMDB"


def imdb(data_dir: Path | None = None, *, unlabelled: bool = False) -> IMDB:
    """The reviews as they were written, ``<br />`` and all: first all negative ones of a part, then the positive.

    Validation is drawn from the 25,000 reviews for training: of each class the 1,250 whose names, such as ``pos/0_9``,
    have the smallest SHA-256, among those whose text is there once. So it shares no text with training.

    The data set has some texts twice, and they stay: 123 texts of the test are among the 25,000 for training too, and
    266 of the test and 39 of validation among those without label.

    Forms: ``aclImdb_v1.tar.gz``; the folder ``aclImdb`` unpacked from it; ``train.jsonl``, ``test.jsonl`` and
    ``unsup.jsonl``, packed by xz or gzip or not, a line ``{"id": "neg/0_3", "label": 0, "text": "..."}`` a review in
    the order of class and number, UTF-8; ``unsup`` has no labels. All three are held to the same checksums.

    Args:
        data_dir: folder that holds one of the forms, or holds it in ``imdb/``. By default $LEGATO_DATA;
            else the archive is downloaded into the user's cache (84 MB).
        unlabelled: read the 50,000 reviews without label too.

    Raises:
        ExperimentError: a file is missing, damaged, or has another content.

    Source: Maas et al. 2011, Learning Word Vectors for Sentiment Analysis.
    """
    rows = reviews(data_dir, unlabelled=unlabelled)
    train, test = rows["train"], rows["test"]
    held_out = _validation(train)
    return IMDB(
        _labelled([row for i, row in enumerate(train) if i not in held_out]),
        _labelled([train[i] for i in sorted(held_out)]),
        _labelled(test),
        [row["text"] for row in rows.get("unsup", [])],
    )


def imdb_files(data_dir: Path | None = None, *, unlabelled: bool = False) -> list[Path]:
    """The files that ``imdb`` reads. One review stands for the folder ``aclImdb``: what is read there is checked."""
    whole = find(ARCHIVE, FOLDER, data_dir) or find(REVIEW, FOLDER, data_dir)
    if whole is None and find(PARTS["train"], FOLDER, data_dir) is not None:
        return [need(PARTS[part], FOLDER, data_dir) for part in _parts(unlabelled)]
    return [whole or need(ARCHIVE, FOLDER, data_dir, otherwise="a folder aclImdb, nor train.jsonl and test.jsonl")]


def reviews(data_dir: Path | None = None, *, unlabelled: bool = False) -> dict[str, list[Row]]:
    """The rows of ``train``, ``test`` and, if asked, ``unsup``: ``id``, ``label`` (not of the last) and ``text``."""
    paths, parts = imdb_files(data_dir, unlabelled=unlabelled), _parts(unlabelled)
    if len(paths) > 1:
        return {part: _compact(path, part) for path, part in zip(paths, parts, strict=True)}
    if paths[0].name == ARCHIVE.name:
        return _official(paths[0], tar_members(paths[0]), parts)
    return _unpacked(paths[0].parents[2], parts)


def _validation(train: list[Row]) -> set[int]:
    """Which reviews for training are held out."""
    times: dict[str, int] = {}
    for row in train:
        times[row["text"]] = times.get(row["text"], 0) + 1
    held_out: set[int] = set()
    for label in _LABELS.values():
        once = [i for i, row in enumerate(train) if row["label"] == label and times[row["text"]] == 1]
        held_out |= {once[i] for i in chosen([train[i]["id"] for i in once], _VALIDATION_PER_CLASS)}
    return held_out


def _labelled(rows: list[Row]) -> Labelled:
    return Labelled([row["text"] for row in rows], [row["label"] for row in rows])


def _parts(unlabelled: bool) -> tuple[str, ...]:
    return ("train", "test", "unsup") if unlabelled else ("train", "test")


def _compact(path: Path, part: str) -> list[Row]:
    classes = 0 if part == "unsup" else len(_LABELS)
    return list(records(read_text(path, PARTS[part]), ("id", "text"), classes, path))


def _unpacked(folder: Path, parts: tuple[str, ...]) -> dict[str, list[Row]]:
    def members() -> Iterable[tuple[str, bytes]]:
        for part in parts:
            for path in sorted(folder.glob("train/unsup/*.txt" if part == "unsup" else f"{part}/[np]*/*.txt")):
                yield path.relative_to(folder).as_posix(), path.read_bytes()

    return _official(folder, members(), parts)


def _official(path: Path, members: Iterable[tuple[str, bytes]], parts: tuple[str, ...]) -> dict[str, list[Row]]:
    """The rows, from the files ``train/pos/0_9.txt`` and their like."""
    found: dict[str, list[Row]] = {part: [] for part in parts}
    for name, content in members:
        match = re.fullmatch(r"(?:aclImdb/)?(train|test)/(?:(pos|neg)/(\d+_\d+)|unsup/(\d+)(?:_\d+)?)\.txt", name)
        part = match[1] if match and match[2] else "unsup"
        if match is None or part not in found:
            continue
        if part == "unsup":
            row: Row = {"id": f"unsup/{match[4]}"}
        else:
            row = {"id": f"{match[2]}/{match[3]}", "label": _LABELS[match[2]]}
        found[part].append(row | {"text": text(content, path / name)})
    for part, rows in found.items():
        rows.sort(key=lambda row: (row["id"].split("/")[0], int(re.split("[/_]", row["id"])[1])))
        compare(as_lines(rows), PARTS[part], path)
    return found
