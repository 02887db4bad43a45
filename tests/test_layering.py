"""Who may import whom: the layers of the design, read from the source."""

import ast
from pathlib import Path

import pytest

import legato

ROOT = Path(legato.__file__).parent
# Longest prefix first; each may import itself, unless it stands in ALONE, and what is listed.
RULES = {
    "legato._shapes": (),
    "legato._dtypes": ("legato._shapes",),
    "legato._checks": ("legato._shapes",),
    "legato._gate_spec": ("legato._shapes",),
    "legato._modes": (),
    "legato._values": ("legato._shapes",),
    "legato._environment": ("legato",),
    "legato.legendre": ("legato._shapes", "legato._checks"),
    "legato.ops.kernels": ("legato._gate_spec", "legato._shapes", "legato._dtypes"),
    "legato.ops": (
        "legato.ops.kernels",
        "legato._shapes",
        "legato._checks",
        "legato._gate_spec",
        "legato._dtypes",
        "legato._values",
    ),
    "legato.layers": (
        "legato.ops",
        "legato.legendre",
        "legato._shapes",
        "legato._checks",
        "legato._gate_spec",
        "legato._dtypes",
        "legato._modes",
    ),
    "legato.models": ("legato.layers", "legato._shapes", "legato._checks", "legato._dtypes", "legato._modes"),
    "legato": ("legato.layers", "legato.legendre", "legato.models", "legato.ops"),
}
FORBIDDEN = {"legato.layers": ("legato.ops.kernels",)}
KERNELS = "legato.ops.kernels"
# Two modules are shared by those that have something to compile with Numba: how it is compiled and
# cached, and how its tasks reach torch's threads.
SHARED = (f"{KERNELS}.numba_cache", f"{KERNELS}.numba_threads")
OWN_PACKAGE_ONLY_IN = {
    "numba": (*SHARED, f"{KERNELS}.numba_recurrence", f"{KERNELS}.numba_gated"),
    "triton": (f"{KERNELS}.triton_recurrence",),
}


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(("legato", *(p for p in parts if p != "__init__"))), path


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name, prefix):
    return name == prefix or name.startswith(prefix + ".")


@pytest.mark.parametrize(("module", "path"), list(modules()), ids=lambda x: x if isinstance(x, str) else "")
def test_a_module_imports_only_what_its_layer_may(module, path):
    layer = max((rule for rule in RULES if within(module, rule)), key=len)
    for name in imported(path):
        for package, homes in OWN_PACKAGE_ONLY_IN.items():
            assert not within(name, package) or module in homes, f"{module} imports {name}: only {homes} may"
        assert not within(name, "legato_papers"), f"{module} imports {name}"
        if not within(name, "legato"):
            continue
        allowed = any(within(name, rule) for rule in (*RULES[layer], layer))
        forbidden = any(within(name, f) for f in FORBIDDEN.get(layer, ()))
        assert allowed, f"{module} imports {name}: {layer} may import {RULES[layer]}"
        assert not forbidden, f"{module} imports {name}"


# The subjects that measure the experiments themselves.
MEASURE_PAPERS = {"preparing"}


def test_benchmarks_import_no_experiments():
    for path in sorted((ROOT.parent.parent / "benchmarks").rglob("*.py")):
        papers = [name for name in imported(path) if within(name, "legato_papers")]
        assert not papers or path.stem in MEASURE_PAPERS, path


def test_kernels_never_import_each_other():
    for module, path in modules():
        if within(module, KERNELS):
            shared = [n for n in imported(path) if any(within(n, s) for s in SHARED)]
            others = [n for n in imported(path) if within(n, "legato.ops") and n not in shared]
            assert not others, module


def test_names_of_tests_have_at_most_60_characters():
    root = ROOT.parent.parent
    for path in [*root.glob("tests/**/*.py"), *root.glob("papers/tests/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                assert len(node.name) <= 60, f"{path}: {node.name}"
