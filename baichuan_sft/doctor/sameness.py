"""Verdicts on what makes several hosts one: reached by ssh, none twice, the same packages and files.

A verdict takes all that is known, a host and what it said of the check's fact; it reads nothing else, so each
can be tried on answers written by hand.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from typing import Any

from baichuan_sft.doctor.cells import Cell, command, copy, fail, good, listed, place, usual
from baichuan_sft.doctor.rounds import World
from baichuan_sft.hosts import Host

Verdict = Callable[[World, Host, Any], Cell]

# What ssh says, what it means and what to do; the first that fits counts.
SSH_FAULTS = (
    ("IDENTIFICATION HAS CHANGED", "the host's key has changed", "ssh-keygen -R {name}"),
    ("Host key verif", "its key is not in known_hosts", "ssh-keyscan{port} {name} >>~/.ssh/known_hosts"),
    ("Permission denied", "the key is not accepted there", "ssh-copy-id{port} {user}{name}"),
    ("Connection refused", "nobody listens on port {number}", "start sshd there, or write port= on its line"),
    ("timed out|no answer", "no answer in {seconds} s", "ping {name}; nc -z {name} {number} (a firewall?)"),
    ("No route|unreachable", "no way there", "ip route get {name}"),
    ("Could not resolve|not known", "its name is not known here", "getent hosts {name}; correct its line"),
    ("can't cd|cd: ", "no directory {workdir} there", "copy it there, or write workdir= on its line"),
    ("No module named .?baichuan", "the package is not there", "pip install -e . there, or write workdir="),
    ("not found|No such file", "no Python {python} there", "install it there, or write python= on its line"),
)


def ssh(world: World, host: Host, mine: dict[str, Any]) -> Cell:
    if "said" not in mine:
        return good("this machine" if mine["local"] else "reached")
    said = " ".join(mine["said"])
    words = {
        "name": host.name,
        "user": f"{host.user}@" if host.user else "",
        "port": f" -p {host.port}" if host.port else "",
        "number": host.port or 22,
        "seconds": 10,
        "workdir": host.workdir or os.getcwd(),
        "python": host.python or sys.executable,
    }
    for pattern, meaning, repair in SSH_FAULTS:
        if re.search(pattern, said):
            return fail(meaning.format(**words), "reached", repair.format(**words))
    return fail(mine["said"][-1], "reached", f"ssh{words['port']} {words['user']}{host.name} true")


def same_machine(world: World, host: Host, mine: str) -> Cell:
    for other in world.hosts[: world.hosts.index(host)]:
        if world.values("identity").get(other.name) == mine:
            repair = f"delete {place(world, host)}; its slots belong to {other.name}"
            return fail(f"the same machine as {place(world, other)}", "a host once", repair)
    return good("a machine of its own")


def versions(world: World, host: Host, mine: dict[str, str]) -> Cell:
    everyone = world.values("versions")
    names = list(dict.fromkeys(name for one in everyone.values() for name in one))
    held = {host: {**dict.fromkeys(names, "not installed"), **one} for host, one in everyone.items()}
    wanted = {name: usual({host: one[name] for host, one in held.items()}) for name in names}
    wrong = [name for name in names if held[host.name][name] != wanted[name]]
    if not wrong:
        return good(f"python {mine['python']}, torch {mine.get('torch')}")
    found = listed([f"{name} {held[host.name][name]}" for name in wrong])
    expected = listed([f"{name} {wanted[name]}" for name in wrong])
    if "python" in wrong:
        repair = f"write python= on {place(world, host)}, a Python {wanted['python']} there"
        return fail(found, expected, repair)
    executable = world.answers[host.name]["python"]["executable"]
    nvidia = {"nccl": "nvidia-nccl", "cuda-runtime": "nvidia-cuda-runtime"}
    packages = [f"{nvidia.get(name, name)}=={wanted[name].split('+')[0]}" for name in wrong]
    return fail(found, expected, command(world, host, executable, "-m", "pip", "install", *packages))


def same_files(fact: str) -> Verdict:
    """A verdict for files that must be the same on all hosts."""

    def verdict(world: World, host: Host, mine: dict[str, Any]) -> Cell:
        everyone = world.values(fact)
        wanted = usual({name: one["digest"] for name, one in everyone.items()})
        source = next(one for one in world.hosts if everyone.get(one.name, {}).get("digest") == wanted)
        theirs = everyone[source.name]["files"]
        if mine["digest"] == wanted:
            return good(f"{len(theirs)} {'file' if len(theirs) == 1 else 'files'}, {wanted}")
        names = {*mine["files"], *theirs}
        wrong = sorted(name for name in names if mine["files"].get(name) != theirs.get(name))
        more = f" ({len(wrong)} files differ)" if len(wrong) > 1 else ""
        found = f"{wrong[0]}: {mine['files'].get(wrong[0], 'missing')}{more}"
        expected = f"as on {source.name}: {theirs.get(wrong[0], 'no such file')}"
        there, here = (whole(world, one, fact, wrong[0]) for one in (source, host))
        return fail(found, expected, copy(world, source, there, host, here))

    return verdict


def whole(world: World, host: Host, fact: str, name: str) -> str:
    """What to copy: the directory that holds the files, or the file that the user named."""
    answers = world.answers[host.name]
    if "path" in answers[fact]:
        return os.path.join(answers[fact]["path"], "")
    return os.path.join(answers["python"]["workdir"], name)
