"""Numba's files damaged, gone, exchanged or not to be written: kernels are compiled again."""

import errno
import os
import random
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numba
import numpy as np
import pytest
from numba.core import config
from numba.core.caching import UserProvidedCacheLocator

from legato.ops.kernels import numba_cache, numba_recurrence


def twice(x):
    return x + x


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder for Numba's files, in a process that has not warned."""
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(numba_cache, "_warned", False)
    return tmp_path


def compile_anew(monkeypatch, *arguments):
    """What a new process finds: results, how many kernels came from the cache, and the warnings."""
    monkeypatch.setattr(numba_cache, "_warned", False)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        kernel = numba_cache.compiled(twice)
        results = [kernel(x) for x in arguments or (3,)]
    hits = sum(kernel.stats.cache_hits.values())
    return results, hits, [str(warning.message) for warning in told]


def half(data):
    return data[: len(data) // 2]


def noise(data):
    return random.Random(0).randbytes(len(data))


def one_bit(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def empty(data):
    return b""


@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
@pytest.mark.parametrize("damage", [empty, half, noise, one_bit])
def test_a_damaged_file_is_replaced(suffix, damage, folder, monkeypatch):
    assert compile_anew(monkeypatch) == ([6], 0, [])
    (path,) = folder.rglob(f"*{suffix}")
    path.write_bytes(damage(path.read_bytes()))
    results, hits, (message,) = compile_anew(monkeypatch)
    assert (results, hits) == ([6], 0)
    assert f"{path} is damaged: the kernel is compiled again" in message
    assert compile_anew(monkeypatch) == ([6], 1, [])


@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
def test_a_missing_file_is_written_again(suffix, folder, monkeypatch):
    compile_anew(monkeypatch)
    (path,) = folder.rglob(f"*{suffix}")
    path.unlink()
    assert compile_anew(monkeypatch) == ([6], 0, [])
    assert compile_anew(monkeypatch) == ([6], 1, [])


def test_all_files_damaged_give_one_warning(folder, monkeypatch):
    compile_anew(monkeypatch, 3, 0.5, 2j)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) == 4  # an index, and the code for three types
    for path in files:
        path.write_bytes(b"")
    results, hits, messages = compile_anew(monkeypatch, 3, 0.5, 2j)
    assert (results, hits, len(messages)) == ([6, 1.0, 4j], 0, 1)


def test_code_of_another_type_is_not_run(folder, monkeypatch):
    """What two processes leave that saved at once, each with an index of its own."""
    compile_anew(monkeypatch, 3, 0.5)
    one, other = folder.rglob("*.nbc")
    contents = one.read_bytes(), other.read_bytes()
    other.write_bytes(contents[0])
    one.write_bytes(contents[1])
    assert compile_anew(monkeypatch, 3, 0.5) == ([6, 1.0], 0, [])
    assert compile_anew(monkeypatch, 3, 0.5) == ([6, 1.0], 2, [])


def test_other_sources_are_compiled_again(folder, monkeypatch):
    """Kernels of one module are compiled into those of another, whose own file has not changed."""
    compile_anew(monkeypatch)
    monkeypatch.setattr(numba_cache, "_sources", lambda: b"of another version")
    assert compile_anew(monkeypatch) == ([6], 0, [])


def test_numbas_own_files_are_left_alone(folder, monkeypatch):
    """Those of a version that kept no checksums."""
    numba.njit(cache=True)(twice)(3)
    before = {path: path.read_bytes() for path in folder.rglob("*.nb?")}
    assert compile_anew(monkeypatch) == ([6], 0, [])
    assert before == {path: path.read_bytes() for path in before}


@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
def test_a_folder_in_place_of_a_file(suffix, folder, monkeypatch):
    compile_anew(monkeypatch)
    (path,) = folder.rglob(f"*{suffix}")
    path.unlink()
    path.mkdir()
    for _ in range(2):
        results, hits, (message,) = compile_anew(monkeypatch)
        assert (results, hits) == ([6], 0)
        assert "Set NUMBA_CACHE_DIR to a writable folder" in message


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EIO])
def test_a_disk_that_takes_no_file(code, folder, monkeypatch):
    def write(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(numba_cache._Files, "_open_for_write", write)
    results, hits, (message,) = compile_anew(monkeypatch, 3, 0.5)
    assert (results, hits) == ([6, 1.0], 0)
    assert f"cannot be saved in {folder}" in message
    assert os.strerror(code) in message


def test_a_folder_deleted_meanwhile_is_made_again(folder, monkeypatch):
    kernel = numba_cache.compiled(twice)
    shutil.rmtree(folder)
    assert kernel(3) == 6
    assert compile_anew(monkeypatch) == ([6], 1, [])


def test_a_folder_that_became_a_file(folder, monkeypatch):
    kernel = numba_cache.compiled(twice)
    (kernel_folder,) = folder.iterdir()
    kernel_folder.rmdir()
    kernel_folder.touch()
    with pytest.warns(UserWarning, match="compiled kernels cannot be read from") as told:
        assert kernel(3) == 6
    assert len(told) == 1


def test_no_locator_of_the_users_choice(folder, monkeypatch):
    monkeypatch.setattr(config, "CACHE_LOCATOR_CLASSES", "NoSuchClass")
    results, hits, (message,) = compile_anew(monkeypatch)
    assert (results, hits) == ([6], 0)
    assert "no folder for compiled kernels is writable (RuntimeError: Unknown cache locator" in message


# --- new processes ---


def start(code, folder, **environment):
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(folder), **environment}
    return subprocess.Popen(
        [sys.executable, "-W", "always::UserWarning", "-c", code],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def test_processes_that_compile_at_once(tmp_path):
    """They write the same files; one names a processor that LLVM does not know and replaces."""
    (tmp_path / "doubled.py").write_text("def twice(x):\n    return x + x\n")
    code = (
        "from doubled import twice; from legato.ops.kernels.numba_cache import compiled\n"
        "print(*(compiled(twice)(x) for x in (3, 0.5, 2j, True)))\n"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    folder = tmp_path / "cache"
    names = ({}, {"NUMBA_CPU_NAME": "no-such-cpu"})
    processes = [start(code, folder, PYTHONPATH=path, **name) for name in names]
    for process in processes:
        output, errors = process.communicate(timeout=300)
        assert (output, "Warning" in errors) == ("6 1.0 4j 2\n", False), errors
    assert {path.suffix for path in folder.rglob("*.*")} == {".nbi", ".nbc"}  # none is temporary


def test_the_kernels_run_from_damaged_files(tmp_path):
    numba_recurrence._forward(np.dtype(np.float32))
    compiled_to = Path(numba_recurrence._forward_steps.stats.cache_path)
    locator = UserProvidedCacheLocator.get_suitable_cache_subpath(numba_recurrence.__file__)
    shutil.copytree(compiled_to, tmp_path / locator)
    damaged = [p for p in tmp_path.rglob("*.nbi") if "_recurrence._forward.locals.run" in p.name]
    damaged += [p for p in tmp_path.rglob("*.nbc") if "threads.next_task" in p.name]
    assert len(damaged) >= 2
    for path in damaged:
        path.write_bytes(half(path.read_bytes()))
    code = (
        "import torch, legato; torch.set_num_threads(1)\n"
        "print(legato.linear_recurrence(torch.tensor([0.5]), torch.ones(1, 3, 1))[1].item())\n"
        "print(legato.explain())\n"
    )
    output, errors = start(code, tmp_path).communicate(timeout=300)
    assert output.startswith("1.75\nlinear_recurrence: numba"), errors
    assert errors.count("is damaged") == 1, errors
