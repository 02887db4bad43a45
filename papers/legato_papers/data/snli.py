"""Stanford Natural Language Inference: does a sentence follow from another. ``recipes/snli.py`` classifies them."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ..task import ExperimentError
from .files import File, check, columns, find, line_error, need, read_lines, read_text, records, zip_lines
from .texts import Pairs

FOLDER = "snli"
ARCHIVE = File(
    "snli_1.0.zip",
    checksum="sha256:afb3d70a5af5d8de0d9d81e2637e0fb8c22d1235c2749d83125ca43dab0dbd3e",
    url="https://nlp.stanford.edu/projects/snli/snli_1.0.zip",
)
FORMS = ("snli_1.0_{}.jsonl", "{}.jsonl")  # the official parts, and ours
#: Pairs with a label that annotators agreed on.
COUNTS = {"train": 549_367, "dev": 9_842, "test": 9_824}
LABELS = ("entailment", "neutral", "contradiction")

DEV = File("dev_raw.tsv", 1_212_155, "sha256:cfb832bf38047e57fdc19f47ae174c02b0d5cf93311003a7676e693974caa463")
TEST = File("test.tsv", 1_225_578, "sha256:aa567972f989b35d65bf984afa8140aa5d34d99239ba27c4d946de1c5650d94f")
CAD = File("cad_train.tsv", 989_595, "sha256:64e0981e44b689b41dbbb550bedcf335ce64c50e188516f5bf14d43b3d4c3d66")
SICK_FOLDER = "sick"
SICK = File("SICK_train.txt", 506_243, "sha256:266cf8047149bd1d68138dd30439f3122bff30069740ac6705bb6197d9f1b48e")
STAND_IN = {CAD: FOLDER, SICK: SICK_FOLDER, DEV: FOLDER, TEST: FOLDER}
Row = dict[str, Any]


class SNLI(NamedTuple):
    """Premise, hypothesis, and label 0 entailment, 1 neutral, 2 contradiction. ``source`` says of which data."""

    train: Pairs
    validation: Pairs
    test: Pairs
    source: str


def snli(data_dir: Path | None = None) -> SNLI:
    """Pairs of sentences as they were written.

    ``snli``, 549,367 / 9,842 / 9,824: the official split, less the pairs without a label that annotators agreed on.

    ``cad+sick``, 12,830 / 9,842 / 9,824, a stand-in for training: the counterfactually augmented pairs, then those of
    SICK's training part; validation and test are SNLI's own. Its test is there in words as the Penn Treebank splits
    them; what that splits is joined again (do n't, dog 's), and brackets and quotes are put back.

    Forms of SNLI: ``snli_1.0.zip``; the files ``snli_1.0_train.jsonl`` etc. in it; our ``train.jsonl``, ``dev.jsonl``
    and ``test.jsonl``, a line ``{"label": 0, "first": "...", "second": "..."}`` a pair, UTF-8. The archive is checked
    by its SHA-256, the others by the number of pairs. Of the stand-in: label, premise and hypothesis with tabs between
    them, no header; SICK as published. All but the archive may be packed by xz or gzip.

    Args:
        data_dir: folder that holds a form, or holds it in ``snli/`` and ``sick/``; SNLI wins. By default $LEGATO_DATA;
            else the archive is downloaded into the user's cache (95 MB).

    Raises:
        ExperimentError: a file is missing, damaged, or has another content; with the line, where it is one line.

    Source: Bowman et al. 2015; Kaushik, Hovy & Lipton 2020 (augmented); Marelli et al. 2014 (SICK).
    """
    paths = snli_files(data_dir)
    if paths[0].name.startswith(CAD.name):
        cad, sick, dev, tested = paths
        train = _pairs(_tsv(cad, CAD) + _sick(sick))
        return SNLI(train, _pairs(_tsv(dev, DEV)), _pairs([_joined(row) for row in _tsv(tested, TEST)]), "cad+sick")
    train, validation, test = map(_pairs, inferences(paths).values())
    return SNLI(train, validation, test, FOLDER)


def snli_files(data_dir: Path | None = None) -> list[Path]:
    """The archive, or the file of each part, or the four of the stand-in, that ``snli`` reads."""
    archive = find(ARCHIVE, FOLDER, data_dir)
    if archive is None:
        for form in FORMS:
            if find(File(form.format("train")), FOLDER, data_dir) is not None:
                return [need(File(form.format(part)), FOLDER, data_dir) for part in COUNTS]
        stand_in = [find(file, folder, data_dir) for file, folder in STAND_IN.items()]
        if None not in stand_in:
            return [path for path in stand_in if path is not None]
    return [archive or need(ARCHIVE, FOLDER, data_dir, otherwise="snli_1.0_train.jsonl, train.jsonl or cad_train.tsv")]


def inferences(paths: list[Path]) -> dict[str, list[Row]]:
    """The rows of SNLI's ``train``, ``dev`` and ``test``, as ``snli_files`` found them."""
    if paths[0].name == ARCHIVE.name:
        check(paths[0], ARCHIVE)
        paths = paths * len(COUNTS)
    return {part: _rows(path, part) for path, part in zip(paths, COUNTS, strict=True)}


def _rows(path: Path, part: str) -> list[Row]:
    official, ours = (File(form.format(part)) for form in FORMS)
    if path.name == ARCHIVE.name:
        member = f"snli_1.0/{official.name}"
        rows = _official(zip_lines(path, member), path / member)
    elif path.name.startswith(official.name):
        rows = _official(read_lines(path, official), path)
    else:
        rows = list(records(read_lines(path, ours), ("first", "second"), len(LABELS), path))
    if len(rows) != COUNTS[part]:
        raise ExperimentError(
            f"{path} is not whole: expected {COUNTS[part]:,} pairs with a label, got {len(rows):,}: "
            "put an intact copy there"
        )
    return rows


def _official(rows: Iterable[str], path: Path) -> list[Row]:
    found = []
    for number, row in enumerate(records(rows, ("gold_label", "sentence1", "sentence2"), 0, path), 1):
        if row["gold_label"] != "-":
            label = _label(row["gold_label"], number, path)
            found.append({"label": label, "first": row["sentence1"], "second": row["sentence2"]})
    return found


def _tsv(path: Path, file: File) -> list[Row]:
    table = columns(read_text(path, file), 3, path)
    return [
        {"label": _label(label, number, path), "first": first, "second": second}
        for number, (label, first, second) in enumerate(table, 1)
    ]


def _sick(path: Path) -> list[Row]:
    """SICK: a header, then id, two sentences, how related they are from 1 to 5, and the label."""
    table = columns(read_text(path, SICK)[1:], 5, path, first_line=2)
    return [
        {"label": _label(label.lower(), number, path), "first": first, "second": second}
        for number, (_, first, second, _, label) in enumerate(table, 2)
    ]


def _label(name: str, line: int, path: Path) -> int:
    if name not in LABELS:
        raise line_error(path, line, f"a label {', '.join(LABELS)}", repr(name))
    return LABELS.index(name)


def _joined(row: Row) -> Row:
    """The row without the Penn Treebank's marks for splitting words, quotes and brackets."""
    return row | {side: _BRACKETS.sub(_bracket, _SPLIT.sub(r"\1", row[side])) for side in ("first", "second")}


_SPLIT = re.compile(r" (n't|'(?:s|m|d|re|ve|ll))(?= |$)", re.IGNORECASE)
_MARKS = {"-LRB-": "(", "-RRB-": ")", "-LSB-": "[", "-RSB-": "]", "``": '"', "''": '"'}
_BRACKETS = re.compile("|".join(map(re.escape, _MARKS)))


def _bracket(match: re.Match[str]) -> str:
    return _MARKS[match[0]]


def _pairs(rows: list[Row]) -> Pairs:
    return Pairs([row["first"] for row in rows], [row["second"] for row in rows], [row["label"] for row in rows])
