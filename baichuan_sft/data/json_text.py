"""One record: its JSON text to a value, and a fault in it to a place in the file."""

from __future__ import annotations

import json
import re
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import Any, NamedTuple, NoReturn

import orjson

from baichuan_sft.data.findings import Finding, RecordFault
from baichuan_sft.data.formats import escaped, shown

MAX_DEPTH = 64  # of brackets in one record
COMMENTS = ("//", "#", "/*")
SPACE = re.compile(r"[ \t\r\n]*")
STRUCTURE = re.compile(r'["\[\]{}]')
NUMBER = re.compile(r'"|-?Infinity|NaN|-?[0-9][0-9.eE+-]*')


class RawRecord(NamedTuple):
    """One record as it stands in its file. A tuple, because ten million of them are made.

    Attributes:
        item: 0-based number within the file; records that are not JSON are counted too.
        line, column: 1-based, in characters, of its first character; None for tables.
        data: its JSON text as UTF-8, or the row of a table.
        start: byte of its first character in the (unpacked) file; None for tables.
    """

    item: int
    line: int | None
    column: int | None
    data: bytes | dict[str, Any]
    start: int | None = None


class SyntaxFault(RecordFault):
    """The text is no JSON, so that in a list nothing shows where the next item starts."""


def decode(data: bytes | dict[str, Any]) -> Any:
    """The value of a record; a lone surrogate in a text is left in, for who checks the texts.

    Raises:
        RecordFault: DATA002, DATA006 or DATA023, with the offset.
    """
    if not isinstance(data, bytes):
        return data
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError:
        return _decode_slowly(data)
    num_colons, num_levels = _measure(value)
    # Of equal keys orjson keeps the last, so colons are missing, unless escaped ones make up for them.
    is_escaped = b"\\u003a" in data or b"\\u003A" in data
    if num_levels > MAX_DEPTH or data.count(b":") != num_colons or is_escaped:
        _check_objects(data.decode())
    return value


def _measure(value: Any) -> tuple[int, int]:
    """Colons that ``value`` has as JSON, and levels: at least as many as brackets stand in each other."""
    level, num_colons, num_levels = [value], 0, 0
    while level:
        num_levels += 1
        below: list[Any] = []
        for item in level:
            if type(item) is str:
                num_colons += item.count(":")
            elif type(item) is dict:
                num_colons += len(item) + "".join(item).count(":")
                below += item.values()
            elif type(item) is list:
                below += item
        level = below
    return num_colons, num_levels


def _check_objects(text: str) -> None:
    """Raise RecordFault where valid JSON nests too deeply or gives a key twice."""
    names: list[set[str] | None] = []  # per open bracket; None for a list
    position = 0
    while found := STRUCTURE.search(text, position):
        start, position = found.start(), found.end()
        if found[0] == '"':
            name, position = scanstring(text, start + 1)
            if names and names[-1] is not None and text.startswith(":", skip_space(text, position)):
                if name in names[-1]:
                    raise RecordFault("DATA023", f"key {shown(name, 30)} is given twice", offset=start)
                names[-1].add(name)
        elif found[0] in "{[":
            names.append(set() if found[0] == "{" else None)
            if len(names) > MAX_DEPTH:
                raise SyntaxFault("DATA006", f"nesting deeper than {MAX_DEPTH}", offset=start)
        else:
            names.pop()


def _decode_slowly(data: bytes) -> Any:
    """``decode`` of what orjson refuses: mostly not JSON, with the reason; else it is Python's value."""
    text = utf8(data)
    too_big: list[str] = []

    def number(token: str) -> int | float:
        size = float(token)
        if size in (float("inf"), float("-inf")):
            too_big.append(token)
        elif token.lstrip("-").isdigit():
            return int(token)
        return size

    decoder = json.JSONDecoder(parse_int=number, parse_float=number, parse_constant=_refuse_constant)
    try:
        value, end = decoder.raw_decode(text, skip_space(text, 0))
    except json.JSONDecodeError as error:
        raise SyntaxFault("DATA006", explain(error), offset=error.pos) from None
    except RecursionError:
        _check_objects(text)
        raise AssertionError("what exceeds the recursion limit nests too deeply") from None
    except _NotJson as error:
        token = str(error)
        raise SyntaxFault("DATA006", f"{token} is not JSON", offset=_find_number(text, token)) from None
    if (end := skip_space(text, end)) != len(text):
        raise SyntaxFault("DATA006", "text after the record; one record per line", offset=end)
    _check_objects(text)
    if too_big:
        raise RecordFault("DATA006", _size(too_big[0]), offset=_find_number(text, too_big[0]))
    return value


class _NotJson(Exception):
    pass


def _refuse_constant(name: str) -> NoReturn:
    raise _NotJson(name)


def _size(token: str) -> str:
    digits = token.lstrip("-")
    if digits.isdigit():
        return f"number with {len(digits)} digits"
    return f"number {shown(token, 30)[1:-1]} is out of range"


def _find_number(text: str, token: str) -> int:
    position = 0
    while found := NUMBER.search(text, position):
        if found[0] == token:
            break
        position = scanstring(text, found.end())[1] if found[0] == '"' else found.end()
    return found.start() if found else 0


def utf8(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        offset = len(data[: error.start].decode())
        raise SyntaxFault("DATA002", f"not UTF-8: byte {data[error.start]:02X}", offset=offset) from None


def explain(error: json.JSONDecodeError) -> str:
    """Why text is no JSON, in the words of who wrote the file."""
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
    if char == "\ufeff":
        return "a byte order mark inside the file - were files put one behind the other?"
    return f"malformed JSON: {error.msg[0].lower()}{error.msg[1:]}"


def ends_early(data: bytes, fault: RecordFault) -> bool:
    """Whether all that is wrong with the text is that it stops."""
    if fault.text.startswith("the text ends"):
        return True
    # A literal or a character cut in two; no sound item has a fault so close to its end.
    return fault.offset is not None and fault.offset >= len(data.decode("utf-8", "replace")) - 12


def locate(record: RawRecord, fault: RecordFault, path: str) -> Finding:
    """A fault of a record, or what is worth saying of it, with its line and column in the file."""
    text, line, column = fault.text, record.line, record.column
    if line is not None and column is not None and isinstance(record.data, bytes):
        body = record.data.decode("utf-8", "replace")
        before = body[: _find(body, fault.at) if fault.offset is None else fault.offset]
        line, column = move(line, column, before)
        if fault.code == "DATA002" and record.start is not None:
            text += f" at byte {record.start + len(before.encode())}"
    return Finding(fault.code, path, text, line, column, record.item, fault.turn)


def _find(text: str, at: tuple[str | int, ...]) -> int:
    """Offset of the value that ``at`` leads to, or of the last one on the way that is there."""
    position = skip_space(text, 0)
    for step in at:
        inner = _enter(text, position, step)
        if inner is None:
            break
        position = inner
    return position


def _enter(text: str, position: int, step: str | int) -> int | None:
    """Offset of the member ``step`` of the object or list at ``position``."""
    if not text.startswith(("{", "["), position):
        return None
    is_object = text[position] == "{"
    position = skip_space(text, position + 1)
    index = 0
    while position < len(text) and text[position] not in "}]":
        name: str | int = index
        if is_object:
            name, position = scanstring(text, position + 1)
            position = skip_space(text, skip_space(text, position) + 1)
        if name == step:
            return position
        position = skip_space(text, SKIPPER.raw_decode(text, position)[1])
        position = skip_space(text, position + text.startswith(",", position))
        index += 1
    return None


SKIPPER = json.JSONDecoder(parse_int=str)  # int() refuses more than 4300 digits


def move(line: int, column: int, text: str) -> tuple[int, int]:
    """Line and column behind ``text``, which starts at those given."""
    breaks = text.count("\n")
    return (line + breaks, len(text) - text.rfind("\n")) if breaks else (line, column + len(text))


def skip_space(text: str, position: int) -> int:
    found = SPACE.match(text, position)
    assert found is not None  # the pattern matches the empty string
    return found.end()
