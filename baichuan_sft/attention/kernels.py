"""Kernels over runs: ``(B, N, T, H)`` three times to ``(B, T, N, H)``; and what each wants besides the runs.

B rows, T tokens of a row, N heads, H head width.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from baichuan_sft.attention.layout import Layout
from baichuan_sft.model.attention_baichuan import alibi_slopes, attention_bias, computed_dtype


def with_layout(kernel):
    """An attention function of transformers' signature; sdpa takes over where there is no Layout."""

    # A list of lengths that differs in each batch would be compiled anew for each.
    @torch.compiler.disable
    def attend(module, query, key, value, attention_mask, scaling, **kwargs):
        if not isinstance(attention_mask, Layout):
            sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
            return sdpa(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return kernel(query, key, value, attention_mask, scaling), None

    return attend


def flat(x):
    """``(B, N, T, H)`` to ``(B * T, N, H)``, a view where rows lie end to end in memory."""
    return x.transpose(1, 2).flatten(0, 1)


# Of a longer run the bias is more work than head dimensions that carry it, and grows with its square.
LONGEST_BIAS = 1024


def segments(query, key, value, layout, scaling):
    """One call per run, each with its own kernel's causal rule; ``extra`` is ALiBi over the longest run."""
    parts = [flat(x).split(layout.lengths) for x in (query, key, value)]
    out = []
    for q, k, v in zip(*parts):
        length, bias = q.shape[0], layout.extra
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, N, length, H)
        bias = None if bias is None else bias[..., :length, :length]
        run = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None, scale=scaling)
        out.append(run[0].transpose(0, 1))
    return torch.cat(out).view(query.shape[0], query.shape[2], query.shape[1], -1)


def alibi_of_longest(config, hidden, runs, lengths):
    """ALiBi over the longest run, ``(1, N, L, L)``: its corner is that of a shorter one; None for RoPE."""
    if config.position_embedding != "alibi":
        return None
    if max(lengths) > LONGEST_BIAS:
        return augmentation(config, hidden, lengths, None)
    index = torch.arange(max(lengths), device=hidden.device)
    return attention_bias(
        config, hidden[:1, : len(index)], None, None, index, len(index), computed_dtype(hidden)
    )


class Augmentation(NamedTuple):
    """ALiBi for kernels that know no bias: what is appended to each query and key.

    softmax ignores what is equal in a row, so ``slope * j`` says as much as ``slope * (j - i)``. With
    ``j = 256 a + b`` both factors are exact in bf16, and the slope is split into three bf16 numbers:

        query  s1  s2  s3  256 s1  256 s2  256 s3  0 0        s1 + s2 + s3 = slope / scaling
        key    b   b   b   a       a       a       0 0

    Attributes:
        query: ``(N, 8)`` in the dtype of queries. key: ``(B * T, 8)``.
        inner: ``extra`` of the kernel.
    """

    query: torch.Tensor
    key: torch.Tensor
    inner: Any


def augmentation(config, hidden, lengths, inner):
    """``Augmentation`` of an ALiBi model, ``inner`` itself of a RoPE model."""
    if config.position_embedding != "alibi":
        return inner
    assert max(lengths) <= 257 * 256  # past which bf16 would round a
    dtype, rest, terms = computed_dtype(hidden), alibi_slopes(config.num_attention_heads, hidden.device), []
    rest = rest.double() * config.head_dim**0.5
    for _ in range(3):
        terms.append(rest.to(dtype))
        rest = rest - terms[-1].double()
    split = torch.stack(terms, dim=1)  # (N, 3)
    place = torch.cat([torch.arange(length) for length in lengths]).to(hidden.device)
    low, high = (part[:, None].expand(-1, 3).to(dtype) for part in (place % 256, place // 256))
    return Augmentation(
        F.pad(torch.cat((split, 256 * split), dim=1), (0, 2)),
        F.pad(torch.cat((low, high), dim=1), (0, 2)),
        inner,
    )


def augmented(kernel):
    """``kernel`` over head dimensions that carry ALiBi where ``extra`` is an ``Augmentation``."""

    def attend(query, key, value, layout, scaling):
        if not isinstance(layout.extra, Augmentation):
            return kernel(query, key, value, layout, scaling)
        of_query, of_key, inner = layout.extra
        batch, num_heads, num_tokens, width = query.shape
        query = torch.cat((query, of_query[:, None].expand(batch, -1, num_tokens, -1)), dim=-1)
        of_key = of_key.view(batch, 1, num_tokens, -1).expand(-1, num_heads, -1, -1)
        key = torch.cat((key, of_key), dim=-1)
        value = F.pad(value, (0, of_query.shape[1]))  # flash kernels want one width
        return kernel(query, key, value, Layout(layout.lengths, inner), scaling)[..., :width]

    return attend


def varlen(query, key, value, layout, scaling):
    """torch's flash kernel over runs end to end; ``extra`` is where each begins, int32 ``(runs + 1,)``."""
    from torch.nn.attention.varlen import varlen_attn

    causal = {"window_size": (-1, 0)} if "window_size" in _parameters(varlen_attn) else {"is_causal": True}
    q, k, v = (flat(x).contiguous() for x in (query, key, value))
    if "scale" in _parameters(varlen_attn):
        causal["scale"] = scaling
    else:  # the first release divides by the root of the width, whatever it stands for
        q = q * (scaling * q.shape[-1] ** 0.5)
    longest = max(layout.lengths)
    out: Any = varlen_attn(q, k, v, layout.extra, layout.extra, longest, longest, **causal)
    return out.view(query.shape[0], query.shape[2], query.shape[1], -1)


@functools.cache
def _parameters(function: Callable) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def run_starts(config, hidden, runs, lengths):
    starts = torch.tensor([0, *lengths], device=hidden.device).cumsum(0).int()
    return augmentation(config, hidden, lengths, starts)


def xformers(query, key, value, layout, scaling):
    """xformers' kernel over runs end to end; ``extra`` is its block-diagonal causal bias."""
    from xformers.ops import memory_efficient_attention

    q, k, v = (flat(x)[None] for x in (query, key, value))  # (1, B*T, N, H)
    out = memory_efficient_attention(q, k, v, attn_bias=layout.extra, scale=scaling)
    return out.view(query.shape[0], query.shape[2], query.shape[1], -1)


def block_diagonal(config, hidden, runs, lengths):
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

    return augmentation(config, hidden, lengths, BlockDiagonalCausalMask.from_seqlens(lengths))
