"""The Baichuan family in one file: RoPE or ALiBi, a plain head or NormHead.

B rows, T query tokens, S key tokens (T plus what the cache holds), N heads, H head width, D model width,
V vocabulary. Parameter names are the vendor's, so its checkpoints load unconverted.

Nothing derived is stored: RoPE angles and ALiBi slopes are computed where they are used
(attention_baichuan.py), so there is no buffer that a meta-device load could leave uninitialised.
"""

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple

from .attention_baichuan import (
    PREPARE,
    attention_bias,
    computed_dtype,
    eager_attention_forward,
    rope_angles,
)
from .chat_baichuan import ChatMixin
from .chat_template_baichuan import read_messages  # noqa: F401  (older transformers copy direct imports only)
from .configuration_baichuan import BaichuanConfig
from .elementwise_baichuan import rms_norm, split_and_rotate, swiglu
from .head_baichuan import BaichuanHead
from .quantize_baichuan import QuantizeMixin


class BaichuanRMSNorm(nn.Module):
    """Root-mean-square norm, the mean taken in fp32."""

    def __init__(self, hidden_size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden):
        return rms_norm(hidden, self.weight, self.eps)


class BaichuanAttention(nn.Module):
    rotate = staticmethod(split_and_rotate)

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        self.is_causal = True
        self.W_pack = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        hidden,
        attention_mask,
        rope,
        query_index,
        past_key_values=None,
        output_attentions=False,
        **kwargs,
    ):
        batch, num_tokens, _ = hidden.shape
        qkv = self.W_pack(hidden).view(batch, num_tokens, 3, -1, self.head_dim)  # rows: all q, all k, all v
        if rope is not None:
            query, key, value = self.rotate(qkv, *rope)  # (B, N, T, H)
        else:
            query, key, value = (x.transpose(1, 2) for x in qkv.unbind(dim=2))
        if past_key_values is not None:
            # Older static caches must be told where to write, newer ones know.
            place = {"cache_position": query_index}
            key, value = past_key_values.update(key, value, self.layer_idx, place)
        name = "eager" if output_attentions else self.config._attn_implementation
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        out, weights = attend(self, query, key, value, attention_mask, scaling=self.scaling, **kwargs)
        return self.o_proj(out.reshape(batch, num_tokens, -1)), weights


class BaichuanMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden):
        return self.down_proj(swiglu(self.gate_proj(hidden), self.up_proj(hidden)))


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
            ValueError: both or neither of ``input_ids`` and ``inputs_embeds``; a mask of another shape.
            TypeError: an argument that a Baichuan model does not have.
        """
        # generate() of older versions says it; their static caches take a key of zeros for an empty place.
        query_index = kwargs.get("cache_position")
        if unknown := sorted(kwargs.keys() - {"cache_position"}):
            raise TypeError(f"a Baichuan model's forward has no argument {', '.join(unknown)}")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        config = self.config
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds  # (B, T, D)
        num_tokens = hidden.shape[1]
        use_cache = config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:
            use_cache = False  # a cache would be filled a second time when the layer is recomputed
            if past_key_values is not None:
                raise ValueError(
                    "past_key_values cannot be used with gradient checkpointing; turn one of them off"
                )
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=config)
        num_past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if query_index is None:
            query_index = torch.arange(num_tokens, device=hidden.device) + num_past  # (T,)
        capacity = max_cache_length(past_key_values)
        num_keys = num_past + num_tokens if capacity is None else capacity
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        keep_hidden = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        # Only eager attention has weights to return, and it adds the bias to fp32 scores.
        eager = output_attentions or config._attn_implementation == "eager"
        dtype = torch.float32 if eager else computed_dtype(hidden)
        prepare = attention_bias if eager else PREPARE.get(config._attn_implementation, attention_bias)
        bias = prepare(config, hidden, attention_mask, position_ids, query_index, num_keys, dtype)
        rope = None
        if config.position_embedding == "rope":
            rope = rope_angles(query_index[None] if position_ids is None else position_ids, config.head_dim)

        all_hidden, all_weights = [], []
        for layer in self.layers:
            if keep_hidden:
                all_hidden.append(hidden)
            hidden, weights = layer(
                hidden,
                attention_mask=bias,
                rope=rope,
                query_index=query_index,
                past_key_values=past_key_values,
                output_attentions=output_attentions,
            )
            if output_attentions:
                all_weights.append(weights)
        hidden = self.norm(hidden)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*all_hidden, hidden) if keep_hidden else None,
            attentions=tuple(all_weights) if output_attentions else None,
        )


def max_cache_length(cache):
    """Keys that a static cache hands to attention whatever it holds; None for a growing one."""
    return cache.layers[0].max_cache_len if cache is not None and cache.is_compileable else None


class BaichuanForCausalLM(QuantizeMixin, BaichuanPreTrainedModel, ChatMixin, GenerationMixin):  # type: ignore[misc]
    """A Baichuan model with its head, its loss, ``chat`` and ``quantize``."""

    def __init__(self, config):
        super().__init__(config)
        self.model = BaichuanModel(config)
        self.lm_head = BaichuanHead(config.hidden_size, config.vocab_size, config.lm_head == "norm")
        self.post_init()

    def set_output_embeddings(self, new_embeddings):
        """Take another weight, as ``resize_token_embeddings`` hands it over; the kind of head stays."""
        shape = new_embeddings.in_features, new_embeddings.out_features  # ZeRO-3's weight has none
        head = BaichuanHead(*shape, normalize=self.lm_head.normalize, device="meta")
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
            z_loss = self.config.z_loss_weight, self.config.z_loss_kind
            loss = self.lm_head(hidden, labels, num_items_in_batch, *z_loss)
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
