"""This machine: its memory, addresses and ports, what it reaches, who holds what. Standard library only."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import platform
import random
import re
import signal
import socket
import struct
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SIOCGIFADDR = 0x8915  # asks the kernel for an interface's IPv4 address
REACH_SECONDS = 5.0
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None, use_errno=True)
FREE_PORTS = range(20000, 32768)  # above, Linux gives them to whoever connects or listens on port 0
# Bridges of containers and virtual machines: every host has its own under the same address.
VIRTUAL = ("docker", "br-", "veth", "virbr", "cni", "flannel", "cali", "podman", "lxc")
# File systems that several hosts may share; a lock or a cache on one is seen by all, and may not hold.
NETWORK_DISKS = re.compile(r"nfs|cifs|smb|lustre|gpfs|beegfs|ceph|gluster|9p|afs|fuse(?!blk|\.fuseiso)")


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """In a new process: the kernel sends it a signal when its parent is gone, however that went."""
    if sys.platform == "linux":
        LIBC.prctl(PR_SET_PDEATHSIG, number)


def identity() -> str:
    """Equal for two names of one host, different for two containers with networks of their own."""
    parts = [platform.node()]
    with contextlib.suppress(OSError):
        parts = [Path("/proc/sys/kernel/random/boot_id").read_text().strip()]
        parts += [os.readlink(f"/proc/self/ns/{kind}") for kind in ("net", "pid")]
    return " ".join(parts)


def disk_kind(path: Path) -> str:
    """Name of the file system that holds a path ("ext4", "nfs4")."""
    mounts, real = Path("/proc/mounts"), path.resolve()
    best, kind = -1, "unknown"
    for line in mounts.read_text().splitlines() if mounts.exists() else ():
        _, point, name, *_ = line.split()
        if real.is_relative_to(point) and len(point) >= best:  # of two on one point the later counts
            best, kind = len(point), name
    return kind


def host_memory(root: Path = Path("/")) -> tuple[float, float]:
    """Bytes of RAM in all and those to be had, of this machine or of the container where that is less."""
    if not (root / "proc/meminfo").exists():  # not Linux
        total = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        return total, total
    lines = (line.split() for line in (root / "proc/meminfo").read_text().splitlines())
    sizes = {words[0].rstrip(":"): float(words[1]) * 1024 for words in lines}
    total, available = sizes["MemTotal"], sizes["MemAvailable"]
    for limit, usage, cached in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),  # version 1
    ):
        group = root / "sys/fs/cgroup"
        with contextlib.suppress(OSError, ValueError):  # no such group, or no limit: "max"
            most = int((group / limit).read_text())
            statistics = (group / usage).with_name("memory.stat").read_text()
            cache = re.search(rf"^{cached} (\d+)$", statistics, re.MULTILINE)  # is given back when wanted
            used = int((group / usage).read_text()) - (int(cache[1]) if cache else 0)
            total, available = min(total, most), min(available, most - used)
    return total, available


# --- addresses ----------------------------------------------------------------------------------------


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


def is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def resolve(name: str) -> list[str]:
    """The addresses that this host knows a name by; none where it does not know it."""
    try:
        answers = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return list(dict.fromkeys(str(answer[4][0]) for answer in answers))


def is_this_machine(name: str) -> bool:
    """Whether a name leads to addresses that this machine itself holds."""
    held, found = {address for _, address in interfaces()}, resolve(name)
    return bool(found) and all(address in held or is_loopback(address) for address in found)


# --- ports --------------------------------------------------------------------------------------------


def listen(port: int) -> socket.socket:
    """A listening socket on all addresses; port 0: a free one, which stays so when this lets go of it.

    Raises:
        OSError: the port is in use, or one may not take it.
    """
    for candidate in [] if port else random.sample(FREE_PORTS, 20):
        with contextlib.suppress(OSError):
            return _listen(candidate)
    return _listen(port)


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        except OSError as error:
            if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):  # those: no IPv6 here
                raise
    return socket.create_server(("", port))


def reach(target: Sequence[Any], nonce: str) -> dict[str, Any]:
    """Connect to ``(address, port)``: our ``own`` address towards it, or the ``fault``.

    The nonce tells the listener from whatever else stands at that address as seen from this host.
    """
    start, said = time.monotonic(), b""
    try:
        with socket.create_connection((target[0], target[1]), REACH_SECONDS) as line:
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


def reach_all(targets: Collection[Sequence[Any]], nonce: str) -> list[dict[str, Any]]:
    """`reach` for each target, all at once."""
    with ThreadPoolExecutor(max(1, len(targets))) as pool:
        return list(pool.map(lambda target: reach(target, nonce), targets))


# --- processes ----------------------------------------------------------------------------------------


def holder(port: int) -> str:
    """Who listens on a port: ``"process 4711 (python train.py)"``, as far as this user may see it."""
    sockets = set()
    for path in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        for line in path.read_text().splitlines()[1:] if path.exists() else ():
            fields = line.split()
            if fields[3] == "0A" and int(fields[1].rsplit(":", 1)[1], 16) == port:  # 0A: listening
                sockets.add(f"socket:[{fields[9]}]")
    for pid in processes():
        if sockets.intersection(open_files(pid)):
            return f"process {pid} ({command_line(pid)[:80]})"
    return "a process that this user cannot see"


def processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def command_line(pid: int) -> str:
    """The words of a process; empty where it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""


def open_files(pid: int) -> Iterator[str]:
    """What the descriptors of a process lead to, as far as this user may see them."""
    with contextlib.suppress(OSError):
        for number in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):  # closed meanwhile
                yield os.readlink(f"/proc/{pid}/fd/{number}")


def environment(pid: int) -> list[bytes]:
    """``NAME=value`` of a process as it began; empty where it is gone, or another user's."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return []


def stat(pid: int) -> list[str]:
    """State, parent and more of a process, as /proc/PID/stat has them after the name.

    Raises:
        OSError: it is gone.
    """
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
