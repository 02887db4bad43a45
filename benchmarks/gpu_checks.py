"""Checks of the results on a CUDA machine, which ``gpu.py`` runs in parallel processes.

A check is a function that returns rows; a row has ``what``, ``error``, ``bound`` and ``right``.
These processes compile many kernels in parallel and cache them on disk for the measurements that
follow.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

Row = dict[str, Any]
DEVICE = "cuda"
RESULTS = ("states", "final_state", "grad_decay", "grad_impulse", "grad_initial")
SIXTEEN = (torch.bfloat16, torch.float16)


class Case(NamedTuple):
    impulse: tuple[int, ...]
    decay: tuple[int, ...]
    dtype: torch.dtype
    resets: bool
    reverse: bool


# Full and partial blocks, one pass and chunks, broadcast decays.
CASES = [
    Case((8, 1000, 512), (8, 1000, 512), torch.float32, False, False),
    Case((8, 1000, 512), (8, 1000, 512), torch.bfloat16, True, True),
    Case((300, 65, 65), (300, 65, 65), torch.float16, True, False),
    Case((2, 20_001, 63), (2, 20_001, 63), torch.float32, True, True),
    Case((2, 20_001, 63), (63,), torch.float32, False, False),
    Case((3, 5_000, 4, 24), (3, 5_000, 4, 1), torch.bfloat16, False, False),
    Case((2, 3_000, 40), (40,), torch.complex64, True, True),
    Case((2, 3_000, 40), (2, 3_000, 40), torch.float64, True, False),
    Case((2, 1, 5), (2, 1, 5), torch.float32, False, False),
]
LONG = 1 << 20
HUGE = (3, 400_000, 1_800)  # 2.16e9 numbers, more than 2^31
HUGE_BYTES = 48 * 2**30


def judged(what: str, got: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, eps: float, scale: float) -> Row:
    """err(got) <= 2 (err(plain) + eps scale), against ``exact`` in 64 bits."""
    error, of_plain = (got - exact).abs().max().item(), (plain - exact).abs().max().item()
    bound = 2 * (of_plain + eps * scale)
    return {"what": what, "error": error, "bound": bound, "right": error <= bound}


def recurrence(case: Case) -> list[Row]:
    """Both results and all gradients, compared with the loop; 64 bits scale the error of 32."""
    torch.manual_seed(0)
    wide = torch.complex128 if case.dtype.is_complex else torch.float64
    low = case.dtype if case.dtype != wide else (torch.complex64 if case.dtype.is_complex else torch.float32)
    inputs = _inputs(case.impulse, case.decay, case.dtype)
    reset = torch.rand(case.impulse[:2], device=DEVICE) < 0.01 if case.resets else None
    got = _both_passes("triton", inputs, case.dtype, reset, case.reverse)
    exact = _both_passes("reference", inputs, wide, reset, case.reverse)
    plain = _both_passes("reference", inputs, low, reset, case.reverse)
    scales = [exact[i].abs().max().item() for i in (0, 0, 2, 3, 3)]
    rows = []
    for name, x, y, z, scale in zip(RESULTS, got, plain, exact, scales, strict=True):
        eps = torch.finfo(x.dtype).eps
        y = z + (y - z) * (eps / torch.finfo(y.dtype).eps)
        what = f"{case.impulse} decay {case.decay} {case.dtype} reset {case.resets} reverse {case.reverse}: {name}"
        rows.append(judged(what, x, y, z, eps, scale))
    return rows


def million_steps(dtype: torch.dtype) -> list[Row]:
    """16 bits over a million steps with slow decays; ``plain`` is the rounded exact result."""
    torch.manual_seed(0)
    size = (1, LONG, 64)
    decay, *others = _inputs(size, size, dtype)
    inputs = ((1 - 0.01 * decay.float().square()).to(dtype), *others)
    got = _both_passes("triton", inputs, dtype, None, False)
    exact = _both_passes("torch", inputs, torch.float64, None, False)
    scales = [exact[i].abs().max().item() for i in (0, 0, 2, 3, 3)]
    return [
        judged(f"{LONG:,} steps {dtype}: {name}", x, z.to(dtype), z, torch.finfo(dtype).eps, scale)
        for name, x, z, scale in zip(RESULTS, got, exact, scales, strict=True)
    ]


def more_than_32_bits_count() -> list[Row]:
    """More than 2^31 numbers: the last batch row gives the results of that row alone."""
    from legato._environment import free_memory
    from legato.ops.recurrence import linear_recurrence

    free = free_memory(torch.device(DEVICE)) or 0
    if free < HUGE_BYTES:
        return [{"what": f"{HUGE}: dropped, {free / 2**30:.0f} GiB are free, {HUGE_BYTES / 2**30:.0f} needed"}]

    torch.manual_seed(0)
    dtype = torch.bfloat16
    decay = torch.rand(HUGE[-1], device=DEVICE).to(dtype).requires_grad_()
    impulse = torch.randn(HUGE, device=DEVICE, dtype=dtype)
    weight = torch.randn(HUGE[1:], device=DEVICE, dtype=dtype)

    def both(impulse: torch.Tensor) -> list[torch.Tensor]:
        leaf = impulse.requires_grad_()
        states, final = linear_recurrence(decay, leaf)
        (grad,) = torch.autograd.grad(states, leaf, weight.expand_as(states))
        return [states[-1].detach(), final[-1].detach(), grad[-1]]

    together = [x.double() for x in both(impulse)]
    alone = [x.double() for x in both(impulse.detach()[-1:].clone())]
    eps = torch.finfo(dtype).eps
    rows = []
    for name, x, y in zip(("states", "final_state", "grad_impulse"), together, alone, strict=True):
        rows.append(judged(f"{HUGE}, its last row: {name}", x, y, y, eps, y.abs().max().item()))
    return rows


def layer(name: str) -> list[Row]:
    """A layer in float32 on CUDA, with lengths and resets, against float64 on the CPU; and steps."""
    import legato

    torch.manual_seed(0)
    B, T, C = 3, 300, 8
    options = {"order": 32, "theta": 100} if name == "LMU" else {}
    exact = getattr(legato, name)(C, 16, **options).double()
    x = torch.randn(B, T, C, dtype=torch.float64)
    lengths, reset = torch.tensor([T, 170, 1]), torch.rand(B, T) < 0.02
    weight = torch.randn(B, T, 16, dtype=torch.float64)

    def run(module: torch.nn.Module, device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        leaf = x.to(device, dtype).requires_grad_()
        output, state = module(leaf, lengths=lengths, reset=reset.to(device))
        (output * weight.to(device, dtype)).sum().backward()
        found = {"output": output, "state": state[0], "gradient of x": leaf.grad}
        found |= {f"gradient of {key}": p.grad for key, p in module.named_parameters()}
        return {key: value.detach().double().cpu() for key, value in found.items()}

    plain, ours = copy.deepcopy(exact).float(), copy.deepcopy(exact).float().to(DEVICE)
    with torch.no_grad():
        state, outputs = ours.initial_state(B), []
        for t in range(50):
            output, state = ours.step(x[:, t].float().to(DEVICE), state)
            outputs.append(output)
        stepped, one_pass = torch.stack(outputs, 1).double(), ours(x[:, :50].float().to(DEVICE))[0].double()
    results = [run(m, d, t) for m, d, t in ((ours, DEVICE, torch.float32), (plain, "cpu", torch.float32))]
    truth = run(exact, "cpu", torch.float64)
    # A gradient of a weight is a sum over the batch and time, whose roundings add up like a random walk.
    eps = torch.finfo(torch.float32).eps * (B * T) ** 0.5
    rows = [
        judged(f"{name}: {key}", results[0][key], results[1][key], z, eps, z.abs().max().item())
        for key, z in truth.items()
    ]
    return [*rows, judged(f"{name}: steps", stepped, one_pass, one_pass, eps, one_pass.abs().max().item())]


def compiled() -> list[Row]:
    """torch.compile(fullgraph=True) of the recurrence by the default compiler."""
    from legato.ops.recurrence import linear_recurrence

    inputs = _inputs((2, 3_000, 64), (2, 3_000, 64), torch.float32)
    decay, impulse, weight, h_0, grad_final = inputs

    def run(function: Callable) -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_() for x in (decay, impulse, h_0)]
        results = function(*leaves)
        return [x.detach().double() for x in (*results, *torch.autograd.grad(results, leaves, (weight, grad_final)))]

    eager, graph = run(linear_recurrence), run(torch.compile(linear_recurrence, fullgraph=True))
    eps = torch.finfo(torch.float32).eps
    return [
        judged(f"compiled: {name}", x, y, y, eps, y.abs().max().item())
        for name, x, y in zip(RESULTS, graph, eager, strict=True)
    ]


def memories() -> list[Row]:
    """The chunked method with 16-bit factors, with TF32 and in exact float32."""
    from legato.legendre import delay_network
    from legato.ops.time_invariant import lti

    rows = []
    for order, theta in ((64, 512), (256, 784)):
        torch.manual_seed(0)
        A, B = (x.to(DEVICE) for x in delay_network(order, theta))
        u = torch.cat([torch.randn(2, 3_000, 1), torch.full((1, 3_000, 1), 0.7)]).to(DEVICE)
        for dtype in (*SIXTEEN, torch.float32, "tf32"):
            kind = dtype if isinstance(dtype, torch.dtype) else torch.float32
            torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
            got = lti(u.to(kind), A, B, method="chunked")[0].double()
            torch.backends.cuda.matmul.allow_tf32 = False
            exact = lti(u.to(kind).double(), A, B, method="chunked")[0]
            # The error in float32 is that of sums over a chunk and over the order, with one
            # rounding per term.
            eps = {"tf32": 2.0**-10, torch.float32: (32 + order) * 2.0**-23}.get(dtype, torch.finfo(kind).eps)
            what = f"memories of order {order}, {dtype}"
            rows.append(judged(what, got, exact.to(kind).double(), exact, eps, exact.abs().max().item()))
    return rows


def _inputs(impulse: tuple[int, ...], decay: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Decay, impulse, gradient of the states, initial state and gradient of the final state."""
    carry = torch.promote_types(dtype, torch.float32)
    a = torch.rand(decay, device=DEVICE)
    if dtype.is_complex:
        a = torch.polar(a, 6.0 * torch.rand_like(a))
    x, weight = (torch.randn(impulse, device=DEVICE, dtype=carry).to(dtype) for _ in range(2))
    h_0, grad_final = (torch.randn(impulse[:1] + impulse[2:], device=DEVICE, dtype=carry) for _ in range(2))
    return a.to(dtype), x, weight, h_0, grad_final


def _both_passes(backend, inputs, dtype, reset, reverse) -> list[torch.Tensor]:
    from legato.ops.recurrence import linear_recurrence

    decay, impulse, weight, h_0, grad_final = inputs
    carry = torch.promote_types(dtype, torch.float32)
    leaves = [x.to(d).clone().requires_grad_() for x, d in ((decay, dtype), (impulse, dtype), (h_0, carry))]
    results = linear_recurrence(*leaves, reset=reset, reverse=reverse, backend=backend)
    grads = torch.autograd.grad(results, leaves, (weight.to(dtype), grad_final.to(carry)))
    return [x.detach() for x in (*results, *grads)]


PARTS: dict[str, Callable[[], list[Row]]] = {
    **{f"recurrence {i}": partial(recurrence, case) for i, case in enumerate(CASES)},
    **{f"a million steps {dtype}": partial(million_steps, dtype) for dtype in SIXTEEN},
    "more than 2^31 numbers": more_than_32_bits_count,
    **{f"layer {name}": partial(layer, name) for name in ("GILR", "GILRLSTM", "SRU", "QRNN", "LMU")},
    "torch.compile": compiled,
    "memories": memories,
}
