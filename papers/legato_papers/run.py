"""A run: a folder with everything about it, one sub-folder per seed; ``legato-papers train`` and ``evaluate``.

``runs/<recipe>/<time>/seed-0/``: ``config.yaml`` (complete: it repeats the run), ``metrics.jsonl``, ``tensorboard/``,
``seconds.jsonl``, ``last.ckpt`` (to resume), ``best.ckpt`` (the weights), ``result.json`` (when finished) and plots.
"""

import json
import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass
from datetime import datetime
from itertools import count as numbers
from pathlib import Path
from typing import Annotated, Any

import torch
import yaml
from rich.console import Console
from torch import nn

from legato._environment import commit, environment, peak_memory
from legato.models import Embedding

from . import checkpoint as checkpoints
from .locks import contents, owned
from .plots import draw_curves
from .ranges import Range, Seed, check
from .recipes import Recipe, names, recipe
from .report import read_result, size_in_words
from .task import ExperimentError, Task

_MOST_SEEDS = 10_000


@dataclass
class Options:
    """How and where a recipe is run; unlike its fields, these do not change what is computed."""

    seeds: Annotated[list[int], Range(0, 2**32 - 1)]
    seed: Seed
    run_dir: Path | None
    resume: bool
    overwrite: bool
    data_dir: Path | None
    accelerator: str
    devices: Annotated[int, Range(1, 4096)]
    precision: str

    def list_of_seeds(self) -> list[int]:
        """The seeds to train, in order."""
        if len(self.seeds) == 1:
            if not 1 <= self.seeds[0] <= _MOST_SEEDS:
                raise ExperimentError(
                    f"expected --seeds to be a number from 1 to {_MOST_SEEDS:,}, or several seeds, got {self.seeds[0]}"
                )
            return list(range(self.seeds[0]))
        return list(dict.fromkeys(self.seeds)) or [self.seed]


def train(which: Recipe, config: Any, options: Options) -> list[dict[str, Any]]:
    """Train one network a seed, each in its folder, and return what ``result.json`` of each holds.

    Raises:
        ExperimentError: an option is out of its range; the folder exists, is in use, holds another configuration, or
            cannot be written; a data file is missing; the network does not fit in memory.
    """
    check(config)
    check(options)
    seeds = options.list_of_seeds()
    commit()  # of the code that is running, whatever the source tree is changed to meanwhile
    with _claimed(which.name, options) as folder:
        return [_train_seed(which, config, options, seed, folder / f"seed-{seed}") for seed in seeds]


def _train_seed(which: Recipe, config: Any, options: Options, seed: int, home: Path) -> dict[str, Any]:
    first = is_first()
    console = Console(highlight=False, quiet=not first)
    if options.resume:
        _refuse_another(home, which, config, options, seed)
        if (home / "result.json").exists():
            console.print(f"[bold]{which.name}[/] seed {seed} is finished: {home}", soft_wrap=True)
            return read_result(home / "result.json")
        for path in (home / "last.ckpt", home / "best.ckpt"):
            if path.exists():
                checkpoints.load(path)  # raises before the data are read
    from .training import Device, fit  # Lightning takes seconds to import

    device = Device(options.accelerator, _devices(options), options.precision)
    device.trainer()  # raises before the data are read
    with _told(which.name):
        try:
            task = which.build(config, seed, options.data_dir)
        except (ValueError, OverflowError) as error:  # of the layers: sizes that do not go together
            raise ExperimentError(
                f"{which.name} cannot be built with these options: {' '.join(str(error).split())}: correct them"
            ) from error
    if not (options.resume and (home / "last.ckpt").exists()):
        task.start()
    sizes = {"parameters": count(task.model), "embedding_parameters": count(*embeddings(task.model))}
    console.print(f"[bold]{which.name}[/] seed {seed}: {size_in_words(sizes)}, {home}", soft_wrap=True)
    about = {"recipe": which.name, "seed": seed, "config": asdict(config)}
    if first:
        for left in home.glob(".*.*.*"):  # files that a killed process did not finish
            left.unlink()
        text = yaml.safe_dump(about["config"] | {"seed": seed} | _arithmetic(options), sort_keys=False)
        checkpoints.write_atomically(home / "config.yaml", lambda file: file.write(text.encode()))
    with _told(which.name):
        outcome = fit(task, config.training, seed, home, device, about)
    result = {"recipe": which.name, "data": task.source, "seed": seed} | sizes | outcome | environment()
    result["peak_memory_gib"] = round(peak_memory(), 2)
    result |= {"config": about["config"], "command": _command(which, config, options, seed)}
    if first:
        content = json.dumps(result, indent=1).encode()
        checkpoints.write_atomically(home / "result.json", lambda file: file.write(content))
        draw_curves(home / "metrics.jsonl", home / "training.png")
        task.plot(open_checkpoint(home / "best.ckpt", options.data_dir)[0].model, home)
    return result


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
    about = content.get("about")
    if not isinstance(about, dict) or not {"recipe", "seed", "config"} <= about.keys() or "figures" not in content:
        raise ExperimentError(
            f"{path} does not say of which run it is: expected a best.ckpt that legato-papers train wrote"
        )
    if about["recipe"] not in names():
        raise ExperimentError(f"{path} is of recipe {about['recipe']!r}: expected one of {', '.join(names())}")
    which = recipe(about["recipe"])
    try:
        config = configured(which.config, about["config"])
    except (AttributeError, TypeError) as error:
        raise ExperimentError(
            f"the configuration in {path} does not fit this version of {which.name}: {error}: train again"
        ) from error
    task = which.build(config, about["seed"], data_dir)
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


@contextmanager
def _claimed(name: str, options: Options) -> Iterator[Path]:
    """The run's folder, made if new, which no other process writes to until the context ends.

    An old one is touched only when asked to. Of several processes under torchrun the first one alone owns it.
    """
    if options.resume and options.overwrite:
        raise ExperimentError("expected --resume or --overwrite, got both: leave one out")
    root, folder = Path("runs") / name, options.run_dir
    if folder is None and options.resume:
        runs = sorted((path.parent for path in root.glob("*/seed-*")), key=lambda path: path.stat().st_mtime)
        if not runs:
            raise ExperimentError(
                f"there is no run in {root} to resume: leave --resume out, or name one with --run-dir"
            )
        folder = runs[-1]
    if not is_first():
        yield folder or root
        return
    if folder is not None and not options.resume:
        _refuse_to_touch(folder, options)  # before a lock is put there
    new = folder is None
    folder = _new_folder(root) if folder is None else folder
    with owned(folder, "--run-dir", new=new):
        if not options.resume:
            _refuse_to_touch(folder, options)  # what another process has written meanwhile
            for path in contents(folder):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield folder


def _new_folder(root: Path) -> Path:
    """A folder called after the time, which no other process gets; of one second the later ones are numbered."""
    stamp = datetime.now().strftime("%Y-%m-%d-%H%M%S")
    for number in numbers(1):
        folder = root / (stamp if number == 1 else f"{stamp}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise AssertionError("the numbers do not end")


def _refuse_to_touch(folder: Path, options: Options) -> None:
    """Raise unless the folder is new, empty, or a run that is to be overwritten."""
    if not folder.is_dir() or not contents(folder):
        return
    if not options.overwrite:
        raise ExperimentError(f"{folder} already holds a run: add --resume or --overwrite, or choose another --run-dir")
    if not any(folder.glob("seed-*/config.yaml")):
        raise ExperimentError(f"{folder} does not look like a run, so it is not deleted: choose another --run-dir")


def _refuse_another(home: Path, which: Recipe, config: Any, options: Options, seed: int) -> None:
    """Raise where what is there of this seed, finished or not, was asked for with other fields or options."""
    before = _asked_before(home)
    if before is None:
        return
    for name in getattr(which.config, "chosen", ()):  # null is what the run chose when it began
        if getattr(config, name) is None:
            setattr(config, name, before.get(name))
    now = _flat(asdict(config) | {"seed": seed} | _arithmetic(options))
    changed = [f"{key} {before.get(key)} -> {now.get(key)}" for key in now | before if before.get(key) != now.get(key)]
    if changed:
        raise ExperimentError(
            f"{home / 'config.yaml'} has another configuration than asked for now ({'; '.join(changed)}): "
            "resume with the same one (--config with that file), or choose another --run-dir"
        )
    if (home / "result.json").exists():
        recipe_before = read_result(home / "result.json")["recipe"]
        if recipe_before != which.name:
            raise ExperimentError(
                f"{home} holds a run of {recipe_before}, not of {which.name}: choose another --run-dir"
            )


def _asked_before(home: Path) -> dict[str, Any] | None:
    path = home / "config.yaml"
    if not path.exists():
        return None
    try:
        found = yaml.safe_load(path.read_text("utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"expected fields and their values, got {type(found).__name__}")
        return _flat(found)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ExperimentError(
            f"{path} cannot be read as the configuration of a run: {' '.join(str(error).split())}: put an intact copy "
            "there, or choose another --run-dir"
        ) from error


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Sizes that do not fit in memory are told without a traceback."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        lack = isinstance(error, MemoryError | torch.OutOfMemoryError) or "memory" in str(error)
        if not lack and "overflow" not in str(error):
            raise
        raise ExperimentError(
            f"{name} does not fit in memory: {' '.join(str(error).split()) or 'MemoryError'}: lower "
            "--training.batch_size or the sizes of --model and --data"
        ) from error


def _flat(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in fields.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _arithmetic(options: Options) -> dict[str, Any]:
    return {"accelerator": options.accelerator, "devices": options.devices, "precision": options.precision}


def is_first() -> bool:
    """Whether this is the process that writes: under torchrun, or among those that Lightning starts for --devices."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0))) == 0


def _devices(options: Options) -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", options.devices))


def _command(which: Recipe, config: Any, options: Options, seed: int) -> str:
    """The command that makes this result again: the recipe and all that differs from its defaults."""
    usual = _flat(asdict(which.config())) | {"accelerator": "auto", "devices": 1, "precision": "32-true"}
    words = ["legato-papers", "train", which.name]
    for key, value in (_flat(asdict(config)) | _arithmetic(options)).items():
        if value != usual[key]:
            text = f"{value:.15g}" if isinstance(value, float) else json.dumps(value).strip('"')
            words += [f"--{key}", text]
    return shlex.join([*words, "--seed", str(seed)])
