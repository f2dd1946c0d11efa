"""Three rounds over all hosts: facts; ports, both ways; a dry rendezvous. The checks judge what they say."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from baichuan_sft.doctor.sessions import CONNECT_SECONDS, Ask, sessions
from baichuan_sft.hosts import Host, is_local

SHELL_SECONDS = CONNECT_SECONDS + 2.0
FACTS_SECONDS = 120.0  # a driver that sleeps, large files on a slow disk
PORTS_SECONDS = 30.0
RENDEZVOUS_SECONDS = 60.0


@dataclass(frozen=True)
class World:
    """All that is known.

    Attributes:
        ask: what the user named: model, data, config, output, port, needed (bytes of disk), traffic.
        answers: by host and fact; a host that was not reached has ``ssh`` alone.
    """

    hosts: list[Host]
    ask: Ask
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)

    def reached(self) -> list[Host]:
        return [host for host in self.hosts if "python" in self.answers.get(host.name, {})]

    def values(self, fact: str) -> dict[str, Any]:
        """What the hosts say of one fact, but for those that could not find it out."""
        found = {host.name: self.answers[host.name].get(fact) for host in self.reached()}
        return {name: one for name, one in found.items() if one is not None and "error" not in one}


def examine(hosts: list[Host], ask: Ask, facts: list[str], *, ports: bool, rendezvous: bool) -> World:
    """Ask all hosts; nothing runs on any of them afterwards.

    Args:
        facts: of ``FACTS``; ``python`` is always among them.
        ports, rendezvous: whether to have these rounds; the third needs what the second finds.
    """
    world = World(hosts, {**ask, "names": [host.name for host in hosts]})
    ask_facts(world, sorted({"python", *facts}))
    if (ports or rendezvous) and hosts[0] in world.reached():
        try_ports(world)
        if rendezvous:
            meet(world)
    return world


def ask_facts(world: World, facts: list[str]) -> None:
    ask = {**world.ask, "mode": "facts", "facts": facts, "limit": int(FACTS_SECONDS)}
    start = time.monotonic()
    with sessions(world.hosts, lambda host: ask) as opened:
        for host in world.hosts:
            session = opened[host.name]
            shell = session.next(start + SHELL_SECONDS)
            answer = session.next(start + FACTS_SECONDS) if shell else None
            mine = world.answers[host.name] = {"ssh": {"local": is_local(host)}}
            if answer:
                mine.update(answer["facts"], clock={"skew": answer["clock"] - answer["arrived"]})
            else:
                seconds = FACTS_SECONDS if shell else SHELL_SECONDS
                mine["ssh"]["said"] = list(filter(None, session.said)) or [f"no answer in {seconds:.0f} s"]


def try_ports(world: World) -> None:
    """Every host listens, the first on the master port too; all connect to the first, and it to all."""
    first, *others = hosts = world.reached()
    nonce = secrets.token_hex(8)
    end = time.monotonic() + PORTS_SECONDS
    common = {"nonce": nonce, "limit": int(PORTS_SECONDS) * 2, "output": world.ask.get("output")}

    def listen(host: Host) -> Ask:
        own = {"ports": [world.ask["port"]]} if host is first else {"ports": [0], "output": None}
        return {**common, "mode": "listen", **own}

    with sessions(hosts, listen) as listening:
        heard = {name: session.next(end) and session.next(end) for name, session in listening.items()}
        silent = {"ports": [{"fault": "no answer"}]}
        opened = {name: (one or silent)["ports"][0] for name, one in heard.items()}
        there = [(host, opened[host.name]["port"]) for host in others if "port" in opened[host.name]]
        addresses = sorted(world.answers[first.name].get("names", {}).get("interfaces", {}).values())

        def connect(host: Host) -> Ask:
            targets = [[name, world.ask["port"]] for name in (first.name, *addresses)]
            if host is first:
                targets = targets[:1] + [[other.name, port] for other, port in there]
            mark = (heard[first.name] or {}).get("mark")
            return {**common, "mode": "connect", "targets": targets, "mark": mark}

        with sessions(hosts, connect) as connecting:
            for host in hosts:
                session = connecting[host.name]
                answer = (session.next(end) and session.next(end)) or {"reached": [], "seen": None}
                names = [target for target, _ in connect(host)["targets"]]
                ports = {"listen": opened[host.name], "reached": dict(zip(names, answer["reached"]))}
                world.answers[host.name]["ports"] = {**ports, "seen": answer["seen"]}


def meeting_point(world: World) -> str | None:
    """The first host by name, or the address of it that all others reach; None where there is none."""
    first, *others = world.reached()
    if "fault" in world.answers[first.name]["ports"]["listen"]:
        return None
    answers = [world.answers[host.name]["ports"]["reached"] for host in others or [first]]
    common = [name for name in answers[0] if all("own" in one.get(name, {}) for one in answers)]
    return common[0] if common else None


def interface_towards(world: World, host: Host, others: list[str]) -> str | None:
    """The interface through which a host reaches the others; None where the libraries' choice will do."""
    mine = world.answers[host.name]
    own = {one["own"] for name, one in mine["ports"]["reached"].items() if name in others and "own" in one}
    held = mine.get("names", {}).get("interfaces", {})
    return next((name for name, address in held.items() if address in own), None)


def meet(world: World) -> None:
    """One process on each reached host joins the others; each tells how far it came."""
    hosts = world.reached()
    point = meeting_point(world)
    if point is None:
        for host in hosts:
            world.answers[host.name]["rendezvous"] = {"phase": "not tried"}
        return
    end = time.monotonic() + RENDEZVOUS_SECONDS
    common = {"mode": "rendezvous", "world": len(hosts), "address": point, "port": world.ask["port"]}
    common |= {"seconds": RENDEZVOUS_SECONDS * 2 / 3, "limit": int(RENDEZVOUS_SECONDS) + 10}

    def join(host: Host) -> Ask:
        others = [other.name for other in hosts if other is not host] if host is hosts[0] else [point]
        return {**common, "rank": hosts.index(host), "interface": interface_towards(world, host, others)}

    last: dict[str, Ask] = {host.name: {"phase": "no answer", "came": "no answer"} for host in hosts}
    with sessions(hosts, join) as opened:
        waiting = dict(opened)
        while waiting and time.monotonic() < end:
            for name, session in list(waiting.items()):
                answer = session.next(time.monotonic() + 0.05)
                if answer is None and not session.ended:
                    continue
                if answer and "phase" in answer:
                    came = last[name]["came"] if answer["phase"] == "failed" else answer["phase"]
                    last[name] = {**answer, "came": came}
                if session.ended and session.said:  # it died without a word of its own
                    last[name].setdefault("fault", session.said[-1])
                if session.ended or last[name]["phase"] in ("done", "failed"):
                    del waiting[name]
            ended = [last[name]["phase"] for name in last if name not in waiting]
            if set(ended) - {"done"} and all(last[name]["came"] != "no answer" for name in waiting):
                break  # the others would wait in vain for the one that failed
    for name, answer in last.items():
        world.answers[name]["rendezvous"] = answer
