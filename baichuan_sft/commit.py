"""What makes a saved directory count: a manifest of its files' sizes and hashes, and COMMIT over that.

    checkpoint-40/
        model.safetensors, ...      written and fsynced first
        manifest.json               {"format": 1, "step": 40, "files": {name: {"size", "sha256", "rank"}}}
        COMMIT                      sha256 of manifest.json; renamed into place last, removed first

So after a kill or a power cut a directory either counts and is whole, or does not count.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

FORMAT = 1
MANIFEST, COMMIT = "manifest.json", "COMMIT"
OWN = {MANIFEST, COMMIT, f"{MANIFEST}.tmp", f"{COMMIT}.tmp"}
# What a loader could take for weights or training state: may not lie beside the listed files unlisted.
LOADED = (".safetensors", ".bin", ".pt", ".pth", ".index.json")
BLOCK = 1 << 20
# hashlib and read let other threads run; more of them would only wait for the disk.
THREADS = min(8, os.cpu_count() or 1)

Entry = dict[str, Any]  # "size" in bytes, "sha256" in hex, "rank" that wrote it
Entries = dict[str, Entry]


def sha256_of(path: str | Path) -> str:
    digest, block = hashlib.sha256(), bytearray(BLOCK)
    view = memoryview(block)
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(view[:size])
    return digest.hexdigest()


def sync(path: str | Path) -> None:
    """fsync of a file's content, or of a directory's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a directory; their names are durable at once.
        if error.errno != errno.EINVAL or not os.path.isdir(path):
            raise
    finally:
        os.close(descriptor)


def write_synced(path: Path, text: str) -> None:
    """A whole file or none, also after a power cut."""
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)


def files_of(directory: str | Path) -> list[str]:
    """Relative names of all files in a directory and below, but the manifest's own, in order."""
    root = Path(directory)
    names = (path.relative_to(root).as_posix() for path in root.rglob("*") if not path.is_dir())
    return sorted(name for name in names if name not in OWN)


def stamps(directory: str | Path) -> dict[str, tuple[int, ...]]:
    """Of each file in a directory itself: what changes when it is written anew."""
    stats = {path.name: path.stat() for path in Path(directory).iterdir() if path.is_file()}
    stats.pop("run.lock", None)  # touched every few seconds
    return {name: (stat.st_ino, stat.st_mtime_ns, stat.st_size) for name, stat in stats.items()}


def entries_of(directory: str | Path, names: Iterable[str], rank: int = 0) -> Entries:
    """Hash these files, several at a time, and put them safely on disk."""

    def entry(name: str) -> Entry:
        path = Path(directory, name)
        sync(path)
        return {"size": path.stat().st_size, "sha256": sha256_of(path), "rank": rank}

    names = list(names)
    return dict(zip(names, side_by_side(entry, names)))


def side_by_side(function: Callable[[str], Any], names: list[str]) -> list[Any]:
    with ThreadPoolExecutor(max(1, min(THREADS, len(names)))) as pool:
        return list(pool.map(function, names))


def write_manifest(directory: str | Path, entries: Entries, **facts: Any) -> None:
    """Write manifest.json over files that are safely on disk, and put their directories there too."""
    root = Path(directory)
    inner = {parent for name in entries for parent in Path(name).parents}
    for folder in sorted(inner, key=lambda path: -len(path.parts)):
        sync(root / folder)
    sync(root.parent)
    manifest = {"format": FORMAT, **facts, "files": dict(sorted(entries.items()))}
    write_synced(root / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")


def commit(directory: str | Path) -> None:
    """From here on the directory counts."""
    write_synced(Path(directory, COMMIT), sha256_of(Path(directory, MANIFEST)) + "\n")


def uncommit(directory: str | Path) -> None:
    """From here on the directory does not count: before its files are overwritten or removed."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(Path(directory, COMMIT))
        sync(directory)


def remove(directory: str | Path) -> None:
    """Delete a directory so that half of it never counts.

    Raises:
        OSError: something in it cannot be deleted; what is left does not count.
    """
    uncommit(directory)
    shutil.rmtree(directory)


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """
    Raises:
        ValueError: there is none, it is not what COMMIT says, or it names files outside its directory.
    """
    path, seal = Path(directory, MANIFEST), Path(directory, COMMIT)
    if not seal.is_file():
        raise ValueError("incomplete (no COMMIT)")
    if not path.is_file():
        raise ValueError(f"{MANIFEST}: no such file")
    if seal.read_bytes().strip() != sha256_of(path).encode():
        raise ValueError(f"{MANIFEST}: is not what COMMIT was made of")
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError:
        raise ValueError(f"{MANIFEST}: not JSON") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{MANIFEST}: not of format {FORMAT}")
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise ValueError(f"{MANIFEST}: has no files")
    for name, entry in files.items():
        if not name or Path(name).is_absolute() or ".." in Path(name).parts or "\\" in name or "\0" in name:
            raise ValueError(f"{MANIFEST}: {name!r} leads out of the directory")
        if not (isinstance(entry, dict) and type(entry.get("size")) is int and "sha256" in entry):
            raise ValueError(f"{MANIFEST}: entry {name!r} has no size and sha256")
    return manifest


def problems(directory: str | Path, files: Iterable[str] | None = None, *, hashes: bool = True) -> list[str]:
    """What is wrong with a committed directory, each with the file's name; empty where it is whole.

    Args:
        files: look at these alone (none of them: at COMMIT and the manifest alone); default at all, and
            at whether weights lie there that are not listed.
        hashes: False compares sizes only, which reads nothing.
    """
    try:
        listed: Mapping[str, Entry] = read_manifest(directory)["files"]
    except (ValueError, OSError) as error:
        return [str(error)]
    names = sorted(listed) if files is None else list(files)
    looked = side_by_side(lambda name: problem(directory, name, listed, hashes), names)
    found = [what for what in looked if what]
    if files is None:
        folders = {Path(name).parent for name in listed}
        found += [
            f"{name}: not in the manifest"
            for name in files_of(directory)
            if name not in listed and name.endswith(LOADED) and Path(name).parent in folders
        ]
    return found


def problem(directory: str | Path, name: str, listed: Mapping[str, Entry], hashes: bool) -> str | None:
    """What is wrong with one file, or None."""
    path, entry = Path(directory, name), listed.get(name)
    if entry is None:
        return f"{name}: not in the manifest"
    if not path.is_file():
        return f"{name}: missing"
    try:
        short = entry["size"] - path.stat().st_size
        digest = sha256_of(path) if hashes else None
        if not short and digest in (None, entry["sha256"]):
            return None
        other = next((other for other in listed if listed[other]["sha256"] == digest), None)
        what = masquerade(path) or (f"holds what belongs in {other}" if other else None)
    except OSError as error:
        return f"{name}: cannot be read ({error.strerror})"
    if what is None and short:
        what = f"{abs(short):,} bytes {'short' if short > 0 else 'too long'}"
    return f"{name}: {what or 'checksum differs'}"


def masquerade(path: str | Path) -> str | None:
    """What a file is that came instead of the one asked for, where its first bytes tell."""
    with open(path, "rb") as file:
        head = file.read(256).lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer; run `git lfs pull`"
    if head.startswith((b"<!doctype html", b"<html")):
        return "is an HTML page, not weights; download it again"
    return None


# --- the checkpoints of a run -------------------------------------------------------------------------


def step_of(directory: str | Path) -> int:
    """40 of ``checkpoint-40``; -1 of any other name."""
    match = re.fullmatch(r"checkpoint-(0|[1-9]\d*)", Path(directory).name)
    return int(match.group(1)) if match else -1


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Checkpoint directories, the newest first: by step, for clocks jump and copies have new times."""
    root = Path(output_dir)
    found = [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    return sorted((path for path in found if step_of(path) >= 0), key=step_of, reverse=True)


def newest_valid(output_dir: str | Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, every hash compared, and a line on each newer one that is not."""
    broken: list[str] = []
    chosen = None
    for path in checkpoints(output_dir):
        found = problems(path)
        if not found:
            chosen = path
            break
        broken.append(f"{path.name}: {summary(found)}")
    then = f"using {chosen.name}" if chosen else "and no older one is whole"
    return chosen, [f"{line}, {then}" for line in broken]


def summary(found: list[str]) -> str:
    """The first problems in one line, and how many more there are."""
    more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
    return "; ".join(found[:3]) + more


def expired(output_dir: str | Path, keep: int, protected: Iterable[str | Path | None] = ()) -> list[Path]:
    """Committed checkpoints beyond the ``keep`` newest, the oldest first; those to keep count among them.

    The newest whole one is never among them. What is not committed is left alone: it may be another
    program's, and a run that comes to that step again replaces it.
    """
    known = {Path(path).name for path in protected if path is not None}
    committed = [path for path in checkpoints(output_dir) if not problems(path, ())]
    newest = next((path for path in committed if not problems(path, hashes=False)), None)
    safe = [path for path in committed if path == newest or path.name in known]
    rest = [path for path in committed if path not in safe]
    return rest[max(0, keep - len(safe)) :][::-1]
