"""Ratios over the length of time, as tables on the terminal and as a picture, with a K80's figures beside ours."""

from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from pictures import new_figure, save


class Panel(NamedTuple):
    """One table, and one part of the picture."""

    title: str
    #: Figures by column and length.
    ours: dict[str, dict[int, float]]
    #: Those of the paper, for as many of the columns as it has.
    k80: dict[str, dict[int, float]]


def show(panels: list[Panel]) -> None:
    """Print a table for each panel: a row for each length, the K80's figure beside each of ours."""
    console = Console(highlight=False)
    for title, ours, k80 in panels:
        table = Table(box=None, pad_edge=False)
        table.add_column("length", justify="right")
        for name in ours:
            table.add_column(name, justify="right")
            if name in k80:
                table.add_column("K80", justify="right", style="dim")
        for length in dict.fromkeys(length for figures in ours.values() for length in figures):
            cells = [f"{length:,}"]
            for name, figures in ours.items():
                cells.append(_digits(figures.get(length)))
                if name in k80:
                    cells.append(_digits(k80[name].get(length)))
            table.add_row(*cells)
        console.print(f"[bold]{title}[/]", table, sep="\n")
        console.print()


def draw(panels: list[Panel], path: Path) -> None:
    """Draw every panel over the length on logarithmic axes: ours solid, the K80's dashed."""
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, axes = new_figure(len(panels))
    for axis, (title, ours, k80) in zip(axes, panels, strict=True):
        for number, (name, figures) in enumerate(ours.items()):
            colour = f"C{number}"
            axis.plot(list(figures), list(figures.values()), color=colour, marker="o", markersize=4, label=name)
            known = k80.get(name, {})
            axis.plot(list(known), list(known.values()), color=colour, linestyle="--", linewidth=1, alpha=0.8)
        if k80:
            axis.plot([], [], color="grey", linestyle="--", linewidth=1, label="K80, the paper")
        axis.axhline(1, color="#8a8f98", linewidth=0.8)
        axis.set(xscale="log", yscale="log", ylabel="times as fast")
        lengths = sorted({length for figures in [*ours.values(), *k80.values()] for length in figures})
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
