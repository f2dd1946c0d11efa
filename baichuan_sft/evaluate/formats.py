"""The authors' files of one benchmark: found in its folder or a zip there, hashed, never extracted.

Whatever is wrong with a file is one line that names it, with the line inside it where there is one.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import stat
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NoReturn

from baichuan_sft.errors import UserError, first_line
from baichuan_sft.evaluate.items import Item

MAX_BYTES = 512 << 20  # unpacked; the largest of the authors' files (MedMCQA train) has 140 MB
MAX_RATIO = 200  # unpacked over packed; text of questions packs to a third, a bomb to a thousandth
MAX_MEMBERS = 100_000

POOL = 500  # examples read of a train file: a prompt holds a few, MedMCQA's has 182,822

Line = tuple[str, dict[str, Any]]  # "ceval/val/law_val.csv:12", what stands there


class Folder:
    """The files of one benchmark, by their path below the data directory.

    Attributes:
        sha256: of each file read; of the whole archive for its members.
    """

    def __init__(self, data_dir: Path, name: str):
        self.data_dir, self.root = data_dir, data_dir / name
        self.sha256: dict[str, str] = {}
        self._loose = self._files() if self.root.is_dir() else []
        self._members: dict[str, tuple[str, zipfile.ZipInfo]] = {}
        self._archives: dict[str, zipfile.ZipFile] = {}

    def _files(self) -> list[str]:
        names = []
        for path in sorted(self.root.rglob("*")):
            if _hidden(path.relative_to(self.root).as_posix()):
                continue
            name = path.relative_to(self.data_dir).as_posix()
            if path.is_symlink() and not path.resolve().is_relative_to(self.root.resolve()):
                bad(name, f"is a link out of {self.root.name}/; copy the file, or link the whole folder")
            names += [name] if path.is_file() else []
        return names

    def find(self, *patterns: str) -> list[str]:
        """Files whose path ends as the first pattern that any of them fits ("/dev/*.csv").

        Those in archives are looked at only where no such file lies beside them.
        """
        for names in (lambda: self._loose, self._packed):
            for pattern in patterns:
                if found := [name for name in names() if fnmatchcase(name, f"*{pattern}")]:
                    return found
        return []

    def first(self, *patterns: str) -> str | None:
        return next(iter(self.find(*patterns)), None)

    def split(self, split: str) -> dict[str, str]:
        """The csv files of a split by subject: "law" of val/law_val.csv, or of val/law.csv."""
        subjects: dict[str, str] = {}
        for name in self.find(f"/*_{split}.csv", f"/{split}/*.csv"):
            subject = name.rsplit("/", 1)[1].removesuffix(".csv").removesuffix(f"_{split}")
            if subject in subjects:
                bad(name, f"is subject {subject!r} again, after {subjects[subject]}; remove one of them")
            subjects[subject] = name
        return subjects

    def _packed(self) -> list[str]:
        for name in self._loose:
            if name.endswith(".zip") and name not in self._archives:
                self._open(name)
        return sorted(self._members)

    def _open(self, name: str) -> None:
        try:
            self._archives[name] = archive = zipfile.ZipFile(self.data_dir / name)
        except (zipfile.BadZipFile, OSError) as error:
            bad(name, f"is no readable zip archive ({first_line(error)}); download it again")
        if len(archive.infolist()) > MAX_MEMBERS:
            bad(name, f"holds more than {MAX_MEMBERS:,} files; unpack the ones of this benchmark yourself")
        for info in archive.infolist():
            member = f"{name}/{info.filename}"
            if info.filename.startswith("/") or "\\" in info.filename or ".." in info.filename.split("/"):
                bad(member, "leads out of its archive; this is not the authors' file")
            if stat.S_ISLNK(info.external_attr >> 16):
                bad(member, "is a symbolic link inside an archive; this is not the authors' file")
            if info.flag_bits & 1:
                bad(name, "is encrypted; unpack it and remove the archive")
            if info.is_dir() or _hidden(info.filename):
                continue
            if member in self._members:
                bad(member, "is in its archive twice")
            self._members[member] = (name, info)

    def text(self, name: str) -> str:
        """A whole file, unpacked where it ends in .gz.

        Raises:
            UserError: too large, damaged, not UTF-8.
        """
        data, packed = self._bytes(name), 0
        if name.endswith(".gz"):
            packed = len(data)
            try:
                with gzip.open(io.BytesIO(data)) as file:
                    data = file.read(min(MAX_BYTES, packed * MAX_RATIO + (1 << 20)) + 1)
            except (OSError, EOFError, zlib.error) as error:
                bad(name, f"is a damaged gzip file ({first_line(error)}); download it again")
            _check_size(name, len(data), packed)
        if not data.strip():
            bad(name, "is empty; download it again")
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            bad(f"{name}:{line}", "is not UTF-8; convert it, for GBK: iconv -f GB18030 -t UTF-8")

    def _bytes(self, name: str) -> bytes:
        if name not in self._members:
            try:
                _check_size(name, (self.data_dir / name).stat().st_size)
                data = (self.data_dir / name).read_bytes()
            except OSError as error:
                bad(name, f"cannot be read ({error.strerror})")
            self.sha256[name] = hashlib.sha256(data).hexdigest()
            return data
        archive, info = self._members[name]
        _check_size(name, info.file_size, info.compress_size)
        if archive not in self.sha256:
            with (self.data_dir / archive).open("rb") as file:
                self.sha256[archive] = hashlib.file_digest(file, "sha256").hexdigest()
        try:
            return self._archives[archive].read(info)  # never more than the size it declares
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError) as error:
            bad(name, f"is damaged ({first_line(error)}); download {archive} again")

    def rows(self, name: str, columns: tuple[str, ...] = ()) -> list[Line]:
        """Lines of a csv file by column, all of them text: "NA", "None" and "1" stay what they are.

        Args:
            columns: of a file without a header.
        """
        reader = csv.reader(io.StringIO(self.text(name), newline=""))
        header: list[str] = list(columns)
        lines = []
        try:
            for row in reader:
                if not header:
                    header = [column.strip().lower() for column in row]
                elif row and len(row) != len(header):
                    columns_there = f"has {len(row)} columns, not {len(header)} ({', '.join(header)})"
                    bad(f"{name}:{reader.line_num}", columns_there)
                elif row:
                    lines.append((f"{name}:{reader.line_num}", dict(zip(header, row, strict=True))))
        except csv.Error as error:
            bad(f"{name}:{reader.line_num}", f"is not csv ({error})")
        return lines or bad(name, "has no rows")

    def record(self, name: str) -> dict[str, Any]:
        """A JSON file that is one object."""
        return _object(name, _json(name, self.text(name)))

    def listed(self, name: str, key: str) -> list[Line]:
        """The objects of a list that a JSON file holds under ``key``."""
        records = self.record(name).get(key)
        if not isinstance(records, list):
            bad(name, f"has no list {key!r}")
        return [(f"{name}: {key} {i}", _object(f"{name}: {key} {i}", x)) for i, x in enumerate(records)]

    def jsonl(self, name: str | None) -> Iterator[Line]:
        """Objects of a file with one on each line, or one array of them; none without a file."""
        if name is None:
            return
        text = self.text(name)
        if text.lstrip().startswith("["):
            for i, record in enumerate(_json(name, text)):
                yield f"{name}[{i}]", _object(f"{name}[{i}]", record)
            return
        for number, line in enumerate(text.split("\n"), 1):  # splitlines would split at U+2028 inside a text
            if line.strip():
                yield f"{name}:{number}", _object(f"{name}:{number}", _json(f"{name}:{number}", line))


@dataclass
class Part:
    """A subject as found; ``shots`` None where the authors ship no examples for it."""

    name: str
    items: list[Item]
    shots: list[Item] | None = None
    title: str = ""


@dataclass
class Found:
    """What a reader makes of a folder; no parts where none of its files lie there.

    Attributes:
        left_out: of the items that ``Benchmark.num_items`` counts.
    """

    parts: list[Part] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    left_out: int = 0


def text_of(where: str, record: Mapping[str, Any], *names: str) -> str:
    """The first of these fields that is there, a text."""
    for name in names:
        if record.get(name) is not None:
            value = record[name]
            return value if isinstance(value, str) else bad(where, f"has {name} {value!r:.60}, not a text")
    bad(where, f"has no {' or '.join(repr(name) for name in names)}, but {', '.join(map(repr, record)):.200}")


def plain(name: str) -> str:
    """A subject's name in words: "abstract_algebra"."""
    return name.replace("_", " ")


def bad(where: str, what: str) -> NoReturn:
    raise UserError(f"{where} {what}.")


def _json(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        bad(where, f"is not JSON ({first_line(error)})")


def _object(where: str, record: Any) -> dict[str, Any]:
    return record if isinstance(record, dict) else bad(where, f"is {type(record).__name__}, not an object")


def _hidden(name: str) -> bool:
    """What file managers leave behind ("._law_dev.csv", "__MACOSX/")."""
    return any(part.startswith((".", "__MACOSX")) for part in name.split("/"))


def _check_size(name: str, size: int, packed: int | None = None) -> None:
    if size > MAX_BYTES:
        bad(name, f"has {size:,} bytes, more than the {MAX_BYTES:,} a benchmark's file may have")
    if packed is not None and size > packed * MAX_RATIO + (1 << 20):  # small files may pack to nothing
        bad(name, f"unpacks to more than {MAX_RATIO} times its size; this is not the authors' file")
