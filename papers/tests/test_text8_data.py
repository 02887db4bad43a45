import lzma
import zipfile
from hashlib import sha256

import numpy as np
import pytest

import real_data
from legato_papers.data import text8 as module
from legato_papers.data.convert import convert
from legato_papers.data.files import File
from legato_papers.data.text8 import text8
from legato_papers.task import ExperimentError

TEXT = b" the quick zebra jumps over a lazy fox" * 50
OTHER = TEXT.replace(b"fox", b"yak")


def known(name, content):
    return File(name, len(content), f"sha256:{sha256(content).hexdigest()}")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LEGATO_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder with an archive in the official format, and the stand-in's file in a folder beside it."""
    path = tmp_path / "text8.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("text8", TEXT)
    monkeypatch.setattr(module, "ARCHIVE", known("text8.zip", path.read_bytes()))
    monkeypatch.setattr(module, "TEXT8", known("text8", TEXT))
    monkeypatch.setattr(module, "STAND_IN", known("wiki100m.txt", OTHER))
    (tmp_path / "wiki100m").mkdir()
    (tmp_path / "wiki100m" / "wiki100m.txt.xz").write_bytes(lzma.compress(OTHER))
    return tmp_path


def letters(part):
    return bytes(b" abcdefghijklmnopqrstuvwxyz"[code] for code in part)


def test_nine_tenths_train_and_the_last_twentieth_tests(small):
    data = text8(small)
    assert data.source == "text8"
    assert [len(part) for part in data[:3]] == [1710, 95, 95]
    assert all(part.dtype == np.uint8 for part in data[:3])
    assert b"".join(letters(part) for part in data[:3]) == TEXT


def test_a_second_start_reads_the_arrays_and_not_the_file(small, monkeypatch):
    first = text8(small)
    monkeypatch.setattr(module, "characters", None)
    for ours, theirs in zip(text8(small), first, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert isinstance(text8(small).train, np.memmap)


def test_stand_in_data_under_the_official_name_raises(small):
    (small / "text8.zip").unlink()
    assert text8(small).source == "wiki100m"
    (small / "wiki100m" / "wiki100m.txt.xz").rename(small / "text8.xz")
    with pytest.raises(ExperimentError, match=r"text8\.xz is corrupt or another file"):
        text8(small)


def test_official_files_win_over_named_stand_in_data(small):
    (small / "text8.zip").unlink()
    data = text8(small)
    assert data.source == "wiki100m"
    assert b"".join(letters(part) for part in data[:3]) == OTHER
    (small / "text8").write_bytes(TEXT)
    assert text8(small).source == "text8"


def test_the_compact_form_is_the_same_text(small, tmp_path_factory):
    target = tmp_path_factory.mktemp("compact")
    assert convert("text8", small, target) == [target / "text8/text8.xz"]
    for ours, theirs in zip(text8(target), text8(small), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    (small / "text8.zip").unlink()
    with pytest.raises(ExperimentError, match=r"expected text8\.zip in .* is a stand-in"):
        convert("text8", small, target)


def test_another_text_is_refused_with_both_checksums(small):
    (small / "text8").write_bytes(OTHER)
    with pytest.raises(ExperimentError, match=r"text8 is corrupt.*expected content with SHA-256 \w+, got \w+"):
        text8(small)
    (small / "text8").write_bytes(TEXT[:-1])
    with pytest.raises(ExperimentError, match=r"text8 is cut short.*expected 1,900 bytes of content, got 1,899"):
        text8(small)


@pytest.mark.parametrize("character", [b"\n", b"X", b"\xff", b"`", b"{"])
def test_a_character_outside_of_the_alphabet_is_found(small, monkeypatch, character):
    odd = TEXT[:100] + character + TEXT[101:]
    monkeypatch.setattr(module, "TEXT8", known("text8", odd))
    (small / "text8").write_bytes(odd)
    with pytest.raises(ExperimentError, match="character 100: expected a space or a letter from a to z, got b"):
        text8(small)


def test_an_empty_folder_is_told_what_to_get(tmp_path):
    with pytest.raises(ExperimentError, match=r"there is no text8\.zip there, nor .*put http://mattmahoney"):
        text8(tmp_path)


@real_data.needs("text8_head")
def test_the_head_of_the_real_text_is_read(monkeypatch):
    digest = "sha256:e7cb14eecbf8b23160e644449d661ed6be672f1c84813c8cdbeb6cfa06168a4d"
    monkeypatch.setattr(module, "TEXT8", File("text8_first_2072615_bytes.txt", 2_072_615, digest))
    monkeypatch.setattr(module, "FOLDER", "text8_head")
    data = text8(real_data.DATA)
    assert letters(data.train[:40]) == b" anarchism originated as a term of abuse"
    assert sum(len(part) for part in data[:3]) == 2_072_615
