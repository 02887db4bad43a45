"""``use_backend``: which kernel runs inside, outside, in the backward pass, in other threads and in compiled code."""

import threading

import pytest
import torch

import bounds
import legato
from legato._gate_spec import GateSpec
from legato.ops import backends
from legato.ops.gated import gated_unit

SPEC = GateSpec(("forget", "candidate"))


def choices():
    """The backend of each op at its latest call."""
    return {op: choice for op, (choice, _) in backends._last.items()}


@pytest.fixture(autouse=True)
def no_choices(monkeypatch):
    monkeypatch.setattr(backends, "_last", {})


@pytest.fixture
def calls():
    """The calls of a backend named "counted": the plain scan, which counts."""
    scan, made = backends._load("linear_recurrence", "torch"), []

    class Counted:
        @staticmethod
        def forward(*arguments):
            made.append(arguments)
            return scan.forward(*arguments)

    backends.register("counted", Counted)
    yield made
    del backends.TABLE["linear_recurrence"]["counted"]


def leaves():
    return torch.rand(2, 9, 3, requires_grad=True), torch.randn(2, 9, 3, requires_grad=True)


@pytest.mark.parametrize("name", ["reference", "torch", "numba"])
def test_every_op_inside_uses_the_backend(name):
    layer = legato.GILR(3, 4)
    with legato.use_backend(name):
        legato.linear_recurrence(*leaves())
        assert choices()["linear_recurrence"] == name
        legato.linear_recurrence(*leaves())[0].sum().backward()
        assert choices()["linear_recurrence"] == name
        layer(torch.randn(2, 9, 3))
        assert choices()["gated_unit"] == ("numba" if name == "numba" else "definition")


def test_an_argument_overrides_use_backend_and_none_resets_it():
    with legato.use_backend("torch"):
        legato.linear_recurrence(*leaves(), backend="reference")
        assert choices() == {"linear_recurrence": "reference"}
        with legato.use_backend(None):
            legato.linear_recurrence(*leaves())
            assert choices() == {"linear_recurrence": backends.choose("linear_recurrence", torch.device("cpu"))[1]}
        legato.linear_recurrence(*leaves())
        assert choices() == {"linear_recurrence": "torch"}


def test_an_error_inside_restores_the_choice():
    with pytest.raises(KeyError), legato.use_backend("reference"):
        raise KeyError
    assert backends.resolve(None, torch.device("cpu")) is None


def test_a_backward_pass_uses_the_backend_of_its_forward(calls):
    with legato.use_backend("counted"):
        states, _ = legato.linear_recurrence(*leaves())
    assert len(calls) == 1
    states.sum().backward()
    assert len(calls) == 2
    states, _ = legato.linear_recurrence(*leaves())
    with legato.use_backend("counted"):
        states.sum().backward()
    assert len(calls) == 2


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_gated_unit_computes_its_definition_by_the_backend(calls, create_graph):
    weight = torch.randn(8, 3, requires_grad=True)
    with legato.use_backend("counted"):
        output = gated_unit((torch.randn(2, 9, 3),), (weight,), None, SPEC)[0]
    torch.autograd.grad(output.sum(), weight, create_graph=create_graph)
    assert len(calls) == 2


def test_second_derivatives_of_the_kernel_use_its_backend(calls):
    x, weight = torch.randn(2, 9, 3), torch.randn(8, 3, requires_grad=True)
    with legato.use_backend("numba"):
        output = gated_unit((x,), (weight,), None, SPEC)[0]
    with legato.use_backend("counted"):
        torch.autograd.grad(output.sum(), weight, create_graph=True)
    assert choices()["linear_recurrence"] == "numba"
    assert not calls


def test_another_thread_has_a_choice_of_its_own():
    found = []
    with legato.use_backend("reference"):
        thread = threading.Thread(target=lambda: found.append(backends.resolve(None, torch.device("cpu"))))
        thread.start()
        thread.join()
        assert backends.resolve(None, torch.device("cpu")) == "reference"
    assert found == [None]


def test_wrong_names_raise_when_the_context_is_entered(monkeypatch):
    with pytest.raises(ValueError, match=r"backend must be one of .*did you mean 'numba'"), legato.use_backend("numbo"):
        pass
    monkeypatch.setattr(backends, "_installed", lambda package: package is None)
    with pytest.raises(RuntimeError, match="pip install numba"), legato.use_backend("numba"):
        pass


def test_an_op_on_a_device_without_the_backend_raises():
    x = torch.zeros(1, 2, 3, device="meta")
    for call in (
        lambda: legato.linear_recurrence(x, x),
        lambda: gated_unit((), (), None, GateSpec(("forget",)), products=x),
    ):
        with legato.use_backend("numba"), pytest.raises(ValueError, match="'numba' needs cpu tensors, got meta"):
            call()


@pytest.mark.compiled
def test_compiled_code_follows_the_context(calls):
    """Each change of the backend between calls compiles the code once more."""
    layer = legato.GILR(3, 4)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    wide = legato.GILR(3, 4, dtype=torch.float64)
    wide.load_state_dict(layer.state_dict())
    x = torch.randn(2, 9, 3)
    exact, magnitude = wide(x.double())[0], bounds.sensitivity(lambda x: wide(x)[0], x.double())
    roundings = bounds.likely(exact.numel(), terms=16)
    for name, op, choice in (
        (None, "gated_unit", "numba"),
        ("torch", "linear_recurrence", "torch"),
        ("reference", "linear_recurrence", "reference"),
        ("numba", "gated_unit", "numba"),
        (None, "gated_unit", "numba"),
    ):
        backends._last.clear()
        with legato.use_backend(name):
            output = compiled(x)[0]
            output.sum().backward()
        assert choices() == {op: choice}
        bounds.assert_close(output, exact, magnitude=magnitude, roundings=roundings)


@pytest.mark.compiled
def test_the_context_works_inside_of_compiled_code():
    def inside(decay, impulse):
        with legato.use_backend("torch"):
            return legato.linear_recurrence(decay, impulse)[0]

    given = [x.detach() for x in leaves()]
    found = torch.compile(inside, fullgraph=True, backend="aot_eager")(*given)
    assert choices() == {"linear_recurrence": "torch"}
    assert torch.equal(found, inside(*given))
    assert backends.resolve(None, torch.device("cpu")) is None
