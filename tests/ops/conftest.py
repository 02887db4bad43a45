import pytest


@pytest.fixture
def short_chunks(monkeypatch):
    """Time is cut on a GPU as it is for few and very long sequences, at lengths that Triton's interpreter can run."""
    triton_gpu = pytest.importorskip("legato.ops.kernels.triton_gpu")
    monkeypatch.setattr(triton_gpu, "TUNING", triton_gpu.Tuning(shortest_chunk=9, shortest_cut=0, group_bytes=16))
    if triton_gpu.INTERPRETED:  # it patches triton.language again at every call of a helper: once a launch is enough
        interpreted = type(triton_gpu._read)
        monkeypatch.setattr(interpreted, "__call__", lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs))
