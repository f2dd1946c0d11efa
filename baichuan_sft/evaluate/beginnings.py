"""What many prompts begin with: found among their ids, read once, and put before each of them.

B or R rows, T tokens of a padded row, P tokens of the shared beginning, N heads, H head width.
"""

from __future__ import annotations

from array import array
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

# A beginning pays only where it is longer than the last one by so many tokens: a pass costs time by itself.
STEP = 32
ROOM = 64  # tokens that a row may grow by before it is copied


def beginnings(rows: list[array]) -> list[tuple[list[int], int]]:
    """Groups of rows that are worth reading what they begin with apart, and how many ids that is.

        a b c d 1 2     a b c d     2 rows save 4 tokens once, for 4 - 0 that are read apart
        a b c d 3       a b c d     (were STEP not 32)
        x y             nothing

    Args:
        rows: in their order, so that those that begin alike stand together.
    Returns:
        places in ``rows``, each once; the last id of a row is never shared, it predicts.
    """
    common = [_common(a, b) for a, b in zip(rows, rows[1:])]

    def split(start: int, stop: int, shared: int) -> list[tuple[list[int], int]]:
        """Of rows that all share so much: those that stay with it, then groups that share more."""
        stay: list[int] = []
        groups: list[tuple[list[int], int]] = []
        while start < stop:
            end = start + 1
            while end < stop and common[end - 1] >= shared + STEP:
                end += 1
            if end == start + 1:
                stay.append(start)
            else:
                (own, more), *deeper = split(start, end, min(common[start : end - 1]))
                groups += deeper
                # Read apart it costs ``more`` once; staying, what exceeds ``shared`` in each row.
                if len(own) * (more - shared) > more:
                    groups.append((own, more))
                else:
                    stay += own
            start = end
        return [(stay, shared), *groups]

    return [group for group in split(0, len(rows), 0) if group[0]]


def _common(a: array, b: array) -> int:
    """Ids that both begin with, less the last of the shorter."""
    size = min(len(a), len(b)) - 1
    low, high = 0, size
    while low < high:  # slices compare at the speed of memory
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


class SharedBeginning:
    """Cache of ``(1, N, P, H)`` for rows that all begin so: each layer gets it before their own keys.

    Attributes:
        beginning: None where P is 0.
        own: of each layer the rows' own keys and values, ``(B, N, T, H)``; where ``keep`` says so.
    """

    is_compileable = False

    def __init__(self, beginning: DynamicCache | None, keep: bool):
        self.beginning: Any = beginning
        self.shared = 0 if beginning is None else beginning.get_seq_length()
        self.keep = keep
        self.own: list[tuple[torch.Tensor, ...]] = []

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.shared

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any) -> Any:
        """What a layer attends to: ``(B, N, P + T, H)`` twice, put together for the moment."""
        if self.keep:
            self.own.append((keys, values))
        return self._behind(layer_idx, (keys, values))

    def left_padded(self, rows: list[int], lengths: list[int]) -> WrittenRows:
        """Some rows to write on, so that they end together; what stands before their own part means nothing.

            own    a b c . .   ->  beginning a a a b c
                   d e f g h       beginning d e f g h

        Args:
            rows: places among the B, some more than once. lengths: of their own part.
        """
        longest, layers = max(lengths), []
        for number, layer in enumerate(self.own):
            device = layer[0].device
            shift = torch.tensor(lengths, device=device)[:, None] - longest
            index = (torch.arange(longest, device=device) + shift).clamp_min(0)  # (R, longest)
            place = torch.tensor(rows, device=device)[:, None]
            layers.append(self._behind(number, tuple(x[place, :, index].transpose(1, 2) for x in layer)))
        return WrittenRows(self.shared, layers)

    def _behind(self, layer_idx: int, own: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """The beginning's keys and values, and each row's own behind them."""
        if self.beginning is None:
            return own
        layer = self.beginning.layers[layer_idx]
        old = (layer.keys, layer.values)
        return tuple(torch.cat((a.expand(len(b), -1, -1, -1), b), dim=2) for a, b in zip(old, own))


class WrittenRows:
    """Cache of rows that grow token by token, into room kept for it: copying all at each token took most of
    the time.

    Attributes:
        shared: P. layers: of each the keys and values, ``(R, N, length + room, H)``.
        length: of the rows, padding included.
    """

    is_compileable = False

    def __init__(self, shared: int, layers: list[tuple[torch.Tensor, ...]]):
        self.shared, self.layers, self.length = shared, layers, layers[0][0].shape[2]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any) -> Any:
        """What a layer attends to: ``(R, N, length + T, H)`` twice, without a copy."""
        end = self.length + keys.shape[2]
        if end > self.layers[layer_idx][0].shape[2]:
            room = (0, 0, 0, ROOM + keys.shape[2])
            self.layers[layer_idx] = tuple(nn.functional.pad(x, room) for x in self.layers[layer_idx])
        for x, new in zip(self.layers[layer_idx], (keys, values)):
            x[:, :, self.length : end] = new
        whole = tuple(x[:, :, :end] for x in self.layers[layer_idx])
        if layer_idx == len(self.layers) - 1:
            self.length = end
        return whole

    def keep_rows(self, rows: list[int], longest: int) -> None:
        """Drop all but these rows, and the padding that ``longest`` tokens of their own do not need."""
        device = self.layers[0][0].device
        own = range(self.length - longest, self.length)
        index = torch.tensor([*range(self.shared), *own], device=device)
        place = torch.tensor(rows, device=device)
        self.layers = [tuple(x[place][:, :, index] for x in layer) for layer in self.layers]
        self.length = len(index)
