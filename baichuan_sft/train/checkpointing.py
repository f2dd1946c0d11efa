"""Activation checkpointing: what a layer keeps for backward, and how much of it a run can afford.

level      kept by each decoder layer                        computed again in backward
none       all that backward reads                           nothing
selective  its input, matrix products, attention's output    norms, RoPE, SiLU, sums: little time
full       its input                                         the whole forward of the layer
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

from baichuan_sft.errors import EnvironmentFault
from baichuan_sft.machine import host_memory
from baichuan_sft.model.modeling_baichuan import BaichuanModel
from baichuan_sft.plan import GIB, LEVELS, Step, estimate, gib, reserve
from baichuan_sft.quantization import num_elements, weight_bytes
from baichuan_sft.train.adapters import count_parameters
from baichuan_sft.train.progress import say
from baichuan_sft.train.zero import deepspeed_config

# --- a level on a model -----------------------------------------------------------------------------

PRODUCTS = ("aten::mm", "aten::addmm")
ATTENTION = ("attention", "attn", "flash_fwd")  # parts of the names of fused kernels; flex has none


def apply(model: Any, level: str, zero_stage: int = 0) -> None:
    """Make each decoder layer of ``model`` keep what ``level`` says; can be called again.

    Not through transformers, which lets the embedding's output require a gradient in any case: LoRA's
    backward would then go on below its first adapter.
    """
    # ZeRO-3 releases a layer's weights between forward and recomputation, which the non-reentrant kind
    # takes for a change of the graph.
    reentrant = level == "full" and zero_stage == 3
    options: dict[str, Any] = {"use_reentrant": reentrant}
    if level == "selective":
        keeps = functools.partial(_keeps, widths=_widths(model))
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, keeps)
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer | BaichuanModel):
            module.gradient_checkpointing = level != "none"
            module._gradient_checkpointing_func = functools.partial(checkpoint, **options)
    if reentrant and not model.get_input_embeddings().weight.requires_grad:
        # else the recomputed layers see no input that needs a gradient, and compute none
        model.enable_input_require_grads()


def _widths(model: Any) -> frozenset[int]:
    """Inner sizes of the products worth keeping.

    D: all linears but down_proj, whose result backward reads only where an adapter is added to it. An
    adapter's B, of inner size r, gives as much as the linear it belongs to and is cheap to compute.
    """
    adapted = any(name.endswith("down_proj.lora_A") for name, _ in model.named_modules())
    config = model.config
    return frozenset({config.hidden_size, config.intermediate_size} if adapted else {config.hidden_size})


def _keeps(context: Any, op: Any, *args: Any, widths: frozenset[int], **kwargs: Any) -> CheckpointPolicy:
    name = op.name()
    product = name in PRODUCTS and args[-1].shape[0] in widths
    if product or any(part in name for part in ATTENTION):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


# --- what a run needs -------------------------------------------------------------------------------


def step_of(model: Any, settings: Any, args: Any) -> Step:
    """The training step of this run, as the memory model sees it.

    Args:
        model: with its adapters, before a trainer wraps it. args: the training arguments.
    """
    half = args.bf16 or args.fp16
    path = settings.training["deepspeed"]
    engine = deepspeed_config(path) if path else {}
    zero = engine.get("zero_optimization", {})
    capacity, rows = settings.row_shape()
    bucket = zero.get("reduce_bucket_size", 5 * 10**8)
    adapted = {name.split(".")[-2] for name, _ in model.named_modules() if name.endswith(".lora_A")}
    trained_bytes = max(p.element_size() for p in model.parameters() if p.requires_grad)
    stream_bytes = model.get_input_embeddings().weight.element_size()
    return Step(
        rows=rows,
        row_tokens=capacity or settings.data.model_max_length,
        num_trained=count_parameters(model)[0],
        weight_bytes=sum(num_elements(p) * p.element_size() for p in model.parameters())
        if zero.get("stage") == 3
        else weight_bytes(model),
        trained_bytes=2 if engine and half else trained_bytes,  # DeepSpeed casts adapters too
        compute_bytes=2 if half else 4,
        stream_bytes=2 if engine and half else stream_bytes,
        attention=model.config._attn_implementation,
        targets=tuple(sorted(adapted)),
        rank=settings.lora.lora_rank if adapted else 0,
        dropout=settings.lora.lora_dropout if adapted else 0.0,
        on_gpu=args.device.type == "cuda",
        engine=bool(engine),
        stage=zero.get("stage", 0),
        world_size=args.world_size,
        optimizer=getattr(args.optim, "value", args.optim),
        bucket=model.config.hidden_size**2 if bucket == "auto" else int(bucket),
        offload_states=zero.get("offload_optimizer", {}).get("device", "none") != "none",
        offload_weights=zero.get("offload_param", {}).get("device", "none") != "none",
    )


def free_bytes(device: torch.device, weight_bytes: float) -> float:
    """What this process may take in all, weights that it has loaded already included."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - reserve(total)
    in_all, available = host_memory()
    # accelerate writes LOCAL_WORLD_SIZE 1 on a CPU under DeepSpeed's launcher
    share = int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return (available - reserve(in_all)) / share + weight_bytes


# --- choosing ---------------------------------------------------------------------------------------


def choose(
    levels: tuple[str, ...], needs: dict[str, float], budget: float, measure: Callable[[str], float] | None
) -> tuple[str, float]:
    """The first level that fits by estimate, and where it can be measured by measurement; else the last.

    Args:
        levels: fastest first. needs: estimated bytes of each.
        measure: bytes that a step of a level takes, infinite where memory ran out; None: no probe.
    Returns:
        the level and what it needs, measured if it was.
    """
    for level in levels:
        need = needs[level]
        if measure is not None and (need <= budget or level == levels[-1]):
            need = measure(level)
        if need <= budget:
            break
    return level, need


def cuda_peak(run: Callable[[], None]) -> float:
    """Bytes allocated at the highest point of ``run``."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return float(torch.cuda.max_memory_allocated())


def probe(
    model: Any, step: Step, level: str, half: torch.dtype | None, peak: Callable[[Callable[[], None]], float]
) -> float:
    """Bytes at the highest point of one forward and backward over random tokens; infinite where they ran out.

    Gradients are dropped as they come, so that neither they nor the optimizer's states count. Leaves
    weights, gradients and random numbers as they were.
    """
    device = next(model.parameters()).device
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hooks = [parameter.register_post_accumulate_grad_hook(_drop_gradient) for parameter in trained]

    def run() -> None:
        ids = torch.randint(model.config.vocab_size, (step.rows, step.row_tokens), device=device)
        positions = torch.arange(step.row_tokens, device=device) % max(
            1, step.row_tokens // 2
        )  # two segments
        with torch.autocast(device.type, half) if half else contextlib.nullcontext():
            options = dict(
                labels=ids, position_ids=positions.expand(ids.shape), num_items_in_batch=ids.numel()
            )
            loss = model(input_ids=ids, **options).loss
        loss.backward()

    apply(model, level)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            return peak(run)
    except torch.OutOfMemoryError:
        return math.inf
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad(set_to_none=True)


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


def over_ranks(value: float, device: torch.device) -> float:
    """The largest over all ranks."""
    if not torch.distributed.is_initialized():
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
    return tensor.item()


def prepare(model: Any, settings: Any, args: Any) -> str:
    """Put a level on the model, the asked or the fastest that fits; the log says why. Every rank calls it.

    Returns:
        the level.
    Raises:
        EnvironmentFault: not even ``full`` got through the probe step.
    """
    asked, device = settings.model.checkpointing, args.device
    step = step_of(model, settings, args)
    # a compiled block is computed again as a whole: its products are not seen one by one
    compiled = settings.training["torch_compile"]
    levels = tuple(level for level in LEVELS if not (compiled and level == "selective"))
    estimates = {level: estimate(model.config, step, level) for level in LEVELS}
    budget = -over_ranks(-free_bytes(device, step.weight_bytes), device)
    if asked != "auto":
        level, need, how = asked, estimates[asked].total, "as asked"
    else:
        why_not = no_probe(step, device)
        if why_not is None:
            model.to(device)
        half = (torch.bfloat16 if args.bf16 else torch.float16) if step.autocast_copies else None

        def measure(level: str) -> float:
            states = estimates[level].gradients + estimates[level].optimizer
            return over_ranks(probe(model, step, level, half, cuda_peak) + states, device)

        needs = {level: memory.total for level, memory in estimates.items()}
        level, need = choose(levels, needs, budget, measure if why_not is None else None)
        how = f"auto, {why_not or 'measured in a probe step'}"
    if need == math.inf:
        raise EnvironmentFault(
            f"a step of {step.rows} x {step.row_tokens} tokens does not fit into {budget / GIB:.1f} GiB "
            "even with --checkpointing full; lower --per_device_train_batch_size or --packing_tokens, or "
            "split the model with --deepspeed."
        )
    say(f"checkpointing: {level} (needs about {gib(need)} of {gib(budget)} GiB: {estimates[level]}; {how})")
    if need > budget:
        say("warning: memory may run out; lower --per_device_train_batch_size or --packing_tokens")
    apply(model, level, step.stage)
    return level


def no_probe(step: Step, device: torch.device) -> str | None:
    """Why no step can be tried before training; None where it can."""
    if device.type != "cuda":
        return "no probe step on a CPU"
    return "no probe step under ZeRO-3" if step.stage == 3 else None
