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

from baichuan_sft import __version__, machine, ops_cache
from baichuan_sft.doctor import devices
from baichuan_sft.errors import UserError

PACKAGES = ("torch", "transformers", "deepspeed", "peft", "accelerate", "safetensors")
WHOLE = 64 << 20  # bytes up to which a file is hashed whole
BLOCK, BLOCKS = 1 << 20, 64  # of a larger one so many of these bytes
MODEL_FILES = (
    *("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json"),
    *("adapter_config.json", "*.safetensors.index.json", "*.bin.index.json", "*.safetensors", "*.bin"),
)


def fingerprint(path: Path, blocks: int = BLOCKS, whole: int = WHOLE) -> str:
    """Size and sha256 of a file; beyond ``whole`` bytes of blocks, evenly from its head to its tail."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= whole:
            while block := file.read(BLOCK):
                digest.update(block)
        else:
            for number in range(blocks):
                file.seek((size - BLOCK) * number // (blocks - 1))
                digest.update(file.read(BLOCK))
    return f"{size:,} bytes, sha256 {digest.hexdigest()[:12]}"


def together(files: dict[str, str]) -> str:
    """One digest of many files."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:12]


def digests(paths: dict[str, Path], **more: Any) -> dict[str, Any]:
    files = {name: fingerprint(path) for name, path in paths.items()}
    return {"digest": together(files), "files": files, **more}


def package_versions() -> dict[str, str]:
    """Of Python and the packages that this one stands on; torch is not imported for it."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def versions(ask: dict[str, Any]) -> dict[str, str]:
    """With this package, CUDA and NCCL."""
    found = package_versions() | {"baichuan-sft": __version__}
    for package in metadata.distributions():
        name = package.metadata["Name"] or ""
        if re.fullmatch(r"nvidia-(nccl|cuda-runtime)(-cu\d+)?", name):
            found[name.split("-cu")[0].removeprefix("nvidia-")] = package.version
    return found


def code(ask: dict[str, Any]) -> dict[str, Any]:
    """Of this package's own files: a version number does not change with every edit."""
    root = Path(__file__).parents[1]
    return digests({str(path.relative_to(root)): path for path in root.rglob("*.py")}, path=str(root))


def model(ask: dict[str, Any]) -> dict[str, Any]:
    folder = Path(ask["model"]).expanduser()
    if not folder.is_dir():
        return {"error": f"{folder}: no such directory"}
    paths = {path.name: path for pattern in MODEL_FILES for path in folder.glob(pattern)}
    return digests(paths, path=str(folder.absolute()))


def data(ask: dict[str, Any]) -> dict[str, Any]:
    from baichuan_sft.data.sources import parse_sources  # knows patterns, shares and lists

    try:
        paths = [Path(source.path) for source in parse_sources(ask["data"], allow_outside=True)]
        inner = [file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*")))]
    except UserError as error:
        return {"error": str(error)}
    return digests({str(path): path for path in inner if path.is_file()})


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
    return digests({str(path): path}, stage=stage)


def existing(path: Path) -> Path:
    """The directory itself, or the nearest one above it."""
    return next(one for one in (path, *path.parents) if one.is_dir())


def disk(ask: dict[str, Any]) -> dict[str, Any]:
    """Room where the output goes, and whether one may write there."""
    place = existing(Path(ask["output"]).expanduser().absolute())
    found: dict[str, Any] = {"path": str(place), "free": shutil.disk_usage(place).free, "refused": ""}
    found["kind"] = machine.disk_kind(place)
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        found["refused"] = error.strerror
    return found


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
        found = dict(zip(asked, pool.map(machine.resolve, asked)))
    return {"hostname": own, "own": found[own], "resolved": found, "interfaces": interfaces()}


def interfaces() -> dict[str, str]:
    """IPv4 address of each interface that leads somewhere."""
    found = [(name, address) for name, address in machine.interfaces() if ":" not in address]
    return {name: address for name, address in found if name != "lo" and not name.startswith(machine.VIRTUAL)}


def caches(ask: dict[str, Any]) -> dict[str, list[str]]:
    """Where compiled code is kept: path and kind of file system."""
    chosen = {name: os.environ.get(name) for name in ops_cache.VARIABLES} | ops_cache.variables()
    paths = {name: Path(path).expanduser().absolute() for name, path in chosen.items() if path}
    return {name: [str(path), machine.disk_kind(existing(path))] for name, path in paths.items()}


def locks(ask: dict[str, Any]) -> list[dict[str, Any]]:
    """Locks of torch's compiler: one that nobody holds makes every later start wait for ever.

    Training removes those where it compiles; the usual place belongs to other programs too.
    """
    roots = {Path(caches(ask)["TORCH_EXTENSIONS_DIR"][0]), Path("~/.cache/torch_extensions").expanduser()}
    found = [lock for root in sorted(roots) for lock in ops_cache.locks(root)]
    return [{"path": str(lock), "stale": not ops_cache.is_held(lock)} for lock in found]


def python(ask: dict[str, Any]) -> dict[str, str]:
    return {"executable": sys.executable, "workdir": os.getcwd()}


FACTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "python": python,
    "identity": lambda ask: machine.identity(),
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
