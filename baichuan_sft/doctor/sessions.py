"""Probes on all hosts at once: each a process here, directly or through ssh, that ends when it is closed."""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from baichuan_sft.doctor.probe import MARK
from baichuan_sft.hosts import Host, module_words

Ask = dict[str, Any]
CONNECT_SECONDS = 10
CLOSE_SECONDS = 3.0
# The shell's own line says that ssh works, whatever becomes of Python; the module is found from there.
SHELL = ["sh", "-c", 'echo "$0"; cd -- "$1" && shift && exec "$@"', MARK + '{"shell": true}']


def probe_words(host: Host) -> list[str]:
    """Argv that starts the probe on a host, in its working directory."""
    first, *rest = module_words(host, "baichuan_sft.doctor.probe", SHELL)
    # ssh keeps the first value it is given
    return [first, *(["-o", f"ConnectTimeout={CONNECT_SECONDS}"] if first == "ssh" else []), *rest]


class Session:
    """One probe.

    Attributes:
        said: what the host printed besides answers: of ssh, of a login shell, of Python.
    """

    def __init__(self, host: Host, ask: Ask) -> None:
        self.said: deque[str] = deque(maxlen=20)
        self.ended = False  # no answer will come any more
        self.answers: queue.Queue[Ask | None] = queue.Queue()  # None: no more will come
        words, pipe = probe_words(host), subprocess.PIPE
        self.process = subprocess.Popen(
            words, stdin=pipe, stdout=pipe, stderr=pipe, text=True, errors="replace"
        )
        assert self.process.stdin and self.process.stdout and self.process.stderr
        self.input, self.output, self.errors = self.process.stdin, self.process.stdout, self.process.stderr
        self.readers = [threading.Thread(target=read, daemon=True) for read in (self._errors, self._answers)]
        for reader in self.readers:  # in this order: the second waits for the first
            reader.start()
        with contextlib.suppress(OSError):  # ssh may have failed already, and says why
            self.input.write(json.dumps(ask) + "\n")
            self.input.flush()

    def _answers(self) -> None:
        for line in self.output:
            if line.startswith(MARK):
                self.answers.put({**json.loads(line.removeprefix(MARK)), "arrived": time.time()})
            else:
                self.said.append(line.strip())
        self.readers[0].join()  # so that what stderr said is there
        self.answers.put(None)

    def _errors(self) -> None:
        for line in self.errors:
            self.said.append(line.strip())

    def next(self, end: float) -> Ask | None:
        """The next answer; None where the probe ended without one, or at ``end`` (monotonic)."""
        try:
            answer = self.answers.get(timeout=max(0.0, end - time.monotonic()))
        except queue.Empty:
            return None
        self.ended = answer is None
        return answer

    def close(self) -> None:
        """End the probe; the host ends it by itself should the connection be gone."""
        with contextlib.suppress(OSError):
            self.input.close()
        try:
            self.process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for reader in self.readers:
            reader.join(CLOSE_SECONDS)


@contextlib.contextmanager
def sessions(hosts: list[Host], ask_of: Callable[[Host], Ask]) -> Iterator[dict[str, Session]]:
    """A probe on each host, by its name; all are closed at the end, at the same time."""
    opened: dict[str, Session] = {}
    try:
        for host in hosts:
            opened[host.name] = Session(host, ask_of(host))
        yield opened
    finally:
        with ThreadPoolExecutor(max(1, len(opened))) as pool:
            list(pool.map(Session.close, opened.values()))
