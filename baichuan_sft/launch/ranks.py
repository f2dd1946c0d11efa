"""One rank's process, log and status; what of a run is alive on this host. Standard library only."""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from baichuan_sft import machine

TAIL_BYTES = 8192
TAIL_LINES = 40
MARK = "BAICHUAN_SFT_RUN"  # in the environment of every process of a run, children of children too
SWEEP_SECONDS = 3.0


@dataclass
class Rank:
    """A process that writes to its own log, so that nothing it says can block or be lost."""

    number: int
    local: int
    log: Path
    reported: bool = False
    process: subprocess.Popen[bytes] = field(init=False)
    status_dir: Path = field(init=False)
    _reader: BinaryIO = field(init=False)  # kept open: the log may be moved or deleted
    _begin: int = 0  # bytes of the log that an earlier run wrote
    _shown: int = 0
    _seen: Any = None
    _decoder: Any = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))

    def start(self, command: list[str], environment: Mapping[str, str]) -> None:
        self.status_dir = Path(tempfile.mkdtemp(prefix="baichuan_sft_status_"))
        own = {"RANK": self.number, "LOCAL_RANK": self.local, "BAICHUAN_SFT_STATUS": self.status_dir}
        with self.log.open("ab") as log:
            stamp = time.strftime("%Y-%m-%d %H:%M:%S")
            log.write(f"--- rank {self.number}, started {stamp} ---\n".encode())
            log.flush()
            self._begin = self._shown = log.tell()
            self._reader = self.log.open("rb", buffering=0)
            self.process = subprocess.Popen(
                command,
                env={**environment, **{name: str(value) for name, value in own.items()}},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=machine.die_with_parent,
            )

    def new_output(self) -> str:
        data = b""
        with contextlib.suppress(OSError):  # of a network's disk: later, perhaps
            data = os.pread(self._reader.fileno(), 65536, self._shown)
        self._shown += len(data)
        return self._decoder.decode(data)

    def new_status(self) -> dict[str, Any] | None:
        """The rank's status file where it says something new."""
        path = self.status_dir / f"rank-{self.number}.json"
        with contextlib.suppress(OSError, ValueError):
            stamp = path.stat().st_mtime_ns, path.stat().st_ino
            if stamp != self._seen:
                status = json.loads(path.read_text())
                self._seen = stamp
                return status
        return None

    def tail(self) -> str:
        """The last lines of this run in the log."""
        with contextlib.suppress(OSError):
            self._reader.seek(max(self._begin, os.fstat(self._reader.fileno()).st_size - TAIL_BYTES))
            return "\n".join(self._reader.read().decode(errors="replace").splitlines()[-TAIL_LINES:])
        return ""

    def is_stopped(self) -> bool:
        """Whether the process is stopped (SIGSTOP, a debugger): alive, but it does nothing."""
        with contextlib.suppress(OSError, IndexError):
            return machine.stat(self.process.pid)[0] in "Tt"
        return False

    def remove_status(self) -> None:
        shutil.rmtree(self.status_dir, ignore_errors=True)


def marked(run_id: str) -> list[int]:
    """Processes of a run on this host, found by the mark in their environment."""
    mark = f"{MARK}={run_id}".encode()
    return [process for process in machine.processes() if mark in machine.environment(process)]


def leaders(run_id: str) -> list[int]:
    """The rank processes of a run that another launcher started, without their own children."""
    found = {}
    for process in marked(run_id):
        with contextlib.suppress(OSError, IndexError):
            if any(each.startswith(b"LOCAL_RANK=") for each in machine.environment(process)):
                found[process] = int(machine.stat(process)[1])
    return [process for process, parent in found.items() if parent not in found]


def sweep(run_id: str) -> list[int]:
    """Kill what is left of a run; returns what would not die."""
    limit = time.monotonic() + SWEEP_SECONDS
    while run_id and (found := marked(run_id)):
        for process in found:
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGKILL)
        if time.monotonic() > limit:
            return found
        time.sleep(0.05)
    return []


def oom_kills() -> int:
    """How often the kernel has killed for want of memory in this control group, or on this host."""
    for path in (Path("/sys/fs/cgroup/memory.events"), Path("/proc/vmstat")):
        with contextlib.suppress(OSError, KeyError):
            return int(dict(line.split() for line in path.read_text().splitlines())["oom_kill"])
    return 0
