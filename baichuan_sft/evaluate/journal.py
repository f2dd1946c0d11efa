"""The file of a task's items: lines that stand after a kill, and the run they are of."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any

from baichuan_sft.errors import EnvironmentFault, UserError

Row = dict[str, Any]  # one line, of one item


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def dumps(value: dict[str, Any]) -> bytes:
    # A lone surrogate becomes its escape in JSON.
    return (json.dumps(value, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


@contextlib.contextmanager
def opened(
    file: Path | None, identity: dict[str, Any], batches: list[list[str]]
) -> Iterator[tuple[FileIO | None, list[Row]]]:
    """The file, cut after the last whole batch, open for more; and the rows it holds.

    Args:
        batches: ids of the items of each batch.
    Raises:
        UserError: it is of another run, or another process writes it. EnvironmentFault: it cannot be written.
    """
    if file is None:
        yield None, []
        return
    with _open(file) as out:
        header, (first, *lines) = dumps(identity), out.readall().split(b"\n")
        lines = lines[:-1]  # what follows the last line's end is torn
        if lines and first + b"\n" != header:
            raise UserError(
                f"{file}: is of another run: {differences(first, identity)}. Give another --output_dir, "
                "or delete the file."
            )
        rows = kept_rows(lines, batches)
        out.truncate(len(header) + sum(len(line) + 1 for line in lines[: len(rows)]) if rows else 0)
        if not rows:
            append(out, header)
        yield out, rows


def kept_rows(lines: list[bytes], batches: list[list[str]]) -> list[Row]:
    """Those of whole batches, from the first on."""
    rows: list[Row] = []
    for ids in batches:
        try:
            found = [json.loads(line) for line in lines[len(rows) : len(rows) + len(ids)]]
            if [row["id"] for row in found] != ids:
                break
        except (ValueError, TypeError, KeyError):  # a block that a power cut left unwritten
            break
        rows += found
    return rows


def differences(line: bytes, identity: dict[str, Any]) -> str:
    """The first three settings of a file's identity that are not today's: ``seed 0, now 1``."""
    try:
        before = dict(json.loads(line))
    except (ValueError, TypeError):
        return "its first line is no identity"
    names = [name for name in {**identity, **before} if before.get(name) != identity.get(name)]
    told = [f"{n} {str(before.get(n))[:16]}, now {str(identity.get(n))[:16]}" for n in names[:3]]
    return "; ".join(told)


def _open(file: Path) -> FileIO:
    """At its beginning, held by this process; what is written goes to its end."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        out = open(file, "a+b", buffering=0)  # noqa: SIM115 (the caller closes it)
        out.seek(0)
    except OSError as error:
        raise EnvironmentFault(f"{file}: cannot be written: {error.strerror}.") from None
    try:
        fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{file}: another process writes it; wait, or give another --output_dir.") from None
    except OSError:  # a file system without locks
        pass
    return out


def append(out: FileIO, lines: bytes) -> None:
    """One write, safely on disk."""
    try:
        written = out.write(lines)
        os.fsync(out.fileno())
    except OSError as error:
        raise EnvironmentFault(f"{out.name}: cannot be written: {error.strerror}.") from None
    if written != len(lines):
        raise EnvironmentFault(f"{out.name}: only {written} of {len(lines)} bytes could be written.")
