"""Ratios by sequence length, compared with those of a K80, as tables and as a picture."""

from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from pictures import new_figure, save


class Panel(NamedTuple):
    """One table, and one panel of the picture."""

    title: str
    #: Our values by column and length.
    ours: dict[str, dict[int, float]]
    #: The values of the paper, for the columns that it has.
    k80: dict[str, dict[int, float]]


def show(panels: list[Panel]) -> None:
    """Print one table per panel: one row per length, with the value of the K80 next to ours."""
    console = Console(highlight=False)
    for title, ours, k80 in panels:
        table = Table(box=None, pad_edge=False)
        table.add_column("length", justify="right")
        for name in ours:
            table.add_column(name, justify="right")
            if name in k80:
                table.add_column("K80", justify="right", style="dim")
        for length in dict.fromkeys(length for values in ours.values() for length in values):
            cells = [f"{length:,}"]
            for name, values in ours.items():
                cells.append(_digits(values.get(length)))
                if name in k80:
                    cells.append(_digits(k80[name].get(length)))
            table.add_row(*cells)
        console.print(f"[bold]{title}[/]", table, sep="\n")
        console.print()


def draw(panels: list[Panel], path: Path) -> None:
    """Draw every panel over the length, with logarithmic axes: solid for ours, dashed for K80."""
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, axes = new_figure(len(panels))
    for axis, (title, ours, k80) in zip(axes, panels, strict=True):
        for number, (name, values) in enumerate(ours.items()):
            colour = f"C{number}"
            axis.plot(list(values), list(values.values()), color=colour, marker="o", markersize=4, label=name)
            known = k80.get(name, {})
            axis.plot(list(known), list(known.values()), color=colour, linestyle="--", linewidth=1, alpha=0.8)
        if k80:
            axis.plot([], [], color="grey", linestyle="--", linewidth=1, label="K80, the paper")
        axis.axhline(1, color="#8a8f98", linewidth=0.8)
        axis.set(xscale="log", yscale="log", ylabel="times as fast")
        lengths = sorted({length for values in [*ours.values(), *k80.values()] for length in values})
        axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axis.set_xticks([], minor=True)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_title(title, loc="left", fontweight="bold")
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    axes[-1].set_xlabel("length")
    save(figure, path)


def _digits(value: float | None) -> str:
    """Three significant digits, without an exponent."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
