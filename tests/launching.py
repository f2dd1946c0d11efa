"""Start training as a user does, in real processes, and read what it left."""

import contextlib
import itertools
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

from fixtures import ROOT

_ports = itertools.cycle((os.getpid() + i) % 1000 for i in range(1000))
BIN = Path(sys.executable).parent
NANO = ROOT / "scripts" / "make_nano.py"


def environment() -> dict[str, str]:
    """The user's, with this Python's commands first and one thread per process."""
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def free_port() -> int:
    """A port that stays free until it is used, seconds later: other tests' sockets are given those from 32768
    on, and each test process has a thousand of its own."""
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 12
    for port in _ports:
        port += 20000 + 1000 * number
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise AssertionError


def run(command, cwd=ROOT, timeout=600, **env) -> subprocess.CompletedProcess:
    """Exit code and output of a command, stderr after stdout."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**environment(), **env},
        timeout=timeout,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done


def deepspeed(script, *words, processes=2, cwd=ROOT, **env) -> subprocess.CompletedProcess:
    """`deepspeed` on this machine, as the vendor's README starts it."""
    launcher = [BIN / "deepspeed", "--hostfile=", "--num_gpus", processes, "--master_port", free_port()]
    return run([*launcher, script, *words], cwd=cwd, **env)


def make_nano(directory: Path, *words) -> Path:
    done = run([sys.executable, NANO, directory, *words])
    assert done.returncode == 0, done.stdout
    return directory


def flags(**values) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def log_of(directory: Path) -> list[dict]:
    """The updates of trainer_log.jsonl."""
    rows = [json.loads(line) for line in (directory / "trainer_log.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def error_lines(output: str) -> list[str]:
    assert "Traceback" not in output, output
    return re.findall(r"^error(?: \(rank \d+\))?: .*$", output, re.MULTILINE)
