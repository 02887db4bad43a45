"""Rows as tables, in a terminal or in Markdown, and targets as a picture."""

from itertools import groupby
from pathlib import Path
from typing import Any

from pictures import new_figure, save

_MET, _SHORT = "#1f5fbf", "#c0392b"


def text(rows: list[dict]) -> str:
    """The rows as aligned columns; rows with different columns are separate tables."""
    return "\n\n".join(map(_aligned, tables(rows)))


def markdown(rows: list[dict]) -> str:
    return "\n\n".join(map(_marked, tables(rows)))


def tables(rows: list[dict]) -> list[list[list[str]]]:
    """The cells of each group of rows with equal columns, headings first; three digits."""
    found = []
    for columns, group in groupby([_merged(row) for row in rows], key=lambda row: tuple(row)):
        found.append([list(columns), *([_cell(value) for value in row.values()] for row in group)])
    return found


def target_rows(judged: list[dict]) -> list[dict]:
    """The rows of a table of targets."""
    return [
        {
            "target": t["target"],
            "bound": f"{'at most' if t['at_most'] else 'at least'} {_cell(t['bound'])} {t['unit']}".strip(),
            "measured": "not measured" if t["measured"] is None else f"{_cell(t['measured'])} {t['unit']}".strip(),
            "met": {True: "yes", False: "no", None: ""}[t["met"]],
        }
        for t in judged
    ]


def draw_targets(judged: list[dict], path: Path) -> None:
    """One bar per target: how many times better than the target, 1 if it is exactly met."""
    known = [t for t in judged if t["measured"]]
    if not known:
        return
    times = [t["bound"] / t["measured"] if t["at_most"] else t["measured"] / t["bound"] for t in known]
    figure, (axis,) = new_figure(1)
    figure.set_size_inches(10, 1 + 0.45 * len(known))
    colours = [_MET if t["met"] else _SHORT for t in known]
    bars = axis.barh([t["target"] for t in known], [ratio - 1 for ratio in times], left=1, color=colours)
    axis.bar_label(bars, [row["measured"] for row in target_rows(known)], padding=4)
    axis.set_axisbelow(True)
    axis.axvline(1, color="#30343b", linewidth=1)
    axis.set(xscale="log", xlabel="times better than the target")
    axis.set_xlim(min(0.5, *times) / 2, max(2, *times) * 2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.invert_yaxis()
    save(figure, path)


def _merged(row: dict) -> dict[str, Any]:
    """median_ms, min_ms and max_ms as one column, "ms (min to max)", without the number of
    rounds."""
    merged: dict[str, Any] = {}
    for key, value in row.items():
        kind, _, unit = key.partition("_")
        if kind == "median" and {f"min_{unit}", f"max_{unit}"} <= row.keys():
            spread = f"{_cell(row[f'min_{unit}'])} to {_cell(row[f'max_{unit}'])}"
            merged[f"{unit} (min to max)"] = f"{_cell(value)} ({spread})"
        elif key != "rounds" and not (kind in ("min", "max") and f"median_{unit}" in row):
            merged[key] = value
    return merged


def _aligned(cells: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def _marked(cells: list[list[str]]) -> str:
    lines = [" | ".join(cell.replace("|", "\\|") for cell in line) for line in cells]
    return "\n".join(f"| {line} |" for line in [lines[0], " | ".join("---" for _ in cells[0]), *lines[1:]])


def _cell(value: Any) -> str:
    """Three significant digits, without an exponent."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1e-4 or value == 0 else f"{value:.1e}"
