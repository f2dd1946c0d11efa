"""Verdicts on what one host has: devices, room, limits, a clock, and nothing in the way."""

from __future__ import annotations

from functools import partial
from typing import Any

from baichuan_sft.doctor.cells import Cell, command, fail, gib, good, listed, place, shell, usual, warn
from baichuan_sft.doctor.rounds import World
from baichuan_sft.hosts import Host
from baichuan_sft.machine import NETWORK_DISKS

MAX_SKEW = 2.0  # seconds: above, names and ages of files made on two hosts contradict each other
SHM_ENOUGH, SHM_LEAST = 1 << 30, 128 << 20  # NCCL between the ranks of a host; containers begin with 64 MiB
MIN_FILES = 1024  # of a process; and for each rank of the world so many:
FILES_PER_RANK = 16
BUSY_MIB = 1024  # on a GPU before training: more than a desktop or a context takes


def devices(world: World, host: Host, mine: dict[str, Any]) -> Cell:
    gpus, slots = mine["gpus"], host.slots
    smi = partial(command, world, host, "nvidia-smi")
    someone = any(one["gpus"] for one in world.values("devices").values())
    if mine["fault"]:
        return fail(mine["fault"], f"{slots or 'the'} GPUs", smi())
    if not gpus and someone:
        return fail("no GPU", "a GPU, as on the other hosts", f"delete {place(world, host)}")
    if not gpus:
        return good(f"no GPU: trains on the CPU, {mine['cores']} cores")
    if slots > len(gpus):
        return fail(f"{len(gpus)} GPUs", f"slots={slots}", f"write slots={len(gpus)} on {place(world, host)}")
    damaged = [gpu["name"] for gpu in gpus if gpu.get("ecc_errors", "0").isdigit() and int(gpu["ecc_errors"])]
    if damaged:
        return fail(f"{damaged[0]}: memory errors", "none", smi("-q", "-d", "ECC"))
    busy = [gpu for gpu in gpus if gpu["used_mib"].isdigit() and int(gpu["used_mib"]) > BUSY_MIB]
    if busy:
        pids = [row["pid"] for row in mine.get("busy", [])]
        who = f", process {listed(pids)}" if pids else ""
        repair = command(world, host, "kill", *pids) if pids else smi()
        return fail(f"{len(busy)} GPUs in use ({busy[0]['used_mib']} MiB{who})", "free GPUs", repair)
    if any(gpu.get("mig") == "Enabled" for gpu in gpus):
        return warn("MIG is on: each rank has a part of a GPU", "whole GPUs", smi("-mig", "0"))
    return good(f"{len(gpus)} x {gpus[0]['name']}")


def precision(world: World, host: Host, mine: dict[str, Any]) -> Cell:
    """By compute capability: bf16 from 8.0 on; a mixed set of hosts trains at the pace of the slowest."""
    if not mine["gpus"]:
        return good("bf16 or fp32 on the CPU")
    kinds = {name: one["gpus"][0]["name"] for name, one in world.values("devices").items() if one["gpus"]}
    lowest = min(float(gpu["capability"]) for gpu in mine["gpus"])
    if lowest < 8.0:
        return warn(f"compute capability {lowest}: no bf16", "8.0 or more", "pass --fp16 True")
    if kinds[host.name] != usual(kinds):
        advice = "the slowest GPU sets the pace: hosts of one kind train faster"
        return warn(kinds[host.name], usual(kinds), advice)
    return good("bf16")


def driver(world: World, host: Host, mine: dict[str, Any]) -> Cell:
    found = {name: one["gpus"][0]["driver"] for name, one in world.values("devices").items() if one["gpus"]}
    if host.name not in found:
        return good("none")
    if found[host.name] == usual(found):
        return good(found[host.name])
    return warn(found[host.name], usual(found), f"install driver {usual(found)} on {host.name}")


def disk(world: World, host: Host, mine: dict[str, Any]) -> Cell:
    """Against what checkpoints and result take; on disks of their own, hosts but the first keep shards."""
    needed = world.ask.get("needed")
    shared = world.answers[host.name].get("ports", {}).get("seen") is not False
    if needed and not shared and host is not world.hosts[0]:
        needed /= len(world.hosts)
    room = f"{gib(mine['free'])} free in {mine['path']}"
    if mine["free"] >= (needed or 2**30):
        return good(f"{room}{f', needs {gib(needed)}' if needed else ''}")
    why = "checkpoints and result" if needed else "any run"
    repair = "choose another --output_dir, a smaller --save_total_limit, or free it: "
    repair += command(world, host, "du", "-xh", "-d1", mine["path"])
    return fail(room, f"{gib(needed or 2**30)} for {why}", repair)


def output(world: World, host: Host, mine: dict[str, Any]) -> Cell:
    if mine["refused"]:
        repair = command(world, host, "ls", "-ld", mine["path"])
        return fail(f"{mine['path']}: {mine['refused']}", "writable", repair)
    seen = world.answers[host.name].get("ports", {}).get("seen")
    if len(world.hosts) == 1 or seen is None:
        return good(f"writable ({mine['kind']})")
    if seen:
        return good(f"shared ({mine['kind']})")
    first = world.reached()[0].name
    found = f"{mine['path']} is not the directory of {first} ({mine['kind']})"
    repair = "choose an --output_dir on a file system that all hosts mount"
    return warn(found, "one directory for all hosts", repair)


def shm(world: World, host: Host, mine: dict[str, int]) -> Cell:
    size = f"/dev/shm has {mine['bytes'] / 2**20:,.0f} MiB"
    repair = command(world, host, "mount", "-o", "remount,size=16g", "/dev/shm")
    repair += " (docker run --shm-size=16g)"
    if mine["bytes"] < SHM_LEAST and host.slots > 1:
        return fail(size, "128 MiB at least, for ranks of one host", repair)
    if mine["bytes"] < SHM_ENOUGH:
        return warn(size, "1 GiB", repair)
    return good(f"{gib(mine['bytes'])}")


def limits(world: World, host: Host, mine: dict[str, Any]) -> Cell:
    files = max(MIN_FILES, FILES_PER_RANK * sum(max(1, one.slots) for one in world.hosts))
    where = "/etc/security/limits.d/90-train.conf"
    if mine["nofile"] is not None and mine["nofile"] < files:
        line = f"echo '* - nofile 65536' >> {where}"
        return warn(f"{mine['nofile']} open files", f"{files}", shell(world, host, line))
    infiniband = world.values("devices").get(host.name, {}).get("infiniband")
    if infiniband and mine["memlock"] is not None:
        found = f"memlock {mine['memlock'] >> 10} KiB with InfiniBand ({infiniband[0]})"
        return warn(found, "unlimited", shell(world, host, f"echo '* - memlock unlimited' >> {where}"))
    return good(f"{mine['nofile'] or 'unlimited'} open files")


def clock(world: World, host: Host, mine: dict[str, float]) -> Cell:
    first = world.reached()[0].name
    skew = mine["skew"] - world.values("clock")[first]["skew"]
    if abs(skew) <= MAX_SKEW:
        return good(f"{skew:+.1f} s")
    way = "ahead of" if skew > 0 else "behind"
    repair = command(world, host, "timedatectl", "set-ntp", "true")
    return warn(f"{abs(skew):,.1f} s {way} {first}", f"within {MAX_SKEW:.0f} s", repair)


def caches(world: World, host: Host, mine: dict[str, list[str]]) -> Cell:
    for name, (path, kind) in mine.items():
        if NETWORK_DISKS.match(kind):
            repair = f"export {name}=/var/tmp/$USER/{name.lower()} before the run"
            return warn(f"{name} is {path}, on {kind}", "a disk of the host's own: locks hold there", repair)
    return good("on a disk of its own")


def locks(world: World, host: Host, mine: list[dict[str, Any]]) -> Cell:
    stale = [lock["path"] for lock in mine if lock["stale"]]
    if stale:
        found = f"{stale[0]}: left by a build that was killed"
        return warn(found, "no lock: whoever builds there waits for ever", command(world, host, "rm", *stale))
    return good("none" if not mine else "held by a build")


def leftovers(world: World, host: Host, mine: list[dict[str, Any]]) -> Cell:
    if not mine:
        return good("none")
    pids = [str(one["pid"]) for one in mine]
    found = f"{len(mine)} of training, process {listed(pids)}: {mine[0]['command'][:100]}"
    return warn(found, "none, or a run of yours", command(world, host, "kill", *pids))
