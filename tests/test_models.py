"""Whole networks keep the layers' contract."""

import pytest
import torch
from torch import nn

from legato.layers import LMU, Stack
from legato.models import SequenceClassifier, SequenceRegressor


def layers(last: bool = True):
    return LMU(2, 5, order=3, theta=6.0), LMU(5, 4, order=3, theta=6.0, return_sequences=last)


def test_a_stack_streams_what_it_computes_at_once():
    model = SequenceRegressor(Stack(*layers()), nn.Linear(4, 1))
    x = torch.randn(3, 12, 2)
    at_once, final = model(x)
    state, outputs = model.initial_state(3), []
    for x_t in x.unbind(1):
        y_t, state = model.step(x_t, state)
        outputs.append(y_t)
    torch.testing.assert_close(torch.stack(outputs, 1), at_once)
    torch.testing.assert_close(state, final)


def test_a_stack_classifies_by_its_last_output():
    stack = Stack(*layers(last=False))
    model = SequenceClassifier(stack, nn.Linear(4, 10))
    scores, state = model(torch.randn(3, 12, 2), lengths=torch.tensor([12, 5, 1]))
    assert scores.shape == (3, 10)
    assert [s.memory.shape for s in state] == [(3, 1, 3), (3, 1, 3)]


@pytest.mark.bad_input
def test_wrong_parts_get_a_clear_error():
    with pytest.raises(ValueError, match="build it with return_sequences=False"):
        SequenceClassifier(Stack(*layers()), nn.Linear(4, 10))
