"""The protocol with peers, on this interpreter with candidates made of numpy."""

import sys
from pathlib import Path

import numpy as np
import pytest

import expected
import peers
from environments import worker
from recurrence import step

SIZES = {"batch": 3, "steps": 7, "channels": 2}
SCRIPT = """
import os, sys
sys.path.insert(0, {folder!r})
import numpy as np
from worker import Candidate, serve

def right(sizes, arrays):
    a, x, w = (arrays[name].astype(np.float64) for name in ("decay", "impulse", "grad"))
    def step():
        print("a library may print")
        h, g, before = np.zeros_like(x), np.zeros_like(x), np.zeros_like(x)
        for t in range(x.shape[1]):
            before[:, t] = h[:, t - 1] if t else 0
            h[:, t] = a[:, t] * before[:, t] + x[:, t]
        for t in reversed(range(x.shape[1])):
            g[:, t] = w[:, t] + (a[:, t + 1] * g[:, t + 1] if t + 1 < x.shape[1] else 0)
        return {{"states": h, "grad_decay": g * before, "grad_impulse": g}}
    return step

def wrong(sizes, arrays):
    step = right(sizes, arrays)
    return lambda: {{**(found := step()), "grad_decay": found["grad_decay"] + np.float64(0.01)}}

def partial(sizes, arrays):
    step = right(sizes, arrays)
    return lambda: {{"states": step()["states"]}}

def failing(sizes, arrays):
    raise MemoryError("too large")

def dying(sizes, arrays):
    sys.stderr.write("out of luck\\n")
    sys.stderr.flush()
    os._exit(3)

def dying_later(sizes, arrays):
    step, runs = right(sizes, arrays), []
    def run():
        runs.append(None)
        return step() if len(runs) < 3 else os._exit(4)
    return run

here = {{"right": right, "wrong": wrong, "partial": partial, "failing": failing, "dying": dying,
        "dying later": dying_later}}
candidates = {{name: Candidate("here", "recurrence", "numpy", name, build) for name, build in here.items()}}
candidates["uninstalled"] = Candidate("here", "recurrence", "no-such-package", "never", right)
serve({{name: candidates[name] for name in {names!r}}})
"""


@pytest.fixture
def rows(tmp_path):
    """The rows of a comparison with some of the candidates above, by name."""

    def compare(*names: str) -> dict[str, dict]:
        script = tmp_path / "candidates.py"
        script.write_text(SCRIPT.format(folder=str(Path(worker.__file__).parent), names=names))
        with peers.gather("recurrence", {"here": Path(sys.executable)}, script) as found:
            compared = peers.compare("recurrence", SIZES, {"ours": step}, found, rounds=3, warmup=1)
        assert all(peer.environment.process is None for peer in found)
        return {row["by"]: row for row in compared}

    return compare


def test_a_peer_that_agrees_is_timed_and_named_with_its_version(rows):
    found = rows("right")
    assert found["right"]["version"] == f"numpy {np.__version__}"
    assert found["right"]["rounds"] == 3
    assert found["right"]["times_ours"] == found["right"]["median_ms"] / found["ours"]["median_ms"]
    assert "skipped" not in found["right"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("wrong", "grad_decay is off by 0.01 from"),
        ("partial", "gave no grad_decay, grad_impulse"),
        ("failing", "MemoryError: too large"),
        ("dying", "its process ended with exit code 3: out of luck"),
        ("uninstalled", "no-such-package is not in here"),
    ],
)
def test_a_peer_that_cannot_be_timed_is_named_with_the_reason(rows, name, reason):
    found = rows(name, "right")
    assert found[name]["skipped"].startswith(reason)
    assert "median_ms" not in found[name]
    assert "median_ms" in found["right"]


def test_a_peer_that_dies_is_named_and_our_time_stays(rows):
    found = rows("dying later")
    assert "exit code 4" in found["dying later"]["skipped"]
    assert found["ours"]["rounds"] == 3


def test_peers_of_a_missing_environment_are_named(tmp_path):
    with peers.gather("lmu", {"peers-keras": tmp_path / "python"}) as found:
        compared = peers.compare("lmu", _lmu_sizes(), {"ours": expected.lmu_step}, found, rounds=1)
    skipped = {row["by"]: row["skipped"] for row in compared if "skipped" in row}
    assert set(skipped) == {name for name, c in worker.CANDIDATES.items() if c.task == "lmu"}
    assert all("missing: make bench-peers builds it" in reason for reason in skipped.values())


def test_wrong_results_of_ours_stop_the_comparison():
    def wrong(sizes, arrays):
        right = step(sizes, arrays)
        return lambda: right() | {"states": right()["states"] * 1.1}

    with pytest.raises(AssertionError, match="states is off by"):
        peers.compare("recurrence", SIZES, {"ours": wrong}, [])


@pytest.mark.parametrize("name", sorted({c.environment for c in worker.CANDIDATES.values()}))
def test_environments_pin_every_package_with_a_candidate(name):
    lines = (Path(worker.__file__).parent / f"{name}.txt").read_text().lower().splitlines()
    pinned = {line.partition("==")[0] for line in lines if "==" in line}
    assert all("==" in line or line.startswith("#") for line in lines)
    assert {c.package.lower() for c in worker.CANDIDATES.values() if c.environment == name} <= pinned


def test_both_forms_of_the_lmu_agree_with_plain_steps():
    for sequences in (True, False):
        sizes = _lmu_sizes(sequences=sequences)
        arrays = worker.inputs("lmu", sizes, 0)
        got = {name: result.detach().numpy() for name, result in expected.lmu_step(sizes, arrays)().items()}
        assert expected.disagreement(got, expected.lmu(sizes, arrays)) is None


def _lmu_sizes(**changed) -> dict:
    return {"batch": 2, "steps": 9, "order": 4, "units": 3, "theta": 9, "sequences": True} | changed
