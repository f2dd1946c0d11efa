"""The hostfile: which hosts take part, with how many processes each, and how ssh reaches them.

worker-1 slots=8
worker-2 slots=8 port=2222 user=train python=/opt/venv/bin/python workdir=/home/train/baichuan  # comment
"""

from __future__ import annotations

import functools
import ipaddress
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baichuan_sft import machine
from baichuan_sft.errors import UserError, suggest

MAX_SLOTS = 256  # no host holds more devices; a larger number is a slip of the hand
# RFC 1123, and the underscore that compose files and ssh aliases use. Nothing a shell or ssh could read.
LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_-]{0,61}[A-Za-z0-9])?", re.ASCII)
USER = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}", re.ASCII)
LOOPBACK = ("localhost", "localhost.localdomain", "ip6-localhost")
EXAMPLE = "write it as: worker-1 slots=8"
SSH_OPTIONS = {
    "BatchMode": "yes",  # a question nobody can answer would hang the start
    "ConnectTimeout": "15",
    "ServerAliveInterval": "5",
    "ServerAliveCountMax": "3",
}
# A module is found from the directory, whatever login shell reads the line.
IN_DIRECTORY = ("sh", "-c", 'cd -- "$1" && shift && exec "$@"', "sh")


@dataclass(frozen=True)
class Host:
    """One line of a hostfile; ``None`` is ssh's, or this machine's, own value."""

    name: str
    slots: int  # processes to start there, one per device
    line: int = 0  # in the hostfile, from 1; 0: not from a file
    port: int | None = None
    user: str | None = None
    python: str | None = None
    workdir: str | None = None


def read_hostfile(path: str | Path) -> list[Host]:
    """The hosts of a file, in its order: the first leads the run.

    Raises:
        UserError: every fault of the file, each as ``path:line: what; way out``.
    """
    hosts: list[Host] = []
    faults: list[str] = []
    seen: dict[str, int] = {}
    for number, text in _lines(path):
        try:
            host = _host(text, number)
        except ValueError as fault:
            faults.append(f"{path}:{number}: {fault}")
            continue
        first = seen.setdefault(_identity(host.name), number)
        if first != number:
            again = f"{host.name} is the host of line {first} again"
            faults.append(f"{path}:{number}: {again}; give each host one line with all its slots")
        hosts.append(host)
    if not hosts and not faults:
        faults.append(f"{path}: names no host; {EXAMPLE}")
    if faults:
        raise UserError("\n".join(faults))
    return hosts


def ssh_words(host: Host, words: Iterable[str]) -> list[str]:
    """Argv that runs ``words`` on a host; quoted, since ssh hands one string to the login shell there.

    Host keys are left to the user's own ssh configuration: nothing here turns their check off.
    """
    options = [word for name, value in SSH_OPTIONS.items() for word in ("-o", f"{name}={value}")]
    return ["ssh", "-T", *options, *login_words(host), "--", host.name, shlex.join(words)]


def login_words(host: Host) -> list[str]:
    """What ssh must be told of a host before its name."""
    port = [] if host.port is None else ["-p", str(host.port)]
    return port + ([] if host.user is None else ["-l", host.user])


@functools.cache  # a name that nobody knows is slow to look up
def is_local(host: Host) -> bool:
    """Whether it needs no ssh: this machine, as this user."""
    return host.port is None and host.user is None and machine.is_this_machine(host.name)


def module_words(host: Host, module: str, shell: Sequence[str] = IN_DIRECTORY) -> list[str]:
    """Argv that runs a module of this package on a host, in its working directory.

    Args:
        shell: words that go to the directory that follows them, and run the rest there.
    """
    python, workdir = [host.python or sys.executable, "-m", module], host.workdir or os.getcwd()
    if is_local(host):
        return [*shell, workdir, *python]
    if path := os.environ.get("PYTHONPATH"):
        python = ["env", f"PYTHONPATH={path}", *python]
    return ssh_words(host, [*shell, workdir, *python])


def _lines(path: str | Path) -> list[tuple[int, str]]:
    """Numbered lines with something on them; a byte order mark, CR and comments are gone."""
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"--hostfile {path}: no such file; write one line per host ('worker-1 slots=8'), "
            "or leave --hostfile out to train on this machine alone"
        ) from None
    except OSError as error:
        raise UserError(f"--hostfile {path}: cannot be read ({error.strerror})") from None
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path}: is UTF-16; convert it with: iconv -f utf-16 -t utf-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: is not UTF-8; host names are plain ASCII") from None
    numbered = enumerate(text.split("\n"), 1)
    bare = [(number, re.sub(r"(^|\s)#.*", "", line).strip()) for number, line in numbered]
    return [(number, line) for number, line in bare if line]


def _host(text: str, line: int) -> Host:
    """One host. Raises ValueError with what is wrong in the line."""
    if text.startswith("[") and "]" in text:
        inner = text[1 : text.index("]")]
        if _is_address(inner):
            raise ValueError(f"[{inner}]: write an IPv6 address without brackets")
        raise ValueError(f"[{inner}]: this is the template; put a host name or IP there")
    name, *fields = text.split()
    _check_name(name)
    if "=" in fields:
        raise ValueError(f"{text!r} has blanks around '='; {EXAMPLE}")
    values: dict[str, str] = {}
    for field in fields:
        key, equals, value = field.partition("=")
        if key not in FIELDS:
            raise ValueError(_unknown(field, key))
        if not equals or not value:
            raise ValueError(f"{field!r} has no value; {EXAMPLE}, without blanks around '='")
        if key in values:
            raise ValueError(f"{key}= stands twice in the line")
        values[key] = value
    if not values or fields[0].partition("=")[0] != "slots":  # where DeepSpeed looks for it
        raise ValueError(f"{text!r} needs slots=NUMBER right after the host name; {EXAMPLE}")
    return Host(name=name, line=line, **{key: FIELDS[key](value) for key, value in values.items()})


def _unknown(field: str, key: str) -> str:
    close = suggest(key.lower(), list(FIELDS)) or "."
    return f"unknown field {field!r}{close} Known: {', '.join(f'{name}=' for name in FIELDS)}; {EXAMPLE}"


def _check_name(name: str) -> None:
    if name.startswith("-"):
        raise ValueError(f"host {name!r} starts with '-': ssh would read it as an option")
    user, at, rest = name.rpartition("@")
    if at:
        raise ValueError(f"host {name!r}: write the user as a field: {rest} slots=8 user={user}")
    if _is_address(name):
        return
    host, colon, port = name.partition(":")
    if colon and port.isdecimal():
        raise ValueError(f"host {name!r}: write the port as a field: {host} slots=8 port={port}")
    labels = name.removesuffix(".").split(".")
    if len(name) > 253 or not all(LABEL.fullmatch(label) for label in labels):
        raise ValueError(f"{name!r} is no host name: letters, digits, '-' and '.', or an IP address")
    if labels[-1].isdecimal() and len(labels) > 1:
        raise ValueError(f"{name!r} is no IP address (four numbers from 0 to 255)")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return "%" not in name  # a zone may hold anything, and means nothing on another host


def _identity(name: str) -> str:
    """What two spellings of one host have in common, as far as the file alone can tell."""
    name = name.lower().removesuffix(".")
    if not _is_address(name):
        return "this machine" if name in LOOPBACK else name
    address = ipaddress.ip_address(name)
    return "this machine" if address.is_loopback else str(address)


def _number(name: str, low: int, high: int, text: str) -> int:
    # isdecimal() is true of full-width digits too
    value = int(text) if re.fullmatch(r"[0-9]{1,9}", text) else None
    if value is None or not low <= value <= high:
        raise ValueError(f"{name}={text}: needs a whole number from {low} to {high}; {EXAMPLE}")
    return value


def _user(text: str) -> str:
    if not USER.fullmatch(text):
        raise ValueError(f"user={text}: is no user name")
    return text


def _path(text: str) -> str:
    if not text.startswith("/"):
        raise ValueError(f"{text!r} must be an absolute path on that host")
    return text


# field -> what reads its value; the order of the README
FIELDS: dict[str, Callable[[str], Any]] = {
    "slots": functools.partial(_number, "slots", 1, MAX_SLOTS),
    "port": functools.partial(_number, "port", 1, 65535),
    "user": _user,
    "python": _path,
    "workdir": _path,
}
