"""After a failure that may pass: go on from the last checkpoint, on the hosts that are left."""

from __future__ import annotations

import dataclasses
import secrets
from contextlib import closing

from baichuan_sft.hosts import Host
from baichuan_sft.launch import screen
from baichuan_sft.launch.fleet import Fleet
from baichuan_sft.launch.outcome import Failure
from baichuan_sft.launch.supervise import Job, Stop, attempt

DETERMINISTIC = {2, 3, 4, 6}  # flags, the machine, a checkpoint, numbers: they fail again
PROBE_SECONDS = 15.0  # all answer at once but for those that are lost; ssh's own limit


def run_with_restarts(job: Job, max_restarts: int, stop: Stop) -> int:
    """The exit code of the last attempt."""
    seen: list[Failure] = []
    launch = secrets.token_hex(8)  # the same over restarts, unlike what marks the processes of an attempt
    job = dataclasses.replace(job, environment=job.environment | {"BAICHUAN_SFT_LAUNCH": f"{launch}:0"})
    while True:
        code, failure = attempt(job, stop)
        if failure is None or stop.first is not None:  # whoever wants an end wants no restart
            return code
        reason = why_not(failure, seen, max_restarts)
        if reason:
            if max_restarts:
                screen.note(f"not started again: {reason}")
            return code
        seen.append(failure)
        left = hosts_left(job)
        if not left:
            screen.note("not started again: no host answers")
            return code
        gone = [host.name for host in job.hosts if host not in left]
        own = {"BAICHUAN_SFT_LAUNCH": f"{launch}:{len(seen)}"}  # train then goes on from what it has saved
        job = dataclasses.replace(job, hosts=left, environment=job.environment | own)
        without = f", without {', '.join(gone)}" if gone else ""
        screen.note(f"restart {len(seen)} of {max_restarts} from the last checkpoint: {job.size}{without}")


def why_not(failure: Failure, seen: list[Failure], max_restarts: int) -> str:
    """Why a failure is no reason to start again; empty where it is."""
    if failure.code in DETERMINISTIC:
        return f"exit code {failure.code} comes back, repair its cause first"
    if any(failure.fingerprint == earlier.fingerprint for earlier in seen):
        return "the same error at the same step as before"
    return "" if len(seen) < max_restarts else f"--max_restarts {max_restarts} is used up"


def hosts_left(job: Job) -> list[Host]:
    """The hosts that answer in time, in their order; a lost one may be back."""
    with closing(Fleet(job.hosts, job.silence)) as fleet:
        fleet.hello([])
        answers = fleet.answers("hello", PROBE_SECONDS, fleet.links)
        fleet.end(1.0)
    return [host for host in job.hosts if host.name in answers]
