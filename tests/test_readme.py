"""The README tells the truth: its example runs, its table of support is what the ops do, its files exist.

``python tests/test_readme.py`` writes the table anew.
"""

import re
from pathlib import Path

import torch

import legato
from legato.ops.backends import choose

README = Path(__file__).parents[1] / "README.md"
TABLE = re.compile(r"(<!-- support: .*? -->\n)(.*?)(<!-- end of support -->)", re.DOTALL)
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128]


def recurrence(dtype):
    return legato.linear_recurrence(torch.full((2,), 0.5, dtype=dtype), torch.ones(1, 3, 2, dtype=dtype))


def lti(dtype):
    return legato.lti(torch.ones(1, 3, 2, dtype=dtype), *legato.delay_network(2, 3.0))


def matrix(dtype):
    return legato.matrix_recurrence(torch.eye(2, dtype=dtype) / 2, torch.ones(1, 3, 2, dtype=dtype))


OPS = {"linear_recurrence": recurrence, "lti": lti, "matrix_recurrence": matrix}


def runs(op, dtype):
    """Whether the op takes the dtype, keeps it, and carries it in at least 32 bits."""
    try:
        states, final = OPS[op](dtype)
    except (TypeError, ValueError, RuntimeError):
        return False
    return states.dtype == dtype and final.dtype == torch.promote_types(dtype, torch.float32)


def support():
    numba, triton = (choose("linear_recurrence", torch.device(kind))[1] for kind in ("cpu", "cuda"))
    head = ["op", "CPU", "CUDA", *(str(d).removeprefix("torch.") for d in DTYPES)]
    rows = [f"| {' | '.join(head)} |\n", "|---" * len(head) + "|\n"]
    kernels = {"linear_recurrence": (numba, triton)}
    for op in OPS:
        cells = [f"`{op}`", *kernels.get(op, ("torch", "torch")), *("yes" if runs(op, d) else "no" for d in DTYPES)]
        rows.append(f"| {' | '.join(cells)} |\n")
    return "".join(rows)


def test_the_table_of_support_is_what_the_ops_do():
    assert TABLE.search(README.read_text()).group(2) == support(), "run python tests/test_readme.py"


def test_the_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})


def test_every_file_that_it_names_is_there():
    for link in re.findall(r"\]\(([^)#]+)\)", README.read_text()):
        if not link.startswith("http"):
            assert (README.parent / link).exists(), link


if __name__ == "__main__":
    README.write_text(TABLE.sub(lambda found: found[1] + support() + found[3], README.read_text()))
