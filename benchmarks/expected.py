"""The expected results of a task, from our definition in float64, and bounds for float32."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from legato.layers import LMU
from legato.legendre import delay_network
from legato.ops.recurrence import linear_recurrence
from legato.ops.time_invariant import lti

EPS = torch.finfo(torch.float32).eps


class Result(NamedTuple):
    exact: np.ndarray
    bound: np.ndarray | float  # of the absolute error


def disagreement(results: Mapping[str, np.ndarray], wanted: Mapping[str, Result]) -> str | None:
    """The first missing or wrong result, with its error; None if all are within their bounds."""
    missing = {_plain(name) for name in wanted} - {_plain(name) for name in results if name in wanted}
    if missing:
        return f"gave no {', '.join(sorted(missing))}"
    for name, result in results.items():
        exact, bound = wanted[name]
        if result.shape != exact.shape:
            return f"{name} has shape {result.shape}, ours {exact.shape}"
        error = np.abs(result - exact)
        wrong = ~(error <= bound)  # NaN is wrong too
        if wrong.any():
            worst = np.unravel_index(np.argmax(np.where(wrong, error, -1)), error.shape)
            allowed = np.broadcast_to(bound, error.shape)[worst]
            return f"{name} is off by {error[worst]:.2g} from {exact[worst]:.3g}, bound {allowed:.2g}"
    return None


def _plain(name: str) -> str:
    return name.replace("log_", "")


def recurrence(sizes: dict, arrays: dict[str, np.ndarray]) -> dict[str, Result]:
    """The expected results of the first and the last batch row.

    All numbers are positive, so there is no cancellation: any order of sums and products rounds a
    term at most 8 (T + 1) times, each time by at most eps / 2. In log space the exponents, which
    are larger than 1, are rounded too, and the gradient of the decays is a running sum of
    differences. Sums of logarithms are computed in float64 on a CPU.
    """
    decay, impulse, grad = (torch.from_numpy(arrays[name][[0, -1]]).double() for name in ("decay", "impulse", "grad"))
    leaves = decay.requires_grad_(), impulse.requires_grad_()
    states, _ = linear_recurrence(*leaves, backend="reference")
    grad_decay, grad_impulse = torch.autograd.grad(states, leaves, grad)
    a, x, h, g_a, g = (t.detach().numpy() for t in (decay, impulse, states, grad_decay, grad_impulse))
    relative = 4 * (sizes["steps"] + 1) * EPS
    exponent = sum(np.abs(e).max() for e in (np.log(a).cumsum(1), np.log(x), np.log(h)))
    log_relative = relative + 8 * EPS * (1 + exponent)
    differences = np.flip(np.flip(grad.numpy() * h + x * g, 1).cumsum(1), 1)
    return {
        "states": Result(h, log_relative * h),
        "grad_decay": Result(g_a, relative * g_a),
        "grad_impulse": Result(g, relative * g),
        "grad_log_decay": Result(a * g_a, log_relative * differences),
        "grad_log_impulse": Result(x * g, log_relative * x * g),
    }


def lmu(sizes: dict, arrays: dict[str, np.ndarray]) -> dict[str, Result]:
    """err <= 2 (err(plain steps in float32) + 3 log2(2 T) eps scale), for three transforms.

    log2(2 T) is the number of levels of a transform. The scale is the largest result. The gradients
    of the parameters before the memory are sums over rows, steps and orders: their scale is the
    norm over all of these of the factors of the transforms, because roundings of different
    transforms are independent.
    """
    exact, plain = (
        lmu_step(sizes, arrays, dtype=dtype, method="sequential")() for dtype in (torch.float64, torch.float32)
    )
    scales = {name: value.abs().max().item() for name, value in exact.items()} | _before_memory(sizes, arrays)
    levels = 3 * np.log2(2 * sizes["steps"])
    found = {}
    for name, value in exact.items():
        error = (plain[name].double() - value).abs().max().item()
        found[name] = Result(value.numpy(), 2 * (error + levels * EPS * scales[name]))
    return found


def _before_memory(sizes: dict, arrays: dict[str, np.ndarray]) -> dict[str, float]:
    A, B = delay_network(sizes["order"], sizes["theta"])
    impulse = torch.zeros(1, sizes["steps"], 1, dtype=torch.float64)
    impulse[:, 0] = 1
    response = torch.linalg.vector_norm(lti(impulse, A, B)[0], dim=1).flatten().numpy()  # (N,)
    active = arrays["bias"] > 0  # the units that relu passes: the biases are larger than all other terms
    grad = arrays["grad"].reshape(sizes["batch"], -1, sizes["units"])[..., active]
    grad_memory = np.linalg.norm(grad @ arrays["weight"][:-1, active].T, axis=1)  # (B, N)
    rows = np.linalg.norm(grad_memory * response, axis=1)
    inputs = np.linalg.norm(arrays["x"], axis=(1, 2))
    return {
        "grad_encoder": float(np.linalg.norm(inputs * rows)),
        "grad_encoder_bias": float(np.sqrt(sizes["steps"]) * np.linalg.norm(rows)),
    }


def lmu_step(
    sizes: dict, arrays: dict[str, np.ndarray], *, dtype: torch.dtype = torch.float32, method: str | None = None
) -> Callable[[], dict[str, Any]]:
    """Forward and backward of our layer: the output, and the gradients of the weights, by the names of the inputs."""
    last = not sizes["sequences"]
    layer = LMU(
        1,
        sizes["units"],
        order=sizes["order"],
        theta=sizes["theta"],
        return_sequences=method is not None or not last,
        method=method,
        dtype=dtype,
    )
    given = {name: torch.from_numpy(array).to(dtype) for name, array in arrays.items()}
    assert isinstance(layer.input_to_output, nn.Linear)
    weights = {
        "encoder": layer.encoder.weight,
        "encoder_bias": layer.encoder.bias,
        "memory": layer.memory_to_output.weight,
        "input": layer.input_to_output.weight,
        "bias": layer.memory_to_output.bias,
    }
    memory_and_input = given["weight"].split([sizes["order"], 1])
    with torch.no_grad():
        for name, value in (
            *((name, given[name]) for name in ("encoder", "encoder_bias", "bias")),
            *zip(("memory", "input"), memory_and_input, strict=True),
        ):
            weights[name].copy_(value if value.ndim == 1 else value.mT)

    def step() -> dict[str, Any]:
        output, _ = layer(given["x"])
        if last and output.ndim == 3:
            output = output[:, -1]
        grads = dict(zip(weights, torch.autograd.grad(output, list(weights.values()), given["grad"]), strict=True))
        return {
            "output": output.detach(),
            "grad_encoder": grads["encoder"].mT,
            "grad_encoder_bias": grads["encoder_bias"],
            "grad_weight": torch.cat([grads["memory"], grads["input"]], 1).mT,
            "grad_bias": grads["bias"],
        }

    return step


RESULTS = {"recurrence": recurrence, "lmu": lmu}
