"""Where the kernels compiled on this host lie, and the lock that a killed build leaves there.

torch waits for such a lock for ever, without a word.
"""

from __future__ import annotations

import hashlib
import math
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

from baichuan_sft import machine

SHARED_SECONDS = 1800.0  # longer than any build
VARIABLES = {"TORCH_EXTENSIONS_DIR": "torch", "TRITON_CACHE_DIR": "triton"}


def ops_root() -> Path:
    """One directory per host, environment, Python and torch.

    A shared home serves hosts that must not share kernels, and two environments that name their own
    headers in the build file would compile them anew in turns.
    """
    try:
        torch = metadata.version("torch")
    except metadata.PackageNotFoundError:
        torch = "none"
    name = f"{socket.gethostname()}-py{sys.version_info[0]}.{sys.version_info[1]}-torch{torch}"
    name += "-" + hashlib.sha256(sys.prefix.encode()).hexdigest()[:8]
    base = os.environ.get("BAICHUAN_SFT_CACHE") or "~/.cache/baichuan_sft"
    root = Path(base).expanduser() / "ops" / name
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError:  # no home, or one that is read-only
        root = Path(tempfile.gettempdir()) / f"baichuan_sft-{os.getuid()}" / "ops" / name
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
    return root


def variables(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment variables that point there, without those the user has set."""
    unset = {name: folder for name, folder in VARIABLES.items() if not environment.get(name)}
    root = ops_root() if unset else Path()
    return {name: str(root / folder) for name, folder in unset.items()}


def use_ops_cache(needed: Iterable[str] = ()) -> list[str]:
    """Point torch and Triton to this host's directory and free it; returns the lines to show.

    Args:
        needed: the DeepSpeed ops that the run will call ("cpu_adam").
    """
    os.environ.update(variables())
    root = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    notices = []
    if os.environ.get("LOCAL_RANK", "0") == "0":  # one process per host: another's new lock must stay
        notices += [f"{lock}: left by a build that was killed, removed" for lock in remove_stale_locks(root)]
        missing = [name for name in needed if not any(root.rglob(f"{name}*.so"))]
        notices += [f"compiling {name} for this host, about 2 min (once)" for name in missing]
    return notices


def building(root: Path) -> list[str]:
    """The ops that a live process is compiling."""
    return sorted(lock.parent.name for lock in locks(root) if is_held(lock))


def remove_stale_locks(root: Path) -> list[Path]:
    """Remove locks that no live process holds; a builder keeps its lock open while it builds.

    On a disk that other hosts share, where a builder may be unseen, only those that no build can still hold.
    """
    youngest = time.time() - SHARED_SECONDS if _is_shared(root) else math.inf
    stale = [lock for lock in locks(root) if not is_held(lock) and _changed(lock) < youngest]
    for lock in stale:
        lock.unlink(missing_ok=True)
    return stale


def _is_shared(path: Path) -> bool:
    """Whether a directory lies on a network disk and is not named for this host."""
    ours = any(part.startswith(f"{socket.gethostname()}-py") for part in path.parts)
    return not ours and bool(machine.NETWORK_DISKS.match(machine.disk_kind(path)))


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # its builder is done
        return math.inf


def locks(root: Path) -> list[Path]:
    """ROOT/OP/lock, or ROOT/py311_cpu/OP/lock where torch adds a folder."""
    return [*root.glob("*/lock"), *root.glob("*/*/lock")]


def is_held(path: Path) -> bool:
    """Whether a live process has a file open; the file of another user counts as held."""
    target = str(path.resolve())
    try:
        owner = path.stat().st_uid
    except FileNotFoundError:
        return False
    if owner not in (os.getuid(), os.geteuid()) and os.geteuid() != 0:
        return True
    return any(target in machine.open_files(process) for process in machine.processes())
