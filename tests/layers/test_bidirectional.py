"""A layer forward and a layer backward; what both share with every layer is held in tests/test_contract.py."""

import copy
import itertools
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils import _pytree as pytree

import bounds
import draws
from legato.layers import GILR, GILRLSTM, LMU, Bidirectional, LegendreMemory, Stack
from legato.layers.base import RecurrentLayer


class SumState(NamedTuple):
    memory: Any


class Sum(RecurrentLayer):
    """h_t = h_{t-1} + x_t, one step after another."""

    State = SumState

    def __init__(self, input_size):
        super().__init__(input_size)
        self.hidden_size = input_size
        self.unused = nn.Parameter(torch.zeros(()))

    def _state_shapes(self):
        return ((self.hidden_size,),)

    def _sequence(self, x, state, lengths, reset):
        h = self.initial_state(len(x)).memory if state is None else state.memory
        states = []
        for t in range(x.shape[1]):
            h = x[:, t] + (h if reset is None else torch.where(reset[:, t, None], 0, h))
            states.append(h)
        states = torch.stack(states, 1)
        return states, SumState(states), SumState(h)


class LSTMState(NamedTuple):
    memory: Any
    hidden: Any


class LSTM(RecurrentLayer):
    """PyTorch's cell, one step after another."""

    State = LSTMState

    def __init__(self, input_size, hidden_size):
        super().__init__(input_size)
        self.hidden_size = hidden_size
        self.cell = nn.LSTMCell(input_size, hidden_size)

    def _state_shapes(self):
        return (self.hidden_size,), (self.hidden_size,)

    def _sequence(self, x, state, lengths, reset):
        c, h = self.initial_state(len(x)) if state is None else state
        outputs = []
        for t in range(x.shape[1]):
            new = self.cell(x[:, t], (h, c))
            counts = torch.tensor(True) if lengths is None else (t < lengths)[:, None]
            h, c = (torch.where(counts, a, b) for a, b in zip(new, (h, c), strict=True))
            outputs.append(h)
        return torch.stack(outputs, 1), None, LSTMState(c, h)


def column(*values):
    return torch.tensor(values, dtype=torch.float32)[None, :, None]


def test_sums_by_hand():
    layer, x = Bidirectional(Sum(1), Sum(1)), column(1, 2, 4, 8, torch.nan)
    start = layer.initial_state(1)._replace(backward=SumState(torch.tensor([[100.0]])))
    output, state = layer(x, start, lengths=torch.tensor([4]))
    assert torch.equal(output[..., :1], column(1, 3, 7, 15, 0))
    assert torch.equal(output[..., 1:], column(115, 114, 112, 108, 0))
    assert (state.forward.memory, state.backward.memory) == (15, 115)
    reset = torch.tensor([[True, False, True, False, True]])  # 1 2 | 4 8
    output, state = layer(x, start, lengths=torch.tensor([4]), reset=reset)
    assert torch.equal(output[..., :1], column(1, 3, 4, 12, 0))
    assert torch.equal(output[..., 1:], column(3, 2, 112, 108, 0))
    assert (state.forward.memory, state.backward.memory) == (12, 3)


@pytest.mark.parametrize("num_layers", [1, 2])
def test_states_and_outputs_are_where_the_lstm_of_torch_has_them(num_layers):
    theirs = nn.LSTM(3, 4, num_layers, bidirectional=True, batch_first=True)
    ours = Stack.of(LSTM, 3, 4, num_layers=num_layers, bidirectional=True)
    for number, layer in enumerate(ours.layers):
        for part, suffix in ((layer.forward_layer, ""), (layer.backward_layer, "_reverse")):
            for name, weight in part.cell.named_parameters():
                weight.data = getattr(theirs, f"{name}_l{number}{suffix}").data
    x, lengths = torch.randn(3, 7, 3), torch.tensor([7, 4, 1])
    h_0, c_0 = torch.randn(2, 2 * num_layers, 3, 4).unbind(0)
    start = tuple(
        layer.State(*(LSTMState(c_0[2 * n + k], h_0[2 * n + k]) for k in range(2)))
        for n, layer in enumerate(ours.layers)
    )
    packed, (h_n, c_n) = theirs(pack_padded_sequence(x, lengths, batch_first=True), (h_0, c_0))
    expected, _ = pad_packed_sequence(packed, batch_first=True, total_length=7)
    wide = copy.deepcopy(ours).double()

    def run(model, x, start):
        output, state = model(x, start, lengths=lengths)
        found = [part for both in state for part in both]
        return output, torch.stack([part.hidden for part in found]), torch.stack([part.memory for part in found])

    for found in (run(ours, x, start), (expected, h_n, c_n)):
        # 4 roundings of a gate, or sums of at most 16 products, through 7 steps.
        bounds.assert_agrees(found, lambda *x: run(wide, *x), x, start, terms=16 * 7)


def test_each_segment_alone_gives_the_same():
    """The meaning of lengths and resets, spelled out, with all gradients."""
    draws.seed(1)
    forward, backward = GILRLSTM(3, 4).double(), LMU(3, 5, order=4, theta=6.0).double()
    layer = Bidirectional(forward, backward)
    x = torch.randn(4, 23, 3, dtype=torch.float64, requires_grad=True)
    state = pytree.tree_map(lambda s: torch.randn_like(s).double().requires_grad_(), layer.initial_state(4))
    lengths, reset = torch.tensor([23, 9, 0, 1]), torch.rand(4, 23) < 0.2
    reset[:, 0] = torch.tensor([True, False, True, True])
    expected = torch.zeros_like(layer(x, state)[0])
    ends = []
    for b, length in enumerate(lengths.tolist()):
        cuts = [0, *(t for t in range(1, length) if reset[b, t]), length]
        before, after = pytree.tree_map(lambda s, b=b: s[b : b + 1], tuple(state))
        for number, (start, stop) in enumerate(itertools.pairwise(cuts)):
            fresh = number > 0 or (length > 0 and reset[b, 0])
            piece = x[b : b + 1, start:stop]
            a, before = forward(piece, None if fresh else before)
            c, final_of_piece = backward(piece.flip(1), after if stop == length else None)
            expected[b, start:stop] = torch.cat([a, c.flip(1)], dim=-1)[0]
            if number == 0:
                out = final_of_piece
        ends.append((before, out))
    ends = pytree.tree_map(lambda *rows: torch.cat(rows), *ends)
    found = [expected, *pytree.tree_leaves(ends)]
    weights = [torch.randn_like(value) for value in found]

    def with_gradients(values, x, state):
        loss = sum((w * v).sum() for w, v in zip(weights, values, strict=True))
        return [*values, *torch.autograd.grad(loss, [x, *pytree.tree_leaves(state), *layer.parameters()])]

    def one_pass(x, state):
        output, final = layer(x, state, lengths=lengths, reset=reset)
        return with_gradients([output, *pytree.tree_leaves(final)], x, state)

    # Sums of at most 16 products a step.
    bounds.assert_agrees(with_gradients(found, x, state), one_pass, x, state, terms=16 * 23)


def test_the_last_outputs_follow_the_last_step_and_step_zero():
    options = {"order": 3, "theta": 5.0}
    every = Bidirectional(LMU(2, 3, **options), LMU(2, 4, **options))
    last = Bidirectional(LMU(2, 3, return_sequences=False, **options), LMU(2, 4, return_sequences=False, **options))
    last.load_state_dict(every.state_dict())
    x, lengths = torch.randn(3, 8, 2), torch.tensor([8, 5, 0])
    wide = copy.deepcopy(every).double()
    for given in (None, lengths):
        found, found_state = last(x, lengths=given)
        assert found.shape == (3, 7)

        def ends(x, given=given):
            output, state = wide(x, lengths=given)
            at = (torch.full((3,), 8) if given is None else given).sub(1).clamp(min=0)
            return torch.cat([output[torch.arange(3), at, :3], output[:, 0, 3:]], dim=1), state

        bounds.assert_agrees((found, found_state), ends, x, terms=16 * 8)


def test_the_backward_state_enters_the_previous_chunk():
    layer = Bidirectional(GILR(3, 4), GILR(3, 5)).double()
    x, reset = torch.randn(2, 12, 3, dtype=torch.float64), torch.rand(2, 12) < 0.2
    reset[0, 7] = True  # between the chunks, of one row
    start = layer.initial_state(2)
    late, (_, back) = layer(x[:, 7:], start, reset=reset[:, 7:])
    back = GILR.State(back.memory.masked_fill(reset[:, 7, None], 0))
    early, (_, back) = layer(x[:, :7], start._replace(backward=back), reset=reset[:, :7])

    def one_pass(x):
        output, final = layer(x, reset=reset)
        return output[..., 4:], final.backward

    bounds.assert_agrees((torch.cat([early, late], dim=1)[..., 4:], back), one_pass, x, terms=16 * 12)


@pytest.mark.compiled
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_layer_equals_the_layer(dynamic):
    torch._dynamo.reset()
    layer = Bidirectional(GILR(3, 4), GILR(3, 5)).double()
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for steps in (5, 9) if dynamic else (5,):
        x = torch.randn(2, steps, 3, dtype=torch.float64, requires_grad=True)
        options = {"lengths": torch.tensor([5, 3]), "reset": torch.rand(2, steps) < 0.3} if dynamic else {}
        weight = torch.randn(2, steps, 9, dtype=torch.float64)

        def with_gradients(model, x, weight=weight, options=options):
            output, state = model(x, **options)
            return output, state, torch.autograd.grad((weight * output).sum(), x)[0]

        found = with_gradients(compiled, x)
        bounds.assert_agrees(found, lambda x, run=with_gradients: run(layer, x), x, terms=16 * steps)


def test_a_step_raises_an_error_that_says_what_to_do():
    layer = Bidirectional(GILR(3, 4), GILR(3, 4))
    with pytest.raises(
        RuntimeError, match=r"got a bidirectional Bidirectional: step\(\) is not available.*forward layers"
    ):
        layer.step(torch.randn(2, 3), layer.initial_state(2))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Bidirectional(GILR, GILR), "expected forward to be a RecurrentLayer, got type: pass a layer"),
        (lambda: Bidirectional(GILR(3, 4), nn.LSTM(3, 4)), "expected backward to be a RecurrentLayer, got LSTM"),
        (lambda: Bidirectional(GILR(3, 4), GILR(2, 4)), "with one input_size, got 3 and 2"),
        (
            lambda: Bidirectional(GILR(3, 4), LMU(3, 4, order=2, theta=5.0, return_sequences=False)),
            "with one return_sequences, got True and False",
        ),
        (
            lambda: Bidirectional(LegendreMemory(3, 4, 6.0), GILR(3, 4)),
            r"got a LegendreMemory whose output_size is \(3",
        ),
        (
            lambda: Bidirectional(GILR(3, 4), Bidirectional(GILR(3, 4), GILR(3, 4))),
            "expected backward to read forward, got a bidirectional Bidirectional",
        ),
    ],
)
def test_wrong_layers_get_a_clear_error(build, message):
    with pytest.raises((TypeError, ValueError), match=message):
        build()
