"""Quora's question pairs: whether two questions ask the same. ``recipes/qqp.py`` classifies them."""

import csv
import io
import re
from pathlib import Path
from typing import Any, NamedTuple

from ..task import ExperimentError
from .files import File, columns, find, line_error, need, read, read_text, records, text
from .texts import Pairs, chosen

FOLDER = "qqp"
OFFICIAL = File(
    "quora_duplicate_questions.tsv",
    58_176_133,
    "md5:b6d5672bd9dc1e66ab2bb020ebeafb8d",
    "http://qim.fs.quoracdn.net/quora_duplicate_questions.tsv",
)
PAIRS = File("pairs.jsonl")  # our own form
COUNT = 404_290
_PER_CLASS = 5000  # pairs of each class in validation, and as many in the test

SMALL_FOLDER = "qqp-20k"
SMALL = {
    "dev": File("dev.tsv", 1_274_661, "sha256:15d5cc56443eb50fa0e05d60a8a41880dcd12932931349e18f234e1f449771f0"),
    "test": File("test.tsv", 1_273_093, "sha256:8c2a8f7904146eefa4b2c16379add2f370950c458d33e949e87a228ba97fa920"),
}
_SMALL_VALIDATION_PER_CLASS = 500
_HEAD = ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"]
Row = dict[str, Any]


class QQP(NamedTuple):
    """Pairs of questions; label 1 is a duplicate. ``source`` says of which data."""

    train: Pairs
    validation: Pairs
    test: Pairs
    source: str


def qqp(data_dir: Path | None = None) -> QQP:
    """Quora's pairs of questions, as they were asked; some questions are empty.

    ``qqp``, 384,290 / 10,000 / 10,000: the complete data. As in Wang et al. 2017, validation and test are 5,000 pairs
    of each class. Their list of pairs was not found and counts 58 more, so ours is another draw: of each class the
    5,000 pairs whose row ids have the smallest SHA-256 are the test, the next 5,000 validation.

    ``qqp-20k``, 9,000 / 1,000 / 10,000, a stand-in: 20,000 of these pairs, half of them duplicates. ``dev.tsv`` trains,
    less the 500 of each class whose row ids have the smallest SHA-256, which validate; ``test.tsv`` tests.

    Forms of the complete data: ``quora_duplicate_questions.tsv`` (a header, quoted as CSV), checked by its size and
    the MD5 that two public libraries give for it; our ``pairs.jsonl``, checked by its ids 0 to 404,289, a UTF-8 line
    ``{"id": 0, "label": 0, "first": "...", "second": "..."}`` a pair. Of the stand-in: label, two questions and
    row id with tabs between them, no header, no quotes. Any may be packed by xz or gzip.

    Args:
        data_dir: folder that holds a form, or holds it in ``qqp/`` or ``qqp-20k/``; the complete data win. By default
            $LEGATO_DATA; else the official file is downloaded into the user's cache.

    Raises:
        ExperimentError: a file is missing, damaged, or has another content; with the line, where it is one line.

    Source: Iyer, Dandekar & Csernai 2017, First Quora Dataset Release: Question Pairs; Wang, Hamza & Florian 2017.
    """
    paths = qqp_files(data_dir)
    if len(paths) == 1:
        rows = questions(paths[0])
        test = _balanced(rows, _PER_CLASS)
        rest = [row for i, row in enumerate(rows) if i not in test]
        return QQP(*_parted(rest, _balanced(rest, _PER_CLASS)), _pairs([rows[i] for i in sorted(test)]), FOLDER)
    dev, test = (_small(path, SMALL[part]) for path, part in zip(paths, ("dev", "test"), strict=True))
    return QQP(*_parted(dev, _balanced(dev, _SMALL_VALIDATION_PER_CLASS)), _pairs(test), SMALL_FOLDER)


def qqp_files(data_dir: Path | None = None) -> list[Path]:
    """The file, or the two of the stand-in, that ``qqp`` reads."""
    whole = find(OFFICIAL, FOLDER, data_dir) or find(PAIRS, FOLDER, data_dir)
    small = [find(file, SMALL_FOLDER, data_dir) for file in SMALL.values()]
    if whole is None and None not in small:
        return [path for path in small if path is not None]
    return [whole or need(OFFICIAL, FOLDER, data_dir, otherwise="pairs.jsonl, nor dev.tsv and test.tsv of qqp-20k")]


def questions(path: Path) -> list[Row]:
    """The rows of the complete data in order: ``id``, ``label``, ``first`` and ``second``."""
    if path.name.startswith(PAIRS.name):
        rows = list(records(read_text(path, PAIRS), ("first", "second"), 2, path))
    else:
        rows = _official(read(path, OFFICIAL), path)
    for number, row in enumerate(rows):
        if row.get("id") != number:
            raise ExperimentError(
                f"{path}, pair {number}: expected it to have that id, got {row.get('id')!r}: put an intact copy there"
            )
    if len(rows) != COUNT:
        raise ExperimentError(
            f"{path} is not whole: expected {COUNT:,} pairs, got {len(rows):,}: put an intact copy there"
        )
    return rows


def _official(content: bytes, path: Path) -> list[Row]:
    table = csv.reader(io.StringIO(text(content, path), newline=""), delimiter="\t")
    rows: list[Row] = []
    try:
        head = next(table, [])
        if head != _HEAD:
            raise line_error(path, 1, f"the columns {', '.join(_HEAD)}", ", ".join(head)[:60])
        rows.extend(_row(row, table.line_num, path) for row in table)
    except csv.Error as error:
        raise line_error(path, table.line_num, "quoted columns with tabs between them", str(error)) from error
    return rows


def _row(row: list[str], line: int, path: Path) -> Row:
    if len(row) != len(_HEAD):
        raise line_error(path, line, f"{len(_HEAD)} columns", str(len(row)))
    if not re.fullmatch("[0-9]{1,9}", row[0]) or row[5] not in ("0", "1"):
        raise line_error(path, line, "an id and is_duplicate 0 or 1", f"{row[0]!r} and {row[5]!r}")
    return {"id": int(row[0]), "label": int(row[5]), "first": row[3], "second": row[4]}


def _small(path: Path, file: File) -> list[Row]:
    rows = []
    for number, (label, first, second, name) in enumerate(columns(read_text(path, file), 4, path), 1):
        if label not in ("0", "1"):
            raise line_error(path, number, "the label 0 or 1", repr(label))
        rows.append({"id": name, "label": int(label), "first": first, "second": second})
    return rows


def _balanced(rows: list[Row], per_class: int) -> set[int]:
    """The indices of as many pairs of each class."""
    drawn: set[int] = set()
    for label in (0, 1):
        of_class = [i for i, row in enumerate(rows) if row["label"] == label]
        drawn |= {of_class[i] for i in chosen([str(rows[i]["id"]) for i in of_class], per_class)}
    return drawn


def _parted(rows: list[Row], held_out: set[int]) -> tuple[Pairs, Pairs]:
    kept = [row for i, row in enumerate(rows) if i not in held_out]
    return _pairs(kept), _pairs([rows[i] for i in sorted(held_out)])


def _pairs(rows: list[Row]) -> Pairs:
    return Pairs([row["first"] for row in rows], [row["second"] for row in rows], [row["label"] for row in rows])
