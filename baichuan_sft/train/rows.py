"""Conversations to the rows of a run: held out or not, packed or not."""

from __future__ import annotations

import contextlib
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from baichuan_sft.data import cache, packing
from baichuan_sft.data.packing import PackedDataset, Rows, one_per_row
from baichuan_sft.errors import UserError
from baichuan_sft.train.args import Settings
from baichuan_sft.train.inputs import data_seed
from baichuan_sft.train.progress import say

DECIDING = """model_max_length truncation train_on on_error dedup merge_consecutive dev_ratio packing
    packing_tokens streaming""".split()


def lay_out(settings: Settings, args: Any, segments: Any, *, evaluate: bool = False) -> Any:
    """Conversations in packed rows, or one in each; what that saves is a line of the log."""
    if settings.data.streaming and not evaluate:
        return segments  # rows already
    capacity, rows_per_batch = settings.row_shape(evaluate=evaluate)
    if capacity is None:
        return PackedDataset(segments, one_per_row(len(segments)))
    rows = _plan_once(segments.lengths, capacity, data_seed(settings.training), settings.data.cache_dir)
    what = _plural(len(segments), f"{'held-out ' if evaluate else ''}conversation")
    line = f"packing: {what} in {_plural(len(rows), 'row')} of {capacity:,} tokens"
    if len(rows) > 1:
        line += f", {100 * rows.efficiency(segments.lengths, capacity):.1f} % useful"
    if not evaluate:
        per_update = rows_per_update(args, rows_per_batch)
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


def require_same_rows(checkpoint: str | None, facts: dict[str, Any]) -> None:
    """Raise UserError where a resumed run would go on with other rows than those it had not seen yet.

    Args:
        facts: of this run, as in run.json.
    """
    file = Path(checkpoint or "", "run.json")
    if checkpoint is None or not file.exists():
        return
    before = json.loads(file.read_text())
    then, now = (_deciding(run) for run in (before, facts))
    other = [f"{name} was {then[name]}, is {now[name]}" for name in now if then.get(name) != now[name]]
    if other:
        rows = before.get("rows_per_batch", before["training"]["per_device_train_batch_size"])
        packed = f"--packing_tokens {then['--packing_tokens']} --per_device_train_batch_size {rows}"
        raise UserError(
            f"{checkpoint}: {'; '.join(other)}. The rows would come in another order; resume with what the "
            "run began with, or start anew in another --output_dir."
            + (f" Its rows are those of {packed}." if then["--packing"] else "")
        )
    was, is_now = before.get("lora", {}), facts["lora"]
    other = [
        f"--{name} was {was[name]}, is {is_now[name]}"
        for name in is_now
        if was.get(name) != is_now[name] and name in was
    ]
    if other:
        raise UserError(
            f"{checkpoint}: {'; '.join(other)}. Its adapters were trained otherwise; resume with what the "
            "run began with, or start anew in another --output_dir."
        )


def _deciding(facts: dict[str, Any]) -> dict[str, Any]:
    """Whatever decides which rows there are and in which order they come."""
    data, training = facts["data"], facts["training"]
    rows_per_batch = facts.get("rows_per_batch", training["per_device_train_batch_size"])
    return {
        **{f"--{name}": data.get(name) for name in DECIDING},
        **{f"--{name}": training.get(name) for name in ("seed", "data_seed", "train_sampling_strategy")},
        "the content of the data": [str(sha256)[:12] for sha256 in facts["data_sha256"].values()],
        "rows per update": facts["world_size"] * rows_per_batch * training["gradient_accumulation_steps"],
    }


def rows_per_update(args: Any, rows_per_batch: int) -> int:
    """Rows of one optimizer step over all ranks and micro-batches."""
    return args.world_size * rows_per_batch * args.gradient_accumulation_steps
