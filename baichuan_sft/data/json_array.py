"""A JSON array item by item, in the memory of one item."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain

import numpy as np
import orjson

from baichuan_sft.data.findings import Finding, RecordFault
from baichuan_sft.data.json_text import MAX_DEPTH, RawRecord, SyntaxFault, decode, ends_early, locate
from baichuan_sft.data.sniff import EXPECTED, WHITE, Refused, Text, mib

# 1 a quote, 2 an opening bracket, 3 a closing one
CLASSES = np.zeros(256, np.uint8)
CLASSES[list(b'"[{]}')] = 1, 2, 2, 3, 3
TOKEN = re.compile(rb'[ \t\r\n]+|[,"]|[^ \t\r\n,"]+')
FIRST, ITEM, COMMA = "an item or ]", "an item", ", or ]"  # what may come next between items
SUSPECT = 8 << 20  # bytes of an open item after which it is looked at: is it long, or is a bracket missing?


class Brackets:
    """Where items start and end, block by block: brackets outside of strings, counted.

    block    {"a": "]"}, {"b": [1]}]
    depth    1        0  1     2 10 -1       behind each bracket; 0 is between the items
    """

    def __init__(self) -> None:
        self.depth, self.in_string, self.carry = 0, False, False

    def scan(self, block: bytes) -> tuple[list[int], int | None]:
        """Positions of the brackets that take the depth from 0 to 1, back to 0, or below 0, in order.

        The second value is the position of a bracket that nests deeper than ``MAX_DEPTH``; then those
        before it come out only.
        """
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
        is_edge = (depths < 0) | (depths - steps == 0) | (depths == 0)
        if (deep := np.flatnonzero(depths > MAX_DEPTH)).size:
            is_edge[deep[0] :] = False
            return positions[is_edge].tolist(), int(positions[deep[0]])
        return positions[is_edge].tolist(), None

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
    """The window on an array: what was read and not given out yet, and the place where that starts."""

    def __init__(self, text: Text) -> None:
        self.text, self.held, self.at = text, b"", 0
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
            edges, too_deep = brackets.scan(block)
            for edge in edges:
                if is_open:
                    yield self._take_record(old + edge + 1)
                else:
                    yield from self._between(old + edge)
                    if self._is_close():
                        return self._end(blocks)
                is_open = not is_open
            if too_deep is not None:
                raise self._too_deep(old + too_deep)
            if not is_open:
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
                found = locate(record, fault, self.text.path)
                text = f"{found.text}; nothing behind this item is read"
                raise Refused(replace(found, text=text), data) from None
        self.item, self.expected = self.item + 1, COMMA
        self.suspect = min(SUSPECT, self.text.options.max_line)
        return record

    def _record(self, end: int) -> RawRecord:
        return RawRecord(self.item, self.line, self.column, self.held[self.at : end], self.start)

    def _take(self, end: int) -> bytes:
        """The bytes up to ``end``, where the window starts from then on."""
        data = self.held[self.at : end]
        if breaks := data.count(b"\n"):
            self.line, self.column = self.line + breaks, 1
        rest = data[data.rfind(b"\n") + 1 :] if breaks else data
        self.column += len(rest if rest.isascii() else rest.decode("utf-8", "replace"))
        self.start, self.at = self.start + len(data), end
        return data

    def _require(self, *expected: str) -> None:
        if self.expected not in expected:
            after = f" after item {self.item - 1}" if self.expected is COMMA else ""
            raise self._refused("DATA006", f"expected {self.expected}{after}")

    def _is_close(self) -> bool:
        """Whether the bracket between items ends the list."""
        mark = self.held[self.at : self.at + 1]
        if mark == b"]":
            if self.expected is ITEM:
                raise self._refused("DATA006", "trailing comma before ]")
            return True
        self._require(FIRST, ITEM)
        if mark == b"}":
            self._require()
        return False

    def _end(self, blocks: Iterator[bytes]) -> None:
        """Require that nothing but white space stands behind the list, and that it had items."""
        if not self.item:
            place = (self.line, self.column)
            raise Refused(Finding("DATA004", self.text.path, "no items, the list is empty", *place))
        self._take(self.at + 1)
        while True:
            self._take(len(self.held) - len(self.held[self.at :].lstrip(WHITE)))
            if self.at < len(self.held):
                raise self._refused("DATA006", f"text after the end of the list; {EXPECTED}")
            block = next(blocks, b"")
            if not block:
                return
            self.held, self.at = block, 0

    def _limit(self, end: int) -> None:
        """Refuse an item that is too long; one that is no JSON so far lacks a quote or a bracket."""
        size = end - self.at
        if size > self.suspect:
            self.suspect *= 8
            record = self._record(end)
            assert isinstance(record.data, bytes)
            fault = _syntax_fault(record.data)
            if fault and not ends_early(record.data, fault):
                raise Refused(locate(record, fault, self.text.path), record.data)
        if size > self.text.options.max_line:
            text = f"item longer than {mib(self.text.options.max_line)}"
            raise self._refused("DATA008", text)

    def _too_deep(self, position: int) -> Refused:
        record = self._record(position + 1)
        assert isinstance(record.data, bytes)
        fault: RecordFault | None = _syntax_fault(record.data)
        if fault is None or ends_early(record.data, fault):
            offset = len(record.data[:-1].decode("utf-8", "replace"))
            fault = RecordFault("DATA006", f"nesting deeper than {MAX_DEPTH}", offset=offset)
        return Refused(locate(record, fault, self.text.path), record.data)

    def _cut_off(self) -> Refused:
        record = self._record(len(self.held))
        assert isinstance(record.data, bytes)
        fault = _syntax_fault(record.data) if record.data else None
        if fault is None:
            return self._refused("DATA007", "the text ends without the ] of the list - truncated download?")
        finding = locate(record, fault, self.text.path)
        if ends_early(record.data, fault):
            finding = replace(finding, code="DATA007")
        return Refused(finding, record.data)

    def _refused(self, code: str, text: str) -> Refused:
        return Refused(Finding(code, self.text.path, text, self.line, self.column, self.item))


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
