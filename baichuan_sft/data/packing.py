"""Segments to rows, and rows to a batch.

    # B rows of a batch, T tokens of a row

A segment is one conversation, a row is what the model sees at once: segments end to end, which never see
each other because their positions start at 0 again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from baichuan_sft.data.progress import Progress
from baichuan_sft.data.template import IGNORE

Segment = Mapping[str, Any]  # "input_ids" and "labels" of one length, "item": number of its record

NO_ITEM = -1  # the item of a segment that stands for no record
EMPTY_ROW = -1  # the number of the row that has nothing to learn
EMPTY = {"input_ids": np.zeros(1, np.int32), "labels": np.full(1, IGNORE, np.int32), "item": NO_ITEM}


class Segments(Protocol):
    """Where segments come from; ``lengths`` are their tokens."""

    lengths: np.ndarray

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Segment: ...


# --- which segments share a row ---------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """Which segments stand in each row.

        order    4 0 2 | 1 | 3 5
        offsets  0       3   4    6

    Attributes:
        order: int64 ``(segments,)``, segment numbers, row after row.
        offsets: int64 ``(rows + 1,)``, where each row begins in ``order``.
    """

    order: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        """Numbers of the segments of one row."""
        return self.order[self.offsets[row] : self.offsets[row + 1]]

    def tokens(self, lengths: np.ndarray) -> np.ndarray:
        """Tokens of each row, int64 ``(rows,)``."""
        ends = np.concatenate([[0], np.cumsum(lengths[self.order], dtype=np.int64)])
        return np.diff(ends[self.offsets])

    def efficiency(self, lengths: np.ndarray, capacity: int) -> float:
        """Tokens of the segments per token of rows that are all ``capacity`` long."""
        return float(lengths.sum(dtype=np.int64)) / (len(self) * capacity)


def one_per_row(num_segments: int) -> Rows:
    """Rows without packing: each segment is one."""
    return Rows(np.arange(num_segments), np.arange(num_segments + 1))


def plan(lengths: np.ndarray, capacity: int, *, seed: int = 0, window: int | None = None) -> Rows:
    """Rows of at most ``capacity`` tokens, as few as the better of two heuristics makes.

    ``_best_fit`` is good where a row holds few segments, ``_fill_exactly`` where it holds many: on 10,000
    counselling dialogues of 487 tokens on average 96.9 against 95.6 % of the rows' tokens are useful in
    rows of 1,024, and 98.9 against 99.9 % in rows of 4,096.

    Segments are shuffled before they are sorted, so which of equally long ones share a row follows from
    the seed, and so does the order of the rows.

    Args:
        lengths: tokens of each segment, all in 1..capacity.
        window: look at so many segments at a time, as where lengths are not all known at once; the rows
            then come in the order in which they are complete. None looks at all.
    """
    num_segments = len(lengths)
    assert num_segments == 0 or (lengths.min() >= 1 and lengths.max() <= capacity)
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(num_segments)
    sizes = lengths[shuffled].tolist()
    rows = _fill_exactly(sizes, capacity, window or num_segments)
    if window is None:
        rows = min(rows, _best_fit(sizes, capacity), key=len)
        rows = [rows[i] for i in rng.permutation(len(rows))]
    counts = np.fromiter(map(len, rows), np.int64, len(rows))
    order = np.fromiter((place for row in rows for place in row), np.int64, num_segments)
    return Rows(shuffled[order], np.concatenate([[0], np.cumsum(counts)]))


def _best_fit(sizes: list[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: the longest first, each into the fullest row that still has room for it.

    Source: Johnson 1973. Open rows lie in stacks by their room; the smallest room for ``size`` tokens is
    the lowest bit of ``rooms >> size``, plus ``size``.
    """
    rows: list[list[int]] = []
    stacks: list[list[list[int]]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r: some row has room r
    for place in np.argsort(-np.array(sizes, np.int64), kind="stable").tolist():
        size = sizes[place]
        if fitting := rooms >> size:
            room = size + _lowest(fitting)
            row = stacks[room].pop()
            if not stacks[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, []
            rows.append(row)
        row.append(place)
        stacks[room - size].append(row)
        rooms |= 1 << (room - size)
    return rows


def _fill_exactly(sizes: list[int], capacity: int, window: int) -> list[list[int]]:
    """One row after the other: the longest first, until one or two segments fill what is left.

    "Fill" allows ``capacity // 256`` tokens of padding. Of two segments the most alike are taken: short
    ones are what later rows will need.
    """
    rows: list[list[int]] = []
    pool = _Pool(capacity)
    seen = 0
    with Progress("packing", len(sizes)) as progress:
        while seen < len(sizes) or pool.count:
            for place in range(seen, min(seen + window - pool.count, len(sizes))):
                pool.put(place, sizes[place])
                seen += 1
            rows.append(_fill_row(pool, capacity))
            if not len(rows) % 1024:
                progress.update(seen - pool.count)
    return rows


def _fill_row(pool: _Pool, capacity: int) -> list[int]:
    """Take the segments of one row out of the pool."""
    row: list[int] = []
    room = capacity
    while longest := pool.longest(room):
        if last := pool.find_last(room, slack=capacity // 256):
            return row + [pool.take(size) for size in last]
        row.append(pool.take(longest))
        room -= longest
    return row


class _Pool:
    """Segments to choose from, in stacks by size, with an int whose bit ``n`` says that size n is there.

    A second int holds the same bits in reverse, bit ``capacity - n``: shifted right by ``capacity - room``
    its bit ``room - n`` is set, so where both ints have bit a, sizes a and ``room - a`` fill ``room``.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.count = capacity, 0
        self.stacks: list[list[int]] = [[] for _ in range(capacity + 1)]
        self.there = self.reverse = 0

    def put(self, place: int, size: int) -> None:
        self.count += 1
        self.stacks[size].append(place)
        self.there |= 1 << size
        self.reverse |= 1 << (self.capacity - size)

    def take(self, size: int) -> int:
        """Remove a segment of this size."""
        self.count -= 1
        place = self.stacks[size].pop()
        if not self.stacks[size]:
            self.there ^= 1 << size
            self.reverse ^= 1 << (self.capacity - size)
        return place

    def longest(self, room: int) -> int:
        """The longest size that fits, 0 where none does."""
        return max((self.there & ((2 << room) - 1)).bit_length() - 1, 0)

    def find_last(self, room: int, slack: int) -> list[int]:
        """One or two sizes that fill ``room`` but for at most ``slack`` tokens, the fullest first."""
        for goal in range(room, max(room - slack, 1) - 1, -1):
            if self.there >> goal & 1:
                return [goal]
            half = (goal + 1) // 2
            pairs = (self.there & (self.reverse >> (self.capacity - goal))) >> half
            if goal % 2 == 0 and pairs & 1 and len(self.stacks[half]) < 2:
                pairs ^= 1  # a segment is no pair with itself
            if pairs:
                larger = half + _lowest(pairs)
                return [larger, goal - larger]
        return []


def _lowest(bits: int) -> int:
    """Number of the lowest set bit."""
    return (bits & -bits).bit_length() - 1


class PackedDataset(torch.utils.data.Dataset):
    """Rows as lists of their segments; row ``EMPTY_ROW`` is one token with nothing to learn.

    Attributes:
        lengths: tokens of each row, int64 ``(rows,)``.
    """

    def __init__(self, segments: Segments, rows: Rows) -> None:
        assert len(rows.order) == len(segments)
        self.segments, self.rows = segments, rows
        self.lengths = rows.tokens(segments.lengths)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> list[Segment]:
        if row == EMPTY_ROW:
            return [EMPTY]
        return [self.segments[int(segment)] for segment in self.rows[row]]


# --- rows to tensors --------------------------------------------------------------------------------


class Collator:
    """Lays the segments of each row end to end, pads on the right to one length and stacks the rows.

        input_ids     195  11 196  21   2 195  12 196  22   2   0   0
        labels          .   .   .  21   2   .   .   .  22   2   .   .        (. = IGNORE)
        position_ids    0   1   2   3   4   0   1   2   3   4   0   1

    Where the positions start again a segment starts, and padding is one. Behind the only segment of a row
    they count on instead: no token sees what comes later, so such a batch needs no mask at all, while a
    start in the middle makes the model build one of T x T.

    Args:
        pad_token_id: the id written behind the segments.
        pad_to_multiple_of: T is rounded up to a multiple of this; tensor cores like 8.
        pad_to_capacity: T of every batch; None pads to the longest row of the batch.
    """

    def __init__(
        self, pad_token_id: int, pad_to_multiple_of: int = 8, pad_to_capacity: int | None = None
    ) -> None:
        assert pad_to_multiple_of >= 1
        self.pad_token_id = pad_token_id
        self.pad_to_multiple_of = pad_to_multiple_of
        self.pad_to_capacity = pad_to_capacity

    def __call__(self, rows: Sequence[Sequence[Segment]]) -> dict[str, torch.Tensor]:
        """``input_ids``, ``labels`` and ``position_ids``, int64 ``(B, T)`` each.

        Args:
            rows: each a list of segments; other keys than ``input_ids`` and ``labels`` are left out.
        """
        width = self._width(max(sum(len(segment["input_ids"]) for segment in row) for row in rows))
        shape = (len(rows), width)
        counting = np.arange(width)
        input_ids = np.full(shape, self.pad_token_id)  # (B, T)
        labels = np.full(shape, IGNORE)  # (B, T)
        position_ids = np.tile(counting, (len(rows), 1))  # (B, T)
        for row, segments in enumerate(rows):
            end = 0
            for segment in segments:
                start, end = end, end + len(segment["input_ids"])
                assert len(segment["labels"]) == end - start
                input_ids[row, start:end] = segment["input_ids"]
                labels[row, start:end] = segment["labels"]
                labels[row, start] = IGNORE  # else the segment before would predict it
                position_ids[row, start:] = counting[: width - start]
            if len(segments) > 1:
                position_ids[row, end:] = counting[: width - end]
        batch = {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}
        return {name: torch.from_numpy(array.astype(np.int64)) for name, array in batch.items()}

    def _width(self, longest: int) -> int:
        if self.pad_to_capacity is not None:
            assert longest <= self.pad_to_capacity, f"a row of {longest} tokens, {self.pad_to_capacity} asked"
            longest = self.pad_to_capacity
        return -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
