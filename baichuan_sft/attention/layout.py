"""Runs of tokens that see each other, in place of a T x T mask.

B rows, T tokens of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from baichuan_sft.model.attention_baichuan import attention_bias, segments_from_positions


@dataclass(frozen=True)
class Layout:
    """Which tokens of a batch see each other.

        mask or segments    1 1 1 2 2 0 | 1 1 1 1 2 2
        lengths             3     2   1   4       2

    Attributes:
        lengths: tokens of each run, row after row; their sum is B * T.
        extra: what the backend's kernel wants besides, made once for all layers.
    """

    lengths: list[int]
    extra: Any = None


def run_numbers(
    attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None, shape
) -> torch.Tensor:
    """Number of the run of each token, int64 ``(B, T)``, from 1 in each row; see ``Layout``."""
    given = attention_mask if position_ids is None else position_ids
    assert given is not None
    changes = torch.zeros(shape, dtype=torch.bool, device=given.device)
    if position_ids is not None:
        changes |= F.pad(segments_from_positions(position_ids.expand(shape)).diff(dim=1) != 0, (1, 0))
    if attention_mask is not None:
        changes |= F.pad(attention_mask.diff(dim=1) != 0, (1, 0))
    return changes.long().cumsum(dim=1) + 1


def has_plain_runs(attention_mask: torch.Tensor | None) -> bool:
    """Whether no run is continued behind another: in 1 1 0 1 the last token sees the first two."""
    if attention_mask is None:
        return True
    later = F.pad(attention_mask, (1, 0))[:, :-1].cummax(dim=1).values
    changed = F.pad(attention_mask.diff(dim=1) != 0, (1, 0)) & (attention_mask > 0)
    return not bool((changed & (attention_mask <= later)).any())


def layout_or_bias(make_extra, config, hidden, attention_mask, position_ids, query_index, num_keys, dtype):
    """The Layout of a batch, or the additive mask where a Layout cannot say what may be seen.

    That is: with a cache, with a mask of three or four dimensions, or with a mask that has gaps. One
    exchange with a GPU per batch, for the lengths.

    Args:
        make_extra: ``(config, hidden, runs, lengths) -> extra``.
    """
    shape = hidden.shape[:2]
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        attention_mask = attention_mask.long()
    said = attention_mask is None or (attention_mask.dim() == 2 and attention_mask.shape == shape)
    if shape[1] != num_keys or not said or not has_plain_runs(attention_mask):
        return attention_bias(config, hidden, attention_mask, position_ids, query_index, num_keys, dtype)
    if attention_mask is None and position_ids is None:
        position_ids = query_index[None]
    runs = run_numbers(attention_mask, position_ids, shape)
    numbered = runs + torch.arange(shape[0], device=runs.device)[:, None] * (shape[1] + 1)  # over all rows
    lengths = torch.unique_consecutive(numbered, return_counts=True)[1].tolist()
    return Layout(lengths, make_extra(config, hidden, runs, lengths))
