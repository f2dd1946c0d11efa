"""Names and bytes: which files are meant, whether they can be read, and their content unpacked, as UTF-8."""

from __future__ import annotations

import codecs
import errno
import glob
import gzip
import io
import os
import stat
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from baichuan_sft.data.findings import DataFault, Finding
from baichuan_sft.errors import UserError, first_line

GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
RETRIES, PAUSE = 3, 0.2  # of a failing read; seconds before the first retry, doubled each time
PIECE = 64 << 10  # bytes unpacked at once: what is lost where an archive breaks, and what a bomb can take
RATIO_GRACE = 16 << 20  # unpacked bytes before the ratio counts: a short file of one letter is no bomb
OTHER_KINDS = {stat.S_IFIFO: "a named pipe", stat.S_IFCHR: "a device", stat.S_IFSOCK: "a socket"}


@dataclass(frozen=True)
class ReadOptions:
    """How files become text.

    Attributes:
        encoding: a Python codec; anything but UTF-8 is transcoded while reading.
        max_line: bytes of one record.
        max_unpacked: bytes out of one .gz or .zst file.
        max_ratio: unpacked : packed, looked at once more than 16 MiB came out.
    """

    encoding: str = "utf-8"
    max_line: int = 64 << 20
    max_unpacked: int = 64 << 30
    max_ratio: float = 200.0

    def __post_init__(self) -> None:
        try:
            "a".encode(self.encoding)
        except (LookupError, ValueError):
            raise UserError(
                f"unknown encoding {self.encoding!r}; a Python codec is meant: utf-8, gb18030, utf-16, big5"
            ) from None

    @property
    def is_utf8(self) -> bool:
        return codecs.lookup(self.encoding).name in ("utf-8", "utf-8-sig")


class Readable(Protocol):
    """Bytes from first to last.

    Attributes:
        size: how many come out in all; None where that is not known before.
    """

    size: int | None

    def read(self, size: int, /) -> bytes:
        """At most ``size`` bytes, none at the end.

        Raises:
            DataFault: damaged, unpacks to too much, in another encoding, or the disk fails.
        """
        ...


def refusal(code: str, path: str, text: str, **place: int) -> DataFault:
    """The error of a file that cannot be used, with its one finding."""
    finding = Finding(code, path, text, **place)
    return DataFault(f"{finding.place()}: {text}", [finding])


def expand(pattern: str) -> list[str]:
    """The files of a name or a glob (``data/**/*.jsonl``), sorted; a name that exists is no pattern.

    Raises:
        UserError: nothing matches the glob. A plain name is returned unseen, see ``require_file``.
    """
    if os.path.lexists(pattern) or not glob.has_magic(pattern):
        return [pattern]
    found = sorted(glob.glob(pattern, recursive=True))
    if not found:
        raise UserError(f"no file matches {pattern}")
    return found


def size_of(path: str) -> int:
    """Bytes of a file, or of the files of a directory."""
    if os.path.isdir(path):
        return sum(entry.stat().st_size for entry in os.scandir(path) if entry.is_file())
    return os.path.getsize(path)


def is_dataset_dir(path: str | os.PathLike[str]) -> bool:
    """Whether ``save_to_disk`` of the datasets library wrote it."""
    names = [{"dataset_dict.json"}, {"state.json", "dataset_info.json"}]
    return any(all(os.path.isfile(os.path.join(path, name)) for name in group) for group in names)


def require_file(path: str | os.PathLike[str]) -> None:
    """Return when ``path`` is a regular file with bytes that can be read, or a datasets directory.

    Raises:
        DataFault: DATA001 or DATA004, which of this it is not.
    """
    path = os.fspath(path)
    try:
        status = os.stat(path)
        if is_dataset_dir(path):
            return
        if stat.S_ISDIR(status.st_mode):
            raise refusal("DATA001", path, "is a directory; pass a file or a glob")
        if not stat.S_ISREG(status.st_mode):
            what = OTHER_KINDS.get(stat.S_IFMT(status.st_mode), "something else")
            raise refusal("DATA001", path, f"not a regular file but {what}; copy its content into a file")
        os.close(os.open(path, os.O_RDONLY))
    except (OSError, ValueError) as error:
        raise refusal("DATA001", path, _why_not(error)) from None
    if not status.st_size:
        raise refusal("DATA004", path, "file is empty (0 bytes)")


def _why_not(error: OSError | ValueError) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, PermissionError):
        return f"cannot be read by uid {os.geteuid()}: {error.strerror}"
    if isinstance(error, OSError) and error.errno == errno.ELOOP:
        return "a symbolic link that leads back to itself"
    return f"cannot be read: {getattr(error, 'strerror', None) or error}"


@contextmanager
def open_bytes(path: str | os.PathLike[str], options: ReadOptions) -> Iterator[Readable]:
    """The bytes of a regular file: gzip and zstd (told by their first bytes) unpacked, other codecs as UTF-8.

    Raises:
        DataFault: DATA001, the file cannot be opened; see ``Readable.read`` as well.
    """
    path = os.fspath(path)
    try:
        file = _File(path)
    except OSError as error:
        raise refusal("DATA001", path, _why_not(error)) from None
    try:
        source: Readable = file
        magic = os.pread(file.fd, 4, 0)
        if magic.startswith((GZIP, ZSTD)):
            source = _Unpacked(file, "gzip" if magic.startswith(GZIP) else "zstd", options)
        yield source if options.is_utf8 else _Transcoded(path, source, options.encoding)
    finally:
        os.close(file.fd)


class _File(io.RawIOBase):
    """A regular file from its first byte on; a read that fails is tried again."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path, self.offset = path, 0
        self.fd = os.open(path, os.O_RDONLY)
        self.size: int | None = os.fstat(self.fd).st_size

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        for attempt in range(RETRIES + 1):
            try:
                data = os.pread(self.fd, size, self.offset)
                break
            except OSError as error:
                if attempt == RETRIES:
                    text = f"cannot be read at byte {self.offset}: {error.strerror}, after {RETRIES} retries"
                    raise refusal("DATA001", self.path, text) from None
                time.sleep(PAUSE * 2**attempt)
        self.offset += len(data)
        return data


class _Unpacked:
    """gzip or zstd, with all its members; stopped where more comes out than the options allow."""

    size: int | None = None

    def __init__(self, packed: _File, kind: str, options: ReadOptions) -> None:
        self.packed, self.kind, self.options, self.out = packed, kind, options, 0
        self.stream: Any
        if kind == "gzip":
            self.stream = gzip.GzipFile(fileobj=packed, mode="rb")
            self.unpack = self.stream.read1  # read() would lose what it has when a later piece is damaged
        else:
            import pyarrow

            self.stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(packed, mode="r"), "zstd")
            self.unpack = self.stream.read

    def read(self, size: int, /) -> bytes:
        try:
            data: bytes = self.unpack(min(size, PIECE))
        except (EOFError, OSError, zlib.error) as error:
            text = (
                f"{self.kind} archive is damaged or cut off, {self.out} bytes came out: {first_line(error)}"
            )
            raise refusal("DATA007", self.packed.path, text) from None
        self.out += len(data)
        if self.out > self.options.max_unpacked:
            self._stop(f"more than {self.options.max_unpacked} bytes")
        if self.out > RATIO_GRACE and self.out > self.options.max_ratio * self.packed.offset:
            self._stop(f"more than {self.options.max_ratio:g} times its size")
        return data

    def _stop(self, limit: str) -> None:
        text = f"unpacks to {limit}; stopped after {self.out} bytes out of {self.packed.offset}"
        raise refusal("DATA007", self.packed.path, text)


class _Transcoded:
    """Text in any codec as UTF-8; what stands before a byte that cannot be decoded still comes out."""

    size: int | None = None

    def __init__(self, path: str, source: Readable, encoding: str) -> None:
        self.path, self.source, self.encoding = path, source, encoding
        self.decoder = codecs.getincrementaldecoder(encoding)()
        self.taken = 0
        self.fault: DataFault | None = None
        self.is_over = False

    def read(self, size: int, /) -> bytes:
        text = ""
        while not text and not self.is_over:
            if self.fault:
                raise self.fault
            block = self.source.read(size)
            self.is_over = not block
            text = self._decode(block)
        if not text and self.fault:
            raise self.fault
        return text.encode("utf-8", "surrogatepass")

    def _decode(self, block: bytes) -> str:
        state = self.decoder.getstate()
        try:
            text = self.decoder.decode(block, not block)
            self.taken += len(block)
            return text
        except UnicodeError as error:
            # The object of the error starts with what the decoder had kept of earlier blocks.
            ahead = error.start - len(error.object) if isinstance(error, UnicodeDecodeError) else -len(block)
            good = len(block) + ahead
            text = f"not {self.encoding} at byte {self.taken + good}: {getattr(error, 'reason', error)}"
            self.fault = refusal("DATA002", self.path, text)
        self.decoder.setstate(state)
        return self.decoder.decode(block[: max(good, 0)])
