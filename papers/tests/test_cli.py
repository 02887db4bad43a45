import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml

from legato_papers import __version__, checkpoint, recipes, report
from legato_papers.cli import main

SMALL = (  # noqa: SIM905 - as one types it
    "--data.train_series 2 --data.validation_series 1 --data.test_series 2 --data.steps 120 --training.epochs 3 "
    "--training.updates_per_epoch 4 --training.crop 24 --training.lead_in 8 --training.batch_size 6 "
    "--model.order 6 --model.theta 20 --model.units 8 --model.head_units 4"
).split()


def legato(capsys, *words):
    """Exit status, standard output and standard error of a command."""
    try:
        status = main([str(word) for word in words])
    except SystemExit as done:  # --help and --version
        status = done.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small finished run of two seeds."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    assert main(["train", "mackey-glass", *SMALL, "--seeds", "2", "--run-dir", str(folder)]) == 0
    return folder


def test_list_names_every_recipe_with_its_papers_value(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    status, out, _ = legato(capsys, "list")
    assert status == 0
    lines = {line.split()[0]: line.strip() for line in out.splitlines() if line.strip()}
    assert set(recipes.names()) <= set(lines)
    assert lines["mackey-glass"].endswith("0.044 (unverified)")
    assert lines["psmnist"].endswith("98.49 %")


def test_version_and_help(capsys):
    assert legato(capsys, "--version") == (0, f"legato-papers {__version__}\n", "")
    assert "evaluate" in legato(capsys, "--help")[1]
    status, out, _ = legato(capsys, "train", "psmnist", "--help")
    assert status == 0
    assert "length of the move" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train mackey-glas", "there is no recipe mackey-glas (did you mean mackey-glass?)"),
        ("trian mackey-glass", "there is no command trian (did you mean train?)"),
        ("train mackey-glass --model.ordr 3", "there is no option --model.ordr (did you mean --model.order?)"),
        ("train mackey-glass --model.orde 3", "there is no option --model.orde (did you mean --model.order?)"),
        ("train mackey-glass --run_dir x", "there is no option --run_dir (did you mean --run-dir?)"),
        ("train text8 --preset larg", "there is no preset larg (did you mean large?): expected --preset to be one of"),
        ("train text8 --preset", "expected --preset to be one of large, smoke: see legato-papers train text8 --help"),
        ("train psmnist --preset smoke", "psmnist has no presets: leave --preset out"),
        ("train text8 --smoke", "there is no option --smoke"),
        ("train text8-large", "there is no recipe text8-large (did you mean text8?)"),
        ("train mackey-glass --model.order many", "--model.order: expected int or null, got 'many'"),
        ("train mackey-glass --model.kind gru", "--model.kind: expected one of"),
        ("train", "expected a recipe: adding, capacity, copy-memory, "),
        ("", "expected a command: list, train, evaluate, report, demo, data: see legato-papers --help"),
        (
            "report --markdwn x",
            "there is no option --markdwn (did you mean --markdown?): see legato-papers report --help",
        ),
        ("evaluate", "legato-papers evaluate --help"),
    ],
)
def test_what_is_not_understood_is_explained_in_one_line(capsys, words, message):
    status, _, err = legato(capsys, *words.split())
    assert status == 2
    assert err.startswith("legato-papers: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_help_lists_the_presets(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    status, out, _ = legato(capsys, "train", "text8", "--help")
    assert status == 0
    assert "--preset large|smoke" in out
    for preset in recipes.recipe("text8").presets.values():
        assert preset.description in " ".join(out.split())
    assert "--preset" not in legato(capsys, "train", "psmnist", "--help")[1]


@pytest.mark.parametrize("words", ["--preset large --model.order 7", "--model.order 7 --preset=large"])
def test_fields_given_count_more_than_the_preset(capsys, tmp_path, words):
    path = tmp_path / "config.yaml"
    path.write_text("training:\n  window: 9\n")
    status, out, _ = legato(capsys, "train", "text8", *words.split(), "--config", path, "--print_config")
    config = yaml.safe_load(out)
    assert status == 0
    assert (config["model"]["order"], config["model"]["blocks"]) == (7, 5)
    assert (config["training"]["window"], config["training"]["batch_size"]) == (9, 256)
    assert "preset" not in config


def test_a_preset_does_not_outlast_its_command(capsys):
    legato(capsys, "train", "text8", "--preset", "smoke", "--print_config")
    config = yaml.safe_load(legato(capsys, "train", "text8", "--print_config")[1])
    assert config["training"]["epochs"] == 10


def test_a_preset_in_a_file_is_refused(capsys, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("preset: large\n")
    status, _, err = legato(capsys, "train", "text8", "--config", path)
    assert status == 1
    assert err.startswith("legato-papers: error: expected --preset large on the command line")
    assert err.count("\n") == 1


def test_a_run_of_a_recipe_that_is_gone_is_explained(capsys, run, tmp_path):
    home = tmp_path / "old/seed-0"
    home.mkdir(parents=True)
    for name in ("config.yaml", "result.json", "last.ckpt"):
        (home / name).write_bytes((run / "seed-0" / name).read_bytes())
    content = checkpoint.load(run / "seed-0/best.ckpt")
    checkpoint.save(content | {"about": content["about"] | {"recipe": "glass-large"}}, home / "best.ckpt")
    result = json.loads((home / "result.json").read_text())
    (home / "result.json").write_text(json.dumps(result | {"recipe": "glass-large"}))
    for words in (
        ["evaluate", tmp_path / "old"],
        ["report", tmp_path / "old"],
        ["train", "mackey-glass", *SMALL, "--run-dir", tmp_path / "old", "--resume"],
    ):
        status, _, err = legato(capsys, *words)
        assert status == 1
        assert "'glass-large'" in err
        assert err.count("\n") == 1


def test_an_unknown_field_in_a_file_is_explained(capsys, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("model:\n  ordr: 3\n")
    status, _, err = legato(capsys, "train", "mackey-glass", "--config", path)
    assert status == 2
    assert "there is no field model.ordr (did you mean model.order?)" in err


def test_a_printed_config_is_read_back_to_the_same(capsys, tmp_path):
    status, first, _ = legato(capsys, "train", "mackey-glass", *SMALL, "--print_config")
    assert status == 0
    path = tmp_path / "config.yaml"
    path.write_text(first)
    assert legato(capsys, "train", "mackey-glass", "--config", path, "--print_config")[1] == first
    assert yaml.safe_load(first)["model"]["order"] == 6


def test_a_run_leaves_everything_about_it(run):
    for seed in (0, 1):
        home = run / f"seed-{seed}"
        names = {path.name for path in home.iterdir()}
        expected = "config.yaml metrics.jsonl seconds.jsonl tensorboard last.ckpt best.ckpt result.json training.png"
        assert names == {*expected.split(), "prediction.png"}
        assert len((home / "metrics.jsonl").read_text().splitlines()) == 3
        config = yaml.safe_load((home / "config.yaml").read_text())
        assert config["seed"] == seed
        assert config["model"]["order"] == 6
        assert config["precision"] == "32-true"
        result = json.loads((home / "result.json").read_text())
        words = result["command"].split()
        assert words[:3] == ["legato-papers", "train", "mackey-glass"]
        assert set(words[3:]) == {*SMALL, "--seed", str(seed)}
        assert result["machine"]["torch"] == torch.__version__


def test_the_config_in_a_run_repeats_it(run, tmp_path):
    config = run / "seed-1" / "config.yaml"
    assert main(["train", "mackey-glass", "--config", str(config), "--run-dir", str(tmp_path / "again")]) == 0
    before, again = run / "seed-1/metrics.jsonl", tmp_path / "again/seed-1/metrics.jsonl"
    assert before.read_bytes() == again.read_bytes()


@pytest.mark.parametrize("what", [".", "seed-1", "seed-1/best.ckpt"])
def test_evaluate_gives_the_figures_of_training_again(capsys, run, what):
    status, out, _ = legato(capsys, "evaluate", run / what)
    result = json.loads((run / "seed-1" / "result.json").read_text())
    assert status == 0
    assert f"{result['test']['nrmse']:.4f}" in out


def test_report_compares_mean_and_spread_with_the_paper(capsys, run, tmp_path):
    status, out, _ = legato(capsys, "report", run, "--markdown", tmp_path / "a.md", "--json", tmp_path / "a.json")
    assert status == 0
    assert "0.044" in out
    row = (tmp_path / "a.md").read_text().splitlines()[2]
    assert "±" in row
    assert "--seeds 2" in row
    assert len(json.loads((tmp_path / "a.json").read_text())[0]) == 2


def test_an_existing_run_is_kept_unless_told_otherwise(capsys, run):
    words = ["train", "mackey-glass", *SMALL, "--run-dir", run]
    before = (run / "seed-0/result.json").read_bytes()
    status, _, err = legato(capsys, *words)
    assert status == 1
    assert f"{run} already holds a run: add --resume or --overwrite, or choose another --run-dir" in err
    status, out, _ = legato(capsys, *words, "--resume")
    assert status == 0
    assert "seed 0 is finished" in out
    assert (run / "seed-0/result.json").read_bytes() == before


def test_a_run_is_not_resumed_with_another_configuration(capsys, tmp_path, run):
    (tmp_path / "seed-0").mkdir()
    (tmp_path / "seed-0/config.yaml").write_bytes((run / "seed-0/config.yaml").read_bytes())
    status, _, err = legato(
        capsys, "train", "mackey-glass", *SMALL, "--model.order", 7, "--run-dir", tmp_path, "--resume"
    )
    assert status == 1
    assert "model.order 6 -> 7" in err


def test_overwrite_deletes_nothing_but_runs(capsys, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    status, _, err = legato(capsys, "train", "mackey-glass", *SMALL, "--run-dir", tmp_path, "--overwrite")
    assert status == 1
    assert "does not look like a run" in err
    assert (tmp_path / "thesis.tex").exists()


def test_evaluate_says_what_is_wrong_with_a_checkpoint(capsys, run, tmp_path):
    content = (run / "seed-0/best.ckpt").read_bytes()
    path = tmp_path / "best.ckpt"
    path.write_bytes(content[:-100])
    status, _, err = legato(capsys, "evaluate", path)
    assert status == 1
    assert f"{path} is not a whole checkpoint" in err
    torch.save({"weights": torch.ones(2)}, path)
    assert "was not written by legato-papers train" in legato(capsys, "evaluate", path)[2]
    assert "expected a best.ckpt" in legato(capsys, "evaluate", run / "seed-0/last.ckpt")[2]
    assert "does not exist" in legato(capsys, "evaluate", tmp_path / "nowhere")[2]


def test_a_full_disk_ends_the_run_and_it_can_be_resumed(capsys, tmp_path, monkeypatch, run):
    words = ["train", "mackey-glass", *SMALL, "--run-dir", tmp_path / "run"]
    real, calls = os.replace, []

    def full_after_a_while(source, target):
        calls.append(target)
        if len(calls) > 4:
            raise OSError(28, "No space left on device")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full_after_a_while)
        status, _, err = legato(capsys, *words)
    assert status == 1
    assert "No space left on device (the previous one is whole): free some space and use --resume" in err
    assert checkpoint.load(tmp_path / "run/seed-0/last.ckpt")["epoch"] == 0
    assert legato(capsys, *words, "--resume")[0] == 0
    assert (tmp_path / "run/seed-0/metrics.jsonl").read_bytes() == (run / "seed-0/metrics.jsonl").read_bytes()


def test_a_killed_and_resumed_run_equals_an_undisturbed_one(tmp_path):
    words = [*SMALL, "--training.epochs", "40", "--training.updates_per_epoch", "10"]
    command = [
        sys.executable,
        "-m",
        "legato_papers.cli",
        "train",
        "mackey-glass",
        *words,
        "--run-dir",
        str(tmp_path / "killed"),
    ]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    log = tmp_path / "killed/seed-0/metrics.jsonl"
    deadline = time.monotonic() + 120
    while (
        process.poll() is None
        and time.monotonic() < deadline
        and not (log.exists() and log.read_text().count("\n") > 5)
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed/seed-0/result.json").exists()

    assert main(["train", "mackey-glass", *words, "--run-dir", str(tmp_path / "killed"), "--resume"]) == 0
    assert main(["train", "mackey-glass", *words, "--run-dir", str(tmp_path / "whole")]) == 0
    killed, whole = tmp_path / "killed/seed-0", tmp_path / "whole/seed-0"
    assert (killed / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    for name, part in (("last.ckpt", "state_dict"), ("best.ckpt", "model")):
        left, right = (checkpoint.load(folder / name)[part] for folder in (killed, whole))
        assert all(torch.equal(left[key], right[key]) for key in left | right)
    results = [json.loads((folder / "result.json").read_text()) for folder in (killed, whole)]
    assert results[0]["test"] == results[1]["test"]


def test_two_processes_under_torchrun_learn_what_one_does(tmp_path, run):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += [
        "-m",
        "legato_papers.cli",
        "train",
        "mackey-glass",
        *SMALL,
        "--accelerator",
        "cpu",
        "--run-dir",
        str(tmp_path / "two"),
    ]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("mackey-glass seed 0:") == 1
    rows = [
        [json.loads(line) for line in (folder / "seed-0/metrics.jsonl").read_text().splitlines()]
        for folder in (tmp_path / "two", run)
    ]
    for two, one in zip(*rows, strict=True):
        # The same batch, added up in another order: a few hundred float32 roundings.
        assert two["validation_nrmse"] == pytest.approx(one["validation_nrmse"], rel=1e-4)


def test_the_command_starts_without_lightning_and_matplotlib():
    heavy = "[m for m in ('lightning', 'matplotlib', 'numba') if m in sys.modules]"
    code = f"import sys; from legato_papers.cli import main; main(['list']); print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_missing_extra_is_named():
    code = (
        "import sys; sys.modules['jsonargparse'] = None; from legato_papers.cli import main; sys.exit(main(['list']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path.cwd())
    assert done.returncode == 1
    assert "pip install 'legato-papers'" in done.stderr


def test_a_figure_on_other_data_is_not_held_against_the_papers(capsys, tmp_path, run, monkeypatch):
    result = json.loads((run / "seed-0/result.json").read_text())
    paper = recipes.recipe("mackey-glass").paper
    monkeypatch.setattr(paper, "data", "the real thing")
    for data, beside in (("the real thing", str(paper.reported.value)), ("a stand-in", "")):
        home = tmp_path / data / "seed-0"
        home.mkdir(parents=True)
        (home / "result.json").write_text(json.dumps(result | {"data": data}))
        legato(capsys, "report", tmp_path / data, "--markdown", tmp_path / "a.md")
        head, _, row, *_ = [line.split(" | ") for line in (tmp_path / "a.md").read_text().splitlines()]
        assert row[head.index("data")] == data
        assert beside in row[head.index("paper")]
        assert bool(row[head.index("paper")]) == bool(beside)


@pytest.mark.parametrize(
    ("name", "data", "kind", "beside"),
    [
        ("imdb", "IMDB", "lmu", "89.1 % (unverified)"),
        ("imdb", "IMDB", "lstm", "87.29 % (unverified)"),
        ("imdb", "IMDB", "sru", ""),
        ("qqp", "qqp", "lmu", "86.95 %"),
        ("qqp", "qqp", "lstm", "82.58 % (unverified)"),
        ("text8", "text8", "lmu", "1.61"),
        ("text8", "text8", "lstm", "1.65 (unverified)"),
        ("text8", "wiki100m", "lstm", ""),
    ],
)
def test_each_kind_has_the_papers_value_for_it_beside(capsys, name, data, kind, beside):
    metric = recipes.recipe(name).paper.metric
    figures = {metric: 0.5}
    result = {"recipe": name, "data": data, "seed": 0, "validation": figures, "test": figures}
    result |= {"config": {"model": {"kind": kind}}}
    assert report.paper_value(result) == beside
    report.show([result])
    out = capsys.readouterr().out
    assert [line.split()[1:] for line in out.splitlines() if line.startswith("paper")] == [beside.split()] * bool(
        beside
    )


def test_the_report_names_the_preset():
    config = {name: asdict(recipes.recipe(name).config()) for name in ("text8", "long-dependency")}
    assert report._size({"recipe": "text8", "config": config["text8"]}) == ""
    config["text8"]["model"]["kind"] = "lstm"
    assert report._size({"recipe": "text8", "config": config["text8"]}) == "lstm"
    config["long-dependency"]["model"] |= {"activation": "identity", "forget_bias": 5.0}
    config["long-dependency"]["training"]["first_length"] = None
    assert report._size({"recipe": "long-dependency", "config": config["long-dependency"]}) == "paper"


def test_parameters_in_embeddings_are_counted_apart():
    assert report.size_in_words({"parameters": 1301, "embedding_parameters": 1000}) == (
        "301 parameters and 1,000 in embeddings"
    )
    assert report.size_in_words({"parameters": 301}) == "301 parameters"


def test_a_network_without_pre_training_is_not_compared():
    config = asdict(recipes.recipe("imdb-pretrained").config())
    result = {"recipe": "imdb-pretrained", "data": "IMDB", "config": config}
    assert report.paper_value(result) == "93.2 %"
    assert report.paper_value(result | {"config": config | {"pretrained": False}}) == ""
