"""A JSON array item by item, in the memory of one item."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain

import numpy as np
import orjson

from baichuan_sft.data.findings import Finding, RecordFault
from baichuan_sft.data.json_text import RawRecord, SyntaxFault, decode, ends_early, locate
from baichuan_sft.data.sniff import EXPECTED, WHITE, Refused, Text, mib

# 1 a quote, 2 an opening bracket, 3 a closing one
CLASSES = np.zeros(256, np.uint8)
CLASSES[list(b'"[{]}')] = 1, 2, 2, 3, 3
TOKEN = re.compile(rb'[ \t\r\n]+|[,"]|[^ \t\r\n,"]+')
TRAILING = "trailing comma before ]"
FIRST, ITEM, COMMA = "an item or ]", "an item", ", or ]"  # what may come next between items
SUSPECT = 8 << 20  # bytes of an open item after which it is looked at: is it long, or is a bracket missing?


class Brackets:
    """Where items start and end, block by block: brackets outside of strings, counted.

    block    {"a": "]"}, {"b": [1]}]
    depth    1        0  1     2 10 -1       behind each bracket; 0 is between the items
    """

    def __init__(self) -> None:
        self.depth, self.in_string, self.carry = 0, False, False

    def scan(self, block: bytes) -> list[int]:
        """Positions of the brackets that take the depth from 0 to 1, back to 0, or below 0, in order."""
        kinds, positions = self._marks(block)
        is_string = (np.cumsum(kinds == 1) + self.in_string) & 1
        if len(kinds):
            self.in_string = bool(is_string[-1])
        is_bracket = (kinds != 1) & (is_string == 0)
        steps = 5 - 2 * kinds[is_bracket].astype(np.int64)  # +1 for 2, -1 for 3
        positions = positions[is_bracket]
        depths = self.depth + np.cumsum(steps)
        if len(depths):
            self.depth = int(depths[-1])
        edges: list[int] = positions[(depths < 0) | (depths - steps == 0) | (depths == 0)].tolist()
        return edges

    def _marks(self, block: bytes) -> tuple[np.ndarray, np.ndarray]:
        """Classes and positions of quotes that are not escaped, and of brackets."""
        text = np.frombuffer(block, np.uint8)
        # Sets the bits in which [ ] { } differ; _ y Y and DEL look the same then and are of class 0.
        positions = np.flatnonzero((text == 0x22) | ((text | 0x26) == 0x7F))
        kinds = CLASSES[text[positions]]
        follows = (kinds == 1) & (text[positions - 1] == 0x5C)
        kinds[follows & (positions > 1) & (text.take(positions - 2, mode="clip") != 0x5C)] = 0
        for mark in np.flatnonzero((kinds == 1) & (follows | (positions == 0))).tolist():
            if self._is_escaped(block, int(positions[mark])):
                kinds[mark] = 0
        self.carry = self._is_escaped(block, len(block))
        return kinds[kinds > 0], positions[kinds > 0]

    def _is_escaped(self, block: bytes, position: int) -> bool:
        """Whether an odd number of backslashes stands before a character."""
        first = position
        while first and block[first - 1] == 0x5C:
            first -= 1
        return bool((position - first + (self.carry and not first)) % 2)


class Array:
    """The window on an array: what was read and not given out yet, and the place where that starts.

    Attributes:
        before: of an item that goes on, the blocks before the one that is held.
    """

    def __init__(self, text: Text) -> None:
        self.text, self.held, self.at = text, b"", 0
        self.before: list[bytes] = []
        self.line, self.column, self.start = text.line, text.column + 1, text.start + 1
        self.item, self.expected = 0, FIRST
        self.suspect = min(SUSPECT, text.options.max_line)

    def records(self) -> Iterator[RawRecord]:
        """The items in order.

        Raises:
            Refused: at the first thing that is no JSON; nothing behind it can be trusted.
        """
        brackets, is_open, blocks = Brackets(), False, self.text.blocks()
        first = next(blocks)[1:]  # without the [
        for block in chain([first] if first else [], blocks):
            old = len(self.held) - self.at
            self.held, self.at = self.held[self.at :] + block, 0
            for edge in brackets.scan(block):
                if is_open:
                    yield self._take_record(old + edge + 1)
                else:
                    yield from self._between(old + edge)
                    if self._is_close():
                        return self._end(blocks)
                is_open = not is_open
            if is_open:
                self.before.append(self.held[self.at :])
                self.held, self.at = b"", 0
            else:
                yield from self._between(len(self.held), is_cut=True)
            self._limit(len(self.held))
        if not is_open:
            yield from self._between(len(self.held))
        raise self._cut_off()

    def _between(self, end: int, is_cut: bool = False) -> Iterator[RawRecord]:
        """The items without brackets, and commas, up to ``end``; ``is_cut`` leaves what may go on there."""
        if self.expected is COMMA and self.held[self.at : end].strip(WHITE) == b",":
            self._take(end)
            self.expected = ITEM
        while found := TOKEN.match(self.held, self.at, end):
            mark, stop = found[0][:1], found.end()
            if mark in WHITE:
                self._take(stop)
            elif mark == b",":
                self._require(COMMA)
                self._take(stop)
                self.expected = ITEM
            else:
                self._require(FIRST, ITEM)
                if mark == b'"':
                    stop = _string_end(self.held, stop)
                if is_cut and stop in (end, -1):
                    return
                if stop < 0:
                    raise self._cut_off()
                yield self._take_record(stop)

    def _take_record(self, end: int) -> RawRecord:
        self._limit(end)
        line, column, start = self.line, self.column, self.start
        data = self._take(end)
        record = RawRecord(self.item, line, column, data, start)
        try:
            orjson.loads(data)
        except orjson.JSONDecodeError:
            if fault := _syntax_fault(data):
                raise self._broken(record, fault) from None
        self.item, self.expected = self.item + 1, COMMA
        self.suspect = min(SUSPECT, self.text.options.max_line)
        return record

    def _peek(self, end: int) -> bytes:
        data = self.held[self.at : end]
        return b"".join([*self.before, data]) if self.before else data

    def _take(self, end: int) -> bytes:
        """The bytes up to ``end``, where the window starts from then on."""
        data = self._peek(end)
        self.before.clear()
        if breaks := data.count(b"\n"):
            self.line, self.column = self.line + breaks, 1
        rest = data[data.rfind(b"\n") + 1 :] if breaks else data
        self.column += len(rest if rest.isascii() else rest.decode("utf-8", "replace"))
        self.start, self.at = self.start + len(data), end
        return data

    def _require(self, *expected: str) -> None:
        if self.expected not in expected:
            after = f" after item {self.item - 1}" if self.expected is COMMA else ""
            raise self._unread("DATA006", f"expected {self.expected}{after}")

    def _is_close(self) -> bool:
        """Whether the bracket between items ends the list."""
        mark = self.held[self.at : self.at + 1]
        if mark == b"]":
            return True
        self._require(FIRST, ITEM)
        if mark == b"}":
            self._require()
        return False

    def _end(self, blocks: Iterator[bytes]) -> None:
        """Require that the list has items and no comma behind the last, and that nothing stands behind it."""
        refused = None
        if self.expected is not COMMA:
            is_empty = self.expected is FIRST
            fault = ("DATA004", "no items, the list is empty") if is_empty else ("DATA006", TRAILING)
            refused = self._refused(*fault, item=None)
        self._take(self.at + 1)
        while True:
            self._take(len(self.held) - len(self.held[self.at :].lstrip(WHITE)))
            if self.at < len(self.held):
                raise self._unread("DATA006", f"text after the end of the list; {EXPECTED}")
            block = next(blocks, b"")
            if not block and refused:
                raise refused
            if not block:
                return
            self.held, self.at = block, 0

    def _limit(self, end: int) -> None:
        """Refuse an item that is too long; one that is no JSON so far lacks a quote or a bracket."""
        size = sum(map(len, self.before)) + end - self.at
        if size > self.suspect:
            self.suspect *= 8
            data = self._peek(end)
            fault = _syntax_fault(data)
            if fault and not ends_early(data, fault):
                raise self._broken(self._record(data), fault)
        if size > self.text.options.max_line:
            raise self._unread("DATA008", f"item longer than {mib(self.text.options.max_line)}")

    def _cut_off(self) -> Refused:
        data = self._peek(len(self.held))
        fault = _syntax_fault(data) if data else None
        if fault is None:
            text = "the text ends without the ] of the list - truncated download?"
            return self._refused("DATA007", text, item=None)
        code = "DATA007" if ends_early(data, fault) else fault.code
        return Refused(replace(locate(self._record(data), fault, self.text.path), code=code), data)

    def _record(self, data: bytes) -> RawRecord:
        return RawRecord(self.item, self.line, self.column, data, self.start)

    def _broken(self, record: RawRecord, fault: SyntaxFault) -> Refused:
        """The refusal of an item, and with it of all behind: nothing shows where the next item starts."""
        assert isinstance(record.data, bytes) and record.start is not None
        found = locate(record, fault, self.text.path)
        rest = self._rest(record.start + len(record.data))
        return Refused(replace(found, text=found.text + rest), record.data)

    def _unread(self, code: str, text: str) -> Refused:
        return self._refused(code, text + self._rest(self.start), self.item)

    def _rest(self, start: int) -> str:
        """Words for what is lost from byte ``start`` on."""
        if self.text.size is None:
            return "; nothing behind this item is read"
        num = self.text.size - start
        if not num:
            return ""
        return f"; the {num:,} byte{'s' * (num != 1)} behind it {'is' if num == 1 else 'are'} not read"

    def _refused(self, code: str, text: str, item: int | None) -> Refused:
        return Refused(Finding(code, self.text.path, text, self.line, self.column, item))


def _syntax_fault(data: bytes) -> SyntaxFault | None:
    try:
        decode(data)
    except SyntaxFault as fault:
        return fault
    except RecordFault:
        pass  # a whole item, whatever its value
    return None


def _string_end(data: bytes, position: int) -> int:
    """Behind the quote that ends the string whose text starts at ``position``; -1 where none does."""
    first = position
    while (quote := data.find(b'"', position)) >= 0:
        text = data[first:quote]
        if (len(text) - len(text.rstrip(b"\\"))) % 2 == 0:
            return quote + 1
        position = quote + 1
    return -1
