"""Files to raw records: JSON arrays and JSON Lines, told apart by content, every fault with its place.

Faults read ``path:line:col: what is wrong``, line and column counted from 1 in characters. The
whole file is held in memory while it is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from baichuan_sft.data.formats import escaped, shown
from baichuan_sft.errors import UserError

EXPECTED = "expected a list of records or one record per line"
COMMENTS = ("//", "#", "/*")
SPACE = re.compile(r"[ \t\r\n]*")
NOT_JSON_NUMBER = re.compile(r'"(?:[^"\\]|\\.)*"|(NaN|-?Infinity)')
OTHER_FILE_TYPES = {
    b"\x1f\x8b": "a gzip file; unpack it first: gunzip -k {path}",
    b"\x28\xb5\x2f\xfd": "a zstd file; unpack it first: unzstd -k {path}",
    b"PAR1": "a parquet file; export it to JSON Lines first",
    b"PK\x03\x04": "a zip file; unpack it first",
    b"\xff\xfe": "UTF-16 LE (byte order mark FF FE); convert it: iconv -f utf-16 -t utf-8 {path}",
    b"\xfe\xff": "UTF-16 BE (byte order mark FE FF); convert it: iconv -f utf-16 -t utf-8 {path}",
}


@dataclass(frozen=True)
class Record:
    """One raw record and where it stands.

    Attributes:
        line: 1-based line of its first character.
        item: 0-based number within the file; lines that are not JSON are counted too.
        raw: what the JSON parser returned, of any type.
    """

    path: str
    line: int
    item: int
    raw: Any

    def locate(self, error: UserError) -> UserError:
        """``error`` with the file, line and item in front: ``a.json:41 item 3 turn 2: ...``."""
        joint = " " if str(error).startswith("turn ") else ": "
        return UserError(f"{self.path}:{self.line} item {self.item}{joint}{error}")


def stop(error: UserError) -> NoReturn:
    """The default of ``on_error``: raise it."""
    raise error


def read_records(path: str | Path, *, on_error: Callable[[UserError], None] = stop) -> Iterator[Record]:
    """The records of one JSON array or JSON Lines file, in file order.

    Args:
        path: a UTF-8 file, with or without a byte order mark, whatever its suffix.
        on_error: called with every fault. When it returns, reading goes on with the next line of
            JSON Lines; nothing more comes out of a broken array, where no item start can be trusted.
    Raises:
        UserError: from ``on_error``; a missing file, one that is not UTF-8, malformed JSON.
    """
    path = str(path)
    try:
        text = _read_text(path)
        start = _skip_space(text, 0)
        if start == len(text):
            raise UserError(f"{path}: the file holds nothing but white space")
        if text[start] == "[":
            yield from _read_array(path, text, start)
            return
        _require_lines(path, text, start)
    except UserError as error:
        on_error(error)
        return
    yield from _read_lines(path, text, on_error)


def read_bytes(path: str | Path) -> bytes:
    """The bytes of a data file, or a UserError that says why there are none."""
    file = Path(path)
    if file.is_dir():
        raise UserError(f"{path} is a directory; pass a file")
    if not file.exists():
        raise UserError(f"{path}: no such file")
    if not file.is_file():
        raise UserError(f"{path} is not a regular file; pass a JSON or JSON Lines file")
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if not data:
        raise UserError(f"{path}: file is empty (0 bytes)")
    return data


def _read_text(path: str) -> str:
    data = read_bytes(path)
    for magic, what in OTHER_FILE_TYPES.items():
        if data.startswith(magic):
            raise UserError(f"{path}: looks like {what.format(path=path)}")
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line, column = _place(data[: error.start].decode("utf-8"), error.start)
        raise UserError(
            f"{path}:{line}:{column}: not UTF-8, byte {data[error.start]:02X} at byte {error.start}"
            f"{_other_encoding(data, path)}"
        ) from None


def _other_encoding(data: bytes, path: str) -> str:
    try:
        data.decode("gb18030")
    except UnicodeDecodeError:
        return "; repair the text or convert the file to UTF-8"
    return f"; the bytes decode as GB18030, convert it: iconv -f gb18030 -t utf-8 {path}"


def _read_array(path: str, text: str, start: int) -> Iterator[Record]:
    position = _skip_space(text, start + 1)
    item, line, counted = 0, 1, 0
    if text[position : position + 1] == "]":
        raise UserError(f"{path}: no items, the list is empty")
    while True:
        line, counted = line + text.count("\n", counted, position), position
        raw, position = _decode(path, text, position)
        yield Record(path, line, item, raw)
        item += 1
        position = _skip_space(text, position)
        mark = text[position : position + 1]
        if mark == "]":
            break
        if mark != ",":
            raise _fault(path, text, position, f"expected , or ] after item {item - 1}")
        position = _skip_space(text, position + 1)
        if text[position : position + 1] == "]":
            raise _fault(path, text, position, "trailing comma before ]")
    rest = _skip_space(text, position + 1)
    if rest != len(text):
        raise _fault(path, text, rest, f"text after the end of the list; {EXPECTED}")


def _read_lines(path: str, text: str, on_error: Callable[[UserError], None]) -> Iterator[Record]:
    # Only "\n" ends a line: str.splitlines would also cut at U+2028, which JSON strings may hold.
    item = 0
    for number, line in enumerate(text.split("\n"), start=1):
        start = _skip_space(line, 0)
        if start == len(line):
            continue
        try:
            raw, end = _decode(path, line, start, first_line=number)
            rest = _skip_space(line, end)
            if rest != len(line):
                raise _fault(path, line, rest, "text after the record; one record per line", number)
            yield Record(path, number, item, raw)
        except UserError as error:
            on_error(error)
        item += 1


def _require_lines(path: str, text: str, start: int) -> None:
    """Return when the text is JSON Lines; otherwise raise a UserError that says what it is instead."""
    if text[start] != "{":
        is_comment = text.startswith(COMMENTS, start)
        what = "comments are not JSON" if is_comment else "neither JSON nor JSON Lines"
        raise _fault(path, text, start, f"{what}, {EXPECTED}; starts with {shown(text[start : start + 20])}")
    head = [line for line in text[start:].split("\n", 50) if line.strip()][:2]
    if any(_is_object(line) for line in head):
        return
    raw, end = _decode(path, text, start)
    if _skip_space(text, end) != len(text):
        raise _fault(path, text, end, "several objects over many lines each; put one per line: jq -c . FILE")
    keys = ", ".join(shown(key, 30)[1:-1] for key in list(raw)[:10])
    raise _fault(path, text, start, f"{EXPECTED}, got one object with keys [{keys}]")


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _decode(path: str, text: str, position: int, first_line: int = 1) -> tuple[Any, int]:
    try:
        return DECODER.raw_decode(text, position)
    except json.JSONDecodeError as error:
        raise _fault(path, text, error.pos, _explain(error), first_line) from None
    except RecursionError:
        raise _fault(path, text, position, "nested too deeply to be a record", first_line) from None
    except _NotJson as error:
        bad = next(found for found in NOT_JSON_NUMBER.finditer(text, position) if found[1])
        raise _fault(path, text, bad.start(), str(error), first_line) from None
    except ValueError:
        # The C scanner refuses to convert integers of more than 4300 digits.
        raise _fault(path, text, position, "a number of more than 4300 digits here", first_line) from None


class _NotJson(Exception):
    pass


def _refuse_constant(name: str) -> NoReturn:
    raise _NotJson(f"{name} is not JSON")


DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def _explain(error: json.JSONDecodeError) -> str:
    char = error.doc[error.pos : error.pos + 1]
    if error.msg.startswith("Unterminated string"):
        return "the text ends inside a string - truncated download?"
    if not error.doc[error.pos :].strip():
        return "the text ends inside a record - truncated download?"
    if error.msg.startswith("Invalid control character"):
        names = {"\t": "TAB, write \\t", "\n": "line break, write \\n"}
        return f"raw control character inside a string: {names.get(char, escaped(char) + ', escape it')}"
    if char == "'":
        return "JSON needs double quotes - this looks like a Python repr"
    if char in "}]" and error.doc[: error.pos].rstrip().endswith(","):
        return f"trailing comma before {char}"
    if error.doc.startswith(COMMENTS, error.pos):
        return "comments are not JSON"
    return f"malformed JSON: {error.msg[0].lower()}{error.msg[1:]}"


def _fault(path: str, text: str, position: int, what: str, first_line: int = 1) -> UserError:
    line, column = _place(text, position)
    return UserError(f"{path}:{line + first_line - 1}:{column}: {what}")


def _place(text: str, position: int) -> tuple[int, int]:
    before = text[:position]
    return before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1


def _skip_space(text: str, position: int) -> int:
    found = SPACE.match(text, position)
    assert found is not None  # the pattern matches the empty string
    return found.end()
