"""The start of a text file: where its text begins, and what it is, told by content and never by suffix."""

from __future__ import annotations

import codecs
import json
import re
import shlex
from collections.abc import Iterator
from typing import Any

import orjson

from baichuan_sft.data.files import Readable, ReadOptions
from baichuan_sft.data.findings import DataFault, Finding, RecordFault
from baichuan_sft.data.formats import shown
from baichuan_sft.data.json_text import COMMENTS, SKIPPER, ends_early, explain, move, skip_space

HEAD = 1 << 20  # bytes looked at to tell what a file is
BLOCK = 1 << 20  # bytes read at once
WHITE = b" \t\r\n"
BOM = b"\xef\xbb\xbf"
EXPECTED = "expected a list of conversations or one per line"
# Findings are kept by content: {path} becomes the name that the file has where they are shown.
ICONV = "iconv -f {} -t utf-8 {{path}} > {{path}}.utf8"
UTF16 = "looks like UTF-16 {} (byte order mark {}); pass --encoding utf-16 or convert: {}"
MAGIC = {
    b"\xff\xfe": ("DATA002", UTF16.format("LE", "FF FE", ICONV.format("utf-16"))),
    b"\xfe\xff": ("DATA002", UTF16.format("BE", "FE FF", ICONV.format("utf-16"))),
    b"PAR1": ("DATA005", "a parquet file inside an archive, or where text is expected; unpack it first"),
    b"PK\x03\x04": ("DATA005", "a zip file; unpack it first: unzip {path}"),
    b"BZh": ("DATA005", "a bzip2 file; unpack it first: bunzip2 -k {path}"),
    b"\xfd7zXZ": ("DATA005", "an xz file; unpack it first: unxz -k {path}"),
    b"7z\xbc\xaf": ("DATA005", "a 7z file; unpack it first: 7z x {path}"),
    b"version https://git-lfs": ("DATA005", "a Git LFS pointer; fetch what it points to: git lfs pull"),
}
# Keys under which whole data sets are wrapped; a record has other ones.
WRAPPERS = {"data", "dataset", "examples", "instances", "items", "records", "rows", "train"}
FIRST_KEY = re.compile(rb'\{[ \t\r\n]*"([^"\\]{1,30})"[ \t\r\n]*:[ \t\r\n]*(\[?)')


class Refused(Exception):
    """Nothing more of the file is read; the finding that says why, and the bytes it is about."""

    def __init__(self, finding: Finding, raw: bytes | None = None) -> None:
        super().__init__(str(finding))
        self.finding, self.raw = finding, raw


class Text:
    """The bytes of a text file from its first character on: the head at hand, all of it in blocks.

    Attributes:
        line, column, start: where ``head`` begins; start is its byte.
        head: the first MiB or, where ``is_whole``, all.
        size: bytes of the whole, None where it is unpacked or transcoded.
    """

    def __init__(self, path: str, source: Readable, options: ReadOptions) -> None:
        self.path, self.options, self.source, self.size = path, options, source, source.size
        self.line, self.column, self.start = 1, 1, 0
        self.head, self.is_whole = b"", False
        self.fault: Refused | None = None
        self._fill()
        if not self.head and self.fault:
            raise self.fault

    def blocks(self) -> Iterator[bytes]:
        for start in range(0, len(self.head), BLOCK):
            yield self.head[start : start + BLOCK]
        while not self.is_whole:
            if self.fault:
                raise self.fault
            if block := self._read():
                yield block

    def refused(self, code: str, text: str, offset: int = 0) -> Refused:
        """The refusal of the whole file for what stands ``offset`` bytes into its head."""
        before = self.head[:offset].decode("utf-8", "replace")
        return Refused(Finding(code, self.path, text, *move(self.line, self.column, before)))

    def skip_bom(self) -> bool:
        has_bom = self.head.startswith(BOM)
        if has_bom:
            self.head, self.start = self.head[len(BOM) :], len(BOM)
        return has_bom

    def skip_space(self) -> None:
        """Start at the first character that is no white space, however far it is."""
        while not (found := self.head.lstrip(WHITE)):
            if self.fault:
                raise self.fault
            if self.is_whole:
                raise Refused(Finding("DATA004", self.path, "holds nothing but white space"))
            self._move(self.head)
            self.head = self._read()
        self._move(self.head[: len(self.head) - len(found)])
        self.head = found
        self._fill()

    def _move(self, space: bytes) -> None:
        self.line, self.column = move(self.line, self.column, space.decode())
        self.start += len(space)

    def _fill(self) -> None:
        pieces, size = [self.head], len(self.head)
        while size < HEAD and not self.is_whole and not self.fault:
            try:
                pieces.append(self._read())
            except Refused as fault:
                self.fault = fault  # raised where what was read before has been given out
            size += len(pieces[-1])
        self.head = b"".join(pieces)

    def _read(self) -> bytes:
        try:
            block = self.source.read(BLOCK)
        except DataFault as fault:
            raise Refused(fault.findings[0]) from None
        self.is_whole = not block
        return block


def refuse_other_files(text: Text, is_json: bool) -> None:
    """Raise Refused for an archive, UTF-16, bytes of zero, or text that is GB18030 throughout.

    Plain text may begin like an archive; then only what is no UTF-8 or holds a zero tells that it is one.
    """
    head = text.head
    may_begin_so = not is_json and b"\0" not in head and _utf8_fault(text) is None
    for magic, (code, what) in MAGIC.items():
        if head.startswith(magic) and not may_begin_so:
            raise Refused(Finding(code, text.path, what))
    if not head.strip(b"\0"):
        raise Refused(Finding("DATA005", text.path, "starts with bytes of zero - written before a crash?"))
    if head[:4].count(0) == 2 and len({bool(byte) for byte in head[:4:2]}) == 1 and head[0] != head[1]:
        byte_order = "utf-16-be" if head[0] == 0 else "utf-16-le"
        raise Refused(Finding("DATA002", text.path, f"looks like UTF-16; pass --encoding {byte_order}"))
    _refuse_gb18030(text)


def _utf8_fault(text: Text) -> int | None:
    """Where the head stops being UTF-8."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(text.head, text.is_whole)
    except UnicodeDecodeError as error:
        return error.start
    return None


def _refuse_gb18030(text: Text) -> None:
    start = _utf8_fault(text)
    if start is None:
        return
    # Two bytes of GB18030 may look like one short UTF-8 character, hardly ever like one of three bytes.
    if max(text.head[:start].decode(), default="") >= "\u0800" or any(map(_is_utf8, text.head.split(b"\n"))):
        return
    try:
        codecs.getincrementaldecoder("gb18030")().decode(text.head)
    except UnicodeDecodeError:
        return
    what = f"not UTF-8: byte {text.head[start]:02X} at byte {text.start + start}"
    way_out = f"pass --encoding gb18030 or convert: {ICONV.format('gb18030')}"
    raise text.refused("DATA002", f"{what}; bytes decode as GB18030 - {way_out}", start)


def _is_utf8(line: bytes) -> bool:
    """Whether a line is text in UTF-8 beyond ASCII."""
    try:
        return not line.isascii() and max(line.decode()) >= "\u0800"
    except UnicodeDecodeError:
        return False


def is_array(text: Text) -> bool:
    """True for a JSON array, False for one object per line.

    Raises:
        Refused: neither; one object around all, objects over many lines each, or no JSON.
    """
    lines = text.head.split(b"\n", 200)
    if not text.is_whole and len(lines) > 1:
        lines.pop()  # may be cut
    lines = [line for line in lines if line.strip()]
    first, others = lines[0].strip(WHITE), lines[1:]
    if first.startswith(b"{"):
        _refuse_object(text, first, others)
        return False
    # One broken line at the top: the others show that it is JSON Lines.
    num_objects = sum(map(_is_object, others))
    if first != b"[" and 2 * num_objects > len(others):
        return False
    if first.startswith(b"["):
        return True
    raise text.refused(*_what_is_it(text.head))


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(orjson.loads(line), dict)
    except orjson.JSONDecodeError:
        return False


def _refuse_object(text: Text, first: bytes, others: list[bytes]) -> None:
    """Return when a text that starts with { is JSON Lines."""
    if 2 * sum(map(_is_object, others)) > len(others):
        return  # a first line that is broken in two is no reason to refuse the others
    is_one_line = _is_object(first)
    key = FIRST_KEY.match(text.head)
    is_wrapped = key is not None and key[1].decode("utf-8", "replace") in WRAPPERS
    if is_one_line and (others or not is_wrapped):
        return
    if b"\n" not in text.head and not text.is_whole and not is_wrapped:
        return  # one line that is longer than the head
    decoded = text.head.decode("utf-8", "replace")
    try:
        value, end = SKIPPER.raw_decode(decoded)
        if "\n" not in decoded[:end] and not (is_one_line and is_wrapped):
            return  # the rest of the first line is wrong, or it is not UTF-8
        if skip_space(decoded, end) == len(decoded):
            raise text.refused("DATA009", _one_object(value))
        way_out = "put one per line: jq -c . {path} > {path}.jsonl"
        offset = len(decoded[: skip_space(decoded, end)].encode())
        raise text.refused("DATA009", f"several objects over many lines each; {way_out}", offset)
    except json.JSONDecodeError as error:
        fault = RecordFault("DATA006", explain(error), offset=error.pos)
    except RecursionError:
        return
    if not text.is_whole and ends_early(text.head, fault) and key is not None:
        start: dict[str, Any] = {key[1].decode("utf-8", "replace"): [{}] if key[2] else None}
        raise text.refused("DATA009", _one_object(start))
    before = decoded[: fault.offset]
    if not any(map(_is_object, others)) and "\n" in before.rstrip():
        raise text.refused("DATA006", fault.text, len(before.encode()))


def _one_object(value: dict[str, Any]) -> str:
    keys = ", ".join(shown(key, 30)[1:-1] for key in list(value)[:10])
    lists = [key for key, member in value.items() if isinstance(member, list)]
    what = f"expected a list of conversations, got an object with keys [{keys}]"
    if len(lists) != 1 or "{path}" in lists[0]:
        return what
    step = f".{lists[0]}" if re.fullmatch("[A-Za-z_]+", lists[0]) else f".[{shown(lists[0], 30)}]"
    return f"{what}; take the list out: jq -c {shlex.quote(step + '[]')} {{path}} > {{path}}.jsonl"


def _what_is_it(head: bytes) -> tuple[str, str]:
    """Code and words for a text that starts like no JSON array and like no object."""
    start = head[:200].decode("utf-8", "replace")
    lines = [line for line in head[:10000].split(b"\n") if line.strip()]
    if start.startswith("<"):
        return "DATA005", "looks like an HTML or XML page - a failed download?"
    if start.startswith(COMMENTS):
        return "DATA006", f"comments are not JSON, {EXPECTED}"
    for separator, name in ((b",", "CSV"), (b"\t", "TSV")):
        if len(lines) > 1 and lines[0].count(separator) == lines[1].count(separator) > 0:
            return "DATA005", f"looks like {name}; only JSON, JSON Lines, parquet and datasets are read"
    return "DATA006", f"neither JSON nor JSON Lines, {EXPECTED}; starts with {shown(start[:20])}"


def mib(size: int) -> str:
    return f"{size} bytes" if size % (1 << 20) else f"{size >> 20} MiB"
