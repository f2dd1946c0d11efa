"""Baichuan2's fine-tune.py and modeling_baichuan.py, for today's libraries: what to measure against.

    # B rows, T tokens, N heads, H head width, D model width, V vocabulary

Kept: every text tokenised by itself in ``__getitem__``, padding to ``model_max_length``, a dense mask, RoPE
in fp32 from tables (7B, with SDPA), ALiBi by an additive mask and a written-out softmax (13B), NormHead that
writes a normalised weight, logits of every position, the shifted copy, the z-loss term, which costs a pass
over the logits at weight 0 too. Parameter names are the vendor's, so weights are shared by ``state_dict``.
Left out: xformers, which the vendor takes on GPUs where it is installed.

Source: baichuan-inc/Baichuan2 fine-tune.py; Baichuan2-7B-Base and Baichuan2-13B-Base modeling_baichuan.py.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from baichuan_sft.model.attention_baichuan import alibi_slopes
from benchmarks.data import vendor_item

LORA_TARGETS = ["W_pack"]


class Dataset(torch.utils.data.Dataset):
    """The vendor's SupervisedDataset: nothing is kept, each access tokenises anew."""

    def __init__(self, records, tokenizer, max_length):
        self.records, self.tokenizer, self.max_length = records, tokenizer, max_length

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        return vendor_item(self.records[index]["conversations"], self.tokenizer, self.max_length)


def collate_dynamic(items):
    """Cut off the padding that all items of a batch share."""
    batch = torch.utils.data.default_collate(items)
    longest = int(batch["attention_mask"].sum(dim=1).max())
    return {name: tensor[:, :longest] for name, tensor in batch.items()}


class RMSNorm(nn.Module):
    def __init__(self, hidden_size, epsilon):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.epsilon = epsilon

    def forward(self, hidden):
        variance = hidden.to(torch.float32).pow(2).mean(-1, keepdim=True)
        hidden = hidden * torch.rsqrt(variance + self.epsilon)
        return self.weight * hidden.to(self.weight.dtype)


def rotate_half(x):
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.W_pack = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden, mask, tables):
        batch, num_tokens, width = hidden.shape
        proj = self.W_pack(hidden)  # (B, T, 3 * D)
        proj = proj.unflatten(-1, (3, width)).unsqueeze(0).transpose(0, -2).squeeze(-2)
        split = (batch, num_tokens, self.num_heads, self.head_dim)
        query, key, value = (proj[i].view(split).transpose(1, 2) for i in range(3))  # (B, N, T, H)
        if tables is not None:
            cos, sin = tables
            query, key = ((x.float() * cos + rotate_half(x.float()) * sin).to(x.dtype) for x in (query, key))
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        else:
            weights = torch.matmul(query, key.transpose(2, 3)) / self.head_dim**0.5
            weights = weights + mask
            weights = torch.max(weights, torch.tensor(torch.finfo(weights.dtype).min, device=mask.device))
            out = torch.matmul(F.softmax(weights, dim=-1), value)
        return self.o_proj(out.transpose(1, 2).reshape(batch, num_tokens, width))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden):
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn, self.mlp = Attention(config), MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden, mask, tables):
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), mask, tables)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class NormHead(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))

    def forward(self, hidden):
        return F.linear(hidden, F.normalize(self.weight))


class Model(nn.Module):
    """Token ids to the mean loss over the targets of a batch.

    Args:
        config: a BaichuanConfig with ``lm_head="norm"``.
        checkpointing: keep only the inputs of layers, compute the rest again, as the vendor's command asks.
    """

    def __init__(self, config, checkpointing=False):
        super().__init__()
        self.config, self.checkpointing = config, checkpointing
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.model.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.model.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = NormHead(config)
        self.tables: dict[torch.Size, tuple] = {}  # of one length each, as the vendor's caches

    def enable_input_require_grads(self):
        """The vendor's script calls it for LoRA: gradients then flow down to the embeddings."""
        self.model.embed_tokens.register_forward_hook(lambda module, args, out: out.requires_grad_(True))

    def rope_tables(self, num_tokens, device):
        frequency = 1.0 / 10000 ** (
            torch.arange(0, self.config.head_dim, 2, device=device).float() / self.config.head_dim
        )
        angles = torch.outer(torch.arange(num_tokens, device=device).float(), frequency)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos()[None, None], angles.sin()[None, None]  # (1, 1, T, H)

    def alibi(self, num_tokens, device):
        """fp32 ``(N, T, T)``: ``slope * (j - i)``, -inf above the diagonal."""
        index = torch.arange(num_tokens, device=device)
        bias = alibi_slopes(self.config.num_attention_heads, device)[:, None, None] * (index - index[:, None])
        return bias.masked_fill(index > index[:, None], -torch.inf)

    def mask_and_tables(self, hidden, attention_mask):
        num_tokens, device, lowest = hidden.shape[1], hidden.device, torch.finfo(hidden.dtype).min
        rope = self.config.position_embedding == "rope"
        if (num_tokens, rope) not in self.tables:
            make = self.rope_tables if rope else self.alibi
            self.tables = {(num_tokens, rope): make(num_tokens, device)}
        cached = self.tables[num_tokens, rope]
        if rope:
            causal = torch.full((num_tokens, num_tokens), lowest, device=device).triu(1)[None, None]
            seen = attention_mask[:, None, None, :].expand(-1, 1, num_tokens, -1).to(hidden.dtype)
            inverted = 1.0 - seen
            return inverted.masked_fill(inverted.bool(), lowest) + causal, cached  # (B, 1, T, T)
        of_key = attention_mask.to(hidden.dtype)
        both = torch.tril((of_key[:, :, None] * of_key[:, None, :]).gt(0))
        seen = both * (of_key[:, :, None] == of_key[:, None, :])
        inverted = 1.0 - seen.to(hidden.dtype)
        inverted = inverted.masked_fill(inverted.bool(), lowest)
        return (inverted[:, None] + cached[None]).to(hidden.dtype), None  # (B, N, T, T)

    def forward(self, input_ids, labels, attention_mask):
        hidden = self.model.embed_tokens(input_ids)  # (B, T, D)
        mask, tables = self.mask_and_tables(hidden, attention_mask)
        for layer in self.model.layers:
            if self.checkpointing:
                hidden = checkpoint(layer, hidden, mask, tables, use_reentrant=False)
            else:
                hidden = layer(hidden, mask, tables)
        logits = self.lm_head(self.model.norm(hidden))  # (B, T, V)
        shifted = logits[..., :-1, :].contiguous().view(-1, self.config.vocab_size)
        targets = labels[..., 1:].contiguous().view(-1)
        z_loss = self.config.z_loss_weight * (shifted.max(-1).values ** 2).mean()
        return nn.CrossEntropyLoss()(shifted, targets) + z_loss
