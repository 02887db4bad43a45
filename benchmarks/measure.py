"""What the subjects here share: ``interleave`` to measure, ``save`` and ``table`` for their rows."""

from pathlib import Path
from typing import Any

import torch

from legato.experiments.measure import interleave, machine, write

__all__ = ["interleave", "machine", "save", "table"]

RESULTS = Path(__file__).parent / "results"


def save(subject: str, rows: list[dict]) -> Path:
    """Write the rows of one subject, with what they were measured on, to ``results/<device>-<subject>-<date>.json``."""
    return write(RESULTS, "cuda" if torch.cuda.is_available() else "cpu", subject, rows)


def table(rows: list[dict]) -> str:
    """The rows as aligned text; numbers with three significant digits."""
    if not rows:
        return ""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns] + [[_text(row.get(key, "")) for key in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
