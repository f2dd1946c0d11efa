"""Verdicts on what happens between hosts: names, ports, the dry rendezvous, what its speed is good for."""

from __future__ import annotations

from typing import Any

from baichuan_sft.doctor.cells import Cell, command, fail, good, listed, shell, usual, warn
from baichuan_sft.doctor.rounds import World
from baichuan_sft.hosts import Host
from baichuan_sft.machine import is_loopback

SLOW_SECONDS = 10.0  # of waiting for the network in an update: as long as computing one takes on few GPUs


def names(world: World, host: Host, mine: dict[str, Any]) -> Cell:
    """Its own name must lead to an address that others reach, each other name to the same as elsewhere."""
    for other in world.reached():  # of the others ssh tells
        said = world.values("names").items()
        seen = {name: tuple(one["resolved"].get(other.name, [])) for name, one in said}
        if not seen.get(other.name) or is_loopback(seen[other.name][0]):
            seen.pop(other.name, None)  # what it is to itself; see below
        if other is host or not seen:
            continue
        wanted = usual({name: found for name, found in seen.items() if found} or {host.name: ()})
        address = wanted[0] if wanted else "ITS_ADDRESS"
        repair = shell(world, host, f'echo "{address} {other.name}" >> /etc/hosts')
        if not seen[host.name]:
            return fail(f"does not know {other.name}", listed(list(wanted)) or "an address", repair)
        if wanted and seen[host.name] != wanted:
            return fail(f"{other.name} is {listed(list(seen[host.name]))}", listed(list(wanted)), repair)
    name = mine["hostname"]
    loopback = [address for address in mine["own"] if is_loopback(address)]
    interface, address = next(iter(mine["interfaces"].items()), ("eth0", "ITS_ADDRESS"))
    repair = f"export GLOO_SOCKET_IFNAME={interface} (launch does it)"
    if loopback:
        edit = f'sed -i "s/^{loopback[0]}[[:space:]].*/{address} {name}/" /etc/hosts'
        repair = f"{shell(world, host, edit)}, or {repair}"
        return warn(f"{name} is {loopback[0]} to itself", address, repair)
    return good(listed(mine["own"])) if mine["own"] else warn(f"{name} is unknown", address, repair)


def port(world: World, host: Host, mine: dict[str, Any]) -> Cell:
    """The first host must be able to listen on the master port; each reaches it there, and is reached."""
    first, number = world.reached()[0], world.ask["port"]
    listening = mine["listen"]
    if "fault" in listening:
        if host is not first:
            return fail(listening["fault"], "a port to listen on", "free it, then ask again")
        other = f"pass another port: --master_port {number + 1}"
        return fail(listening["fault"], f"port {number} free", other)
    if host is first:
        return good(f"{number} is free")
    opened = world.answers[first.name]["ports"]
    if "fault" in opened["listen"]:
        return Cell("skip", f"{first.name} could not listen")
    here = world.answers[host.name].get("names", {}).get("interfaces", {})
    there = world.answers[first.name].get("names", {}).get("interfaces", {})
    by_name = mine["reached"].get(first.name, {"fault": "no answer"})
    addresses = [name for name, one in mine["reached"].items() if name != first.name and "own" in one]
    if "fault" in by_name and addresses:
        found = f"{host.name} reaches {first.name} at {addresses[0]}, not by its name ({by_name['fault']})"
        repair = shell(world, host, f'echo "{addresses[0]} {first.name}" >> /etc/hosts')
        return warn(found, f"{first.name} by its name", repair)
    if "fault" in by_name:
        found = f"{host.name} -> {first.name}:{number}: {by_name['fault']}"
        return fail(found, "open to all hosts of the run", allow(world, first, here))
    back = opened["reached"].get(host.name, {"fault": "not tried"})
    if "fault" in back:
        found = f"{first.name} -> {host.name}:{listening['port']}: {back['fault']}"
        return fail(found, "all ports open between hosts", allow(world, host, there))
    return good(f"both ways, {by_name['seconds'] * 1000:.1f} ms")


def allow(world: World, host: Host, others: dict[str, str]) -> str:
    """The firewall rule that lets another host in; NCCL and gloo take ports at random."""
    source = next(iter(others.values()), "ADDRESS")
    return command(world, host, "iptables", "-I", "INPUT", "-p", "tcp", "-s", source, "-j", "ACCEPT")


ARRIVED = ("joined", "summed", "done")


def rendezvous(world: World, host: Host, mine: dict[str, Any]) -> Cell:
    if mine["phase"] == "not tried":
        return Cell("skip", "not tried: the port comes first")
    if mine["phase"] == "done" and mine["wrong"]:
        repair = "the network or a device damages data: leave a host out"
        return fail(mine["wrong"], "the sum over all ranks", repair)
    if mine["phase"] == "done":
        return good(f"{len(world.reached())} ranks, {mine['backend']}")
    came = {name: one.get("came", one["phase"]) for name, one in world.values("rendezvous").items()}
    missing = [name for name, phase in came.items() if phase not in ("import", *ARRIVED)]
    fault = mine.get("fault", "no answer in time")
    python = world.answers[host.name]["python"]["executable"]
    if host.name in missing:
        return fail(fault, "torch and its process group", command(world, host, python, "-c", "import torch"))
    if missing:
        return fail(f"waited for {listed(missing)}", "all hosts", f"see {listed(missing)}")
    held = ", ".join(sorted(world.answers[host.name].get("names", {}).get("interfaces", {})))
    repair = f"export GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, one of {held or 'its interfaces'}"
    return fail(f"after {came[host.name]!r}: {fault}", "a sum over all hosts", repair)


def bandwidth(world: World, host: Host, mine: dict[str, Any]) -> Cell:
    """Bytes/s on a host's link, and what that means for each way to share a model."""
    if not mine.get("bytes_per_second"):
        return Cell("skip", "no rendezvous")
    speeds = [one.get("bytes_per_second") for one in world.values("rendezvous").values()]
    speed = min(filter(None, speeds))
    infiniband = world.values("devices").get(host.name, {}).get("infiniband") or []
    way = "by InfiniBand" if mine["transport"] == "IB" else "by socket"
    found = f"{speed / 1e9:.1f} GB/s {way}" if speed >= 1e8 else f"{speed / 1e6:.0f} MB/s {way}"
    if infiniband and mine["transport"] != "IB" and mine["backend"] == "nccl":
        found += f", InfiniBand device {infiniband[0]} present but not used"
        repair = f"unset NCCL_IB_DISABLE; export NCCL_IB_HCA={infiniband[0]}; ibv_devinfo"
        return warn(found, "InfiniBand", repair)
    waits = {name: payload / speed for name, payload in world.ask["traffic"].items()}
    told = ", ".join(f"{name} {seconds:.{0 if seconds >= 10 else 2}f}" for name, seconds in waits.items())
    stage = world.values("config").get(host.name, {}).get("stage")
    chosen = "LoRA" if world.ask.get("lora") else {1: "ZeRO-1/2", 2: "ZeRO-1/2", 3: "ZeRO-3"}.get(stage)
    slow = [name for name, seconds in waits.items() if seconds > SLOW_SECONDS and chosen in (None, name)]
    found = f"{found}; seconds of sending per update: {told}"
    if not slow:
        return good(found)
    better = [name for name, seconds in waits.items() if seconds <= SLOW_SECONDS]
    advice = f"choose {listed(better)}" if better else "train on one host, or get a faster network"
    advice += "; or more --gradient_accumulation_steps with ZeRO-1"
    return warn(found, f"at most {SLOW_SECONDS:.0f} s", advice)
