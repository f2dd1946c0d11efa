"""Segments on disk: written as Arrow shards, read as views of a memory map.

# a segment is one conversation as ids and labels, at most max_length tokens
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from baichuan_sft.data.check import Segments
from baichuan_sft.data.progress import Progress
from baichuan_sft.errors import EnvironmentFault

TOTALS = "totals.json"
COLUMNS = ("length", "targets", "item", "hash")  # of each segment, held in memory
SHARD_TOKENS = 64 << 20  # 512 MiB of ids and labels


class ShardWriter:
    """Writes segments as Arrow streams ``data-00000.arrow``, ... of about ``SHARD_TOKENS`` tokens each."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.num_shards, self.room = directory, 0, 0
        self.segments = self.tokens = 0
        self.stream: Any = None

    def write(self, segments: Segments) -> None:
        """Append the segments as one record batch."""
        import pyarrow as pa

        offsets = np.concatenate([[0], np.cumsum(segments.lengths)]).astype(np.int32)
        columns = {
            "input_ids": pa.ListArray.from_arrays(offsets, segments.input_ids),
            "labels": pa.ListArray.from_arrays(offsets, segments.labels),
            "targets": pa.array(segments.targets),
            "item": pa.array(segments.items),
            "hash": pa.array(segments.hashes),
        }
        batch = pa.RecordBatch.from_pydict(columns)
        if self.stream is None or self.room < 0:
            self.close()
            path = self.directory / f"data-{self.num_shards:05d}.arrow"
            self.stream, self.room = pa.ipc.new_stream(str(path), batch.schema), SHARD_TOKENS
            self.num_shards += 1
        self.stream.write_batch(batch)
        self.room -= len(segments.input_ids)
        self.segments += len(segments.lengths)
        self.tokens += len(segments.input_ids)

    def close(self) -> None:
        if self.stream is not None:
            self.stream.close()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.close()
            (self.directory / TOTALS).write_text(json.dumps([self.segments, self.tokens]))
        else:
            with contextlib.suppress(OSError):  # what went wrong is known already
                self.close()


class TokenDataset:
    """Segments of one or more directories of shards, as a sequence for a ``DataLoader``.

    Only what is indexed is read from disk, and nothing is copied but the rows asked for.

    Attributes:
        lengths: int32 ``(N,)`` tokens of each segment.
        targets: int32 ``(N,)`` labels that are learnt.
        items: int64 ``(N,)`` record in its file.
        sources: int32 ``(N,)`` which of the directories it comes from.
        hashes: uint64 ``(N,)`` content of the record; equal records have equal ones.
    """

    def __init__(self, directories: Iterable[Path]) -> None:
        self.batches: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # offsets, ids, labels
        columns: dict[str, list[np.ndarray]] = {name: [] for name in (*COLUMNS, "source")}
        directories = list(directories)
        shards = [(i, sorted(path.glob("data-*.arrow"))) for i, path in enumerate(directories)]
        with Progress("opening prepared data", sum(len(files) for _, files in shards)) as progress:
            done = 0
            for source, files in shards:
                first = len(self.batches)
                for file in files:
                    self._map(file, source, columns)
                    progress.update(done := done + 1)
                _require_whole(directories[source], self.batches[first:])
        joined = {name: np.concatenate(arrays or [np.empty(0, np.int64)]) for name, arrays in columns.items()}
        self.starts = np.cumsum([0, *(len(offsets) - 1 for offsets, _, _ in self.batches)])
        self.index = np.arange(self.starts[-1])
        self.lengths, self.targets, self.sources = joined["length"], joined["targets"], joined["source"]
        self.items, self.hashes = joined["item"], joined["hash"]

    def _map(self, file: Path, source: int, columns: dict[str, list[np.ndarray]]) -> None:
        """Add the batches of one shard: ids and labels as views of the file, the rest in memory."""
        import pyarrow as pa

        for batch in pa.ipc.open_stream(pa.memory_map(str(file))).read_all().to_batches():
            ids, labels = batch["input_ids"], batch["labels"]
            offsets = ids.offsets.to_numpy()
            self.batches.append((offsets, ids.values.to_numpy(), labels.values.to_numpy()))
            columns["length"].append(np.diff(offsets))
            columns["source"].append(np.full(len(batch), source, np.int32))
            for name in COLUMNS[1:]:
                columns[name].append(batch[name].to_numpy())

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """``input_ids`` and ``labels`` (int32), ``item`` and ``source`` of segment ``i``."""
        number = self.index[i]
        batch = int(np.searchsorted(self.starts, number, side="right")) - 1
        offsets, ids, labels = self.batches[batch]
        row = number - self.starts[batch]
        start, end = offsets[row], offsets[row + 1]
        return {
            "input_ids": ids[start:end],
            "labels": labels[start:end],
            "item": int(self.items[i]),
            "source": int(self.sources[i]),
        }

    def select(self, rows: np.ndarray) -> TokenDataset:
        """The segments ``rows`` in that order, repeats included, on the same memory map."""
        chosen = object.__new__(TokenDataset)
        chosen.batches, chosen.starts, chosen.index = self.batches, self.starts, self.index[rows]
        for name in ("lengths", "targets", "items", "sources", "hashes"):
            setattr(chosen, name, getattr(self, name)[rows])
        return chosen

    def records(self) -> np.ndarray:
        """First segment of each record, int64; the pieces of a document follow each other."""
        changes = (np.diff(self.items) != 0) | (np.diff(self.sources) != 0)
        return np.flatnonzero(np.concatenate([[True], changes])[: len(self)])


def _require_whole(directory: Path, batches: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> None:
    """
    Raises:
        EnvironmentFault: the shards do not hold what was written.
    """
    found = [
        sum(len(batch[0]) - 1 for batch in batches),
        sum(int(batch[0][-1] - batch[0][0]) for batch in batches),
    ]
    try:
        written = json.loads((directory / TOTALS).read_text())
    except (OSError, ValueError):
        written = None
    if written != found:
        raise EnvironmentFault(
            f"{directory}: damaged data in the cache; delete this directory and start again"
        )
