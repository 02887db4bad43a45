"""What is particular to LMU: its equations, its two forms, its memory in training; the rest is in test_contract.py."""

import copy

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import bounds
import draws
from legato.layers import LMU, lmu
from legato.layers.lmu import LMUState
from legato.legendre import delay_network


def assert_agrees(found, run, *tensors, steps):
    """Sums of at most 16 products a step, through the steps."""
    bounds.assert_agrees(found, run, *tensors, terms=16 * steps)


@pytest.fixture
def small_segments(monkeypatch):
    """Segments of the least length, 32 steps, so that short inputs have several."""
    monkeypatch.setattr(lmu, "MAX_STORED_BYTES", 1)
    monkeypatch.setattr(lmu, "SEGMENT_BYTES", 1)


def equations(layer, x):
    """(18), (19) and (20), a step and a channel at a time."""
    A, B = delay_network(layer.memory.order, layer.memory.window().detach())
    A, B = A.expand(layer.memory.input_size, -1, -1), B.expand(layer.memory.input_size, -1)
    m, outputs = [torch.zeros(len(x), layer.memory.order, dtype=x.dtype)] * layer.memory.input_size, []
    for t in range(x.shape[1]):
        u = torch.tanh(x[:, t] @ layer.encoder.weight.T + layer.encoder.bias)
        m = [m[c] @ A[c].T + u[:, c, None] * B[c] for c in range(len(m))]
        scaled = torch.cat([m[c] * layer.memory.scale[c] for c in range(len(m))], dim=1)
        z = scaled @ layer.memory_to_output.weight.T + x[:, t] @ layer.input_to_output.weight.T
        outputs.append(torch.relu(z + layer.memory_to_output.bias))
    return torch.stack(outputs, dim=1)


@pytest.mark.parametrize("theta", [9.0, [5.0, 9.0]])
def test_the_output_is_that_of_the_equations(theta):
    layer = LMU(3, 6, memory_size=2, order=5, theta=theta, encoder_activation="tanh", dtype=torch.float64)
    x = torch.randn(2, 50, 3, dtype=torch.float64)
    torch.nn.init.normal_(layer.encoder.bias)
    torch.nn.init.normal_(layer.memory_to_output.bias)
    layer.calibrate(x)
    assert_agrees(layer(x)[0], lambda x: equations(layer, x), x, steps=50)


def test_the_paper_s_network_has_its_parameters():
    layer = LMU(1, 346, order=468, theta=784, return_sequences=False)
    assert sum(p.numel() for p in layer.parameters()) + 346 * 10 + 10 == 166_092
    layer = LMU(1, 346, order=468, theta=784, input_to_output=False, bias=False)
    assert sum(p.numel() for p in layer.parameters()) == 1 + 468 * 346


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"memory_size": 3}, {"theta": [4.0, 6.0], "memory_size": 2}])
def test_the_last_output_alone_is_the_last_of_all(options):
    every = LMU(2, 6, **{"order": 5, "theta": 7.0, "dtype": torch.float64} | options)
    last = LMU(2, 6, **{"order": 5, "theta": 7.0, "dtype": torch.float64, "return_sequences": False} | options)
    last.load_state_dict(every.state_dict())
    data = torch.randn(3, 45, 2, dtype=torch.float64)

    def with_gradients(output, layer):
        return [output, *torch.autograd.grad(output.square().sum(), list(layer.parameters()))]

    for x in (data, data.clone().requires_grad_()):  # with and without the shortcut for data
        found = with_gradients(last(x)[0], last)
        assert_agrees(found, lambda x: with_gradients(every(x)[0][:, -1], every), x, steps=45)


def test_the_last_output_never_builds_the_sequence_of_memories():
    layer = LMU(1, 4, order=16, theta=100, return_sequences=False)
    x = torch.randn(8, 300, 1)
    layer(x)
    largest = largest_tensor(lambda: layer(x)[0].sum().backward())
    assert largest <= 300 * 16 + 8 * 300  # the impulse response


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    numbers = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return result


def largest_tensor(run):
    with Largest() as mode:
        run()
    return mode.numbers


def bytes_kept(layer, x):
    """Bytes of the distinct storages that the graph holds for the backward, weights aside."""
    weights = {p.untyped_storage().data_ptr() for p in layer.state_dict().values()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output, _ = layer(x)
    assert output.requires_grad
    return sum(size for size, _ in kept.values())


def test_training_memory_does_not_grow_with_the_order_times_time(small_segments):
    def growth(order, recompute):
        """Bytes that 4,096 more steps of two rows add."""
        layer = LMU(1, 3, order=order, theta=50, recompute=recompute)
        return bytes_kept(layer, torch.randn(2, 8192, 1)) - bytes_kept(layer, torch.randn(2, 4096, 1))

    memories = 2 * 4096 * 4  # bytes, for each order
    assert growth(32, False) - growth(8, False) >= (32 - 8) * memories
    # The states between segments remain, one in sqrt(T) steps.
    assert growth(32, True) - growth(8, True) <= (32 - 8) * memories / 4096**0.5


@pytest.mark.parametrize("options", [{}, {"trainable_theta": True}, {"input_to_output": False, "bias": False}])
@pytest.mark.parametrize("condition", ["plain", "lengths and resets"])
def test_recomputing_segments_changes_nothing(small_segments, options, condition):
    draws.seed(3)
    once = LMU(2, 6, order=5, theta=7.0, dtype=torch.float64, recompute=False, **options)
    again = LMU(2, 6, order=5, theta=7.0, dtype=torch.float64, **options)
    again.load_state_dict(once.state_dict())
    x = torch.randn(3, 111, 2, dtype=torch.float64)
    arguments = {}
    if condition != "plain":
        arguments = {"lengths": torch.tensor([32, 0, 90]), "reset": torch.rand(3, 111) < 0.05}

    def run(layer, x):
        output, state = layer(x, **arguments)
        loss = output.square().sum() + state.memory.square().sum()
        return [output, state.memory, *torch.autograd.grad(loss, list(layer.parameters()))]

    assert_agrees(run(again, x), lambda x: run(once, x), x, steps=111)
    with torch.no_grad():
        assert_agrees(again(x, **arguments)[0], lambda x: once(x, **arguments)[0], x, steps=111)


@pytest.mark.parametrize("options", [{}, {"trainable_theta": True, "memory_size": 2}, {"activation": "gelu"}])
def test_every_kind_of_derivative_is_that_of_one_pass(small_segments, options):
    draws.seed(3)
    once = LMU(2, 3, order=4, theta=7.0, dtype=torch.float64, recompute=False, **options)
    again = LMU(2, 3, order=4, theta=7.0, dtype=torch.float64, **options)
    again.load_state_dict(once.state_dict())
    x = torch.randn(2, 70, 2, dtype=torch.float64, requires_grad=True)
    start = torch.randn(2, once.memory.input_size, 4, dtype=torch.float64, requires_grad=True)

    def run(layer, x, memory):
        def loss(x):
            output, state = layer(x, LMUState(memory))
            return output.square().sum() + state.memory.square().sum()

        sources = [x, memory, *layer.parameters()]
        first = torch.autograd.grad(loss(x), sources, create_graph=True)
        second = torch.autograd.grad(sum(grad.square().sum() for grad in first), sources)
        forward = torch.func.jvp(loss, (x,), (torch.ones_like(x),))[1]
        output, batch = layer(x, LMUState(memory))[0][0, -1], torch.eye(3, dtype=torch.float64)
        mapped = torch.autograd.grad(output, sources, batch, is_grads_batched=True, allow_unused=True)
        return [*first, *second, torch.func.grad(loss)(x), forward, *mapped]

    # A second derivative sums over the steps twice.
    assert_agrees(run(again, x, start), lambda *x: run(once, *x), x, start, steps=70 * 70)


def test_an_activation_with_weights_trains_them(small_segments):
    once, again = (
        LMU(1, 3, order=4, theta=10, activation=torch.nn.PReLU(), encoder_activation=torch.nn.PReLU(), recompute=r)
        for r in (False, True)
    )
    again.load_state_dict(once.state_dict())
    x, wide = torch.randn(2, 100, 1), copy.deepcopy(once).double()

    def gradients(layer, x):
        return torch.autograd.grad(layer(x)[0].square().sum(), list(layer.parameters()))

    found = gradients(again, x)
    assert all(gradient.any() for gradient in found)
    assert_agrees(found, lambda x: gradients(wide, x), x, steps=100)


def test_a_training_step_builds_the_memories_of_one_segment_only(small_segments):
    layer = LMU(1, 3, order=32, theta=50)
    x = torch.randn(2, 8192, 1)
    layer(x)
    largest = largest_tensor(lambda: layer(x)[0].sum().backward())
    of_a_segment = 2 * layer._segment_length(x) * 32
    weights = (32 + 32) * 32 * 32  # of a chunk of the memory
    assert largest <= max(of_a_segment, weights, 2 * 8192 * 3) < 2 * 8192 * 32 / 4


def test_a_recomputed_segment_drops_the_same_memories(small_segments):
    layer = LMU(1, 3, order=4, theta=10, memory_dropout=0.5, activation="identity", dtype=torch.float64)
    x = torch.randn(2, 100, 1, dtype=torch.float64)
    draws.seed(7)
    output, _ = layer(x)
    draws.seed(8)  # what happens in between draws other numbers
    (gradient,) = torch.autograd.grad(output.sum(), layer.memory_to_output.weight)
    # The output is linear in W_m: sum(o) = <W_m, dsum(o)/dW_m> + the rest, for the very mask of the forward.
    rest = F.linear(x, layer.input_to_output.weight, layer.memory_to_output.bias)
    expected, terms = (output - rest).sum(), gradient * layer.memory_to_output.weight
    # Sums over 2 * 100 * 3 outputs, of memories that are sums through 100 steps of order 4; either way.
    magnitude = terms.abs().sum() + output.abs().sum() + rest.abs().sum()
    bounds.assert_close(terms.sum(), expected, magnitude=magnitude, roundings=2 * (600 + 16 * 100))


def test_dropout_acts_in_training_only():
    # Two draws drop the same ones of 2 x 64 numbers with probability 2^-128.
    layer = LMU(1, 3, order=64, theta=100, memory_dropout=0.5, return_sequences=False, activation="identity")
    x = torch.randn(2, 100, 1)
    assert not torch.equal(layer(x)[0], layer(x)[0])
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])


def test_no_row_of_the_encoder_starts_near_zero():
    for seed in range(5):
        draws.seed(seed)
        weight = LMU(3, 4, memory_size=5, order=2, theta=4).encoder.weight
        norms = torch.linalg.vector_norm(weight.double(), dim=1)
        # A norm, a quotient, and a sum of 3 squares.
        bounds.assert_close(norms, torch.ones_like(norms), magnitude=1, roundings=8, dtype=torch.float32)


def test_bad_arguments_raise():
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    for options, message in [
        ({"hidden_size": 0}, "expected hidden_size to be an int of at least 1, got 0"),
        ({"memory_size": 0}, "expected memory_size to be an int of at least 1, got 0"),
        ({"memory_dropout": 1.0}, "expected memory_dropout from 0 to below 1, got 1.0"),
        ({"activation": "rely"}, "expected an activation among identity, gelu, relu.* or a callable, got 'rely'"),
        ({"return_sequences": False, "method": "fft"}, "expected method=None with return_sequences=False, got 'fft'"),
        ({"theta": 0.0}, "1 step or more, got 0.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            LMU(**{"input_size": 1, "hidden_size": 2, "order": 3, "theta": 5.0} | options)
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.mark.compiled
def test_recomputed_segments_compile(small_segments):
    torch._dynamo.reset()
    layer = LMU(1, 3, order=4, theta=10, dtype=torch.float64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 70, 1, dtype=torch.float64)

    def run(model, x):
        output, _ = model(x)
        return [output, *torch.autograd.grad(output.square().sum(), list(layer.parameters()))]

    assert_agrees(run(compiled, x), lambda x: run(layer, x), x, steps=70)


def test_a_gradient_hook_acts_once_on_the_sum_of_segments(small_segments):
    layer, x = LMU(2, 3, order=4, theta=10, dtype=torch.float64), torch.randn(2, 100, 2, dtype=torch.float64)
    names = [name for name, _ in layer.named_parameters()]
    plain, calls = copy.deepcopy(layer), []
    for name, parameter in layer.named_parameters():
        parameter.register_hook(lambda gradient, name=name: calls.append(name) or gradient / 2)
    layer(x)[0].square().sum().backward()
    assert sorted(calls) == sorted(names)

    def gradients(x):
        return torch.autograd.grad(plain(x)[0].square().sum(), list(plain.parameters()))

    assert_agrees(tuple(2 * parameter.grad for parameter in layer.parameters()), gradients, x, steps=100)


def test_a_checkpoint_around_recomputed_segments_works(small_segments):
    layer = LMU(2, 3, order=4, theta=10, dtype=torch.float64)
    x = torch.randn(2, 100, 2, dtype=torch.float64, requires_grad=True)

    def gradients(output, x):
        return torch.autograd.grad(output.square().sum(), [x, *layer.parameters()])

    found = gradients(checkpoint(lambda x: layer(x)[0], x, use_reentrant=False), x)
    assert_agrees(found, lambda x: gradients(layer(x)[0], x), x, steps=100)
