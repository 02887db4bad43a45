"""MNIST from its four original files, whose content is checked. ``recipes/psmnist.py`` reads it pixel by pixel."""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from legato._shapes import Int, Shaped, Tensor

from ..task import ExperimentError
from .files import File, need, read

#: SHA-256 of the unpacked files; the packed ones differ with the program that packed them.
CONTENT = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
SIZES = {
    "train-images-idx3-ubyte": 47_040_016,
    "train-labels-idx1-ubyte": 60_008,
    "t10k-images-idx3-ubyte": 7_840_016,
    "t10k-labels-idx1-ubyte": 10_008,
}
FOLDER = "mnist"
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
        data_dir: folder that holds them, or holds them in ``mnist/``, packed or not. By default $LEGATO_DATA;
            else they are downloaded into the user's cache.

    Raises:
        ExperimentError: a file is missing, cut short, or its content is not that of MNIST; both checksums are named.

    Source: Y. LeCun, C. Cortes, C. Burges, the MNIST database of handwritten digits.
    """
    return MNIST(*(read_idx(need(file, FOLDER, data_dir), CONTENT[file.name]) for file in files()))


def files() -> list[File]:
    """The four files. What is downloaded is packed."""
    return [File(name, SIZES[name], f"sha256:{digest}", f"{_SOURCE}{name}.gz") for name, digest in CONTENT.items()]


def read_idx(path: Path, sha256: str | None = None) -> Shaped[Tensor, "..."]:
    """The bytes of an idx file as a uint8 tensor of the shape in its head.

    Args:
        path: the file; unpacked if its name ends in .gz or .xz.
        sha256: of the unpacked content; None does not check it.

    Raises:
        ExperimentError: the file cannot be read or unpacked, has another checksum, or is not a whole idx file of bytes.
    """
    name = path.stem if path.suffix in (".gz", ".xz") else path.name
    content = read(path, File(name, checksum=f"sha256:{sha256}" if sha256 else ""))
    axes = content[3] if len(content) > 3 and content[:3] == bytes([0, 0, _UNSIGNED_BYTE]) else 0
    shape = np.frombuffer(content, ">u4", axes, offset=4).tolist() if len(content) >= 4 + 4 * axes else []
    if not shape or 0 in shape or len(content) != 4 + 4 * axes + math.prod(shape):
        raise ExperimentError(
            f"{path} is not a whole idx file: expected a head 00 00 08 and axes, then a byte an element, "
            f"got {content[:4].hex(' ')} and {len(content):,} bytes"
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=4 + 4 * axes).view(shape)
