"""A run: a folder with everything about it, one sub-folder a seed. ``legato train`` and ``legato evaluate`` are here.

``runs/<recipe>/<time>/seed-0/``: ``config.yaml`` (complete: it repeats the run), ``metrics.jsonl``, ``tensorboard/``,
``seconds.jsonl``, ``last.ckpt`` (to resume), ``best.ckpt`` (the weights), ``result.json`` (when finished) and plots.
"""

import json
import os
import shlex
import shutil
from dataclasses import asdict, dataclass, is_dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from torch import nn

from legato.models import Embedding

from . import checkpoint as checkpoints
from .environment import commit, environment, peak_memory
from .plots import draw_curves
from .recipes import Recipe, names, recipe
from .report import size_in_words
from .task import ExperimentError, Task


@dataclass
class Options:
    """How and where a recipe is run; unlike its fields, these do not change what is computed."""

    seeds: list[int]
    seed: int
    run_dir: Path | None
    resume: bool
    overwrite: bool
    data_dir: Path | None
    accelerator: str
    devices: int
    precision: str

    def list_of_seeds(self) -> list[int]:
        """The seeds to train, in order."""
        if len(self.seeds) == 1:
            return list(range(self.seeds[0]))
        return list(dict.fromkeys(self.seeds)) or [self.seed]


def train(which: Recipe, config: Any, options: Options) -> list[dict[str, Any]]:
    """Train one network a seed, each in its folder, and return what ``result.json`` of each holds.

    Raises:
        ExperimentError: the folder exists, holds another configuration, or cannot be written; a data file is missing.
    """
    # Under torchrun all processes come here; the first one alone owns the folder.
    first = int(os.environ.get("RANK", 0)) == 0
    seeds = options.list_of_seeds()
    folder = _folder(which.name, options, first)
    console = Console(highlight=False, quiet=not first)
    results = []
    commit()  # of the code that is running, whatever the source tree is changed to meanwhile
    for seed in seeds:
        home = folder / f"seed-{seed}"
        finished = home / "result.json"
        if options.resume and finished.exists():
            console.print(f"[bold]{which.name}[/] seed {seed} is finished: {home}", soft_wrap=True)
            results.append(json.loads(finished.read_text()))
            continue
        task = which.build(config, seed, options.data_dir)
        if not (options.resume and (home / "last.ckpt").exists()):
            task.start()
        sizes = {"parameters": count(task.model), "embedding_parameters": count(*embeddings(task.model))}
        console.print(f"[bold]{which.name}[/] seed {seed}: {size_in_words(sizes)}, {home}", soft_wrap=True)
        about = {"recipe": which.name, "seed": seed, "config": asdict(config)}
        if first:
            _keep_config(home / "config.yaml", about["config"] | {"seed": seed} | _arithmetic(options), options.resume)
        from .training import Device, fit  # Lightning takes seconds to import

        device = Device(options.accelerator, _devices(options), options.precision)
        outcome = fit(task, config.training, seed, home, device, about)
        result = {"recipe": which.name, "data": task.source, "seed": seed} | sizes | outcome | environment()
        result["peak_memory_gib"] = round(peak_memory(), 2)
        result |= {"config": about["config"], "command": _command(which, config, options, seed)}
        if first:
            checkpoints.write_atomically(finished, lambda file, r=result: file.write(json.dumps(r, indent=1).encode()))
            draw_curves(home / "metrics.jsonl", home / "training.png")
            task.plot(open_checkpoint(home / "best.ckpt", options.data_dir)[0].model, home)
        results.append(result)
    return results


def evaluate(run: Path, data_dir: Path | None = None) -> list[dict[str, Any]]:
    """The test figures of a finished or unfinished run: of its best weights so far, one dict a seed.

    Args:
        run: folder of a run, of one seed, or a ``best.ckpt``.
        data_dir: as in ``Options``.

    Raises:
        ExperimentError: nothing to evaluate there; CheckpointError: a file is cut short or not ours.
    """
    files = [run] if run.is_file() else sorted(run.glob("best.ckpt")) or sorted(run.glob("seed-*/best.ckpt"))
    if not files:
        state = "is empty of them" if run.is_dir() else "does not exist"
        raise ExperimentError(f"expected a run's folder with seed-*/best.ckpt, or such a file, but {run} {state}")
    return [_evaluate_file(path, data_dir) for path in files]


def open_checkpoint(path: Path, data_dir: Path | None = None) -> tuple[Task, dict[str, Any]]:
    """The task of a ``best.ckpt`` with its trained weights, and what the file says about itself."""
    content = checkpoints.load(path)
    if "model" not in content:
        raise ExperimentError(
            f"{path} is for resuming: expected a best.ckpt, got one without chosen weights: evaluate best.ckpt"
        )
    about = content["about"]
    if about["recipe"] not in names():
        raise ExperimentError(f"{path} is of recipe {about['recipe']!r}: expected one of {', '.join(names())}")
    which = recipe(about["recipe"])
    task = which.build(configured(which.config, about["config"]), about["seed"], data_dir)
    try:
        task.model.load_state_dict(content["model"])
    except RuntimeError as error:
        raise ExperimentError(f"the weights in {path} do not fit this version of {which.name}: {error}") from error
    task.model.eval()
    return task, about | {"validation": content["figures"]}


def configured(kind: type, fields: dict[str, Any]) -> Any:
    """The dataclass with these fields; those that are dataclasses themselves are given as their own fields."""
    config = kind()
    for name, value in fields.items():
        part = getattr(config, name)
        setattr(config, name, type(part)(**value) if is_dataclass(part) else value)
    return config


def count(*modules: nn.Module) -> int:
    """Trained parameters in these modules."""
    return sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad)


def embeddings(model: nn.Module) -> list[nn.Module]:
    """Those modules of a network that give a word its vector; papers leave them out of their counts."""
    return [module for module in model.modules() if isinstance(module, Embedding)]


def _evaluate_file(path: Path, data_dir: Path | None) -> dict[str, Any]:
    task, about = open_checkpoint(path, data_dir)
    test = task.metrics(task.total(task.model, task.test))
    return {"recipe": about["recipe"], "data": task.source, "seed": about["seed"], "config": about["config"]} | {
        "validation": about["validation"],
        "test": test,
    }


def _folder(name: str, options: Options, first: bool) -> Path:
    """The run's folder, made if new. An old one is touched only when asked to."""
    if options.resume and options.overwrite:
        raise ExperimentError("expected --resume or --overwrite, got both: leave one out")
    root = Path("runs") / name
    folder = options.run_dir
    if folder is None and options.resume:
        runs = sorted((path for path in root.glob("*") if path.is_dir()), key=lambda path: path.stat().st_mtime)
        if not runs:
            raise ExperimentError(
                f"there is no run in {root} to resume: leave --resume out, or name one with --run-dir"
            )
        folder = runs[-1]
    folder = folder or root / datetime.now().strftime("%Y-%m-%d-%H%M%S")
    if not first or options.resume:
        return folder
    if folder.exists() and not folder.is_dir():
        raise ExperimentError(f"expected a folder for the run, got the file {folder}: choose another --run-dir")
    if folder.is_dir() and any(folder.iterdir()):
        if not options.overwrite:
            raise ExperimentError(
                f"{folder} already holds a run: add --resume or --overwrite, or choose another --run-dir"
            )
        if not any(folder.glob("seed-*/config.yaml")):
            raise ExperimentError(f"{folder} does not look like a run, so it is not deleted: choose another --run-dir")
        shutil.rmtree(folder)
    return folder


def _keep_config(path: Path, fields: dict[str, Any], resume: bool) -> None:
    if resume and path.exists():
        before, now = _flat(yaml.safe_load(path.read_text())), _flat(fields)
        changed = [
            f"{key} {before.get(key)} -> {now.get(key)}" for key in now | before if before.get(key) != now.get(key)
        ]
        if changed:
            raise ExperimentError(
                f"{path} has another configuration than asked for now ({'; '.join(changed)}): "
                "resume with the same one (--config with that file), or choose another --run-dir"
            )
    text = yaml.safe_dump(fields, sort_keys=False)
    checkpoints.write_atomically(path, lambda file: file.write(text.encode()))


def _flat(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in fields.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _arithmetic(options: Options) -> dict[str, Any]:
    return {"accelerator": options.accelerator, "devices": options.devices, "precision": options.precision}


def _devices(options: Options) -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", options.devices))


def _command(which: Recipe, config: Any, options: Options, seed: int) -> str:
    """The command that makes this result again: the recipe and all that differs from its defaults."""
    usual = _flat(asdict(which.config())) | {"accelerator": "auto", "devices": 1, "precision": "32-true"}
    words = ["legato", "train", which.name]
    for key, value in (_flat(asdict(config)) | _arithmetic(options)).items():
        if value != usual[key]:
            text = f"{value:.15g}" if isinstance(value, float) else json.dumps(value).strip('"')
            words += [f"--{key}", text]
    return shlex.join([*words, "--seed", str(seed)])
