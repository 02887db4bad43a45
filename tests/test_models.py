import pytest
import torch
from torch import nn

from legato import LMU, RecurrentLMU
from legato.models import SequenceClassifier, SequenceRegressor, Stack

EPS = torch.finfo(torch.float64).eps


def regressor():
    stack = Stack(LMU(2, 5, order=4, theta=9), RecurrentLMU(5, 6, order=3, theta=4))
    return SequenceRegressor(stack, nn.Linear(6, 3)).double()


def test_two_chunks_and_single_steps_equal_one_pass():
    model, x = regressor(), torch.randn(3, 20, 2, dtype=torch.float64)
    whole, end = model(x)
    first, state = model(x[:, :7])
    second, chunked_end = model(x[:, 7:], state)
    outputs, state = [], model.initial_state(3)
    for x_t in x.unbind(1):
        y_t, state = model.step(x_t, state)
        outputs.append(y_t)
    # Twenty steps of sums over fewer than twenty terms of size one.
    close = {"rtol": 0, "atol": 20 * 20 * 10 * EPS}
    torch.testing.assert_close(torch.cat([first, second], 1), whole, **close)
    torch.testing.assert_close(torch.stack(outputs, 1), whole, **close)
    for other in (chunked_end, state):
        for a, b in zip(other, end, strict=True):
            for left, right in zip(a, b, strict=True):
                torch.testing.assert_close(left, right, **close)


def test_padding_changes_nothing():
    model, x = regressor(), torch.randn(2, 10, 2, dtype=torch.float64)
    lengths = torch.tensor([4, 10])
    padded = x.clone()
    padded[0, 4:] = 7.0
    for a, b in zip(model(x, lengths=lengths)[1], model(padded, lengths=lengths)[1], strict=True):
        assert all(torch.equal(left, right) for left, right in zip(a, b, strict=True))


def test_a_classifier_gives_one_vector_of_scores_for_a_sequence():
    model = SequenceClassifier(LMU(1, 8, order=4, theta=10, return_sequences=False), nn.Linear(8, 10))
    scores, _ = model(torch.randn(2, 20, 1))
    assert scores.shape == (2, 10)


def test_a_classifier_refuses_a_layer_that_returns_every_output():
    with pytest.raises(ValueError, match="build it with return_sequences=False"):
        SequenceClassifier(LMU(1, 8, order=4, theta=10), nn.Linear(8, 10))
