"""What all ranks do together when one of them may fail: none is left waiting for it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from baichuan_sft.errors import EnvironmentFault, PeerFault, UserError, first_line
from baichuan_sft.train.space import DiskFault, disk_reason

T = TypeVar("T")
PROBE_BYTES = 1 << 20


def place() -> tuple[int, int]:
    """Rank and number of ranks."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def gather(value: T) -> list[T]:
    """The values of all ranks, by rank."""
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def together(function: Callable[..., T], *args: Any) -> list[T]:
    """Call it on every rank, and give all their results; if it fails on one, it fails on all.

    Raises:
        DiskFault: where disks alone were the reason. Else the rank's own error, and PeerFault on ranks that
            have none. Each has the attribute ``everywhere``.
    """
    result, error = None, None
    try:
        result = function(*args)
    except Exception as caught:
        error = caught
    reason = disk_reason(error)
    if isinstance(error, UserError):  # says all there is to say
        reason = str(error) if isinstance(error, DiskFault) else None
    outcomes = gather((result, reason, None if error is None else first_line(error)))
    failed = [(rank, *outcome[1:]) for rank, outcome in enumerate(outcomes) if outcome[2] is not None]
    if not failed:
        return [outcome[0] for outcome in outcomes]  # type: ignore[misc]
    rank, reason, said = failed[0]
    raised: Exception
    if all(entry[1] for entry in failed):
        raised = DiskFault(reason)
    else:
        raised = error or PeerFault(f"rank {rank} failed: {said}")
    raised.everywhere = True  # type: ignore[attr-defined]
    raise raised from error


def require_one_directory(output_dir: str, each_node: bool) -> None:
    """Let each host's first rank write a file, and all ranks look which of them they see.

    Args:
        each_node: --save_on_each_node: each host has an output_dir of its own.
    Raises:
        EnvironmentFault: it cannot be written. UserError: it is shared where it should not be, or the other
            way round.
    """
    local = os.environ.get("LOCAL_RANK", "0") == "0"
    token = gather(secrets.token_hex(8))[0]
    rank = int(os.environ.get("RANK", "0"))
    own = Path(output_dir, f".probe-{token}-{rank}")
    host = os.uname().nodename
    try:
        writers = [entry for entry in together(_write_probe, own, rank, host, local) if entry]
        seen = [other for other, _ in writers if Path(output_dir, f".probe-{token}-{other}").exists()]
        hosts = dict(writers)
        views = gather((host, seen))
    finally:
        own.unlink(missing_ok=True)
    if len(writers) == 1:
        return
    if not each_node:
        for viewer, view in views:
            for other, name in hosts.items():
                if other not in view:
                    raise UserError(
                        f"--output_dir {output_dir}: host {viewer} does not see what host {name} wrote "
                        "there; take a directory that all hosts share, or pass --save_on_each_node True."
                    )
    if each_node and any(len(view) > 1 for _, view in views):
        raise UserError(
            f"--save_on_each_node True: all hosts share --output_dir {output_dir}, and would write the same "
            "files; leave --save_on_each_node out."
        )


def _write_probe(path: Path, rank: int, host: str, local: bool) -> tuple[int, str] | None:
    if not local:
        return None
    try:
        with open(path, "wb") as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        path.unlink(missing_ok=True)
        reason = disk_reason(error) or error.strerror
        raise EnvironmentFault(
            f"--output_dir {path.parent}: host {host} cannot write there: {reason}."
        ) from None
    return rank, host
