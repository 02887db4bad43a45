import pytest


@pytest.fixture
def short_chunks(monkeypatch):
    """Time is cut on a GPU as it is for few and very long sequences, at lengths that Triton's interpreter can run."""
    triton_recurrence = pytest.importorskip("legato.ops.kernels.triton_recurrence")
    monkeypatch.setattr(
        triton_recurrence, "TUNING", triton_recurrence.Tuning(shortest_chunk=9, shortest_cut=0, group_bytes=16)
    )
    if (
        triton_recurrence.INTERPRETED
    ):  # it patches triton.language again at every call of a helper: once a launch is enough
        interpreted = type(triton_recurrence._read)
        monkeypatch.setattr(interpreted, "__call__", lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs))
