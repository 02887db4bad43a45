"""Measure one subject on this machine: ``python benchmarks/run.py gated|lti|recurrence|training``.

Each subject is a module beside this one with ``measure() -> list[dict]``. Results are printed and kept in ``results/``.
"""

import importlib
import sys
from pathlib import Path

from measure import save, table

SUBJECTS = sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem not in {"run", "measure", "gpu_check"})


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0] not in SUBJECTS:
        print(f"usage: python benchmarks/run.py {'|'.join(SUBJECTS)}", file=sys.stderr)
        return 2
    rows = importlib.import_module(arguments[0]).measure()
    print(table(rows))
    print(f"written to {save(arguments[0], rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
