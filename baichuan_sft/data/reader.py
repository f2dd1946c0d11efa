"""Files to raw records: JSON arrays, JSON Lines, plain text, parquet and datasets, in the memory of a record.

What a file is, its content tells and never its suffix. Lines and columns count from 1 in characters.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

from baichuan_sft.data.files import ReadOptions, is_dataset_dir, open_bytes, require_file
from baichuan_sft.data.findings import DataFault, Finding, RecordFault
from baichuan_sft.data.json_array import Array
from baichuan_sft.data.json_text import RawRecord, decode, locate, utf8
from baichuan_sft.data.sniff import WHITE, Refused, Text, is_array, mib, refuse_other_files
from baichuan_sft.data.tables import dataset_rows, is_parquet, parquet_rows
from baichuan_sft.errors import pick

__all__ = ["LAYOUTS", "RawRecord", "decode", "locate", "read_raw"]

DEFAULTS = ReadOptions()
OnFinding = Callable[[Finding, bytes | None], None]  # what was found, and the bytes that are rejected for it


def read_raw(
    path: str | os.PathLike[str],
    on_finding: OnFinding,
    *,
    layout: str = "json",
    options: ReadOptions = DEFAULTS,
) -> Iterator[RawRecord]:
    """The records of one file in file order; ``decode`` makes values of them.

    Args:
        path: a file, gzip and zstd unpacked on the way, or a directory that ``datasets`` saved.
        on_finding: told what is wrong with the file, and what was normalised. Reading goes on behind a
            line that is too long, and ends where nothing behind can be trusted.
        layout: ``json`` is an array, one object per line, parquet or a datasets directory; ``lines``
            makes ``{"text": line}`` of every line that is not blank, ``document`` one of the file.
    """
    path = os.fspath(path)
    read = pick("layout", layout, LAYOUTS)
    try:
        try:
            require_file(path)
        except DataFault as fault:
            raise Refused(fault.findings[0]) from None
        if is_dataset_dir(path):
            yield from dataset_rows(path)
        elif layout == "json" and is_parquet(path):
            yield from parquet_rows(path)
        else:
            with open_bytes(path, options) as source:
                text = Text(path, source, options)
                if text.skip_bom():
                    on_finding(Finding("DATA003", path, "byte order mark removed", 1, 1), None)
                refuse_other_files(text, is_json=layout == "json")
                yield from read(text, on_finding)
    except Refused as refused:
        on_finding(refused.finding, refused.raw)


def _json(text: Text, on_finding: OnFinding) -> Iterator[RawRecord]:
    text.skip_space()
    yield from Array(text).records() if is_array(text) else _json_lines(text, on_finding)


def _json_lines(text: Text, on_finding: OnFinding) -> Iterator[RawRecord]:
    """One record per line that is not blank; only \\n ends a line, U+2028 may stand in a string."""
    item, column, start = 0, text.column, text.start
    for number, (line, size) in enumerate(_lines(text), start=text.line):
        if line is None:
            on_finding(_too_long(text, number, item), None)
            item += 1
        elif data := line.strip(WHITE):
            lead = 0 if line.startswith(b"{") else len(line) - len(line.lstrip(WHITE))
            yield RawRecord(item, number, column + lead, data, start + lead)
            item += 1
        start, column = start + size, 1


def _text_lines(text: Text, on_finding: OnFinding) -> Iterator[RawRecord]:
    item, start = 0, text.start
    for number, (line, size) in enumerate(_lines(text), start=1):
        if line is None:
            on_finding(_too_long(text, number, item), None)
            item += 1
        elif line.strip():
            record = RawRecord(item, number, 1, line.removesuffix(b"\r"), start)
            yield from _as_text(record, text.path, on_finding)
            item += 1
        start += size
    if not item:
        raise Refused(Finding("DATA004", text.path, "holds nothing but white space"))


def _document(text: Text, on_finding: OnFinding) -> Iterator[RawRecord]:
    pieces, size = [], 0
    for block in text.blocks():
        pieces.append(block)
        size += len(block)
        if size > text.options.max_line:
            limit = mib(text.options.max_line)
            raise Refused(Finding("DATA008", text.path, f"document longer than {limit}", 1, 1, 0))
    record = RawRecord(0, 1, 1, b"".join(pieces), text.start)
    if not b"".join(pieces).strip():
        raise Refused(Finding("DATA004", text.path, "holds nothing but white space"))
    yield from _as_text(record, text.path, on_finding)


def _as_text(record: RawRecord, path: str, on_finding: OnFinding) -> Iterator[RawRecord]:
    """The record with its text as its value, or the finding that it is not UTF-8."""
    assert isinstance(record.data, bytes)
    try:
        content = utf8(record.data)
    except RecordFault as fault:
        on_finding(locate(record, fault, path), record.data)
    else:
        yield record._replace(data={"text": content})


LAYOUTS: dict[str, Callable[[Text, OnFinding], Iterator[RawRecord]]] = {
    "json": _json,
    "lines": _text_lines,
    "document": _document,
}


def _too_long(text: Text, line: int, item: int) -> Finding:
    return Finding("DATA008", text.path, f"line longer than {mib(text.options.max_line)}", line, 1, item)


def _lines(text: Text) -> Iterator[tuple[bytes | None, int]]:
    """Each line without its \\n, None for one longer than allowed, and the bytes it takes with its \\n."""
    limit = text.options.max_line
    pieces: list[bytes] = []  # of the line that goes on
    held = 0  # its bytes, of which none are kept beyond the limit
    for block in text.blocks():
        first, *lines = block.split(b"\n")
        held += len(first)
        pieces.append(first)
        if held > limit:
            pieces.clear()
        if not lines:
            continue
        line = b"".join(pieces)
        pieces.clear()
        yield (None if held > limit else line), held + 1
        last = lines.pop()
        for line in lines:
            yield (line if len(line) <= limit else None), len(line) + 1
        pieces, held = [last], len(last)
    if held:
        yield (None if held > limit else b"".join(pieces)), held
