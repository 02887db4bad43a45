import gzip
import http.server
import io
import lzma
import threading
import zipfile

import numpy as np
import pytest

import real_data
from legato_papers.data import vectors as module
from legato_papers.data.files import File
from legato_papers.data.vectors import word_vectors
from legato_papers.task import ExperimentError

VECTORS300 = real_data.DATA / "vectors300" / "sg300_wiki_imdb.npz"
WORDS = ["padding symbol", "film", "unheard", "caf\u00e9", "."]


def vector(seed, width=300):
    return np.round(np.random.default_rng(seed).normal(size=width), 5)


def line(word, values):
    return " ".join([word, *(f"{value:.5f}" for value in values)])


def glove(width=300):
    """A file in GloVe's format: a word with spaces whose parts are words, a word twice, one in another alphabet."""
    rows = [(",", 0), (".", 1), ("film", 2), (". . .", 3), ("film noir", 4), ("caf\u00e9", 5), ("film", 6), ("at x", 7)]
    return "".join(line(word, vector(seed, width)) + "\n" for word, seed in rows)


@pytest.fixture
def known():
    """The files as they are known. For the tests they may have any content, and nothing is downloaded."""
    return dict(module.FILES)


@pytest.fixture(autouse=True)
def any_content(known, monkeypatch):
    for name, (folder, files) in known.items():
        monkeypatch.setitem(module.FILES, name, (folder, tuple(File(file.name) for file in files)))


@pytest.fixture(params=["txt", "gz", "zip"])
def folder(request, tmp_path):
    if request.param == "txt":
        (tmp_path / "glove.840B.300d.txt").write_text(glove(), encoding="utf-8")
    elif request.param == "gz":
        (tmp_path / "glove").mkdir()
        (tmp_path / "glove" / "glove.840B.300d.txt.gz").write_bytes(gzip.compress(glove().encode()))
    else:
        with zipfile.ZipFile(tmp_path / "glove.840B.300d.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("glove.840B.300d.txt", glove())
    return tmp_path


def test_rows_are_word_vectors_and_zero_for_unknown_words(folder):
    matrix, found, source = word_vectors(WORDS, folder, "glove.840B.300d")
    assert source == "glove.840B.300d"
    assert matrix.dtype == np.float32
    assert matrix.shape == (5, 300)
    assert found.tolist() == [False, True, False, True, True]
    for row, seed in ((1, 2), (3, 5), (4, 1)):
        np.testing.assert_array_equal(matrix[row], vector(seed).astype(np.float32))
    assert not matrix[[0, 2]].any()


def test_each_file_of_an_archive_has_its_name(tmp_path):
    with zipfile.ZipFile(tmp_path / "glove.6B.zip", "w") as archive:
        archive.writestr("glove.6B.50d.txt", glove(50))
        archive.writestr("glove.6B.300d.txt", glove())
    assert word_vectors(WORDS, tmp_path, "glove.6B.300d").found.sum() == 3


def test_arrays_of_words_and_vectors_are_read(tmp_path):
    half = np.stack([vector(seed) for seed in range(3)]).astype(np.float16)
    words = np.array([w.encode() for w in (".", "caf\u00e9", "film")])
    path = str(tmp_path / "own.npz")
    np.savez_compressed(path, words=words, vectors=half)
    matrix, found, source = word_vectors(WORDS, None, path)
    assert source == path
    assert found.tolist() == [False, True, False, True, True]
    np.testing.assert_array_equal(matrix[[4, 3, 1]], half.astype(np.float32))


@pytest.mark.parametrize("width", [50, 301])
def test_vectors_of_another_width_are_refused(tmp_path, width):
    (tmp_path / "glove.6B.300d.txt").write_text(glove(width), encoding="utf-8")
    np.savez(tmp_path / "own.npz", words=np.array([b"film"]), vectors=np.zeros((1, width), np.float16))
    for name in ("glove.6B.300d", str(tmp_path / "own.npz")):
        with pytest.raises(ExperimentError, match=f"another width: expected 300 numbers for a word, got {width}"):
            word_vectors(WORDS, tmp_path, name)


def test_a_line_that_is_cut_short_is_named(tmp_path):
    (tmp_path / "glove.6B.300d.txt").write_text("\n".join([line(",", vector(0)), line("film", vector(1, 20))]))
    with pytest.raises(ExperimentError, match=r"glove\.6B\.300d\.txt .* 300 numbers in line 2, got 20 numbers"):
        word_vectors(WORDS, tmp_path, "glove.6B.300d")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a whole archive"])
def test_a_damaged_file_is_named(tmp_path, content):
    for file in ("glove.840B.300d.zip", "glove.6B.300d.txt", "own.npz"):
        (tmp_path / file).write_bytes(content)
    for name in ("glove.840B.300d", "glove.6B.300d", str(tmp_path / "own.npz")):
        with pytest.raises(ExperimentError, match=r"(glove|own).*\.(zip|txt|npz) "):
            word_vectors(WORDS, tmp_path, name)


def test_an_archive_cut_short_is_named(tmp_path):
    path = tmp_path / "glove.840B.300d.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("glove.840B.300d.txt", glove())
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 3] + b"\0" * 50 + whole[len(whole) // 3 + 50 :])
    with pytest.raises(ExperimentError, match=r"840B\.300d\.zip cannot be read as the vectors glove\.840B\.300d"):
        word_vectors(WORDS, tmp_path, "glove.840B.300d")


def test_a_missing_file_and_an_unknown_name_say_what_is_expected(tmp_path):
    with pytest.raises(ExperimentError, match=r"expected glove\.6B\.zip in .* nor glove\.6B\.300d\.txt"):
        word_vectors(WORDS, tmp_path, "glove.6B.300d")
    with pytest.raises(ExperimentError, match=r"'glove': expected one of glove\.840B\.300d, .* or the path of a file"):
        word_vectors(WORDS, tmp_path, "glove")


def test_a_file_of_another_content_is_refused(known, folder, monkeypatch):
    monkeypatch.setitem(module.FILES, "glove.840B.300d", known["glove.840B.300d"])
    with pytest.raises(ExperimentError, match=r"expected [25],\d{3},\d{3},\d{3} bytes of content"):
        word_vectors(WORDS, folder, "glove.840B.300d")


def test_a_file_that_is_nowhere_is_downloaded_once(tmp_path, monkeypatch):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("glove.6B.300d.txt", glove())
    asked = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content.getvalue())))
            self.end_headers()
            self.wfile.write(content.getvalue())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/glove.6B.zip"
        monkeypatch.setitem(module.FILES, "glove.6B.300d", ("glove", (File("glove.6B.zip", url=url),)))
        monkeypatch.setenv("LEGATO_CACHE", str(tmp_path / "cache"))
        monkeypatch.delenv("LEGATO_DATA", raising=False)
        monkeypatch.chdir(tmp_path)
        for _ in range(2):
            assert word_vectors(WORDS, None, "glove.6B.300d").found.sum() == 3
        server.shutdown()
    assert asked == ["/glove.6B.zip"]


@pytest.mark.parametrize("name", ["own.txt", "own.txt.gz", "own.txt.xz", "own.zip"])
def test_a_named_file_may_be_packed(tmp_path, name):
    path = tmp_path / name
    if name.endswith(".zip"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("own.txt", glove())
    else:
        pack = {".txt": bytes, ".gz": gzip.compress, ".xz": lzma.compress}[path.suffix]
        path.write_bytes(pack(glove().encode()))
    matrix, found, source = word_vectors(WORDS, None, str(path))
    assert source == str(path)
    assert found.tolist() == [False, True, False, True, True]
    np.testing.assert_array_equal(matrix[1], vector(2).astype(np.float32))


@real_data.needs("vectors300")
def test_real_vectors_know_the_usual_words():
    matrix, found, _ = word_vectors(["don't", "film", "movie", "of", "zzzzzz"], None, str(VECTORS300))
    assert found.tolist() == [True] * 4 + [False]
    unit = matrix[:4] / np.linalg.norm(matrix[:4], axis=1, keepdims=True)
    film, movie, of = unit[1:]
    assert film @ movie > film @ of
