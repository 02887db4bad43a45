"""``legato-papers demo``: train on Mackey-Glass, run the network as a stream, compare speeds and the paper's result."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from legato._shapes import Tensor
from legato.layers.recurrent_lmu import RecurrentLMU
from legato.models import SequenceRegressor

from .locks import contents, owned
from .recipes import recipe
from .recipes.mackey_glass import Config, MackeyGlass, Model, network
from .report import paper_and_measured
from .run import Options, open_checkpoint, train
from .task import ExperimentError

_EPOCHS = 8  # of the recipe's 40: less than a minute, and already below the paper's error
_ROUNDS = 3


def demo(out: Path, epochs: int = _EPOCHS) -> None:
    """Train, stream, measure and draw; everything is printed, the run and ``demo.png`` are in ``out``."""
    console = Console(highlight=False)
    if out.is_dir() and contents(out) and not (out / "seed-0" / "config.yaml").exists():
        raise ExperimentError(f"{out} holds something else than a demo: choose another folder with --out")
    with owned(out, "--out"):
        _demo(out, epochs, console)


def _demo(out: Path, epochs: int, console: Console) -> None:
    _choose_threads()
    console.rule("1  train in parallel over time", align="left")
    which = recipe("mackey-glass")
    config = Config()
    config.training.epochs = epochs
    options = Options(
        seeds=[],
        seed=0,
        run_dir=out,
        resume=False,
        overwrite=True,
        data_dir=None,
        accelerator="cpu",
        devices=1,
        precision="32-true",
    )
    results = train(which, config, options)
    console.print(f"trained in {results[0]['seconds']:.0f} s\n")

    console.rule("2  run as a stream, one step at a time", align="left")
    task = cast(MackeyGlass, open_checkpoint(out / "seed-0" / "best.ckpt")[0])
    difference, milliseconds = stream(cast(SequenceRegressor, task.model), task)
    console.print(f"{config.data.steps:,} steps of a test series, {milliseconds:.2f} ms a step")
    console.print(f"largest difference from the predictions of one parallel pass: {difference:.1e}\n")

    console.rule("3  speed of a training step, parallel and sequential", align="left")
    console.print(compare_speed(config.model))

    console.rule("4  paper and measured", align="left")
    console.print(paper_and_measured("mackey-glass", results))
    console.print("after 100 points: fed the 100 points before each series, which the protocol drops, so not from zero")

    shutil.copy(out / "seed-0" / "prediction.png", out / "demo.png")
    console.print(f"\nprediction, error and the window in memory: [bold]{out / 'demo.png'}[/]")
    console.print("the whole schedule: [bold]legato-papers train mackey-glass --seeds 3[/]")


@torch.no_grad()
def stream(model: SequenceRegressor, task: MackeyGlass) -> tuple[float, float]:
    """Largest difference between steps and one pass over the first test series, and milliseconds a step."""
    inputs, _, warm_up = (part[:1] for part in task.test.take(torch.arange(1)))
    at_once, _ = model(inputs, model(warm_up)[1])
    state = model.initial_state(1)
    for x_t in warm_up.unbind(1):
        _, state = model.step(x_t, state)
    start = time.perf_counter()
    outputs = []
    for x_t in inputs.unbind(1):
        y_t, state = model.step(x_t, state)
        outputs.append(y_t)
    seconds = time.perf_counter() - start
    return (torch.stack(outputs, 1) - at_once).abs().max().item(), 1e3 * seconds / inputs.shape[1]


def compare_speed(model: Model, batch: int = 1, steps: int = 5000) -> Table:
    """A training step of the LMU of 2021 and of 2019, of the same sizes, in turn."""
    parallel = network(model)
    head = nn.Sequential(nn.Linear(140, 80), nn.Tanh(), nn.Linear(80, 1))
    sequential = SequenceRegressor(RecurrentLMU(1, 140, order=40, theta=50), head)
    x = torch.randn(batch, steps, 1)
    seconds = _in_turn(
        {"LMU 2021, parallel": _training_step(parallel, x), "LMU 2019, sequential": _training_step(sequential, x)}
    )
    slowest = max(seconds.values())
    table = Table("network", "ms a training step", "times as fast", box=None, pad_edge=False)
    for name, value in seconds.items():
        table.add_row(name, f"{1e3 * value:,.1f}", f"{slowest / value:.0f}")
    table.title = f"{batch} series of {steps:,} steps, order 40, 140 units, {torch.get_num_threads()} threads"
    table.title_justify = "left"
    return table


def _choose_threads() -> None:
    """One thread where several are much slower: they wait on each other when another program has one of the cores."""
    step = _training_step(network(Model()), torch.randn(16, 306, 1))
    several = torch.get_num_threads()
    seconds = {}
    for threads in (several, 1):
        torch.set_num_threads(threads)
        seconds[threads] = _in_turn({"": step})[""]
    torch.set_num_threads(several if seconds[several] < 1.5 * seconds[1] else 1)


def _training_step(model: nn.Module, x: Tensor) -> Callable[[], Any]:
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        model(x)[0].square().mean().backward()
        optimizer.step()

    return step


def _in_turn(candidates: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """The median of a few rounds in which each runs once, so that a busy machine is no one's disadvantage."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(_ROUNDS + 1):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in seconds.items()}
