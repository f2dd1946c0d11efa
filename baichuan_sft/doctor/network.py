"""Addresses and ports of one host: what it has, what it reaches, who holds a port. Standard library only."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SIOCGIFADDR = 0x8915  # asks the kernel for an interface's IPv4 address
REACH_SECONDS = 5.0
# Bridges of containers and virtual machines: every host has its own under the same address.
VIRTUAL = ("docker", "br-", "veth", "virbr", "cni", "flannel", "cali", "podman", "lxc")


def interfaces() -> dict[str, str]:
    """IPv4 address of each interface that is up and leads somewhere."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has none
                answer = fcntl.ioctl(asking, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if name != "lo" and not name.startswith(VIRTUAL):
                    found[name] = socket.inet_ntoa(answer[20:24])
    return found


def resolve(name: str) -> list[str]:
    """The addresses that this host knows a name by; none where it does not know it."""
    try:
        answers = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return list(dict.fromkeys(str(answer[4][0]) for answer in answers))


def is_this_machine(name: str) -> bool:
    """Whether a name leads to this machine itself."""
    found, held = resolve(name), set(interfaces().values())
    return bool(found) and all(one in held or one.startswith("127.") or one == "::1" for one in found)


def listen(port: int) -> socket.socket:
    """A listening socket on all addresses; port 0 is a free one.

    Raises:
        OSError: the port is in use, or one may not take it.
    """
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                raise
    return socket.create_server(("", port))


def answer_all(server: socket.socket, nonce: str) -> None:
    """Say the nonce to whoever connects, until the process ends."""
    while True:
        with contextlib.suppress(OSError):
            line, _ = server.accept()
            with line:
                line.sendall(nonce.encode())


def open_port(port: int, nonce: str) -> dict[str, Any]:
    """Listen in the background: ``port``, or ``fault`` with the process that holds it."""
    try:
        server = listen(port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return {"fault": f"port {port} is held by {holder(port)}"}
        return {"fault": f"port {port}: {error.strerror}"}
    threading.Thread(target=answer_all, args=(server, nonce), daemon=True).start()
    return {"port": server.getsockname()[1]}


def holder(port: int) -> str:
    """Who listens on a port: ``"process 4711 (python train.py)"``, as far as this user may see it."""
    inodes = set()
    for path in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        for line in path.read_text().splitlines()[1:] if path.exists() else ():
            fields = line.split()
            if fields[3] == "0A" and int(fields[1].rsplit(":", 1)[1], 16) == port:  # 0A: listening
                inodes.add(f"socket:[{fields[9]}]")
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            for number in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):  # closed meanwhile
                    if os.readlink(f"/proc/{pid}/fd/{number}") in inodes:
                        words = Path("/proc", pid, "cmdline").read_bytes().split(b"\0")
                        return f"process {pid} ({b' '.join(words).decode(errors='replace').strip()[:80]})"
    return "a process that this user cannot see"


def reach(target: tuple[str, int], nonce: str) -> dict[str, Any]:
    """Connect and compare what is said there: our own address towards it, or why not.

    The nonce tells the listener from whatever else stands at that address as seen from this host.
    """
    start, said = time.monotonic(), b""
    try:
        with socket.create_connection(target, REACH_SECONDS) as line:
            line.settimeout(REACH_SECONDS)
            while len(said) < len(nonce) and (more := line.recv(64)):
                said += more
            own = line.getsockname()[0]
    except socket.gaierror as error:
        return {"fault": f"name not resolved ({error.strerror})"}
    except TimeoutError:
        return {"fault": f"no answer in {REACH_SECONDS:.0f} s (a firewall drops it, or no route)"}
    except OSError as error:
        return {"fault": (error.strerror or str(error)).lower()}
    if said != nonce.encode():
        return {"fault": "something else answers there"}
    return {"own": own, "seconds": time.monotonic() - start}


def reach_all(targets: list[list[Any]], nonce: str) -> list[dict[str, Any]]:
    """`reach` for each ``[name, port]``, all at once."""
    with ThreadPoolExecutor(max(1, len(targets))) as pool:
        return list(pool.map(lambda target: reach((target[0], target[1]), nonce), targets))
