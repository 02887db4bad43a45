import csv

import pytest

import real_data
from legato_papers.data import qqp as module
from legato_papers.data.convert import convert
from legato_papers.data.files import File
from legato_papers.data.qqp import qqp, qqp_files
from legato_papers.task import ExperimentError

HEAD = ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"]
ODD = {3: ('Why "so"?', "Why\tso?"), 4: ("Is this\ntwo lines?", ""), 5: ("Où?", "“Where�?")}
COUNT = 30


def question(number):
    return ODD.get(number, (f"How far is harbour {number}?", f"What is the way to harbour {number}?"))


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder with 30 pairs in the official format, every third a duplicate."""
    rows = [[n, 2 * n, 2 * n + 1, *question(n), int(n % 3 == 0)] for n in range(COUNT)]
    write(tmp_path / "quora_duplicate_questions.tsv", [HEAD, *rows])
    monkeypatch.setattr(module, "OFFICIAL", File("quora_duplicate_questions.tsv", url="http://127.0.0.1:9/q"))
    monkeypatch.setattr(module, "COUNT", COUNT)
    monkeypatch.setattr(module, "_PER_CLASS", 3)
    return tmp_path


def write(path, rows):
    with open(path, "w", encoding="utf-8", newline="") as stream:
        csv.writer(stream, delimiter="\t", lineterminator="\n").writerows(rows)


def pairs(part):
    return list(zip(*part, strict=True))


def test_the_official_file_has_balanced_disjoint_splits(small):
    data = qqp(small)
    assert data.source == "qqp"
    assert [len(part.labels) for part in data[:3]] == [18, 6, 6]
    assert [sum(part.labels) for part in data[:3]] == [4, 3, 3]
    expected = sorted((*question(n), int(n % 3 == 0)) for n in range(COUNT))
    assert sorted(pairs(data.train) + pairs(data.validation) + pairs(data.test)) == expected


def test_the_compact_form_is_the_same_data(small, tmp_path_factory):
    target = tmp_path_factory.mktemp("compact")
    assert convert("qqp", small, target) == [target / "qqp/pairs.jsonl.xz"]
    assert qqp(target) == qqp(small)
    assert qqp_files(target) == [target / "qqp/pairs.jsonl.xz"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([30, 1, 2, "a", "b", 2], r"line 33: expected an id and is_duplicate 0 or 1, got '30' and '2'"),
        ([30, 1, 2, "a", 0], r"line 33: expected 6 columns, got 5"),
        ([31, 1, 2, "a", "b", 0], r"pair 30: expected it to have that id, got 31"),
        ([30, 1, 2, "a", "b", 0], r"is not whole: expected 30 pairs, got 31"),
    ],
)
def test_a_line_that_cannot_be_is_named(small, row, message):
    path = small / "quora_duplicate_questions.tsv"
    with open(path, "a", encoding="utf-8", newline="") as stream:
        csv.writer(stream, delimiter="\t", lineterminator="\n").writerow(row)
    with pytest.raises(ExperimentError, match=rf"quora_duplicate_questions\.tsv.*{message}"):
        qqp(small)


def test_a_missing_header_or_broken_characters_raise(small):
    path = small / "quora_duplicate_questions.tsv"
    content = path.read_bytes()
    path.write_bytes(content.partition(b"\n")[2])
    with pytest.raises(ExperimentError, match="line 1: expected the columns id, qid1"):
        qqp(small)
    path.write_bytes(content.replace(b"harbour 0", b"harbour \xff", 1))
    with pytest.raises(ExperimentError, match="line 2: expected UTF-8"):
        qqp(small)
    path.write_bytes(content.replace(b"harbour 0", b"h" * 200_000, 1))
    with pytest.raises(ExperimentError, match=r"line 2: expected quoted columns .* got field larger"):
        qqp(small)


@pytest.mark.parametrize("id", ["", '"id": 1, '])
def test_a_pair_of_the_compact_form_without_its_id_is_refused(small, id):
    (small / "quora_duplicate_questions.tsv").unlink()
    (small / "pairs.jsonl").write_text(f'{{{id}"label": 0, "first": "Where?", "second": "When?"}}\n')
    with pytest.raises(ExperimentError, match=r"pairs\.jsonl, pair 0: expected it to have that id, got (None|1): put"):
        qqp(small)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    for part in ("dev", "test"):
        rows = [f"{n % 2}\tIs {part} {n}?\tWhat is {n}?\t{n}\n" for n in range(20)]
        (tmp_path / f"{part}.tsv").write_text("".join(rows))
        monkeypatch.setitem(module.SMALL, part, File(f"{part}.tsv"))
    monkeypatch.setattr(module, "_SMALL_VALIDATION_PER_CLASS", 2)
    return tmp_path


def test_stand_in_data_is_named_and_the_official_file_wins(stand_in, small):
    official = qqp(small)
    assert official.source == "qqp"
    (small / "quora_duplicate_questions.tsv").unlink()
    data = qqp(stand_in)
    assert data.source == "qqp-20k"
    assert [len(part.labels) for part in data[:3]] == [16, 4, 20]
    assert [sum(part.labels) for part in data[:3]] == [8, 2, 10]
    assert qqp_files(stand_in) == [stand_in / "dev.tsv", stand_in / "test.tsv"]
    with pytest.raises(ExperimentError, match=r"expected quora_duplicate_questions\.tsv in .* is a stand-in"):
        convert("qqp", stand_in, stand_in / "out")


def test_a_wrong_label_of_the_stand_in_is_found_in_its_line(stand_in):
    path = stand_in / "test.tsv"
    path.write_text(path.read_text().replace("1\tIs test 3", "yes\tIs test 3"))
    with pytest.raises(ExperimentError, match=r"test\.tsv, line 4: expected the label 0 or 1, got 'yes'"):
        qqp(stand_in)


def test_an_empty_folder_is_told_what_to_get(tmp_path):
    with pytest.raises(ExperimentError, match=r"there is no quora_duplicate_questions\.tsv .*put http://qim"):
        qqp(tmp_path)


@real_data.needs("qqp-20k")
def test_the_real_stand_in_is_balanced():
    data = qqp(real_data.DATA)
    if data.source == "qqp-20k":
        assert [len(part.labels) for part in data[:3]] == [9_000, 1_000, 10_000]
        assert [sum(part.labels) for part in data[:3]] == [4_500, 500, 5_000]
    else:
        assert [len(part.labels) for part in data[:3]] == [384_290, 10_000, 10_000]
