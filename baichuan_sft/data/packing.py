"""Segments to a padded batch.

    # B rows of a batch, T tokens of a row

A segment is one conversation. Today every row holds one segment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from baichuan_sft.data.template import IGNORE


class Collator:
    """Pads segments on the right to one length and stacks them.

        input_ids        195  11 196  21   2   0   0   0
        labels             .   .   .  21   2   .   .   .        (. = IGNORE)
        attention_mask     1   1   1   1   1   0   0   0

    Args:
        pad_token_id: the id written behind a segment.
        pad_to_multiple_of: T is rounded up to a multiple of this; tensor cores like 8.
        max_length: T of every batch; None pads to the longest segment of the batch.
    """

    def __init__(self, pad_token_id: int, pad_to_multiple_of: int = 8, max_length: int | None = None) -> None:
        assert pad_to_multiple_of >= 1
        self.pad_token_id = pad_token_id
        self.pad_to_multiple_of = pad_to_multiple_of
        self.max_length = max_length

    def __call__(self, segments: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """``input_ids``, ``labels`` and ``attention_mask``, int64 ``(B, T)`` each.

        Args:
            segments: ``input_ids`` and ``labels`` of equal length; other columns are left out.
        """
        width = self._width([len(segment["input_ids"]) for segment in segments])
        shape = (len(segments), width)
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.int64)  # (B, T)
        labels = torch.full(shape, IGNORE, dtype=torch.int64)  # (B, T)
        # By length, not by id: the vendor's `ids != pad` also masks a literal <unk> inside a text.
        attention_mask = torch.zeros(shape, dtype=torch.int64)  # (B, T)
        for row, segment in enumerate(segments):
            length = len(segment["input_ids"])
            assert length == len(segment["labels"])
            input_ids[row, :length] = torch.as_tensor(segment["input_ids"])
            labels[row, :length] = torch.as_tensor(segment["labels"])
            attention_mask[row, :length] = 1
        return {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}

    def _width(self, lengths: list[int]) -> int:
        longest = max(lengths)
        if self.max_length is not None:
            assert longest <= self.max_length, f"a segment of {longest} tokens, max_length {self.max_length}"
            longest = self.max_length
        return -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
