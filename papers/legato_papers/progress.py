"""What a person sees of a training run: a bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from .task import Task

_BAR_SECONDS = 0.2  # between two drawings of the bar
_LINE_SECONDS = 10.0  # between two plain lines


class Progress(Callback):
    """Updates done, time left, the last and the best validation figure. In a step it costs one comparison of clocks."""

    def __init__(self, task: Task, updates: int, seed: int, best: Callable[[], dict[str, float] | None]) -> None:
        self.task, self.updates, self.seed, self.best = task, updates, seed, best
        self.console = Console(highlight=False)
        self.bar: Bar | None = None
        self.drawn = self.printed = 0.0

    def on_train_start(self, trainer: Trainer, learner: LightningModule) -> None:
        if not trainer.is_global_zero or not self.console.is_terminal:
            return
        columns = (
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("updates,"),
            TimeRemainingColumn(),
            TextColumn("left"),
        )
        self.bar = Bar(
            TextColumn(f"seed {self.seed}"),
            *columns,
            TextColumn("{task.fields[figures]}"),
            console=self.console,
            auto_refresh=False,
        )
        self.bar.start()
        self.row = self.bar.add_task("", total=self.updates, completed=trainer.global_step, figures="")

    def on_train_batch_end(
        self, trainer: Trainer, learner: LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        if self.bar is not None and time.perf_counter() - self.drawn > _BAR_SECONDS:
            self.drawn = time.perf_counter()
            self.bar.update(self.row, completed=trainer.global_step, refresh=True)

    def on_train_epoch_end(self, trainer: Trainer, learner: Any) -> None:
        best = self.best()
        if not trainer.is_global_zero or best is None:
            return
        metric, status = self.task.metric, self.task.status()
        figures = f"validation {metric} {learner.figures[metric]:.4f}, best {best[metric]:.4f}"
        figures += f", {status}" if status else ""
        if self.bar is not None:
            self.bar.update(self.row, completed=trainer.global_step, figures=figures, refresh=True)
        elif (
            trainer.global_step >= self.updates
            or trainer.should_stop
            or time.perf_counter() - self.printed > _LINE_SECONDS
        ):
            self.printed = time.perf_counter()
            line = f"  seed {self.seed}  update {trainer.global_step:>6,} of {self.updates:,}  {figures}"
            self.console.print(line, soft_wrap=True)

    def on_exception(self, trainer: Trainer, learner: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, learner, "fit")

    def teardown(self, trainer: Trainer, learner: LightningModule, stage: str) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
