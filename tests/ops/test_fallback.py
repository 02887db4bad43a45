"""Numba or Triton broken or switched off: plain PyTorch runs, and one warning says why."""

import multiprocessing
import os
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from numba.core import config
from numba.core.errors import LoweringError

import draws
import legato
from legato._gate_spec import GateSpec
from legato.ops import backends, kernels
from legato.ops.gated import gated_unit
from legato.ops.kernels import numba_gated, numba_recurrence

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def new_process(monkeypatch):
    """Nothing is known about the kernels, as in a new process."""
    monkeypatch.setattr(backends, "_failures", {})
    monkeypatch.setattr(backends, "_warned", {})
    caches = backends._installed, backends._load, backends._prepared
    for function in caches:
        function.cache_clear()
    yield
    for function in caches:
        function.cache_clear()


@pytest.fixture
def not_loaded(new_process, monkeypatch):
    """The modules that import Numba are not imported either."""
    for name in ("numba_cache", "numba_threads", "numba_recurrence", "numba_gated"):
        monkeypatch.delitem(sys.modules, f"{kernels.__name__}.{name}")
        monkeypatch.delattr(kernels, name)


def recurrence(backend=None):
    """States, final state and gradients, exact in every backend: integers and powers of two."""
    decay = torch.tensor([0.5, 2.0, -1.0], requires_grad=True)
    impulse = (torch.arange(30.0).reshape(2, 5, 3) - 12).requires_grad_()
    state = torch.tensor([[1.0, -2.0, 4.0], [8.0, 0.5, 1.0]], requires_grad=True)
    both = legato.linear_recurrence(decay, impulse, state, backend=backend)
    weights = torch.arange(30.0).reshape(2, 5, 3) - 8, torch.tensor([[1.0, 2.0, 4.0]] * 2)
    return *both, *torch.autograd.grad(both, (decay, impulse, state), weights)


def unit(spec, channels):
    """Results of a gated unit, and the gradients of a linear loss."""
    draws.seed()
    x, bias = torch.randn(2, 7, channels), torch.randn(3 * len(spec.blocks))
    weight, state = torch.randn(3 * len(spec.blocks), channels), torch.randn(2, 3)
    leaves = [t.requires_grad_() for t in (x, weight, bias, state)]
    results = gated_unit((x,), (weight,), bias, spec, state)
    gradients = torch.autograd.grad(results, leaves, [torch.randn_like(y) for y in results])
    return [y.detach() for y in results], gradients


def units():
    """Few inputs, for which the kernel keeps no products, and many; without and with output gate."""
    few = unit(GateSpec(("forget", "candidate")), 2)
    many = unit(GateSpec(("forget", "write", "candidate", "output")), 40)
    return few[0] + many[0], few[1] + many[1]


def without_numba(function, monkeypatch):
    """What ``function`` gives where Numba is not installed."""
    with monkeypatch.context() as patch:
        patch.setattr(backends, "_installed", lambda package: package is None)
        return function()


def assert_equal(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def with_one_warning(function, match):
    """What ``function`` gives, and the message of its only warning about kernels."""
    with pytest.warns(UserWarning, match=match) as told:
        result = function()
    (message,) = (str(x.message) for x in told if "kernels cannot be used" in str(x.message))
    return result, message


def assert_falls_back(monkeypatch, cause):
    """Both ops run as without Numba and warn once; a backend named by the caller raises."""
    states, (results, gradients) = (without_numba(f, monkeypatch) for f in (recurrence, units))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"backend 'numba' .* cannot be used: .*{cause}"):
            recurrence("numba")
    found, message = with_one_warning(lambda: [(recurrence(), *units()) for _ in range(2)], cause)
    for both in found:
        for a, b in zip(both, (states, results, gradients), strict=True):
            assert_equal(a, b)
    assert "plain PyTorch computes the same, more slowly" in message
    assert "restart Python" in message
    lines = dict(line.split(": ", 1) for line in legato.explain().splitlines())
    for op, choice in (("gated_unit", "definition"), ("linear_recurrence", "torch")):
        assert lines[op].startswith(f"{choice} (numba is installed but cannot be used: ")
        assert cause in lines[op]


@pytest.mark.parametrize(
    "error",
    [
        "ImportError('Numba needs NumPy 2.4 or less')",
        "SystemError('initialization of _helperlib failed')",
        "OSError('Could not find/load shared object file libllvmlite.so')",
        "MemoryError('out of memory')",
    ],
)
def test_numba_that_raises_when_imported(error, not_loaded, monkeypatch, tmp_path):
    (tmp_path / "numba.py").write_text(f"raise {error}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "numba")
    assert_falls_back(monkeypatch, error.split("'")[1])


def test_an_empty_package_of_the_name(not_loaded, monkeypatch, tmp_path):
    (tmp_path / "numba.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "numba")
    assert_falls_back(monkeypatch, "cannot import name 'carray'")


def test_a_mock_without_a_spec(not_loaded, monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", ModuleType("numba"))
    assert_falls_back(monkeypatch, "cannot import name 'carray'")


def test_numba_disable_jit_is_obeyed(not_loaded, monkeypatch):
    monkeypatch.setattr(config, "DISABLE_JIT", 1)
    assert_falls_back(monkeypatch, "NUMBA_DISABLE_JIT is set, so Numba compiles nothing")


def does_not_compile(*_):
    raise LoweringError("Failed in nopython mode\n\n\x1b[1mno such instruction\x1b[0m")


def test_kernels_that_do_not_compile(new_process, monkeypatch):
    for module in (numba_recurrence, numba_gated):
        monkeypatch.setattr(module, "_forward", does_not_compile)
    assert_falls_back(monkeypatch, "LoweringError: Failed in nopython mode no such instruction")


def test_a_backward_alone_that_does_not_compile(new_process, monkeypatch):
    """The forward has run by the kernel; from then on the whole module is out of use."""
    states, (results, gradients) = (without_numba(f, monkeypatch) for f in (recurrence, units))
    for module in (numba_recurrence, numba_gated):
        monkeypatch.setattr(module, "_backward", does_not_compile)
    assert backends.choose("linear_recurrence", CPU, None, torch.float32)[0] is numba_recurrence
    assert backends.choose("gated_unit", CPU, None, torch.float32)[0] is numba_gated
    found, _ = with_one_warning(lambda: (recurrence(), units()[1]), "no such instruction")
    assert_equal(found[0], states)
    assert_equal(found[1], gradients)
    assert legato.explain().count("numba is installed but cannot be used: LoweringError") == 2
    assert backends.choose("linear_recurrence", CPU, None, torch.float64)[1] == "torch"
    assert backends.choose("gated_unit", CPU, None, torch.float32)[0] is None
    assert_equal(units()[0], results)


def test_a_named_backend_whose_backward_fails(new_process, monkeypatch):
    monkeypatch.setattr(numba_recurrence, "_backward", does_not_compile)
    with pytest.raises(RuntimeError, match=r"no such instruction\. Correct that, or pass backend="):
        recurrence("numba")


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_compilation_is_repeated(interrupt, new_process, monkeypatch):
    def interrupted(dtype, adjoint):
        raise interrupt

    with monkeypatch.context() as patch:
        patch.setattr(numba_recurrence, "prepare", interrupted)
        with pytest.raises(interrupt):
            backends.choose("linear_recurrence", CPU, None, torch.float32)
    assert backends.choose("linear_recurrence", CPU, None, torch.float32)[0] is numba_recurrence


def test_a_failure_in_one_kernel_leaves_the_other(new_process, monkeypatch):
    monkeypatch.setattr(numba_gated, "_forward", does_not_compile)
    with pytest.warns(UserWarning, match="no such instruction"):
        units()
    assert backends.choose("linear_recurrence", CPU, None, torch.float32)[0] is numba_recurrence


def test_what_a_kernel_raises_when_it_runs_is_raised(new_process, monkeypatch):
    def launch(*_):
        raise ArithmeticError("in the launch")

    monkeypatch.setattr(numba_recurrence, "_launch", launch)
    with pytest.raises(ArithmeticError, match="in the launch"):
        recurrence()


@pytest.mark.compiled
@pytest.mark.filterwarnings("ignore:the numba kernels cannot be used")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_code_falls_back_too(backend, new_process, monkeypatch):
    """The registered op returns the shapes that it announces, whichever way it is computed."""
    for module in (numba_recurrence, numba_gated):
        monkeypatch.setattr(module, "_forward", does_not_compile)
    results = []
    for channels in (3, 40):
        layer, x = legato.GILR(channels, 8), torch.randn(2, 5, channels)
        torch._dynamo.reset()
        for function in (torch.compile(layer, fullgraph=True, backend=backend), layer):
            output, _ = function(x)
            gradients = torch.autograd.grad(output.sum(), list(layer.parameters()))
            results.append((output.detach(), *gradients))
        assert_equal(*results[-2:])


def _in_child(queue):
    queue.put([x.tolist() for x in recurrence()])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="only where processes fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_falls_back(new_process, monkeypatch):
    expected = without_numba(recurrence, monkeypatch)
    monkeypatch.setattr(numba_recurrence, "prepare", does_not_compile)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue,))
    child.start()
    try:
        assert queue.get(timeout=60) == [x.tolist() for x in expected]
    finally:
        child.kill()


def test_llvmlite_that_is_broken(tmp_path):
    (tmp_path / "llvmlite.py").write_text("raise OSError('Could not find libllvmlite.so')")
    result = in_new_process(PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]))
    assert result.stdout.strip() == "1.75"
    assert result.stderr.count("Could not find libllvmlite.so") == 1


def in_new_process(**environment):
    code = (
        "import torch, legato\n"
        "a, x = torch.tensor([0.5], requires_grad=True), torch.ones(1, 3, 1)\n"
        "states, final = legato.linear_recurrence(a, x); final.sum().backward()\n"
        "legato.GILR(1, 2)(x); print(final.item())\n"
    )
    environment = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)


# --- Triton, by the same rule ---


@pytest.fixture
def triton_recurrence(new_process, monkeypatch):
    """The module as on a CUDA machine, where nothing is interpreted."""
    pytest.importorskip("triton")
    module = backends._load("linear_recurrence", "triton")
    monkeypatch.setattr(module, "INTERPRETED", False)
    module._launch_one.cache_clear()
    return module


def assert_falls_back_on_cuda(cause):
    both, message = with_one_warning(
        lambda: [backends.choose("linear_recurrence", CUDA, None, torch.float32, adjoint) for adjoint in (False, True)],
        cause,
    )
    assert "the triton kernels cannot be used" in message
    for _, name, why in both:
        assert name == "torch"
        assert why.startswith("triton is installed but cannot be used: ")
        assert cause in why
    with pytest.raises(RuntimeError, match=f"backend 'triton' .* cannot be used: .*{cause}"):
        backends.choose("linear_recurrence", CUDA, "triton", torch.float32)


def test_triton_that_raises_when_imported(new_process, monkeypatch, tmp_path):
    (tmp_path / "triton.py").write_text("raise ImportError('libtriton.so: undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("triton", f"{kernels.__name__}.triton_recurrence"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert_falls_back_on_cuda("undefined symbol")


def test_triton_without_a_c_compiler(triton_recurrence, monkeypatch):
    class Kernel:
        def __getitem__(self, grid):
            raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(triton_recurrence, "_one_kernel", Kernel())
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    assert_falls_back_on_cuda("Failed to find C compiler")


def test_the_trial_kernel_of_triton_runs():
    triton_recurrence = pytest.importorskip("legato.ops.kernels.triton_recurrence")
    x = torch.zeros(2, device="cuda" if torch.cuda.is_available() else "cpu")
    triton_recurrence._one_kernel[(1,)](x)
    assert x.tolist() == [1, 0]
