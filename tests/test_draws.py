"""Every random draw of these tests follows the seed of the run."""

import re
from pathlib import Path

import pytest
import torch

import draws

TESTS = Path(__file__).parent
FOLLOWING = [*TESTS.glob("*.py"), *(TESTS / "ops").glob("*.py"), *(TESTS / "layers").glob("*.py")]


def test_another_run_draws_other_numbers(monkeypatch):
    found = {}
    for run in (0, 1):
        monkeypatch.setattr(draws, "run", run)
        for number in (0, 1):
            draws.seed(number)
            found[run, number] = torch.rand(1).item()
            assert torch.rand(1, generator=draws.generator(number)).item() == found[run, number]
    assert len(set(found.values())) == 4


@pytest.mark.parametrize("path", FOLLOWING, ids=lambda path: path.stem)
def test_no_test_has_a_seed_of_its_own(path):
    if path.name == "draws.py":
        return
    fixed = re.findall(r"manual_seed\(|torch\.Generator\(|default_rng\(|np\.random\.", path.read_text())
    assert not fixed, "use draws.seed() and draws.generator()"
