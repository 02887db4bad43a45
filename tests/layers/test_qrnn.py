"""What is particular to QRNN: its convolution and the inputs in its state. The contract is in test_contract.py."""

import pytest
import torch

import bounds
from legato import QRNN


def equations(layer, x, c, lengths=None, reset=None):
    """Section 2 of the paper, a step and a tap of the convolution at a time, zeros before the start and a reset."""
    B, T, _ = x.shape
    k, H = layer.kernel_size, layer.hidden_size
    taps = layer.weight.view(3, H, k, layer.input_size)
    outputs = torch.zeros(B, T, H, dtype=x.dtype)
    finals = []
    for b in range(B):
        start, memory = 0, c[b]
        for t in range(T if lengths is None else int(lengths[b])):
            if reset is not None and reset[b, t]:
                start, memory = t, torch.zeros_like(memory)
            f, o, z = layer.bias.view(3, H) + sum(
                taps[:, :, k - 1 - back] @ x[b, t - back] for back in range(k) if t - back >= start
            )
            memory = f.sigmoid() * memory + (1 - f.sigmoid()) * z.tanh()
            outputs[b, t] = o.sigmoid() * memory
        finals.append(memory)
    return outputs, torch.stack(finals)


@pytest.mark.parametrize("kernel_size", [1, 2, 10])
def test_values_and_gradients_are_those_of_the_equations(kernel_size, agree):
    layer = QRNN(3, 4, kernel_size=kernel_size, dtype=torch.float64)
    agree(layer, equations, terms=16 * kernel_size)
    lengths = torch.tensor([0, 4, 25])
    agree(layer, equations, 3, terms=16 * kernel_size, lengths=lengths, reset=torch.rand(3, 25) < 0.2)


def test_the_state_holds_the_last_inputs_that_count():
    layer = QRNN(1, 2, kernel_size=4, dtype=torch.float64)
    x = torch.arange(1.0, 13.0, dtype=torch.float64).view(2, 6, 1)  # 1 to 6 and 7 to 12
    before = layer.initial_state(2)
    before.inputs[:] = torch.tensor([-3.0, -2.0, -1.0])[:, None]

    def last(**options):
        return layer(x, before, **options)[1].inputs[..., 0].tolist()

    assert last() == [[4, 5, 6], [10, 11, 12]]
    assert last(lengths=torch.tensor([2, 5])) == [[-1, 1, 2], [9, 10, 11]]
    assert last(lengths=torch.tensor([0, 1])) == [[-3, -2, -1], [-2, -1, 7]]
    reset = torch.zeros(2, 6, dtype=torch.bool)
    reset[0, 1] = reset[1, 4] = True
    assert last(reset=reset) == [[4, 5, 6], [0, 11, 12]]
    assert last(reset=reset, lengths=torch.tensor([2, 4])) == [[0, 0, 2], [8, 9, 10]]
    reset[0, 0] = True
    assert last(reset=reset, lengths=torch.tensor([1, 6])) == [[0, 0, 1], [0, 11, 12]]


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_chunks_shorter_than_the_convolution_equal_one_pass(steps):
    layer = QRNN(2, 3, kernel_size=5, dtype=torch.float64)
    x = torch.randn(2, 12, 2, dtype=torch.float64)
    expected_state = layer(x)[1]
    state, outputs = layer.initial_state(2), []
    for chunk in x.split(steps, dim=1):
        output, state = layer(chunk, state)
        outputs.append(output)
    bounds.assert_agrees((torch.cat(outputs, dim=1), state), layer, x, terms=16 * 12)
    assert torch.equal(state.inputs, expected_state.inputs)


def test_a_16_bit_layer_keeps_its_inputs_exactly():
    layer = QRNN(2, 3, kernel_size=3, dtype=torch.bfloat16)
    x = torch.randn(2, 4, 2).bfloat16()
    _, state = layer(x)
    assert state.inputs.dtype == torch.float32
    assert torch.equal(state.inputs, x[:, -2:].float())


def test_it_has_the_paper_s_parameters():
    assert sum(p.numel() for p in QRNN(4, 256, kernel_size=10).parameters()) == 3 * 256 * (10 * 4 + 1)
    layer = QRNN(4, 8, forget_bias=2.0)
    assert layer.kernel_size == 2
    assert layer.bias.tolist() == [2.0] * 8 + [0.0] * 16


@pytest.mark.bad_input
@pytest.mark.parametrize("size", [0, -1, 2.0, None, True])
def test_a_size_that_is_no_positive_int_raises(size):
    error = ValueError if type(size) is int else TypeError
    with pytest.raises(error, match=f"expected kernel_size to be an int of at least 1, got {size}"):
        QRNN(4, 4, kernel_size=size)
    with pytest.raises(error, match="expected hidden_size to be an int of at least 1"):
        QRNN(4, size)
    with pytest.raises(error, match="expected input_size to be an int of at least 1"):
        QRNN(size, 4)


@pytest.mark.bad_input
def test_a_state_of_another_kernel_size_raises():
    x = torch.randn(2, 5, 3)
    with pytest.raises(ValueError, match=r"expected state.inputs of shape \(2, 1, 3\), got \(2, 3, 3\)"):
        QRNN(3, 4)(x, QRNN(3, 4, kernel_size=4).initial_state(2))
