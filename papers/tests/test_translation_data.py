import zipfile
from hashlib import sha1, sha256

import pytest

import real_data
from legato_papers.data import translation as module
from legato_papers.data.convert import convert
from legato_papers.data.files import File
from legato_papers.data.translation import translation, vocabulary
from legato_papers.task import ExperimentError

needs_real = real_data.needs("iwslt15-en-vi", "fra-eng", "multi30k")

EN_VI = {
    "train.en": "The sea is calm .\nA boat , two boats .\n\nIt &apos;s late .\n",
    "train.vi": "Biển lặng .\nMột chiếc thuyền , hai chiếc thuyền .\n\nMuộn rồi .\n",
    "tst2012.en": "Good morning .\n",
    "tst2012.vi": "Chào buổi sáng .\n",
    "tst2013.en": "Thank you .\nGoodbye .\n",
    "tst2013.vi": "Cảm ơn .\nTạm biệt .\n",
    "vocab.en": "<unk>\n<s>\n</s>\nboat\n",
    "vocab.vi": "<unk>\n<s>\n</s>\nthuyền\nbiển\n",
}


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder with the eight files of IWSLT'15, in two or three lines each."""
    for name, text in EN_VI.items():
        content = text.encode()
        git = sha1(b"blob %d\0" % len(content) + content).hexdigest()
        file = File(name, None, f"git:{git}", f"http://127.0.0.1:9/{name}")
        monkeypatch.setitem(module.IWSLT15, name, file)
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_stanfords_files_are_read_line_by_line(small):
    data = translation("en-vi", small)
    assert data.train.source == ["The sea is calm .", "A boat , two boats .", "", "It &apos;s late ."]
    assert data.train.target[1] == "Một chiếc thuyền , hai chiếc thuyền ."
    assert data.validation == (["Good morning ."], ["Chào buổi sáng ."])
    assert data.test == (["Thank you .", "Goodbye ."], ["Cảm ơn .", "Tạm biệt ."])
    assert data.source == "en-vi"
    assert vocabulary("vi", small) == ["<unk>", "<s>", "</s>", "thuyền", "biển"]


def test_the_compact_form_is_the_same_data(small, tmp_path_factory):
    target = tmp_path_factory.mktemp("compact")
    written = convert("iwslt15-en-vi", small, target)
    assert {path.name for path in written} == {f"{name}.xz" for name in EN_VI}
    assert translation("en-vi", target) == translation("en-vi", small)


def test_translations_are_scored_without_training_data(small):
    (small / "train.vi").unlink()
    with pytest.raises(ExperimentError, match=r"there is no train\.vi there: .*put http://127.*train\.vi there"):
        translation("en-vi", small)
    data = translation("en-vi", small, train=False)
    assert data.train == ([], [])
    assert len(data.test.source) == 2


def test_another_file_is_refused_with_both_names_of_git(small):
    (small / "train.vi").write_text("Biển lặng .\n")
    with pytest.raises(ExperimentError, match=r"train\.vi is corrupt.*with git's name \w{40}, got \w{40}"):
        translation("en-vi", small)


def test_files_with_unlike_numbers_of_lines_do_not_fit_together(small, monkeypatch):
    monkeypatch.setitem(module.IWSLT15, "tst2013.vi", File("tst2013.vi"))
    (small / "tst2013.vi").write_text("Cảm ơn .\n")
    with pytest.raises(ExperimentError, match=r"tst2013\.en and tst2013\.vi .*do not fit together: .*got 2 and 1"):
        translation("en-vi", small)


@pytest.mark.bad_input
def test_an_unknown_pair_is_refused(tmp_path):
    with pytest.raises(ExperimentError, match="there is no pair en-xx: expected one of en-vi, fra-eng, multi30k-en-de"):
        translation("en-xx", tmp_path)


def french(tmp_path, monkeypatch, text):
    content = text.encode()
    monkeypatch.setattr(module, "FRA_ENG", File("fra.txt", len(content), f"sha256:{sha256(content).hexdigest()}"))
    with zipfile.ZipFile(tmp_path / "fra-eng.zip", "w") as archive:
        archive.writestr("fra.txt", content)
    return tmp_path


def test_no_english_sentence_is_in_two_splits(tmp_path, monkeypatch):
    lines = [f"Boat {n}{mark}\tBateau {n}{mark} {side}\n" for n in range(300) for mark in ".!" for side in "ab"]
    data = translation("fra-eng", french(tmp_path, monkeypatch, "".join(lines)))
    words = [{sentence[:-1] for sentence in part.source} for part in data[:3]]
    assert not words[0] & words[1]
    assert not words[0] & words[2]
    assert not words[1] & words[2]
    assert set().union(*words) == {f"Boat {n}" for n in range(300)}
    assert len(data.train.source) == 4 * len(words[0])
    for part, sentences in zip(data[1:3], words[1:], strict=True):
        assert len(part.source) == 2 * len(sentences) == len(set(part.source)) > 0
        assert all(french.endswith(" a") for french in part.target)
    assert data.source == "fra-eng"


def test_a_line_with_another_number_of_columns_is_named(tmp_path, monkeypatch):
    folder = french(tmp_path, monkeypatch, "Go.\tVa !\nRun!\n")
    with pytest.raises(ExperimentError, match=r"fra-eng\.zip, line 2: expected 2 columns with tabs .* got 1"):
        translation("fra-eng", folder)


def test_captions_are_downloaded_packed_from_one_version():
    urls = [file.url for file in module.MULTI30K.values()]
    assert {url.rpartition("/")[0] for url in urls} == {module._RAW.rstrip("/")}
    assert all(url.endswith(f"/{name}.gz") for name, url in zip(module.MULTI30K, urls, strict=True))


@needs_real
def test_real_test_sets_and_vocabularies_have_known_sizes():
    data = translation("en-vi", real_data.DATA, train=False)
    assert [len(part.source) for part in data[1:3]] == [1_553, 1_268]
    assert len(vocabulary("en", real_data.DATA)) == 17_191
    assert len(vocabulary("vi", real_data.DATA)) == 7_709


@needs_real
def test_the_real_stand_ins_are_split_as_documented():
    data = translation("fra-eng", real_data.DATA)
    assert [len(part.source) for part in data[:3]] == [138_229, 1_560, 1_583]
    assert not set(data.train.source) & set(data.validation.source + data.test.source)
    data = translation("multi30k-en-de", real_data.DATA)
    assert [len(part.target) for part in data[:3]] == [29_000, 1_014, 1_000]
