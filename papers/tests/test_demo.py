import pytest
from PIL import Image

from legato_papers.demo import demo
from legato_papers.task import ExperimentError


def test_the_demonstration_trains_streams_compares_and_draws(capsys, tmp_path):
    demo(tmp_path / "demo", epochs=1)
    out = capsys.readouterr().out
    for words in ("1  train", "2  run as a stream", "3  speed", "4  paper and measured", "0.044"):
        assert words in out
    difference = float(out.split("one parallel pass: ")[1].split()[0])
    # 5,000 steps in float32; what rounding adds decays within the window of 50 steps.
    assert difference < 1e-4
    assert Image.open(tmp_path / "demo/demo.png").size[0] > 1000
    demo_again_is_refused(tmp_path)


def demo_again_is_refused(folder):
    """A folder with other files in it is left alone."""
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(ExperimentError, match="holds something else than a demo"):
        demo(folder)
    assert (folder / "thesis.tex").exists()
