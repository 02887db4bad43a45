"""Numba kernels, compiled when they are first called, and the cache of their code on disk.

Numba's own cache raises an error in every process once a file is damaged, the disk is full or the
folder is deleted, and it runs code in which a bit has flipped. Here every file has a checksum,
which is verified when the file is read. A cache that fails costs only the time to compile again.
"""

import pickle
import warnings
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numba
from numba.core import config, types
from numba.core.caching import FunctionCache, IndexDataCacheFile, NullCache
from numba.core.ccallback import CFunc


def compiled(kernel: Callable, *, fastmath: Any = False) -> Any:
    """``kernel``, compiled when first called and cached on disk; other kernels may call it."""
    if config.DISABLE_JIT:  # pyright: ignore[reportAttributeAccessIssue]
        raise RuntimeError("NUMBA_DISABLE_JIT is set, so Numba compiles nothing: unset it")
    dispatcher: Any = numba.njit(nogil=True, error_model="numpy", fastmath=fastmath)(kernel)
    dispatcher._cache = _cache_of(kernel)
    return dispatcher


def contracted(kernel: Callable) -> Any:
    """As ``compiled``, but a * b + c may be rounded once (fused multiply-add)."""
    return compiled(kernel, fastmath={"contract"})


def c_function(run: Callable) -> Any:
    """``run(words)``, compiled to a C function immediately; ``launch`` calls its ``.address``."""
    signature = (types.CPointer(types.int64),), types.void
    function: Any = CFunc(run, signature, locals={}, options={"error_model": "numpy"})
    function._cache = _cache_of(run)
    function.compile()
    return function


def _cache_of(function: Callable) -> Any:
    """The cache for the code of ``function``; a null cache if no folder is writable."""
    try:
        return _Cache(function)
    except Exception as error:
        _warn_of_no_cache("no folder for compiled kernels is writable", error)
        return NullCache()


class _Cache(FunctionCache):
    """Numba's cache of one function; if the cache fails, the function is compiled again."""

    def __init__(self, function: Callable) -> None:
        super().__init__(function)
        name, stamp = f"checked-{self._impl.filename_base}", self._impl.locator.get_source_stamp()
        self._cache_file = _Files(self.cache_path, name, (stamp, _sources()))

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:
            _warn_of_no_cache(f"compiled kernels cannot be read from {self.cache_path}", error)
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except Exception as error:
            _warn_of_no_cache(f"compiled kernels cannot be saved in {self.cache_path}", error)


class _Files(IndexDataCacheFile):
    """The index and the data files of one function; each file starts with its checksum.

    Each data file contains its key. If two processes save at the same time, one may overwrite a
    file that the other has listed under another key; without the key, code for one dtype would run
    on another dtype.
    """

    def save(self, key: Any, data: Any) -> None:
        super().save(key, (key, data))

    def load(self, key: Any) -> Any:
        saved_key, data = super().load(key) or (None, None)
        return data if saved_key == key else None

    def _load_index(self) -> dict:
        saved_from, overloads = self._read(self._index_path) or (None, {})
        return overloads if saved_from == (self._version, self._source_stamp) else {}

    def _save_index(self, overloads: dict) -> None:
        self._write(self._index_path, ((self._version, self._source_stamp), overloads))

    def _load_data(self, name: str) -> Any:
        return self._read(self._data_path(name))

    def _save_data(self, name: str, data: Any) -> None:
        self._write(self._data_path(name), data)

    def _read(self, path: str) -> Any:
        """The content of a file, or None where it does not exist or is damaged."""
        try:
            data = Path(path).read_bytes()
        except FileNotFoundError:
            return None
        checksum, content = data[:32], data[32:]
        if sha256(content).digest() != checksum:
            _warn_once(
                f"{path} is damaged: the kernel is compiled again, which takes seconds, and the file is "
                "replaced. If this happens again, set NUMBA_CACHE_DIR to a folder on another disk"
            )
            return None
        return pickle.loads(content)

    def _write(self, path: str, content: Any) -> None:
        data = self._dump(content)
        with self._open_for_write(path) as file:
            file.write(sha256(data).digest() + data)


@cache
def _sources() -> bytes:
    """A checksum of all sources, because a kernel may inline functions of another module."""
    paths = sorted(Path(__file__).parent.glob("*.py"))
    return sha256(b"".join(path.read_bytes() for path in paths)).digest()


def _warn_of_no_cache(what: str, error: Exception) -> None:
    _warn_once(
        f"{what} ({type(error).__name__}: {error}): every process compiles them again, which takes "
        "seconds. Set NUMBA_CACHE_DIR to a writable folder"
    )


# Warn once: every kernel has its own files, so one cause would give dozens of warnings.
_warned = False


def _warn_once(message: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(message, stacklevel=2)
