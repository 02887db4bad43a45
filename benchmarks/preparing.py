"""Preparing a data set for training: the first start, and a second start from the cache.

Every timed run is a new process with the defaults of the recipe, measured from the request for the
data until the network is built. The peak is the resident memory of the process. Data sets that are
not available are skipped; nothing is downloaded.
"""

import json
import os
import subprocess
import sys
import tempfile

from measure import Target

FIRST, AGAIN = "first start", "again, from the cache"
# The number of further starts, by recipe.
RECIPES = {"imdb": 3, "text8": 3, "qqp": 1, "snli": 1}
_BUILD = """
import json, resource, sys, time
from legato_papers.recipes import recipe
from legato_papers.task import ExperimentError
which = recipe(sys.argv[1])
start = time.perf_counter()
try:
    task = which.build(which.config(), 0, None)
except ExperimentError as error:
    print(json.dumps({"missing": str(error)}))
else:
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"data": task.source, "seconds": seconds, "peak_GiB": peak}))
"""

TESTS = ("papers/tests/test_prepared.py", "papers/tests/test_encoded.py")
TARGETS = (
    Target("IMDB, first start", "seconds", 60, "s", {"recipe": "imdb", "start": FIRST}, at_most=True),
    Target("IMDB, peak memory of the first start", "peak_GiB", 2, "GiB", {"recipe": "imdb", "start": FIRST}, True),
    Target("100 million characters, first start", "seconds", 30, "s", {"recipe": "text8", "start": FIRST}, True),
    *(
        Target(f"{name}, again", "seconds", 2, "s", {"recipe": recipe, "start": AGAIN}, at_most=True)
        for name, recipe in (("IMDB", "imdb"), ("100 million characters", "text8"))
    ),
)


def measure() -> list[dict]:
    rows = []
    for name, repeats in RECIPES.items():
        with tempfile.TemporaryDirectory() as cache:
            starts = [_start(name, cache) for _ in range(1 + repeats)]
        if "missing" in starts[0]:
            print(f"{name} is skipped: {starts[0]['missing']}", file=sys.stderr)
            continue
        again = sorted(starts[1:], key=lambda row: row["seconds"])[repeats // 2]
        rows += [{"recipe": name, "start": start, **row} for start, row in ((FIRST, starts[0]), (AGAIN, again))]
    return rows


def _start(name: str, cache: str) -> dict:
    environment = {**os.environ, "LEGATO_CACHE": cache}
    done = subprocess.run([sys.executable, "-c", _BUILD, name], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} could not be prepared:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])
