"""What one host says of itself. The standard library only: a probe starts in a tenth of a second.

Each function takes what was asked for (paths, names) and returns JSON; ``FACTS`` names them.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import resource
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

from baichuan_sft import __version__, ops_cache
from baichuan_sft.doctor import devices
from baichuan_sft.doctor.network import interfaces, resolve
from baichuan_sft.errors import UserError

PACKAGES = ("torch", "transformers", "deepspeed", "peft", "accelerate")
WHOLE = 64 << 20  # bytes up to which a file is hashed whole
BLOCK, BLOCKS = 1 << 20, 64  # of a larger one so many, from its head to its tail
MODEL_FILES = (
    *(
        "config.json",
        "generation_config.json",
        "tokenizer*",
        "special_tokens_map.json",
        "adapter_config.json",
    ),
    *("*.safetensors.index.json", "*.bin.index.json", "*.safetensors", "*.bin"),
)
# File systems that several hosts may share; a lock or a cache on one is seen by all, and may not hold.
NETWORK_KINDS = re.compile(r"nfs|cifs|smb|lustre|gpfs|beegfs|ceph|gluster|9p|afs|fuse\.(?!fuseiso)")
CACHES = ("TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR")


def fingerprint(path: Path) -> str:
    """Size and sha256 of a file; beyond 64 MiB of 64 blocks of 1 MiB, evenly from its head to its tail."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= WHOLE:
            while block := file.read(BLOCK):
                digest.update(block)
        else:
            for number in range(BLOCKS):
                file.seek((size - BLOCK) * number // (BLOCKS - 1))
                digest.update(file.read(BLOCK))
    return f"{size:,} bytes, sha256 {digest.hexdigest()[:12]}"


def together(files: dict[str, str]) -> str:
    """One digest of many files."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:12]


def versions(ask: dict[str, Any]) -> dict[str, str]:
    """Of Python, this package, those it stands on, CUDA and NCCL; torch is not imported for it."""
    found = {"python": platform.python_version(), "baichuan-sft": __version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    for package in metadata.distributions():
        name = package.metadata["Name"] or ""
        if re.fullmatch(r"nvidia-(nccl|cuda-runtime)(-cu\d+)?", name):
            found[name.split("-cu")[0].removeprefix("nvidia-")] = package.version
    return found


def code(ask: dict[str, Any]) -> dict[str, Any]:
    """Of this package's own files: a version number does not change with every edit."""
    root = Path(__file__).parents[1]
    files = {str(path.relative_to(root)): fingerprint(path) for path in sorted(root.rglob("*.py"))}
    return {"digest": together(files), "files": files, "path": str(root)}


def model(ask: dict[str, Any]) -> dict[str, Any]:
    folder = Path(ask["model"]).expanduser()
    if not folder.is_dir():
        return {"error": f"{folder}: no such directory"}
    files = {path.name: fingerprint(path) for pattern in MODEL_FILES for path in folder.glob(pattern)}
    return {"digest": together(files), "files": files, "path": str(folder.absolute())}


def data(ask: dict[str, Any]) -> dict[str, Any]:
    from baichuan_sft.data.sources import parse_sources  # knows patterns, shares and lists

    try:
        paths = [Path(source.path) for source in parse_sources(ask["data"], allow_outside=True)]
        inner = [file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*")))]
        files = {str(path): fingerprint(path) for path in inner if path.is_file()}
    except UserError as error:
        return {"error": str(error)}
    return {"digest": together(files), "files": files}


def config(ask: dict[str, Any]) -> dict[str, Any]:
    """The DeepSpeed file."""
    path = Path(ask["config"]).expanduser()
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        return {"error": f"{path}: {error.strerror}"}
    except ValueError as error:
        return {"error": f"{path}: not JSON: {error}"}
    stage = value.get("zero_optimization", {}).get("stage", 0) if isinstance(value, dict) else None
    files = {str(path): fingerprint(path)}
    return {"digest": together(files), "files": files, "stage": stage}


def existing(path: Path) -> Path:
    """The directory itself, or the nearest one above it."""
    return next(one for one in (path, *path.parents) if one.is_dir())


def disk(ask: dict[str, Any]) -> dict[str, Any]:
    """Room where the output goes, and whether one may write there."""
    place = existing(Path(ask["output"]).expanduser().absolute())
    found: dict[str, Any] = {"path": str(place), "free": shutil.disk_usage(place).free, "refused": ""}
    found["kind"] = kind_of(place)
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        found["refused"] = error.strerror
    return found


def kind_of(path: Path) -> str:
    """Name of the file system that holds a path ("ext4", "nfs4")."""
    mounts = Path("/proc/mounts")
    best, kind = -1, "unknown"
    for line in mounts.read_text().splitlines() if mounts.exists() else ():
        _, point, name, *_ = line.split()
        if path.is_relative_to(point) and len(point) >= best:  # of two on one point the later counts
            best, kind = len(point), name
    return kind


def shm(ask: dict[str, Any]) -> dict[str, int]:
    return {"bytes": shutil.disk_usage("/dev/shm").total}


def limits(ask: dict[str, Any]) -> dict[str, Any]:
    """Soft limits, None where there is none."""
    kinds = {"nofile": resource.RLIMIT_NOFILE, "memlock": resource.RLIMIT_MEMLOCK}
    soft = {name: resource.getrlimit(kind)[0] for name, kind in kinds.items()}
    return {name: None if value == resource.RLIM_INFINITY else value for name, value in soft.items()}


def names(ask: dict[str, Any]) -> dict[str, Any]:
    """What this host's own name and those of the others lead to, as seen from here."""
    own = socket.gethostname()
    asked = [own, *ask.get("names", [])]
    with ThreadPoolExecutor(len(asked)) as pool:
        found = dict(zip(asked, pool.map(resolve, asked)))
    return {"hostname": own, "own": found[own], "resolved": found, "interfaces": interfaces()}


def identity(ask: dict[str, Any]) -> str:
    """Equal for two names of one host, different for two containers with networks of their own."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    if not boot.exists():
        return platform.node()
    return f"{boot.read_text().strip()} {os.readlink('/proc/self/ns/net')}"


def caches(ask: dict[str, Any]) -> dict[str, list[str]]:
    """Where compiled code is kept: path and kind of file system."""
    chosen = {**ops_cache.variables(), **{name: os.environ[name] for name in CACHES if os.environ.get(name)}}
    paths = {name: Path(path).expanduser().absolute() for name, path in chosen.items()}
    return {name: [str(path), kind_of(existing(path))] for name, path in paths.items()}


def locks(ask: dict[str, Any]) -> list[dict[str, Any]]:
    """Locks of torch's compiler: one that nobody holds makes every later start wait for ever.

    Training removes those where it compiles; the usual place belongs to other programs too.
    """
    roots = {Path(path) for name, (path, _) in caches(ask).items() if name == CACHES[0]}
    found = []
    for root in sorted({*roots, Path("~/.cache/torch_extensions").expanduser()}):
        held = ops_cache.building(root)
        for path in [*root.glob("*/lock"), *root.glob("*/*/lock")]:
            found.append({"path": str(path), "stale": path.parent.name not in held})
    return found


def python(ask: dict[str, Any]) -> dict[str, str]:
    return {"executable": sys.executable, "workdir": os.getcwd(), "version": platform.python_version()}


FACTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "python": python,
    "identity": identity,
    "versions": versions,
    "code": code,
    "model": model,
    "data": data,
    "config": config,
    "devices": devices.devices,
    "disk": disk,
    "shm": shm,
    "limits": limits,
    "names": names,
    "caches": caches,
    "locks": locks,
    "leftovers": devices.leftovers,
}
