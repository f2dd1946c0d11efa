"""Conversations to the rows of a run: held out or not, packed or not."""

from __future__ import annotations

import contextlib
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from baichuan_sft.data import cache, packing
from baichuan_sft.data.packing import PackedDataset, Rows, one_per_row
from baichuan_sft.train.args import Settings
from baichuan_sft.train.inputs import data_seed
from baichuan_sft.train.progress import say


def lay_out(settings: Settings, segments: Any, per_update: int, *, evaluate: bool = False) -> Any:
    """Conversations in packed rows, or one in each; what that saves is a line of the log.

    Args:
        per_update: rows of an update.
    """
    if settings.data.streaming and not evaluate:
        return segments  # rows already
    capacity = settings.row_shape(evaluate=evaluate)[0]
    if capacity is None:
        return PackedDataset(segments, one_per_row(len(segments)))
    rows = _plan_once(segments.lengths, capacity, data_seed(settings.training), settings.data.cache_dir)
    what = _plural(len(segments), f"{'held-out ' if evaluate else ''}conversation")
    line = f"packing: {what} in {_plural(len(rows), 'row')} of {capacity:,} tokens"
    if len(rows) > 1:
        line += f", {100 * rows.efficiency(segments.lengths, capacity):.1f} % useful"
    if not evaluate:
        updates = -(-len(rows) // per_update)
        line += f"; {_plural(per_update, 'row')} per update, {_plural(updates, 'update')} per epoch"
    say(line)
    if not evaluate and len(rows) <= per_update:
        room = _plural(per_update, "row")
        say(
            f"packing: all {what} are in one update per epoch, which has room for {room}; "
            "a smaller batch or --packing False gives more updates"
        )
    return PackedDataset(segments, rows)


def _plural(number: int, word: str) -> str:
    return f"{number:,} {word}{'s' * (number != 1)}"


def _plan_once(lengths: np.ndarray, capacity: int, seed: int, cache_dir: str | None) -> Rows:
    """``plan``, from the cache where the same was planned before: a million segments take ten seconds."""
    code = Path(packing.__file__).read_bytes()
    name = cache.digest([capacity, seed], lengths.tobytes(), code)
    file = cache.cache_root(cache_dir) / "plans" / f"{name}.npz"
    with contextlib.suppress(OSError, ValueError, KeyError, zipfile.BadZipFile), np.load(file) as saved:
        return packing.Rows(saved["order"], saved["offsets"])
    rows = packing.plan(lengths, capacity, seed=seed)
    with contextlib.suppress(OSError):  # of a cache that can only be read
        file.parent.mkdir(exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}.tmp")
        with temporary.open("wb") as out:
            np.savez(out, order=rows.order, offsets=rows.offsets)
        os.replace(temporary, file)
    return rows


def rows_per_update(args: Any, rows_per_batch: int) -> int:
    """Rows of one optimizer step over all ranks and micro-batches."""
    return args.world_size * rows_per_batch * args.gradient_accumulation_steps
