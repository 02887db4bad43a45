"""Runs beside each other: a folder has one owner, and a run goes on as it was asked for or not at all."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from legato._modes import evaluating
from legato_papers import checkpoint, recipes, run
from legato_papers.cli import main
from legato_papers.data.convert import CONVERTERS, convert
from legato_papers.demo import demo
from legato_papers.locks import LOCK, owned
from legato_papers.report import read_result
from legato_papers.task import ExperimentError

SMALL = (  # noqa: SIM905 - as one types it
    "--data.train_series 2 --data.validation_series 1 --data.test_series 2 --data.steps 120 "
    "--training.updates_per_epoch 2 --training.crop 24 --training.lead_in 8 --training.batch_size 6 "
    "--model.order 6 --model.theta 20 --model.units 8 --model.head_units 4"
).split()
TRAIN = ["train", "mackey-glass", *SMALL, "--training.epochs", "2"]
HOLD = """
import sys, time
from pathlib import Path
from legato_papers.locks import owned
with owned(Path(sys.argv[1]), "--run-dir"):
    print("held", flush=True)
    time.sleep(600)
"""


def legato(capsys, *words):
    status = main([str(word) for word in words])
    captured = capsys.readouterr()
    assert status == 0 or (captured.err.count("\n") == 1 and captured.err.startswith("legato-papers: error: "))
    return status, captured.out, captured.err


@pytest.fixture
def holder(tmp_path):
    """Another process that owns ``tmp_path / "run"``."""
    folder = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert main([*TRAIN, "--run-dir", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("option", [[], ["--resume"], ["--overwrite"], ["--resume", "--seed", "1"]])
def test_a_folder_in_use_is_refused(capsys, tmp_path, holder, option):
    status, _, err = legato(capsys, *TRAIN, *option, "--run-dir", tmp_path / "run")
    assert status == 1
    assert f"{tmp_path / 'run'} is in use: another process writes its results there" in err
    assert os.listdir(tmp_path / "run") == [LOCK]


def test_overwriting_a_run_that_is_going_deletes_nothing(capsys, tmp_path, holder, finished):
    home = tmp_path / "run/seed-0"
    home.mkdir()
    (home / "config.yaml").write_bytes((finished / "seed-0/config.yaml").read_bytes())
    assert legato(capsys, *TRAIN, "--overwrite", "--run-dir", tmp_path / "run")[0] == 1
    assert (home / "config.yaml").exists()


def test_a_lock_ends_with_a_killed_process(capsys, tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert legato(capsys, *TRAIN, "--run-dir", tmp_path / "run")[0] == 0
    assert (tmp_path / "run/seed-0/result.json").exists()


def test_the_demo_refuses_a_folder_in_use(tmp_path, holder):
    with pytest.raises(ExperimentError, match=r"is in use.* choose another --out"):
        demo(tmp_path / "run")
    assert os.listdir(tmp_path / "run") == [LOCK]


def test_owners_nest_in_one_process_and_an_empty_new_folder_goes(tmp_path):
    with owned(tmp_path / "a/b", "--out"), owned(tmp_path / "a/b", "--out"):
        assert os.listdir(tmp_path / "a/b") == [LOCK]
    assert not (tmp_path / "a/b").exists()
    with owned(tmp_path / "a", "--out"):
        pass
    assert (tmp_path / "a").exists()  # it was there before
    (tmp_path / "file").touch()
    with (
        pytest.raises(ExperimentError, match="expected a folder for results, got the file"),
        owned(tmp_path / "file", "--out"),
    ):
        pass


def test_folders_of_one_second_are_numbered(tmp_path, monkeypatch):
    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2026, 1, 2, 3, 4, 5)

    monkeypatch.setattr(run, "datetime", Clock)
    names = [run._new_folder(tmp_path / "runs").name for _ in range(3)]
    assert names == ["2026-01-02-030405", "2026-01-02-030405-2", "2026-01-02-030405-3"]


def test_runs_started_together_each_keep_their_result(tmp_path):
    command = [sys.executable, "-m", "legato_papers.cli", *TRAIN]
    both = [
        subprocess.Popen([*command, "--training.learning_rate", rate], cwd=tmp_path, stdout=subprocess.DEVNULL)
        for rate in ("0.01", "0.001")
    ]
    assert [process.wait() for process in both] == [0, 0]
    results = [read_result(path) for path in tmp_path.rglob("result.json")]
    assert sorted(result["config"]["training"]["learning_rate"] for result in results) == [0.001, 0.01]


def test_the_newest_run_is_resumed_despite_empty_folders(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert legato(capsys, *TRAIN)[0] == 0
    (tmp_path / "runs/mackey-glass/2999-01-01-000000").mkdir()
    assert "seed 0 is finished" in legato(capsys, *TRAIN, "--resume")[1]


@pytest.mark.parametrize(
    ("option", "change"),
    [
        ("--training.learning_rate 0.5", "training.learning_rate 0.01 -> 0.5"),
        ("--training.epochs 30", "training.epochs 2 -> 30"),
        ("--model.units 9", "model.units 8 -> 9"),
        ("--precision 64-true", "precision 32-true -> 64-true"),
    ],
)
def test_a_finished_run_is_not_resumed_as_another(capsys, finished, option, change):
    before = (finished / "seed-0/result.json").read_bytes()
    status, out, err = legato(capsys, *TRAIN, *option.split(), "--run-dir", finished, "--resume")
    assert (status, out) == (1, "")
    assert f"another configuration than asked for now ({change}): resume with the same one" in err
    assert (finished / "seed-0/result.json").read_bytes() == before


def test_a_run_is_not_resumed_as_another_recipe(capsys, finished, monkeypatch):
    monkeypatch.setitem(recipes._MODULES, "glass-mackey", "mackey_glass")
    status, _, err = legato(capsys, "train", "glass-mackey", *TRAIN[2:], "--run-dir", finished, "--resume")
    assert status == 1
    assert "holds a run of mackey-glass, not of glass-mackey" in err


def test_a_checkpoint_of_another_run_is_not_resumed(capsys, finished, tmp_path):
    home = tmp_path / "run/seed-1"
    home.mkdir(parents=True)
    for name in ("last.ckpt", "best.ckpt"):
        (home / name).write_bytes((finished / "seed-0" / name).read_bytes())
    status, _, err = legato(capsys, *TRAIN, "--seed", 1, "--run-dir", tmp_path / "run", "--resume")
    assert status == 1
    assert "last.ckpt is of another recipe, seed or configuration" in err


@pytest.mark.parametrize("name", ["last.ckpt", "best.ckpt"])
def test_a_flipped_bit_is_told_before_a_run_goes_on(capsys, finished, tmp_path, name):
    home, draw = tmp_path / "run/seed-0", random.Random(0)
    home.mkdir(parents=True)
    for file in ("last.ckpt", "best.ckpt", "config.yaml"):
        (home / file).write_bytes((finished / "seed-0" / file).read_bytes())
    whole = (home / name).read_bytes()
    for _ in range(10):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        (home / name).write_bytes(damaged)
        status, _, err = legato(capsys, *TRAIN, "--run-dir", tmp_path / "run", "--resume")
        assert status == 1
        assert f"{home / name} is " in err
        assert not (home / "result.json").exists()


def test_what_a_killed_process_left_half_written_goes(capsys, tmp_path):
    left = tmp_path / "run/seed-0/.last.ckpt.abc123"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    assert legato(capsys, *TRAIN, "--run-dir", tmp_path / "run", "--resume")[0] == 0
    assert not left.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[1",
        b"null",
        b"{}",
        b"\xff{}",
        b"[" * 100_000,
        b'{"recipe": "none"}',
        b"!!python/object/apply:os.abort []",
    ],
)
@pytest.mark.parametrize("name", ["result.json", "config.yaml"])
def test_damaged_files_of_a_run_are_told(capsys, finished, tmp_path, name, content):
    home = tmp_path / "run/seed-0"
    home.mkdir(parents=True)
    for file in ("result.json", "config.yaml"):
        (home / file).write_bytes((finished / "seed-0" / file).read_bytes())
    (home / name).write_bytes(content)
    status, _, err = legato(capsys, *TRAIN, "--run-dir", tmp_path / "run", "--resume")
    assert status == 1
    assert str(home / name) in err
    if name == "result.json":
        assert legato(capsys, "report", tmp_path / "run")[0] == 1


@pytest.mark.parametrize("key", ["about", "figures"])
def test_a_checkpoint_that_lacks_a_part_is_told(capsys, finished, tmp_path, key):
    content = checkpoint.load(finished / "seed-0/best.ckpt")
    checkpoint.save({name: value for name, value in content.items() if name != key}, tmp_path / "best.ckpt")
    status, _, err = legato(capsys, "evaluate", tmp_path / "best.ckpt")
    assert status == 1
    assert "does not say of which run it is" in err


@pytest.mark.parametrize("content", ["model: !!python/object/apply:os.mkdir [hacked]", "model: " + "[" * 5000, "\0"])
def test_a_hostile_configuration_is_told(capsys, tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(content)
    assert legato(capsys, *TRAIN, "--config", "config.yaml", "--run-dir", "run")[0] == 2
    assert os.listdir() == ["config.yaml"]


def test_double_precision_trains(capsys, tmp_path):
    assert legato(capsys, *TRAIN, "--precision", "64-true", "--run-dir", tmp_path / "run")[0] == 0
    weights = checkpoint.load(tmp_path / "run/seed-0/best.ckpt")["model"]
    assert {value.dtype for value in weights.values() if value.is_floating_point()} == {torch.float64}


def test_two_devices_write_one_run(tmp_path):
    command = [sys.executable, "-m", "legato_papers.cli", *TRAIN, "--devices", "2", "--accelerator", "cpu"]
    environ = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK")}
    done = subprocess.run(
        command, cwd=tmp_path, env=environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert len([*tmp_path.glob("runs/mackey-glass/*")]) == 1
    assert done.stdout.count("test nrmse") == 1


def test_two_conversions_wait_for_each_other(tmp_path, monkeypatch):
    """Each of two processes writes the same bytes; the second one begins when the first one has ended."""
    code = (
        "import sys, time; from pathlib import Path; from legato_papers.data import convert as module\n"
        "def slowly(source):\n"
        "    for part in 'ab':\n"
        "        yield f'x/{part}.xz', part.encode() * 1000\n"
        "        time.sleep(0.5)\n"
        "module.CONVERTERS['x'] = slowly\n"
        "began = time.time(); module.convert('x', Path('.'), Path(sys.argv[1])); print(began, time.time())\n"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    errors = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == ["a.xz", "b.xz"]
    monkeypatch.setitem(CONVERTERS, "x", lambda source: iter([("x/a.xz", b"new")]))
    assert [path.name for path in convert("x", tmp_path, tmp_path)] == ["a.xz"]


def test_evaluation_gives_every_module_its_mode_back():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)))
    model[1][1].eval()
    before = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before == [True, True, True, True, False]


def test_validation_leaves_a_frozen_part_in_evaluation(tmp_path):
    from legato_papers.training import fit
    from test_training import CPU, TRAINING, Noisy

    task, seen = Noisy(), []
    task.model[1].eval()
    plain = task.loss
    task.loss = lambda model, batch: seen.append([part.training for part in model]) or plain(model, batch)
    fit(task, TRAINING, 0, tmp_path, CPU, {})
    assert seen == [[True, False, True]] * len(seen)


def test_three_kills_and_resumptions_change_nothing(tmp_path):
    """Each time the run is killed once it has written some lines more, wherever it is then."""
    words = ["train", "mackey-glass", *SMALL, "--training.epochs", "60", "--training.average", "0.9"]
    log = tmp_path / "killed/seed-0/metrics.jsonl"
    lines = 0
    for _ in range(3):
        command = [sys.executable, "-m", "legato_papers.cli", *words, "--run-dir", str(tmp_path / "killed"), "--resume"]
        process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if log.exists() and log.read_text().count("\n") > lines + 4:
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        lines = log.read_text().count("\n")
    assert main([*words, "--run-dir", str(tmp_path / "killed"), "--resume"]) == 0
    assert main([*words, "--run-dir", str(tmp_path / "whole")]) == 0
    killed, whole = tmp_path / "killed/seed-0", tmp_path / "whole/seed-0"
    assert (killed / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    left, right = (checkpoint.load(folder / "last.ckpt")["state_dict"] for folder in (killed, whole))
    assert all(torch.equal(left[key], right[key]) for key in left | right)
    assert len({json.dumps(read_result(home / "result.json")["test"]) for home in (killed, whole)}) == 1
    assert yaml.safe_load((killed / "config.yaml").read_text())["training"]["epochs"] == 60
