"""The agents of a run: started directly on this machine, through ssh elsewhere, and asked together."""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from baichuan_sft.errors import EnvironmentFault
from baichuan_sft.hosts import Host, is_local, login_words, module_words
from baichuan_sft.launch.wire import Message, Wire

AGENT = "baichuan_sft.launch.agent"


@dataclass
class Link:
    """The connection to one host's agent."""

    host: Host
    process: subprocess.Popen[bytes]
    wire: Wire
    ranks: list[int]
    said: deque[str] = field(default_factory=lambda: deque(maxlen=20))  # of ssh, or of a shell on the way
    facts: Message = field(default_factory=dict)
    lost: str = ""  # why there is nobody left to ask
    ended: Message | None = None  # its last word
    listener: threading.Thread = field(init=False)  # fills ``said``

    def __post_init__(self) -> None:
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()

    def _listen(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self.said.append(line.decode(errors="replace").strip())

    @property
    def name(self) -> str:
        return self.host.name

    def ask(self, do: str, **values: Any) -> None:
        self.wire.send({"do": do, **values})


class Fleet:
    """All links, gone when closed; `turn` moves bytes, `gather` waits until every host has answered."""

    def __init__(self, hosts: list[Host], silence: float) -> None:
        self.silence = silence
        self.run_id = secrets.token_hex(8)  # marks every process of the attempt
        self.links: list[Link] = []
        first = 0
        for host in hosts:
            self.links.append(open_link(host, list(range(first, first + host.slots))))
            first += host.slots
        self.world = first

    def turn(self, seconds: float = 0.2) -> list[tuple[Link, Message]]:
        """What the agents said; a link whose agent is gone or silent has ``lost`` set from then on."""
        waiting = {link.wire.source: link for link in self.links if not link.wire.ended}
        poller = select.poll()  # select() stops at file 1,024
        for source in waiting:
            poller.register(source, select.POLLIN)
        ready = [source for source, _ in poller.poll(seconds * 1000)]
        found = [(waiting[source], message) for source in ready for message in waiting[source].wire.read()]
        for link in self.links:
            if not link.lost and link.ended is None:
                link.wire.beat({"do": "beat"})
                link.wire.flush()
                self._look(link, [message for other, message in found if other is link])
        return found

    def _look(self, link: Link, messages: list[Message]) -> None:
        link.ended = next((message for message in messages if message["event"] == "ended"), None)
        if link.ended is None and link.wire.ended:
            link.lost = farewell(link)
        elif link.facts and link.wire.silent_for() > self.silence:
            link.lost = f"no sign of life for {self.silence:.0f} s"

    def answers(self, event: str, seconds: float, links: list[Link]) -> dict[str, Message]:
        """The first ``event`` of each of ``links`` by name, of those that answer in time."""
        found: dict[str, Message] = {}
        limit = time.monotonic() + seconds
        while any(link.name not in found and not link.lost for link in links) and time.monotonic() < limit:
            for link, message in self.turn():
                if message["event"] in (event, "refused"):
                    found[link.name] = message
        return found

    def gather(self, event: str, seconds: float, links: list[Link] | None = None) -> dict[str, Message]:
        """One ``event`` of every host, or of ``links``, by its name.

        Raises:
            EnvironmentFault: every host that does not answer in time, with what ssh said, or that refuses.
        """
        links = self.links if links is None else links
        found = self.answers(event, seconds, links)
        absent = [link for link in links if link.name not in found]
        faults = [f"{link.name}: {link.lost or f'no answer in {seconds:.0f} s'}" for link in absent]
        faults += [f"{name}: {answer['message']}" for name, answer in found.items() if "message" in answer]
        if faults:
            raise EnvironmentFault("\n".join(faults))
        return found

    def ask(self, do: str, **values: Any) -> None:
        for link in self.links:
            link.ask(do, **values)

    def hello(self, files: list[str]) -> None:
        self.ask("hello", run_id=self.run_id, silence=self.silence, files=files)

    def end(self, seconds: float) -> list[tuple[Link, Message]]:
        """Ask every agent to end its ranks and itself; one that does not answer ends by its own clock.

        Returns:
            what they said until then.
        """
        self.ask("end")
        found = []
        limit = time.monotonic() + seconds
        while time.monotonic() < limit and any(not link.lost and link.ended is None for link in self.links):
            found += self.turn()
        return found

    def close(self) -> None:
        for link in self.links:
            with contextlib.suppress(OSError):
                os.close(link.wire.target)
            with contextlib.suppress(subprocess.TimeoutExpired):
                link.process.wait(1 if link.ended else 0)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(link.process.pid, signal.SIGKILL)
            link.process.wait()
            os.close(link.wire.source)


def open_link(host: Host, ranks: list[int]) -> Link:
    """Start a host's agent. It has a session of its own: a Ctrl-C on the terminal is the launcher's alone."""
    words, pipe = module_words(host, AGENT), subprocess.PIPE
    try:
        process = subprocess.Popen(
            words, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0, start_new_session=True
        )
    except FileNotFoundError as error:
        raise EnvironmentFault(f"{host.name}: {error.filename}: no such file") from None
    assert process.stdin and process.stdout and process.stderr
    link = Link(host, process, Wire(os.dup(process.stdout.fileno()), os.dup(process.stdin.fileno())), ranks)
    process.stdin.close()
    process.stdout.close()
    return link


def farewell(link: Link) -> str:
    """Why a connection ended, and what to do about it."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        link.process.wait(2)
    link.listener.join(1)  # so that all that ssh said is there
    code, said = link.process.returncode, [line for line in [*link.said, *link.wire.last_unread] if line]
    last = said[-1] if said else ""
    if link.facts:
        return f"the connection to its agent ended ({last or f'exit code {code}'})"
    host, python = link.host, link.host.python or sys.executable
    if "No module named" in last:
        return f"{python} there has no baichuan_sft; name python= or workdir= in the hostfile"
    if code in (126, 127):
        return f"cannot run {python} there; name its Python with python= in the hostfile"
    if "cd:" in last:
        return f"no directory {host.workdir or os.getcwd()} there; name one with workdir= in the hostfile"
    if code == 255 and not is_local(host):
        return f"{last or 'ssh failed'}; try: {shlex.join(['ssh', *login_words(host), host.name, 'true'])}"
    return f"its agent did not start (exit code {code}): {last}"
