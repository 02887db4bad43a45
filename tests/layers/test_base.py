"""A layer written as layers/_base.py says is a whole layer."""

import re
import textwrap
from typing import NamedTuple

import torch

import legato.layers._base as base
from legato.ops.recurrence import linear_recurrence


def test_the_layer_in_the_docstring_works():
    block = re.search(r"::\n\n(    class LeakyState.*?)\n\nExport", base.__doc__, re.DOTALL).group(1)
    names = {**vars(base), "NamedTuple": NamedTuple, "linear_recurrence": linear_recurrence, "__name__": "example"}
    exec(textwrap.dedent(block), names)
    layer = names["Leaky"](3, 5).double()
    x = torch.randn(2, 20, 3, dtype=torch.float64)
    lengths = torch.tensor([20, 7])
    output, state = layer(x, lengths=lengths)
    steps = layer.initial_state(2)
    for t in range(7):
        step, steps = layer.step(x[:, t], steps)
        assert torch.allclose(output[:, t], step)
    assert torch.allclose(state.memory[1], steps.memory[1])
    assert not output[1, 7:].any()
    again, state = layer(x[:, 7:], steps)
    assert torch.allclose(again[0], output[0, 7:])


def test_an_activation_can_be_a_function():
    assert base.activation_function(torch.sin) is torch.sin
    assert base.activation_function("identity") is None
