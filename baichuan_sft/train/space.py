"""Disk space: what a run will take, what is free, and which errors of a writer mean that it is full."""

from __future__ import annotations

import errno
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

from baichuan_sft.errors import EnvironmentFault

# What a disk says, of which training need not end: the previous checkpoint stands.
DISK = {
    errno.ENOSPC: "no space",
    errno.EDQUOT: "no space within the quota",
    errno.EFBIG: "no space (limit of file sizes)",
    errno.EROFS: "the file system is read-only",
    errno.EIO: "input/output error",
}
# torch's zip writer says how far it came, and not why it came no further.
TORCH_WRITER = re.compile(r"inline_container|PytorchStreamWriter failed|unexpected pos")
RUST_ERROR = re.compile(r"os error (\d+)")  # safetensors
# Bytes of optimizer state for each byte of a trained weight; Adam has two moments.
MOMENTS = {"adamw_bnb_8bit": 0.5, "paged_adamw_8bit": 0.5, "adafactor": 0.1, "sgd": 0.0}


class DiskFault(EnvironmentFault):
    """A save that the disk did not take; the checkpoints before it are untouched."""


def disk_reason(error: BaseException | None) -> str | None:
    """What the disk said, also where a writer hid it behind an error of its own; None of other errors."""
    while error is not None:
        number = error.errno if isinstance(error, OSError) else None
        if match := RUST_ERROR.search(str(error)):
            number = int(match.group(1))
        if number in DISK:
            return DISK[number]
        if isinstance(error, RuntimeError) and TORCH_WRITER.search(str(error)):
            return DISK[errno.ENOSPC]
        error = error.__cause__ or error.__context__
    return None


def short(size: float) -> str:
    """255 MB: decimal, as disks are sold and `df -H` counts."""
    power = min(4, max(0, (len(str(int(size))) - 1) // 3))
    return f"{size / 1000**power:,.3g} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"


def mount_of(path: str | Path) -> Path:
    found = Path(path).resolve()
    while not os.path.ismount(found):
        found = found.parent
    return found


def room(path: str | Path, need: float) -> str:
    """`need 255 MB, 90 MB free on /x`."""
    return f"need {short(need)}, {short(shutil.disk_usage(path).free)} free on {mount_of(path)}"


def require_room(path: str | Path, need: float) -> None:
    """
    Raises:
        DiskFault: fewer than ``need`` bytes are free there.
    """
    if need > shutil.disk_usage(path).free:
        raise DiskFault(f"{DISK[errno.ENOSPC]}: {room(path, need)}")


def estimate(model: Any, optim: str, deepspeed: bool) -> tuple[float, float]:
    """Bytes of a checkpoint and of a result, from the shapes; files of a few kB are left out.

    DeepSpeed writes the weights a second time and an fp32 copy of what is trained beside the moments.
    """
    sizes = [
        (getattr(p, "ds_numel", p.numel()), p.element_size(), p.requires_grad) for p in model.parameters()
    ]
    lora = hasattr(model, "peft_config")
    result = sum(number * size for number, size, trained in sizes if trained or not lora)
    moments = MOMENTS.get(optim, 2.0)
    if deepspeed:
        state = result + sum(number * 4 * (1 + moments) for number, _, trained in sizes if trained)
    else:
        state = sum(number * size * moments for number, size, trained in sizes if trained)
    return result + state, result


def num_checkpoints(args: Any, updates: float, keep: int | None) -> int:
    """Most that lie there at a time; the new one is written before the oldest goes."""
    if args.save_strategy == "no":
        return 0
    if args.save_strategy == "epoch":
        saves = math.ceil(args.num_train_epochs if args.max_steps < 0 else 1)
    else:
        every = args.save_steps if args.save_steps >= 1 else math.ceil(args.save_steps * updates)
        saves = int(updates // max(every, 1))
    return saves if keep is None else min(saves, keep + 1)


def require_plan(args: Any, updates: float, keep: int | None, sizes: tuple[float, float], there: int) -> None:
    """Refuse at the start a run that would fill the disk hours later.

    Args:
        sizes: bytes of a checkpoint and of the result. there: checkpoints that lie there already.
    Raises:
        EnvironmentFault: the whole run does not fit.
    """
    each, result = sizes
    number = max(0, num_checkpoints(args, updates, keep) - there)
    need = number * each + result
    if need <= shutil.disk_usage(args.output_dir).free:
        return
    fewer = "" if keep == 1 else " or --save_total_limit 1"
    raise EnvironmentFault(
        f"--output_dir {args.output_dir}: no space: {number} checkpoints of {short(each)} and the result of "
        f"{short(result)}, {room(args.output_dir, need)}; free some, or take another --output_dir{fewer}."
    )
