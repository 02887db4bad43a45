"""What is particular to the Numba kernels: threads, forks, laziness."""

import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import bounds
import draws
from legato.ops.recurrence import linear_recurrence


@pytest.fixture
def three_threads():
    """More threads than tasks or cores, whatever the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def many_pieces(three_threads, monkeypatch):
    """Time cut small for three threads, whatever the machine."""
    from legato.ops.kernels import numba_recurrence, numba_threads

    monkeypatch.setattr(numba_threads, "_SERIAL_BELOW", 0)
    monkeypatch.setattr(numba_recurrence, "_CHUNK_BYTES", 1 << 11)
    monkeypatch.setattr(numba_recurrence, "cores", lambda: 3)
    return lambda decay, impulse: numba_recurrence._plan(impulse[:, :, None], decay[:, :, None]).chunks


def large(T=4000, C=9, B=2):
    draws.seed(1)
    return torch.rand(B, T, C, requires_grad=True), torch.randn(B, T, C, requires_grad=True)


def run(decay, impulse):
    states, final = linear_recurrence(decay, impulse, backend="numba")
    return states, *torch.autograd.grad(states.square().sum() + final.sum(), (decay, impulse))


@pytest.mark.parametrize(
    "shape", [{"B": 3}, {"B": 1, "C": 200, "T": 300}, {"B": 7, "C": 1}, {"B": 1, "C": 5000, "T": 9}]
)
def test_thread_counts_give_equal_bits_where_tasks_suffice(three_threads, shape):
    inputs = large(**shape)
    many = run(*inputs)
    torch.set_num_threads(1)
    for a, b in zip(many, run(*inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("decay_shape", [(1, 4000, 1), (1, 4000, 3), (1, 4000, 20), (3,)])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("resets", [False, True])
def test_time_in_pieces_gives_what_one_thread_gives(many_pieces, dtype, decay_shape, reverse, resets):
    """A long memory, so that every piece's first state counts to its end."""
    draws.seed(2)
    decay = 1 - 1e-4 * torch.rand(decay_shape, dtype=torch.float64)
    if dtype.is_complex:
        decay = torch.polar(decay, torch.rand(decay_shape, dtype=torch.float64))
    channels = decay_shape[-1]
    impulse, state = torch.randn(1, 4000, channels, dtype=dtype) / 4000, torch.randn(1, channels, dtype=dtype)
    leaves = [x.requires_grad_() for x in (decay, impulse, state)]
    reset = torch.rand(1, 4000) < 2e-3 if resets else None
    weights = torch.randn_like(impulse) / 4000, torch.randn_like(state)

    assert many_pieces(decay.expand(1, 4000, channels), impulse) > 2

    def results(leaves, weights):
        both = linear_recurrence(*leaves, reset=reset, reverse=reverse, backend="numba")
        return [*both, *torch.autograd.grad(both, leaves, weights)]

    pieces = results(leaves, weights)
    torch.set_num_threads(1)
    magnitude = bounds.majorant(results, leaves, weights)
    # A product and a sum a step in either direction, where pieces are joined once more, and the sum over what is
    # broadcast; three times as many in complex numbers, and in both.
    roundings = 2 * (3 if dtype.is_complex else 1) * (6 * 4000 + impulse.numel() // decay.numel())
    bounds.assert_close(pieces, results(leaves, weights), magnitude=magnitude, roundings=roundings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [1, 2, 40])
@pytest.mark.parametrize(("first", "then", "h0"), [(0.5, 2, 1), (2, 0.5, 0), (2, 0.5, 1e-30), (0.5, 1, 1e30)])
def test_a_chunk_of_time_neither_underflows_nor_overflows(many_pieces, dtype, channels, first, then, h0):
    """Powers of two, so that every result is exact; the product of the first decays leaves the range of float32."""
    T, near = 20_000, 100 if h0 else 140
    decay = torch.ones(1, T, channels, dtype=dtype)
    for start in range(600, T, 2000):
        decay[:, start : start + near], decay[:, start + near : start + 2 * near] = first, then
    impulse, state = torch.zeros_like(decay), torch.full((1, channels), h0, dtype=dtype)
    assert many_pieces(decay, impulse) > 2
    pieces = linear_recurrence(decay, impulse, state, backend="numba")
    torch.set_num_threads(1)
    for a, b in zip(pieces, linear_recurrence(decay, impulse, state, backend="numba"), strict=True):
        assert torch.equal(a, b)


def test_nothing_leaks_across_a_reset_into_later_pieces_of_time(many_pieces):
    impulse = torch.ones(1, 60_000, 1)
    impulse[:, 5] = torch.nan
    reset = torch.zeros(1, 60_000, dtype=torch.bool)
    reset[:, 30_000] = True
    states, final = linear_recurrence(torch.tensor([0.5]), impulse, reset=reset, backend="numba")
    assert states[:, 5:30_000].isnan().all()
    assert states[:, 30_000:].isfinite().all()
    assert final.item() == 2


def test_a_launch_leaves_torchs_thread_count_alone(three_threads):
    run(*large())
    assert torch.get_num_threads() == 3


def test_python_threads_may_launch_at_once(three_threads):
    inputs = [large() for _ in range(8)]
    expected = run(*inputs[0])
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(lambda pair: run(*pair), inputs):
            for a, b in zip(result, expected, strict=True):
                assert torch.equal(a, b)


def test_our_own_threads_equal_torchs_openmp(three_threads, monkeypatch):
    from legato.ops.kernels import numba_threads

    inputs = large()
    shared = run(*inputs)
    monkeypatch.setattr(numba_threads, "_torch_openmp", lambda: None)
    for a, b in zip(shared, run(*inputs), strict=True):
        assert torch.equal(a, b)


def _in_child(queue, decay, impulse):
    # torch's own threads are as dead as ours: keep to what it does without them
    torch.use_deterministic_algorithms(False)
    queue.put(linear_recurrence(decay, impulse, backend="numba")[1].tolist())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="only where processes fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_does_not_wait_for_its_parents_threads(three_threads):
    inputs = [x.detach() for x in large()]
    expected = linear_recurrence(*inputs, backend="numba")[1]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue, *inputs))
    child.start()
    try:
        assert queue.get(timeout=60) == expected.tolist()
    finally:
        child.kill()


def test_importing_legato_loads_no_optional_package():
    heavy = "numba triton lightning matplotlib jsonargparse scipy"
    code = f"import sys, legato; print(*(m for m in '{heavy}'.split() if m in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""


def test_a_read_only_installation_compiles_into_the_users_cache(tmp_path):
    """Numba caches beside the source, or where that cannot be written, below the user's cache folder."""
    code = (
        "import torch; from numba.core.caching import CacheImpl, InTreeCacheLocator\n"
        "CacheImpl._locator_classes.remove(InTreeCacheLocator)\n"
        "from legato import linear_recurrence\n"
        "print(linear_recurrence(torch.tensor([0.5]), torch.ones(1, 3, 1), backend='numba')[1].item())\n"
    )
    environment = {**os.environ, "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment.pop("NUMBA_CACHE_DIR", None)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert result.stdout.strip() == "1.75"
    assert list(tmp_path.rglob("*.nbi"))


def test_without_a_writable_folder_each_process_compiles(tmp_path):
    (tmp_path / "file").touch()  # nothing can be made below a file, not even by root
    code = (
        "import torch; from numba.core.caching import CacheImpl, InTreeCacheLocator\n"
        "CacheImpl._locator_classes.remove(InTreeCacheLocator)\n"
        "from legato import linear_recurrence\n"
        "print(linear_recurrence(torch.tensor([0.5]), torch.ones(1, 3, 1), backend='numba')[1].item())\n"
    )
    nowhere = str(tmp_path / "file")
    environment = {**os.environ, "HOME": nowhere, "XDG_CACHE_HOME": nowhere}
    environment.pop("NUMBA_CACHE_DIR", None)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert result.stdout.strip() == "1.75"
    assert result.stderr.count("Set NUMBA_CACHE_DIR") == 1
