import gzip
import hashlib
import io
import lzma
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from legato_papers.data import files
from legato_papers.data.files import (
    File,
    check,
    download,
    find,
    need,
    read,
    read_text,
    tar_members,
    zip_lines,
    zip_member,
)
from legato_papers.task import ExperimentError

CONTENT = b"The tide comes in.\nThe tide goes out.\n" * 5000


def sha256(content):
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LEGATO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LEGATO_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def put(path, content=CONTENT):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


# Finding.


def test_the_named_folder_is_the_only_one(tmp_path, monkeypatch):
    file = File("tides.txt")
    for folder in ("named", "variable", "cache"):
        put(tmp_path / folder / "sea" / "tides.txt")
    assert find(file, "sea") == tmp_path / "cache/sea/tides.txt"
    monkeypatch.setenv("LEGATO_DATA", str(tmp_path / "variable"))
    assert find(file, "sea") == tmp_path / "variable/sea/tides.txt"
    assert find(file, "sea", tmp_path / "named") == tmp_path / "named/sea/tides.txt"
    assert find(file, "sea", tmp_path / "empty") is None


def test_what_was_downloaded_is_found_last(cache):
    path = put(cache / "sea" / "tides.txt")
    assert find(File("tides.txt"), "sea") == path


def test_a_file_is_found_in_or_above_its_folder_packed_or_not(tmp_path):
    file = File("tides.txt")
    for name in ("tides.txt", "tides.txt.xz", "tides.txt.gz", "sea/tides.txt.xz"):
        path = put(tmp_path / "data" / name)
        assert find(file, "sea", tmp_path / "data") == path
    assert find(File("tides.zip"), "sea", tmp_path / "data") is None


def test_a_missing_file_is_named_with_all_that_would_do(tmp_path):
    file = File("tides.txt", url="http://127.0.0.1:9/tides.txt")
    (tmp_path / "data").mkdir()
    with pytest.raises(ExperimentError) as caught:
        need(file, "sea", tmp_path / "data", otherwise="ebb.txt")
    for part in ("tides.txt.xz", str(tmp_path / "data" / "sea"), "nor ebb.txt", file.url, "--data-dir"):
        assert part in str(caught.value)


def test_an_unpublished_file_is_not_announced_as_a_download():
    with pytest.raises(ExperimentError) as caught:
        need(File("tides.txt", origin="ebb.txt takes its place"), "sea")
    assert str(caught.value).endswith("name its folder with --data-dir or LEGATO_DATA; ebb.txt takes its place")


def test_a_named_folder_that_is_not_there_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("LEGATO_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(ExperimentError, match=r"there is no folder .*nowhere: correct --data-dir or LEGATO_DATA"):
        need(File("tides.txt", url="http://127.0.0.1:9/tides.txt"), "sea")


# Reading.


@pytest.mark.parametrize(("name", "pack"), [("t", bytes), ("t.gz", gzip.compress), ("t.xz", lzma.compress)])
@pytest.mark.parametrize("checksum", [sha256(CONTENT), f"md5:{hashlib.md5(CONTENT).hexdigest()}", ""])
def test_packed_or_not_the_content_is_read_and_checked(tmp_path, name, pack, checksum):
    file = File("t", len(CONTENT), checksum)
    path = put(tmp_path / name, pack(CONTENT))
    assert read(path, file) == CONTENT
    check(path, file)
    assert read_text(path, file) == list(files.read_lines(path, file)) == CONTENT.decode().splitlines()


def test_a_checksum_may_be_the_name_that_git_gives(tmp_path):
    file = File("greeting", checksum="git:ce013625030ba8dba906f756967f9e9ca394464a")
    assert read(put(tmp_path / "greeting", b"hello\n"), file) == b"hello\n"
    check(tmp_path / "greeting", file)


@pytest.mark.parametrize("look", [read, check])
def test_another_content_is_refused_with_both_checksums(tmp_path, look):
    other = CONTENT.replace(b"in", b"up")
    path = put(tmp_path / "t.gz", gzip.compress(other))
    with pytest.raises(ExperimentError) as caught:
        look(path, File("t", len(CONTENT), sha256(CONTENT)))
    for part in (str(path), sha256(CONTENT)[7:], sha256(other)[7:]):
        assert part in str(caught.value)


@pytest.mark.parametrize("look", [read, check])
@pytest.mark.parametrize("name", ["t", "t.gz", "t.xz"])
def test_a_file_cut_short_is_refused(tmp_path, look, name):
    pack = {"t": bytes, "t.gz": gzip.compress, "t.xz": lzma.compress}[name]
    path = put(tmp_path / name, pack(CONTENT)[: len(pack(CONTENT)) // 2])
    with pytest.raises(ExperimentError, match=rf"{name} (is cut short|cannot be read or unpacked).*intact copy"):
        look(path, File("t", len(CONTENT)))


def test_a_broken_character_is_found_in_its_line(tmp_path):
    path = put(tmp_path / "t", b"one\ntwo\nthr\xe9e\n")
    for reading in (read_text, lambda *of: list(files.read_lines(*of))):
        with pytest.raises(ExperimentError, match=r"t, line 3: expected UTF-8, got a broken character \(byte 0xe9\)"):
            reading(path, File("t"))


def test_only_line_feeds_end_lines():
    assert files.lines("a\u2028b\x85c\r\nd".encode(), "t") == ["a\u2028b\x85c\r", "d"]
    assert files.lines(b"", "t") == []
    assert files.lines(b"\n", "t") == [""]


def test_a_line_with_another_number_of_columns_is_named():
    assert files.columns(["a\tb", "\t"], 2, "t") == [["a", "b"], ["", ""]]
    with pytest.raises(ExperimentError, match="t, line 3: expected 2 columns with tabs between them, got 3"):
        files.columns(["a\tb", "a\tb\tc"], 2, "t", first_line=2)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "a JSON object with the texts text, got '{'"),
        ("[]", "a JSON object"),
        ('{"text": 1, "label": 0}', "a JSON object"),
        ('{"text": "a", "label": 2}', "a label from 0 to 1, got 2"),
        ('{"text": "a"}', "a label from 0 to 1, got None"),
    ],
)
def test_a_line_that_is_no_record_is_named(row, message):
    good = '{"text": "a", "label": 1}'
    assert list(files.records([good], ["text"], 2, "t")) == [{"text": "a", "label": 1}]
    with pytest.raises(ExperimentError) as caught:
        list(files.records([good, row], ["text"], 2, "t"))
    assert f"t, line 2: expected {message}" in str(caught.value)


# Archives.


def test_a_member_of_a_zip_is_read_and_a_damaged_one_refused(tmp_path):
    path = tmp_path / "t.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("sea/t", CONTENT)
    assert zip_member(path, "sea/t") == CONTENT
    assert list(zip_lines(path, "sea/t")) == CONTENT.decode().splitlines()
    for reading in (zip_member, lambda *of: list(zip_lines(*of))):
        with pytest.raises(ExperimentError, match=r"t\.zip has no member t"):
            reading(path, "t")
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole.replace(b"goes", b"went", 1)):
        path.write_bytes(damaged)
        with pytest.raises(ExperimentError, match=r"t\.zip cannot be read or unpacked"):
            zip_member(path, "sea/t")
        with pytest.raises(ExperimentError, match=r"t\.zip cannot be read or unpacked"):
            list(zip_lines(path, "sea/t"))


@pytest.mark.parametrize("packed", ["", ".gz", ".xz"])
def test_tar_files_come_in_order_and_a_truncated_one_raises(tmp_path, packed):
    path = tmp_path / f"t.tar{packed}"
    with tarfile.open(path, f"w:{packed[1:]}") as archive:
        archive.add(tmp_path, "sea", recursive=False)
        for name, content in (("sea/a", b"1"), ("./sea/b", CONTENT)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    assert list(tar_members(path)) == [("sea/a", b"1"), ("sea/b", CONTENT)]
    whole = path.read_bytes()
    for size in (0, 100, len(whole) // 2):
        path.write_bytes(whole[:size])
        with pytest.raises(ExperimentError, match=r"t\.tar\S* cannot be read or unpacked"):
            list(tar_members(path))


# Writing.


@pytest.mark.parametrize("name", ["t", "t.gz", "t.xz"])
def test_what_is_written_is_the_same_every_time_and_can_be_read(tmp_path, name):
    for folder in ("a", "b"):
        files.write(tmp_path / folder / name, [CONTENT[:7], CONTENT[7:]])
        assert read(tmp_path / folder / name, File("t", len(CONTENT), sha256(CONTENT))) == CONTENT
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_file_that_could_not_be_written_leaves_the_old_one(tmp_path):
    def blocks():
        yield b"new"
        raise KeyboardInterrupt

    path = put(tmp_path / "out" / "t.xz", b"old")
    with pytest.raises(KeyboardInterrupt):
        files.write(path, blocks())
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


# Downloading.


class Server(ThreadingHTTPServer):
    """Serves ``content``; breaks the connection after ``cut`` bytes; keeps the ranges that were asked for."""

    daemon_threads = True
    content, cut, knows_ranges = CONTENT, None, True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked = []

    def file(self, name="tides.txt", **known):
        return File(name.removesuffix(".gz"), url=f"http://127.0.0.1:{self.server_port}/{name}", **known)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, asked = self.server, self.headers["Range"]
        server.asked.append(asked)
        first = int(asked.removeprefix("bytes=").split("-")[0]) if asked and server.knows_ranges else 0
        body = server.content[first:]
        if first and not body:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(server.content)}")
            self.end_headers()
            return
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(server.content) - 1}/{len(server.content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: server.cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def test_a_missing_file_is_downloaded_once_and_its_size_printed(server, cache, capsys):
    file = server.file(checksum=sha256(CONTENT))
    path = need(file, "sea")
    assert path == need(file, "sea") == cache / "sea" / "tides.txt"
    assert path.read_bytes() == CONTENT
    assert server.asked == [None]
    told = capsys.readouterr().err
    assert file.url in told
    assert "0.2 MB" in told


def test_a_broken_download_is_gone_on_with(server, tmp_path):
    file, half = server.file(checksum=sha256(CONTENT)), len(CONTENT) // 2
    server.cut = half
    with pytest.raises(ExperimentError, match=r"could not download .*tides\.txt to .*the same command goes on"):
        download(file, tmp_path / "sea")
    assert not (tmp_path / "sea" / "tides.txt").exists()
    server.cut = None
    assert download(file, tmp_path / "sea").read_bytes() == CONTENT
    assert server.asked == [None, f"bytes={half}-"]
    assert [path.name for path in (tmp_path / "sea").iterdir() if not path.name.startswith(".")] == ["tides.txt"]


def test_a_server_that_knows_no_ranges_is_heard_from_the_start(server, tmp_path):
    put(tmp_path / "sea" / "tides.txt.part", CONTENT[:1000])
    server.knows_ranges = False
    assert download(server.file(checksum=sha256(CONTENT)), tmp_path / "sea").read_bytes() == CONTENT


def test_a_complete_part_is_used_and_a_longer_one_deleted(server, tmp_path):
    part = put(tmp_path / "sea" / "tides.txt.part")
    assert download(server.file(checksum=sha256(CONTENT)), part.parent).read_bytes() == CONTENT
    (part.parent / "tides.txt").unlink()
    put(part, CONTENT + b"more")
    with pytest.raises(ExperimentError, match="does not belong to it and was deleted"):
        download(server.file(), part.parent)
    assert download(server.file(), part.parent).read_bytes() == CONTENT


@pytest.mark.parametrize("known", [{"checksum": sha256(b"other")}, {"size": 3}])
def test_a_download_with_another_content_is_deleted(server, tmp_path, known):
    with pytest.raises(ExperimentError, match=r"expected .* got .*it came from http.* and was deleted"):
        download(server.file(**known), tmp_path / "sea")
    assert not [path for path in (tmp_path / "sea").iterdir() if not path.name.startswith(".")]


def test_a_packed_download_is_checked_unpacked(server, tmp_path):
    server.content = gzip.compress(CONTENT)
    file = server.file("tides.txt.gz", checksum=sha256(CONTENT))
    path = download(file, tmp_path / "sea")
    assert path.name == "tides.txt.gz"
    assert read(path, file) == CONTENT


def test_two_that_need_a_file_at_once_download_it_once(server, tmp_path):
    got, file = [], server.file(checksum=sha256(CONTENT))
    threads = [threading.Thread(target=lambda: got.append(download(file, tmp_path / "sea"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.read_bytes() for path in got] == [CONTENT] * 4
    assert server.asked == [None]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    put(tmp_path / "sea")
    with pytest.raises(ExperimentError, match=r"cannot write to .*sea: .*name another folder with LEGATO_CACHE"):
        download(File("tides.txt", url="http://127.0.0.1:9/tides.txt"), tmp_path / "sea")


def test_who_waits_for_another_download_says_so(server, tmp_path, caplog):
    file, path = server.file(checksum=sha256(CONTENT)), tmp_path / "sea" / "tides.txt"
    path.parent.mkdir()
    with files.locked(path.with_name(".tides.txt.lock"), "holds it"):
        waiting = threading.Thread(target=download, args=(file, path.parent))
        waiting.start()
        while "waiting for another process that downloads" not in caplog.text:
            assert waiting.is_alive()
    waiting.join()
    assert path.read_bytes() == CONTENT


def test_a_server_without_the_file_is_named(server, tmp_path, monkeypatch):
    monkeypatch.setattr(Handler, "do_GET", lambda self: self.send_error(404))
    with pytest.raises(ExperimentError, match=r"could not download .*404.*--data-dir or LEGATO_DATA"):
        download(server.file(), tmp_path / "sea")
