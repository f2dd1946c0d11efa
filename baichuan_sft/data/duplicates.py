"""Exact duplicates among any number of records, with bounded memory."""

from __future__ import annotations

import tempfile

import numpy as np

PART = 4 << 20  # hashes held in memory at once, 32 MiB


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

    def copies(self) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the records that are copies, ascending, and of the first record each is a copy of."""
        num_parts = -(-self.size // PART)
        pairs = [np.empty((2, 0), np.int64), *(self._copies_in(part, num_parts) for part in range(num_parts))]
        copies, firsts = np.concatenate(pairs, axis=1)
        order = np.argsort(copies)
        return copies[order], firsts[order]

    def _copies_in(self, part: int, num_parts: int) -> np.ndarray:
        """(2, copies): the copies in one part, and their firsts; equal hashes fall into the same part."""
        hashes, numbers = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
        self.file.seek(0)
        for start in range(0, self.size, PART):
            block = np.frombuffer(self.file.read(8 * PART), np.uint64)
            mine = np.flatnonzero(block % np.uint64(num_parts) == part)
            hashes.append(block[mine])
            numbers.append(mine + start)
        joined, number = np.concatenate(hashes), np.concatenate(numbers)
        order = np.argsort(joined, kind="stable")  # the first of equal ones stays first
        joined, number = joined[order], number[order]
        starts = np.flatnonzero(np.concatenate([[True], joined[1:] != joined[:-1]])[: len(joined)])
        first = np.repeat(number[starts], np.diff(np.append(starts, len(joined))))
        is_copy = first != number
        return np.stack([number[is_copy], first[is_copy]])
