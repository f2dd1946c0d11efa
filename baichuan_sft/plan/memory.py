"""Bytes of one process in a training step: arithmetic on a configuration alone, no torch, no device.

D model width, F MLP width, N heads, H head width, V vocabulary, L layers, R tokens of a micro-batch,
w bytes of a number that is computed with (2 in half precision, 4 in fp32).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from baichuan_sft.plan.flops import linear_shapes, num_parameters

GIB = 2**30
LEVELS = ("none", "selective", "full")  # of activation checkpointing, the fastest first

# Bytes of optimizer state per trained parameter; others are taken for Adam in fp32. 8-bit states have one
# fp32 scale per 256 numbers.
OPTIMIZER_BYTES = {
    "adamw_8bit": 2.04,
    "adamw_bnb_8bit": 2.04,
    "adamw_torch_8bit": 2.04,
    "adamw_torch_4bit": 1.04,
    "paged_adamw_8bit": 2.04,
    "lion_32bit": 4.0,
    "lion_8bit": 1.02,
    "paged_lion_32bit": 4.0,
    "paged_lion_8bit": 1.02,
    "adafactor": 0.1,  # a row and a column per matrix
    "sgd": 0.0,
}
ADAM_BYTES = 8.0
LOGITS_PER_CHUNK = 2**26  # as in the head
GATHERED = 10**9  # weights that ZeRO-3 keeps whole at a time, its default


@dataclass(frozen=True)
class Step:
    """What the memory of a training step follows from, besides the model's shape.

    Attributes:
        rows, row_tokens: of a micro-batch.
        num_trained: trained parameters, the whole number under ZeRO too.
        weight_bytes: of all weights as they lie in memory, before ZeRO-3 splits them.
        trained_bytes: of one trained weight.
        compute_bytes: w.
        stream_bytes: of a number between layers: 4 where fp32 weights are trained under autocast.
        attention: the backend's name.
        targets: linears with adapters; none means full training.
        rank, dropout: LoRA's.
        on_gpu: a dropout mask is one byte per number there.
        engine, stage, world_size: DeepSpeed's; 0 is no ZeRO.
        secondary: ranks of a host that share a second copy of the weights (hpZ); 0 is none.
        optimizer: transformers' name of it.
        bucket: numbers that ZeRO reduces at a time.
        offload_states, offload_weights: on the host, by DeepSpeed.
    """

    rows: int
    row_tokens: int
    num_trained: int
    weight_bytes: float
    trained_bytes: int
    compute_bytes: int
    stream_bytes: int
    attention: str = "sdpa"
    targets: tuple[str, ...] = ()
    rank: int = 0
    dropout: float = 0.0
    on_gpu: bool = False
    engine: bool = False
    stage: int = 0
    world_size: int = 1
    secondary: int = 0
    optimizer: str = "adamw_torch"
    bucket: int = 0
    offload_states: bool = False
    offload_weights: bool = False

    @property
    def num_tokens(self) -> int:
        return self.rows * self.row_tokens

    @property
    def autocast_copies(self) -> bool:
        """Whether autocast casts fp32 weights, and keeps the copies until backward has used them."""
        return self.trained_bytes > self.compute_bytes and not self.engine


def reserve(total: float) -> float:
    """What is left alone of a device's memory: fragments, libraries' workspaces, communication buffers."""
    return GIB + 0.05 * total


def gib(num_bytes: float) -> str:
    """GiB in few digits, of a nano model too."""
    return f"{num_bytes / GIB:.1f}" if num_bytes >= GIB else f"{num_bytes / GIB:.2g}"


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at the highest point of a step.

    Attributes:
        activations: what forward leaves for backward.
        working: what the loss, or backward of one layer, needs for a moment; the larger of the two.
        layer: bytes per token that one layer keeps, by what they are.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    working: float
    layer: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.working

    def __str__(self) -> str:
        names = ("weights", "gradients", "optimizer", "activations", "working")
        return ", ".join(f"{name} {gib(getattr(self, name))}" for name in names)


def kept_without_checkpointing(config: Any, step: Step) -> dict[str, float]:
    """What one decoder layer keeps for backward, bytes per token.

    The table to correct when the model's code changes; tests/test_plan.py counts the real bytes.
    """
    d, f, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    w, full = step.compute_bytes, not step.targets
    cast_twice = full and step.autocast_copies
    return {
        "norm inputs": 2 * step.stream_bytes * d,
        "norm statistics": 2 * 4,
        "inputs of W_pack, gate and up": (2 + cast_twice) * w * d * full,
        "q, k, v": 3 * w * d,
        "attention": w * d + 4 * heads,
        "scores": _scores(config, step),
        "gate, up": 2 * w * f,
        "product": w * f * full,
        "adapters": sum(_adapter(config, step, name) for name in step.targets),
    }


def kept_with_selective(config: Any, step: Step) -> dict[str, float]:
    """The same where products of matrices and attention are kept and the rest is computed again."""
    d, f, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    w, written_out = step.compute_bytes, step.attention == "eager"
    return {
        "input": step.stream_bytes * d,
        "q, k, v": 3 * w * d,
        "attention": (w * d + 4 * heads) * (not written_out),
        "o_proj": w * d,
        "gate, up": 2 * w * f,
        "down_proj": w * d * ("down_proj" in step.targets),
        "adapters": len(step.targets) * step.rank * w,
    }


def kept_by_layer(config: Any, step: Step, level: str) -> dict[str, float]:
    """What one decoder layer keeps for backward, bytes per token, by level of checkpointing."""
    if level == "full":
        return {"input": step.stream_bytes * config.hidden_size}
    return (kept_with_selective if level == "selective" else kept_without_checkpointing)(config, step)


def _scores(config: Any, step: Step) -> float:
    """Written-out attention keeps the softmax in fp32, and rounded where that is another tensor."""
    if step.attention != "eager":
        return 0
    wide = 4 + (step.compute_bytes if step.compute_bytes < 4 else 0)
    return config.num_attention_heads * step.row_tokens * wide


def _adapter(config: Any, step: Step, name: str) -> float:
    """One adapter: its input where nobody else keeps it, the dropout mask, and what A gives."""
    inputs, w = linear_shapes(config)[name][0], step.compute_bytes
    own_input = bool(step.dropout) or step.autocast_copies  # dropped out, or cast for A
    shared = name == "o_proj" or (name == "up_proj" and "gate_proj" in step.targets)
    mask = inputs * (1 if step.on_gpu else step.trained_bytes) * bool(step.dropout)
    return (own_input or not shared) * inputs * w + mask + step.rank * w


def _dense_mask(config: Any, step: Step) -> float:
    """The (T, T) mask of sdpa and eager, shared by all layers, and what it is made of."""
    if step.attention not in ("sdpa", "eager"):
        return 0
    heads = config.num_attention_heads if config.position_embedding == "alibi" else 1
    return step.rows * step.row_tokens**2 * (heads * (4 + step.compute_bytes) + 1)


def _working(config: Any, step: Step, level: str) -> float:
    """The loss: a chunk of fp32 logits, a temporary as large, the head's gradient in fp32 where it is
    trained. Or backward of one layer: what is computed again, and the gradients inside the MLP."""
    logits = min(step.num_tokens * config.vocab_size, LOGITS_PER_CHUNK)
    head = config.vocab_size * config.hidden_size * (not step.targets)
    loss = 2 * 4 * logits + (4 + step.compute_bytes) * head
    none, kept = (sum(kept_by_layer(config, step, name).values()) for name in ("none", level))
    return max(loss, step.num_tokens * (none - kept + 3 * step.compute_bytes * config.intermediate_size))


def estimate(config: Any, step: Step, level: str) -> Memory:
    """Bytes of one process at the highest point of a step, gradients of earlier micro-batches included.

    Not in it: the allocator's fragments, the CUDA context, communication buffers (a reserve stands for
    them), and DoRA's norms.
    """
    layer = kept_by_layer(config, step, level)
    kept = step.num_tokens * sum(layer.values()) * config.num_hidden_layers
    # the last norm's input in fp32, normed, the head's input and its gradient; cos and sin of all positions
    kept += step.num_tokens * ((4 + 3 * step.compute_bytes) * config.hidden_size + 8 * config.head_dim)
    kept += _dense_mask(config, step)
    gradients, optimizer = _states(step)
    working = _working(config, step, level)
    return Memory(_weights(config, step), gradients, optimizer, kept, working, layer)


def _weights(config: Any, step: Step) -> float:
    copies = step.compute_bytes * step.num_trained * step.autocast_copies
    if step.stage < 3:
        return step.weight_bytes + copies
    whole = min(GATHERED, num_parameters(config)) / num_parameters(config)
    share = 0 if step.offload_weights else 1 / step.world_size
    share += 1 / step.secondary if step.secondary else 0
    part = min(1.0, share + whole * (step.world_size > 1 or step.offload_weights))
    return step.weight_bytes * part + copies


def _states(step: Step) -> tuple[float, float]:
    """Gradients and optimizer state. DeepSpeed keeps fp32 weights besides half ones, under ZeRO always."""
    gradients = float(step.num_trained * step.trained_bytes)
    if not step.engine and step.world_size > 1:
        gradients *= 2  # DDP's buckets are a copy
    state = OPTIMIZER_BYTES.get(step.optimizer, ADAM_BYTES)
    if step.engine and (step.stage > 0 or step.trained_bytes < 4):
        state += 4
    if step.engine and step.stage == 0 and step.trained_bytes < 4:
        gradients += step.num_trained * 4  # cast to fp32 in the step
    split = step.world_size if step.stage >= 1 else 1
    if step.stage >= 2:
        gradients = gradients / step.world_size + 2 * step.bucket * step.trained_bytes
    return gradients, 0.0 if step.offload_states else step.num_trained * state / split
