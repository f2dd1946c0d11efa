"""Data loader workers that the kernel ended, as the error tells that it brings about."""

from __future__ import annotations

import re
import signal
import threading
import traceback
from collections.abc import Callable
from typing import Any

from baichuan_sft.errors import EnvironmentFault

# What torch says once it has seen that one is gone.
NAMED = re.compile(r"DataLoader worker \(pid(\(s\))? [\d, ]+\)")
BROUGHT_ABOUT = (RuntimeError, OSError, EOFError)


def naming_lost_workers(train: Callable[..., Any], **arguments: Any) -> None:
    """Call ``train``, and tell the end of a worker as such.

    No context manager: its ``__exit__`` would be one more place for the signal to be raised at.

    Raises:
        EnvironmentFault: a worker was ended from outside.
    """
    before = None
    try:
        try:
            train(**arguments)
        except BROUGHT_ABOUT:
            # The worker's socket may break before the signal of its end is here. torch raises at that signal
            # wherever this process is by then, in place of what is being told: here at the latest.
            if threading.current_thread() is threading.main_thread():
                before = signal.signal(signal.SIGCHLD, lambda *_: None)
            raise
    except BROUGHT_ABOUT as error:
        if not (lost := lost_worker(error)):
            if before is not None:
                signal.signal(signal.SIGCHLD, before)
            raise
        raise EnvironmentFault(
            f"{lost} was killed: is the memory full? --dataloader_num_workers 0 needs less."
        ) from None


def lost_worker(error: Exception) -> str | None:
    """The worker whose end brought ``error`` about; None where it was something else.

    A batch is fetched over a socket of its worker's. For a moment that socket is broken while the worker
    still counts as alive, and torch passes on what the socket says.
    """
    if named := NAMED.search(str(error)):
        return named[0]
    fetching = any(frame.name == "_try_get_data" for frame in traceback.extract_tb(error.__traceback__))
    broken = isinstance(error, (ConnectionError, FileNotFoundError, EOFError))  # not a lack of descriptors
    return "a DataLoader worker" if fetching and broken else None
