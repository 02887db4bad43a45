import os

import pytest
import torch

# Triton kernels run on CPU tensors where there is no GPU; the variable must be set before triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Workers of the test run share the cores.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fixed_seed_and_nan_in_new_memory():
    """Every torch.empty is filled with NaN, so that an output that a kernel forgot to write is found."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
