"""The same class of error for the same wrong argument in every op: TypeError for a type, ValueError for a value."""

import pytest
import torch

import legato
from legato._gate_spec import GateSpec
from legato.ops.gated import gated_recurrence, gated_unit
from legato.ops.time_invariant import apply, prepare

# The shape checker of the test run would stop these by their type.
pytestmark = pytest.mark.bad_input

B, T, C, N = 2, 4, 3, 5
A, COLUMN = legato.delay_network(N, 20.0)
SYSTEM = prepare(A, COLUMN, T)


def unit(x, weight, bias, **options):
    return gated_unit((x,), (weight,), bias, GateSpec(("forget", "candidate")), **options)


x = torch.randn(B, T, C)
# Each op with valid arguments. All of them take ``initial_state`` and ``reset`` too.
OPS = {
    "linear_recurrence": (legato.linear_recurrence, {"impulse": x, "decay": torch.rand(C)}),
    "matrix_recurrence": (legato.matrix_recurrence, {"impulse": x, "transition": torch.rand(C, C)}),
    "lti": (legato.lti, {"u": x, "A": A, "B": COLUMN}),
    "apply": (lambda u, **options: apply(u, SYSTEM, **options), {"u": x}),
    "gated_recurrence": (gated_recurrence, {"candidate": x, "forget": x, "write": x}),
    "gated_unit": (unit, {"x": x, "weight": torch.randn(2 * C, C), "bias": torch.randn(2 * C)}),
}
STATES = {op: torch.randn(B, C, N) if op in ("lti", "apply") else torch.randn(B, C) for op in OPS}
RESET = torch.zeros(B, T, dtype=torch.bool)
every_op = pytest.mark.parametrize("op", OPS)
every_number = pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op, (_, arguments) in OPS.items() for name in (*arguments, "initial_state")]
)
ONLY_REAL = {("lti", "A"), ("lti", "B"), *(("gated_recurrence", name) for name in ("candidate", "forget", "write"))}
ONLY_REAL |= {("gated_unit", name) for name in ("x", "weight", "bias", "initial_state")}


def call(op, **changes):
    function, arguments = OPS[op]
    return function(**arguments | {"initial_state": STATES[op], "reset": RESET} | changes)


def valid(op, name):
    return STATES[op] if name == "initial_state" else OPS[op][1][name]


@every_op
def test_the_arguments_of_this_test_are_valid(op):
    call(op)
    call(op, initial_state=None, reset=None)


@every_number
def test_what_is_not_a_tensor_raises_a_type_error(op, name):
    for wrong in (valid(op, name).tolist(), valid(op, name).numpy(), 0.5):
        with pytest.raises(TypeError, match=r"must be a tensor, got (list|ndarray|float): "):
            call(op, **{name: wrong})


@every_number
def test_integers_raise_a_type_error(op, name):
    with pytest.raises(TypeError, match=r"must be floating( or complex)?, got torch.int64: convert it with"):
        call(op, **{name: valid(op, name).long()})


@every_number
def test_complex_numbers_raise_where_the_rest_is_real(op, name):
    wrong = valid(op, name).to(torch.complex64)
    if name != "initial_state" and (op, name) not in ONLY_REAL:
        call(op, **{name: wrong})
        return
    with pytest.raises(TypeError, match=r"must be floating, got torch.complex64|initial_state is complex but .* real"):
        call(op, **{name: wrong})


@every_number
def test_another_device_raises_a_value_error(op, name):
    with pytest.raises(ValueError, match=r"must share a device, got .*meta"):
        call(op, **{name: valid(op, name).to("meta")})


@every_number
def test_a_wrong_shape_raises_a_value_error(op, name):
    right = valid(op, name)
    for wrong in (right.new_ones(*right.shape, 1, 1, 1), right.new_ones(*right.shape[:-1], right.shape[-1] + 1)):
        if (op, name) == ("linear_recurrence", "impulse") and wrong.ndim > 3:
            continue  # an impulse has any number of axes
        with pytest.raises(ValueError, match=r"got .*\("):
            call(op, **{name: wrong})


@every_op
@pytest.mark.parametrize(
    ("reset", "error", "message"),
    [
        (RESET.tolist(), TypeError, "expected reset to be a tensor, got list: wrap it"),
        (RESET.float(), TypeError, "reset must be a boolean tensor, got torch.float32"),
        (RESET[:, 1:], ValueError, r"reset must be \(batch, time\) = \(2, 4\), got \(2, 3\)"),
        (RESET[0], ValueError, r"reset must be \(batch, time\) = \(2, 4\), got \(4,\)"),
        (RESET.to("meta"), ValueError, "reset and .* must share a device, got meta and cpu"),
    ],
    ids=["list", "float", "steps", "axes", "device"],
)
def test_a_wrong_reset_raises(op, reset, error, message):
    with pytest.raises(error, match=message):
        call(op, reset=reset)


@pytest.mark.parametrize("op", ["linear_recurrence", "gated_recurrence", "gated_unit"])
def test_an_unknown_backend_raises_a_value_error(op):
    with pytest.raises(ValueError, match=r"backend must be one of .*did you mean 'numba'"):
        call(op, backend="nubma")
