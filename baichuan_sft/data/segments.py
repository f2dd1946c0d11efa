"""Conversations to segments on disk: render, cut, count, write.

# a segment is one conversation as ids and labels, cut to max_length
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from baichuan_sft.data import template
from baichuan_sft.data.formats import Message

if TYPE_CHECKING:
    import pyarrow as pa

CHUNK = 1000  # conversations that are tokenised, and written, at once


@dataclass(frozen=True)
class Chunk:
    """Up to ``CHUNK`` segments, laid end to end as Arrow stores them.

    ``reach`` is, per dropped segment, the number of tokens before its first target.
    """

    input_ids: np.ndarray  # int32 (sum of lengths,)
    labels: np.ndarray  # int32 (sum of lengths,)
    lengths: np.ndarray  # int32 (segments,)
    items: np.ndarray  # int64 (segments,)
    counts: Counter[str]
    reach: list[int]


def render_chunk(
    chunk: tuple[int, list[list[Message]]], *, tokenizer: Any, max_length: int, train_on: str
) -> Chunk:
    """Render and cut the conversations of one chunk; count what is used, cut and dropped.

    Args:
        chunk: number of the first record, and the conversations.
    """
    first_item, conversations = chunk
    counts = Counter(read=len(conversations))
    ids: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    items, reach = [], []
    segments = template.render_batch(conversations, tokenizer, train_on=train_on)
    assert len(segments) == len(conversations)
    for item, segment in enumerate(segments, start=first_item):
        targets = np.asarray(segment.labels, np.int32)
        assert len(segment.input_ids) == len(targets)
        is_target = targets != template.IGNORE
        is_target[:1] = False  # nothing stands before label 0 to predict it from
        if not is_target[:max_length].any():
            counts.update(dropped_no_target=1, tokens_lost=len(targets))
            reach += np.flatnonzero(is_target)[:1].tolist()
            continue
        ids.append(np.asarray(segment.input_ids[:max_length], np.int32))
        labels.append(targets[:max_length])
        items.append(item)
        counts.update(_count_used(is_target, max_length))
    lengths = np.array([len(segment) for segment in ids], np.int32)
    return Chunk(_joined(ids), _joined(labels), lengths, np.array(items, np.int64), counts, reach)


def _count_used(is_target: np.ndarray, max_length: int) -> dict[str, int]:
    lost = max(len(is_target) - max_length, 0)
    return {
        "used": 1,
        "tokens": len(is_target) - lost,
        "supervised_tokens": int(is_target[:max_length].sum()),
        "truncated": int(lost > 0),
        "tokens_lost": lost,
    }


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.empty(0, np.int32)


def tally(chunks: Iterable[Chunk], counts: Counter[str], reach: list[int]) -> Iterator[pa.RecordBatch]:
    """The chunks as Arrow batches; their counts are added to ``counts`` and ``reach`` on the way."""
    import pyarrow as pa

    for chunk in chunks:
        counts.update(chunk.counts)
        reach.extend(chunk.reach)
        offsets = np.concatenate([[0], np.cumsum(chunk.lengths)]).astype(np.int32)
        columns = {
            "input_ids": pa.ListArray.from_arrays(offsets, chunk.input_ids),
            "labels": pa.ListArray.from_arrays(offsets, chunk.labels),
            "length": pa.array(chunk.lengths),
            "item": pa.array(chunk.items),
        }
        yield pa.RecordBatch.from_pydict(columns)


def write_arrow(path: Path, batches: Iterable[pa.RecordBatch]) -> None:
    """Write the batches as one Arrow stream, the form ``datasets.Dataset.from_file`` maps."""
    import pyarrow as pa

    writer = None
    with ExitStack() as stack:
        for batch in batches:
            if writer is None:
                writer = stack.enter_context(pa.ipc.new_stream(str(path), batch.schema))
            writer.write_batch(batch)


def tracked(chunks: Iterator[Chunk], total: int) -> Iterator[Chunk]:
    """The chunks, with a progress bar on stderr once two seconds have passed."""
    from rich.console import Console
    from rich.progress import Progress

    progress = Progress(console=Console(stderr=True))
    started, task = time.monotonic(), None
    try:
        for done, chunk in enumerate(chunks, start=1):
            yield chunk
            if task is None and done < total and time.monotonic() - started > 2:
                progress.start()
                task = progress.add_task("tokenising", total=total)
            if task is not None:
                progress.update(task, completed=done)
    finally:
        if task is not None:
            progress.stop()
