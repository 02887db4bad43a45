"""The process in which a peer runs: the implementations of the tasks, and a loop that answers
``peers.py``.

    .venv-peers/bin/python benchmarks/environments/worker.py

reads one JSON request per line and answers each with one line. The requests are: list the
candidates, prepare one (and save its results for checking), run it once and report the seconds,
release it. A candidate is a function of (sizes, inputs) that returns a step. A step computes all
results and returns them by name when the device has finished. legato is not installed in this
process: only the standard library and numpy are imported at the top, and frameworks where they are
used.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
Step = Callable[[], dict[str, Any]]
# Batch rows are independent in these tasks, so only the first and the last are checked.
BY_ROW = {"recurrence"}


@dataclass(frozen=True)
class Candidate:
    environment: str  # the name of its requirements file in this folder
    task: str
    package: str  # its name in the package index
    how: str  # the function that is used, and its options
    build: Callable[[dict, Arrays], Step]


def inputs(task: str, sizes: dict, seed: int) -> Arrays:
    """The inputs of a task: the same float32 numbers in every environment."""
    rng = np.random.default_rng(seed)

    def uniform(low: float, high: float, *shape: int) -> np.ndarray:
        values = rng.random(shape, np.float32)
        values *= np.float32(high - low)
        values += np.float32(low)
        return values

    if task == "recurrence":
        # All numbers are positive, so that every order of sums and products has a bound relative to
        # each result. No product of decays is subnormal, for which arithmetic would be slow.
        shape = (sizes["batch"], sizes["steps"], sizes["channels"])
        least = 1 - min(0.02, 64 / sizes["steps"])
        return {"decay": uniform(least, 1, *shape), "impulse": uniform(0.1, 1, *shape), "grad": uniform(0.1, 1, *shape)}
    if task == "lmu":
        order, units = sizes["order"], sizes["units"]
        scale = (3 / (order + units)) ** 0.5
        # With biases of 4 and -4 each unit is on one side of the kink of relu, so that rounding
        # cannot change the side.
        bias = np.where(np.arange(units) % 2 == 0, np.float32(4), np.float32(-4)).astype(np.float32)
        outputs = (sizes["steps"], units) if sizes["sequences"] else (units,)
        return {
            "x": uniform(0, 1, sizes["batch"], sizes["steps"], 1),
            "encoder": uniform(0.5, 1, 1, 1),
            "encoder_bias": uniform(0, 0.1, 1),
            "weight": uniform(-scale, scale, order + 1, units),
            "bias": bias,
            "grad": uniform(0, 1, sizes["batch"], *outputs),
        }
    raise ValueError(f"expected a task among lmu, recurrence, got {task!r}")


# --- the recurrence: states, and the gradients of decay and impulse for a given gradient of the states ---


def torch_associative_scan(sizes: dict, arrays: Arrays) -> Step:
    from torch._higher_order_ops.associative_scan import associative_scan

    def combine(left, right):
        return left[0] * right[0], right[0] * left[1] + right[1]

    return _torch_step(arrays, lambda a, x: associative_scan(combine, (a, x), dim=1, combine_mode="generic")[1])


def torch_loop(sizes: dict, arrays: Arrays) -> Step:
    import torch

    def scan(decay, impulse):
        states = [impulse[:, 0]]
        for a, x in zip(decay.unbind(1)[1:], impulse.unbind(1)[1:], strict=True):
            states.append(a * states[-1] + x)
        return torch.stack(states, 1)

    return _torch_step(arrays, scan)


def mambapy_scan(sizes: dict, arrays: Arrays) -> Step:
    from mambapy.pscan import pscan  # pyright: ignore[reportMissingImports]

    # (B, L, D, N) with D = 1, where adjacent channels are adjacent in memory; with N = 1 it is
    # slower.
    return _torch_step(arrays, lambda a, x: pscan(a.unsqueeze(2), x.unsqueeze(2)).squeeze(2))


def accelerated_scan_reference(sizes: dict, arrays: Arrays) -> Step:
    from accelerated_scan.ref import scan  # pyright: ignore[reportMissingImports]

    own = {name: np.ascontiguousarray(array.swapaxes(1, 2)) for name, array in arrays.items()}  # (B, C, T)
    step = _torch_step(own, scan)
    return lambda: {name: result.mT for name, result in step().items()}


def log_space_scan(sizes: dict, arrays: Arrays) -> Step:
    from minGRU_pytorch.minGRU import heinsen_associative_scan_log  # pyright: ignore[reportMissingImports]

    own = {"decay": np.log(arrays["decay"]), "impulse": np.log(arrays["impulse"]), "grad": arrays["grad"]}
    step = _torch_step(own, heinsen_associative_scan_log)
    names = {"states": "states", "grad_decay": "grad_log_decay", "grad_impulse": "grad_log_impulse"}
    return lambda: {names[name]: result for name, result in step().items()}


def jax_associative_scan(sizes: dict, arrays: Arrays) -> Step:
    import jax  # pyright: ignore[reportMissingImports]

    def combine(left, right):
        return left[0] * right[0], right[0] * left[1] + right[1]

    return _jax_step(arrays, lambda a, x: jax.lax.associative_scan(combine, (a, x), axis=1)[1])


def jax_scan(sizes: dict, arrays: Arrays) -> Step:
    import jax  # pyright: ignore[reportMissingImports]
    import jax.numpy as jnp  # pyright: ignore[reportMissingImports]

    def step(state, now):
        state = now[0] * state + now[1]
        return state, state

    def scan(decay, impulse):
        steps = (decay.swapaxes(0, 1), impulse.swapaxes(0, 1))
        return jax.lax.scan(step, jnp.zeros_like(impulse[:, 0]), steps)[1].swapaxes(0, 1)

    return _jax_step(arrays, scan)


def _torch_step(arrays: Arrays, scan: Callable) -> Step:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(int(os.environ["PEER_THREADS"]))
    decay, impulse, grad = (torch.from_numpy(arrays[name]).to(device) for name in ("decay", "impulse", "grad"))
    leaves = decay.requires_grad_(), impulse.requires_grad_()

    def step() -> dict[str, Any]:
        states = scan(*leaves)
        grad_decay, grad_impulse = torch.autograd.grad(states, leaves, grad)
        if device == "cuda":
            torch.cuda.synchronize()
        return {"states": states.detach(), "grad_decay": grad_decay, "grad_impulse": grad_impulse}

    return step


def _jax_step(arrays: Arrays, scan: Callable) -> Step:
    import jax  # pyright: ignore[reportMissingImports]

    def forward_and_backward(decay, impulse, grad):
        states, pull = jax.vjp(scan, decay, impulse)
        return states, *pull(grad)

    compiled = jax.jit(forward_and_backward)
    given = [jax.device_put(arrays[name]) for name in ("decay", "impulse", "grad")]
    names = ("states", "grad_decay", "grad_impulse")
    return lambda: dict(zip(names, jax.block_until_ready(compiled(*given)), strict=True))


# --- the LMU: outputs, and the gradients of all weights for a given gradient of the outputs ---


def keras_lmu_fft(sizes: dict, arrays: Arrays) -> Step:
    if sizes["sequences"]:
        # Keras makes one slice of the memory per step, each with a gradient as large as the memory.
        _need_memory(4 * sizes["batch"] * sizes["steps"] ** 2 * (sizes["order"] + 1))

    def make(dense, common):
        layer = _keras_lmu_memory(sizes, hidden_cell=dense, **common)
        return layer, layer

    return _keras_step(sizes, arrays, make)


def keras_lmu_fft_dense_after(sizes: dict, arrays: Arrays) -> Step:
    import keras  # pyright: ignore[reportMissingImports]

    def make(dense, common):
        memory = _keras_lmu_memory(sizes, hidden_cell=None, **common)
        return keras.Sequential([keras.Input((sizes["steps"], 1)), memory, dense]), memory

    return _keras_step(sizes, arrays, make)


def _keras_lmu_memory(sizes: dict, **options: Any) -> Any:
    import keras_lmu  # pyright: ignore[reportMissingImports]

    return keras_lmu.LMUFeedforward(return_sequences=sizes["sequences"], conv_mode="fft", **options)


def keras_lmu_sequential(sizes: dict, arrays: Arrays) -> Step:
    import keras  # pyright: ignore[reportMissingImports]
    import keras_lmu  # pyright: ignore[reportMissingImports]

    def make(dense, common):
        cell = keras_lmu.LMUCell(hidden_cell=dense, **common)
        return keras.layers.RNN(cell, return_sequences=sizes["sequences"]), cell

    return _keras_step(sizes, arrays, make)


def _keras_step(sizes: dict, arrays: Arrays, make: Callable) -> Step:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import keras  # pyright: ignore[reportMissingImports]
    import tensorflow as tf  # pyright: ignore[reportMissingImports]
    from keras_lmu.layers import LMUCell  # pyright: ignore[reportMissingImports]

    def zoh(A, B) -> tuple:
        """A and B of a step; keras-lmu's own are in float32 and change outputs by 1e-3."""
        from scipy.linalg import expm

        # Times theta the entries are integers, so rounding them removes the rounding error of the
        # arguments.
        order, upper = sizes["order"], np.rint(np.concatenate([A, B]).astype(np.float64) * sizes["theta"])
        step = expm(np.pad(upper / sizes["theta"], ((0, 0), (0, 1))))
        return tf.constant(step[:order, :order], tf.float32), tf.constant(step[order:, :order], tf.float32)

    LMUCell._cont2discrete_zoh = staticmethod(zoh)
    dense = keras.layers.Dense(sizes["units"], activation="relu")
    layer, owner = make(dense, {
        "memory_d": 1, "order": sizes["order"], "theta": sizes["theta"], "input_to_hidden": True, "use_bias": True,
        "discretizer": "zoh",
    })  # fmt: skip
    x, grad = (tf.constant(arrays[name]) for name in ("x", "grad"))
    if not layer.built:
        layer.build(x.shape)
    weights = {"encoder": owner.kernel, "encoder_bias": owner.bias, "weight": dense.kernel, "bias": dense.bias}
    for name, weight in weights.items():
        weight.assign(arrays[name])

    @tf.function
    def forward_and_backward():
        with tf.GradientTape() as tape:
            output = layer(x, training=True)
            loss = tf.reduce_sum(output * grad)
        return output, tape.gradient(loss, [weight.value for weight in weights.values()])

    def step() -> dict[str, Any]:
        output, gradients = forward_and_backward()
        np.asarray(gradients[-1])  # waits for the result
        return {"output": output} | {f"grad_{name}": g for name, g in zip(weights, gradients, strict=True)}

    return step


_SCAN = ("peers", "recurrence")
_LMU = ("peers-keras", "lmu")
CANDIDATES = {
    "torch associative_scan": Candidate(
        *_SCAN, "torch", "eager, generic mode, autograd through its operations", torch_associative_scan
    ),
    "torch loop": Candidate(*_SCAN, "torch", "a Python loop over time, autograd", torch_loop),
    "jax associative_scan": Candidate(*_SCAN, "jax", "jit of vjp", jax_associative_scan),
    "jax lax.scan": Candidate(*_SCAN, "jax", "jit of vjp", jax_scan),
    "mamba.py pscan": Candidate(*_SCAN, "mambapy", "as (B, T, 1, C); a backward of its own", mambapy_scan),
    "accelerated-scan reference": Candidate(
        *_SCAN, "accelerated-scan", "inputs prepared as (B, C, T); autograd", accelerated_scan_reference
    ),
    "minGRU log-space scan": Candidate(
        *_SCAN, "minGRU-pytorch", "inputs prepared as logarithms; autograd", log_space_scan
    ),
    "keras-lmu FFT": Candidate(
        *_LMU, "keras-lmu", "LMUFeedforward(hidden_cell=Dense); tf.function, zoh in float64", keras_lmu_fft
    ),
    "keras-lmu FFT, Dense after": Candidate(
        *_LMU, "keras-lmu", "LMUFeedforward, then Dense; tf.function, zoh in float64", keras_lmu_fft_dense_after
    ),
    "keras-lmu sequential": Candidate(
        *_LMU, "keras-lmu", "RNN(LMUCell); tf.function, zoh in float64", keras_lmu_sequential
    ),
}


def _need_memory(size: int) -> None:
    """Raise if the memory is not available: the system would end this process or another."""
    facts = Path("/proc/meminfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    available = next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
    if available is not None and available < size:
        raise MemoryError(f"it takes {size / 1e9:.0f} GB, {available / 1e9:.0f} GB are available")


# --- the loop ---


def serve(candidates: dict[str, Candidate]) -> None:
    """Answer the requests on standard input. The output of libraries goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    steps: dict[str, Step] = {}
    for line in sys.stdin:
        try:
            answer = _answer(json.loads(line), candidates, steps)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _answer(request: dict, candidates: dict[str, Candidate], steps: dict[str, Step]) -> dict:
    match request["do"]:
        case "candidates":
            place = request["environment"], request["task"]
            found = [(name, c) for name, c in candidates.items() if (c.environment, c.task) == place]
            return {
                "candidates": [
                    {"name": name, "package": c.package, "version": _version(c.package), "how": c.how}
                    for name, c in found
                ]
            }
        case "prepare":
            name, sizes = request["candidate"], request["sizes"]
            task = candidates[name].task
            steps[name] = candidates[name].build(sizes, inputs(task, sizes, request["seed"]))
            results = {key: np.asarray(value) for key, value in steps[name]().items()}
            for key, result in results.items():
                np.save(Path(request["folder"]) / f"{key}.npy", result[[0, -1]] if task in BY_ROW else result)
            return {"results": list(results)}
        case "run":
            step = steps.get(request["candidate"])
            if step is None:
                raise RuntimeError("the candidate is not prepared: its process was restarted")
            start = time.perf_counter()
            step()  # the results are dropped: freeing memory is part of the time
            return {"seconds": time.perf_counter() - start}
        case "release":
            steps.pop(request["candidate"], None)
            return {}
    raise ValueError(f"unknown request {request['do']!r}")


def _version(package: str) -> str | None:
    """None where the package is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _use_threads(count: int) -> None:
    """Use as many processors as the parent has threads: all frameworks follow that, and XLA has no
    other setting."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


if __name__ == "__main__":
    _use_threads(int(os.environ["PEER_THREADS"]))
    serve(CANDIDATES)
