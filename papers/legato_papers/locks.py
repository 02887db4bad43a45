"""Locks of the operating system, which end with the process that holds them: one writer at a time in a folder."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import ExperimentError

#: Name of the lock in a folder of results.
LOCK = ".lock"
_log = logging.getLogger(__name__)


def locked(path: Path, work: str) -> Any:
    """Lock this file until the ``with`` that takes the result ends, or the process does.

    Args:
        path: of the lock.
        work: what another process does that holds it, for the warning that this one waits.

    Raises:
        OSError: nothing can be written there.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        _log.warning("waiting for another process that %s", work)
        return lock.acquire()


@contextmanager
def owned(folder: Path, option: str, *, new: bool = False) -> Iterator[None]:
    """Make a folder of results and own it: no other process writes there until the context ends, however it ends.

    In one thread, owners may be nested. A folder that was made here and stays empty is removed again.

    Args:
        folder: where results are written.
        option: the command's option that names another folder, for the errors.
        new: the caller has just made it.

    Raises:
        ExperimentError: another process owns it, or there is a file in its place.
        OSError: nothing can be written there.
    """
    from filelock import FileLock, Timeout

    if folder.exists() and not folder.is_dir():
        raise ExperimentError(f"expected a folder for results, got the file {folder}: choose another {option}")
    new = new or not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ExperimentError(
            f"{folder} is in use: another process writes its results there: wait for it to end, or choose another "
            f"{option}"
        ) from None
    try:
        yield
    finally:
        if new and [path.name for path in folder.iterdir()] == [LOCK]:
            with suppress(OSError):
                (folder / LOCK).unlink()
                folder.rmdir()
        lock.release()


def contents(folder: Path) -> list[Path]:
    """What is in a folder of results beside its lock."""
    return [path for path in folder.iterdir() if path.name != LOCK]
