"""Rows of parquet files and of directories that the datasets library saved, a batch at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from baichuan_sft.data.findings import Finding
from baichuan_sft.data.json_text import RawRecord
from baichuan_sft.data.sniff import Refused
from baichuan_sft.errors import first_line

MAGIC = b"PAR1"
BATCH = 256  # rows
BUFFER = 1 << 20  # bytes of each column


def is_parquet(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False  # said where it is read


def parquet_rows(path: str) -> Iterator[RawRecord]:
    """Raises Refused: no footer, a damaged page, or no rows."""
    import pyarrow
    from pyarrow import parquet

    item = 0
    try:
        # Without a buffer a row group, which may be the whole file, is read at once.
        with parquet.ParquetFile(path, buffer_size=BUFFER, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=BATCH):
                for row in batch.to_pylist():
                    yield _row(item, row)
                    item += 1
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        after = f" after item {item - 1}" if item else ""
        text = f"truncated parquet, or a damaged one{after}: {first_line(error)}"
        raise Refused(Finding("DATA007", path, text)) from None
    _require_rows(path, item)


def dataset_rows(path: str) -> Iterator[RawRecord]:
    """Raises Refused: splits of which one must be chosen, damaged files, or no rows."""
    import datasets

    if os.path.isfile(os.path.join(path, "dataset_dict.json")):
        splits = sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
        text = f"holds the splits [{', '.join(splits)}]; pass one of them: {os.path.join(path, *splits[:1])}"
        raise Refused(Finding("DATA001", path, text))
    item = 0
    try:
        for row in datasets.load_from_disk(path):
            yield _row(item, row)
            item += 1
    # The library and Arrow raise whatever their parts raise: KeyError, JSONDecodeError, ArrowInvalid, ...
    except Exception as error:
        text = f"cannot be loaded as a saved dataset: {type(error).__name__}: {first_line(error)}"
        raise Refused(Finding("DATA007", path, text)) from None
    _require_rows(path, item)


def _require_rows(path: str, num: int) -> None:
    if not num:
        raise Refused(Finding("DATA004", path, "no rows"))


def _row(item: int, row: dict[str, Any]) -> RawRecord:
    return RawRecord(item, None, None, _without_none(row))


def _without_none(value: Any) -> Any:
    """Tables give every struct all keys; those that a record lacks are None."""
    if isinstance(value, dict):
        return {key: _without_none(member) for key, member in value.items() if member is not None}
    if isinstance(value, list):
        return [_without_none(member) for member in value]
    return value
