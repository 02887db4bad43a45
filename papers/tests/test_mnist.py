import gzip
import hashlib

import pytest
import torch

import bounds
import real_data
from legato_papers.data import mnist as module
from legato_papers.data.mnist import mnist, read_idx
from legato_papers.recipes.psmnist import Config, build
from legato_papers.task import ExperimentError


def idx(array):
    return (
        bytes([0, 0, 8, array.ndim])
        + b"".join(n.to_bytes(4, "big") for n in array.shape)
        + bytes(array.flatten().tolist())
    )


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder with the four files in their format, 200 and 40 images whose first rows show the digit."""
    generator = torch.Generator().manual_seed(0)
    contents = {}
    for part, count in (("train", 200), ("t10k", 40)):
        labels = torch.randint(10, (count,), generator=generator)
        images = torch.randint(100, (count, 28, 28), generator=generator)
        images[torch.arange(count), labels] = 255
        contents[f"{part}-images-idx3-ubyte"], contents[f"{part}-labels-idx1-ubyte"] = images, labels
    for name, array in contents.items():
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        monkeypatch.setitem(module.CONTENT, name, hashlib.sha256(idx(array)).hexdigest())
    return tmp_path, contents


def test_reading_gives_the_bytes_in_the_shape_of_the_head(small):
    folder, contents = small
    for read, written in zip(mnist(folder), contents.values(), strict=True):
        assert read.dtype == torch.uint8
        assert torch.equal(read.long(), written)


def test_files_are_found_in_a_folder_mnist_and_unpacked(small, monkeypatch):
    folder, _ = small
    (folder / "mnist").mkdir()
    for path in folder.glob("*.gz"):
        (folder / "mnist" / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    monkeypatch.setenv("LEGATO_DATA", str(folder))
    assert mnist().train_images.shape == (200, 28, 28)


def test_a_changed_file_is_named_with_both_checksums(small):
    folder, contents = small
    path = folder / "train-images-idx3-ubyte.gz"
    images = contents["train-images-idx3-ubyte"].clone()
    images[0, 0, 0] += 1
    path.write_bytes(gzip.compress(idx(images)))
    with pytest.raises(ExperimentError) as caught:
        mnist(folder)
    for part in (path, module.CONTENT["train-images-idx3-ubyte"], hashlib.sha256(idx(images)).hexdigest()):
        assert str(part) in str(caught.value)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"not gzip at all", lambda b: b""])
def test_a_damaged_file_is_named(small, damage):
    folder, _ = small
    path = folder / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ExperimentError, match=r"t10k-labels-idx1-ubyte\.gz"):
        mnist(folder)


def test_a_missing_file_and_a_missing_folder_are_named(small, tmp_path_factory):
    folder, _ = small
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(ExperimentError, match=r"there is no .*t10k-labels-idx1-ubyte"):
        mnist(folder)
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(ExperimentError, match=rf"expected train-images-idx3-ubyte\.gz .* in {empty}"):
        mnist(empty)


@pytest.mark.parametrize("content", [b"", b"\0\0\x08", b"\0\0\x08\x01\0\0\0\x02\x01", b"\0\0\x0d\x01\0\0\0\x01\x01"])
def test_what_is_not_an_idx_file_is_refused(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ExperimentError, match="not a whole idx file"):
        read_idx(path)


def test_the_permutation_is_the_same_for_every_seed(small):
    folder, _ = small
    config = Config()
    config.data.validation_images = 50
    config.model.order, config.model.units = 20, 10
    (first, digits), (second, _) = (build(config, seed, folder).train.take(torch.arange(3)) for seed in (0, 1))
    assert torch.equal(first, second)
    assert first.shape == (3, 784, 1)
    config.data.permutation_seed = 1
    (other, same) = build(config, 0, folder).train.take(torch.arange(3))
    assert not torch.equal(first, other)
    assert torch.equal(digits, same)
    assert torch.equal(first.sort(1).values, other.sort(1).values)


def test_every_order_has_unit_deviation_on_training_images(small):
    folder, _ = small
    config = Config()
    config.data.validation_images = 50
    config.model.order, config.model.units = 20, 10
    task = build(config, 0, folder)
    memory = task.model(task.train.take(torch.arange(150))[0])[1].memory * task.model.layer.memory.scale
    deviation = memory.double().std(0)
    # Sums over 150 images, of memories that are sums through 784 steps of order 20.
    bounds.assert_close(
        deviation, torch.ones_like(deviation), magnitude=1, roundings=150 + 784 * 21, dtype=torch.float32
    )


def test_the_network_has_the_papers_size(small):
    folder, _ = small
    config = Config()
    config.data.validation_images = 50
    assert sum(p.numel() for p in build(config, 0, folder).model.parameters()) == 166_092


@real_data.needs("mnist")
def test_the_real_files_have_the_known_content():
    digits = mnist(real_data.DATA)
    assert digits.train_images.shape == (60_000, 28, 28)
    assert digits.test_images.shape == (10_000, 28, 28)
    assert torch.bincount(digits.train_labels.long()).tolist() == [
        5923,
        6742,
        5958,
        6131,
        5842,
        5421,
        5918,
        6265,
        5851,
        5949,
    ]
    assert digits.test_labels[:5].tolist() == [7, 2, 1, 0, 4]
