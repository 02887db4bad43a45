"""imdb, qqp and snli on a few real texts, from the command to the checkpoint, and from files in the official forms."""

import json
import os
from pathlib import Path

import pytest
import torch

from legato.cli import main
from legato.experiments.recipes import recipe

DATA = Path(os.environ.get("LEGATO_DATA") or "../shared/data")
PARTS = {"imdb": "imdb", "qqp": "qqp-20k", "snli": "snli"}
BESIDE = {"imdb": 301, "qqp": 1201, "snli": 3603}


@pytest.fixture(autouse=True)
def _own_cache_and_arithmetic(tmp_path, monkeypatch):
    monkeypatch.setenv("LEGATO_CACHE", str(tmp_path / "cache"))
    yield
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("name", ["qqp", "snli", "imdb"])
def test_a_few_real_texts_go_all_the_way(name, tmp_path, capsys):
    for part in (PARTS[name], "vectors300"):
        if not (DATA / part).is_dir():
            pytest.skip(f"{DATA / part} is not here")
    run = tmp_path / "run"
    command = ["train", name, "--smoke", "--data-dir", str(DATA), "--accelerator", "cpu", "--run-dir", str(run)]
    assert main(command) == 0
    result = json.loads((run / "seed-0" / "result.json").read_text())
    assert result["parameters"] - result["embedding_parameters"] == BESIDE[name]
    assert result["vectors"] == "vectors300"
    assert result["data"] == {"imdb": "IMDB", "qqp": "qqp-20k", "snli": "cad+sick"}[name]
    assert 0 <= result["test"]["accuracy"] <= 1
    assert set(result["truncated"]) == {"train", "validation", "test"}
    capsys.readouterr()
    assert main(["evaluate", str(run), "--data-dir", str(DATA)]) == 0
    assert f"{100 * result['test']['accuracy']:.2f}" in capsys.readouterr().out


@pytest.mark.parametrize("name", list(PARTS))
def test_a_smoke_size_is_small(name):
    smoke = recipe(name).smoke
    assert smoke["training.epochs"] == 1
    assert smoke["data.examples"] <= 200
