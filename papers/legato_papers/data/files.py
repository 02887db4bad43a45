"""The files of data sets: found, downloaded, unpacked, checked and written. The loaders beside it say which files.

A file is looked for in the folder of --data-dir, else in that of LEGATO_DATA, else in the user's cache, into which it
is downloaded.
"""

import gzip
import hashlib
import io
import json
import lzma
import os
import struct
import tarfile
import tempfile
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..locks import locked
from ..task import ExperimentError

_BLOCK = 1 << 20  # bytes read at a time
_RECEIVED = 1 << 16  # bytes of a download at a time: what a broken connection may lose
#: What the readers of the standard library and of numpy raise for files that are damaged or hostile: an encrypted
#: member of a zip file is a RuntimeError, a size of terabytes a MemoryError, headers inside headers a RecursionError.
UNREADABLE = (
    *(OSError, EOFError, ValueError, KeyError, OverflowError, MemoryError, RuntimeError, RecursionError, SyntaxError),
    *(struct.error, tokenize.TokenError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError),
)


@dataclass(frozen=True)
class File:
    """A file of a data set.

    Args:
        name: of the file. Unless it is an archive (.zip, .tar.gz), it may lie there packed: NAME.xz or NAME.gz.
        size: bytes, unpacked; None is not known.
        checksum: of the unpacked bytes, ``sha256:...``, ``md5:...``, or ``git:...``, the name that git gives them; ""
            is not known.
        url: where it is downloaded from, packed or not; "" is nowhere.
        origin: if nowhere, where else it is to be had, or what takes its place.
    """

    name: str
    size: int | None = None
    checksum: str = ""
    url: str = ""
    origin: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """What it may be called on disk."""
        archive = self.name.endswith((".zip", ".tar.gz"))
        return (self.name,) if archive else (f"{self.name}.gz", f"{self.name}.xz", self.name)


def find(file: File, folder: str, data_dir: Path | None = None) -> Path | None:
    """Where the file lies: in ``folder`` below a folder of data, or in the latter itself; None if it is nowhere.

    Args:
        file: the file.
        folder: of its data set.
        data_dir: folder of data. By default $LEGATO_DATA, else the user's cache.
    """
    paths = (place / name for place in _places(folder, data_dir) for name in file.names)
    return next((path for path in paths if path.is_file()), None)


def need(file: File, folder: str, data_dir: Path | None = None, *, otherwise: str = "") -> Path:
    """Where the file lies, as ``find``; it is downloaded if it lies nowhere and no folder of data is named.

    Args:
        file: the file.
        folder: of its data set.
        data_dir: folder of data, as in ``find``.
        otherwise: for the error, what would do as well.

    Raises:
        ExperimentError: the file is not in the folder that is named, or that is no folder; the file is published
            nowhere, cannot be downloaded, or came with other content.
    """
    found = find(file, folder, data_dir)
    if found is not None:
        return found
    if named_folder(data_dir) is None and file.url:
        return download(file, cache() / folder)
    where = " or ".join(str(place) for place in _places(folder, data_dir))
    advice = "name its folder with --data-dir or LEGATO_DATA"
    if file.url:
        advice = f"put {file.url} there; it is downloaded where neither --data-dir nor LEGATO_DATA names a folder"
    elif file.origin:
        advice += f"; {file.origin}"
    raise ExperimentError(
        f"expected {' or '.join(file.names)} in {where}: there is no {file.name} there"
        f"{f', nor {otherwise}' if otherwise else ''}: {advice}"
    )


def named_folder(data_dir: Path | None = None) -> Path | None:
    """The folder of data that the user named, if any: ``data_dir``, else $LEGATO_DATA.

    Raises:
        ExperimentError: it is not a folder.
    """
    named = _named(data_dir)
    if named is not None and not named.is_dir():
        raise ExperimentError(f"there is no folder {named}: correct --data-dir or LEGATO_DATA")
    return named


def cache() -> Path:
    """The folder of what was downloaded: $LEGATO_CACHE, else ``legato`` among the user's caches."""
    if os.environ.get("LEGATO_CACHE"):
        return Path(os.environ["LEGATO_CACHE"])
    import pooch

    return Path(pooch.os_cache("legato"))


def read(path: Path, file: File) -> bytes:
    """The unpacked bytes of the file that lies at ``path``.

    Raises:
        ExperimentError: it cannot be read or unpacked, or has another size or checksum; both are named.
    """
    try:
        with _unpacked(path, path.name != file.name) as stream:
            content = stream.read()
    except UNREADABLE as error:
        raise _damaged(path, error) from error
    compare(content, file, path)
    return content


def compare(content: bytes, file: File, path: Path) -> None:
    """Raises ExperimentError unless these are the unpacked bytes of the file; ``path`` is where they came from."""
    _compare(path, file, len(content), _digest(file, len(content), [content]))


def check(path: Path, file: File) -> None:
    """Raises what ``read`` raises, in the memory of a block."""
    packed = path.name != file.name
    try:
        size = sum(map(len, _blocks(path, packed))) if packed else path.stat().st_size
        found = _digest(file, size, _blocks(path, packed)) if file.size in (None, size) else ""
    except UNREADABLE as error:
        raise _damaged(path, error) from error
    _compare(path, file, size, found)


def read_text(path: Path, file: File) -> list[str]:
    """The lines of the file that lies at ``path``, without the ``\\n`` that ends each.

    Raises:
        ExperimentError: as ``read``, or a line has a character that is not UTF-8.
    """
    return lines(read(path, file), path)


def lines(content: bytes, path: Path | str) -> list[str]:
    """The lines of a UTF-8 text, without the ``\\n`` that ends each. What else ends lines in Unicode stays."""
    whole = text(content, path)
    return whole.removesuffix("\n").split("\n") if whole else []


def text(content: bytes, path: Path | str) -> str:
    """UTF-8 as a string. Raises ExperimentError with the line of the first broken character."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise _broken(path, line, content[error.start]) from error


def read_lines(path: Path, file: File) -> Iterator[str]:
    """What ``read_text`` returns, one line after the other, in the memory of one; sizes and checksums are not compared.

    Raises:
        ExperimentError: it cannot be read or unpacked, or a line has a character that is not UTF-8.
    """
    try:
        with _unpacked(path, path.name != file.name) as stream:
            yield from _decoded(stream, path)
    except UNREADABLE as error:
        raise _damaged(path, error) from error


def columns(rows: Iterable[str], count: int, path: Path | str, *, first_line: int = 1) -> list[list[str]]:
    """Lines with tabs between their columns as lists of columns.

    Args:
        rows: the lines.
        count: columns that each has.
        path: of the file, for the error.
        first_line: number of the first of ``rows``, for the error.

    Raises:
        ExperimentError: a line has more or fewer columns.
    """
    table = [row.split("\t") for row in rows]
    for number, row in enumerate(table, first_line):
        if len(row) != count:
            raise line_error(path, number, f"{count} columns with tabs between them", f"{len(row)}")
    return table


def records(rows: Iterable[str], texts: Sequence[str], classes: int, path: Path | str) -> Iterator[dict[str, Any]]:
    """Lines of JSON as dictionaries, one after the other.

    Args:
        rows: the lines.
        texts: what each must have, as a string.
        classes: each must have ``label`` from 0 to one less than this; 0 is no label.
        path: of the file, for the error.

    Raises:
        ExperimentError: a line is not JSON, lacks one of ``texts`` or has another label.
    """
    for number, row in enumerate(rows, 1):
        try:
            record = json.loads(row)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in texts):
            raise line_error(path, number, f"a JSON object with the texts {', '.join(texts)}", repr(row[:60]))
        for key in texts:
            try:
                record[key].encode()
            except UnicodeEncodeError as error:
                surrogate = f"half of one ({record[key][error.start]!r})"
                raise line_error(path, number, f"characters in {key}", surrogate) from error
        label = record.get("label")
        if classes and (type(label) is not int or label not in range(classes)):
            raise line_error(path, number, f"a label from 0 to {classes - 1}", repr(label)[:60])
        yield record


def as_lines(rows: Iterable[dict[str, Any]]) -> bytes:
    """Lines of JSON in UTF-8, as ``records`` reads them: our own form of a data set."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def line_error(path: Path | str, line: int, expected: str, got: str) -> ExperimentError:
    """What to raise for a line that cannot be right."""
    return ExperimentError(f"{path}, line {line}: expected {expected}, got {got}: put an intact copy there")


def zip_member(path: Path, name: str) -> bytes:
    """The unpacked bytes of a member of a zip archive, whose CRC is checked.

    Raises:
        ExperimentError: the archive is damaged or has no such member.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if name not in archive.namelist():
                raise _no_member(path, name)
            return archive.read(name)
    except UNREADABLE as error:
        raise _damaged(path, error) from error


def zip_lines(path: Path, name: str) -> Iterator[str]:
    """The lines of a member of a zip archive, one after the other, in the memory of one.

    Raises:
        ExperimentError: the archive is damaged or has no such member, or a line has a character that is not UTF-8.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if name not in archive.namelist():
                raise _no_member(path, name)
            with archive.open(name) as stream:
                yield from _decoded(stream, path / name)
    except UNREADABLE as error:
        raise _damaged(path, error) from error


def tar_members(path: Path) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of every file in a tar archive, packed or not, in the memory of one.

    Raises:
        ExperimentError: the archive is damaged.
    """
    try:
        # tarfile's own unpacking takes the end of a file that was cut short for the end of the archive.
        with _unpacked(path, True) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                content = archive.extractfile(member) if member.isfile() else None
                if content is not None:
                    yield member.name.removeprefix("./"), content.read()
                archive.members = []  # pyright: ignore[reportAttributeAccessIssue] - else it keeps all it has seen
    except UNREADABLE as error:
        raise _damaged(path, error) from error


def write(path: Path, blocks: Iterable[bytes]) -> None:
    """Write a file that is there whole or not at all; packed if it is called .xz or .gz, always to the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as raw:
        part = Path(raw.name)
        try:
            with _packing(raw, path.suffix) as stream:
                for block in blocks:
                    stream.write(block)
            raw.flush()
            os.fsync(raw.fileno())
            os.chmod(part, 0o644)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def download(file: File, folder: Path) -> Path:
    """Download a file into ``folder``, unless it is there, and check it. What was cut short is gone on with.

    Raises:
        ExperimentError: it could not be downloaded, or what came has another size or checksum and was deleted.
    """
    path = folder / file.url.rsplit("/", 1)[1]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(f".{path.name}.lock"), f"downloads {path}"):
            if not path.is_file():
                _download(file, path)
    except OSError as error:
        raise ExperimentError(f"cannot write to {folder}: {error}: name another folder with LEGATO_CACHE") from error
    return path


def _download(file: File, path: Path) -> None:
    import pooch

    pooch.get_logger().setLevel("WARNING")  # the size is told below, once it is known
    try:
        # pooch has no checksums of unpacked files: all are compared below.
        resuming: Any = _Resuming(path)
        pooch.retrieve(file.url, known_hash=None, fname=path.name, path=path.parent, downloader=resuming)
    except Exception as error:
        raise ExperimentError(
            f"could not download {file.url} to {path.parent}: {error}: the same command goes on with it, or put the "
            "file in a folder of data and name that with --data-dir or LEGATO_DATA"
        ) from error
    try:
        check(path, file)
    except ExperimentError as error:
        path.unlink()
        raise ExperimentError(f"{error} (it came from {file.url} and was deleted)") from error


class _Resuming:
    """Downloads for pooch, by way of PATH.part, which stays there when the connection breaks."""

    def __init__(self, path: Path) -> None:
        self.part = path.with_name(f"{path.name}.part")

    def __call__(self, url: str, output_file: Any, pooch: Any) -> None:
        import requests

        have = self.part.stat().st_size if self.part.is_file() else 0
        # Without "identity", a server may pack what is packed already, and ranges would count other bytes.
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
        with requests.get(url, headers=headers, stream=True, timeout=30) as reply:
            if reply.status_code == requests.codes.requested_range_not_satisfiable:
                # All of it is there, or what is there is not of this file.
                if reply.headers.get("Content-Range") != f"bytes */{have}":
                    self.part.unlink()
                    raise OSError(f"what was there of it, {have:,} bytes, does not belong to it and was deleted")
            else:
                reply.raise_for_status()
                if not reply.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                    have = 0  # the server sends all of it
                self._receive(reply, have)
        os.replace(self.part, output_file)

    def _receive(self, reply: Any, have: int) -> None:
        import sys

        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

        rest = reply.headers.get("Content-Length")
        total = have + int(rest) if rest else None
        size = f"{total / 1e6:,.1f} MB" if total else "size not told"
        gone_on = f", {have / 1e6:,.1f} MB of it are there" if have else ""
        print(f"downloading {reply.url} ({size}{gone_on}) to {self.part.parent}", file=sys.stderr)
        shown = (TextColumn(self.part.stem), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with open(self.part, "ab" if have else "wb") as stream, Progress(*shown, console=Console(stderr=True)) as bar:
            line = bar.add_task("", total=total, completed=have)
            # What came before the connection broke is kept; how much that is, is compared below.
            reply.raw.enforce_content_length = False
            for block in reply.iter_content(_RECEIVED):
                stream.write(block)
                bar.advance(line, len(block))
        received = self.part.stat().st_size
        if total not in (None, received):
            raise OSError(f"the connection broke: {received:,} of {total:,} bytes are there")


def _named(data_dir: Path | None) -> Path | None:
    return data_dir or (Path(os.environ["LEGATO_DATA"]) if os.environ.get("LEGATO_DATA") else None)


def _places(folder: str, data_dir: Path | None) -> Iterator[Path]:
    named = _named(data_dir)
    yield from (named / folder, named) if named else (cache() / folder,)


def _unpacked(path: Path, packed: bool) -> io.BufferedIOBase:
    if packed and path.suffix == ".gz":
        return gzip.open(path, "rb")
    return lzma.open(path, "rb") if packed and path.suffix == ".xz" else open(path, "rb")


def _blocks(path: Path, packed: bool) -> Iterator[bytes]:
    with _unpacked(path, packed) as stream:
        yield from iter(lambda: stream.read(_BLOCK), b"")


def _decoded(stream: Iterable[bytes], path: Path) -> Iterator[str]:
    for number, line in enumerate(stream, 1):
        try:
            yield line.decode("utf-8").removesuffix("\n")
        except UnicodeDecodeError as error:
            raise _broken(path, number, line[error.start]) from error


def _packing(raw: Any, suffix: str) -> AbstractContextManager[Any]:
    if suffix == ".gz":
        return gzip.GzipFile("", "wb", fileobj=raw, mtime=0)
    return lzma.open(raw, "wb") if suffix == ".xz" else nullcontext(raw)


def _digest(file: File, size: int, blocks: Iterable[bytes]) -> str:
    """The checksum, of the kind that is known of the file, of these bytes."""
    if not file.checksum:
        return ""
    kind = file.checksum.split(":")[0]
    digest = hashlib.sha1(b"blob %d\0" % size) if kind == "git" else hashlib.new(kind)
    for block in blocks:
        digest.update(block)
    return f"{kind}:{digest.hexdigest()}"


def _compare(path: Path, file: File, size: int, checksum: str) -> None:
    if file.size not in (None, size):
        difference = "cut short" if size < file.size else "too long"
        raise ExperimentError(
            f"{path} is {difference} or another file: expected {file.size:,} bytes of content, got {size:,}: "
            "put an intact copy there"
        )
    if checksum != file.checksum:
        (kind, expected), (_, found) = file.checksum.split(":"), checksum.split(":")
        kind = {"sha256": "SHA-256", "md5": "MD5", "git": "git's name"}[kind]
        raise ExperimentError(
            f"{path} is corrupt or another file: expected content with {kind} {expected}, got {found} "
            f"in {size:,} bytes: put an intact copy there"
        )


def _broken(path: Path | str, line: int, byte: int) -> ExperimentError:
    return line_error(path, line, "UTF-8", f"a broken character (byte {byte:#04x})")


def _no_member(path: Path, name: str) -> ExperimentError:
    return ExperimentError(f"{path} has no member {name}: put the original archive there")


def _damaged(path: Path, error: BaseException) -> ExperimentError:
    why = " ".join(str(error).split())[:200] or type(error).__name__
    return ExperimentError(f"{path} cannot be read or unpacked: {why}: put an intact copy there")
