import json
import zipfile
from collections import Counter
from dataclasses import replace
from hashlib import sha256

import pytest

import real_data
from legato_papers.data import snli as module
from legato_papers.data.convert import convert
from legato_papers.data.files import File
from legato_papers.data.snli import snli, snli_files
from legato_papers.task import ExperimentError

ROWS = {
    "train": [
        ("neutral", "A boat is near the pier.", "The boat is late."),
        ("-", "A gull sleeps.", "A gull dreams."),
        ("entailment", "Two dogs swim.", "Dogs swim."),
        ("contradiction", "Nobody's here.", "Somebody's here."),
    ],
    "dev": [("entailment", "The café is open.", "It is open.")],
    "test": [("-", "Rain.", "Sun."), ("contradiction", "Rain.", "No rain.")],
}
COUNTS = {"train": 3, "dev": 1, "test": 1}


def official(part):
    rows = [
        {"annotator_labels": [label], "gold_label": label, "sentence1": first, "sentence2": second, "pairID": "1"}
        for label, first, second in ROWS[part]
    ]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder with an archive in the official format, of seven pairs."""
    path = tmp_path / "snli_1.0.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for part in ROWS:
            archive.writestr(f"snli_1.0/snli_1.0_{part}.jsonl", official(part))
    known = f"sha256:{sha256(path.read_bytes()).hexdigest()}"
    monkeypatch.setattr(module, "ARCHIVE", replace(module.ARCHIVE, checksum=known))
    monkeypatch.setattr(module, "COUNTS", COUNTS)
    return tmp_path


def test_the_archive_is_read_without_unlabelled_pairs(small):
    data = snli(small)
    assert data.train == (
        ["A boat is near the pier.", "Two dogs swim.", "Nobody's here."],
        ["The boat is late.", "Dogs swim.", "Somebody's here."],
        [1, 0, 2],
    )
    assert data.validation == (["The café is open."], ["It is open."], [0])
    assert data.test == (["Rain."], ["No rain."], [2])
    assert data.source == "snli"
    assert snli_files(small) == [small / "snli_1.0.zip"]


def test_unpacked_files_and_the_compact_format_agree(small, tmp_path_factory):
    unpacked, compact = (tmp_path_factory.mktemp("data") for _ in range(2))
    for part in ROWS:
        (unpacked / f"snli_1.0_{part}.jsonl").write_bytes(official(part))
    written = convert("snli", small, compact)
    assert snli(unpacked) == snli(compact) == snli(small)
    assert snli_files(compact) == written == [compact / f"snli/{part}.jsonl.xz" for part in ROWS]


def test_another_archive_is_refused_with_both_checksums(small):
    path = small / "snli_1.0.zip"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ExperimentError, match=r"snli_1\.0\.zip is corrupt.*expected content with SHA-256 \w+, got \w+"):
        snli(small)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"neutral", "sentence1"', '"unsure", "sentence1"', "line 1: expected a label entailment, .* got 'unsure'"),
        ('"sentence2": "Dogs', '"other": "Dogs', "line 3: expected a JSON object with the texts gold_label, sentence1"),
        ('"gold_label": "neutral"', '"gold_label": "-"', "is not whole: expected 3 pairs with a label, got 2"),
        ("Two dogs", "\xff", "line 3: expected UTF-8"),
    ],
)
def test_a_line_that_cannot_be_is_named(small, old, new, message):
    (small / "snli_1.0.zip").unlink()
    for part in ROWS:
        (small / f"snli_1.0_{part}.jsonl").write_bytes(official(part))
    path = small / "snli_1.0_train.jsonl"
    path.write_bytes(path.read_bytes().replace(old.encode(), new.encode("latin-1")))
    with pytest.raises(ExperimentError, match=rf"snli_1\.0_train\.jsonl.*{message}"):
        snli(small)


STAND_IN = {
    "CAD": ("cad_train.tsv", "neutral\tA cat sits.\tA cat waits.\n"),
    "SICK": ("SICK_train.txt", "pair_ID\tA\tB\tscore\tlabel\n1\tA man runs\tA man moves\t4.5\tENTAILMENT\n"),
    "DEV": ("dev_raw.tsv", "contradiction\tIt doesn't rain.\tIt rains.\n"),
    "TEST": ("test.tsv", "entailment\tThe man 's dog does n't bark `` much '' .\tHe 'll sit -LRB- here -RRB- .\n"),
}


@pytest.fixture
def stand_in(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("stand_in")
    files = {name: File(file) for name, (file, _) in STAND_IN.items()}
    for name, file in files.items():
        monkeypatch.setattr(module, name, file)
        (folder / file.name).write_text(STAND_IN[name][1])
    places = {file: module.SICK_FOLDER if name == "SICK" else module.FOLDER for name, file in files.items()}
    monkeypatch.setattr(module, "STAND_IN", places)
    return folder


def test_stand_in_data_trains_on_both_sets_with_joined_words(stand_in):
    data = snli(stand_in)
    assert data.source == "cad+sick"
    assert data.train == (["A cat sits.", "A man runs"], ["A cat waits.", "A man moves"], [1, 0])
    assert data.validation == (["It doesn't rain."], ["It rains."], [2])
    assert data.test == (["The man's dog doesn't bark \" much \" ."], ["He'll sit ( here ) ."], [0])


def test_the_official_files_win_over_the_stand_in(stand_in, small):
    (stand_in / "snli_1.0.zip").write_bytes((small / "snli_1.0.zip").read_bytes())
    assert snli(stand_in).source == "snli"


def test_a_wrong_line_of_the_stand_in_is_named(stand_in):
    with open(stand_in / "SICK_train.txt", "a") as stream:
        stream.write("2\tA\tB\t1.0\tMAYBE\n")
    with pytest.raises(ExperimentError, match=r"SICK_train\.txt, line 3: expected a label .* got 'maybe'"):
        snli(stand_in)
    (stand_in / "SICK_train.txt").write_text("head\n1\tA\tB\n")
    with pytest.raises(ExperimentError, match=r"SICK_train\.txt, line 2: expected 5 columns .* got 3"):
        snli(stand_in)
    with pytest.raises(ExperimentError, match="is a stand-in"):
        convert("snli", stand_in, stand_in / "out")


def test_an_empty_folder_is_told_what_to_get(tmp_path):
    with pytest.raises(ExperimentError, match=r"there is no snli_1\.0\.zip there, nor .*put https://nlp\.stanford"):
        snli(tmp_path)


@real_data.needs("snli")
def test_the_real_files_have_the_known_numbers_of_labels():
    data = snli(real_data.DATA)
    assert len(data.train.labels) == (549_367 if data.source == "snli" else 12_830)
    assert Counter(data.validation.labels) == {0: 3_329, 1: 3_235, 2: 3_278}
    assert Counter(data.test.labels) == {0: 3_368, 1: 3_219, 2: 3_237}
