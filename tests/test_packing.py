"""Padding of a batch against rows written by hand."""

import pytest
import torch

from baichuan_sft.data.packing import Collator

SEGMENTS = [
    {"input_ids": [195, 11, 196, 21, 2], "labels": [-100, -100, -100, 21, 2], "length": 5, "item": 0},
    {"input_ids": [195, 0, 196], "labels": [-100, -100, 7], "length": 3, "item": 1},  # 0 is a literal <unk>
]


def test_batch_is_padded_on_the_right():
    batch = Collator(0)(SEGMENTS)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[195, 11, 196, 21, 2, 0, 0, 0], [195, 0, 196, 0, 0, 0, 0, 0]],
        "labels": [[-100, -100, -100, 21, 2, -100, -100, -100], [-100, -100, 7] + [-100] * 5],
        "attention_mask": [[1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0]],
    }
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


@pytest.mark.parametrize("multiple, max_length, width", [(1, None, 5), (4, None, 8), (8, 20, 24), (1, 5, 5)])
def test_width(multiple, max_length, width):
    batch = Collator(3, pad_to_multiple_of=multiple, max_length=max_length)(SEGMENTS)
    assert {tuple(tensor.shape) for tensor in batch.values()} == {(2, width)}
    assert batch["input_ids"][1, 3:].eq(3).all()


def test_segment_longer_than_max_length_is_our_fault():
    with pytest.raises(AssertionError, match="a segment of 5 tokens, max_length 4"):
        Collator(0, max_length=4)(SEGMENTS)
