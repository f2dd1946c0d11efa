"""Standard output and error that outlive whoever reads them."""

from __future__ import annotations

import contextlib
import io
import sys
from typing import Any


class _Lasting(io.FileIO):
    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:  # the reader of the pipe has ended, the terminal is gone, the log's disk is full
            return len(data)


def outlive_reader(name: str) -> None:
    """From now on, what nobody can read on ``stdout`` or ``stderr`` is dropped instead of an error.

    Ctrl-C in ``train | tee log`` ends ``tee`` too, a lost ssh takes the terminal away: neither may keep a run
    from its save, nor change what it ends with.
    """
    stream = getattr(sys, name)
    if stream is None or stream is not getattr(sys, f"__{name}__"):  # closed, or a caller's
        return
    with contextlib.suppress(OSError):
        stream.flush()
    raw = _Lasting(stream.fileno(), "w", closefd=False)
    text = io.TextIOWrapper(
        io.BufferedWriter(raw),
        stream.encoding,
        stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
    setattr(sys, name, text)
