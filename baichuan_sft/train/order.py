"""Which rows each update takes, and which of them each rank and micro-batch.

# U rows of an update = ranks x micro-batches x rows of a batch
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler
from transformers import TrainerCallback

from baichuan_sft.data.packing import EMPTY_ROW

UPDATES_SORTED = 50  # of which group_by_length sorts the rows together


class RowOrder(Sampler[list[int]]):
    """The micro-batches of one rank, as lists of row numbers.

    The rows of each update follow from the strategy, the seed, the epoch and U alone, not from the number
    of ranks or micro-batches that share them. The last update of an epoch takes what is left, shared out
    evenly; a micro-batch for which nothing is left gets ``EMPTY_ROW``, so that all ranks take as many steps.

        9 rows, 2 ranks, 2 micro-batches of 2         rank 0          rank 1
        update 0: 5 0 7 2 8 1 4 3                     5 0 | 8 1       7 2 | 4 3
        update 1: 6                                   6   | EMPTY     EMPTY | EMPTY

    Args:
        lengths: tokens of each row.
        rows_per_update: U where the run began on another number of ranks; at most what fits on these.
        strategy: a name in ``STRATEGIES``.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        *,
        batch_size: int,
        rows_per_update: int | None = None,
        accumulation: int = 1,
        world_size: int = 1,
        rank: int = 0,
        strategy: str = "random",
        seed: int = 0,
    ) -> None:
        self.lengths = lengths
        self.accumulation, self.world_size, self.rank = accumulation, world_size, rank
        self.rows_per_update = rows_per_update or batch_size * accumulation * world_size
        self.arrange = STRATEGIES[strategy]
        self.seed, self.epoch = seed, 0

    @property
    def num_updates(self) -> int:
        """Updates of one epoch."""
        return -(-len(self.lengths) // self.rows_per_update)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def updates(self) -> list[np.ndarray]:
        """The rows of each update of this epoch, the same on every rank."""
        rng = np.random.default_rng((self.seed, self.epoch))
        return self.arrange(self.lengths, self.rows_per_update, rng)

    def __len__(self) -> int:
        return self.num_updates * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        for rows in self.updates():
            parts = np.array_split(rows, self.accumulation * self.world_size)
            for step in range(self.accumulation):
                # Where rows are sorted, a rank that had the longer ones has the shorter ones next.
                place = self.rank if step % 2 == 0 else self.world_size - 1 - self.rank
                yield parts[step * self.world_size + place].tolist() or [EMPTY_ROW]


def _sequential(lengths: np.ndarray, size: int, rng: np.random.Generator) -> list[np.ndarray]:
    return _cut(np.arange(len(lengths)), size)


def _random(lengths: np.ndarray, size: int, rng: np.random.Generator) -> list[np.ndarray]:
    return _cut(rng.permutation(len(lengths)), size)


def _group_by_length(lengths: np.ndarray, size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Rows of like length in one update, so that no rank waits long for another; the longest first.

    Memory that does not suffice then shows at once.
    """
    updates = []
    for part in _cut(rng.permutation(len(lengths)), UPDATES_SORTED * size):
        updates += _cut(part[np.argsort(-lengths[part], kind="stable")], size)
    updates = [updates[i] for i in rng.permutation(len(updates))]
    longest = max(range(len(updates)), key=lambda i: lengths[updates[i][0]])
    updates.insert(0, updates.pop(longest))
    return updates


def _cut(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


STRATEGIES = {"random": _random, "group_by_length": _group_by_length, "sequential": _sequential}


class SetEpoch(TrainerCallback):
    """Tells the order which epoch begins, from the updates done: a resumed run counts on."""

    def __init__(self, order: RowOrder) -> None:
        self.order = order

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.order.set_epoch(state.global_step // self.order.num_updates)
