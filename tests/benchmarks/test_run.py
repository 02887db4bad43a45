import json
import sys

import pytest
import torch

import measure
import run
import show
from measure import Target, judge, peak_memory, save

SUBJECT = """
from measure import Target
TESTS = ({test!r},)
TARGETS = (Target("the kernel", "median_ms", 3, "ms", {{"by": "ours"}}, at_most=True),)
def measure():
    print("measuring")
    return [{{"by": "ours", "median_ms": 2.0, "min_ms": 1.0, "max_ms": 3.0, "rounds": 5}}]
"""


@pytest.fixture
def subject(tmp_path, monkeypatch):
    """Makes a subject called ``fake`` whose one test passes or fails; results go to a folder of their own."""

    def make(*, passes):
        test = tmp_path / "test_fake.py"
        test.write_text(f"def test_the_kernel_is_right():\n    assert {passes}\n")
        (tmp_path / "fake.py").write_text(SUBJECT.format(test=str(test)))

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "fake", raising=False)
    for name in ("ALL", "SUBJECTS"):
        monkeypatch.setattr(run, name, ("fake",))
    monkeypatch.setattr(run, "copy_bandwidth", lambda: {"add": 10.0, "copy": 9.0})
    monkeypatch.setattr(measure, "RESULTS", tmp_path / "results")
    return make


def test_nothing_is_measured_if_a_test_of_the_subject_fails(subject, tmp_path, capsys):
    subject(passes=False)
    assert run.main(["fake"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "test_the_kernel_is_right" in captured.err
    assert "fake: its tests fail, so nothing was measured" in captured.err
    assert not (tmp_path / "results").exists()


def test_a_subject_is_measured_judged_kept_and_drawn(subject, capsys):
    subject(passes=True)
    assert run.main(["all"]) == 0
    out = capsys.readouterr().out
    assert "2 (1 to 3)" in out
    assert "at most 3 ms" in out
    path = measure.results_file()
    section = json.loads(path.read_text())["subjects"]["fake"]
    assert section["rows"][0]["rounds"] == 5
    assert section["targets"][0]["met"] is True
    assert {"threads", "torch", "numba", "commit", "processor"} <= section["machine"].keys()
    assert section["copy_GB_per_s"] == {"add": 10.0, "copy": 9.0}
    (picture,) = path.parent.glob("*-fake-*.png")
    assert picture.stat().st_size > 0


def test_an_unknown_subject_is_told_the_known_ones(capsys):
    assert run.main(["recurrence", "rnn"]) == 2
    err = capsys.readouterr().err
    assert "no subject rnn" in err
    assert all(name in err for name in run.SUBJECTS)


def test_a_rerun_replaces_its_own_section_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    save("lti", {"rows": [1]})
    save("memory", {"rows": [2]})
    path = save("lti", {"rows": [3]})
    assert json.loads(path.read_text()) == {"subjects": {"lti": {"rows": [3]}, "memory": {"rows": [2]}}}
    assert list(tmp_path.iterdir()) == [path]


def test_a_target_takes_the_worst_of_its_rows():
    rows = [{"by": "ours", "x": 2.0}, {"by": "ours", "x": 5.0}, {"by": "theirs", "x": 9.0}, {"by": "ours"}]
    at_most = Target("", "x", 4, where={"by": "ours"}, at_most=True)
    at_least = Target("", "x", 2, where={"by": "ours"})
    missing = Target("", "x", 2, where={"by": "nobody"})
    judged = judge((at_most, at_least, missing), rows)
    assert [(t["measured"], t["met"]) for t in judged] == [(5.0, False), (2.0, True), (None, None)]


def test_rows_with_other_columns_make_another_table():
    rows = [{"a": 1, "b": 0.123456}, {"a": 12345, "b": None}, {"a": "x|y"}]
    assert show.tables(rows) == [[["a", "b"], ["1", "0.123"], ["12,345", ""]], [["a"], ["x|y"]]]
    assert show.markdown(rows) == "| a | b |\n| --- | --- |\n| 1 | 0.123 |\n| 12,345 |  |\n\n| a |\n| --- |\n| x\\|y |"


def allocate(numbers):
    torch.ones(numbers)  # taken and given back before anything is counted
    return lambda: torch.ones(numbers).sum().item()


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_peak_memory_is_what_the_call_takes_at_most():
    numbers = 16 * 2**20
    peak = peak_memory(allocate, numbers)
    assert peak is not None
    assert 4 * numbers <= peak + 2**20  # what the allocator kept of its own
    assert peak <= 4 * numbers + 32 * 2**20  # the threads' stacks and the code of the call
