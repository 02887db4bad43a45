import hashlib
import io
import tarfile

import pytest

import real_data
from legato_papers.data import imdb as module
from legato_papers.data.convert import convert
from legato_papers.data.files import File, as_lines
from legato_papers.data.imdb import imdb, imdb_files
from legato_papers.task import ExperimentError

OFFICIAL = {
    "train/neg/0_3": "Dull.<br />So dull.",
    "train/neg/10_1": "The sea was\x85 wet.\n",
    "train/neg/2_2": "Twice the same.",
    "train/neg/3_2": "Twice the same.",
    "train/pos/0_9": "A café, a “story”.",
    "train/pos/1_10": "I laughed\ttwice.",
    "train/unsup/0_0": "Neither here nor there.",
    "train/unsup/11_0": "Müsli.",
    "test/neg/0_4": "",
    "test/pos/0_8": "Fine.\n\nReally.",
}
ROWS = {
    "train": [
        {"id": "neg/0_3", "label": 0, "text": "Dull.<br />So dull."},
        {"id": "neg/2_2", "label": 0, "text": "Twice the same."},
        {"id": "neg/3_2", "label": 0, "text": "Twice the same."},
        {"id": "neg/10_1", "label": 0, "text": "The sea was\x85 wet.\n"},
        {"id": "pos/0_9", "label": 1, "text": "A café, a “story”."},
        {"id": "pos/1_10", "label": 1, "text": "I laughed\ttwice."},
    ],
    "test": [{"id": "neg/0_4", "label": 0, "text": ""}, {"id": "pos/0_8", "label": 1, "text": "Fine.\n\nReally."}],
    "unsup": [{"id": "unsup/0", "text": "Neither here nor there."}, {"id": "unsup/11", "text": "Müsli."}],
}


def archive(path, texts):
    with tarfile.open(path, "w:gz") as tar:
        for name, text in {**texts, "README": "Read me.", "train/labeledBow": "0:1"}.items():
            content = text if isinstance(text, bytes) else text.encode()
            member = tarfile.TarInfo(f"aclImdb/{name}.txt")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder with an archive in the official format, of ten reviews."""
    for part, rows in ROWS.items():
        content = as_lines(rows)
        file = File(f"{part}.jsonl", len(content), f"sha256:{hashlib.sha256(content).hexdigest()}")
        monkeypatch.setitem(module.PARTS, part, file)
    monkeypatch.setattr(module, "_VALIDATION_PER_CLASS", 1)
    archive(tmp_path / "aclImdb_v1.tar.gz", OFFICIAL)
    return tmp_path


def test_the_archive_is_read_in_the_order_of_class_and_number(small):
    assert module.reviews(small, unlabelled=True) == ROWS
    data = imdb(small, unlabelled=True)
    assert data.test == ([row["text"] for row in ROWS["test"]], [0, 1])
    assert data.unlabelled == ["Neither here nor there.", "Müsli."]
    assert data.source == "IMDB"
    assert imdb_files(small) == [small / "aclImdb_v1.tar.gz"]


def test_reviews_without_label_come_only_when_asked_for(small):
    assert imdb(small).unlabelled == []


def test_validation_is_balanced_and_disjoint_from_training(small):
    data = imdb(small)
    assert data.validation.labels == [0, 1]
    assert sorted(data.train.texts + data.validation.texts) == sorted(row["text"] for row in ROWS["train"])
    assert not set(data.train.texts) & set(data.validation.texts)


def test_the_unpacked_folder_is_the_same_data(small):
    with tarfile.open(small / "aclImdb_v1.tar.gz") as tar:
        # Python 3.11.0 to 3.11.3, still the newest of some systems, have no filter argument.
        tar.extraction_filter = getattr(tarfile, "data_filter", lambda member, path: member)
        tar.extractall(small / "imdb")
    expected = imdb(small, unlabelled=True)
    (small / "aclImdb_v1.tar.gz").unlink()
    assert imdb(small, unlabelled=True) == expected
    assert imdb_files(small) == [small / "imdb/aclImdb/train/pos/0_9.txt"]
    convert("imdb", small / "imdb" / "aclImdb", small / "compact")
    assert imdb(small / "compact", unlabelled=True) == expected


def test_the_compact_format_has_equal_data_and_equal_bytes(small, tmp_path_factory):
    targets = [tmp_path_factory.mktemp("compact") for _ in range(2)]
    written = [convert("imdb", small / "aclImdb_v1.tar.gz", target) for target in targets]
    assert [path.relative_to(targets[0]).as_posix() for path in written[0]] == [
        f"imdb/{part}.jsonl.xz" for part in ("train", "test", "unsup")
    ]
    assert [path.read_bytes() for path in written[0]] == [path.read_bytes() for path in written[1]]
    assert imdb(targets[0], unlabelled=True) == imdb(small, unlabelled=True)
    assert imdb_files(targets[0] / "imdb") == written[0][:2]


def test_another_review_is_noticed_in_every_form(small, tmp_path_factory):
    archive(small / "aclImdb_v1.tar.gz", OFFICIAL | {"train/pos/0_9": "A café, no story."})
    with pytest.raises(ExperimentError, match=r"aclImdb_v1\.tar\.gz is .*another file: expected .* got"):
        imdb(small)
    folder = tmp_path_factory.mktemp("folder")
    for part, rows in ROWS.items():
        content = as_lines(rows).replace(b"laughed", b"giggled")
        (folder / f"{part}.jsonl").write_bytes(content)
    with pytest.raises(ExperimentError, match=r"train\.jsonl is corrupt.*expected content with SHA-256 \w+, got \w+"):
        imdb(folder)


def test_a_missing_review_or_part_is_noticed(small, tmp_path_factory):
    archive(small / "aclImdb_v1.tar.gz", {name: text for name, text in OFFICIAL.items() if name != "test/pos/0_8"})
    with pytest.raises(ExperimentError, match="is cut short"):
        imdb(small)
    folder = tmp_path_factory.mktemp("folder")
    (folder / "train.jsonl").write_bytes(as_lines(ROWS["train"]))
    with pytest.raises(ExperimentError, match=r"there is no test\.jsonl"):
        imdb(folder)


def test_a_broken_character_is_found_in_its_review(small):
    archive(small / "aclImdb_v1.tar.gz", OFFICIAL | {"train/pos/0_9": b"One.\nA caf\xe9."})
    with pytest.raises(ExperimentError, match=r"train/pos/0_9\.txt, line 2: expected UTF-8"):
        imdb(small)


def test_a_damaged_archive_and_an_empty_folder_are_named(small, tmp_path_factory):
    path = small / "aclImdb_v1.tar.gz"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ExperimentError, match=r"aclImdb_v1\.tar\.gz cannot be read or unpacked"):
        imdb(small)
    with pytest.raises(ExperimentError, match=r"there is no aclImdb_v1\.tar\.gz there, nor .*put https://ai\.stanford"):
        imdb(tmp_path_factory.mktemp("empty"))


@pytest.fixture(scope="module")
def real():
    """The rows of the real reviews, read once, and what is made of them."""
    if not real_data.there("imdb"):
        pytest.skip("needs imdb in the folder of LEGATO_DATA")
    rows = module.reviews(real_data.DATA)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "reviews", lambda *_, **__: rows)
        return rows, imdb(real_data.DATA)


def test_the_real_reviews_are_split_as_in_the_paper(real):
    _, data = real
    assert [len(part.texts) for part in data[:3]] == [22_500, 2_500, 25_000]
    assert [sum(part.labels) for part in data[:3]] == [11_250, 1_250, 12_500]
    train, validation, test = (set(part.texts) for part in data[:3])
    assert not train & validation
    assert len((train | validation) & test) == 123


def test_the_real_reviews_have_the_known_number_of_bytes(real):
    rows, _ = real
    assert {part: sum(len(row["text"].encode()) for row in rows[part]) for part in rows} == {
        "train": 33_132_823,
        "test": 32_350_685,
    }


def test_official_reviews_match_the_checksums(real):
    rows, _ = real
    for part in rows:
        assert module.PARTS[part].checksum == f"sha256:{hashlib.sha256(as_lines(rows[part])).hexdigest()}"
