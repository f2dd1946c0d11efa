"""Where prepared data is kept between runs, and which file it was made of."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from baichuan_sft.data.findings import DataFault, Finding
from baichuan_sft.data.progress import Progress
from baichuan_sft.errors import EnvironmentFault

BLOCK = 4 << 20
LARGE = 64 << 20  # bytes; hashing takes a noticeable part of a second
RACY_SECONDS = 2  # a file may be written twice within one tick of its clock


@dataclass(frozen=True)
class Identity:
    """One state of a data file: the content by ``sha256``, the rest to notice a change without reading."""

    path: str
    size: int
    mtime_ns: int
    inode: int
    sha256: str


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """The cache directory, made where it is missing: the argument, ``$BAICHUAN_SFT_CACHE``, or in the home.

    Raises:
        EnvironmentFault: it cannot be made.
    """
    root = Path(cache_dir or os.environ.get("BAICHUAN_SFT_CACHE") or "~/.cache/baichuan_sft").expanduser()
    try:
        (root / "files").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise no_cache(root, error) from None
    return root


def no_cache(root: Path, error: OSError) -> EnvironmentFault:
    way_out = "set BAICHUAN_SFT_CACHE to a writable directory with space"
    return EnvironmentFault(f"cache directory {root}: {error.strerror}; {way_out}")


def identity(path: str, root: Path) -> Identity:
    """What the file holds now; read only if its size, time or inode is not the one last seen.

    Raises:
        DataFault: the file is not the one that ``data check`` found good, or changes while it is read.
    """
    memo = _memo(path, root)
    if os.path.getsize(path) > LARGE:
        with contextlib.suppress(OSError), FileLock(f"{memo}.lock"):  # one process hashes, the others read
            return _identity(path, memo)
    return _identity(path, memo)


def _identity(path: str, memo: Path) -> Identity:
    last = _read(memo)
    found = _stat(path)
    if last and found == {name: last.get(name) for name in found}:
        return Identity(path, **found, sha256=last["sha256"])
    state = Identity(path, **found, sha256=_sha256(path))
    require_unchanged(state, hashed=True)
    pinned = (last or {}).get("checked")
    if pinned and pinned["sha256"] != state.sha256:
        then, now = pinned["sha256"][:12], state.sha256[:12]
        what = f"({pinned['time']}: sha256 {then}, now {now}); run `baichuan-sft data check {path}` again"
        raise _changed(path, what)
    if abs(time.time_ns() - state.mtime_ns) > RACY_SECONDS * 10**9:
        with contextlib.suppress(EnvironmentFault):  # of a cache that can only be read
            _write(memo, {**asdict(state), "checked": pinned})
    return state


def pin(state: Identity, root: Path) -> None:
    """Remember that this content was checked and found good; any other one is refused from now on."""
    checked = {"sha256": state.sha256, "time": time.strftime("%Y-%m-%d %H:%M:%S")}
    _write(_memo(state.path, root), {**asdict(state), "checked": checked})


def unpin(path: str, root: Path) -> None:
    """Forget what was checked: the file is going to be checked again."""
    try:
        _memo(path, root).unlink(missing_ok=True)
    except OSError as error:
        raise no_cache(root, error) from error


def require_unchanged(state: Identity, *, hashed: bool = False) -> None:
    """
    Args:
        hashed: compare size, time and inode only, not the content.
    Raises:
        DataFault: the file is no longer what it was.
    """
    try:
        changed = [name for name, value in _stat(state.path).items() if getattr(state, name) != value]
        if not changed and not hashed and _sha256(state.path) != state.sha256:
            changed = ["sha256"]
    except OSError as error:
        changed = [error.strerror or "gone"]
    if changed:
        raise _changed(state.path, f"({', '.join(changed)}); let nothing write to it and start again")


def _changed(path: str, what: str) -> DataFault:
    finding = Finding("DATA090", path, f"changed after it was checked {what}")
    return DataFault(str(finding), [finding])


def digest(*parts: Any) -> str:
    """sha256 of texts, bytes and whatever JSON can say."""
    total = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode()
        total.update(hashlib.sha256(data).digest())
    return total.hexdigest()


def _stat(path: str) -> dict[str, Any]:
    found = [os.stat(path)]
    if os.path.isdir(path):
        found += [entry.stat() for entry in os.scandir(path)]
    size, newest = sum(stat.st_size for stat in found), max(stat.st_mtime_ns for stat in found)
    return {"size": size, "mtime_ns": newest, "inode": found[0].st_ino}


def _sha256(path: str) -> str:
    total = hashlib.sha256()
    if os.path.isdir(path):  # of `datasets`
        for entry in sorted(Path(path).iterdir()):
            total.update(f"{entry.name} {_sha256(str(entry))}".encode())
        return total.hexdigest()
    with open(path, "rb") as file, Progress(f"hashing {path}", os.path.getsize(path)) as progress:
        while block := file.read(BLOCK):
            total.update(block)
            progress.update(file.tell())
    return total.hexdigest()


def _memo(path: str, root: Path) -> Path:
    return root / "files" / f"{hashlib.sha1(os.path.realpath(path).encode()).hexdigest()}.json"


def _read(memo: Path) -> dict[str, Any] | None:
    try:
        return json.loads(memo.read_text())
    except (OSError, ValueError):
        return None


def _write(memo: Path, content: dict[str, Any]) -> None:
    temporary = memo.with_suffix(f".{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(content))
        os.replace(temporary, memo)
    except OSError as error:
        raise no_cache(memo.parent, error) from error
