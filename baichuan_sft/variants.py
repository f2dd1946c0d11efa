"""The four models of the family, by name: shape, size, source; and the linears LoRA may adapt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# The linears of a decoder layer. lm_head is not among them: it computes the loss itself, which a LoRA
# wrapper around it would bypass.
LINEARS = ("W_pack", "o_proj", "gate_proj", "up_proj", "down_proj")

_SHAPE_7B = dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
_SHAPE_13B = dict(hidden_size=5120, intermediate_size=13696, num_hidden_layers=40, num_attention_heads=40)
_CONTEXT = 4096


@dataclass(frozen=True)
class Variant:
    """One architecture.

    Attributes:
        config: keyword arguments of ``BaichuanConfig``.
        num_parameters: as in the vendor's files.
        source: whose README and code define it.
    """

    config: dict[str, Any]
    num_parameters: int
    source: str


VARIANTS = {
    "baichuan-7b": Variant(
        dict(_SHAPE_7B, vocab_size=64000, max_position_embeddings=_CONTEXT),
        7_000_559_616,
        "baichuan-inc/Baichuan-7B",
    ),
    "baichuan-13b": Variant(
        dict(_SHAPE_13B, vocab_size=64000, model_max_length=_CONTEXT),
        13_264_901_120,
        "baichuan-inc/Baichuan-13B-Base",
    ),
    "baichuan2-7b": Variant(
        dict(_SHAPE_7B, vocab_size=125696, max_position_embeddings=_CONTEXT, model_max_length=_CONTEXT),
        7_505_973_248,
        "baichuan-inc/Baichuan2-7B-Base",
    ),
    "baichuan2-13b": Variant(
        dict(_SHAPE_13B, vocab_size=125696, model_max_length=_CONTEXT),
        13_896_668_160,
        "baichuan-inc/Baichuan2-13B-Base",
    ),
}


def architecture(config: Any) -> str:
    """The name in VARIANTS whose position embedding and head these are."""
    from baichuan_sft.model.configuration_baichuan import BaichuanConfig

    for name, variant in VARIANTS.items():
        known = BaichuanConfig(**variant.config)
        if (known.position_embedding, known.lm_head) == (config.position_embedding, config.lm_head):
            return name
    raise AssertionError(f"no variant has {config.position_embedding} and {config.lm_head}")
