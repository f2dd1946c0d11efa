"""Positions and attention: RoPE's angles, ALiBi, what each token may see, and attention written out.

B rows, T query tokens, S key tokens (T plus what the cache holds), N heads, H head width.
"""

import math

import torch
from torch import nn
from torch.compiler import is_compiling

# --- positions ------------------------------------------------------------------------------------


def rope_angles(position_ids, head_dim):
    """cos and sin, fp32 ``(B, T, 1, 1, H / 2)``; angle k of position p is ``p * 10000 ** (-2k / H)``.

    fp32: bf16 rounds 257 to 256, so positions past 256 would collide.
    """
    exponents = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32) / head_dim
    angles = position_ids[:, :, None, None, None].float() * 10000.0**-exponents  # (B, T, 1, 1, H/2)
    return angles.cos(), angles.sin()


def alibi_slopes(num_heads, device=None):
    """Per-head ALiBi slope, fp32 ``(N,)`` in (0, 1); attention adds ``-slope * (i - j)`` to logit (i, j).

    Heads beyond the last power of two (40 = 32 + 8 in the 13B models) take every other slope of the
    next power of two.

    Source: Press et al. 2022 (arXiv:2108.12409) sec. 3.
    """

    def geometric(count):
        return [2.0 ** (-8.0 * (head + 1) / count) for head in range(count)]

    base = 2 ** math.floor(math.log2(num_heads))
    slopes = geometric(base) + geometric(2 * base)[0::2][: num_heads - base]
    return torch.tensor(slopes, dtype=torch.float32, device=device)


# --- what may be seen -----------------------------------------------------------------------------


def segments_from_positions(position_ids):
    """Segment number of each token, from 1; a segment starts where the position does not increase.

    position_ids  0 1 2 0 1 0 0 1 2 3
    segments      1 1 1 2 2 3 4 4 4 4
    """
    starts = position_ids[:, 1:] <= position_ids[:, :-1]
    return nn.functional.pad(starts.long().cumsum(dim=1), (1, 0)) + 1


def visibility(attention_mask, segments, query_index, num_keys):
    """Which keys each query may see.

    Args:
        attention_mask: None, or ``(B, S)``: 0 is padding, and tokens see only tokens of the same
            number (1 everywhere is the usual mask; 1 1 2 2 2 is two packed segments), or
            ``(B, T, S)`` or ``(B, 1 or N, T, S)`` of 0 and 1, or such a 4-D one of floats to be added
            to the scores, whose lowest numbers mean "not visible".
        segments: None, or ``(B, T)`` without a cache; combined with the mask.
        query_index: ``(T,)`` place of each query among the S keys.
    Returns:
        boolean, broadcastable to ``(B, N, T, S)``.
    Raises:
        ValueError: a mask of another shape.
    """
    keys = torch.arange(num_keys, device=query_index.device)
    visible = (keys <= query_index[:, None])[None, None]  # (1, 1, T, S)
    if segments is not None:
        visible = visible & (segments[:, None, :, None] == segments[:, None, None, :])
    if attention_mask is None:
        return visible
    if attention_mask.dim() == 4:
        additive = attention_mask.is_floating_point()
        allowed = attention_mask > (torch.finfo(attention_mask.dtype).min / 2 if additive else 0)
        return visible & allowed[..., :num_keys]
    if attention_mask.dim() == 3:
        return visible & (attention_mask[:, None] > 0)
    is_2d = attention_mask.dim() == 2
    if not is_2d or (not is_compiling() and attention_mask.shape[1] < int(query_index[-1]) + 1):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; expected (batch, {num_keys}) with one "
            "entry per token including the cached ones, or (batch, queries, keys)"
        )
    # A static cache is longer than what it holds; what lies beyond is not there yet.
    of_key = nn.functional.pad(attention_mask, (0, max(0, num_keys - attention_mask.shape[1])))[:, :num_keys]
    of_query = of_key[:, query_index]
    same = of_query[:, :, None] == of_key[:, None, :]
    return visible & (same & (of_key > 0)[:, None, :])[:, None]


def computed_dtype(hidden):
    """Of queries and keys: under autocast linears give half precision from wider hidden states."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def attention_bias(config, hidden, attention_mask, position_ids, query_index, num_keys, dtype):
    """The additive mask of one forward pass, shared by all layers, or None where plain causal is right.

    ALiBi enters as fp32 ``slope * (j - i)``; the vendor's ``slope * j`` in bf16 loses the order of
    neighbours past a few hundred tokens. What may not be seen gets the dtype's lowest number, not
    -inf: a padding row that sees nothing then averages instead of giving NaN.

    Returns:
        ``(B or 1, N or 1, T, S)`` in ``dtype``, or None.
    """
    num_queries = hidden.shape[1]
    segments = None
    if position_ids is not None and num_queries == num_keys:
        segments = segments_from_positions(position_ids)
    if not is_compiling():  # a compiled graph cannot branch on what a tensor holds, and builds the mask
        if segments is not None and bool((segments == 1).all()):
            segments = None
        if attention_mask is not None and attention_mask.dim() == 2 and bool((attention_mask == 1).all()):
            attention_mask = None
    alibi = config.position_embedding == "alibi"
    starts_empty = num_queries == num_keys  # with a cache, only one query sees everything
    if not alibi and attention_mask is None and segments is None and (starts_empty or num_queries == 1):
        return None
    visible = visibility(attention_mask, segments, query_index, num_keys)
    bias = torch.zeros((), dtype=torch.float32, device=hidden.device)
    if alibi:
        distance = torch.arange(num_keys, device=hidden.device) - query_index[:, None]  # (T, S), j - i
        bias = alibi_slopes(config.num_attention_heads, hidden.device)[:, None, None] * distance  # (N, T, S)
    if attention_mask is not None and attention_mask.dim() == 4 and attention_mask.is_floating_point():
        bias = bias + attention_mask[..., :num_keys].float()
    return torch.where(visible, bias, torch.finfo(dtype).min).to(dtype)


# Attention implementations that take something else than ``attention_bias`` from the same arguments.
PREPARE: dict = {}


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention written out: scores and softmax in fp32. Returns ``(B, T, N, H)`` and the weights."""
    scores = torch.matmul(query, key.transpose(2, 3)).float() * scaling
    if attention_mask is None:
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        attention_mask = torch.where(causal | (scores.shape[-2] == 1), 0.0, torch.finfo(torch.float32).min)
    weights = (scores + attention_mask).softmax(dim=-1).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights
