"""The shape of a model, floating-point operations per token, and what devices can do; no torch."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baichuan_sft.errors import UserError, pick
from baichuan_sft.variants import VARIANTS

# --- the model's shape ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """What planning reads of a model; a ``BaichuanConfig`` has the same fields."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    position_embedding: str

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


def shape_of(model: str) -> Shape:
    """Of a directory's config.json, or of a model of the family by its name.

    Raises:
        UserError: neither a directory with a whole config nor a known name.
    """
    where = Path(model) / "config.json"
    if Path(model).is_dir():
        try:
            facts = json.loads(where.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"--model {model}: config.json cannot be read: {error}.") from None
    else:
        facts = pick("model", model.lower(), VARIANTS).config
    rope = facts.get("max_position_embeddings") is not None
    position = facts.get("position_embedding") or ("rope" if rope else "alibi")
    numbers = {name: facts.get(name) for name in Shape.__annotations__ if name != "position_embedding"}
    if bad := [name for name, value in numbers.items() if type(value) is not int or value < 1]:
        raise UserError(f"{where}: {', '.join(bad)} must be there, and whole numbers of at least 1.")
    return Shape(position_embedding=position, **numbers)


def linear_shapes(config: Any) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of each linear of a decoder layer."""
    width, inner = config.hidden_size, config.intermediate_size
    return {
        "W_pack": (width, 3 * width),
        "o_proj": (width, width),
        "gate_proj": (width, inner),
        "up_proj": (width, inner),
        "down_proj": (inner, width),
    }


def layer_parameters(config: Any) -> int:
    """Of the linears of one layer."""
    return sum(inputs * outputs for inputs, outputs in linear_shapes(config).values())


def num_parameters(config: Any) -> int:
    """Of the whole model."""
    norms = (2 * config.num_hidden_layers + 1) * config.hidden_size
    tables = 2 * config.vocab_size * config.hidden_size  # embeddings and head
    return config.num_hidden_layers * layer_parameters(config) + tables + norms


# --- floating-point operations ----------------------------------------------------------------------


def flops_per_token(
    config: Any, *, lora: bool, span: float, target_share: float = 1.0, adapter_parameters: int = 0
) -> float:
    """Model FLOPs of one token, forward and backward; nothing that is computed a second time counts.

    Two per weight and token in each matrix product. Backward costs twice the forward where weights are
    trained and once where they are frozen; attention always twice, for it has no weights.

    Args:
        span: tokens of the conversation that the token is in, the mean over tokens: a token sees half.
        target_share: tokens that enter the head; the loss leaves the others out.
        adapter_parameters: of all adapters, with ``lora``.
    """
    passes = 2 if lora else 3
    head = target_share * config.vocab_size * config.hidden_size
    weights = passes * 2 * (config.num_hidden_layers * layer_parameters(config) + head)
    attention = 3 * 2 * config.num_hidden_layers * config.hidden_size * span
    return weights + attention + 3 * 2 * adapter_parameters


def recomputed_per_token(config: Any, level: str, span: float) -> float:
    """What backward does a second time, in FLOPs of one token: the layers' forward under ``full``.

    ``selective`` keeps the matrix products; the rest of a layer is taken for 8 % of its time (an estimate).
    """
    share = {"none": 0.0, "selective": 0.08, "full": 1.0}[level]
    return share * 2 * config.num_hidden_layers * (layer_parameters(config) + config.hidden_size * span)


# Dense bf16 TFLOP/s by NVIDIA's data sheets (fp16 on the V100, which has no bf16); all words must be in the
# device's name, the first line that fits counts. What is not sure is not here: --peak_tflops says it.
PEAK_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.5,
    "H800 PCIe": 756.0,
    "H800": 989.5,
    "H200 NVL": 835.0,
    "H200": 989.5,
    "GH200": 989.5,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "A30": 165.0,
    "A40": 149.7,
    "L40S": 362.0,
    "L40": 181.0,
    "4090 D": 147.0,
    "4090": 165.0,
    "V100 PCIE": 112.0,
    "V100": 125.0,
}


def peak_tflops(device: str) -> float | None:
    """What a device can do at most in half precision, TFLOP/s; None where the table does not know it."""
    words = set(re.split(r"[\s-]+", device.upper()))
    if words & {"MIG", "LAPTOP"}:  # a part of that device, or a smaller one
        return None
    fits = (peak for name, peak in PEAK_TFLOPS.items() if words >= set(name.upper().split()))
    return next(fits, None)


# GiB of what `--gpus 8x80` says, and GB/s that one GPU of a host sends to another: NVLink as all-reduces
# reach it (H100 370; A100 235, a cap in NCCL's tables; A800, H800, V100 by their share of links), or PCIe 4.
DEVICES = {
    "H200": (141, 370),
    "H20": (96, 370),
    "H100": (80, 370),
    "H800": (80, 165),
    "A100": (80, 235),
    "A800": (80, 155),
    "L40S": (48, 12),
    "A40": (48, 12),
    "V100": (32, 115),
    "4090": (24, 12),
    "A30": (24, 12),
}
BY_SIZE = {24: "4090", 32: "V100", 40: "A100", 48: "L40S", 80: "H100", 96: "H20", 141: "H200"}
# Share of the peak that all matrix products of a training step reach, recomputed ones included, while
# communication is hidden; of which device, and who measured it: mosaicml/llm-foundry,
# scripts/train/benchmarking/README.md, one host of 8, sequences of 2,048, nothing recomputed.
# With checkpointing the same tables have .48 to .59 (H100) and .63 to .79 (A100).
EFFICIENCY = {
    "A100": (0.60, "llm-foundry, 13B on 8 x A100-80: 59.6 %"),
    "A800": (0.58, "Baichuan-7B's README: 182 of 312 TFLOP/s on A800"),
    "": (0.46, "llm-foundry, 7B on 8 x H100: 46.4 %"),  # any other, not known better
}
