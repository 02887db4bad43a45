"""Pictures that compare candidates: bars for separate sizes, curves for a size that grows."""

from pathlib import Path
from typing import Any, cast

_OURS, _PEER = "#1f5fbf", "#8a8f98"
_CURVES = ("#c0392b", "#2e8b57", "#8e5ea2", "#d98c1f", "#6b7280", "#17a2b8", "#a05a2c", "#111827", "#c2a800")


def new_figure(rows: int) -> tuple[Any, list[Any]]:
    """A figure without a display, and its axes in one column."""
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


def save(figure: Any, path: Path) -> None:
    """Write the PNG and close the figure."""
    from matplotlib import pyplot

    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def bars(panels: dict[str, list[dict]], path: Path) -> None:
    """One panel per title: the median time of every row, fastest first, on a logarithmic axis."""
    panels = {title: sorted(_timed(rows), key=lambda row: row["median_ms"]) for title, rows in panels.items()}
    figure, axes = new_figure(len(panels))
    figure.set_size_inches(10, 1 + sum(0.8 + 0.36 * len(rows) for rows in panels.values()))
    for axis, (title, rows) in zip(axes, panels.items(), strict=True):
        times = [row["median_ms"] for row in rows]
        names = [f"{row['by']} ({row['version'].split()[-1]})" for row in rows]
        spread = [
            [row["median_ms"] - row["min_ms"] for row in rows],
            [row["max_ms"] - row["median_ms"] for row in rows],
        ]
        drawn = axis.barh(names, times, color=[_OURS if _is_ours(row) else _PEER for row in rows], xerr=spread,
                          error_kw={"ecolor": "#30343b", "elinewidth": 0.8})  # fmt: skip
        ours = min((row["median_ms"] for row in rows if _is_ours(row)), default=None)
        labels = [f"{_number(time)} ms" + (f", {_number(time / ours)} x" if ours else "") for time in times]
        high = max(row["max_ms"] for row in rows)
        for bar, row, label in zip(drawn, rows, labels, strict=True):
            axis.text(row["max_ms"] * 1.08, bar.get_y() + bar.get_height() / 2, label, va="center", fontsize=9)
        axis.set(xscale="log", xlim=(min(times) / 3, high * 6), xlabel="milliseconds")
        axis.xaxis.set_major_formatter("{x:,g}")
        axis.set_title(title, loc="left", fontweight="bold")
        axis.invert_yaxis()
    save(figure, path)


def curves(panels: dict[str, list[dict]], x: dict[str, str], path: Path) -> None:
    """One panel per title: median time over ``x[title]``, one curve per candidate, both logarithmic."""
    names = sorted({row["by"] for rows in panels.values() for row in _timed(rows) if not _is_ours(row)})
    colours = dict(zip(names, _CURVES * (1 + len(names) // len(_CURVES)), strict=False))
    figure, axes = new_figure(len(panels))
    figure.set_size_inches(9, 3.8 * len(panels))
    for axis, (title, rows) in zip(axes, panels.items(), strict=True):
        found: dict[str, list[dict]] = {}
        for row in _timed(rows):
            found.setdefault(row["by"], []).append(row)
        for name, own in found.items():
            ours = _is_ours(own[0])
            axis.plot(
                [row[x[title]] for row in own],
                [row["median_ms"] for row in own],
                marker="o",
                markersize=3.5,
                linewidth=2.4 if ours else 1.2,
                color=_OURS if ours else colours[name],
                label=name,
                zorder=3 if ours else 2,
            )
        ticks = sorted({row[x[title]] for row in rows})
        axis.set(xscale="log", yscale="log", xlabel=x[title], ylabel="milliseconds")
        axis.yaxis.set_major_formatter("{x:,g}")
        axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axis.minorticks_off()
        axis.set_title(title, loc="left", fontweight="bold")
        axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
    save(figure, path)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _timed(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row.get("median_ms") is not None]


def _is_ours(row: dict) -> bool:
    return row["version"].startswith("legato ")
