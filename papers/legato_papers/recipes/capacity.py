"""Capacity: how well a memory that nobody trained recalls its last 100,000 inputs (Voelker et al. 2019).

A parallel LMU of order 100 reads a band-limited signal and recalls it at five delays, from none to the whole window.
Its read-out is the Legendre polynomials at those delays; no weight is trained. The protocol is that of the authors'
notebook: 10 cycles a window, 2.5 windows, a start at zero, a peak of one, errors counted from the first full window on.

Three figures over the same signals. ``mse`` is the mean over the delays and ``mse_longest`` that of the longest alone,
which the paper's plot has highest: in the first half window that counts it recalls the start of the signal, a bend that
no order holds. ``mse_settled`` is the worst of the delays once the start is out of the window.
``--model.half_step false`` reads the polynomials as ``window_decoder`` has them, at the ends of steps.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, cast

import numpy as np
import torch
from numpy.polynomial.legendre import legvander
from torch import nn

from legato._shapes import Float, Tensor
from legato.layers.lmu import LMU

from ..data.drawn import drawn
from ..plots import draw_recall
from ..ranges import Count, Order, Positive, Range, Width, check
from ..task import Batch, ExperimentError, Paper, Reported, Task, Training

PAPER = Paper(
    metric="mse_longest",
    reported=Reported(1.0, "Voelker, Kajić & Eliasmith 2019, the plot in the authors' notebook", verified=True),
    parameters="500",
    unit="e-6",
    scale=1e6,
    digits=7,
)
_SETTLED = 1.5  # windows after which the memory has forgotten the start


@dataclass
class Data:
    """The signals: white noise below a cutoff, of zero mean, from a zero crossing on, with a peak of one.

    Args:
        cutoff: highest frequency, in cycles a window; the authors' is 10. Order 100 holds about 25.
        windows: length of a signal, in windows.
        validation_signals: signals for the figure that is shown during the run.
        test_signals: signals for the final figures; 100 are the authors'.
    """

    cutoff: Positive = 10.0
    windows: Annotated[float, Range(0, 10**4, above=True)] = 2.5
    validation_signals: Count = 2
    test_signals: Count = 100


@dataclass
class Model:
    """The network: parallel LMU with an encoder of one, a memory and a linear read-out, untrained.

    Args:
        order: of the memory; the paper's.
        theta: window of the memory, in steps; the paper's longest.
        delays: how many delays are recalled, evenly spread from none to the window; the paper's.
        half_step: read each input in the middle of the step for which it is held, half a step before its end.
    """

    order: Order = 100
    theta: Annotated[int, Range(2, 10**9)] = 100_000
    delays: Width = 5
    half_step: bool = True


@dataclass
class Untrained(Training):
    """Nothing is learned: one update with a learning rate of zero.

    A learning rate above zero trains the read-out, as the paper does next; the memory has nothing to train.
    """

    epochs: int = 1
    updates_per_epoch: int | None = 1
    batch_size: int = 1
    learning_rate: Annotated[float, Range(0, 1000)] = 0.0
    schedule: Literal["one-cycle", "linear", "constant"] = "constant"


@dataclass
class Config:
    """Capacity: recall a signal over a window of 100,000 steps from 100 numbers, untrained."""

    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    training: Untrained = field(default_factory=Untrained)


def build(config: Config, seed: int, data_dir: Path | None = None) -> "Capacity":
    """The task of this configuration; ``seed`` is that of the signals in training, if there is any."""
    check(config)
    return Capacity(config, seed)


class Capacity(Task):
    metric, higher_is_better = "mse_longest", False

    def __init__(self, config: Config, seed: int) -> None:
        _check(config)
        data, self.theta = config.data, config.model.theta
        self.data = data
        self.delays = np.linspace(0, self.theta, config.model.delays).astype(int)
        self.model = network(config.model, self.delays)

        def signals(stream: str, stream_seed: int, size: int, batch_size: int):
            def draw(random: np.random.Generator) -> tuple[np.ndarray]:
                return (band_limited(random, self.steps(data.windows), data.cutoff / self.theta)[:, None],)

            return drawn(draw, stream, stream_seed, size, batch_size)

        self.train = signals("train", seed, 100, config.training.batch_size)
        self.validation = signals("validation", 0, data.validation_signals, 1)
        self.test = signals("test", 0, data.test_signals, 1)

    def steps(self, windows: float) -> int:
        """Whole steps in so many windows."""
        return round(windows * self.theta)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.squares(model, batch).mean()

    def totals(self, model: nn.Module, batch: Batch) -> Tensor:
        squares = self.squares(model, batch)
        settled = squares[:, self.steps(_SETTLED) - self.theta :]
        sums = [part.mean(1).sum(0) for part in (squares, settled)]  # (delays,)
        return torch.cat([*sums, squares.new_tensor([len(squares)])])

    def squares(self, model: nn.Module, batch: Batch) -> Float[Tensor, "B T delays"]:
        """Squared errors in float64 from the first full window on."""
        (signals,) = batch
        recalled, _ = model(signals.to(next(model.parameters()).dtype))
        end = signals.shape[1]
        targets = [signals[:, self.theta - delay : end - delay] for delay in self.delays]
        return (recalled[:, self.theta :].double() - torch.cat(targets, dim=-1)).square()

    def metrics(self, totals: Tensor) -> dict[str, float]:
        whole, settled = (totals[:-1] / totals[-1]).chunk(2)
        return {"mse_longest": whole[-1].item(), "mse": whole.mean().item(), "mse_settled": settled.max().item()}

    def plot(self, model: nn.Module, folder: Path) -> None:
        """Settled error against delay, at the cutoff of this run and above."""
        delays = np.linspace(0, self.theta, 101).astype(int)
        curves = {}
        for factor in (1.0, 2.5, 2.7, 3.0, 3.5):
            cutoff = factor * self.data.cutoff
            curves[f"{cutoff:g} cycles a window"] = recall_errors(cast(LMU, model), self.theta, delays, cutoff)
        draw_recall(torch.from_numpy(delays), curves, folder / "recall.png")


def network(config: Model, delays: np.ndarray) -> LMU:
    """u = x, the memory of u, and W_m = the Legendre polynomials at the delays: W_m could be trained, 500 numbers."""
    layer = LMU(
        1,
        len(delays),
        order=config.order,
        theta=config.theta,
        activation="identity",
        input_to_output=False,
        bias=False,
    )
    layer.encoder.requires_grad_(False)
    with torch.no_grad():
        layer.encoder.weight.fill_(1)
        layer.memory_to_output.weight.copy_(read_out(config.order, delays, config.theta, half_step=config.half_step))
    return layer


def read_out(order: int, delays: np.ndarray, theta: int, *, half_step: bool = True) -> Float[Tensor, "delays order"]:
    """D[k, i] = P_i(2 r_k - 1), r_k = (delay_k + 1/2) / theta: the middle of the step that lies so many steps back.

    Without the half step these are the rows of ``legato.legendre.window_decoder``.
    """
    middle = delays + (0.5 if half_step else 0.0)
    return torch.from_numpy(legvander(2 * middle / theta - 1, order - 1))


def band_limited(random: np.random.Generator, steps: int, cutoff: float) -> Float[np.ndarray, " steps"]:
    """White noise below ``cutoff`` cycles a step and without a mean, periodic in ``steps``, from zero on, peak one."""
    harmonics = int(cutoff * steps)
    spectrum = np.zeros(steps // 2 + 1, dtype=complex)
    spectrum[1 : harmonics + 1] = random.normal(size=harmonics) + 1j * random.normal(size=harmonics)
    wave = np.fft.irfft(spectrum, steps)
    wave = np.roll(wave, -int(np.abs(wave).argmin()))
    return wave / np.abs(wave).max()


@torch.no_grad()
def recall_errors(layer: LMU, theta: int, delays: np.ndarray, cutoff: float) -> Float[Tensor, " delays"]:
    """Mean squared error at every delay, settled, on a signal of another cutoff; every 97th step is looked at."""
    steps, settled = round(3 * theta), round(_SETTLED * theta)
    signal = torch.from_numpy(band_limited(np.random.default_rng(0), steps, cutoff / theta))
    memory, _ = layer.memory(signal.to(layer.encoder.weight.dtype)[None, :, None])
    looked_at = torch.arange(settled, steps, 97)
    recalled = memory[0, looked_at, 0].double() @ read_out(layer.memory.order, delays, theta).T
    past = torch.stack([signal[looked_at - delay] for delay in delays.tolist()], dim=1)
    return (recalled - past).square().mean(0)


def _check(config: Config) -> None:
    data, model = config.data, config.model
    if data.windows * model.theta < _SETTLED * model.theta + 1:
        raise ExperimentError(
            f"expected --data.windows above {_SETTLED}, after which errors are counted, got {data.windows}"
        )
    least, most = 1 / data.windows, model.theta / 2
    if not least <= data.cutoff < most:
        raise ExperimentError(
            f"expected --data.cutoff from {least:g}, one cycle in a signal, to below {most:g}, two steps a cycle, got "
            f"{data.cutoff}"
        )
