"""The public surface: what is exported, and that each part of it is documented and has examples that run."""

import doctest
import importlib
import inspect
import pkgutil
import subprocess
import sys
import types

import pytest
import torch
from torch import nn

import draws
import legato
import legato.layers
import legato.models
import legato.ops
from legato.ops import backends

PUBLIC = (legato, legato.ops, legato.models)
#: Sub-modules that an import of legato makes reachable; the classes of all but models and ops are internal.
SUBMODULES = {"layers", "legendre", "models", "ops"}
NAMES = [(module, name) for module in PUBLIC for name in module.__all__]
every_name = pytest.mark.parametrize(("module", "name"), NAMES, ids=[f"{m.__name__}.{n}" for m, n in NAMES])


@pytest.mark.parametrize("module", PUBLIC, ids=lambda module: module.__name__)
def test_nothing_else_is_public(module):
    found = {name for name in vars(module) if not name.startswith("_")}
    modules = {name for name in found if isinstance(getattr(module, name), types.ModuleType)}
    assert found - modules == set(module.__all__) - {"__version__"}
    assert module is not legato or modules == SUBMODULES


@every_name
def test_a_public_name_says_where_it_is_imported_from(module, name):
    value = getattr(module, name)
    assert value.__module__ in ("legato", module.__name__)
    assert getattr(importlib.import_module(value.__module__), name) is value


@every_name
def test_a_public_name_is_documented(module, name):
    value = getattr(module, name)
    text = inspect.getdoc(value)
    assert text
    assert ">>>" in text or not callable(value) or name in WITHOUT_EXAMPLE
    if inspect.isclass(value):
        undocumented = [
            method
            for method, member in vars(value).items()
            if not method.startswith("_") and inspect.isfunction(member) and not inspect.getdoc(getattr(value, method))
        ]
        assert not undocumented


#: Their module's docstring has the example.
WITHOUT_EXAMPLE = {"RecurrentLayer"}


def test_models_are_reachable_from_the_package():
    code = "import legato; legato.models.LanguageModel; legato.ops.lti; print(dir(legato))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


MODULES = sorted(module.name for module in pkgutil.walk_packages(legato.__path__, "legato."))
# They import numba or triton, which need not be installed.
COMPILED = {name for name in MODULES if name.rpartition(".")[2].startswith(("numba_", "triton_"))}


@pytest.mark.bad_input  # examples are run as a user runs them, without the checks of shapes
@pytest.mark.parametrize("name", ["legato", *sorted(set(MODULES) - COMPILED)])
def test_the_examples_of_docstrings_run(name):
    module = importlib.import_module(name)
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    public = {name: getattr(module, name) for module, name in NAMES}
    names = public | vars(module) | {"torch": torch, "nn": nn, "legato": legato}
    for example in finder.find(module, name, globs=names):
        draws.seed(0)
        backends._last.clear()  # as in a new process, for ``explain``
        report = []
        runner.run(example, out=report.append)
        assert not report, "".join(report)
