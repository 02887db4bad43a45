"""A layer written as the docstring of ``RecurrentLayer`` says is a whole layer."""

import copy
import doctest

import pytest
import torch

import bounds
import legato.layers.base as base
from legato.layers import LMU, RecurrentLayer


def test_the_layer_in_the_docstring_works():
    names = {"__name__": "example"}
    for example in doctest.DocTestParser().get_examples(RecurrentLayer.__doc__):
        exec(example.source, names)
    layer = names["Leaky"](3, 5).double()
    x = torch.randn(2, 20, 3, dtype=torch.float64)
    lengths = torch.tensor([20, 7])
    output, _ = layer(x, lengths=lengths)
    steps, outputs = layer.initial_state(2), []
    for t in range(7):
        step, steps = layer.step(x[:, t], steps)
        outputs.append(step)
    assert not output[1, 7:].any()
    again, _ = layer(x[:, 7:], steps)

    def one_pass(x):
        output, state = layer(x, lengths=lengths)
        return output[:, :7], state.memory[1], output[0, 7:]

    # Sums of 3 products through 20 steps, of two roundings each.
    bounds.assert_agrees((torch.stack(outputs, 1), steps.memory[1], again[0]), one_pass, x, terms=20 * 4)


def test_an_activation_can_be_a_function():
    assert base.activation_function(torch.sin) is torch.sin
    assert base.activation_function("identity") is None


def test_lengths_may_be_mapped_by_vmap():
    layer = LMU(2, 3, order=4, theta=6.0)
    x, lengths = torch.randn(5, 2, 9, 2), torch.randint(0, 10, (5, 2))
    mapped = torch.vmap(lambda x, lengths: layer(x, lengths=lengths)[0])(x, lengths)
    wide = copy.deepcopy(layer).double()
    for i in range(5):
        # Sums of 4 products and more in matrix products, through 9 steps.
        bounds.assert_agrees(mapped[i], lambda x, i=i: wide(x, lengths=lengths[i])[0], x[i], terms=16 * 9)


@pytest.mark.bad_input
@pytest.mark.parametrize("theta", ["10", None, True])
def test_a_theta_that_is_no_number_is_refused(theta):
    with pytest.raises(TypeError, match="expected theta as a number of steps, or one per channel, got"):
        LMU(2, 3, order=4, theta=theta)


def test_shapes_can_be_had_on_the_meta_device():
    x = torch.randn(2, 9, 2, device="meta")
    for options in ({}, {"return_sequences": False}):
        output, state = LMU(2, 3, order=4, theta=6.0, device="meta", **options)(x)
        assert output.is_meta
        assert state.memory.shape == (2, 1, 4)
