"""What must be equal on all hosts before ranks start. Standard library only."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import socket
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "deepspeed", "peft", "accelerate", "safetensors")
EDGE = 1 << 20  # bytes hashed at both ends of a large file


def facts(files: list[str]) -> dict[str, Any]:
    """Facts of this host: who it is, how ssh reached it, versions, and digests of ``files``."""
    connection = os.environ.get("SSH_CONNECTION", "").split()
    return {
        "hostname": socket.gethostname(),
        "identity": identity(),
        "address": connection[2] if len(connection) == 4 else None,
        "python": sys.executable,
        "workdir": os.getcwd(),
        "same": {**versions(), **{f"file {name}": digest(Path(name)) for name in files}},
    }


def identity() -> str:
    """Equal for two names of one host, different for two containers with networks of their own."""
    parts = [platform.node()]
    with contextlib.suppress(OSError):
        parts = [Path("/proc/sys/kernel/random/boot_id").read_text().strip()]
        parts += [os.readlink(f"/proc/self/ns/{kind}") for kind in ("net", "pid")]
    return " ".join(parts)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found | {"baichuan_sft": code_digest()}


def code_digest() -> str:
    """Of this package's own files: a version number does not change with every edit."""
    root = Path(__file__).parents[1]
    total = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        total.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return total.hexdigest()[:12]


def digest(path: Path) -> str:
    """Size and a hash of a file's two ends, or of what a directory holds; training itself hashes all data."""
    try:
        if path.is_dir():
            inner = sorted(child for child in path.iterdir() if child.is_file())
            text = "".join(f"{child.name} {digest(child)}\n" for child in inner)
            return f"{len(inner)} files {hashlib.sha256(text.encode()).hexdigest()[:12]}"
        with path.open("rb") as file:
            total, size = hashlib.sha256(file.read(EDGE)), path.stat().st_size
            file.seek(max(EDGE, size - EDGE))
            total.update(file.read(EDGE))
        return f"{size:,} bytes {total.hexdigest()[:12]}"
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return error.strerror or type(error).__name__
