"""``python -m baichuan_sft.doctor.probe``: one JSON line on stdin asks; answers are marked lines of JSON.

The process ends when its input does: with the doctor, with ssh, or when nobody needs it any more.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from baichuan_sft import machine
from baichuan_sft.doctor.facts import FACTS, existing
from baichuan_sft.errors import first_line

MARK = "baichuan-doctor "  # a login shell may print lines of its own


def say(answer: dict[str, Any]) -> None:
    print(MARK + json.dumps(answer), flush=True)


def tell_facts(ask: dict[str, Any]) -> None:
    """Everything asked for; what cannot be found out says why. The clock comes last, just before its use."""
    found: dict[str, Any] = {}
    for name in ask["facts"]:
        try:
            found[name] = FACTS[name](ask)
        except Exception as error:  # one broken fact must not hide the others
            found[name] = {"error": f"{type(error).__name__}: {first_line(error)}"}
    say({"facts": found, "clock": time.time()})


def wait_for_others(ask: dict[str, Any]) -> None:
    """Listen, and leave a file in the output directory, until the input ends."""
    mark = leave_mark(ask) if ask.get("output") else None
    try:
        ports = [open_port(port, ask["nonce"]) for port in ask["ports"]]
        say({"ports": ports, "mark": str(mark) if mark else None})
        INPUT_ENDED.wait()
    finally:
        if mark:
            mark.unlink(missing_ok=True)


def open_port(port: int, nonce: str) -> dict[str, Any]:
    """Listen in the background, and say the nonce: ``port``, or ``fault`` with the process that holds it."""
    try:
        server = machine.listen(port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return {"fault": f"port {port} is held by {machine.holder(port)}"}
        return {"fault": f"port {port}: {error.strerror}"}
    threading.Thread(target=answer_all, args=(server, nonce), daemon=True).start()
    return {"port": server.getsockname()[1]}


def answer_all(server: socket.socket, nonce: str) -> None:
    while True:
        with contextlib.suppress(OSError):
            line, _ = server.accept()
            with line:
                line.sendall(nonce.encode())


def leave_mark(ask: dict[str, Any]) -> Path | None:
    try:
        handle, path = tempfile.mkstemp(prefix=".doctor-", dir=existing(Path(ask["output"]).absolute()))
    except OSError:  # said by the check of the directory itself
        return None
    os.close(handle)
    return Path(path)


def look_for_others(ask: dict[str, Any]) -> None:
    """Connect to the others, and look for the file of the first."""
    seen = Path(ask["mark"]).exists() if ask.get("mark") else None
    say({"reached": machine.reach_all(ask["targets"], ask["nonce"]), "seen": seen})


def join_others(ask: dict[str, Any]) -> None:
    from baichuan_sft.doctor.rendezvous import join

    try:
        say(join(ask, say))
    except Exception as error:
        say({"phase": "failed", "fault": f"{type(error).__name__}: {first_line(error)}"})


MODES = dict(facts=tell_facts, listen=wait_for_others, connect=look_for_others, rendezvous=join_others)
INPUT_ENDED = threading.Event()


def watch_input() -> None:
    """End with the input; what listens first removes its file."""
    sys.stdin.read()
    INPUT_ENDED.set()
    time.sleep(1)
    os._exit(1)


def main() -> None:
    ask = json.loads(sys.stdin.readline())
    signal.alarm(ask["limit"])  # whatever hangs, this process does not outlive it
    threading.Thread(target=watch_input, daemon=True).start()
    MODES[ask["mode"]](ask)
    sys.stdout.flush()
    os._exit(0)  # no library's threads are waited for


if __name__ == "__main__":
    main()
