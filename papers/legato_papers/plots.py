"""Pictures of runs. matplotlib is imported when one is drawn, and needs no display."""

import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from legato._shapes import Tensor
from legato.layers.lmu import LMU
from legato.legendre import window_decoder

_TARGET, _OURS, _ERROR = "#8a8f98", "#1f5fbf", "#c0392b"


def draw_prediction(model: nn.Module, wave: Tensor, targets: Tensor, state: Any, ahead: int, path: Path) -> None:
    """Prediction, error and, for a parallel LMU, the window that its memory remembers: 400 steps of a series.

    Args:
        model: a trained ``SequenceRegressor``.
        wave: inputs, (1, T, 1).
        targets: what is to be predicted, (1, T, 1).
        state: the model's state before the first step.
        ahead: steps between input and target.
        path: the PNG to write.
    """
    steps = min(400, wave.shape[1])
    wave, targets = wave[:, :steps], targets[:, :steps]
    with torch.no_grad():
        predictions, _ = model(wave, state)
    error = (predictions - targets)[0, :, 0]
    layer = model.layer
    figure, axes = _figure(3 if isinstance(layer, LMU) else 2)
    time = torch.arange(steps)
    share = error.square().mean().sqrt() / targets.square().mean().sqrt()
    axes[0].plot(time, targets[0, :, 0], color=_TARGET, linewidth=3, label="series")
    axes[0].plot(time, predictions[0, :, 0], color=_OURS, linewidth=1.2, label="prediction")
    axes[0].set(ylabel="value", title=f"Mackey-Glass, a test series {ahead} steps ahead")
    axes[1].axhline(0, color=_TARGET, linewidth=0.8)
    axes[1].plot(time, error, color=_ERROR, linewidth=1, label=f"prediction - series, NRMSE {share:.4f} here")
    axes[1].set(ylabel="error", xlabel="step", title="Error")
    axes[1].sharex(axes[0])
    axes[0].margins(x=0)
    if isinstance(layer, LMU):
        _draw_window(axes[2], layer, wave, state)
    for axis in axes:
        title = axis.get_title()
        axis.set_title("")
        axis.set_title(title, loc="left", fontweight="bold")
        legend = axis.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False, ncols=2, borderaxespad=0)
        legend.set_in_layout(False)  # it stands on the axes, beside the title
    _save(figure, path)


def draw_curves(log: Path, path: Path) -> None:
    """Loss and validation figures over the updates, from ``metrics.jsonl``."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    names = [name for name in rows[0] if name not in ("epoch", "update")]
    figure, axes = _figure(len(names))
    for axis, name in zip(axes, names, strict=True):
        axis.plot([row["update"] for row in rows], [row[name] for row in rows], color=_OURS, marker=".")
        axis.set(ylabel=name.replace("_", " "), xlabel="update")
        if "accuracy" not in name:
            axis.set_yscale("log")
    _save(figure, path)


def draw_recall(delays: Tensor, curves: dict[str, Tensor], path: Path) -> None:
    """Mean squared error of what a memory recalls against the delay, a curve for each of several signals."""
    figure, (axis,) = _figure(1)
    for number, (name, errors) in enumerate(curves.items()):
        axis.plot(delays, errors, color=_OURS, alpha=1 - 0.8 * number / len(curves), label=name)
    axis.set(xlabel="delay in steps", ylabel="mean squared error", yscale="log")
    axis.legend(frameon=False, loc="center")
    _save(figure, path)


def _draw_window(axis: Any, layer: LMU, wave: Tensor, state: Any) -> None:
    """The last theta inputs, and the same read from the memory alone."""
    theta = float(layer.memory.window())
    with torch.no_grad():
        memory = layer(wave, state)[1].memory[0, 0].double()
        decoded = window_decoder(layer.memory.order, 200) @ memory  # u over the window, now first
        bias = 0.0 if layer.encoder.bias is None else layer.encoder.bias.item()
        decoded = (decoded - bias) / layer.encoder.weight.item()
    past = torch.arange(int(theta) + 1)
    # An input is held for the step that ends when it is read: its middle is half a step ago.
    ago = torch.linspace(0, theta, 200) - 0.5
    axis.plot(-past, wave[0, :, 0].flip(0)[: len(past)], "o", color=_TARGET, markersize=5, label="inputs")
    axis.plot(-ago, decoded, color=_OURS, linewidth=1.4, label=f"read from the {layer.memory.order} numbers in memory")
    axis.set(
        ylabel="value",
        xlabel="steps before the last one shown above",
        title=f"What the memory holds of the last {theta:g} steps",
    )
    axis.margins(x=0.01)


def _figure(rows: int) -> tuple[Any, list[Any]]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style: dict[Any, Any] = {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "font.size": 10,
    }
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(rows, 1, figsize=(10, 3.1 * rows), layout="constrained", squeeze=False)
    return figure, cast(list[Any], list(axes[:, 0]))


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, dpi=130)
    pyplot.close(figure)
