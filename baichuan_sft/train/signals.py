"""SIGTERM, SIGINT and SIGHUP: the first one lets a run save and end, the second ends it at once.

Launchers give ranks a limited time between SIGTERM and SIGKILL: DeepSpeed's and torch's 30 seconds, SLURM's
KillWait 30. A save that takes longer is lost, and the checkpoint before it stays the newest valid one.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from baichuan_sft.streams import outlive_reader

EXIT_CODES = {signal.SIGTERM: 143, signal.SIGHUP: 143, signal.SIGINT: 130}
# Seconds: Ctrl-C reaches every process, and then launchers pass it on, as the same signal or another.
SAME_EVENT = {signal.SIGTERM: 3.0, signal.SIGHUP: 3.0, signal.SIGINT: 1.0}
GRACE = 5.0  # seconds from a signal to the end of a process that has nothing to save but does not react
NOTHING_TO_SAVE = "{}: ended before the first update, there is nothing to save"

_training = False
_first: signal.Signals | None = None
_told = False


class Interrupted(BaseException):
    """A signal ended this run in order.

    Attributes:
        exit_code: of the process. everywhere: every rank ends with it.
    """

    def __init__(self, message: str, exit_code: int, *, everywhere: bool = False) -> None:
        super().__init__(message)
        self.exit_code, self.everywhere = exit_code, everywhere


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Signals end the run as said above; in the main thread only, where Python handles them."""
    global _training, _first, _told
    _training, _first, _told = False, None, False
    outlive_reader("stdout")
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    # A blocked collective keeps Python's handlers from running; what arrives here does not wait for it.
    before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    handlers = {signum: signal.getsignal(signum) for signum in EXIT_CODES}
    for signum, handler in handlers.items():
        # nohup's word holds; that SIGINT is ignored says only that a shell has put this in the background
        if not (signum == signal.SIGHUP and handler is signal.SIG_IGN):
            signal.signal(signum, _handle)
    threading.Thread(target=_listen, args=(receiver,), daemon=True).start()
    try:
        yield
    finally:
        _end_workers()
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(before)
        sender.close()


def train_begins() -> None:
    """From now on there is something to save."""
    global _training
    _training = True


def wanted() -> int:
    """Exit code that a signal to this rank asked for, 0 where there was none."""
    return EXIT_CODES[_first] if _first is not None else 0


def name_of(exit_code: int) -> str:
    return "SIGINT" if exit_code == 130 else _first.name if _first is not None else "SIGTERM"


def ignore_in_worker(_: int) -> None:
    """For data loader workers, to whom launchers send signals too: rank and save need them to the end.

    A rank that fails while it takes a batch from one cuts it off; the rank says why, the worker need not.
    """
    for signum in EXIT_CODES:
        signal.signal(signum, signal.SIG_IGN)
    sys.excepthook = _silent_where_cut_off


def _silent_where_cut_off(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    if not isinstance(error, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


def _end_workers() -> None:
    """End loader workers that a failed run left.

    Python ends them with SIGTERM, which they ignore, and would wait for them for ever.
    """
    children = multiprocessing.active_children()
    if children:
        # torch's handler would raise for them, in place of the error that ends the run
        before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for child in children:
            child.kill()
            child.join()
        signal.signal(signal.SIGCHLD, before)


def end_process(exit_code: int) -> None:
    """End at once, without taking down the process group in order, and leave no process behind."""
    for child in multiprocessing.active_children():
        child.kill()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # the reader is gone
            stream.flush()
    os._exit(exit_code)


def tell(message: object) -> None:
    """Why this process ends; said once."""
    global _told
    if not _told:
        _told = True
        print(message, file=sys.stderr, flush=True)


def _handle(signum: int, frame: Any) -> None:
    global _first
    if _first is None:
        _first = signal.Signals(signum)
        if not _training:
            raise Interrupted(NOTHING_TO_SAVE.format(_first.name), EXIT_CODES[_first])


def _end_idle(signum: signal.Signals) -> None:
    """Where a call into C has kept Python's handler from running all the while, or what it left waits."""
    tell(NOTHING_TO_SAVE.format(signum.name))
    end_process(EXIT_CODES[signum])


def _listen(receiver: socket.socket) -> None:
    first, since = 0, 0.0
    while number := receiver.recv(1):
        signum = number[0]
        if signum not in EXIT_CODES:
            continue
        now = time.monotonic()
        if not first:
            first, since = signum, now
            if not _training:
                timer = threading.Timer(GRACE, _end_idle, (signal.Signals(signum),))
                timer.daemon = True
                timer.start()
        elif now - since > SAME_EVENT[signal.Signals(signum)]:
            name = signal.Signals(signum).name
            print(f"{name} again: ends at once, the last whole checkpoint stays", file=sys.stderr, flush=True)
            end_process(EXIT_CODES[signal.Signals(signum)])
