"""How far each rank came, which failure was the first, and what the run ends with."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from baichuan_sft.errors import PeerFault
from baichuan_sft.launch.wire import Message
from baichuan_sft.train.status import PHASES

SAVED = {130, 143}  # a rank that was asked to end, has saved and ended
TOLD = {2, 3, 4, 5, 6}  # exit codes of errors that are one sentence with the way out
LOST = PeerFault.exit_code
# What gloo, NCCL and the store say where another rank is gone.
LOST_PEER = re.compile(
    r"closed by peer|reset by peer|Broken pipe|remote process exited|likely closed|Connection refused"
    r"|another rank ended",
    re.IGNORECASE,
)


@dataclass
class RankState:
    """What is known of one rank."""

    number: int
    host: str
    log: str
    phase: str = "start"
    step: int | None = None
    heard_status: bool = False
    since: float = field(default_factory=time.monotonic)  # when it entered the phase
    code: int | None = None  # exit code, negative: the signal that ended it
    error: dict[str, Any] | None = None
    stopped_since: float | None = None

    def note(self, status: Message) -> None:
        self.heard_status = True
        if status.get("phase", self.phase) != self.phase:
            self.phase, self.since = status["phase"], time.monotonic()
        if status.get("step") or self.reached >= PHASES.index("train"):  # before, 0 is no step
            self.step = status.get("step", self.step)
        self.error = status.get("error") or self.error

    @property
    def reached(self) -> int:
        return PHASES.index(self.phase) if self.phase in PHASES else 0

    @property
    def known_phase(self) -> str:
        return self.phase if self.heard_status else ""

    def failure(self, code: int, message: str, detail: str = "") -> Failure:
        where = self.host, self.number, self.known_phase, self.step
        return Failure(*where, code, message, detail, self.log)

    def __str__(self) -> str:
        return f"rank {self.number} ({self.host})"


@dataclass(frozen=True)
class Failure:
    """Why a run ended: where, when, and the first real error."""

    host: str
    rank: int | None
    phase: str  # empty: a program that does not tell
    step: int | None
    code: int
    message: str
    detail: str = ""  # a traceback, or the last lines of the log
    log: str = ""

    @property
    def is_echo(self) -> bool:
        """Whether it only says that another rank is gone, whose own error says more."""
        return self.rank is not None and (self.code == LOST or bool(LOST_PEER.search(self.message)))

    @property
    def fingerprint(self) -> tuple[int | None, str]:
        """Equal for two failures of one cause: the same step and the same words."""
        return self.step, self.message


def failure_of(state: RankState, tail: str, out_of_memory: bool) -> Failure:
    """What a rank that ended with ``state.code`` left to read."""
    assert state.code is not None
    error = state.error or {}
    code = error.get("exit_code") or (state.code if state.code > 0 else LOST)
    traceback = max(0, tail.rfind("Traceback (most recent call last)"))  # the last one; without any, all
    detail = (error.get("traceback") or tail[traceback:]).rstrip()
    if error:
        message = error["message"] if code in TOLD else f"{error['kind']}: {error['message']}"
    elif state.code < 0:
        message = f"killed by {signal_name(-state.code)}"
        if out_of_memory:
            message += ": the host has no memory left (the kernel's OOM killer)"
    else:
        message = re.sub(r"^error( \(rank \d+\))?: ", "", last_error(tail)) or "ended without a word"
    if code in TOLD and state.code > 0:  # a sentence of ours; the way there says nothing more
        detail = ""
    return state.failure(code, message.strip(), detail)


def last_error(text: str) -> str:
    """The line that says what went wrong: ``error: ...``, else an exception's own line, else the last one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("error")]
    raised = [line for line in lines if re.match(r"[A-Za-z_][\w.]*(Error|Exception|Fault|Interrupt)\b", line)]
    return (said or raised or lines or [""])[-1]


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def span(ranks: Iterable[int]) -> str:
    """``0-7`` for consecutive ranks, ``0,2,3`` for others."""
    numbers = sorted(ranks)
    if len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]}-{numbers[-1]}"
    return ",".join(map(str, numbers))


def exit_text(state: RankState, killed: Iterable[int]) -> str:
    """How a rank ended, in a word or two."""
    if state.number in killed:
        return "ended by the launcher"
    if state.code is None:
        return "lost"
    if state.code < 0:
        unsaved = ", unsaved" if state.code == -signal.SIGTERM else ""
        return f"ended by {signal_name(-state.code)}{unsaved}"
    words = {0: "ok", 130: "saved and ended", 143: "saved and ended"}
    return words.get(state.code, f"exit code {state.code}")
