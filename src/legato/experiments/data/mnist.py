"""MNIST from its four original files, whose content is checked. ``recipes/psmnist.py`` reads it pixel by pixel."""

import gzip
import hashlib
import os
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from legato._shapes import Int, Shaped, Tensor

from ..task import ExperimentError

#: SHA-256 of the unpacked files; the packed ones differ with the program that packed them.
CONTENT = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
_SOURCE = "https://ossci-datasets.s3.amazonaws.com/mnist/"  # the packed files, as PyTorch serves them
_UNSIGNED_BYTE = 8  # the type code of an idx file


class MNIST(NamedTuple):
    """Images (60000 and 10000, 28, 28) and their digits, bytes as in the files."""

    train_images: Shaped[Tensor, "train 28 28"]
    train_labels: Int[Tensor, " train"]
    test_images: Shaped[Tensor, "test 28 28"]
    test_labels: Int[Tensor, " test"]


def mnist(data_dir: Path | None = None) -> MNIST:
    """The four files of MNIST as tensors of bytes.

    Args:
        data_dir: folder that holds them, or holds them in ``mnist/``, packed by gzip or not. By default $LEGATO_DATA,
            else ../shared/data; else they are downloaded into the user's cache.

    Raises:
        ExperimentError: a file is missing, cut short, or its content is not that of MNIST; both checksums are named.

    Source: Y. LeCun, C. Cortes, C. Burges, the MNIST database of handwritten digits.
    """
    folder = _folder(data_dir)
    return MNIST(*(read_idx(_find(folder, name), digest) for name, digest in CONTENT.items()))


def read_idx(path: Path, sha256: str | None = None) -> Shaped[Tensor, "..."]:
    """The bytes of an idx file as a uint8 tensor of the shape in its head.

    Args:
        path: the file; unpacked if its name ends in .gz.
        sha256: of the unpacked content; None does not check it.

    Raises:
        ExperimentError: the file cannot be read or unpacked, has another checksum, or is not a whole idx file of bytes.
    """
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise ExperimentError(f"{path} cannot be read or unpacked: {error}: put an intact copy there") from error
    found = hashlib.sha256(content).hexdigest()
    if sha256 is not None and found != sha256:
        raise ExperimentError(
            f"{path} is corrupt or another file: expected unpacked content with SHA-256 {sha256}, got {found} "
            f"in {len(content):,} bytes: put an intact copy there"
        )
    axes = content[3] if len(content) > 3 and content[:3] == bytes([0, 0, _UNSIGNED_BYTE]) else 0
    shape = np.frombuffer(content, ">u4", axes, offset=4).tolist() if len(content) >= 4 + 4 * axes else []
    if not shape or len(content) != 4 + 4 * axes + int(np.prod(shape)):
        raise ExperimentError(
            f"{path} is not a whole idx file: expected a head 00 00 08 and axes, then a byte an element, "
            f"got {content[:4].hex(' ')} and {len(content):,} bytes"
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=4 + 4 * axes).view(shape)


def _folder(data_dir: Path | None) -> Path | None:
    """Where the files are looked for; None if they have to be downloaded."""
    named = data_dir or (Path(os.environ["LEGATO_DATA"]) if os.environ.get("LEGATO_DATA") else None)
    root = named or Path("../shared/data")
    for folder in (root, root / "mnist"):
        if _file(folder, "train-images-idx3-ubyte"):
            return folder
    if named is not None:
        raise ExperimentError(
            f"expected train-images-idx3-ubyte.gz and the three other files of MNIST in {named} or {named / 'mnist'}, "
            "found none there: correct --data-dir or LEGATO_DATA, or leave both out to download them"
        )
    return None


def _find(folder: Path | None, name: str) -> Path:
    if folder is None:
        return _download(name)
    found = _file(folder, name)
    if found is None:
        raise ExperimentError(
            f"there is no {folder / name}, packed (.gz) or not: expected the four files of MNIST there"
        )
    return found


def _file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / f"{name}.gz", folder / name) if path.is_file()), None)


def _download(name: str) -> Path:
    import pooch

    cache = pooch.os_cache("legato") / "mnist"
    try:
        # The content is checked after unpacking, whoever packed it.
        return Path(pooch.retrieve(f"{_SOURCE}{name}.gz", known_hash=None, fname=f"{name}.gz", path=cache))
    except Exception as error:
        raise ExperimentError(
            f"could not download {_SOURCE}{name}.gz to {cache}: {error}: "
            "put the four files of MNIST in a folder and name it with --data-dir or LEGATO_DATA"
        ) from error
