"""Comparison with other libraries (peers): finds them, checks their results, times them.

A peer is installed in its own environment (``make bench-peers``) and runs in a process of that
environment, which makes the same inputs from the same seed: ``environments/worker.py``.
``expected.py`` has the expected results. A peer that is missing, fails or has wrong results is not
timed; its row has the reason.
"""

import gc
import json
import math
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import expected
import legato
from environments import worker
from measure import Seconds, interleave

ROOT = Path(__file__).parent.parent
WORKER = Path(worker.__file__)
ENVIRONMENTS = {"peers": ROOT / ".venv-peers/bin/python", "peers-keras": ROOT / ".venv-peers-keras/bin/python"}
SEED = 0
# Pause between runs of two processes: OpenMP threads occupy their processor for milliseconds after
# their work.
_REST_SECONDS = 0.02
_LIMIT_SECONDS = 300.0  # per answer

Expect = Callable[[dict, worker.Arrays], dict[str, expected.Result]]


class PeerFailure(RuntimeError):
    """An environment cannot be used, or its process reported an error or ended."""


@dataclass
class Environment:
    """A Python interpreter with peers, and its worker process once it is started."""

    name: str
    python: Path
    worker: Path = WORKER
    process: subprocess.Popen | None = None
    errors: Any = field(default_factory=tempfile.TemporaryFile)

    def ask(self, **request: Any) -> dict:
        process = self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        overdue = threading.Timer(_LIMIT_SECONDS, process.kill)
        overdue.start()
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = b""
        finally:
            overdue.cancel()
        if not line:
            self.process = None
            raise PeerFailure(f"its process ended with exit code {process.wait()}: {self._last_error()}")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerFailure(answer["error"])
        return answer

    def close(self) -> None:
        if self.process is not None:
            self.process.communicate()
            self.process = None

    def _start(self) -> subprocess.Popen:
        if self.process is None:
            if not self.python.exists():
                raise PeerFailure(f"{_short(self.python)} is missing: make bench-peers builds it")
            threads = str(torch.get_num_threads())
            self.process = subprocess.Popen(
                [self.python, self.worker],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.errors,
                env={**os.environ, "OMP_NUM_THREADS": threads, "PEER_THREADS": threads},
            )
        return self.process

    def _last_error(self) -> str:
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "no error output")


@dataclass
class Peer:
    """One implementation of a task by another library, or the reason why it is not available."""

    environment: Environment
    name: str
    package: str = ""
    how: str = ""
    problem: str | None = None

    def prepare(self, sizes: dict, seed: int) -> worker.Arrays:
        """Make the inputs and return the results of one untimed run."""
        with tempfile.TemporaryDirectory() as folder:
            answer = self.environment.ask(do="prepare", candidate=self.name, sizes=sizes, seed=seed, folder=folder)
            return {name: np.load(Path(folder, f"{name}.npy")) for name in answer["results"]}

    def run(self) -> Seconds:
        if self.problem is not None:
            return Seconds(math.inf)  # is not run again
        time.sleep(_REST_SECONDS)
        try:
            seconds = self.environment.ask(do="run", candidate=self.name)["seconds"]
        except PeerFailure as failure:
            self.problem = str(failure)
            return Seconds(math.inf)
        time.sleep(_REST_SECONDS)
        return Seconds(seconds)

    def release(self) -> None:
        if self.environment.process is not None:
            self.environment.ask(do="release", candidate=self.name)

    def about(self) -> dict[str, Any]:
        return {"by": self.name, "version": self.package, "how": self.how}


@contextmanager
def gather(task: str, environments: dict[str, Path] = ENVIRONMENTS, script: Path = WORKER) -> Iterator[list[Peer]]:
    """All peers for a task; their processes end with the block. Peers that are not available have a
    ``problem``."""
    here = [Environment(name, python, script) for name, python in environments.items()]
    try:
        yield [peer for environment in here for peer in _peers(environment, task)]
    finally:
        for environment in here:
            environment.close()


def versions(*tasks: str) -> dict[str, str]:
    """The versions of the packages with a peer for these tasks."""
    found = {}
    for task in tasks:
        with gather(task) as peers:
            found |= dict(peer.package.rsplit(" ", 1) for peer in peers if peer.package and peer.problem is None)
    return found


def compare(
    task: str,
    sizes: dict,
    ours: dict[str, Callable[[dict, worker.Arrays], worker.Step]],
    peers: list[Peer],
    *,
    expect: Expect | None = None,
    extra: dict[str, Callable[[], Any]] | None = None,
    rounds: int = 10,
    warmup: int = 3,
    patience: float = math.inf,
) -> list[dict]:
    """Check the results of every candidate, then time those with correct results, alternating.

    Args:
        task: a task of ``worker.inputs``.
        sizes: of the task.
        ours: functions that build a step from sizes and inputs, by name; "times_ours" is relative
            to the first.
        peers: from ``gather``.
        expect: the expected results and their bounds; by default those of ``expected.py``.
        extra: functions that run in the same rounds and are neither checked nor compared, such as a
            copy.
        rounds, warmup, patience: as for ``interleave``.

    Returns:
        One row per candidate: its name and version, its times and, for a peer, its time as a
            multiple of
        ours; or "skipped", the reason.
    """
    arrays = worker.inputs(task, sizes, SEED)
    wanted = (expect or expected.RESULTS[task])(sizes, arrays)
    steps = {name: build(sizes, arrays) for name, build in ours.items()}
    for name, step in steps.items():
        problem = expected.disagreement(_checked_rows(task, step()), wanted)
        if problem is not None:
            raise AssertionError(f"{name}, {task} with {sizes}: {problem}")
    candidates = [peer for peer in peers if _prepared(peer, sizes, wanted)]
    del wanted
    gc.collect()
    runs = {**(extra or {}), **steps, **{peer.name: peer.run for peer in candidates}}
    # In a training loop the data of the previous step is in the caches, so each runs once before it
    # is timed.
    times = interleave(runs, rounds=rounds, warmup=warmup, patience=patience, settle=True)
    for peer in candidates:
        peer.release()
    base = times[next(iter(ours))]["median_ms"]
    own = {f"legato {legato.__version__}": ours, f"torch {torch.__version__}": extra or {}}
    rows = [
        {"by": name, "version": version, "how": "", **times[name], "times_ours": None}
        for version, names in own.items()
        for name in names
    ]
    rows += [
        {**peer.about(), **times[peer.name], "times_ours": times[peer.name]["median_ms"] / base}
        for peer in candidates
        if peer.problem is None
    ]
    return rows + [{**peer.about(), "skipped": peer.problem} for peer in peers if peer.problem is not None]


def _peers(environment: Environment, task: str) -> list[Peer]:
    try:
        found = environment.ask(do="candidates", environment=environment.name, task=task)["candidates"]
    except PeerFailure as failure:
        names = [name for name, c in worker.CANDIDATES.items() if (c.environment, c.task) == (environment.name, task)]
        return [Peer(environment, name, problem=str(failure)) for name in names]
    return [
        Peer(environment, c["name"], f"{c['package']} {c['version']}", c["how"])
        if c["version"] is not None
        else Peer(environment, c["name"], c["package"], c["how"], f"{c['package']} is not in {environment.name}")
        for c in found
    ]


def _prepared(peer: Peer, sizes: dict, wanted: dict[str, expected.Result]) -> bool:
    """Whether the peer can be timed; otherwise its ``problem`` is the reason."""
    if peer.problem is None:
        try:
            peer.problem = expected.disagreement(peer.prepare(sizes, SEED), wanted)
        except PeerFailure as failure:
            peer.problem = str(failure)
        if peer.problem is not None:
            peer.release()
    return peer.problem is None


def _checked_rows(task: str, results: dict[str, Any]) -> worker.Arrays:
    """The results of one of our steps, in the format of a peer's results."""
    return {
        name: (result[[0, -1]] if task in worker.BY_ROW else result).detach().cpu().numpy()
        for name, result in results.items()
    }


def _short(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
