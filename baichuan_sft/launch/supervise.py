"""One attempt at a run: agents, addresses, ranks, and the end of all of them."""

from __future__ import annotations

import signal
import time
from contextlib import closing
from dataclasses import dataclass

from baichuan_sft.hosts import Host
from baichuan_sft.launch import screen
from baichuan_sft.launch.fleet import Fleet, Link
from baichuan_sft.launch.meeting import Meeting, meet
from baichuan_sft.launch.outcome import LOST, SAVED, Failure, RankState, exit_text, failure_of, span
from baichuan_sft.launch.wire import Message

START_SECONDS = 120.0  # imports from a slow shared disk
ECHO_SECONDS = 5.0  # how long the rank that another one misses has to say why
END_SECONDS = 8.0  # until all is gone; 10 s are promised
SLACK = 10.0  # the ranks' own time limits come first, since they know more


@dataclass(frozen=True)
class Job:
    """What to run where; ``hosts`` in the order of their ranks, the first leads."""

    hosts: list[Host]
    command: list[str]  # after the Python of each host
    environment: dict[str, str]
    files: list[str]  # what must be equal on all hosts
    log_dir: str
    address: str | None = None  # of the first host; None: found
    port: int = 0  # 0: a free one
    rendezvous_seconds: float = 120.0
    silence: float = 20.0  # seconds without a sign of life after which a host counts as lost

    @property
    def world(self) -> int:
        return sum(host.slots for host in self.hosts)

    @property
    def size(self) -> str:
        return f"{screen.count(len(self.hosts), 'host')}, {screen.count(self.world, 'process')}"


@dataclass
class Stop:
    """The signals that ask the launcher to end: the first lets the ranks save, the next does not."""

    armed: bool = False  # ranks are running
    first: int | None = None
    at: float = 0.0
    again: bool = False

    def install(self) -> None:
        # nohup's word holds; that SIGINT is ignored says only that a shell has put this in the background
        hangup = [signal.SIGHUP] * (signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN)
        for number in (signal.SIGINT, signal.SIGTERM, *hangup):
            signal.signal(number, lambda number, _: self._came(number))

    def _came(self, number: int) -> None:
        if not self.armed:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(self.code(number))
        if self.first is None:
            self.first, self.at = number, time.monotonic()
        elif number == signal.SIGINT or time.monotonic() - self.at > 3:  # one event may send two signals
            self.again = True

    @staticmethod
    def code(number: int) -> int:
        return 130 if number == signal.SIGINT else 143


def attempt(job: Job, stop: Stop) -> tuple[int, Failure | None]:
    """Run the job once on its hosts.

    Returns:
        the exit code, 0 only where every rank ended with 0; the failure that says why it ended, if one did.
    Raises:
        EnvironmentFault: hosts that cannot be reached, differ, or find no common address.
    """
    with closing(Fleet(job.hosts, job.silence)) as fleet:
        meeting = meet(fleet, job.files, job.address, job.port)
        show_plan(job, fleet, meeting)
        for link in fleet.links:
            link.ask(
                "start",
                command=job.command,
                environment=job.environment | meeting.variables(link.name, job.environment),
                ranks=link.ranks,
                log_dir=job.log_dir,
            )
        stop.armed = True
        try:
            return Watch(fleet, job, stop).run()
        finally:
            stop.armed = False


def show_plan(job: Job, fleet: Fleet, meeting: Meeting) -> None:
    sizes = {host.slots for host in job.hosts}
    each = f"{screen.count(len(job.hosts), 'host')} x {sizes.pop()}" if len(sizes) == 1 else "ranks"
    screen.note(f"{each} = {job.world} processes, {meeting.address} port {meeting.port}")
    rows = [
        (link.name, f"rank {span(link.ranks)}", meeting.interfaces.get(link.name) or "-", job.log_dir + "/")
        for link in fleet.links
    ]
    screen.say(screen.table([("host", "", "network", "logs"), *rows]), screen.DIM)


class Watch:
    """From the start of the ranks to the end of the last process."""

    def __init__(self, fleet: Fleet, job: Job, stop: Stop) -> None:
        self.fleet, self.job, self.stop = fleet, job, stop
        self.states = {
            number: RankState(number, link.name, f"{job.log_dir}/rank-{number}.log")
            for link in fleet.links
            for number in link.ranks
        }
        self.failures: list[Failure] = []
        self.failed_at = 0.0
        self.asked = False
        self.next_word = 15.0  # seconds; when to name those for whom the others wait

    def run(self) -> tuple[int, Failure | None]:
        while self.running() and not self.stop.again and not self.must_end():
            for link, message in self.fleet.turn():
                self.take(link, message)
            self.look_for_lost_hosts()
            self.pass_on_signal()
            self.check_limits()
        return self.end()

    def running(self) -> list[RankState]:
        return [state for state in self.states.values() if state.code is None]

    def must_end(self) -> bool:
        """After a failure at once; after an echo of another's failure, when that had its time to arrive."""
        if not self.failures:
            return False
        return not self.first().is_echo or time.monotonic() - self.failed_at > ECHO_SECONDS

    def first(self) -> Failure:
        return next((failure for failure in self.failures if not failure.is_echo), self.failures[0])

    def fail(self, failure: Failure) -> None:
        self.failed_at = self.failed_at or time.monotonic()
        self.failures.append(failure)

    # --- events -----------------------------------------------------------------------------------

    def take(self, link: Link, message: Message) -> None:
        match message["event"]:
            case "out":
                screen.show_output(message["text"])
            case "status":
                self.states[message["rank"]].note(message["status"])
            case "exit":
                self.take_exit(self.states[message["rank"]], message)
            case "compiling":
                screen.note(f"{link.name}: compiling {message['name']}, about 2 min (once)")
            case "beat":
                for number in link.ranks:
                    since = self.states[number].stopped_since or time.monotonic()
                    self.states[number].stopped_since = since if number in message["stopped"] else None
            case "refused":
                log = f"{self.job.log_dir}/rank-{link.ranks[0]}.log"
                self.fail(Failure(link.name, None, "", None, 3, message["message"], "", log))
            case "started":
                for lock in message["locks_removed"]:
                    screen.note(f"{link.name}: {lock}: left by a build that was killed, removed")

    def take_exit(self, state: RankState, message: Message) -> None:
        state.code = message["code"]
        wanted = {0, *SAVED, -signal.SIGTERM} if self.asked else {0, *SAVED}
        if state.code not in wanted:
            self.fail(failure_of(state, message["tail"], message["out_of_memory"]))

    def look_for_lost_hosts(self) -> None:
        for link in self.fleet.links:
            alive = [self.states[number] for number in link.ranks if self.states[number].code is None]
            if link.lost and alive:
                step = max((state.step for state in alive if state.step is not None), default=None)
                for state in alive:
                    state.code = LOST
                last = alive[0]
                what = f"host lost with rank {span(state.number for state in alive)}: {link.lost}"
                self.fail(Failure(link.name, None, last.known_phase, step, LOST, what, "", last.log))

    def pass_on_signal(self) -> None:
        if self.stop.first is None or self.asked:
            return
        self.asked = True
        self.fleet.ask("signal", number=int(signal.SIGTERM))
        name = signal.Signals(self.stop.first).name
        what = "the ranks finish their step, save and end; Ctrl-C (again) ends them at once, unsaved"
        screen.note(f"{name}: {what}")

    # --- time limits ------------------------------------------------------------------------------

    def check_limits(self) -> None:
        now, waiting = time.monotonic(), self.running()
        if self.failures or not waiting:
            return
        if any(state.heard_status for state in self.states.values()):
            self.check_phases(now, waiting)
        # All stopped together is a machine that was suspended, or a user who looks at something.
        stopped = [state for state in waiting if state.stopped_since]
        late = [s for s in stopped if s.stopped_since and now - s.stopped_since > self.job.silence + SLACK]
        if late and len(stopped) < len(waiting):
            seconds = now - (late[0].stopped_since or now)
            self.fail_late(late, f"stopped (SIGSTOP or a debugger) for {seconds:.0f} s")

    def check_phases(self, now: float, waiting: list[RankState]) -> None:
        starting = [state for state in waiting if state.phase == "start"]
        late = [state for state in starting if now - state.since > START_SECONDS]
        if late:
            self.fail_late(late, f"still not past its imports after {START_SECONDS:.0f} s")
            return
        meeting = [state for state in waiting if state.phase == "rendezvous"]
        behind = [state for state in waiting if state.reached < 2]
        if not meeting:
            return
        if behind:  # data may take its time, but nobody should wait without knowing for whom
            waited = now - min(state.since for state in meeting)
            if waited > self.next_word:
                self.next_word = waited * 2
                names = ", ".join(f"{state} in phase {state.phase}" for state in behind[:8])
                who = span(state.number for state in meeting)
                screen.note(f"rank {who} waits for {names}, {waited:.0f} s so far")
            return
        waited = now - max(state.since for state in meeting)
        if waited > self.job.rendezvous_seconds + SLACK:
            what = f"no rendezvous after {waited:.0f} s; is the port open between the hosts?"
            self.fail_late(meeting, what)

    def fail_late(self, late: list[RankState], what: str) -> None:
        names = ", ".join(map(str, late[1:8]))
        self.fail(late[0].failure(LOST, what + (f"; also {names}" if names else "")))

    # --- the end ----------------------------------------------------------------------------------

    def end(self) -> tuple[int, Failure | None]:
        if self.stop.again:
            screen.note("ending all ranks at once")
        for link, message in self.fleet.end(END_SECONDS):  # what was said before the end
            if message["event"] == "out":
                self.take(link, message)
            elif message["event"] == "exit":
                self.states[message["rank"]].code = message["code"]
        self.summary()
        if self.failures and not self.stop.again:
            failure = self.first()
            screen.banner(failure)
            return failure.code, failure
        if self.stop.first is not None:
            return Stop.code(self.stop.first), None
        return max(state.code or 0 for state in self.states.values()), None

    def summary(self) -> None:
        rows = []
        for link in self.fleet.links:
            killed = link.ended["killed"] if link.ended else []
            texts = [exit_text(self.states[number], killed) for number in link.ranks]
            words = [
                f"rank {span(n for n, said in zip(link.ranks, texts) if said == text)} {text}"
                for text in dict.fromkeys(texts)
            ]
            left = link.ended["left"] if link.ended else None
            rows.append((link.name, ", ".join(words), left_text(left)))
        screen.note("all processes have ended" if all(row[2] == "nothing left" for row in rows) else "ended")
        screen.say(screen.table(rows), screen.DIM)


def left_text(left: list[int] | None) -> str:
    if left is None:
        return "not reachable: its agent ends what is left by itself"
    return f"processes {span(left)} would not die" if left else "nothing left"
