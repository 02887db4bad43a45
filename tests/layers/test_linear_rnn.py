"""What is particular to LinearRNN: gates of the user's own. The contract is in tests/test_contract.py."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bounds
from legato import LinearRNN, Stack

GUIDE = Path(__file__).parents[2] / "docs" / "README.md"


class Mixed(nn.Linear):
    """Gates of a user."""

    def forward(self, x):
        decay, impulse = super().forward(x).chunk(2, dim=-1)
        return decay.tanh(), impulse


def mixed(layer, x, h):
    outputs = []
    for x_t in x.unbind(1):
        decay, impulse = layer.gates_function(x_t)
        h = decay * h + impulse
        outputs.append(h if layer.read_function is None else h[:, :2] + x_t[:, :2])
    return torch.stack(outputs, dim=1), h


@pytest.mark.parametrize("reads", [False, True])
def test_values_and_gradients_are_those_of_the_equations(reads, agree):
    options = {"read": lambda h, x: h[..., :2] + x[..., :2], "output_size": 2} if reads else {}
    layer = LinearRNN(3, 5, Mixed(3, 10), **options).double()
    agree(layer, mixed)
    assert layer.output_size == (2 if reads else 5)


@pytest.fixture
def example():
    """The class of the guide."""
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL) if "legato.LinearRNN" in c)
    found = {}
    exec(compile(code, str(GUIDE), "exec"), found)
    layer_lines = code[code.index("class ") : code.index("output, state =")].split("\n")
    assert len([line for line in layer_lines if line]) <= 20
    assert found["output"].shape == (2, 1000, 64)
    return found["RealGatedLRU"]


def griffin(layer, x, h):
    outputs = []
    for x_t in x.unbind(1):
        r, i, value = layer.products(x_t).chunk(3, dim=-1)
        a = torch.exp(-8 * F.softplus(layer.p) * torch.sigmoid(r))
        h = a * h + torch.sqrt(1 - a**2) * torch.sigmoid(i) * value
        outputs.append(h * F.gelu(layer.output_gate(x_t)))
    return torch.stack(outputs, dim=1), h


def test_the_layer_of_the_guide_is_its_equations(example, agree):
    layer = example(3, 5).double()
    nn.init.uniform_(layer.p, -1, 1)  # 1 - a^2, as the loop has it, loses digits near a = 1
    agree(layer, griffin, terms=64)


def test_the_layer_of_the_guide_keeps_the_contract(example):
    layer = Stack.of(example, 3, 5, num_layers=2).double()
    x = torch.randn(2, 12, 3, dtype=torch.float64)
    lengths = torch.tensor([12, 4])
    first, state = layer(x[:, :5], lengths=lengths.clamp(max=5))
    second, state = layer(x[:, 5:], state, lengths=(lengths - 5).clamp(min=0))

    def one_pass(x):
        return layer(x, lengths=lengths)

    bounds.assert_agrees((torch.cat([first, second], dim=1), state), one_pass, x, terms=64 * 12)
    bounds.assert_agrees(layer(x[1:, :4])[0], lambda x: one_pass(x)[0][1:, :4], x, terms=64 * 12)
    stepped, outputs = layer.initial_state(2), []
    for t in range(12):
        output_t, stepped = layer.step(x[:, t], stepped)
        outputs.append(output_t[0])
    bounds.assert_agrees(torch.stack(outputs), lambda x: one_pass(x)[0][0], x, terms=64 * 12)


def test_functions_without_parameters_are_fine():
    layer = LinearRNN(2, 2, lambda x: (torch.tensor(0.5), x))
    output, state = layer(torch.ones(1, 3, 2))
    assert output[0, :, 0].tolist() == [1.0, 1.5, 1.75]
    assert state.memory.tolist() == [[1.75, 1.75]]
    assert layer.double().initial_state(1).memory.dtype == torch.float64
    assert layer(torch.ones(1, 3, 2, dtype=torch.float64))[0].dtype == torch.float64


def test_gates_run_without_autocast():
    """A decay of 0.9995 is one in 16 bits."""
    gates, seen = Mixed(1, 2), []
    gates.register_forward_hook(lambda *arguments: seen.append(arguments[-1]))
    layer = LinearRNN(1, 1, gates)
    x = torch.randn(1, 8, 1).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = layer(x)
    assert all(part.dtype == torch.float32 for parts in seen for part in parts)
    assert output.dtype == torch.bfloat16


@pytest.mark.bad_input
def test_gates_that_do_not_fit_raise():
    x = torch.ones(1, 3, 2)
    wrong = {
        r"expected gates\(x\) to return two tensors, decay and impulse, got tensor": lambda x: x,
        r"to return two tensors, decay and impulse, got \(0.5, ": lambda x: (0.5, x),
        r"an impulse of shape \(1, 3, 4\), got \(1, 3, 2\): \(batch, time, hidden_size\)": lambda x: (x, x),
        r"expected gates\(x\) to return real tensors.*LRU": lambda x: (torch.tensor(1j), torch.cat([x, x], dim=2)),
        r"decay must broadcast to the impulse's shape \(1, 3, 4\), got \(3,\)": lambda x: (
            torch.ones(3),
            torch.cat([x, x], dim=2),
        ),
    }
    for message, gates in wrong.items():
        with pytest.raises((TypeError, ValueError), match=message):
            LinearRNN(2, 4, gates)(x)


@pytest.mark.bad_input
def test_a_layer_without_gates_raises():
    with pytest.raises(TypeError, match=r"got None: pass a function of x .* or define gates\(\) in a subclass"):
        LinearRNN(2, 4)
    with pytest.raises(ValueError, match="expected hidden_size to be an int of at least 1, got 0"):
        LinearRNN(2, 0, Mixed(2, 4))
    with pytest.raises(ValueError, match="expected output_size to be an int of at least 1, got 0"):
        LinearRNN(2, 4, Mixed(2, 4), output_size=0)
