"""The table of checks: what each compares, the fact it reads, and who judges it."""

from __future__ import annotations

from dataclasses import dataclass

from baichuan_sft.doctor import meeting, resources, sameness
from baichuan_sft.doctor.cells import Cell, command, fail
from baichuan_sft.doctor.rounds import World
from baichuan_sft.hosts import Host


@dataclass(frozen=True)
class Check:
    """One line of the table.

    Attributes:
        title: what it compares. fact: which answer it reads.
        asked: the flag without which there is nothing to check. several: only with two hosts or more.
    """

    title: str
    fact: str
    verdict: sameness.Verdict
    asked: str = ""
    several: bool = False


CHECKS = {
    "ssh": Check("reached without a password", "ssh", sameness.ssh),
    "same_machine": Check("no machine twice", "identity", sameness.same_machine, several=True),
    "versions": Check("Python and packages", "versions", sameness.versions),
    "code": Check("this package's files", "code", sameness.same_files("code"), several=True),
    "model": Check("model and tokenizer", "model", sameness.same_files("model"), asked="model"),
    "data": Check("data files", "data", sameness.same_files("data"), asked="data"),
    "deepspeed": Check("DeepSpeed file", "config", sameness.same_files("config"), asked="config"),
    "devices": Check("GPUs against slots", "devices", resources.devices),
    "driver": Check("GPU driver", "devices", resources.driver, several=True),
    "precision": Check("number format", "devices", resources.precision),
    "disk": Check("room for checkpoints", "disk", resources.disk, asked="output"),
    "output": Check("output directory", "disk", resources.output, asked="output"),
    "shm": Check("/dev/shm", "shm", resources.shm),
    "limits": Check("ulimits", "limits", resources.limits),
    "clock": Check("clock", "clock", resources.clock, several=True),
    "caches": Check("compiled code", "caches", resources.caches),
    "locks": Check("stale locks", "locks", resources.locks),
    "leftovers": Check("processes left over", "leftovers", resources.leftovers),
    "names": Check("names and addresses", "names", meeting.names, several=True),
    "port": Check("ports, both ways", "ports", meeting.port),
    "rendezvous": Check("a sum over all hosts", "rendezvous", meeting.rendezvous),
    "bandwidth": Check("speed between hosts", "rendezvous", meeting.bandwidth, several=True),
}


def judge(world: World, names: list[str]) -> dict[str, dict[str, Cell]]:
    """Cells by check and host; a check that was not asked for is left out."""
    table: dict[str, dict[str, Cell]] = {}
    for name in names:
        check = CHECKS[name]
        if (check.asked and not world.ask.get(check.asked)) or (check.several and len(world.hosts) < 2):
            continue
        table[name] = {host.name: cell(world, host, check) for host in world.hosts}
    return table


def cell(world: World, host: Host, check: Check) -> Cell:
    mine = world.answers.get(host.name, {}).get(check.fact)
    if mine is None:
        return Cell("skip", "not reached" if check.fact != "ssh" else "not asked")
    if isinstance(mine, dict) and "error" in mine:
        repair = command(world, host, "ls", "-ld", str(world.ask.get(check.asked, ".")))
        return fail(mine["error"], "an answer", repair)
    return check.verdict(world, host, mine)
