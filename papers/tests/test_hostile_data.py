"""Damaged and hostile files: every reader names the file in one line, writes nothing and takes no memory for claims."""

import gzip
import hashlib
import io
import json
import lzma
import os
import struct
import tarfile
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from legato_papers.data import catalogue, files, imdb, mnist, prepared, qqp, snli, vectors
from legato_papers.data.convert import convert
from legato_papers.data.files import File
from legato_papers.task import ExperimentError

ROWS = [{"id": f"neg/{i}_1", "label": i % 2, "first": f"one {i}", "second": "two"} for i in range(200)]
TEXT = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
VECTOR_LINES = "".join(f"w{i} " + " ".join(["0.5"] * 300) + "\n" for i in range(20)).encode()
WORDS = [f"w{i}" for i in range(20)]


def npy(array, **header):
    """The bytes of a .npy file, with other claims in its header."""
    stream = io.BytesIO()
    claims = np.lib.format.header_data_from_array_1_0(array) | header
    np.lib.format.write_array_header_1_0(stream, claims)
    return stream.getvalue() + array.tobytes()


def npz(words=None, matrix=None):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("words.npy", words or npy(np.array([b"w0", b"w1"])))
        archive.writestr("vectors.npy", matrix or npy(np.ones((2, 300), np.float16)))
    return stream.getvalue()


def zipped(name, content, *, flags=0, method=None):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    whole = bytearray(stream.getvalue())
    for header, at in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        start = whole.find(header) + at
        whole[start : start + 2] = struct.pack("<H", struct.unpack_from("<H", whole, start)[0] | flags)
        if method is not None:
            whole[start + 2 : start + 4] = struct.pack("<H", method)
    return bytes(whole)


def tarred(names, content=b"a review"):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def nested(depth=200_000):
    return b'{"id": 0, "label": 0, "first": "a", "second": ' + b"[" * depth + b"]" * depth + b"}\n"


def idx(*shape, content=b"\1" * 6):
    return bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + content


REVIEWS = [f"aclImdb/train/pos/{i}_9.txt" for i in range(40)]
JSON_LINES = {
    "deep": nested(),
    "lone surrogate": b'{"id": 0, "label": 0, "first": "\\ud800", "second": "b"}\n',
    "long number": b'{"id": ' + b"1" * 5000 + b', "label": 0, "first": "a", "second": "b"}\n',
    "label true": b'{"id": 0, "label": true, "first": "a", "second": "b"}\n',
    "label NaN": b'{"id": 0, "label": NaN, "first": "a", "second": "b"}\n',
    "no text": b'{"id": 0, "label": 0, "first": null, "second": "b"}\n',
    "a list": b"[]\n",
    "zeros": b"\0" * 100,
    "broken UTF-8": b'{"id": 0, "label": 0, "first": "\xff", "second": "b"}\n',
    "cut": TEXT[:-10],
    "empty": b"",
}
PACKED = {
    "gz cut in half": ("gz", gzip.compress(TEXT)[:300]),
    "xz cut in half": ("xz", lzma.compress(TEXT)[:300]),
    "gz that is none": ("gz", TEXT),
    "xz that is none": ("xz", TEXT),
    "xz with a claim of terabytes of memory": ("xz", lzma.compress(TEXT)[:12] + b"\xff" * 60),
}
CASES = {
    **{f"qqp pairs.jsonl: {name}": ("qqp/pairs.jsonl", content, qqp.qqp) for name, content in JSON_LINES.items()},
    **{f"qqp pairs.jsonl.{ext}: {name}": (f"qqp/pairs.jsonl.{ext}", content, qqp.qqp)
       for name, (ext, content) in PACKED.items()},
    **{f"snli train.jsonl: {name}": ("snli/train.jsonl", content, snli.snli) for name, content in JSON_LINES.items()},
    **{f"snli train.jsonl.{ext}: {name}": (f"snli/train.jsonl.{ext}", content, snli.snli)
       for name, (ext, content) in PACKED.items()},
    "imdb archive cut in half": (imdb.ARCHIVE.name, gzip.compress(tarred(REVIEWS))[:200], imdb.imdb),
    "imdb archive, its tar cut in half": (imdb.ARCHIVE.name, gzip.compress(tarred(REVIEWS)[:15_000]), imdb.imdb),
    "imdb archive, its tar cut between members": (
        imdb.ARCHIVE.name, gzip.compress(tarred(REVIEWS)[: 1024 * 20]), imdb.imdb),
    "imdb archive that is none": (imdb.ARCHIVE.name, b"\0" * 2000, imdb.imdb),
    "imdb archive with names that lead outside": (
        imdb.ARCHIVE.name, gzip.compress(tarred(["../../outside.txt", "/tmp/../outside.txt", *REVIEWS])), imdb.imdb),
    "imdb archive with a broken text": (imdb.ARCHIVE.name, gzip.compress(tarred(REVIEWS, b"\xff")), imdb.imdb),
    "imdb archive of long names": (
        imdb.ARCHIVE.name, gzip.compress(tarred(["x/" * 3000 + "y"] * 50)), imdb.imdb),
}  # fmt: skip
VECTORS = {
    "npz: 7.4 TiB": npz(matrix=npy(np.ones((2, 300), np.float16), shape=(2, 2_000_000_000_000))),
    "npz: more numbers than 64 bits count": npz(matrix=npy(np.ones((2, 300), np.float16), shape=(2**40, 2**40))),
    "npz: negative size": npz(matrix=npy(np.ones((2, 300), np.float16), shape=(-2, 300))),
    "npz: objects": npz(words=npy(np.array([b"w0", b"w1"]), descr="|O")),
    "npz: words of terabytes": npz(words=npy(np.array([b"w0", b"w1"]), descr="|S4398046511104")),
    "npz: words are numbers": npz(words=npy(np.arange(2))),
    "npz: deep header": npz(matrix=b"\x93NUMPY\1\0" + struct.pack("<H", 9000) + b"(" * 9000),
    "npz: header that is no dictionary": npz(matrix=b"\x93NUMPY\1\0" + struct.pack("<H", 20) + b"'''  " * 4),
    "npz: header of version 3 without characters": npz(matrix=b"\x93NUMPY\3\0" + struct.pack("<I", 9) + b"\xff" * 9),
    "npz: NaN": npz(matrix=npy(np.full((2, 300), np.nan, np.float16))),
    "npz: infinity": npz(matrix=npy(np.full((2, 300), np.inf, np.float16))),
    "npz: no vectors": zipped("words.npy", npy(np.array([b"w0"]))),
    "npz: encrypted": zipped("words.npy", npy(np.array([b"w0"])), flags=1),
    "npz: unknown packing": zipped("words.npy", npy(np.array([b"w0"])), method=77),
    "npz: cut in half": npz()[: len(npz()) // 2],
    "npz: a .npy": npy(np.ones(3)),
    "npz: empty": b"",
    "txt: NaN": VECTOR_LINES.replace(b"0.5\nw3", b"nan\nw3"),
    "txt: infinity in float32": VECTOR_LINES.replace(b"0.5\nw3", b"1e39\nw3"),
    "txt: a word for a number": VECTOR_LINES.replace(b"0.5\nw3", b"x\nw3"),
    "txt: a number too few": VECTOR_LINES.replace(b"w2 0.5 ", b"w2 "),
    "txt: cut inside a line": VECTOR_LINES[:-700],
    "txt: zeros": b"\0" * 5000,
    "txt: empty": b"",
    "zip: encrypted": zipped("glove.840B.300d.txt", VECTOR_LINES, flags=1),
    "zip: strong encryption": zipped("glove.840B.300d.txt", VECTOR_LINES, flags=0x41),
    "zip: unknown packing": zipped("glove.840B.300d.txt", VECTOR_LINES, method=77),
    "zip: other member": zipped("../outside.txt", VECTOR_LINES),
    "zip: cut in half": zipped("glove.840B.300d.txt", VECTOR_LINES)[:200],
}


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    """A place where a stray file is found, and files known by name alone, so that the readers themselves are tested."""
    monkeypatch.setenv("LEGATO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name, (folder, known) in vectors.FILES.items():
        monkeypatch.setitem(vectors.FILES, name, (folder, tuple(File(file.name) for file in known)))
    yield
    assert os.listdir() == []
    assert not list(tmp_path.rglob("*outside*"))


def refuses(path, read):
    with pytest.raises(ExperimentError) as found:
        read()
    message = str(found.value)
    assert str(path) in message
    assert message.count("\n") == 0
    assert len(message) < 600


@pytest.mark.parametrize("case", CASES)
def test_every_reader_names_a_damaged_file(tmp_path, case):
    name, content, read = CASES[case]
    path = tmp_path / "data" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    if name.startswith("snli/"):
        for part in ("dev", "test"):
            (path.parent / f"{part}.jsonl").write_bytes(TEXT)
    refuses(path, lambda: read(tmp_path / "data"))


@pytest.mark.parametrize("case", VECTORS)
def test_word_vectors_name_a_damaged_file(tmp_path, case):
    kind = case.split(":")[0]
    file = {"npz": "own.npz", "txt": "glove.840B.300d.txt", "zip": "glove.840B.300d.zip"}[kind]
    (tmp_path / file).write_bytes(VECTORS[case])
    name = str(tmp_path / file) if kind == "npz" else "glove.840B.300d"
    refuses(tmp_path / file, lambda: vectors.word_vectors(WORDS, tmp_path, name))


@pytest.mark.parametrize(
    ("flags", "method", "cut"), [(1, None, None), (0x41, None, None), (0, 77, None), (0, None, 100), (0, None, 0)]
)
def test_zip_readers_name_a_damaged_archive(tmp_path, flags, method, cut):
    path = tmp_path / "a.zip"
    path.write_bytes(zipped("t.txt", TEXT, flags=flags, method=method)[:cut])
    refuses(path, lambda: files.zip_member(path, "t.txt"))
    refuses(path, lambda: list(files.zip_lines(path, "t.txt")))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0\0\x08",
        bytes([0, 0, 8, 255]),
        idx(2**32 - 1, 2**32 - 1, 2**32 - 1),
        idx(2**32 - 1, 2**32 - 1, 4, content=b"\1" * 4),
        idx(0, content=b""),
        idx(7),
        idx(5),
    ],
)
def test_idx_files_are_refused_by_their_size(tmp_path, content):
    path = tmp_path / "images"
    path.write_bytes(content)
    refuses(path, lambda: mnist.read_idx(path))


@pytest.mark.parametrize("packed", ["a.jsonl.xz", "a.jsonl.gz"])
def test_a_flipped_bit_is_told_or_changes_nothing(tmp_path, packed):
    """The checksums of .xz and .gz cover the content; what is left of the head, such as a time, changes nothing."""
    path = tmp_path / packed
    files.write(path, [TEXT])
    whole = path.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with suppress(ExperimentError):
            assert files.read(path, File("a.jsonl")) == TEXT


def test_a_flipped_bit_of_a_converted_file_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(qqp, "COUNT", len(ROWS))
    source = tmp_path / "source/pairs.jsonl"
    source.parent.mkdir()
    source.write_bytes("".join(json.dumps(row | {"id": i}) + "\n" for i, row in enumerate(ROWS)).encode())
    (path,) = convert("qqp", source.parent, tmp_path / "data")
    whole, rows = path.read_bytes(), qqp.questions(path)
    for place in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with suppress(ExperimentError):
            assert qqp.questions(path) == rows


def test_a_flipped_bit_of_the_cache_is_built_again(tmp_path):
    """In the list of files, where a name or a checksum may be hit, as in the arrays themselves."""
    wanted, counted = {"numbers": np.arange(50), "text": "words"}, []

    def build():
        counted.append(1)
        return wanted

    prepared.prepare("a", {}, [], build)
    (entry,) = (path for path in prepared.folder().iterdir() if path.is_dir())
    for path in sorted(entry.iterdir()):
        whole = path.read_bytes()
        for place in range(0, len(whole), 5):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << place % 8
            path.write_bytes(damaged)
            found = prepared.prepare("a", {}, [], build)
            assert (found["numbers"].tolist(), found["text"]) == (list(range(50)), "words")
            assert found.keys() == wanted.keys()
            path.write_bytes(whole)


@pytest.mark.parametrize(
    "manifest",
    [
        b'{"format": "legato-prepared-2", "files": {}}',
        b'{"files": {}, "checksum": "' + hashlib.sha256(b"{}").hexdigest().encode() + b'"}',
        b"[" * 200_000,
        b"\xff",
        b"1" * 5000,
        b'{"files": {"numbers": ["../../../etc/passwd", 1, ""]}, "checksum": ""}',
    ],
)
def test_a_list_of_files_that_makes_no_sense_is_built_again(manifest):
    content = {"numbers": np.arange(5)}
    prepared.prepare("a", {}, [], lambda: content)
    (entry,) = (path for path in prepared.folder().iterdir() if path.is_dir())
    (entry / "manifest.json").write_bytes(manifest)
    assert prepared.prepare("a", {}, [], lambda: content)["numbers"].tolist() == [0, 1, 2, 3, 4]


def test_the_catalogue_tells_damaged_files_of_every_kind(tmp_path, capsys):
    for entry in catalogue.catalogue():
        for form in entry.forms:
            for folder, file in form:
                (tmp_path / folder).mkdir(exist_ok=True)
                name = file.name if file.name.endswith((".zip", ".tar.gz", ".npz")) else f"{file.name}.xz"
                path = tmp_path / folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                # The end of an .xz file whose index claims 2^62 records.
                path.write_bytes(b"\0" + b"\xff" * 8 + b"\x3f\0\0" + struct.pack("<IIH2s", 0, 2, 0, b"YZ"))
    for thorough in (False, True):
        catalogue.show(tmp_path, thorough=thorough)
    assert capsys.readouterr().out.count("not whole") > 5


def test_a_full_tar_of_headers_inside_headers_is_told(tmp_path):
    """Long names before long names: tarfile reads one header inside the other."""
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 10
    block = header.tobuf(tarfile.GNU_FORMAT) + b"x" * 10 + b"\0" * 502
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(block * 20_000))
    refuses(path, lambda: list(files.tar_members(path)))


def test_nothing_of_an_archive_is_written(tmp_path):
    path = Path(tmp_path / "a.tar.gz")
    path.write_bytes(gzip.compress(tarred(["../outside", "/outside", "a/../../outside"])))
    assert [name for name, _ in files.tar_members(path)] == ["../outside", "/outside", "a/../../outside"]
