"""Conversations to the rows of a run: held out or not, packed or not."""

from __future__ import annotations

from typing import Any

import numpy as np

from baichuan_sft.data.packing import PackedDataset, one_per_row, plan
from baichuan_sft.errors import UserError
from baichuan_sft.train.args import Settings
from baichuan_sft.train.progress import say


def split(dataset: Any, share: float, seed: int) -> tuple[Any, Any]:
    """Conversations to train on and, drawn by the seed, ``share`` of them to evaluate."""
    num_held_out = round(len(dataset) * share)
    if not 0 < num_held_out < len(dataset):
        raise UserError(
            f"--dev_ratio {share:g} of {len(dataset)} conversations leaves {num_held_out} to evaluate and "
            f"{len(dataset) - num_held_out} to train on; both need at least one."
        )
    drawn = np.random.default_rng(seed).permutation(len(dataset))
    held_out, rest = drawn[:num_held_out], drawn[num_held_out:]
    return dataset.select(np.sort(rest)), dataset.select(np.sort(held_out))


def as_segments(dataset: Any) -> Any:
    """The dataset as ``packing.Segments``."""
    segments = dataset.with_format("numpy")
    segments.lengths = segments["length"][:]
    return segments


def plan_seed(args: Any) -> int:
    """What decides who shares a row, in which order rows come, and who is held out."""
    return args.seed if args.data_seed is None else args.data_seed


def lay_out(settings: Settings, args: Any, segments: Any, *, evaluate: bool = False) -> Any:
    """Conversations in packed rows, or one in each; what that saves is a line of the log."""
    if not settings.data.packing:
        return PackedDataset(segments, one_per_row(len(segments)))
    capacity = settings.data.packing_tokens or settings.data.model_max_length
    rows = plan(segments.lengths, capacity, seed=plan_seed(args))
    what = f"{len(segments):,} {'held-out ' if evaluate else ''}conversations"
    useful = f"{100 * rows.efficiency(segments.lengths, capacity):.1f} % useful"
    line = f"packing: {what} in {len(rows):,} rows of {capacity:,} tokens, {useful}"
    if not evaluate:
        per_update = rows_per_update(args)
        line += f"; {per_update} rows per update, {-(-len(rows) // per_update):,} updates per epoch"
    say(line)
    if not evaluate and len(rows) < per_update:
        say(
            f"packing: all {what} are in one update per epoch, which has room for {per_update} rows; "
            "a smaller batch or --packing False gives more updates"
        )
    return PackedDataset(segments, rows)


def rows_per_update(args: Any) -> int:
    """Rows of one optimizer step over all ranks and micro-batches."""
    return args.world_size * args.per_device_train_batch_size * args.gradient_accumulation_steps
