"""Exact duplicates among any number of records, with bounded memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

PART = 1 << 20  # hashes held in memory at once, 8 MiB and as much for their numbers
MAX_COPIES = 100_000  # that are listed


@dataclass(frozen=True)
class Copies:
    """The records that are equal to an earlier one.

    Attributes:
        copies, firsts: numbers of the first ``MAX_COPIES``, ascending, and of what each is a copy of.
        bits: one for each record, the lowest of a byte first.
    """

    total: int
    copies: np.ndarray  # int64
    firsts: np.ndarray  # int64
    bits: np.ndarray  # uint8

    def is_copy(self, record: int) -> bool:
        return bool(self.bits[record >> 3] >> (record & 7) & 1)

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter((self.copies, self.firsts))


class Duplicates:
    """Collects the hash of each record's content on disk; at the end says which came before.

    Two different records share one of 2^64 hashes by chance: one pair is expected among six billion records.
    """

    def __init__(self) -> None:
        self.file, self.labels = (tempfile.TemporaryFile() for _ in range(2))  # noqa: SIM115 (live as long)
        self.size = 0

    def add(self, hashes: list[int], labels: list[int]) -> None:
        """The next records, in order; a label is any number below 2^63 to know one by."""
        self.labels.seek(0, 2)
        self.file.write(np.array(hashes, np.uint64).tobytes())
        self.labels.write(np.array(labels, np.int64).tobytes())
        self.size += len(hashes)

    def label(self, record: int) -> int:
        """The label of a record."""
        self.labels.seek(8 * record)
        return int.from_bytes(self.labels.read(8), "little")

    def copies(self) -> Copies:
        """Which records are copies; of more than ``PART`` records at once only their bits are held."""
        bits, total = np.zeros(self.size // 8 + 1, np.uint8), 0
        listed = np.empty((2, 0), np.int64)
        num_parts = 1 << (max(self.size - 1, 0) // PART).bit_length()
        for part in range(num_parts):
            for pairs in self._copies_in(part, num_parts):
                for bit in range(8):  # so that no byte is set twice in one statement
                    bits[pairs[0][pairs[0] & 7 == bit] >> 3] |= np.uint8(1 << bit)
                total += pairs.shape[1]
                listed = np.concatenate([listed, pairs], axis=1)
                listed = listed[:, np.argsort(listed[0])[:MAX_COPIES]]
        return Copies(total, listed[0], listed[1], bits)

    def _copies_in(self, part: int, num_parts: int) -> Iterator[np.ndarray]:
        """(2, copies): copies and their firsts among the hashes that end in ``part``, as equal ones do."""
        hashes, numbers, step = np.empty(0, np.uint64), np.empty(0, np.int64), PART // 4 + 1
        self.file.seek(0)
        for start in range(0, self.size, step):
            block = np.frombuffer(self.file.read(8 * step), np.uint64)
            mine = np.flatnonzero(block & np.uint64(num_parts - 1) == part)
            hashes = np.concatenate([hashes, block[mine]])
            numbers = np.concatenate([numbers, mine + start])
            if len(hashes) > PART or start + step >= self.size:
                order = np.argsort(hashes, kind="stable")  # the first of equal ones stays first
                hashes, numbers = hashes[order], numbers[order]
                is_first = np.append(True, hashes[1:] != hashes[:-1])[: len(hashes)]
                first = numbers[is_first][np.cumsum(is_first) - 1]
                yield np.stack([numbers[~is_first], first[~is_first]])
                hashes, numbers = hashes[is_first], numbers[is_first]
