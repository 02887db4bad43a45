"""The diagonal recurrence against its definition: values, all gradients, every kind of derivative, bad input."""

import itertools

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import bounds
import legato
from legato.ops import backends
from legato.ops.recurrence import linear_recurrence

BACKENDS = ["reference", "torch", "numba"]
FAST = [name for name in BACKENDS if name != "reference"]
DECAYS = [(2, 5, 3), (3,), (5, 1), (2, 1, 3), (1, 5, 3), ()]


def literal_loop(decay, impulse, initial_state, reset, reverse):
    """The equation, written once more with no sharing of code."""
    h = torch.zeros_like(impulse[:, 0]) if initial_state is None else initial_state
    decay = decay.expand(impulse.shape)
    steps = range(impulse.shape[1])
    states = {}
    for t in reversed(steps) if reverse else steps:
        if reset is not None:
            h = torch.where(reset[:, t].reshape(-1, *[1] * (h.ndim - 1)), torch.zeros_like(h), h)
        h = states[t] = decay[:, t] * h + impulse[:, t]
    return torch.stack([states[t] for t in steps], 1), h


def example(B, T, channels, decay_shape, dtype=torch.float64, resets=False):
    decay = torch.rand(decay_shape, dtype=torch.float64) * 1.1
    impulse, state = torch.randn(B, T, *channels, dtype=torch.float64), torch.randn(B, *channels, dtype=torch.float64)
    if dtype.is_complex:
        decay = torch.polar(decay, torch.randn(decay_shape, dtype=torch.float64))
        impulse, state = torch.complex(impulse, impulse.flip(1)), torch.complex(state, -state)
    reset = torch.rand(B, T) < 0.2 if resets else None
    return decay, impulse, state, reset


def gradients(function, decay, impulse, state, dtype, weights):
    """Outputs and the gradients of a weighted sum of states and final state."""
    leaves = [x.to(dtype).detach().requires_grad_() for x in (decay, impulse)]
    leaves.append(state.to(torch.promote_types(dtype, torch.float32)).detach().requires_grad_())
    states, final = function(*leaves)
    loss = (states * weights[0].to(states.dtype)).sum() + (final * weights[1].to(final.dtype)).sum()
    return states, final, *torch.autograd.grad(loss.real, leaves)


def assert_equals_the_loop(function, decay, impulse, state, reset, reverse=False):
    """In float64, by the worst case for any order: states and final state, and all gradients of a weighted sum."""
    weights = torch.randn_like(impulse), torch.randn_like(state)

    def loop(decay, impulse, state, weights):
        run = lambda *x: literal_loop(*x, reset, reverse)  # noqa: E731
        return gradients(run, decay, impulse, state, torch.float64, weights)

    found = gradients(function, decay, impulse, state, torch.float64, weights)
    magnitude = bounds.majorant(loop, decay, impulse, state, weights)
    # A product and a sum a step in either direction, and the sum over what is broadcast; of both computations.
    roundings = 2 * (4 * impulse.shape[1] + impulse.numel() // max(decay.numel(), 1) + 2)
    exact = loop(decay, impulse, state, weights)
    bounds.assert_close(found, exact, magnitude=magnitude, roundings=roundings)


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("decay_shape", DECAYS)
def test_every_backend_equals_the_literal_loop(backend, reverse, resets, decay_shape):
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("CPU tensors run on triton's interpreter only, and test_triton_recurrence.py has the GPU")
    decay, impulse, state, reset = example(2, 5, (3,), decay_shape, resets=resets)

    def ours(*x):
        return linear_recurrence(*x, reset=reset, reverse=reverse, backend=backend)

    assert_equals_the_loop(ours, decay, impulse, state, reset, reverse)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.complex64])
@pytest.mark.parametrize("T", [1, 63, 65, 1000])
@pytest.mark.parametrize("constant", [False, True])
def test_kernels_are_as_exact_as_their_dtype_allows(backend, dtype, T, constant):
    decay, impulse, state, reset = example(3, T, (5,), (5,) if constant else (3, T, 5), dtype, resets=True)
    weights = torch.randn_like(impulse), torch.randn_like(state)
    tensors = [x.to(dtype) for x in (decay * 0.9, impulse)]
    tensors += [x.to(torch.promote_types(dtype, torch.float32)) for x in (state, weights[0].to(dtype), weights[1])]
    assert_as_exact_as_the_dtype(
        lambda *x: linear_recurrence(*x, reset=reset, backend=backend),
        tensors,
        dtype,
        reset,
        own_backward=backend == "numba",
    )


def assert_as_exact_as_the_dtype(function, tensors, dtype, reset, *, own_backward):
    """Results in the dtype against the loop in 64 bits, from the same numbers."""
    decay, impulse, state, *weights = tensors
    wide = torch.complex128 if dtype.is_complex else torch.float64

    def run(backend):
        def definition(*x):
            return linear_recurrence(*x, reset=reset, backend=backend)

        return lambda *x: gradients(definition, *x[:3], wide, x[3:])

    exact_inputs = [x.to(wide) for x in tensors]
    exact = run("reference")(*exact_inputs)
    magnitude = bounds.sensitivity(run("numba"), *exact_inputs)
    # A step has a product and a sum, and so has the joining of chunks: 4, in complex numbers 3 times as many. The
    # gradient of the decay is a sum over what is broadcast.
    step = 9 * 16 if dtype.is_complex else 16
    found = gradients(function, decay, impulse, state, dtype, weights)
    for i, name in enumerate(["states", "final", "decay", "impulse", "state"]):
        # The states are stored in 16 bits, and the gradient of the decay is made of what is stored. A backend without
        # a backward of its own stores the gradients of the states so too, and that of the first state is made of them.
        stored = ["decay"] if own_backward else ["decay", "impulse", "state"]
        arithmetic = dtype if name in stored else None
        terms = max(step, impulse.numel() // decay.numel() if name == "decay" else 0)
        roundings = bounds.likely(exact[i].numel(), terms)
        bounds.assert_close(
            found[i], exact[i], magnitude=magnitude[i], roundings=roundings, dtype=arithmetic, name=name
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("channels", "decay_shape"),
    [((), ()), ((), (2, 7)), ((3, 4), (3, 1)), ((3, 4), (4,)), ((3, 4), (2, 7, 3, 1)), ((2, 3, 4), (2, 1, 4)),
     ((3, 1, 4), (3, 1, 1)), ((1,), (2, 7, 1)), ((0,), (0,))],
)  # fmt: skip
def test_any_channel_axes_and_any_broadcast(backend, channels, decay_shape):
    decay, impulse, state, reset = example(2, 7, channels, decay_shape, resets=True)
    assert_equals_the_loop(lambda *x: linear_recurrence(*x, reset=reset, backend=backend), decay, impulse, state, reset)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reverse", [False, True])
def test_two_chunks_equal_one_pass(backend, reverse):
    decay, impulse, state, reset = example(2, 11, (3,), (2, 11, 3), resets=True)
    whole, final = linear_recurrence(decay, impulse, state, reset=reset, reverse=reverse, backend=backend)
    parts, carry = {}, state
    order = [slice(0, 4), slice(4, 4), slice(4, 11)]
    for part in reversed(order) if reverse else order:
        parts[part.start, part.stop], carry = linear_recurrence(
            decay[:, part], impulse[:, part], carry, reset=reset[:, part], reverse=reverse, backend=backend
        )
    magnitude = bounds.majorant(lambda *x: literal_loop(*x, reset, reverse), decay, impulse, state)
    found = torch.cat([parts[s.start, s.stop] for s in order], 1), carry
    # A product and a sum a step, in both.
    bounds.assert_close(found, (whole, final), magnitude=magnitude, roundings=2 * (2 * 11))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("constant", [False, True])
def test_no_steps_leave_the_state_and_its_gradient_unchanged(backend, constant):
    state = torch.randn(2, 3, requires_grad=True)
    decay = torch.rand((3,) if constant else (2, 0, 3), requires_grad=True)
    states, final = linear_recurrence(decay, torch.empty(2, 0, 3), state, backend=backend)
    assert states.shape == (2, 0, 3)
    assert torch.equal(final, state)
    final.sum().backward()
    assert torch.equal(state.grad, torch.ones(2, 3))
    assert torch.equal(decay.grad, torch.zeros_like(decay))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch_runs(backend):
    decay = torch.rand(3, requires_grad=True)
    states, final = linear_recurrence(decay, torch.empty(0, 4, 3), backend=backend)
    assert (states.shape, final.shape) == ((0, 4, 3), (0, 3))
    states.sum().backward()
    assert torch.equal(decay.grad, torch.zeros(3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_and_expanded_inputs_give_the_same(backend):
    decay, impulse = torch.rand(5, 7, 2).permute(2, 1, 0), torch.randn(2, 14, 10)[:, ::2, 1::2]
    state = torch.randn(1, 5).expand(2, 5)
    assert torch.equal(
        linear_recurrence(decay.contiguous(), impulse.contiguous(), state.contiguous(), backend=backend)[0],
        linear_recurrence(decay, impulse, state, backend=backend)[0],
    )
    # The gradient of a sum arrives as an expanded scalar.
    x = impulse.clone().requires_grad_()
    linear_recurrence(decay, x, backend=backend)[0].sum().backward()
    y = impulse.clone().requires_grad_()
    states = linear_recurrence(decay, y, backend=backend)[0]
    states.backward(torch.ones_like(states))
    assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lazily_conjugated_inputs_are_resolved(backend):
    decay, impulse = torch.randn(3, dtype=torch.complex64) * 0.5, torch.randn(2, 6, 3, dtype=torch.complex64)
    lazy = linear_recurrence(decay.conj(), impulse.conj(), backend=backend)[0]
    assert torch.equal(lazy.resolve_conj(), linear_recurrence(decay, impulse, backend=backend)[0].conj().resolve_conj())


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_leaks_across_a_reset_not_even_nan(backend):
    decay, impulse = torch.rand(1, 6, 2), torch.randn(1, 6, 2)
    impulse[:, 2] = float("nan")
    reset = torch.tensor([[False, False, False, True, False, False]])
    impulse.requires_grad_()
    states, final = linear_recurrence(decay, impulse, reset=reset, backend=backend)
    after = decay[:, 3:].double(), impulse[:, 3:].detach().double()
    exact, magnitude = linear_recurrence(*after)[0], bounds.majorant(lambda *x: linear_recurrence(*x)[0], *after)
    bounds.assert_close(states[:, 3:], exact, magnitude=magnitude, roundings=2 * 3)
    final.sum().backward()
    assert torch.equal(impulse.grad[:, :3], torch.zeros(1, 3, 2))
    assert impulse.grad[:, 3:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_carry_of_16_bit_inputs_has_32(dtype):
    """Adding 1e-3 to 1 a thousand times is lost in 16 bits and exact in a carry of 32."""
    decay, impulse = torch.ones(1, dtype=dtype), torch.full((1, 1000, 1), 1e-3, dtype=dtype)
    _, final = linear_recurrence(decay, impulse, torch.ones(1, 1))
    assert final.dtype == torch.float32
    step = impulse[0, 0, 0].double().item()
    exact = torch.tensor([[1 + 1000 * step]], dtype=torch.float64)
    bounds.assert_close(final, exact, magnitude=exact, roundings=1000)


def test_a_real_decay_may_meet_a_complex_impulse():
    decay, impulse = torch.rand(3, requires_grad=True), torch.randn(2, 4, 3, dtype=torch.complex64)
    states, _ = linear_recurrence(decay, impulse)
    assert states.dtype == torch.complex64
    states.abs().sum().backward()
    assert decay.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("reverse", "decay_shape"), [(False, (2, 4, 2)), (True, (2,))])
def test_derivatives_of_every_kind(dtype, backend, reverse, decay_shape):
    decay, impulse, state, reset = example(2, 4, (2,), decay_shape, dtype, resets=True)
    inputs = [x.requires_grad_() for x in (decay, impulse, state)]

    def run(*x):
        return linear_recurrence(*x, reset=reset, reverse=reverse, backend=backend)

    assert gradcheck(run, inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert gradgradcheck(run, inputs, check_batched_grad=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "mapped", [m for m in itertools.product([None, 0, 1], repeat=3) if any(x is not None for x in m)]
)
def test_vmap_equals_a_loop_over_the_mapped_axis(backend, mapped):
    decay, impulse, state = torch.rand(3), torch.randn(2, 4, 3), torch.randn(2, 3)
    inputs = [
        x if m is None else torch.stack([x, x + 0.1, x * 0.5, x - 0.2], m)
        for x, m in zip((decay, impulse, state), mapped, strict=True)
    ]

    def loss(*x):
        states, final = linear_recurrence(*x, backend=backend)
        return (states**2).sum() + final.sum()

    together = torch.vmap(torch.func.grad(loss, (0, 1, 2)), in_dims=mapped)(*inputs)
    for i in range(4):
        one = [x if m is None else x.select(m, i) for x, m in zip(inputs, mapped, strict=True)]
        one = [x.double() for x in one]
        exact, magnitude = (
            torch.func.grad(loss, (0, 1, 2))(*one),
            bounds.majorant(torch.func.grad(loss, (0, 1, 2)), *one),
        )
        # Four steps in either direction, a square, and the sum over batch and time.
        bounds.assert_close([x[i] for x in together], exact, magnitude=magnitude, roundings=4 * 4 + 8 + 2)


def test_vmap_of_a_backward_gives_each_row_its_gradients():
    decay, impulse = torch.rand(3, requires_grad=True), torch.randn(2, 4, 3, requires_grad=True)
    states, _ = linear_recurrence(decay, impulse)
    rows = torch.randn(5, 2, 4, 3)

    def gradients(decay, impulse, row):
        decay, impulse = (x.detach().requires_grad_() for x in (decay, impulse))
        return torch.autograd.grad(linear_recurrence(decay, impulse)[0], (decay, impulse), row)

    batched = torch.autograd.grad(states, (decay, impulse), rows, is_grads_batched=True)
    for i in range(5):
        wide = [x.detach().double() for x in (decay, impulse, rows[i])]
        # Four steps in either direction, and the sum over batch and time.
        found, magnitude = [x[i] for x in batched], bounds.majorant(gradients, *wide)
        bounds.assert_close(found, gradients(*wide), magnitude=magnitude, roundings=4 * 4 + 8 + 1)


def test_the_backward_keeps_only_decay_and_states():
    decay, impulse = torch.rand(2, 64, 8, requires_grad=True), torch.randn(2, 64, 8, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        states, _ = linear_recurrence(decay, impulse)
    pointers = {x.data_ptr() for x in kept}
    assert pointers == {decay.data_ptr(), states.data_ptr()}


def test_a_constant_decay_is_never_expanded_in_memory():
    """Nothing of the size of the impulse is allocated for it, neither forward nor backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    decay, impulse = torch.rand(8, requires_grad=True), torch.randn(2, 512, 8)
    full_size = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for x in result if isinstance(result, tuple) else (result,):
                if isinstance(x, torch.Tensor) and x.untyped_storage().nbytes() >= impulse.nbytes:
                    full_size.append(x.untyped_storage().data_ptr())
            return result

    with Watch():
        _, final = linear_recurrence(decay, impulse, backend="numba")
        final.sum().backward()
    # the states, and in the backward the gradients of states and impulse: no array for the decay
    assert len(set(full_size) - {impulse.untyped_storage().data_ptr()}) <= 3
    assert decay.grad.shape == (8,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_the_recurrence_in_the_dtype_it_is_given(dtype):
    decay, impulse = torch.rand(3), torch.randn(2, 4, 3)
    with torch.autocast("cpu", dtype):
        states, _ = linear_recurrence(decay, impulse)
        mixed, final = linear_recurrence(decay, impulse.to(dtype))
    assert states.dtype == torch.float32
    assert (mixed.dtype, final.dtype) == (torch.float32, torch.float32)


@pytest.mark.compiled
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("constant", [False, True])
def test_compiles_as_one_graph_with_the_same_results(dynamic, constant):
    def run(decay, impulse, state, reset):
        states, final = linear_recurrence(torch.sigmoid(decay), impulse, state, reset=reset)
        return states.tanh().sum() + final.sum()

    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")

    def gradients(function, inputs, reset):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        return torch.autograd.grad(function(*leaves, reset), leaves)

    for T in (4, 6):
        inputs = [torch.randn((3,) if constant else (2, T, 3)), torch.randn(2, T, 3), torch.randn(2, 3)]
        reset, wide = torch.rand(2, T) < 0.3, [x.double() for x in inputs]
        magnitude = bounds.sensitivity(lambda inputs, reset=reset: gradients(run, inputs, reset), wide)
        # 4 roundings of sigmoid and tanh; the sum over batch and time has no more than 12 terms.
        bound = {"magnitude": magnitude, "roundings": bounds.likely(36, terms=16)}
        for function in (run, compiled):
            bounds.assert_close(gradients(function, inputs, reset), gradients(run, wide, reset), **bound)


@pytest.mark.compiled
def test_exports():
    class Module(torch.nn.Module):
        def forward(self, decay, impulse):
            return linear_recurrence(decay, impulse)

    time = torch.export.Dim("time", min=2, max=512)
    program = torch.export.export(
        Module(), (torch.rand(2, 8, 3), torch.randn(2, 8, 3)), dynamic_shapes=({1: time}, {1: time})
    )
    decay, impulse = torch.rand(2, 20, 3), torch.randn(2, 20, 3)
    wide = decay.double(), impulse.double()
    magnitude = bounds.majorant(linear_recurrence, *wide)
    bounds.assert_close(
        program.module()(decay, impulse), linear_recurrence(*wide), magnitude=magnitude, roundings=2 * 20
    )


@pytest.mark.compiled
def test_the_registered_ops_pass_torchs_own_check():
    arguments = (
        torch.rand(2, 5, 1, 3),
        torch.randn(2, 5, 1, 3),
        torch.randn(2, 1, 3),
        torch.rand(2, 5) < 0.3,
        False,
        None,
    )
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.legato.recurrence, arguments, test_utils=checks)
    decay, impulse, state, reset, *_ = arguments
    torch.library.opcheck(
        torch.ops.legato.recurrence_backward,
        (impulse, state, decay, impulse, state, reset, True, None),
        test_utils=checks,
    )


def test_a_million_steps_of_one_channel():
    T = 2**20
    states, final = linear_recurrence(torch.full((1,), 1 - 2**-10), torch.ones(1, T, 1))
    # All terms are positive, and of an error 1 / e remains after 1,024 steps of a product and a sum.
    exact = torch.tensor([[2**10]], dtype=torch.float64)
    bounds.assert_close(final, exact, magnitude=exact, roundings=2 * 2**10)
    assert torch.equal(states[:, -1], final)


def test_explain_names_the_backend_and_the_reason():
    linear_recurrence(torch.rand(2), torch.randn(1, 3, 2), backend="torch")
    assert "linear_recurrence: torch (named by the caller)" in legato.explain()
    linear_recurrence(torch.rand(2), torch.randn(1, 3, 2))
    assert "linear_recurrence: numba (cpu tensors and numba is installed)" in legato.explain()


def test_without_numba_the_plain_torch_scan_is_chosen(monkeypatch):
    monkeypatch.setattr(backends, "_installed", lambda package: package is None)
    linear_recurrence(torch.rand(2), torch.randn(1, 3, 2))
    assert "linear_recurrence: torch" in legato.explain()
    with pytest.raises(RuntimeError, match="needs numba, which is not installed: pip install numba"):
        linear_recurrence(torch.rand(2), torch.randn(1, 3, 2), backend="numba")


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"impulse": torch.randn(3)}, ValueError, r"impulse must be \(batch, time, \*channels\), got shape \(3,\)"),
        ({"impulse": [1.0]}, TypeError, "impulse must be a tensor, got list"),
        ({"impulse": torch.ones(2, 4, 3).long()}, TypeError, "impulse must be floating or complex, got torch.int64"),
        ({"decay": 0.5}, TypeError, r"decay must be a tensor, got float: wrap it with torch.as_tensor\(\)"),
        ({"decay": torch.rand(2)}, ValueError, r"decay must broadcast to .* \(2, 4, 3\), got \(2,\)"),
        ({"decay": torch.rand(1, 2, 4, 3)}, ValueError, "decay must broadcast"),
        ({"decay": torch.rand(3, device="meta")}, ValueError, r"share a device, got meta and cpu: move one with"),
        ({"initial_state": torch.rand(2, 4, 3)}, ValueError, r"must be .* = \(2, 3\), got \(2, 4, 3\)"),
        ({"initial_state": torch.rand(2, 3).cfloat()}, TypeError, "initial_state is complex"),
        ({"reset": torch.zeros(2, 4)}, TypeError, "reset must be a boolean tensor, got torch.float32"),
        ({"reset": torch.zeros(4, 2).bool()}, ValueError, r"reset must be \(batch, time\) = \(2, 4\), got \(4, 2\)"),
        ({"backend": 3}, ValueError, "backend must be one of .*, got 3"),
        ({"backend": "nubma"}, ValueError, "got 'nubma': did you mean 'numba'"),
    ],
)  # fmt: skip
def test_bad_input_gets_a_clear_error(change, error, message):
    arguments = {"decay": torch.rand(3), "impulse": torch.randn(2, 4, 3)} | change
    with pytest.raises(error, match=message):
        linear_recurrence(**arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the backend runs")
def test_a_cuda_backend_on_cpu_tensors_says_what_it_needs(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(backends._load("linear_recurrence", "triton"), "INTERPRETED", False)
    with pytest.raises(ValueError, match="backend 'triton' needs cuda tensors, got cpu"):
        linear_recurrence(torch.rand(2), torch.randn(1, 3, 2), backend="triton")
