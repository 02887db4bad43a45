"""Checkpoints that are whole or absent: tensors and plain types, written aside and then put in the old one's place."""

import hashlib
import io
import logging
import os
import pickle
import re
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .task import ExperimentError

FORMAT = "legato-run-1"
_SEAL = b"legato sha256 "
_SEAL_BYTES = len(_SEAL) + 64
_ADVICE = "use another copy, or train again"
_log = logging.getLogger(__name__)


class CheckpointError(ExperimentError):
    """A checkpoint that cannot be written or read; the message names the file and says what to do."""


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """``write`` fills a temporary file beside ``path``, which takes its place when every byte is on the disk.

    Raises:
        CheckpointError: the disk is full or refuses; what was at ``path`` before is untouched.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = file.name
            write(file)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)
        kept = "the previous one is whole" if path.exists() else "there was none before"
        raise CheckpointError(f"could not write {path}: {error} ({kept}): free some space and use --resume") from error


def save(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint to ``path``, whole or not at all, with the SHA-256 of all its bytes at its end."""
    # In memory first: a disk that fills up under torch's own writer is reported without its reason.
    whole = io.BytesIO()
    torch.save(checkpoint, whole)
    content = sealed(whole.getbuffer())
    write_atomically(path, lambda file: file.write(content))


def load(path: Path, *, device: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint of ``legato-papers train``; nothing in the file is executed.

    Every byte is checked against the SHA-256 at the end of the file. Files of older versions have none: of those the
    CRC-32 of every member of the zip file is compared, and a warning says so.

    Raises:
        CheckpointError: the file is missing, cut short, changed, or not one of ours.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint at {path}: expected a file written by legato-papers train")
    whole = path.read_bytes()
    is_sealed = _check_seal(whole, path)
    try:
        content = torch.load(io.BytesIO(whole), map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"(?:GLOBAL|global:?) (?:GLOBAL )?([\w.]+)", str(error))
        what = f"a file that refers to {named[1]}" if named else "a file with other objects"
        raise CheckpointError(
            f"{path} is no checkpoint of legato-papers train: expected tensors and plain types, got {what}, "
            "which may run code when it is loaded; none was run. Do not load it with weights_only=False or pickle: "
            "delete it, unless you know who wrote it and why"
        ) from error
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{path} is no checkpoint of legato-papers train: expected tensors and plain types, got: {first}: "
            "use another copy, or train again"
        ) from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        keys = ", ".join(sorted(map(str, content))[:6]) if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(
            f"{path} was not written by legato-papers train: expected format {FORMAT!r}, got {found!r} in a file "
            f"with {keys}"
        )
    if not is_sealed:
        _log.warning("%s is of an older legato and has no SHA-256: only the CRC-32 of its members was compared", path)
    return content


def sealed(content: bytes | memoryview) -> bytes:
    """A zip file with the SHA-256 of its bytes as its comment, which readers of zip files pass over."""
    whole = bytearray(content)
    whole[-2:] = _SEAL_BYTES.to_bytes(2, "little")  # the length of the comment ends a zip file that has none
    return bytes(whole + _SEAL + hashlib.sha256(whole).hexdigest().encode())


def _check_seal(whole: bytes, path: Path) -> bool:
    """Whether the file has a checksum. Raises CheckpointError where that, or a zip file's own, says it is changed."""
    body, seal = whole[:-_SEAL_BYTES], whole[-_SEAL_BYTES:]
    if seal.startswith(_SEAL):
        digest = hashlib.sha256(body).hexdigest().encode()
        if seal != _SEAL + digest:
            raise CheckpointError(
                f"{path} is damaged: expected content with SHA-256 {seal[len(_SEAL) :].decode('ascii', 'replace')}, "
                f"got {digest.decode()}: {_ADVICE}"
            )
        return True
    cut = CheckpointError(
        f"{path} is not a whole checkpoint: expected a PyTorch zip file, got {len(whole):,} bytes that do not end as "
        f"one (cut short, or another kind of file): {_ADVICE}"
    )
    # The 22 bytes that end a zip file without a comment. What is left of one with a cut or changed seal ends otherwise.
    if whole[-22:-18] != b"PK\5\6" or whole[-2:] != b"\0\0":
        raise cut
    try:
        damaged = zipfile.ZipFile(io.BytesIO(whole)).testzip()
    except Exception as error:
        raise cut from error
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged: the CRC-32 of its member {damaged} does not fit: {_ADVICE}")
    return False
