"""The part of `launch` that runs on each host: starts its ranks, watches them, ends with them.

Reads requests from stdin, writes events to stdout (`wire`). It ends, and its ranks with it, when the
launcher asks, is gone, or is silent for too long. Standard library only: it is up in a tenth of a second.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from baichuan_sft import machine, ops_cache
from baichuan_sft.doctor.facts import BLOCK, code, fingerprint, package_versions, together
from baichuan_sft.launch.ranks import MARK, Rank, leaders, oom_kills, sweep
from baichuan_sft.launch.wire import Wire

TURN = 0.1  # seconds; how late an exit of a rank is noticed


class Agent:
    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.ranks: list[Rank] = []
        self.listener: socket.socket | None = None
        self.visitors: list[socket.socket] = []
        self.run_id = self.nonce = ""
        self.silence = 20.0
        self.ooms = oom_kills()
        self.compiling: list[str] = []
        self.ops: Path | None = None
        self.over = False

    def event(self, event: str, **values: Any) -> None:
        self.wire.send({"event": event, **values})

    def serve(self) -> None:
        """Until the launcher says so, is gone, or is silent."""
        while not self.over:
            waiting = [self.wire.source] + ([self.listener] if self.listener else [])
            ready, _, _ = select.select(waiting, [], [], TURN)
            if self.listener in ready:
                self._greet()
            if self.wire.source in ready:
                for message in self.wire.read():
                    getattr(self, "do_" + message.pop("do"))(**message)
            if self.wire.ended or self.wire.silent_for() > self.silence:
                break
            self._watch()
            self.wire.flush()
        self.end()

    # --- requests ---------------------------------------------------------------------------------

    def do_beat(self) -> None:
        pass

    def do_hello(self, run_id: str, silence: float, files: list[str]) -> None:
        """Which machine this is, how ssh reached it, and what must be equal on all hosts."""
        self.run_id, self.silence = run_id, silence
        connection = os.environ.get("SSH_CONNECTION", "").split()
        address = connection[2] if len(connection) == 4 else None
        same = package_versions() | {"baichuan_sft": code({})["digest"]}
        same |= {f"file {name}": digest(Path(name)) for name in files}
        self.event("hello", identity=machine.identity(), address=address, same=same)

    def do_listen(self, port: int, nonce: str) -> None:
        """Hold a port that the other hosts try to reach, until the ranks start."""
        try:
            self.listener = machine.listen(port)
        except OSError as error:
            why = f"{os.strerror(error.errno or 0)}, by {machine.holder(port)}"
            self.event("refused", message=f"port {port}: {why}")
            return
        self.nonce = nonce
        self.event("listening", port=self.listener.getsockname()[1], addresses=machine.interfaces())

    def do_reach(self, name: str, addresses: list[str], port: int, nonce: str) -> None:
        resolved = machine.resolve(name)
        asked = list(dict.fromkeys([*resolved, *addresses]))
        answers = zip(asked, machine.reach_all([(address, port) for address in asked], nonce))
        found = {address: machine.interface_of(one["own"]) for address, one in answers if "own" in one}
        self.event("reached", found=found, resolved=resolved)

    def do_release(self) -> None:
        """Let go of the port: another launcher starts the ranks."""
        self._let_go()
        self.event("released")

    def do_start(
        self, command: list[str], environment: dict[str, str], ranks: list[int], log_dir: str
    ) -> None:
        """Start one process per rank, from this thread: PDEATHSIG looks at the thread that forked."""
        self._let_go()
        share = max(1, (os.cpu_count() or 1) // len(ranks))
        environment = {"OMP_NUM_THREADS": str(share), **os.environ, **environment}
        environment |= ops_cache.variables(environment)
        self.ops = Path(environment["TORCH_EXTENSIONS_DIR"])
        removed = [str(lock) for lock in ops_cache.remove_stale_locks(self.ops)]
        # Its own environment's programs first (ninja): the PATH that came is the launcher's.
        own = str(Path(sys.executable).parent)
        environment["PATH"] = os.pathsep.join([own, environment.get("PATH", os.defpath)])
        try:
            self._start_ranks(command, environment, ranks, Path(log_dir))
        except OSError as error:  # of its disk, or of its limits
            self.event("refused", message=f"cannot start: {error}")
            return
        self.event("started", locks_removed=removed)

    def _start_ranks(
        self, command: list[str], environment: dict[str, str], ranks: list[int], log_dir: Path
    ) -> None:
        log_dir.mkdir(parents=True, exist_ok=True)
        for local, number in enumerate(ranks):
            rank = Rank(number, local, log_dir / f"rank-{number}.log")
            own = {"LOCAL_WORLD_SIZE": str(len(ranks)), MARK: self.run_id}
            rank.start([sys.executable, *command], environment | own)
            self.ranks.append(rank)

    def do_signal(self, number: int) -> None:
        """To the ranks alone: the workers of their data loaders are theirs to end."""
        for rank in self.ranks:
            if rank.process.poll() is None:
                rank.process.send_signal(number)
        for process in [] if self.ranks else leaders(self.run_id):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

    def do_end(self) -> None:
        self.over = True

    # --- what happens here ------------------------------------------------------------------------

    def _let_go(self) -> None:
        for connection in [*self.visitors, *([self.listener] if self.listener else [])]:
            connection.close()
        self.visitors, self.listener = [], None

    def _greet(self) -> None:
        """Say the nonce. The visitor closes first: a port in TIME_WAIT would be on its side."""
        assert self.listener is not None
        visitor, _ = self.listener.accept()
        visitor.sendall(self.nonce.encode())
        self.visitors.append(visitor)

    def _watch(self) -> None:
        for rank in self.ranks:
            code = rank.process.poll()  # before its last words are read, not after
            while rank.number == 0 and (text := rank.new_output()):
                self.event("out", text=text)
            if (status := rank.new_status()) is not None:
                self.event("status", rank=rank.number, status=status)
            if not rank.reported and code is not None:
                self._report(rank, code)
        if self.ops is not None and self.wire.said + 2 < time.monotonic():
            compiling = ops_cache.building(self.ops)
            for name in set(compiling) - set(self.compiling):
                self.event("compiling", name=name)
            self.compiling = compiling
        stopped = [rank.number for rank in self.ranks if rank.is_stopped()]
        self.wire.beat({"event": "beat", "stopped": stopped})

    def _report(self, rank: Rank, code: int) -> None:
        rank.reported = True
        memory = code == -signal.SIGKILL and oom_kills() > self.ooms
        self.event("exit", rank=rank.number, code=code, tail=rank.tail(), out_of_memory=memory)

    def end(self) -> None:
        """Kill what is left, wait until it is gone, say so."""
        ended = [rank.number for rank in self.ranks if rank.process.poll() is None]
        for rank in self.ranks:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(rank.process.pid, signal.SIGKILL)
        for rank in self.ranks:
            with contextlib.suppress(subprocess.TimeoutExpired):
                rank.process.wait(5)
            rank.remove_status()
        left = sweep(self.run_id)
        self.event("ended", killed=ended, left=left)


def digest(path: Path) -> str:
    """Of a file's two ends, or of what a directory holds; training itself hashes all data."""
    try:
        if path.is_dir():
            inner = {child.name: digest(child) for child in path.iterdir() if child.is_file()}
            return f"{len(inner)} files, sha256 {together(inner)}"
        return fingerprint(path, blocks=2, whole=2 * BLOCK)
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return error.strerror or type(error).__name__


def main() -> None:
    # What ends a session reaches the launcher too; it decides, and says so over the wire. A handler, since
    # SIG_IGN would be inherited by the ranks.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    wire = Wire(0, 1)
    Agent(wire).serve()
    wire.drain(2.0)


if __name__ == "__main__":
    main()
