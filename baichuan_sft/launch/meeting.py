"""Before ranks start: are all hosts there, alike, and at which address does everybody reach the first one?"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass

from baichuan_sft.errors import EnvironmentFault
from baichuan_sft.launch.fleet import Fleet
from baichuan_sft.launch.wire import Message
from baichuan_sft.machine import is_loopback

HELLO_SECONDS = 25.0  # ssh's own limit is 15 s, and it knows more
ANSWER_SECONDS = 15.0


@dataclass(frozen=True)
class Meeting:
    """Where the ranks find each other."""

    address: str
    port: int
    interfaces: Mapping[str, str | None]  # by host
    world: str  # "hosts:ranks"
    ranks: int

    def variables(self, host: str, given: Mapping[str, str]) -> dict[str, str]:
        """Environment of the ranks of one host; an interface that the user has named is kept."""
        name = self.interfaces.get(host)
        interface = {} if name is None else {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}"}
        if name == "lo":
            del interface["NCCL_SOCKET_IFNAME"]  # on one host NCCL finds its way
        return {
            "WORLD_SIZE": str(self.ranks),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
            "BAICHUAN_SFT_WORLD": self.world,
            **{key: value for key, value in interface.items() if key not in given},
        }


def meet(fleet: Fleet, files: list[str], address: str | None, port: int) -> Meeting:
    """Greet every agent and agree on an address and a port.

    Raises:
        EnvironmentFault: a host does not answer, is there twice, or differs; no address that all reach.
    """
    fleet.hello(files)
    answers = fleet.gather("hello", HELLO_SECONDS)
    for link in fleet.links:
        link.facts = answers[link.name]
    require_distinct(fleet)
    require_alike(fleet)
    address, port, interfaces = agree(fleet, address, port)
    return Meeting(address, port, interfaces, f"{len(fleet.links)}:{fleet.world}", fleet.world)


def require_distinct(fleet: Fleet) -> None:
    """Refuse two names of one machine: both would take the same devices."""
    seen: dict[str, str] = {}
    for link in fleet.links:
        first = seen.setdefault(link.facts["identity"], link.name)
        if first != link.name:
            both = f"{first} and {link.name}"
            raise EnvironmentFault(f"{both} are one machine; name it once, with all its slots")


def require_alike(fleet: Fleet) -> None:
    """Refuse hosts with other versions, code or files than the first: they would diverge in silence."""
    first, *others = fleet.links
    wanted = first.facts["same"]
    faults = [
        f"{link.name}: {what} is {theirs}, on {first.name} {wanted.get(what)}"
        for link in others
        for what, theirs in link.facts["same"].items()
        if theirs != wanted.get(what)
    ]
    if faults:
        raise EnvironmentFault("the hosts are not alike, make them so\n" + "\n".join(faults))


def agree(fleet: Fleet, address: str | None, port: int) -> tuple[str, int, dict[str, str | None]]:
    """An address of the first host that leads every other host to it, a port, each host's interface there."""
    first, *others = fleet.links
    if not others:
        fleet.ask("listen", port=port, nonce="")
        port = fleet.gather("listening", ANSWER_SECONDS)[first.name]["port"]
        return address or "127.0.0.1", port, {first.name: None if address else "lo"}
    nonce = secrets.token_hex(8)
    first.ask("listen", port=port, nonce=nonce)
    listening = fleet.gather("listening", ANSWER_SECONDS, [first])[first.name]
    port, held = listening["port"], listening["addresses"]
    candidates = [address] if address else usable([first.facts["address"], *[each for _, each in held]])
    for link in others:
        link.ask("reach", name=address or first.name, addresses=candidates, port=port, nonce=nonce)
    answers = fleet.gather("reached", ANSWER_SECONDS, others)
    common = choose(candidates, answers)
    if common is None:
        raise EnvironmentFault("\n".join(unreached(first.name, port, candidates, answers)))
    owner = next((name for name, each in held if each == common), None)
    interfaces = {name: answer["found"][common] for name, answer in answers.items()}
    return common, port, {first.name: owner, **interfaces}


def usable(addresses: list[str | None]) -> list[str]:
    """Without loopback: 127.0.1.1, as Debian's /etc/hosts has it, leads every host to itself."""
    return list(dict.fromkeys(each for each in addresses if each and not is_loopback(each)))


def choose(candidates: list[str], answers: Mapping[str, Message]) -> str | None:
    """The first address that every host reaches; what they know the name by comes first."""
    known = [address for answer in answers.values() for address in answer["resolved"]]
    order = [*usable(known), *candidates]
    return next((each for each in order if all(each in answer["found"] for answer in answers.values())), None)


def unreached(first: str, port: int, candidates: list[str], answers: Mapping[str, Message]) -> list[str]:
    """One line per host that reaches no address of the first."""
    return [
        f"{name}: cannot reach {first} at one address with all others, port {port} (tried "
        f"{', '.join(candidates)}; reached {', '.join(answer['found']) or 'none'}); a firewall? "
        "--master_addr names an address"
        for name, answer in answers.items()
    ]
