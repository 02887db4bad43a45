import gzip
import lzma
import zipfile

import pytest

import real_data
from legato_papers.cli import main
from legato_papers.data.catalogue import Entry, catalogue, look
from legato_papers.data.convert import CONVERTERS, convert
from legato_papers.data.files import File
from legato_papers.task import ExperimentError

SIZES = (0, 1, 127, 128, 70_000)


def entry(*forms):
    return Entry("tides", "two tides", "none", [[("sea", file) for file in form] for form in forms])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("name", "pack"), [("t", bytes), ("t.gz", gzip.compress), ("t.xz", lzma.compress)])
def test_the_size_of_the_content_is_known_without_unpacking(tmp_path, size, name, pack):
    content = bytes(i * i % 251 for i in range(size))
    (tmp_path / name).write_bytes(pack(content))
    assert look(entry([File("t", size)]), tmp_path).whole
    damaged = look(entry([File("t", size + 1)]), tmp_path).damaged
    assert damaged == [
        f"{tmp_path / name} is not whole or another file: expected {size + 1:,} bytes of content, got {size:,}"
    ]


@pytest.mark.parametrize(("name", "pack"), [("t", bytes), ("t.gz", gzip.compress), ("t.xz", lzma.compress)])
@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_file_cut_short_is_not_whole(tmp_path, name, pack, share):
    whole = pack(bytes(i * i % 251 for i in range(70_000)))
    (tmp_path / name).write_bytes(whole[: int(share * len(whole))])
    found = look(entry([File("t", 70_000)]), tmp_path)
    assert not found.whole
    assert found.folder == tmp_path
    assert len(found.damaged) == 1
    assert str(tmp_path / name) in found.damaged[0]


def test_a_zip_cut_short_is_not_whole(tmp_path):
    path = tmp_path / "t.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("t", "tide" * 100)
    assert look(entry([File("t.zip")]), tmp_path).whole
    path.write_bytes(path.read_bytes()[:200])
    assert not look(entry([File("t.zip")]), tmp_path).whole


def test_only_a_thorough_look_finds_a_changed_byte(tmp_path):
    (tmp_path / "t").write_bytes(b"tide")
    other = entry([File("t", 4, "md5:00000000000000000000000000000000")])
    assert look(other, tmp_path).whole
    found = look(other, tmp_path, thorough=True)
    assert not found.whole
    assert "MD5 00000000000000000000000000000000" in found.damaged[0]


def test_the_most_complete_format_is_reported(tmp_path):
    two = entry([File("t.zip")], [File("ebb"), File("flow")])
    assert look(two, tmp_path) == look(two, tmp_path / "nowhere")
    assert look(two, tmp_path).missing == ["t.zip"]
    assert look(two, tmp_path).folder is None
    (tmp_path / "sea").mkdir()
    (tmp_path / "sea" / "ebb").write_bytes(b"")
    assert look(two, tmp_path).missing == ["flow"]
    assert look(two, tmp_path).folder == tmp_path / "sea"


def test_every_data_set_has_a_licence_and_says_how_to_get_it():
    names = [one.name for one in catalogue()]
    assert len(names) == len(set(names))
    for one in catalogue():
        assert one.licence
        assert one.how_to_get_it()
        assert one.stands_for in ("", *names)


def test_the_list_names_what_is_missing_and_where_to_get_it(tmp_path, capsys):
    (tmp_path / "iwslt15-en-vi").mkdir()
    (tmp_path / "iwslt15-en-vi" / "tst2012.en").write_bytes(b"short")
    assert main(["data", "list", "--data-dir", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    for part in (
        "IMDB             not there\n",
        f"en-vi            not whole  {tmp_path / 'iwslt15-en-vi'}\n",
        "expected 140,250 bytes of content, got 5",
        "there is no train.en, train.vi, tst2012.vi",
        "put https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz in imdb/",
        "100,000,000 characters in place of text8; licence: CC BY-SA 3.0",
        "--check compares every checksum",
    ):
        assert part in told


def test_what_was_not_compared_is_not_called_whole(tmp_path, capsys):
    review = tmp_path / "[a]" / "imdb" / "aclImdb" / "train" / "pos" / "0_9.txt"
    review.parent.mkdir(parents=True)
    review.write_text("Fine.")
    assert main(["data", "list", "--data-dir", str(tmp_path / "[a]")]) == 0
    assert f"IMDB             unchecked  {review.parent}\n" in capsys.readouterr().out


def test_a_folder_that_is_not_there_is_not_an_empty_one(tmp_path, capsys):
    assert main(["data", "list", "--data-dir", str(tmp_path / "nowhere")]) == 1
    assert f"there is no folder {tmp_path / 'nowhere'}: correct --data-dir" in capsys.readouterr().err


def test_what_is_published_nowhere_has_what_takes_its_place(tmp_path, capsys):
    assert main(["data", "list", "--data-dir", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "there is no wiki100m.txt: it is not published; text8 takes its place\n" in told
    assert "put https://nlp.stanford.edu/data/glove.840B.300d.zip in glove/" in told


def test_what_cannot_be_converted_is_named(tmp_path, capsys):
    for name in CONVERTERS:
        with pytest.raises(ExperimentError, match=str(tmp_path)):
            convert(name, tmp_path, tmp_path / "out")
    with pytest.raises(ExperimentError, match=r"there is no data set cifar to convert: expected one of imdb, qqp"):
        convert("cifar", tmp_path, tmp_path)
    assert main(["data", "convert", "imdb", "--from", str(tmp_path / "no"), "--to", str(tmp_path)]) == 1
    assert f"there is no {tmp_path / 'no'}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_tells_what_it_wrote(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(CONVERTERS, "text8", lambda source: iter([("text8/text8.xz", b" tide")]))
    assert main(["data", "convert", "text8", "--from", str(tmp_path), "--to", str(tmp_path / "out")]) == 0
    path = tmp_path / "out" / "text8" / "text8.xz"
    assert lzma.decompress(path.read_bytes()) == b" tide"
    assert capsys.readouterr().out == f"{path} (0.0 MB)\n"


def test_converting_is_stopped_without_a_word_of_checkpoints(tmp_path, capsys, monkeypatch):
    def stopped(source):
        raise KeyboardInterrupt

    monkeypatch.setitem(CONVERTERS, "text8", stopped)
    assert main(["data", "convert", "text8", "--from", str(tmp_path), "--to", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "legato-papers: stopped\n"


@real_data.needs("mnist", "imdb")
def test_what_is_there_of_the_real_files_has_the_known_sizes():
    found = {one.name: look(one, real_data.DATA) for one in catalogue()}
    for name in ("MNIST", "IMDB"):
        assert found[name].whole
        assert found[name].compared
    assert [problem for one in found.values() for problem in one.damaged] == []
