import errno
import os

import pytest
import torch

from legato.experiments import checkpoint
from legato.experiments.checkpoint import CheckpointError

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


def test_a_disk_that_fills_up_half_way_leaves_the_previous_checkpoint_whole(tmp_path):
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
    with pytest.raises(CheckpointError, match="expected tensors and plain types"):
        checkpoint.load(path)


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no checkpoint at .*nothing\.ckpt"):
        checkpoint.load(tmp_path / "nothing.ckpt")
