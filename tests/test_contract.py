"""Every layer exported from legato.layers keeps the one contract: parallel = chunked = streamed, and the rest of it.

A new layer joins by being exported. Give a required constructor argument of a new name a value in ARGUMENTS, and add
the options worth a run of their own to OPTIONS. A layer made of layers joins by a function in MADE_OF_LAYERS.
"""

import copy
import functools
import inspect
import io
import pickle

import jaxtyping
import pytest
import torch
from torch.utils import _pytree as pytree

import bounds
import draws
import legato.layers
from legato.layers import GILR, LMU, Bidirectional, LinearRNN, LinearSurrogate, Stack
from legato.layers.base import RecurrentLayer

ARGUMENTS = {"input_size": 3, "hidden_size": 4, "order": 4, "theta": 6.0}
OPTIONS = {
    "LRU": [{"output_size": 3, "r_min": 0.5, "r_max": 0.99, "max_phase": 0.5}],
    "LegendreMemory": [
        {"theta": [4.0, 6.0, 9.0]},
        {"trainable_theta": True},
        {"method": "toeplitz", "discretizer": "bilinear"},
        {"return_sequences": False},
        {"return_sequences": False, "order": 1},
        {"return_sequences": False, "theta": [4.0, 6.0, 9.0]},
        {"return_sequences": False, "order": 2, "trainable_theta": True},
    ],
    "LMU": [
        {"return_sequences": False},
        {"return_sequences": False, "memory_size": 3},
        {"memory_size": 2, "theta": [5.0, 9.0], "encoder_activation": "tanh", "activation": "identity"},
        {"memory_size": 2, "theta": [5.0, 9.0], "trainable_theta": True, "return_sequences": False},
        {"input_to_output": False, "bias": False, "activation": "tanh"},
        {"memory_size": 16, "order": 3},  # as many channels as stay last in the store
    ],
    "QRNN": [{"kernel_size": 1}, {"kernel_size": 6}],
    "RecurrentLMU": [
        {"return_sequences": False, "memory_size": 2, "theta": [5.0, 9.0], "trainable_theta": True},
        {"hidden_cell": "lstm", "bias": True, "memory_size": 2},
        {"hidden_cell": "gru", "input_to_hidden": False},
        {"hidden_to_memory": False, "memory_to_memory": False, "hidden_cell": "relu"},
    ],
    "SRU": [{"hidden_size": 3, "activation": "identity"}],
}
BATCH, STEPS, SPLIT = 3, 37, 20
CONDITIONS = ["plain", "lengths", "resets", "lengths and resets"]


def stack(input_size, hidden_size, order, theta, return_sequences=True):
    upper = LMU(hidden_size, hidden_size, order=order, theta=theta, return_sequences=return_sequences)
    return Stack(GILR(input_size, hidden_size), upper)


def bidirectional(input_size, hidden_size, order, theta, return_sequences=True):
    options = {"order": order, "theta": theta, "return_sequences": return_sequences}
    return Bidirectional(LMU(input_size, hidden_size, **options), LMU(input_size, 5, **options))


class Gates(torch.nn.Linear):
    def forward(self, x):
        decay, impulse = super().forward(x).chunk(2, dim=-1)
        return decay.sigmoid(), impulse


def multiplied(states, x):
    return states * x[..., :1].sigmoid()


def linear_rnn(input_size, hidden_size, reads=False):
    return LinearRNN(input_size, hidden_size, Gates(input_size, 2 * hidden_size), multiplied if reads else None)


def linear_surrogate(input_size, hidden_size, cell="LSTMCell", surrogate="GILR"):
    layer = getattr(legato.layers, surrogate)(input_size, hidden_size)
    return LinearSurrogate(getattr(torch.nn, cell)(input_size, hidden_size), layer)


MADE_OF_LAYERS = {
    "Bidirectional": [(bidirectional, {}), (bidirectional, {"return_sequences": False})],
    "LinearRNN": [(linear_rnn, {}), (linear_rnn, {"reads": True})],
    "LinearSurrogate": [(linear_surrogate, {}), (linear_surrogate, {"cell": "GRUCell", "surrogate": "QRNN"})],
    "Stack": [(stack, {}), (stack, {"return_sequences": False})],
}


def layer_classes() -> list[type[RecurrentLayer]]:
    exported = [getattr(legato.layers, name) for name in legato.layers.__all__]
    found = [c for c in exported if inspect.isclass(c) and issubclass(c, RecurrentLayer)]
    return [c for c in found if c is not RecurrentLayer and c.__name__ not in MADE_OF_LAYERS]


CASES = [(c, options) for c in layer_classes() for options in [{}, *OPTIONS.get(c.__name__, [])]]
CASES += [case for cases in MADE_OF_LAYERS.values() for case in cases]
NAMES = ["-".join([c.__name__, *(f"{k}={v}" for k, v in options.items())]) for c, options in CASES]
every_layer = pytest.mark.parametrize("case", CASES, ids=NAMES)
# A bidirectional layer has no step, and its chunks are another thing: tests/layers/test_bidirectional.py.
every_streaming_layer = pytest.mark.parametrize(
    "case", [pytest.param(c, id=name) for c, name in zip(CASES, NAMES, strict=True) if c[0] is not bidirectional]
)


def build(case, dtype=torch.float64, seed=0, **changes) -> RecurrentLayer:
    layer_class, options = case
    parameters = inspect.signature(layer_class).parameters.values()
    required = [p.name for p in parameters if p.default is p.empty]
    draws.seed(seed)
    layer = layer_class(**{name: ARGUMENTS[name] for name in required} | options | changes).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            if not parameter.any():  # a bias of zero would hide its mistakes
                parameter.normal_(std=0.3)
    return layer


def inputs(layer, condition="plain", batch=BATCH, steps=STEPS, dtype=torch.float64):
    """x, a state that is not zero, lengths or None, reset or None."""
    draws.seed(1)
    x = torch.randn(batch, steps, layer.input_size, dtype=dtype, requires_grad=True)
    zeros = layer.initial_state(batch, dtype=layer._carry_dtype())
    state = pytree.tree_map(lambda s: torch.randn_like(s).mul_(0.5).requires_grad_(), zeros)
    lengths = torch.tensor([0, SPLIT + 5, steps])[:batch] if "lengths" in condition else None
    reset = torch.rand(batch, steps) < 0.1 if "resets" in condition else None
    return x, state, lengths, reset


def in_one_pass(layer, x, state, lengths, reset):
    return layer(x, state, lengths=lengths, reset=reset)


def in_two_chunks(layer, x, state, lengths, reset):
    outputs = []
    for part in (slice(0, SPLIT), slice(SPLIT, None)):
        steps = x[:, part].shape[1]
        until = None if lengths is None else (lengths - part.start).clamp(0, steps)
        output, state = layer(x[:, part], state, lengths=until, reset=None if reset is None else reset[:, part])
        outputs.append(output)
    if layer.return_sequences:
        return torch.cat(outputs, dim=1), state
    in_first = torch.zeros(len(x), dtype=torch.bool) if lengths is None else lengths <= SPLIT
    return where(in_first, *outputs), state


def in_single_steps(layer, x, state, lengths, reset):
    """The meaning of lengths and resets, spelled out."""
    steps = x.shape[1]
    lengths = torch.full((len(x),), steps) if lengths is None else lengths
    outputs = []
    for t in range(steps):
        if reset is not None:
            state = where(reset[:, t] & (t < lengths), pytree.tree_map(torch.zeros_like, state), state)
        output, new = layer.step(x[:, t], state)
        state = where(t < lengths, new, state)
        outputs.append(where(t < lengths, output, torch.zeros_like(output)))
    if layer.return_sequences:
        return torch.stack(outputs, dim=1), state
    last = torch.stack(outputs, dim=1)[torch.arange(len(x)), (lengths - 1).clamp(min=0)]
    return where(lengths > 0, last, torch.zeros_like(last)), state


def where(rows, states, others):
    """Row by row, in every tensor of a state."""
    return pytree.tree_map(lambda a, b: torch.where(rows.view(-1, *[1] * (a.ndim - 1)), a, b), states, others)


def parts(name, state):
    """The tensors of a state, each by its name: "final.memory", in a stack "final[0].memory"."""
    return {name + pytree.keystr(path): part for path, part in pytree.tree_flatten_with_path(state)[0]}


def results(layer, how, x, state, lengths=None, reset=None) -> dict[str, torch.Tensor]:
    """Output, final state, and the gradients of a weighted sum of both with respect to all that has one."""
    output, final = how(layer, x, state, lengths, reset)
    draws.seed(2)
    loss = sum((torch.randn(value.shape, dtype=value.dtype) * value).sum() for value in flat((output, final)))
    sources = {"x": x, **parts("state", state), **dict(layer.named_parameters())}
    sources = {name: tensor for name, tensor in sources.items() if tensor.requires_grad}
    gradients = torch.autograd.grad(loss, list(sources.values()), allow_unused=True)
    return {"output": output, **parts("final", final)} | {
        f"gradient of {name}": torch.zeros_like(source) if g is None else g
        for (name, source), g in zip(sources.items(), gradients, strict=True)
    }


def assert_close(found, expected, magnitude, steps=STEPS):
    """Both are right to likely roundings: each value is a sum of at most ``16 * steps`` products."""
    assert found.keys() == expected.keys()
    found = {name: found[name] for name in expected}
    both = 2 if all(x.dtype == torch.float64 for x in found.values()) else 1
    counts = {name: both * bounds.likely(x.numel(), terms=16 * steps) for name, x in expected.items()}
    bounds.assert_close(found, expected, magnitude=magnitude, roundings=counts)


def magnitudes(layer, x, state, *options):
    """Of ``results`` in one pass."""
    return bounds.sensitivity(lambda x, state: results(layer, in_one_pass, x, state, *options), x, state)


@functools.cache
def magnitudes_of_case(number, condition):
    layer = build(CASES[number])
    return magnitudes(layer, *inputs(layer, condition))


def magnitudes_of_outputs(layer, x, state, **options):
    """Of what the layer returns, numbered."""
    return bounds.sensitivity(lambda x, state: numbered(flat(layer(x, state, **options))), x, state)


@pytest.fixture
def unchecked():
    """The layers' own errors, not those of the shape checker that the test run puts before them."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


def test_some_layers_are_found():
    assert {c.__name__ for c in layer_classes()} >= {"LMU", "LegendreMemory", "RecurrentLMU"}
    assert all(hasattr(legato.layers, name) for name in MADE_OF_LAYERS)


@every_streaming_layer
@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("how", [in_two_chunks, in_single_steps])
def test_chunks_and_steps_equal_one_pass(case, how, condition):
    layer = build(case)
    arguments = inputs(layer, condition)
    expected = results(layer, in_one_pass, *arguments)
    assert_close(results(layer, how, *arguments), expected, magnitudes_of_case(CASES.index(case), condition))


@every_layer
def test_no_state_is_the_initial_state(case):
    layer = build(case)
    x, _, lengths, reset = inputs(layer, "lengths and resets")
    zeros = layer.initial_state(BATCH)
    assert type(zeros) is layer.State
    assert next(iter(parts("state", zeros))).endswith(".memory")
    for options in ({}, {"lengths": lengths}, {"reset": reset}):
        found, expected = (flat(layer(x, state, **options)) for state in (None, zeros))
        assert_close(numbered(found), numbered(expected), magnitudes_of_outputs(layer, x, zeros, **options))


def flat(result):
    output, state = result
    return [output, *pytree.tree_leaves(state)]


def numbered(tensors):
    return {str(i): tensor for i, tensor in enumerate(tensors)}


@every_streaming_layer
def test_no_output_depends_on_what_comes_later(case):
    layer = build(case)
    x, state, _, _ = inputs(layer)
    lengths = torch.full((BATCH,), SPLIT)
    total = sum(value.sum() for value in flat(layer(x, state, lengths=lengths)))
    (gradient,) = torch.autograd.grad(total, x)
    assert not gradient[:, SPLIT:].any()
    if layer.return_sequences:
        (gradient,) = torch.autograd.grad(layer(x, state)[0][:, :SPLIT].sum(), x)
        assert not gradient[:, SPLIT:].any()
    assert gradient[:, :SPLIT].any()


@every_layer
def test_a_row_alone_equals_the_row_in_a_batch(case):
    layer = build(case)
    x, state, lengths, reset = inputs(layer, "lengths and resets")
    together = flat(layer(x, state, lengths=lengths, reset=reset))
    magnitude = magnitudes_of_outputs(layer, x, state, lengths=lengths, reset=reset)
    for row in range(BATCH):
        pick = slice(row, row + 1)
        one = pytree.tree_map(lambda s, pick=pick: s[pick], state)
        alone = flat(layer(x[pick], one, lengths=lengths[pick], reset=reset[pick]))
        assert_close(numbered(alone), numbered(v[pick] for v in together), magnitude)


@every_layer
@pytest.mark.parametrize("start", ["state", "no state"])
def test_padding_changes_nothing_even_when_it_is_nan(case, start):
    layer = build(case)
    x, state, lengths, reset = inputs(layer, "lengths and resets")
    state = state if start == "state" else layer.initial_state(BATCH)
    padding = torch.arange(STEPS) >= lengths[:, None]
    zeros = torch.where(padding[..., None], 0, x.detach()).requires_grad_()
    nans = torch.where(padding[..., None], torch.nan, x.detach()).requires_grad_()
    expected = results(layer, in_one_pass, zeros, state, lengths, reset)
    found = results(layer, in_one_pass, nans, state, lengths, reset)
    assert not found["gradient of x"][padding].any()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    row = slice(1, 2)
    steps = int(lengths[1])

    def cut(x, state):
        output, final = layer(x[row, :steps], pytree.tree_map(lambda s: s[row], state), reset=reset[row, :steps])
        return {"output": output, **parts("final", final)}

    short = cut(x, state)
    padded = {name: found[name][row] for name in short}
    if layer.return_sequences:
        padded["output"] = padded["output"][:, :steps]
    assert_close(padded, short, bounds.sensitivity(cut, x, state))


@every_layer
def test_gradients_are_those_of_finite_differences(case):
    layer = build(case)
    x, state, _, reset = inputs(layer, "resets", batch=2, steps=5)
    names = [name for name, _ in layer.named_parameters()]
    given, form = pytree.tree_flatten(state)

    def run(x, *rest):
        state = pytree.tree_unflatten(rest[: len(given)], form)
        weights = dict(zip(names, rest[len(given) :], strict=True))
        return tuple(flat(torch.func.functional_call(layer, weights, (x, state), {"reset": reset})))

    weights = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    assert torch.autograd.gradcheck(run, (x, *given, *weights), fast_mode=True)


@every_layer
def test_loaded_weights_restore_the_layer(case):
    layer = build(case)
    changes = {}
    if "theta" in inspect.signature(case[0]).parameters:
        changes["theta"] = [2.5] * len(case[1]["theta"]) if "theta" in case[1] else 2.5
    other = build(case, seed=5, **changes)
    x, state, _, _ = inputs(layer)
    other(x, state)  # what it has prepared by now belongs to its old weights
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    for a, b in zip(flat(other(x, state)), flat(layer(x, state)), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(build(case, seed=5, **changes)(x, state)[0], layer(x, state)[0])


@every_layer
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_computes_the_same_and_shares_nothing(case, copied):
    layer = build(case)
    x, state, _, _ = inputs(layer)
    expected = flat(layer(x, state))
    size = len(pickle.dumps(build(case)))
    # Nothing prepared is saved. A string of which there are two objects takes some bytes more; a tensor takes over 100.
    assert len(pickle.dumps(layer)) < size + 100
    other = copied(layer)
    for a, b in zip(flat(other(x, state)), expected, strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.zero_()
    for a, b in zip(flat(layer(x, state)), expected, strict=True):
        assert torch.equal(a, b)


@every_layer
def test_float32_is_as_close_as_its_rounding(case):
    layer = build(case).float().double()  # in numbers that float32 has too
    x, state, lengths, reset = inputs(layer, "lengths and resets")
    single_x, single = x.float(), pytree.tree_map(torch.Tensor.float, state)
    x, state = single_x.double(), pytree.tree_map(torch.Tensor.double, single)
    expected = flat(layer(x, state, lengths=lengths, reset=reset))
    magnitude = magnitudes_of_outputs(layer, x, state, lengths=lengths, reset=reset)
    found = flat(layer.float()(single_x, single, lengths=lengths, reset=reset))
    assert all(f.dtype == torch.float32 for f in found)
    assert_close(numbered(found), numbered(expected), magnitude)


@every_layer
@pytest.mark.parametrize("kind", ["autocast", "weights"])
def test_sixteen_bits_carry_the_state_in_float32(case, kind):
    layer = build(case, torch.float32)
    x = inputs(layer, dtype=torch.float32)[0].detach()
    exact, given = copy.deepcopy(layer).double(), dict(copy.deepcopy(layer).double().named_parameters())

    def run(x, parameters):
        return flat(torch.func.functional_call(exact, parameters, (x,)))

    expected, magnitude = run(x.double(), given), bounds.sensitivity(run, x.double(), given)
    if kind == "weights":
        layer, x = layer.to(torch.bfloat16), x.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        found, state = layer(x, layer.initial_state(BATCH))
        found_step = found if layer.bidirectional else layer.step(x[:, 0], state)[0]
    assert found.dtype == found_step.dtype
    assert found.dtype in ((torch.bfloat16,) if kind == "weights" else (torch.bfloat16, torch.float32))
    # Weights, input and the results of matrix products are rounded to 16 bits, gates and memory are not.
    counts = [bounds.likely(x.numel(), terms=2) for x in expected]
    bounds.assert_close(flat((found, state)), expected, magnitude=magnitude, roundings=counts, dtype=torch.bfloat16)
    for part in pytree.tree_leaves(state):
        assert part.dtype == torch.float32
    assert all(p.dtype.itemsize >= 4 for name, p in layer.state_dict().items() if "theta" in name)


@every_layer
def test_an_empty_batch_and_no_steps_are_fine(case):
    layer = build(case)
    x, state, _, _ = inputs(layer)
    width = layer(x)[0].shape[2 if layer.return_sequences else 1 :]
    for batch, steps in ((0, STEPS), (BATCH, 0), (0, 0)):
        some = pytree.tree_map(lambda s, batch=batch: s[:batch], state)
        lengths = torch.zeros(batch, dtype=torch.int64)
        for options in ({}, {"lengths": lengths}, {"reset": torch.zeros(batch, steps, dtype=torch.bool)}):
            for given in (some, None):
                output, final = layer(x[:batch, :steps], given, **options)
                assert output.shape == ((batch, steps, *width) if layer.return_sequences else (batch, *width))
                pairs = list(zip(pytree.tree_leaves(final), pytree.tree_leaves(some), strict=True))
                assert all(a.shape == b.shape for a, b in pairs)
                if steps == 0 and given is not None:
                    assert all(torch.equal(a, b) for a, b in pairs)
    sum(value.sum() for value in flat(layer(x[:0], pytree.tree_map(lambda s: s[:0], state)))).backward()
    assert all(p.grad is None or not p.grad.any() for p in layer.parameters())


@every_layer
def test_wrong_inputs_raise_errors_that_help(case, unchecked):
    layer = build(case)
    x, state, _, _ = inputs(layer)
    x = x.detach()

    def changed(change):
        return pytree.tree_map(change, state)

    lengths, reset = torch.full((BATCH,), STEPS), torch.zeros(BATCH, STEPS, dtype=torch.bool)
    wrong = [
        ((x[0],), {}, r"expected x of shape \(B, T, input_size\).*axes are"),
        ((x[..., :-1],), {}, "expected x of shape.*input_size 3"),
        ((x.float(),), {}, r"expected x in torch.float64.*got torch.float32: convert"),
        ((x.to("meta"),), {}, r"expected x on cpu.*got meta: move"),
        ((x, changed(lambda s: s[:-1])), {}, r"expected state.memory of shape \(3, .*use a state of this layer"),
        ((x, changed(lambda s: s[..., :-1])), {}, r"expected state.memory of shape \(3, "),
        ((x, changed(lambda s: s.float())), {}, r"expected state.memory in torch.float64.*convert it"),
        ((x,), {"lengths": lengths[:-1]}, r"expected lengths of shape \(3,\).*pass the number of steps"),
        ((x,), {"lengths": lengths + 1}, "expected lengths from 0 to T = 37, got 38 to 38"),
        ((x,), {"lengths": -lengths}, "expected lengths from 0 to T = 37, got -37 to -37"),
        ((x,), {"reset": reset[:, 1:]}, r"reset must be \(batch, time\) = \(3, 37\)"),
    ]
    for arguments, options, message in wrong:
        with pytest.raises(ValueError, match=message):
            layer(*arguments, **options)
    wrong_types = [
        ((x.numpy(),), {}, "expected x to be a tensor, got ndarray: wrap it"),
        ((x, changed(lambda s: None)), {}, "expected state.memory to be a tensor, got NoneType"),
        ((x,), {"lengths": lengths.tolist()}, "expected lengths to be a tensor, got list"),
        ((x,), {"reset": reset.tolist()}, "expected reset to be a tensor, got list"),
        ((x, 0), {}, f"expected a {layer.State.__name__}.*, got int: use initial_state"),
        ((x,), {"lengths": lengths.double()}, "expected lengths of shape .* integer dtype, got .* torch.float64"),
        ((x,), {"reset": reset.int()}, "reset must be a boolean tensor, got torch.int32"),
    ]
    for arguments, options, message in wrong_types:
        with pytest.raises(TypeError, match=message):
            layer(*arguments, **options)
    if layer.bidirectional:
        return
    with pytest.raises(ValueError, match=r"expected x_t of shape \(B, input_size\)"):
        layer.step(x, state)
    with pytest.raises(TypeError, match=r"expected a .*use initial_state"):
        layer.step(x[:, 0], None)


@pytest.mark.compiled
@pytest.mark.parametrize("condition", ["plain", "lengths and resets"])
@pytest.mark.parametrize(
    "case",
    [(c, {}) for c in layer_classes()]
    + [(LMU, {"return_sequences": False}), (stack, {}), (linear_rnn, {}), (linear_surrogate, {})],
)
def test_a_compiled_layer_equals_the_layer(case, condition):
    """Static shapes where nothing is special, dynamic ones where something is: each graph takes seconds to trace."""
    torch._dynamo.reset()
    layer = build(case)
    dynamic = condition != "plain"
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for steps in (5, 8) if dynamic else (5, 5):
        x, state, lengths, reset = inputs(layer, condition, steps=steps)
        lengths = None if lengths is None else lengths.clamp(max=steps)
        found = results(compiled, in_one_pass, x, state, lengths, reset)
        found = {name.replace("_orig_mod.", ""): value for name, value in found.items()}
        expected = results(layer, in_one_pass, x, state, lengths, reset)
        assert_close(found, expected, magnitudes(layer, x, state, lengths, reset))
