"""Addresses and ports of one host, what it reaches, who holds a port. Standard library only."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SIOCGIFADDR = 0x8915
REACH_SECONDS = 5.0
# Bridges of containers and virtual machines: every host has its own under the same address.
VIRTUAL = ("docker", "br-", "veth", "virbr", "cni", "flannel", "cali", "podman", "lxc")


def interfaces() -> list[tuple[str, str]]:
    """``(name, address)`` of every interface that is up, IPv4 first; loopback last, then virtual bridges."""
    found = [(name, address) for _, name in socket.if_nameindex() if (address := _ipv4(name))]
    path = Path("/proc/net/if_inet6")
    for line in path.read_text().splitlines() if path.exists() else ():
        digits, _, _, scope, _, name = line.split()
        if scope != "20":  # an address of one link alone means nothing elsewhere
            found.append((name, socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits))))
    return sorted(found, key=lambda each: (each[0].startswith(VIRTUAL), each[0] == "lo"))


def _ipv4(name: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
        except OSError:  # it has none
            return None
    return socket.inet_ntoa(answer[20:24])


def interface_of(address: str) -> str | None:
    """The interface that holds an address of this host."""
    return next((name for name, held in interfaces() if held == address), None)


def resolve(name: str) -> list[str]:
    """The addresses that this host knows a name by; none where it does not know it."""
    try:
        answers = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return list(dict.fromkeys(str(answer[4][0]) for answer in answers))


def is_this_machine(name: str) -> bool:
    """Whether a name leads to an address that this machine itself holds."""
    held = {address for _, address in interfaces()}
    found = resolve(name)
    return bool(found) and all(address in held or address.startswith("127.") for address in found)


def listen(port: int) -> socket.socket:
    """A listening socket on all addresses; port 0: a free one.

    Raises:
        OSError: the port is in use.
    """
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        except OSError as error:
            if error.errno not in (
                errno.EAFNOSUPPORT,
                errno.EADDRNOTAVAIL,
            ):  # no IPv6 here; a port in use is the caller's
                raise
    return socket.create_server(("", port))


def holder(port: int) -> str:
    """Who listens on a port: ``"process 4711 (python train.py)"``, as far as this user may see it."""
    inodes = set()
    for path in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        for line in path.read_text().splitlines()[1:] if path.exists() else ():
            fields = line.split()
            if fields[3] == "0A" and int(fields[1].rsplit(":", 1)[1], 16) == port:
                inodes.add(f"socket:[{fields[9]}]")
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        if inodes & set(_open_files(pid)):
            command = Path("/proc", pid, "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            return f"process {pid} ({command.strip()[:80]})"
    return "a process of another user"


def _open_files(pid: str) -> Iterator[str]:
    """What the descriptors of a process lead to, as far as this user may see them."""
    with contextlib.suppress(OSError):
        for number in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):  # closed meanwhile
                yield os.readlink(f"/proc/{pid}/fd/{number}")


def reach(addresses: Iterable[str], port: int, nonce: str) -> dict[str, str]:
    """Which addresses lead to the listener that says ``nonce``: ``{address: own address towards it}``.

    The nonce tells the listener from whatever else stands at that address as seen from this host.
    """

    def own_address(address: str) -> str | None:
        try:
            with socket.create_connection((address, port), REACH_SECONDS) as line:
                line.settimeout(REACH_SECONDS)
                said = b""
                while len(said) < len(nonce) and (more := line.recv(64)):
                    said += more
                return line.getsockname()[0] if said == nonce.encode() else None
        except OSError:
            return None

    asked = list(dict.fromkeys(addresses))
    with ThreadPoolExecutor(max(1, len(asked))) as pool:
        answers = dict(zip(asked, pool.map(own_address, asked)))
    return {address: own for address, own in answers.items() if own is not None}
