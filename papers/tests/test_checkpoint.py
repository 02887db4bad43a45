import errno
import os
import random

import pytest
import torch

from legato_papers import checkpoint
from legato_papers.checkpoint import CheckpointError

SMALL = {"format": checkpoint.FORMAT, "weights": torch.arange(5.0)}


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_what_is_saved_is_loaded(tmp_path):
    checkpoint.save(SMALL, tmp_path / "a.ckpt")
    assert torch.equal(checkpoint.load(tmp_path / "a.ckpt")["weights"], SMALL["weights"])
    assert os.listdir(tmp_path) == ["a.ckpt"]


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_full_disk_leaves_the_previous_checkpoint_whole(tmp_path, monkeypatch, call):
    path = tmp_path / "a.ckpt"
    checkpoint.save(SMALL, path)
    monkeypatch.setattr(os, call, full)
    with pytest.raises(CheckpointError, match=r"could not write .*a\.ckpt.*No space left.*previous one is whole"):
        checkpoint.save(SMALL | {"weights": torch.zeros(5)}, path)
    assert torch.equal(checkpoint.load(path)["weights"], SMALL["weights"])
    assert os.listdir(tmp_path) == ["a.ckpt"]


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path):
    path = tmp_path / "a.ckpt"
    checkpoint.save(SMALL, path)
    with pytest.raises(CheckpointError, match="previous one is whole"):
        checkpoint.write_atomically(path, lambda file: (file.write(b"half of it"), full()))
    assert torch.equal(checkpoint.load(path)["weights"], SMALL["weights"])
    assert os.listdir(tmp_path) == ["a.ckpt"]


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_a_truncated_checkpoint_is_called_so(tmp_path, kept):
    path = tmp_path / "a.ckpt"
    checkpoint.save(SMALL, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(CheckpointError, match=rf"{path} is not a whole checkpoint: .* got [\d,]+ bytes"):
        checkpoint.load(path)


def test_a_foreign_checkpoint_is_called_so(tmp_path):
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": {}, "epoch": 3}, path)
    with pytest.raises(
        CheckpointError, match="expected format 'legato-run-1', got None in a file with epoch, state_dict"
    ):
        checkpoint.load(path)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="in a file with list"):
        checkpoint.load(path)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    path = tmp_path / "a.ckpt"
    torch.save({"format": checkpoint.FORMAT, "f": os.system}, path)
    with pytest.raises(CheckpointError, match="expected tensors and plain types") as found:
        checkpoint.load(path)
    assert "Do not load it with weights_only=False" in str(found.value)
    assert "Re-running" not in str(found.value)


def test_a_flipped_bit_anywhere_is_told(tmp_path):
    """Of every byte one bit: content, headers of the zip file, its directory and the checksum itself."""
    path = tmp_path / "a.ckpt"
    checkpoint.save(SMALL, path)
    whole, draw = path.read_bytes(), random.Random(0)
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"a\.ckpt is (damaged|not a whole checkpoint)"):
            checkpoint.load(path)


def test_every_missing_or_added_byte_at_the_end_is_told(tmp_path):
    path = tmp_path / "a.ckpt"
    checkpoint.save(SMALL, path)
    whole = path.read_bytes()
    for damaged in [*(whole[:size] for size in range(len(whole) - 120, len(whole))), whole + b"\0", whole + whole]:
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"a\.ckpt is (damaged|not a whole checkpoint)"):
            checkpoint.load(path)


def test_a_checkpoint_without_a_checksum_loads_with_a_warning(tmp_path, caplog):
    path = tmp_path / "old.ckpt"
    torch.save(SMALL, path)
    assert torch.equal(checkpoint.load(path)["weights"], SMALL["weights"])
    assert "has no SHA-256" in caplog.text
    whole = bytearray(path.read_bytes())
    whole[whole.find(SMALL["weights"].numpy().tobytes()) + 7] ^= 0x40
    path.write_bytes(whole)
    with pytest.raises(CheckpointError, match=r"is damaged: the CRC-32 of its member .*data/0"):
        checkpoint.load(path)


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no checkpoint at .*nothing\.ckpt"):
        checkpoint.load(tmp_path / "nothing.ckpt")
