"""text8, imdb-language-model and imdb-pretrained on a few real texts, from the command to the figures."""

import json
import lzma
from pathlib import Path

import pytest

import real_data
from legato_papers.cli import main
from legato_papers.data import text8
from legato_papers.data.files import File


@pytest.fixture(autouse=True)
def _own_folder_and_cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LEGATO_CACHE", str(tmp_path / "cache"))


def smoke(name, folder, *options):
    """What ``result.json`` of a smoke run says."""
    run = Path("runs") / name / "smoke"
    command = ["train", name, "--preset", "smoke", "--data-dir", str(folder), "--accelerator", "cpu"]
    assert main([*command, "--run-dir", str(run), *options]) == 0
    assert (run / "seed-0" / "training.png").stat().st_size > 0
    return json.loads((run / "seed-0" / "result.json").read_text())


@real_data.needs("wiki100m")
def test_a_few_real_characters_go_all_the_way(tmp_path, monkeypatch):
    packed = next((real_data.DATA / "wiki100m").glob("wiki100m.txt*"))
    with (lzma.open if packed.suffix == ".xz" else open)(packed, "rb") as file:
        beginning = file.read(100_000)
    monkeypatch.setattr(text8, "STAND_IN", File("wiki100m.txt"))
    (tmp_path / "wiki100m.txt").write_bytes(beginning)
    result = smoke("text8", tmp_path)
    assert result["data"] == "wiki100m"
    assert 3 < result["test"]["bits_per_character"] < 6
    assert result["tokens_per_second"] > 0


@real_data.needs("imdb")
def test_a_few_real_reviews_go_all_the_way(capsys):
    model = smoke("imdb-language-model", real_data.DATA)
    assert model["data"] == "IMDB reviews"
    assert 1 < model["test"]["perplexity"] < 1000
    tuned = smoke("imdb-pretrained", real_data.DATA, "--pretrained", "true")
    assert tuned["data"] == "IMDB"
    assert tuned["config"]["language_model"].endswith("seed-0/best.ckpt")
    capsys.readouterr()
    assert main(["evaluate", "runs/imdb-pretrained/smoke", "--data-dir", str(real_data.DATA)]) == 0
    assert f"{100 * tuned['test']['accuracy']:.2f}" in capsys.readouterr().out
