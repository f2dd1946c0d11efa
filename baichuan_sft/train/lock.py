"""One run per output directory, and no lock that outlives its run."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from baichuan_sft import machine
from baichuan_sft.errors import EnvironmentFault, UserError
from baichuan_sft.train.progress import say

NAME = "run.lock"
# The holder touches its lock so often; one that is older by the file system's own clock has no holder.
BEAT_SECONDS, LOST_SECONDS = 5.0, 60.0


def identity() -> dict[str, Any]:
    """This process, so that no other is taken for it: pids are used again, and are local to a container."""
    return {
        "host": os.uname().nodename,
        "pid": os.getpid(),
        "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        "pids": os.readlink("/proc/self/ns/pid"),
        "started": started(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M"),
        "launch": this_launch()[0],
    }


def this_launch() -> tuple[str | None, bool]:
    """Name of the `launch` that started this rank, if one did, and whether it has started again since."""
    name, _, restarts = os.environ.get("BAICHUAN_SFT_LAUNCH", "").partition(":")
    return name or None, restarts not in ("", "0")


def started(pid: int) -> int | None:
    """Clock ticks from boot to the start of a process; None where there is none, or it waits to be reaped."""
    try:
        fields = machine.stat(pid)
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


# Loader processes are forks; a lock must not live on in one that outlives its run.
_held: set[int] = set()


def _close_held() -> None:
    for file in _held:
        _close(file)


os.register_at_fork(after_in_child=_close_held)


@contextlib.contextmanager
def locked(output_dir: str, each_host: bool = False) -> Iterator[None]:
    """Hold an output directory; the first rank does, or each host's where each has a directory of its own.

    Raises:
        UserError: another run holds it. EnvironmentFault: it cannot be written.
    """
    if os.environ.get("LOCAL_RANK" if each_host else "RANK", "0") != "0":
        yield
        return
    path = Path(output_dir, NAME)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = take(path)
    except OSError as error:
        raise EnvironmentFault(f"--output_dir {output_dir}: cannot be written: {error.strerror}.") from None
    owner = os.getpid()
    _held.add(file)
    released = threading.Event()
    threading.Thread(target=_beat, args=(file, released), daemon=True, name="lock").start()
    try:
        yield
    finally:
        released.set()
        if os.getpid() == owner:
            _release(path, file)


def take(path: Path) -> int:
    """File descriptor of the lock, which is this process's from now on.

    Raises:
        UserError: another process holds it. OSError: the directory cannot be written.
    """
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            free = _flock(file)
            if not _same(path, file):  # its holder removed it while it was opened here
                os.close(file)
                continue
            reason = stale(_read(file), free, partial(age, path, file))
            if reason is None:
                raise UserError(f"--output_dir {path.parent}: {describe(_read(file))}.")
            if reason:
                say(f"{path}: left by a run that ended without removing it ({reason}), taken over")
            if not free:
                # A child of the dead holder still has the old file: leave it that one.
                path.unlink()
                os.close(file)
                continue
            text = json.dumps(identity())
            os.ftruncate(file, 0)
            os.pwrite(file, text.encode(), 0)
            os.fsync(file)
            return file
        except BaseException:
            _close(file)
            raise


def stale(holder: dict[str, Any], free: bool, age_of: Callable[[], float]) -> str | None:
    """Why a lock's holder is gone; empty where it is new, None where it may be at work.

    Args:
        free: nobody on this machine (or, where the file system passes locks on, anywhere) has it open.
        age_of: seconds since the holder last touched it.
    """
    if not holder:
        # Between another's creating it and writing into it, or a disk that was full then.
        return "" if free else None
    own = identity()
    if holder["boot"] == own["boot"] and holder["pids"] == own["pids"]:
        begun = started(holder["pid"])
        if begun == holder["started"]:
            return None
        return f"pid {holder['pid']} is {'gone' if begun is None else 'another process now'}"
    if holder["launch"] and holder["launch"] == own["launch"]:
        return "this launch's, before its restart"
    if not free:
        return None
    if holder["host"] == own["host"] and holder["boot"] != own["boot"]:
        return "before this machine's last boot"
    silent = age_of()
    return f"no sign of life for {silent:.0f} s" if silent > LOST_SECONDS else None


def describe(holder: dict[str, Any]) -> str:
    if not holder:
        return "in use by a run that starts at this moment"
    return (
        f"in use by pid {holder['pid']} on host {holder['host']} since {holder['since']}; wait for it, "
        "stop it, or take another directory"
    )


def age(path: Path, file: int) -> float:
    """Seconds since the lock was touched, by the clock of the file system: hosts' own may differ."""
    probe = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        probe.touch()
        return probe.stat().st_mtime - os.fstat(file).st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _flock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: the holder's pid and age decide
        return True
    return True


def _same(path: Path, file: int) -> bool:
    try:
        there, opened = os.stat(path), os.fstat(file)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (opened.st_dev, opened.st_ino)


def _read(file: int) -> dict[str, Any]:
    try:
        holder = json.loads(os.pread(file, 4096, 0))
    except ValueError:
        return {}
    known = {"host", "pid", "boot", "pids", "started", "since", "launch"}
    return holder if isinstance(holder, dict) and known <= holder.keys() else {}


def _beat(file: int, released: threading.Event) -> None:
    while not released.wait(BEAT_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(file)


def _release(path: Path, file: int) -> None:
    _held.discard(file)
    with contextlib.suppress(OSError):
        if _same(path, file):
            path.unlink()
    _close(file)


def _close(file: int) -> None:
    with contextlib.suppress(OSError):
        os.close(file)
