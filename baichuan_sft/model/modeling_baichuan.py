"""The Baichuan family in one file: RoPE or ALiBi, a plain head or NormHead.

B rows, T query tokens, S key tokens (T plus what the cache holds), N heads, H head width, D model width,
V vocabulary. Parameter names are the vendor's, so its checkpoints load unconverted.

Nothing derived is stored: RoPE angles and ALiBi slopes are computed where they are used, so there is no
buffer that a meta-device load could leave uninitialised.
"""

import math

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple

from .chat_baichuan import ChatMixin
from .configuration_baichuan import BaichuanConfig
from .head_baichuan import BaichuanHead


class BaichuanRMSNorm(nn.Module):
    """Root-mean-square norm, the mean taken in fp32."""

    def __init__(self, hidden_size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden):
        wide = hidden.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(self.weight.dtype)


# --- positions ------------------------------------------------------------------------------------


def rope_angles(position_ids, head_dim):
    """cos and sin, fp32 ``(B, 1, T, H)``; angle k of position p is ``p * 10000 ** (-2k / H)``.

    fp32: bf16 rounds 257 to 256, so positions past 256 would collide.
    """
    exponents = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32) / head_dim
    angles = position_ids[:, None, :, None].float() * 10000.0**-exponents  # (B, 1, T, H/2)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def apply_rope(x, cos, sin):
    """Rotate ``x`` (B, N, T, H) in fp32; dimension k pairs with k + H/2, as in Llama."""
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return (x.float() * cos + rotated * sin).to(x.dtype)


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
            ``(B, T, S)`` 0/1 used as it is, or ``(B, 1 or N, T, S)`` boolean or additive.
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
        allowed = attention_mask if attention_mask.dtype == torch.bool else attention_mask >= 0
        return visible & allowed[..., :num_keys]
    if attention_mask.dim() == 3:
        return visible & (attention_mask[:, None] > 0)
    if attention_mask.dim() != 2 or attention_mask.shape[1] < int(query_index[-1]) + 1:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; expected (batch, {num_keys}) with one entry "
            "per token including the cached ones, or (batch, queries, keys)"
        )
    # A static cache is longer than what it holds; what lies beyond is not there yet.
    of_key = nn.functional.pad(attention_mask, (0, max(0, num_keys - attention_mask.shape[1])))[:, :num_keys]
    of_query = of_key[:, query_index]
    same = of_query[:, :, None] == of_key[:, None, :]
    return visible & (same & (of_key > 0)[:, None, :])[:, None]


def attention_bias(config, hidden, attention_mask, position_ids, query_index, num_keys):
    """The additive mask of one forward pass, shared by all layers, or None where plain causal is right.

    ALiBi enters as fp32 ``slope * (j - i)``; the vendor's ``slope * j`` in bf16 loses the order of
    neighbours past a few hundred tokens. What may not be seen gets the dtype's lowest number, not
    -inf: a padding row that sees nothing then averages instead of giving NaN.

    Returns:
        ``(B or 1, N or 1, T, S)`` in fp32 for eager attention, else in ``hidden``'s dtype; or None.
    """
    num_queries = hidden.shape[1]
    segments = None
    if position_ids is not None and num_queries == num_keys:
        segments = segments_from_positions(position_ids)
        segments = segments if bool((segments > 1).any()) else None
    if attention_mask is not None and attention_mask.dim() == 2 and bool((attention_mask == 1).all()):
        attention_mask = None
    alibi = config.position_embedding == "alibi"
    starts_empty = num_queries == num_keys  # with a cache, only one query sees everything
    if not alibi and attention_mask is None and segments is None and (starts_empty or num_queries == 1):
        return None
    visible = visibility(attention_mask, segments, query_index, num_keys)
    dtype = torch.float32 if config._attn_implementation == "eager" else hidden.dtype
    bias = torch.zeros((), dtype=torch.float32, device=hidden.device)
    if alibi:
        distance = torch.arange(num_keys, device=hidden.device) - query_index[:, None]  # (T, S), j - i
        bias = alibi_slopes(config.num_attention_heads, hidden.device)[:, None, None] * distance  # (N, T, S)
    return torch.where(visible, bias, torch.finfo(dtype).min).to(dtype)


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention written out: scores and softmax in fp32. Returns ``(B, T, N, H)`` and the weights."""
    scores = torch.matmul(query, key.transpose(2, 3)).float() * scaling
    if attention_mask is None:
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        attention_mask = torch.where(causal | (scores.shape[-2] == 1), 0.0, torch.finfo(torch.float32).min)
    weights = (scores + attention_mask).softmax(dim=-1).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


# --- layers ---------------------------------------------------------------------------------------


class BaichuanAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        self.is_causal = True
        self.W_pack = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden, attention_mask, rope, past_key_values=None, output_attentions=False, **kwargs):
        batch, num_tokens, _ = hidden.shape
        qkv = self.W_pack(hidden).view(batch, num_tokens, 3, -1, self.head_dim)  # rows: all q, all k, all v
        query, key, value = (x.transpose(1, 2) for x in qkv.unbind(dim=2))  # (B, N, T, H)
        if rope is not None:
            query, key = apply_rope(query, *rope), apply_rope(key, *rope)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        name = "eager" if output_attentions else self.config._attn_implementation
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention)
        out, weights = attend(self, query, key, value, attention_mask, scaling=self.scaling, **kwargs)
        return self.o_proj(out.reshape(batch, num_tokens, -1)), weights


class BaichuanMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden):
        return self.down_proj(nn.functional.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class BaichuanDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.self_attn = BaichuanAttention(config, layer_idx)
        self.mlp = BaichuanMLP(config)
        self.input_layernorm = BaichuanRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = BaichuanRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden, **kwargs):
        attended, weights = self.self_attn(self.input_layernorm(hidden), **kwargs)
        hidden = hidden + attended
        return hidden + self.mlp(self.post_attention_layernorm(hidden)), weights


class BaichuanPreTrainedModel(PreTrainedModel):
    config_class = BaichuanConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["BaichuanDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _can_compile_fullgraph = True
    # Baichuan-7B's files hold RoPE frequencies that follow from the config.
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, BaichuanHead) and module.normalize:
            bound = self.config.hidden_size**-0.5
            init.uniform_(module.weight, -bound, bound)
        else:
            super()._init_weights(module)


class BaichuanModel(BaichuanPreTrainedModel):
    """Token ids to hidden states."""

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(BaichuanDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = BaichuanRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        **kwargs,
    ):
        """One pass over ``(B, T)`` tokens; see ``visibility`` for what ``attention_mask`` may be.

        Args:
            position_ids: ``(B, T)``; RoPE reads them, and where they do not increase a new packed
                segment starts, on ALiBi models too. None counts on from the cache.
        Raises:
            ValueError: both or neither of ``input_ids`` and ``inputs_embeds``.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        config = self.config
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds  # (B, T, D)
        num_tokens = hidden.shape[1]
        use_cache = config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:
            use_cache = False  # a cache would be filled a second time when the layer is recomputed
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=config)
        num_past = past_key_values.get_seq_length() if past_key_values is not None else 0
        query_index = torch.arange(num_tokens, device=hidden.device) + num_past  # (T,)
        capacity = max_cache_length(past_key_values)
        num_keys = num_past + num_tokens if capacity is None else capacity
        bias = attention_bias(config, hidden, attention_mask, position_ids, query_index, num_keys)
        rope = None
        if config.position_embedding == "rope":
            rope = rope_angles(query_index[None] if position_ids is None else position_ids, config.head_dim)

        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        all_hidden, all_weights = [], []
        for layer in self.layers:
            all_hidden.append(hidden)
            hidden, weights = layer(
                hidden,
                attention_mask=bias,
                rope=rope,
                past_key_values=past_key_values if use_cache else None,
                output_attentions=output_attentions,
            )
            all_weights.append(weights)
        hidden = self.norm(hidden)
        keep_hidden = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*all_hidden, hidden) if keep_hidden else None,
            attentions=tuple(all_weights) if output_attentions else None,
        )


def max_cache_length(cache):
    """Keys that a static cache hands to attention whatever it holds; None for a growing one."""
    return cache.layers[0].max_cache_len if cache is not None and cache.is_compileable else None


class BaichuanForCausalLM(BaichuanPreTrainedModel, ChatMixin, GenerationMixin):
    """A Baichuan model with its head, its loss and ``chat``."""

    def __init__(self, config):
        super().__init__(config)
        self.model = BaichuanModel(config)
        self.lm_head = BaichuanHead(config.hidden_size, config.vocab_size, config.lm_head == "norm")
        self.post_init()

    def set_output_embeddings(self, new_embeddings):
        """Take another weight, as ``resize_token_embeddings`` hands it over; the kind of head stays."""
        head = BaichuanHead(*reversed(new_embeddings.weight.shape), self.lm_head.normalize, device="meta")
        head.weight = new_embeddings.weight
        self.lm_head = head

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        num_items_in_batch=None,
        skip_logits=None,
        **kwargs,
    ):
        """Logits, and the loss where ``labels`` are given.

        Args:
            labels: ``(B, T)`` token ids, or -100 where nothing is learnt; shifted here, not by the caller.
            num_items_in_batch: the number of targets the loss is divided by; None counts those given.
            logits_to_keep: compute logits of the last so many positions only; 0 is all.
            skip_logits: with labels, return no logits; None means: while training. All logits at once
                are the largest tensor of a step.
        """
        if labels is not None and use_cache is None:
            use_cache = False
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden, loss, logits = outputs.last_hidden_state, None, None
        if labels is not None:
            loss = self.lm_head(hidden, labels, num_items_in_batch, self.config.z_loss_weight)
        if labels is None or not (self.training if skip_logits is None else skip_logits):
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, keep])
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


# Baichuan-7B's files spell the class names this way.
BaiChuanModel = BaichuanModel
BaiChuanForCausalLM = BaichuanForCausalLM
