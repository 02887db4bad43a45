import json
import logging
import multiprocessing
import os
import time

import numpy as np
import pytest

from legato_papers.data import prepared
from legato_papers.data.prepared import prepare


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LEGATO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "prepared"


class Build:
    def __init__(self, **content):
        self.content, self.count = content or {"numbers": np.arange(1000), "text": "\u3042\n"}, 0

    def __call__(self):
        self.count += 1
        return self.content


def slow(log, seconds):
    """A process that prepares an entry, says in ``log`` when it builds, and puts what it got beside it."""

    def build():
        with open(log, "a") as file:
            file.write("built\n")
        time.sleep(seconds)
        return {"numbers": np.arange(1000), "text": "\u3042\n"}

    def run():
        content = prepare("slow", {}, [b"source"], build)
        log.with_name(f"{os.getpid()}.got").write_text(f"{content['numbers'].sum()} {content['text']!a}")

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def got(process, log):
    process.join(60)
    return log.with_name(f"{process.pid}.got").read_text()


def entry(folder):
    (only,) = (path for path in folder.iterdir() if path.is_dir())
    return only


def test_what_was_built_is_read_afterwards_from_disk():
    build = Build()
    for _ in range(2):
        content = prepare("name", {}, [], build)
        assert content["numbers"].tolist() == list(range(1000))
        assert content["text"] == "\u3042\n"
        assert isinstance(content["numbers"], np.memmap)
        with pytest.raises(ValueError, match="read-only"):
            content["numbers"][0] = 1
    assert build.count == 1


@pytest.mark.parametrize("array", [np.zeros(0, np.int32), np.float32(3.5), np.ones((2, 3), bool), np.zeros((0, 4))])
def test_arrays_of_any_shape_are_kept(array):
    for _ in range(2):
        read = prepare("name", {}, [], Build(array=np.asarray(array)))["array"]
        assert read.dtype == array.dtype
        np.testing.assert_array_equal(read, array)


def test_other_settings_and_other_content_are_another_entry(tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"one")
    build = Build()
    prepare("name", {"least": 1}, [source], build)
    prepare("name", {"least": 2}, [source], build)
    assert build.count == 2
    source.write_bytes(b"two")
    prepare("name", {"least": 1}, [source], build)
    assert build.count == 3
    source.rename(tmp_path / "moved")
    prepare("name", {"least": 1}, [tmp_path / "moved"], build)
    prepare("name", {"least": 1}, [b"two"], build)
    assert build.count == 3
    prepare("name", {"least": 1}, [b"two", b""], build)
    assert build.count == 4


def test_a_large_file_is_read_again_only_when_it_has_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(prepared, "_LARGE", 10)
    source = tmp_path / "source"
    source.write_bytes(b"a large file")
    build, digest, read = Build(), prepared._digest, []
    monkeypatch.setattr(prepared, "_digest", lambda path: read.append(path) or digest(path))
    for _ in range(3):
        prepare("name", {}, [source], build)
    assert (build.count, read.count(source)) == (1, 1)
    source.write_bytes(b"another large file")
    prepare("name", {}, [source], build)
    assert (build.count, read.count(source)) == (2, 2)


@pytest.mark.parametrize("file", ["0.npy", "1.txt", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "change", "remove", "empty"])
def test_a_damaged_entry_is_built_again(folder, file, damage, caplog):
    build = Build()
    prepare("name", {}, [], build)
    path = entry(folder) / file
    whole = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        changed = bytes([whole[len(whole) // 2] ^ 0x80])
        middle = len(whole) // 2
        damaged = {"cut": whole[:-1], "empty": b"", "change": whole[:middle] + changed + whole[middle + 1 :]}
        path.write_bytes(damaged[damage])
    with caplog.at_level(logging.WARNING):
        content = prepare("name", {}, [], build)
    assert build.count == 2
    assert content["numbers"].tolist() == list(range(1000))
    assert content["text"] == "\u3042\n"
    assert (file, damage) == ("manifest.json", "remove") or "it is prepared again" in caplog.text
    prepare("name", {}, [], build)
    assert build.count == 2
    assert sorted(path.suffix for path in folder.iterdir()) == ["", ".lock"]


@pytest.mark.parametrize("manifest", ["[]", "{}", '{"files": []}', '{"files": {"numbers": 3}}', "null"])
def test_a_list_of_files_that_makes_no_sense_is_built_again(folder, manifest):
    build = Build()
    prepare("name", {}, [], build)
    (entry(folder) / "manifest.json").write_text(manifest)
    assert prepare("name", {}, [], build)["text"] == "\u3042\n"
    assert build.count == 2


def test_of_two_processes_one_builds_and_the_other_reads(tmp_path):
    log = tmp_path / "log"
    first, second = slow(log, 1), slow(log, 1)
    assert got(first, log) == got(second, log) == "499500 '\\u3042\\n'"
    assert log.read_text() == "built\n"


@pytest.mark.parametrize("stage", ["build", "write"])
def test_a_process_that_is_killed_leaves_nothing_that_is_read(folder, tmp_path, monkeypatch, stage):
    log, writing = tmp_path / "log", tmp_path / "writing"
    with monkeypatch.context() as patched:
        patched.setattr(prepared, "_to_disk", lambda file: (file.flush(), writing.touch(), time.sleep(60)))
        killed = slow(log, 60 if stage == "build" else 0)
    while not (log if stage == "build" else writing).exists():
        time.sleep(0.02)
        assert killed.is_alive()
    killed.kill()
    killed.join(60)
    assert any(path.suffix == ".partial" for path in folder.iterdir()) == (stage == "write")
    assert got(slow(log, 0), log) == "499500 '\\u3042\\n'"
    assert log.read_text() == "built\n" * 2
    assert sorted(path.suffix for path in folder.iterdir()) == ["", ".lock"]


def test_an_entry_without_its_list_of_files_is_not_read(folder):
    build = Build()
    prepare("name", {}, [], build)
    manifest = json.loads((entry(folder) / "manifest.json").read_text())
    assert list(manifest["files"]) == ["numbers", "text"]
    (entry(folder) / "manifest.json").unlink()
    prepare("name", {}, [], build)
    assert build.count == 2


def test_without_a_writable_cache_data_is_prepared_in_memory(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("LEGATO_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        assert prepare("name", {}, [], Build())["numbers"].tolist() == list(range(1000))
    assert "cannot be written" in caplog.text
    assert "LEGATO_CACHE" in caplog.text


def test_a_disk_that_fills_up_costs_only_the_next_start(folder, monkeypatch, caplog):
    def full(file):
        raise OSError(28, "No space left on device")

    build = Build()
    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING):
        patched.setattr(prepared, "_to_disk", full)
        assert prepare("name", {}, [], build)["numbers"].tolist() == list(range(1000))
    assert "No space left on device" in caplog.text
    assert [path.suffix for path in folder.iterdir()] == [".lock"]
    prepare("name", {}, [], build)
    assert build.count == 2


def test_what_build_raises_is_passed_on_and_the_lock_given_back(folder):
    def fail():
        raise KeyError("no such data")

    with pytest.raises(KeyError, match="no such data"):
        prepare("name", {}, [], fail)
    build = Build()
    prepare("name", {}, [], build)
    assert build.count == 1
