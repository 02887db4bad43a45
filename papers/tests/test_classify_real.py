"""imdb, qqp and snli from the command to the checkpoint: on a few real texts, on small official files."""

import csv
import functools
import http.server
import json
import threading
import zipfile

import pytest
import torch

import real_data
from legato_papers.cli import main
from legato_papers.data import qqp, snli
from legato_papers.data.files import File
from legato_papers.data.vectors import FILES
from legato_papers.recipes import recipe

VECTORS = real_data.DATA / "vectors300" / "sg300_wiki_imdb.npz"
PARTS = {"imdb": "imdb", "qqp": "qqp-20k", "snli": "snli"}
BESIDE = {"imdb": 301, "qqp": 1201, "snli": 3603}


@pytest.fixture(autouse=True)
def _own_cache_and_arithmetic(tmp_path, monkeypatch):
    monkeypatch.setenv("LEGATO_CACHE", str(tmp_path / "cache"))
    yield
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("name", ["qqp", "snli", "imdb"])
def test_a_few_real_texts_go_all_the_way(name, tmp_path, capsys):
    if not real_data.there(PARTS[name], "vectors300"):
        pytest.skip(f"needs {PARTS[name]} and vectors300 in the folder of LEGATO_DATA")
    run = tmp_path / "run"
    command = ["train", name, "--preset", "smoke", "--data.vectors", str(VECTORS), "--data-dir", str(real_data.DATA)]
    assert main([*command, "--accelerator", "cpu", "--run-dir", str(run)]) == 0
    result = json.loads((run / "seed-0" / "result.json").read_text())
    assert result["parameters"] - result["embedding_parameters"] == BESIDE[name]
    assert result["vectors"] == str(VECTORS)
    assert result["data"] == {"imdb": "IMDB", "qqp": "qqp-20k", "snli": "cad+sick"}[name]
    assert 0 <= result["test"]["accuracy"] <= 1
    assert set(result["truncated"]) == {"train", "validation", "test"}
    capsys.readouterr()
    assert main(["evaluate", str(run), "--data-dir", str(real_data.DATA)]) == 0
    assert f"{100 * result['test']['accuracy']:.2f}" in capsys.readouterr().out


@pytest.mark.parametrize("name", list(PARTS))
def test_the_smoke_preset_is_small(name):
    smoke = recipe(name).presets["smoke"].fields
    assert smoke["training.epochs"] == 1
    assert smoke["data.examples"] <= 200
    assert smoke["data.vectors"] is None  # nothing but the texts is downloaded


@pytest.mark.parametrize("name", list(PARTS))
def test_the_default_vectors_are_published(name):
    (*_, file) = FILES[recipe(name).config().data.vectors][1]
    assert file.url.startswith("https://")
    assert file.checksum.startswith("sha256:")


def pairs(count):
    """Invented questions; those of the same thing are duplicates."""
    things = ["piano", "violin", "cello", "harp"]
    for number in range(count):
        a, b = things[number % 4], things[(number + number // 4 % 2) % 4]
        yield f"How do I tune a {a}?", f"What is the way to tune my {b}?", int(a == b)


def train_on_official(name, folder, tmp_path, vectors="null"):
    """The result of a smoke run on these files."""
    run = tmp_path / "run"
    options = ["--data.vectors", vectors, "--data-dir", str(folder), "--accelerator", "cpu", "--run-dir", str(run)]
    assert main(["train", name, "--preset", "smoke", *options]) == 0
    return json.loads((run / "seed-0" / "result.json").read_text())


@pytest.fixture
def official_qqp(tmp_path, monkeypatch):
    """A folder with a small file in the format of Quora's and an archive in that of GloVe's, whose sizes are free."""
    monkeypatch.setattr(qqp, "OFFICIAL", File("quora_duplicate_questions.tsv"))
    monkeypatch.setattr(qqp, "COUNT", 80)
    monkeypatch.setattr(qqp, "_PER_CLASS", 10)
    monkeypatch.setitem(FILES, "glove.840B.300d", ("glove", (File("glove.840B.300d.zip"),)))
    folder = tmp_path / "official"
    folder.mkdir()
    with open(folder / "quora_duplicate_questions.tsv", "w", newline="") as file:
        rows = csv.writer(file, delimiter="\t", quoting=csv.QUOTE_ALL)
        rows.writerow(["id", "qid1", "qid2", "question1", "question2", "is_duplicate"])
        rows.writerows([n, 2 * n, 2 * n + 1, a, b, label] for n, (a, b, label) in enumerate(pairs(80)))
    with zipfile.ZipFile(folder / "glove.840B.300d.zip", "w") as archive:
        numbers = " ".join(["0.5"] * 300)
        archive.writestr("glove.840B.300d.txt", f"how {numbers}\npiano {numbers}\n")
    return folder


def test_official_files_of_qqp_and_glove_suffice(official_qqp, tmp_path):
    result = train_on_official("qqp", official_qqp, tmp_path, "glove.840B.300d")
    assert (result["data"], result["updates"]) == ("qqp", 2)
    assert result["vectors"] == "glove.840B.300d"


def test_qqp_in_an_empty_home_downloads_its_files(official_qqp, tmp_path, monkeypatch):
    """With the default vectors, no folder of data and an empty cache, each official file is downloaded once."""
    requested = []

    class Server(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            requested.append(self.path)
            super().do_GET()

        def log_message(self, *_):
            pass

    handler = functools.partial(Server, directory=official_qqp)
    monkeypatch.delenv("LEGATO_DATA", raising=False)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        tsv, archive = (File(name, url=f"{address}/{name}") for name in (qqp.OFFICIAL.name, "glove.840B.300d.zip"))
        monkeypatch.setattr(qqp, "OFFICIAL", tsv)
        monkeypatch.setitem(FILES, "glove.840B.300d", ("glove", (archive,)))
        small = ["--training.epochs", "1", "--training.batch_size", "20", "--accelerator", "cpu", "--run-dir", "run"]
        assert main(["train", "qqp", *small]) == 0
        assert main(["evaluate", "run"]) == 0
        server.shutdown()
    result = json.loads((home / "run/seed-0/result.json").read_text())
    assert (result["data"], result["vectors"]) == ("qqp", "glove.840B.300d")
    assert sorted(requested) == [f"/{archive.name}", f"/{tsv.name}"]


def test_snli_runs_from_its_official_archive_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(snli, "ARCHIVE", File("snli_1.0.zip"))
    monkeypatch.setattr(snli, "COUNTS", {"train": 60, "dev": 12, "test": 12})
    folder = tmp_path / "data"
    folder.mkdir()
    with zipfile.ZipFile(folder / "snli_1.0.zip", "w") as archive:
        for part, count in snli.COUNTS.items():
            rows = [
                {"gold_label": snli.LABELS[n % 3], "sentence1": first, "sentence2": second}
                for n, (first, second, _) in enumerate(pairs(count))
            ]
            rows.append(rows[0] | {"gold_label": "-"})
            archive.writestr(f"snli_1.0/snli_1.0_{part}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    result = train_on_official("snli", folder, tmp_path)
    assert (result["data"], result["updates"]) == ("snli", 3)
