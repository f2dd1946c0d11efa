"""What a run reads before any process group exists: configuration, tokenizer, conversations."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from baichuan_sft.errors import UserError
from baichuan_sft.train.args import Settings
from baichuan_sft.train.checks import check_length
from baichuan_sft.train.progress import say


@dataclass(frozen=True)
class Inputs:
    """What training starts from.

    Attributes:
        train: segments, or with ``--streaming`` rows without end.
        held_out: segments to evaluate on, or None.
        report: what became of the records, for run.json; of the held-out files under "held_out_data".
        sources: names of the files, by number; ``report`` has their sha256.
    """

    tokenizer: Any
    train: Any
    held_out: Any
    report: dict[str, Any]
    sources: list[str]


def read_inputs(settings: Settings) -> Inputs:
    """Check and tokenise what this host lacks, and map it; one process of each host works, the others wait.

    Raises:
        UserError: the model's files or the data cannot be used.
    """
    from baichuan_sft.checkpoint import check_vocabulary, load_config, load_tokenizer
    from baichuan_sft.checkpoint.quantised import check_trainable

    base = settings.model.model_name_or_path
    config, tokenizer = load_config(base), load_tokenizer(base)
    check_vocabulary(base, config, tokenizer)
    check_trainable(base, config, settings.lora.quantize)
    if warning := check_length(config, settings.data.model_max_length):
        say(warning)
    if settings.data.streaming:
        return _stream(settings, tokenizer)
    data = _build(settings, settings.data.data_path, tokenizer, settings.data.dev_ratio)
    say(f"data: {data.report}")
    held_out, report = data.dev, data.report.to_dict()
    if settings.data.eval_data_path:
        held_out, report["held_out_data"] = _read_held_out(settings, tokenizer)
        seen = int(np.isin(held_out.hashes, data.train.hashes).sum())
        if seen:
            say(f"warning: {seen:,} of {len(held_out):,} held-out segments are trained on as well")
    names = [source.path for source in data.report.sources]
    return Inputs(tokenizer, data.train, held_out, report, names)


def _build(settings: Settings, paths: str, tokenizer: Any, dev_ratio: float = 0.0, reports: str = "") -> Any:
    from baichuan_sft.data.dataset import build_dataset

    return build_dataset(
        paths,
        tokenizer,
        settings.data.rules(),
        dev_ratio=dev_ratio,
        seed=data_seed(settings.training),
        report_dir=_report_dir(settings) / reports if os.environ.get("RANK", "0") == "0" else None,
        wait=os.environ.get("LOCAL_RANK", "0") != "0",
        **settings.data.options(),
    )


def _report_dir(settings: Settings) -> Path:
    return Path(settings.training["output_dir"])


def _read_held_out(settings: Settings, tokenizer: Any) -> tuple[Any, dict[str, Any]]:
    assert settings.data.eval_data_path is not None
    data = _build(settings, settings.data.eval_data_path, tokenizer, reports="held_out")
    say(f"held-out data: {data.report}")
    return data.train, data.report.to_dict()


def data_seed(training: dict[str, Any]) -> int:
    """What decides which records are drawn, who shares a row, and in which order rows come."""
    return training["seed"] if training["data_seed"] is None else training["data_seed"]


# --- streaming ------------------------------------------------------------------------------------


def _stream(settings: Settings, tokenizer: Any) -> Inputs:
    from baichuan_sft.data.sources import parse_sources
    from baichuan_sft.data.streaming import StreamingRows

    data = settings.data
    sources = parse_sources(data.data_path, allow_outside=data.allow_outside)
    rank = int(os.environ.get("RANK", "0"))
    rows = StreamingRows(
        sources,
        tokenizer,
        data.rules(),
        capacity=settings.row_shape()[0],
        seed=data_seed(settings.training),
        rank=rank,
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        on_error=data.on_error,
        report_dir=_report_dir(settings) / f"stream_rank_{rank}",
    )
    names = [source.path for source in sources]
    say(f"data: {', '.join(names)}, read while training")
    # A hash would read what is too large to be read; the size tells most mistakes.
    described = [{"path": path, "sha256": f"of {os.path.getsize(path):,} bytes"} for path in names]
    report: dict[str, Any] = {"sources": described}
    held_out = None
    if data.eval_data_path:
        held_out, report["held_out_data"] = _read_held_out(settings, tokenizer)
    return Inputs(tokenizer, rows, held_out, report, names)


def stream_file(checkpoint: str | Path, rank: int) -> Path:
    """Where a checkpoint keeps how far a rank has read."""
    return Path(checkpoint) / f"stream_rank_{rank}.json"


def restore_stream(rows: Any, checkpoint: str | Path, rank: int) -> None:
    """Let a rank's stream go on where it was when the checkpoint was saved."""
    file = stream_file(checkpoint, rank)
    try:
        state = json.loads(file.read_text())
    except (OSError, ValueError):
        raise UserError(
            f"{file}: not there or damaged, so the place in the data is unknown; a stream resumes with as "
            "many processes as saved it"
        ) from None
    rows.restore(state)


# --- all hosts alike ------------------------------------------------------------------------------


def require_same_data(inputs: Inputs) -> None:
    """Raise UserError where another rank has read other data, naming the file; every rank calls it."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    everyone: list[Any] = [None] * dist.get_world_size()
    mine = _contents(inputs.report) + _contents(inputs.report.get("held_out_data", {}))
    dist.all_gather_object(everyone, mine)
    for rank, other in enumerate(everyone):
        for first, here in zip_longest(everyone[0], other, fillvalue=("nothing", "")):
            if first[1] != here[1]:
                hashes = f"sha256 {here[1][:12]} and {first[1][:12]}"
                raise UserError(
                    f"{here[0]} on rank {rank} is not {first[0]} on rank 0 ({hashes}); "
                    "give all hosts the same files"
                )


def _contents(report: dict[str, Any]) -> list[tuple[str, str]]:
    return [(source["path"], source["sha256"]) for source in report.get("sources", [])]
