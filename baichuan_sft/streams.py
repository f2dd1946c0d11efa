"""Standard output and error that outlive whoever reads them."""

from __future__ import annotations

import contextlib
import io
import sys


class _Lasting(io.TextIOWrapper):
    """Drops what cannot be written: the pipe's reader has ended, the terminal is gone, the disk is full."""

    def write(self, text: str, /) -> int:
        with contextlib.suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()


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
    buffered = dict(line_buffering=stream.line_buffering, write_through=stream.write_through)
    setattr(sys, name, _Lasting(stream.buffer, stream.encoding, stream.errors, **buffered))
