import json

import pytest

import report

SECTION = {
    "date": "2026-01-02T03:04:05",
    "machine": {"processor": "P", "cores": 2, "threads": 2, "python": "3", "torch": "2", "numba": None, "commit": "c"},
    "versions": {"jax": "0.9"},
    "copy_GB_per_s": {"add": 12.0, "copy": 10.0},
    "targets": [
        {"target": "a step", "at_most": True, "bound": 80, "unit": "us", "measured": 64.04, "met": True},
        {"target": "a peer", "at_most": False, "bound": 5, "unit": "times", "measured": None, "met": None},
    ],
    "rows": [{"by": "ours", "median_us": 64.04, "min_us": 60.0, "max_us": 70.0, "rounds": 3}],
}


def write(folder, name, subject, **changes):
    (folder / name).write_text(json.dumps({"subjects": {subject: {**SECTION, **changes}}}))


def test_the_tables_are_made_from_the_results(tmp_path):
    write(tmp_path, "cpu-2026-01-02.json", "streaming")
    (tmp_path / "cpu-streaming-2026-01-02.png").touch()
    sections = report.newest(tmp_path)
    (table,) = report.targets(sections)
    assert "| [`streaming`](#cpu-streaming) | a step | at most 80 us | 64 us | yes |" in table
    assert "| a peer | at least 5 times | not measured |  |" in table
    text = "\n".join(report.metrics(sections))
    for part in ("### CPU: streaming", "commit c", "jax 0.9", "copy 10 GB/s", "| ours | 64 (60 to 70) |"):
        assert part in text
    assert "numba" not in text.split("Measured on")[1]
    assert "![streaming](results/cpu-streaming-2026-01-02.png)" in text


def test_the_newest_section_of_a_subject_counts(tmp_path):
    write(tmp_path, "cpu-2026-01-02.json", "lti", rows=[{"x": "old"}])
    write(tmp_path, "cpu-2026-01-03.json", "lti", rows=[{"x": "new"}])
    write(tmp_path, "cuda-2026-01-01.json", "lti")
    (tmp_path / "cpu-kernel-2026-01-04.json").write_text("[]")
    sections = report.newest(tmp_path)
    assert list(sections) == [("cpu", "lti"), ("cuda", "lti")]
    assert sections["cpu", "lti"]["rows"] == [{"x": "new"}]


def test_only_what_stands_between_the_markers_is_replaced():
    text = "before\n<!-- targets -->\nold\n<!-- end of targets -->\nafter\n"
    new = report.between(text, "targets", "new \\1")
    assert new == "before\n<!-- targets -->\n\nnew \\1\n\n<!-- end of targets -->\nafter\n"
    assert report.between(new, "targets", "new \\1") == new
    with pytest.raises(ValueError, match="<!-- metrics -->"):
        report.between(text, "metrics", "")
