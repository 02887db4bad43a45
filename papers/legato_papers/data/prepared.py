"""What is slow to make of data files is made once: arrays in a cache folder, memory-mapped by every later start.

An entry is a folder whose name ends in the checksum of its settings and of the content of its sources, so other
settings or other files never meet old arrays. It is whole or it is not there: the list of its files is written last,
and the folder gets its name when every byte is on the disk. Next: ``encoded.py`` keeps texts as numbers this way.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from ..locks import locked
from .files import UNREADABLE, cache, write

Content = Mapping[str, np.ndarray | str]

_FORMAT = "legato-prepared-2"
_MANIFEST = "manifest.json"
_LARGE = 256 * 2**20  # bytes; a file from here on is not read again for its checksum while its date stays
_log = logging.getLogger(__name__)


def prepare(
    name: str,
    settings: Mapping[str, Any],
    sources: Sequence[Path | bytes],
    build: Callable[[], Content],
) -> dict[str, Any]:
    """What ``build()`` returns, from the cache if it was built before from the same sources with the same settings.

    Of two processes that need it at once, one builds and the other waits. An entry that was cut short or changed on
    disk is built again. Where the cache cannot be written, what was built is returned from memory; a warning says so.

    Args:
        name: of the entry's folder, for people.
        settings: all that decides the result beside the sources, as JSON has it.
        sources: the files, or their content, that the result is made of.
        build: makes the arrays and strings, by name; called only if they are not in the cache.

    Returns:
        dict: arrays, memory-mapped and not to be written to, and strings, by the names that ``build`` gave them.

    Example:
        >>> prepare("squares", {"count": 3}, [], lambda: {"squares": np.arange(3) ** 2})["squares"]
        memmap([0, 1, 4])
    """
    entry = folder() / f"{name}-{_key(settings, sources)[:32]}"
    content = _read(entry)
    if content is not None:
        return content
    with _alone(entry) as writable:
        content = _read(entry) if writable else None  # another process may have built it meanwhile
        if content is None:
            built = dict(build())
            content = (_read(entry) if writable and _write(entry, built) else None) or built
    return content


def folder() -> Path:
    """Where all entries are: ``prepared`` in $LEGATO_CACHE, else in the user's cache folder. It may be deleted."""
    return cache() / "prepared"


def _key(settings: Mapping[str, Any], sources: Sequence[Path | bytes]) -> str:
    sums = [_sum(source) if isinstance(source, Path) else hashlib.sha256(source).hexdigest() for source in sources]
    return hashlib.sha256(json.dumps([_FORMAT, settings, sums], sort_keys=True).encode()).hexdigest()


def _sum(path: Path) -> str:
    """SHA-256 of a file; that of a large one is kept, under its place, size and time of change."""
    stat = path.stat()
    if stat.st_size < _LARGE:
        return _digest(path)
    place = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}"
    note = folder() / "sums" / hashlib.sha256(place.encode()).hexdigest()
    try:
        kept = note.read_text()
        if len(kept) == 64:
            return kept
    except OSError:
        pass
    digest = _digest(path)
    with suppress(OSError):  # it is computed again at the next start
        write(note, [digest.encode()])
    return digest


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum(files: Any) -> str:
    """SHA-256 of the list of files in the manifest, which names arrays as well as their checksums."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _read(entry: Path) -> dict[str, Any] | None:
    """The content of an entry; None if there is none, or not a whole one."""
    try:
        manifest = json.loads((entry / _MANIFEST).read_text(encoding="utf-8"))
        if not manifest["files"] or manifest["checksum"] != _checksum(manifest["files"]):
            raise ValueError(f"{_MANIFEST} was changed")
        content: dict[str, Any] = {}
        for name, (file, size, digest) in manifest["files"].items():
            path = entry / Path(file).name
            if path.stat().st_size != size or _digest(path) != digest:
                raise ValueError(f"{file} was cut short or changed")
            whole = path.suffix == ".npy"
            content[name] = np.load(path, mmap_mode="r") if whole else path.read_bytes().decode("utf-8")
        return content
    except FileNotFoundError as error:
        if error.filename != str(entry / _MANIFEST):
            _log.warning("%s is not whole (%s): it is prepared again", entry, error)
    except (*UNREADABLE, TypeError, AttributeError) as error:
        _log.warning("%s is not whole (%s): it is prepared again", entry, error)
    return None


def _write(entry: Path, content: Content) -> bool:
    """Put the entry on disk, whole or not at all; whether that went well. The caller holds the lock."""
    temporary = None
    try:
        for left in entry.parent.glob(f"{entry.name}.*.partial"):  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(dir=entry.parent, prefix=f"{entry.name}.", suffix=".partial"))
        files = {}
        for number, (name, value) in enumerate(content.items()):
            path = temporary / (f"{number}.txt" if isinstance(value, str) else f"{number}.npy")
            with open(path, "wb") as file:
                if isinstance(value, str):
                    file.write(value.encode("utf-8"))
                else:
                    np.save(file, value, allow_pickle=False)
                _to_disk(file)
            files[name] = (path.name, path.stat().st_size, _digest(path))
        with open(temporary / _MANIFEST, "w", encoding="utf-8") as file:
            json.dump({"format": _FORMAT, "checksum": _checksum(files), "files": files}, file, indent=1)
            _to_disk(file)
        os.chmod(temporary, 0o755)
        if entry.exists():
            entry.rename(entry.with_name(f"{temporary.name}.old.partial"))
        temporary.rename(entry)
        return True
    except OSError as error:
        _log.warning("could not write %s (%s): it is prepared again at the next start", entry, error)
        return False
    finally:
        for left in entry.parent.glob(f"{entry.name}.*.partial"):
            shutil.rmtree(left, ignore_errors=True)


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def _alone(entry: Path) -> Iterator[bool]:
    """Hold the lock of this entry, which ends with the process that holds it; False where nothing can be written."""
    with ExitStack() as held:
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(entry.with_name(f"{entry.name}.lock"), f"prepares {entry}"))
            writable = True
        except OSError as error:
            _log.warning(
                "the cache cannot be written (%s): %s is prepared in memory, and again at every start; "
                "name another folder with LEGATO_CACHE",
                error,
                entry.name,
            )
            writable = False
        yield writable
