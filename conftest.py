import os

import pytest
import torch
import torch.distributed as dist
from hypothesis import settings

import draws

# The same random cases in every run, but for `make fuzz`.
settings.register_profile("fixed", derandomize=True, database=None, deadline=None)
settings.register_profile("fuzz", max_examples=500, deadline=None)
settings.load_profile("fixed")
# Triton kernels run on CPU tensors where there is no GPU; the variable must be set before triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, default=0, help="of all random draws of the tests (default: 0)")
    parser.addoption("--threads", type=int, default=1, help="of PyTorch, for each worker of the run (default: 1)")


def pytest_configure(config):
    draws.run = config.getoption("--seed")
    threads = config.getoption("--threads")
    torch.set_num_threads(threads)
    # Processes that a test starts would use every core, while each worker of the run has one.
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))


@pytest.fixture(autouse=True)
def _fixed_seed_and_nan_in_new_memory():
    """Every torch.empty is filled with NaN, so that an output that a kernel forgot to write is found."""
    draws.seed()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def elsewhere():
    """A default device on which nothing can be computed, and a default dtype that nothing here has."""
    yield lambda: (torch.set_default_device("meta"), torch.set_default_dtype(torch.float16))
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    store = tmp_path_factory.mktemp("store") / "file"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
