"""A rank's side of the watch: start the side process, tell it the step, end when it says so."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from baichuan_sft.errors import PeerFault, first_line
from baichuan_sft.train import signals, status

OWN_ERROR_SECONDS = 1.0  # a rank with an error of its own says that before it is ended for another's
GOODBYE_SECONDS = 2.0

_watch: subprocess.Popen | None = None
_own_error = False


def watched() -> bool:
    return _watch is not None


def start_watch(store: Any, seconds: float) -> None:
    """Start this rank's side process (watch.py) and end this rank when it says so; 0 seconds: no watch."""
    global _watch
    if not seconds:
        return
    rank = os.environ["RANK"]
    words = [sys.executable, "-I", "-S", str(Path(__file__).with_name("watch.py"))]
    words += [rank, os.environ.get("LOCAL_RANK", "0"), str(seconds), os.environ["WORLD_SIZE"]]
    if rank != "0":
        words += [os.environ["MASTER_ADDR"], store.get("watch").decode()]
    _watch = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    assert _watch.stdin and _watch.stdout
    os.set_blocking(_watch.stdin.fileno(), False)
    word, _, port = _watch.stdout.readline().decode().strip().partition(" ")
    if word != "port":
        raise PeerFault(port)
    if rank == "0":
        store.set("watch", port)
    threading.Thread(target=_obey, args=(_watch.stdout,), daemon=True).start()


def _obey(stdout: Any) -> None:
    word, _, verdict = stdout.readline().decode().strip().partition(" ")
    if not verdict:
        return
    time.sleep(OWN_ERROR_SECONDS)
    if _own_error:
        return
    if word == "say":
        print(f"error (rank {os.environ['RANK']}): {verdict}", file=sys.stderr, flush=True)
    status.fail(PeerFault(verdict), PeerFault.exit_code)
    signals.end_process(PeerFault.exit_code)


def tell_error(error: BaseException) -> None:
    """This rank ends by itself, with its own message."""
    global _own_error
    _own_error = True
    tell(f"error {type(error).__name__}: {first_line(error)}")


def tell(line: str) -> None:
    """One line to the side process."""
    if _watch is not None and _watch.stdin is not None:
        with contextlib.suppress(OSError):  # gone, or not reading: then it has other things to say
            _watch.stdin.write(line.encode() + b"\n")


def goodbye() -> None:
    """This rank's end is no failure."""
    global _watch
    tell("bye")
    if _watch is not None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            _watch.wait(timeout=GOODBYE_SECONDS)
        _watch = None
