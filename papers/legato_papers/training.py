"""How an experiment is trained: Lightning's Trainer, and around it the data order, the log and the checkpoints.

The epoch is the unit: its batches and its random numbers are a pure function of (seed, epoch), and after each one the
network is validated, a line goes to ``metrics.jsonl`` and a checkpoint is kept. A killed run repeats at most one epoch,
to the bit. Next: ``run.py`` calls ``fit`` for every seed.
"""

import copy
import json
import logging
import math
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import CheckpointIO
from torch import nn

from legato._modes import evaluating
from legato._shapes import Tensor

from . import checkpoint as checkpoints
from .errors import ExperimentError
from .progress import Progress
from .task import Batch, Examples, Task, Training


@dataclass
class Device:
    """Where and in which arithmetic a network is trained; the words are Lightning's."""

    accelerator: str
    devices: int
    precision: str

    def trainer(self, **options: Any) -> Trainer:
        """A Trainer for this device.

        Raises:
            ExperimentError: there is no such device here, or it has no such arithmetic.
        """
        _quieten_lightning()
        try:
            return Trainer(
                accelerator=self.accelerator,
                devices=self.devices,
                precision=self.precision,  # type: ignore[arg-type]
                num_nodes=_nodes(),
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                num_sanity_val_steps=0,
                use_distributed_sampler=False,
                **options,
            )
        except (MisconfigurationException, ValueError, RuntimeError, ImportError) as error:
            raise ExperimentError(
                f"cannot train with --accelerator {self.accelerator} --devices {self.devices} --precision "
                f"{self.precision}: {' '.join(str(error).split())}: choose what this machine has"
            ) from error


class Diverged(ExperimentError, FloatingPointError):
    """Training that has gone to infinity or NaN."""


def fit(
    task: Task, training: Training, seed: int, folder: Path, device: Device, about: dict[str, Any]
) -> dict[str, Any]:
    """Train, choose the weights with the best validation figure, test them once.

    Args:
        task: model, data, loss and metric.
        training: optimiser and schedule.
        seed: of the data order and of the random numbers in the model.
        folder: for checkpoints and logs; if it holds ``last.ckpt``, training goes on from there.
        device: accelerator, number of devices, precision.
        about: plain values written into every checkpoint, from which ``evaluate`` builds the network again.

    Returns:
        dict: ``validation`` and ``test`` figures of the best weights, their ``epoch``, ``updates`` and ``seconds``; of
            text ``tokens_per_second``, validation left out.

    Raises:
        CheckpointError: a checkpoint cannot be written or read, or is of another run.
        ExperimentError: there is no such device here, or more processes than examples in a batch.
        Diverged: the loss or the validation figure is not finite.
    """
    learner = Learner(task, training, seed)
    keeper = RunFolder(folder, about)
    trainer = device.trainer(
        max_epochs=training.epochs,
        gradient_clip_val=training.max_norm,
        callbacks=[keeper, Progress(task, training.epochs * learner.updates, seed, lambda: keeper.best)],
        plugins=[WholeCheckpoints()],
    )
    if training.batch_size < trainer.world_size:
        raise ExperimentError(
            f"expected --training.batch_size to be {trainer.world_size} or more, one example for each process, got "
            f"{training.batch_size}"
        )
    last = folder / "last.ckpt"
    try:
        trainer.fit(learner, ckpt_path=str(last) if last.exists() else None, weights_only=True)
    except SystemExit:
        if trainer.interrupted:  # Lightning turns Ctrl-C into an exit without a word
            raise KeyboardInterrupt from None
        raise
    # Every process reads what the first one wrote; only that one knows a folder named after the time.
    best = checkpoints.load(Path(trainer.strategy.broadcast(str(folder))) / "best.ckpt")
    learner.tested_model.load_state_dict(best["model"])
    learner.to(trainer.strategy.root_device)
    test = learner.evaluate(task.test)
    outcome = {
        "validation": keeper.best,
        "test": test,
        "epoch": keeper.best_epoch,
        "updates": trainer.global_step,
        "seconds": round(keeper.seconds, 1),
    }
    if keeper.tokens:
        outcome["tokens_per_second"] = round(keeper.tokens / keeper.training_seconds)
    return outcome | task.outcome()


class Learner(LightningModule):
    """A task as Lightning wants it. Nothing is logged in a step: a sum on the device is read once an epoch."""

    def __init__(self, task: Task, training: Training, seed: int) -> None:
        super().__init__()
        self.task, self.training_config, self.seed = task, training, seed
        self.model = task.model
        self.average = copy.deepcopy(task.model).requires_grad_(False) if training.average else None
        self.updates = training.updates_per_epoch or task.train.updates_per_pass

    @property
    def tested_model(self) -> nn.Module:
        """The network whose figures count: the running mean of the weights, if there is one."""
        return self.average or self.model

    def train_dataloader(self) -> "Stream":
        return Stream(self, self.updates)

    def val_dataloader(self) -> list[int]:
        return [0]  # one step, which evaluates everything: see validation_step

    def configure_optimizers(self) -> Any:
        config = self.training_config
        groups: dict[tuple[float, bool], Any] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                rate, matrix = self.task.rate(name), parameter.ndim >= 2
                decay = config.weight_decay if matrix else 0.0
                group = {"params": [], "lr": rate * config.learning_rate, "weight_decay": decay}
                groups.setdefault((rate, matrix), group)["params"].append(parameter)
        # Fused, an update of small weights takes a fifth of the time; Lightning refuses it in mixed precision.
        fused = self.trainer.precision in ("32-true", "64-true")
        optimizer = torch.optim.AdamW(list(groups.values()), lr=config.learning_rate, eps=config.epsilon, fused=fused)
        total = config.epochs * self.updates
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: learning_rate(config, update, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_epoch_start(self) -> None:
        torch.manual_seed(1_000_003 * self.seed + 1009 * self.current_epoch + self.global_rank)
        self.loss_sum, self.tokens = torch.zeros((), device=self.device), 0
        _forget_kernels(self.model)

    def training_step(self, batch: Batch, index: int) -> Tensor:
        loss = self.task.loss(self.model, batch)
        self.loss_sum += loss.detach()
        self.tokens += self.task.tokens(batch)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Batch, index: int) -> None:
        if self.average is not None:
            with torch.no_grad():
                torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
                    list(self.average.parameters()), list(self.model.parameters()), 1 - self.training_config.average
                )

    def validation_step(self, batch: Any, index: int) -> None:
        self.figures = self.evaluate(self.task.validation)

    def evaluate(self, examples: Examples) -> dict[str, float]:
        """The task's figures over all examples, of the network whose figures count; every device takes its share."""
        model, strategy = self.tested_model, self.trainer.strategy
        _forget_kernels(model)
        with evaluating(model), strategy.precision_plugin.val_step_context():
            convert = strategy.precision_plugin.convert_input
            totals = self.task.total(model, examples, self.global_rank, self.trainer.world_size, convert)
        if self.trainer.world_size > 1:
            totals = strategy.reduce(totals.to(strategy.root_device), reduce_op="sum").cpu()  # type: ignore[union-attr]
        return self.task.metrics(totals)


class Stream:
    """The batches of the epoch. Each of n devices takes every n-th example, so together they see what one would."""

    def __init__(self, learner: Learner, updates: int) -> None:
        self.learner, self.updates = learner, updates

    def __len__(self) -> int:
        return self.updates

    def __iter__(self) -> Iterator[Batch]:
        learner, examples = self.learner, self.learner.task.train
        for indices in examples.shuffled(learner.seed, learner.current_epoch, self.updates):
            yield examples.take(indices[learner.global_rank :: learner.trainer.world_size])


class RunFolder(Callback):
    """After every epoch: a line in ``metrics.jsonl``, points in TensorBoard, ``last.ckpt``; a ``best.ckpt``.

    How long it took stands in ``seconds.jsonl``: the others are the same whenever a run is repeated.
    """

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self.folder, self.about = folder, about
        self.best: dict[str, float] | None = None
        self.figures: dict[str, float] = {}
        self.best_epoch = -1
        self.seconds = self.training_seconds = 0.0
        self.tokens = 0

    def state_dict(self) -> dict[str, Any]:
        kept = ("best", "figures", "best_epoch", "seconds", "training_seconds", "tokens")
        return {name: getattr(self, name) for name in kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)

    def on_save_checkpoint(self, trainer: Trainer, learner: Learner, checkpoint: dict[str, Any]) -> None:  # type: ignore[override]
        checkpoint |= {"format": checkpoints.FORMAT, "about": self.about, "task": learner.task.state()}

    def on_load_checkpoint(self, trainer: Trainer, learner: Learner, checkpoint: dict[str, Any]) -> None:  # type: ignore[override]
        if checkpoint.get("about") != self.about:
            raise checkpoints.CheckpointError(
                f"{self.folder / 'last.ckpt'} is of another recipe, seed or configuration than asked for now: resume "
                "with the same ones, or choose another --run-dir"
            )
        learner.task.restore(checkpoint.get("task", {}))

    def on_train_start(self, trainer: Trainer, learner: Learner) -> None:  # type: ignore[override]
        self.started = time.perf_counter()
        trainer.should_stop = self.best is not None and learner.task.finished(self.figures)
        if trainer.is_global_zero:
            from torch.utils.tensorboard import SummaryWriter

            for log in ("metrics.jsonl", "seconds.jsonl"):
                _keep_lines(self.folder / log, trainer.current_epoch)
            self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=trainer.global_step + 1)

    def on_validation_start(self, trainer: Trainer, learner: Learner) -> None:  # type: ignore[override]
        self.training_seconds += time.perf_counter() - self.started

    def on_train_epoch_end(self, trainer: Trainer, learner: Learner) -> None:  # type: ignore[override]
        figures = learner.figures
        loss = float(learner.loss_sum) / learner.updates
        row = {"epoch": trainer.current_epoch, "update": trainer.global_step, "loss": loss}
        row |= {f"validation_{name}": value for name, value in figures.items()}
        self.tokens += trainer.world_size * learner.tokens
        self.seconds += time.perf_counter() - self.started
        self.started = time.perf_counter()
        if trainer.is_global_zero:
            time_row = {"update": trainer.global_step, "seconds": round(self.seconds, 3)}
            for log, line in (("metrics.jsonl", row), ("seconds.jsonl", time_row)):
                with open(self.folder / log, "a") as file:
                    file.write(json.dumps(line) + "\n")
            for name, value in row.items():
                if name not in ("epoch", "update"):
                    self.board.add_scalar(name, value, trainer.global_step)
        if not math.isfinite(loss):
            raise Diverged(
                f"the training loss is {loss} in epoch {trainer.current_epoch}: lower --training.learning_rate"
            )
        metric, sign = learner.task.metric, 1 if learner.task.higher_is_better else -1
        if not math.isfinite(figures[metric]):
            raise Diverged(
                f"the validation {metric} is {figures[metric]} in epoch {trainer.current_epoch}: lower "
                "--training.learning_rate, or give more validation data"
            )
        if self.best is None or learner.task.keeps_last or sign * figures[metric] > sign * self.best[metric]:
            self.best, self.best_epoch = figures, trainer.current_epoch
            if trainer.is_global_zero:
                weights = learner.tested_model.state_dict()
                best = {"format": checkpoints.FORMAT, "about": self.about, "figures": figures, "model": weights}
                checkpoints.save(best, self.folder / "best.ckpt")
        self.figures = figures
        trainer.save_checkpoint(self.folder / "last.ckpt")
        trainer.should_stop = learner.task.finished(figures)

    def teardown(self, trainer: Trainer, learner: LightningModule, stage: str) -> None:
        if hasattr(self, "board"):
            self.board.close()


class WholeCheckpoints(CheckpointIO):
    """Lightning's checkpoints through ours: atomic, and read without executing anything."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        checkpoints.save(checkpoint, Path(path))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return checkpoints.load(Path(path), device=map_location or "cpu")

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


def learning_rate(config: Training, update: int, total: int) -> float:
    """Factor on the peak learning rate: rises over ``warmup`` of all updates, then falls to zero by ``schedule``."""
    if config.schedule == "constant":
        return 1.0
    rise = config.warmup * total
    if update < rise:
        return 0.04 + 0.96 * update / rise
    left = (total - update) / max(1.0, total - rise)
    return max(0.0, left) if config.schedule == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)


def _keep_lines(path: Path, count: int) -> None:
    """Cut a log to its first lines: what a killed run wrote after its last checkpoint will be written again."""
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)[:count]
        checkpoints.write_atomically(path, lambda file: file.write("".join(lines).encode()))


def _nodes() -> int:
    return int(os.environ.get("GROUP_WORLD_SIZE", 1))


def _forget_kernels(model: nn.Module) -> None:
    """Layers keep kernels for the longest sequence seen and round by them; an epoch must not depend on earlier ones."""
    model.to(next(model.parameters()).device)  # moving a layer, even to where it is, drops them


def _quieten_lightning() -> None:
    """Its tips, its list of absent devices and its warnings about things done here on purpose; errors stay."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
