"""FlexAttention over runs: a mask of blocks, and ALiBi inside the kernel.

B rows, T tokens of a row, N heads, H head width.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from baichuan_sft.model.attention_baichuan import alibi_slopes

BLOCK = 128  # tokens of a block, the kernel's own unit


class FlexMask(NamedTuple):
    """Attributes: blocks: a BlockMask. alibi: the score_mod, None for RoPE."""

    blocks: Any
    alibi: Any


def flex_mask(config, hidden, runs, lengths):
    """Blocks straight from the runs, which only grow along a row: no T x T tensor is looked at.

    Query block i needs key block j <= i where j's last run is i's first or a later one. The block needs
    no mask inside where j < i and both hold one and the same run.
    """
    from torch.nn.attention.flex_attention import BlockMask, _dense_to_ordered

    num_tokens = runs.shape[1]
    short = -num_tokens % BLOCK
    edges = F.pad(runs, (0, short), value=num_tokens + 1).unflatten(1, (-1, BLOCK))  # (B, T / BLOCK, BLOCK)
    first, last = edges[:, :, 0], edges[:, :, -1]
    index = torch.arange(first.shape[1], device=runs.device)
    needed = (index[None, :] <= index[:, None]) & (last[:, None, :] >= first[:, :, None])
    whole = (index[None, :] < index[:, None]) & (first[:, None, :] == last[:, :, None])
    partial = _dense_to_ordered((needed & ~whole)[:, None])
    full = _dense_to_ordered((needed & whole)[:, None])

    def same_run(b, h, q, k):
        return (runs[b, q] == runs[b, k]) & (k <= q)

    blocks = BlockMask.from_kv_blocks(
        *partial, *full, BLOCK_SIZE=BLOCK, mask_mod=same_run, seq_lengths=(num_tokens, num_tokens)
    )
    if config.position_embedding != "alibi":
        return FlexMask(blocks, None)
    slopes = alibi_slopes(config.num_attention_heads, hidden.device)
    return FlexMask(blocks, lambda score, b, h, q, k: score + slopes[h] * (k - q))


def flex(query, key, value, layout, scaling):
    """FlexAttention; fused on a GPU, written out on a CPU, where it has no backward."""
    from torch.nn.attention.flex_attention import flex_attention

    attend = _compiled_flex() if query.is_cuda else flex_attention
    blocks, alibi = layout.extra
    return attend(query, key, value, score_mod=alibi, block_mask=blocks, scale=scaling).transpose(1, 2)


@functools.cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)  # the first shape alone; with a second one for all
