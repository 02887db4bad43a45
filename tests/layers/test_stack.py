"""Layers one on top of the other; the contract itself is held in tests/test_contract.py."""

import re
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import draws
from legato.layers import GILR, GILRLSTM, LMU, Bidirectional, LegendreMemory, Stack
from legato.layers.base import RecurrentLayer


class MeanState(NamedTuple):
    memory: torch.Tensor


class Sum(RecurrentLayer):
    """A layer of a user: h_t = h_{t-1} + W x_t."""

    State = MeanState

    def __init__(self, input_size, hidden_size, bias=False):
        super().__init__(input_size)
        self.hidden_size = hidden_size
        self.linear = nn.Linear(input_size, hidden_size, bias=bias)

    def _state_shapes(self):
        return ((self.hidden_size,),)

    def _sequence(self, x, state, lengths, reset):
        states = self.linear(x).cumsum(1) + (0 if state is None else state.memory[:, None])
        return states, MeanState(states), MeanState(states[:, -1])


def test_a_stack_is_its_layers_in_turn():
    lower, upper = GILR(3, 5).double(), LMU(5, 4, order=3, theta=6.0).double()
    stack = Stack(lower, upper)
    x = torch.randn(2, 9, 3, dtype=torch.float64)
    lengths, reset = torch.tensor([9, 4]), torch.rand(2, 9) < 0.2
    output, state = stack(x, lengths=lengths, reset=reset)
    below, first = lower(x, lengths=lengths, reset=reset)
    expected, second = upper(below, lengths=lengths, reset=reset)
    assert torch.equal(output, expected)
    for found, expected in zip(state, (first, second), strict=True):
        assert torch.equal(found.memory, expected.memory)
    assert (stack.input_size, stack.output_size) == (3, 4)


@pytest.mark.parametrize("layer", [GILR, GILRLSTM, Sum])
def test_a_stack_of_a_class_has_the_sizes_of_the_lstm_of_torch(layer):
    for bidirectional in (False, True):
        ours = Stack.of(layer, 3, 5, num_layers=3, bidirectional=bidirectional)
        theirs = nn.LSTM(3, 5, num_layers=3, bidirectional=bidirectional, batch_first=True)
        x = torch.randn(2, 7, 3)
        output, state = ours(x)
        assert output.shape == theirs(x)[0].shape == (2, 7, ours.output_size)
        assert len(state) == 3
        assert all(isinstance(part, Bidirectional) for part in ours.layers) == bidirectional


def test_options_reach_all_layers_return_sequences_the_last():
    stack = Stack.of(LMU, 3, 5, num_layers=2, order=4, theta=7.0, activation="tanh", return_sequences=False)
    assert [layer.return_sequences for layer in stack.layers] == [True, False]
    assert [layer.activation for layer in stack.layers] == ["tanh", "tanh"]
    assert not stack.return_sequences
    assert stack(torch.randn(2, 7, 3))[0].shape == (2, 5)
    both = Stack.of(LMU, 3, 5, num_layers=2, bidirectional=True, order=4, theta=7.0, return_sequences=False)
    assert both(torch.randn(2, 7, 3))[0].shape == (2, 10)


def test_dropout_lies_between_layers_in_training_only():
    lower, upper = GILR(3, 50), GILR(50, 4)
    stack, x = Stack(lower, upper, dropout=0.5), torch.randn(2, 9, 3)
    state = stack.initial_state(2)
    draws.seed(3)
    found, _ = stack(x)
    draws.seed(3)
    expected, _ = upper(F.dropout(lower(x)[0], 0.5))
    assert torch.equal(found, expected)
    draws.seed(3)
    found, _ = stack.step(x[:, 0], state)
    draws.seed(3)
    expected, _ = upper.step(F.dropout(lower.step(x[:, 0], state[0])[0], 0.5), state[1])
    assert torch.equal(found, expected)
    stack.eval()
    assert torch.equal(stack(x)[0], upper(lower(x)[0])[0])


def test_the_example_of_the_documents_runs():
    page = Path(__file__).parents[2] / "docs" / "coming-from-other-libraries.md"
    names = {}
    exec(re.search(r"```python\n(.*?)```", page.read_text(), re.DOTALL).group(1), names)
    assert names["output"].shape == (8, 100, 512)
    assert names["c_n"].shape == names["c_n_reverse"].shape == (8, 256)


def test_a_stack_can_stand_in_a_stack():
    inner = Stack(GILR(3, 4), GILR(4, 5))
    outer = Stack(inner, GILR(5, 2))
    x = torch.randn(2, 7, 3)
    output, state = outer(x)
    assert output.shape == (2, 7, 2)
    assert [part.memory.shape[1] for part in state[0]] == [4, 5]
    output, _ = outer.step(x[:, 0], state)
    assert output.shape == (2, 2)


def test_dropout_in_one_layer_warns_as_torch_does():
    for build in (lambda: Stack.of(GILR, 3, 4, dropout=0.5), lambda: Stack(GILR(3, 4), dropout=0.5)):
        with pytest.warns(UserWarning, match="dropout=0.5 changes nothing in a stack of one layer"):
            build()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Stack.of(GILR, 3, 4, num_layers=2, dropout=0.5)


def test_step_of_a_bidirectional_layer_raises():
    def fail(*_):
        raise AssertionError("a layer ran")

    stack = Stack(GILR(3, 4), Bidirectional(GILR(4, 2), GILR(4, 3)), GILR(5, 2))
    stack.layers[0].step = fail
    with pytest.raises(RuntimeError, match=r"got a bidirectional Stack: step\(\) is not available"):
        stack.step(torch.randn(2, 3), stack.initial_state(2))
    with pytest.raises(RuntimeError, match="got a bidirectional Stack"):
        Stack(stack, GILR(2, 2)).step(torch.randn(2, 3), ())


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: Stack(), ValueError, "at least one layer"),
        (lambda: Stack(GILR), TypeError, "expected layer 0 to be a RecurrentLayer, got type"),
        (lambda: Stack(nn.LSTM(3, 4)), TypeError, "expected layer 0 to be a RecurrentLayer, got LSTM"),
        (
            lambda: Stack(LMU(2, 5, order=3, theta=6.0, return_sequences=False), GILR(5, 4)),
            ValueError,
            "layer 0 of a stack returns its last output only",
        ),
        (lambda: Stack(GILR(3, 4), GILR(5, 4)), ValueError, "take the 4 channels that layer 0, .*got input_size 5"),
        (
            lambda: Stack(LegendreMemory(3, 4, 6.0), GILR(12, 4)),
            ValueError,
            r"take the \(3, 4\) channels that layer 0.* LegendreMemory",
        ),
        (lambda: Stack(GILR(3, 4), GILR(4, 4), dropout=1.0), ValueError, "expected dropout from 0 to below 1, got 1.0"),
        (lambda: Stack(GILR(3, 4), GILR(4, 4), dropout=-0.1), ValueError, "expected dropout from 0"),
        (lambda: Stack(GILR(3, 4), GILR(4, 4), dropout="0.1"), TypeError, "expected dropout from 0"),
        (lambda: Stack.of(GILR, 3, 4, num_layers=0), ValueError, "num_layers to be an int of at least 1, got 0"),
        (lambda: Stack.of(GILR, 3, 4, num_layers=2.0), TypeError, "num_layers to be an int of at least 1, got 2.0"),
        (lambda: Stack.of(GILR, 0, 4), ValueError, "input_size to be an int of at least 1, got 0"),
        (lambda: Stack.of(nn.LSTM, 3, 4), TypeError, "expected the class of a layer.*got LSTM"),
        (lambda: Stack.of(GILR(3, 4), 3, 4), TypeError, "expected the class of a layer.*got GILR"),
        (
            lambda: Stack.of(GILR, 3, 4, batch_first=True),
            TypeError,
            "GILR has no option 'batch_first': axes are always",
        ),
        (lambda: Stack.of(GILR, 3, 4, proj_size=2), TypeError, "GILR has no option 'proj_size': it takes forget_bias"),
    ],
)
def test_wrong_parts_get_a_clear_error(build, error, message):
    with pytest.raises(error, match=message):
        build()


@pytest.mark.bad_input
def test_a_wrong_state_gets_a_clear_error():
    stack, x = Stack(GILR(3, 4), GILR(4, 5)), torch.randn(2, 7, 3)
    state = stack.initial_state(2)
    for wrong, got in ((state[0], type(state[0]).__name__), (state[:1], "1 states"), ({}, "dict")):
        message = f"expected a tuple of 2 states, one per layer, got {got}: use initial_state"
        error = ValueError if got == "1 states" else TypeError
        with pytest.raises(error, match=message):
            stack(x, wrong)
        with pytest.raises(error, match=message):
            stack.step(x[:, 0], wrong)
    with pytest.raises(TypeError, match="expected a tuple of 2 states, one per layer, got NoneType"):
        stack.step(x[:, 0], None)
    with pytest.raises(ValueError, match=r"expected state.memory of shape \(2, 4\), got \(2, 5\)"):
        stack(x, state[::-1])
