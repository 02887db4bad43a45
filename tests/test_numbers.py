"""Numbers of NumPy and torch are taken wherever Python's own are, and stored as Python's own."""

import io
import math
from decimal import Decimal
from numbers import Integral, Real

import numpy as np
import pytest
import torch
from torch import nn

import draws
import legato
from legato import GILR, GILRLSTM, LRU, QRNN, SRU, Highway, LinearRNN, MinGRU, MinLSTM, Stack, StronglyTypedRNN
from legato._checks import dropout_rate, positive_int, real_number, whole_number
from legato.models import Embedding, LanguageModel, LockedDropout

# The shape checker of the test run would stop these numbers by their type.
pytestmark = pytest.mark.bad_input

INTEGERS = [np.int64, np.int32, np.uint8, np.array, torch.tensor, lambda n: torch.tensor(n, dtype=torch.uint8)]
REALS = [np.float32, np.float64, np.float16, np.array, torch.tensor, np.int8]
NO_NUMBERS = [True, np.True_, torch.tensor(True), "1", None, 1j, np.complex64(1), Decimal(1), np.ones(1), [1]]


@pytest.mark.parametrize("make", INTEGERS)
@pytest.mark.parametrize("check", [positive_int, whole_number, real_number])
def test_an_integer_of_any_type_is_a_python_int(make, check):
    number = check(make(7), "size")
    assert type(number) is int
    assert number == 7


@pytest.mark.parametrize("make", REALS)
def test_a_real_of_any_type_is_a_python_number(make):
    assert real_number(make(0), "bias") == 0
    assert type(real_number(make(2), "bias")) in (int, float)
    assert type(dropout_rate(make(0))) is float


def class_of_fault(wrong, kind):
    """ValueError for a number of the kind that is wanted, of a wrong value; else TypeError."""
    is_bool = isinstance(wrong, bool)
    return ValueError if isinstance(wrong, kind) and not is_bool else TypeError


@pytest.mark.parametrize("wrong", [*NO_NUMBERS, math.nan, np.float32("inf")], ids=repr)
def test_what_is_no_real_number_is_refused(wrong):
    with pytest.raises(class_of_fault(wrong, Real), match="expected bias to be a finite number, got"):
        real_number(wrong, "bias")


@pytest.mark.parametrize("wrong", [*NO_NUMBERS, 0, -1, 2.0, np.float32(2), torch.tensor(2.0)], ids=repr)
def test_what_is_no_positive_int_is_refused(wrong):
    with pytest.raises(class_of_fault(wrong, Integral), match="expected size to be an int of at least 1, got"):
        positive_int(wrong, "size")


@pytest.mark.parametrize("wrong", [*NO_NUMBERS, -0.1, 1, 1.0, math.nan, np.float32(1)], ids=repr)
def test_what_is_no_dropout_rate_is_refused(wrong):
    with pytest.raises(class_of_fault(wrong, Real), match="expected dropout from 0 to below 1, got"):
        dropout_rate(wrong)


def language_model(i, r):
    make = lambda size: GILR(size, size)  # noqa: E731
    embedding = Embedding(i(9), i(4), padding_idx=i(0), dropout=r(0.5))
    options = {"hidden_size": i(5), "highways": i(1), "top_highways": i(0), "gate_bias": r(-1), "dropout": r(0.25)}
    return LanguageModel(embedding, make, num_layers=i(2), **options)


BUILT = [
    lambda i, r: GILR(i(3), i(4), forget_bias=r(1)),
    lambda i, r: GILRLSTM(i(3), i(4), forget_bias=r(1)),
    lambda i, r: LRU(i(3), i(4), output_size=i(3), r_min=r(0.5), r_max=r(0.75), max_phase=r(0.5)),
    lambda i, r: QRNN(i(3), i(4), kernel_size=i(2), forget_bias=r(1)),
    lambda i, r: SRU(i(3), i(3), forget_bias=r(1), highway_bias=r(-1)),
    lambda i, r: MinGRU(i(3), i(4), forget_bias=r(1)),
    lambda i, r: MinLSTM(i(3), i(4), forget_bias=r(1)),
    lambda i, r: StronglyTypedRNN(i(3), i(4), forget_bias=r(1)),
    lambda i, r: LinearRNN(i(3), i(4), torch.chunk, output_size=i(2)),
    lambda i, r: Stack.of(GILR, i(3), i(4), num_layers=i(2), dropout=r(0.5)),
    lambda i, r: Highway(i(3), gate_bias=r(-2)),
    lambda i, r: LockedDropout(r(0.5)),
    language_model,
]


every_number = pytest.mark.parametrize(
    ("i", "r"), [(np.int64, np.float32), (np.array, np.array), (torch.tensor, torch.tensor)]
)


@pytest.mark.parametrize("build", BUILT)
@every_number
def test_what_is_built_of_any_numbers_is_the_same(build, i, r):
    assert_built_the_same(build, i, r)


def assert_built_the_same(build, i, r):
    """``build`` of numbers made by ``i`` and ``r`` holds Python's own, and is what it is of these."""
    draws.seed(0)
    expected = build(int, float)
    draws.seed(0)
    found = build(i, r)
    assert repr(found) == repr(expected)
    for a, b in zip(found.state_dict().values(), expected.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    for module in found.modules():
        held = [v for name, v in vars(module).items() if name[0] != "_" and not isinstance(v, nn.Module)]
        for value in held:
            for part in value if isinstance(value, tuple | list) else [value]:
                assert type(part).__module__ != "numpy"
                assert not isinstance(part, torch.Tensor)
    if not isinstance(found, LinearRNN | LanguageModel):  # which hold functions
        torch.save(found, file := io.BytesIO())
        file.seek(0)
        kinds = {type(module) for module in found.modules()}
        with torch.serialization.safe_globals([*kinds, set, *CONTAINERS]):
            assert repr(torch.load(file)) == repr(found)


CONTAINERS = [nn.ParameterDict, nn.ModuleList]


def test_functions_take_any_numbers():
    layer = GILR(3, 4)
    assert torch.equal(
        legato.spread_time_scales(torch.empty(3), np.float32(1), np.array(100)),
        legato.spread_time_scales(torch.empty(3), 1, 100),
    )
    assert torch.equal(legato.window_decoder(np.int64(3), np.int64(2)), legato.window_decoder(3, 2))
    for theta in (np.float32(10), np.int64(10), np.array(10.0), np.array(10)):
        for a, b in zip(legato.delay_network(np.int64(3), theta), legato.delay_network(3, 10), strict=True):
            assert torch.equal(a, b)
    thetas = [10.0, 20.0]
    expected = legato.delay_network(3, torch.tensor(thetas))
    for a, b in zip(legato.delay_network(3, np.array(thetas)), expected, strict=True):
        assert torch.equal(a, b)
    assert layer.initial_state(np.int64(2)).memory.shape == (2, 4)
    model = language_model(int, float)
    tokens = torch.randint(9, (2, 3))
    assert model.generate(tokens, np.int64(2), temperature=np.float32(0), top_k=np.int64(3)).shape == (2, 2)
