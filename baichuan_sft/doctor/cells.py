"""What a check says of one host, and the words that several checks share."""

from __future__ import annotations

import shlex
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

from baichuan_sft.doctor.rounds import World
from baichuan_sft.hosts import Host

GIB = 2**30


@dataclass(frozen=True)
class Cell:
    """One host in one check.

    Attributes:
        mark: pass, warn (it trains, with a loss), fail (it does not, or not what was asked), skip.
        found, expected, repair: one line each; the last is a command wherever there is one.
    """

    mark: str
    found: str
    expected: str = ""
    repair: str = ""


good, warn, fail = (partial(Cell, mark) for mark in ("pass", "warn", "fail"))


def is_here(world: World, host: Host) -> bool:
    """Whether a command for a host needs no ssh."""
    return bool(world.answers.get(host.name, {}).get("ssh", {}).get("local"))


def login(host: Host) -> str:
    return f"{host.user}@{host.name}" if host.user else host.name


def shell(world: World, host: Host, line: str) -> str:
    """What the user types here to run a line on a host."""
    port = f"-p {host.port} " if host.port else ""
    return line if is_here(world, host) else f"ssh {port}{login(host)} {shlex.quote(line)}"


def command(world: World, host: Host, *words: str) -> str:
    """The same for words that no shell is to read."""
    return shell(world, host, shlex.join(words))


def copy(world: World, source: Host, there: str, host: Host, path: str) -> str:
    """What the user types here to copy a path from one host to another."""
    if is_here(world, source):
        port = ["-e", f"ssh -p {host.port}"] if host.port else []
        return shlex.join(["rsync", "-a", *port, there, f"{login(host)}:{path}"])
    return command(world, host, "rsync", "-a", f"{login(source)}:{there}", path)


def usual(values: dict[str, Any]) -> Any:
    """What most hosts have; of equals what the first of them has."""
    return Counter(values.values()).most_common(1)[0][0]


def listed(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:,.1f} GiB"


def place(world: World, host: Host) -> str:
    """A host by its line in the hostfile."""
    return f"hostfile:{host.line} {host.name}" if host.line else host.name
