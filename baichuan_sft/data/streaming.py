"""Rows packed while files are read, for sources larger than the disk; each rank has its share, and resumes.

# a window is the segments that are packed together
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from baichuan_sft.data import cache, check, files, reader
from baichuan_sft.data.check import Rules
from baichuan_sft.data.findings import DataFault, Finding
from baichuan_sft.data.packing import plan
from baichuan_sft.data.prepare import rules_for
from baichuan_sft.data.reader import RawRecord
from baichuan_sft.data.sources import Source
from baichuan_sft.data.survey import FindingLog, Noted, Survey, item_of, layout_of
from baichuan_sft.errors import UserError

DRAWS = 4096  # choices of a source that are drawn at once
MAX_FRUITLESS = 20  # draws of 64 records in a row of which none could be used
FULL = 0.97  # a row with less waits for the next window, once

Segment = dict[str, Any]


class StreamingRows(IterableDataset):
    """Endless rows for one rank: lists of segments of at most ``capacity`` tokens together.

    The records of all sources stand in one order, drawn by ``seed`` and the same for any number of ranks;
    record t of it belongs to rank t modulo ``world_size``. A source that ends begins again.

    Args:
        sources: with weights, these are the chances to be drawn from; without, their sizes are. The files of
            one pattern share its weight by their sizes.
        capacity: tokens of a row; None makes every segment a row.
        window: segments that are packed together.
        on_error: "stop" raises at a faulty record, "skip" counts it.
        state: what ``state_dict`` gave on this rank; the rows go on where it was taken.
        report_dir: gets what was found in this rank's share, and the bytes of what was left out.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        tokenizer: Any,
        rules: Rules,
        *,
        capacity: int | None,
        window: int = 1024,
        seed: int = 42,
        rank: int = 0,
        world_size: int = 1,
        on_error: str = "stop",
        state: dict[str, Any] | None = None,
        report_dir: Path | None = None,
    ) -> None:
        for source in sources:
            files.require_file(source.path)
            if source.samples is not None:
                raise UserError(
                    f"{source.path}#{source.samples}: a stream is endless; give weights, not counts"
                )
        self.readings = [layout_of(source.path, rules_for(source, rules)) for source in sources]
        self.sources, self.tokenizer, self.rules = list(sources), tokenizer, rules
        self.capacity, self.window, self.seed = capacity, window, seed
        self.rank, self.world_size, self.on_error = rank, world_size, on_error
        self.chances = _chances(sources)
        self.log = FindingLog(report_dir, Survey())
        # Last item of each source of which something was said, by the reader, which runs ahead, and after it.
        self.told: dict[str, list[float]] = {who: [-2.0] * len(sources) for who in ("reader", "examiner")}
        self.counts: Counter[str] = Counter()
        self.settings: dict[str, Any] = {"seed": seed, "world_size": world_size, "window": window}
        self.settings |= {"capacity": capacity, "files": [_state_of(source) for source in sources]}
        self.settings["rules"] = cache.digest([asdict(reading[0]) for reading in self.readings])
        self.settings["vocabulary"] = cache.digest(Path(tokenizer.vocab_file).read_bytes())
        self.start: dict[str, Any] = {"draws": 0, "windows": 0, "items": [0] * len(sources), "leftover": []}
        self.emitted = 0
        if state is not None:
            self.restore(state)

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken."""
        for name, value in self.settings.items():
            if state["settings"][name] != value:
                was = state["settings"][name]
                raise UserError(
                    f"the stream was saved with {name} {was!r}, now {value!r}; resume with the same"
                )
        self.start, self.emitted = state["start"], state["emitted"]

    def state_dict(self) -> dict[str, Any]:
        """Where this rank stands, for JSON: the window it is in, and how many of its rows are out."""
        return {"settings": self.settings, "start": self.start, "emitted": self.emitted}

    def __iter__(self) -> Iterator[list[Segment]]:
        if get_worker_info() is not None:
            raise UserError("a stream is read by the process that trains; pass --dataloader_num_workers 0")
        streams = [self._endless(number, item) for number, item in enumerate(self.start["items"])]
        now = {**self.start, "items": list(self.start["items"])}
        while True:
            segments = [_thaw(one) for one in now["leftover"]]
            carried = len(segments)
            fruitless = 0
            while len(segments) < self.window:
                found = self._examine(self._draw(streams, now))
                segments += found
                fruitless = 0 if found else fruitless + 1
                if fruitless > MAX_FRUITLESS:
                    paths = ", ".join(source.path for source in self.sources)
                    raise UserError(f"{paths}: no record can be used; `baichuan-sft data check` says why")
            rows, left = self._pack(segments, carried, now["windows"])
            for row in islice(rows, self.emitted, None):
                self.emitted += 1
                yield row
            now["windows"] += 1
            now["leftover"] = [_freeze(one) for one in left]
            self.start, self.emitted = {**now, "items": list(now["items"])}, 0

    # --- reading ----------------------------------------------------------------------------------

    def _draw(self, streams: list[Iterator[RawRecord]], now: dict[str, Any]) -> list[tuple[int, RawRecord]]:
        """This rank's records among the next draws, each with its source."""
        block, offset = divmod(now["draws"], DRAWS)
        choices = np.random.default_rng([self.seed, block]).choice(len(self.sources), DRAWS, p=self.chances)
        mine = []
        for number in choices[offset : offset + 64 * self.world_size].tolist():
            record = next(streams[number])
            if now["draws"] % self.world_size == self.rank:
                mine.append((number, record))
            now["draws"] += 1
            now["items"][number] += 1
        return mine

    def _endless(self, number: int, consumed: int) -> Iterator[RawRecord]:
        """The records of a source, again and again, but for the first ``consumed``."""
        source = self.sources[number]
        rules, layout = self.readings[number]
        while True:
            size = 0
            note = partial(self._note_unread, number)
            for record in reader.read_raw(source.path, note, layout=layout, options=rules.reading):
                size += 1
                if consumed:
                    consumed -= 1
                    continue
                yield record
            if not size:
                raise UserError(
                    f"{source.path}: no records; `baichuan-sft data check {source.path}` says why"
                )

    def _note_unread(self, number: int, finding: Finding, raw: bytes | None) -> None:
        self._note("reader", number, [(finding, raw)])

    def _note(self, who: str, number: int, findings: list[Noted]) -> None:
        """Write down what was found of one item, unless a pass before has said so."""
        errors = [finding for finding, _ in findings if finding.severity == "ERROR"]
        if errors and self.on_error == "stop":
            raise DataFault(str(errors[0]), errors)
        if findings and item_of(findings[0]) > self.told[who][number]:
            self.told[who][number] = item_of(findings[0])
            for noted in findings:
                self.log.add(*noted)

    def balance(self) -> str:
        """What became of the records of this rank so far, repeats included."""
        words = {
            "used": "used",
            "rejected": "rejected",
            "no_target": "without a target",
            "too_long": "too long",
        }
        parts = [f"{text} {self.counts[name]:,}" for name, text in words.items()]
        return f"read {self.counts['read']:,} = {' + '.join(parts)}"

    def _examine(self, drawn: list[tuple[int, RawRecord]]) -> list[Segment]:
        """The segments of these records, in their order."""
        segments = []
        for number, record in drawn:
            source = self.sources[number]
            found = check.examine([record], source.path, self.readings[number][0], self.tokenizer, 1)
            self._note("examiner", number, found.findings)
            self.counts.update(found.counts)
            segments += _split(found.segments, number) if found.segments else []
        return segments

    # --- packing ----------------------------------------------------------------------------------

    def _pack(
        self, segments: list[Segment], carried: int, number: int
    ) -> tuple[list[list[Segment]], list[Segment]]:
        """Rows of one window, and the segments that wait for the next: rows with room, but none twice."""
        lengths = np.array([len(segment["input_ids"]) for segment in segments])
        if self.capacity is None:
            order = np.random.default_rng([self.seed, number]).permutation(len(segments))
            return [[segments[i]] for i in order], []
        planned = plan(lengths, self.capacity, seed=self.seed + number)
        rows = [planned[row].tolist() for row in range(len(planned))]
        waits = [row for row in rows if lengths[row].sum() < FULL * self.capacity and min(row) >= carried]
        kept = [row for row in rows if row not in waits]
        return [[segments[i] for i in row] for row in kept], [
            segments[i] for row in waits for i in sorted(row)
        ]


def _chances(sources: Sequence[Source]) -> np.ndarray:
    """Of each source to be drawn from."""
    sizes = np.array([max(files.size_of(source.path), 1) for source in sources], float)
    groups = np.array([source.group for source in sources])
    shares = np.array([size / sizes[groups == group].sum() for size, group in zip(sizes, groups)])
    weights = [
        size if source.weight is None else source.weight * share
        for source, size, share in zip(sources, sizes, shares)
    ]
    return np.array(weights) / sum(weights)


def _state_of(source: Source) -> list[Any]:
    """By which a resumed stream knows its source again: a hash would read what is too large to be read."""
    found = os.stat(source.path)
    return [source.path, found.st_size, found.st_mtime_ns, source.weight]


def _split(laid_out: check.Segments, source: int) -> list[Segment]:
    ends = np.cumsum(laid_out.lengths)
    return [
        {
            "input_ids": laid_out.input_ids[end - size : end],
            "labels": laid_out.labels[end - size : end],
            "item": int(item),
            "source": source,
        }
        for end, size, item in zip(ends, laid_out.lengths, laid_out.items)
    ]


def _freeze(segment: Segment) -> Segment:
    """For JSON."""
    return {
        name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in segment.items()
    }


def _thaw(segment: Segment) -> Segment:
    return {
        name: np.array(value, np.int32) if isinstance(value, list) else value
        for name, value in segment.items()
    }
