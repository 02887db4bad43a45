"""Checkpoints that are whole or absent: tensors and plain types, written aside and then put in the old one's place."""

import io
import os
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .task import ExperimentError

FORMAT = "legato-run-1"


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
    """Write a checkpoint to ``path``, whole or not at all."""
    # In memory first: a disk that fills up under torch's own writer is reported without its reason.
    whole = io.BytesIO()
    torch.save(checkpoint, whole)
    write_atomically(path, lambda file: file.write(whole.getbuffer()))


def load(path: Path, *, device: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint of ``legato train``; nothing in the file is executed.

    Raises:
        CheckpointError: the file is missing, cut short, or not one of ours.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint at {path}: expected a file written by legato train")
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path} is not a whole checkpoint: expected a PyTorch zip file, got {path.stat().st_size:,} bytes that "
            "do not end as one (cut short, or another kind of file): use another copy, or train again"
        )
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint of legato train: expected tensors and plain types, got: {first}"
        ) from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        keys = ", ".join(sorted(map(str, content))[:6]) if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(
            f"{path} was not written by legato train: expected format {FORMAT!r}, got {found!r} in a file with {keys}"
        )
    return content
