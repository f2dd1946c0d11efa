"""Training steps on one GPU, for gpu.py: ours at every level of checkpointing, and the vendor's way.

A step is forward, backward, clipping and the optimizer over one packed row of 8,192 tokens, as
`train --bf16 True` runs it: adapters in fp32 under autocast, full training with fp32 weights and AdamW in 8
bits. Lengths of conversations are lognormal (mean 530, as of real multi-turn data), cut at 512, 1,024 or
4,096; three quarters of their tokens are targets. The vendor's way is 8,192 tokens in padded rows, all layers
checkpointed, adapters in bf16 as DeepSpeed has them; its targets are those of such batches on average.
"""

import contextlib
from typing import Any

import numpy as np
import torch

from baichuan_sft.attention import choose
from baichuan_sft.data.packing import Collator, plan
from baichuan_sft.plan import flops_per_token, peak_tflops
from baichuan_sft.train.adapters import add_lora, count_parameters
from baichuan_sft.train.args import LoraArguments
from baichuan_sft.train.checkpointing import apply
from baichuan_sft.train.fused import compile_blocks
from benchmarks import decode, vendor
from benchmarks.attention import conversations
from benchmarks.gpu import Report, config_of, peak, seconds

CUTS = (512, 1024, 4096)
# model, mode, and what is measured: level of checkpointing, compiled or not, cut-off
RUNS = (
    ("7b", "lora", ("none", "selective", "full", "none, cut 1024", "none, cut 4096", "none, compiled")),
    ("13b", "lora", ("none", "full", "none, compiled")),
    ("7b", "qlora", ("full",)),
    ("13b", "qlora", ("full",)),
    ("7b", "full 8-bit", ("selective", "full")),
)


def train(report: Report) -> None:
    for name, mode, ways in RUNS:
        with report.row(f"{name} {mode}"):
            report.require_time()
            train_one(report, name, mode, ways)


def train_one(report: Report, name: str, mode: str, ways: tuple[str, ...]) -> None:
    args, config = report.args, config_of(name, report.args)
    attention, why = choose("auto", config.position_embedding, args.device, args.dtype)
    config._attn_implementation = attention
    print(f"{name} {mode}: attention {attention}, {why}")
    torch._dynamo.reset()
    wide = torch.float32 if mode == "full 8-bit" else None
    model = decode.build(config, args.device, "nf4" if mode == "qlora" else "bf16", dtype=wide)
    model = adapted(model) if "lora" in mode else model.requires_grad_(True).train()
    useful: dict[str, float] = {}
    optimizer = optimizer_of(model, eight_bit="8-bit" in mode)
    for way in ways:
        with report.row(f"{name} {mode}, {way}"):
            report.require_time(60 if "compiled" in way else 20)
            if args.tiny and "compiled" in way:
                report.add(f"{name} {mode}, {way}", "not run: tests/test_fused.py compiles")
                continue
            apply(model, way.split(",")[0])
            if "compiled" in way:
                compile_blocks(model)
            figure, useful[way] = measure(report, model, optimizer, way, mode)
            report.add(f"{name} {mode}, {way}", figure)
    if mode == "lora":
        del optimizer
        against_vendor(report, name, useful, dict(model.named_parameters()))


def adapted(model: Any) -> Any:
    lora = LoraArguments(use_lora=True, lora_rank=8, lora_alpha=32, lora_dropout=0.0)
    return add_lora(model, lora).train()


def optimizer_of(model: Any, eight_bit: bool = False) -> Any:
    trained = [p for p in model.parameters() if p.requires_grad]
    if eight_bit:
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(trained, lr=1e-5)
    return torch.optim.AdamW(trained, lr=1e-5, fused=True)


def cut_of(way: str, tiny: bool) -> int:
    cut = int(way.rpartition("cut ")[2]) if "cut" in way else CUTS[0]
    return cut // 16 if tiny else cut


def measure(report: Report, model: Any, optimizer: Any, way: str, mode: str) -> tuple[str, float]:
    """A row's figure, and targets per second."""
    args, config = report.args, model.config
    tokens = {True: 256, False: 4096 if mode == "qlora" else 8192}[args.tiny]
    batch, lengths = packed_batch(config, tokens, cut_of(way, args.tiny), args.device)
    num_targets = int((batch["labels"][:, 1:] != -100).sum())
    trained = [p for p in model.parameters() if p.requires_grad]

    def step():
        with mixed_precision(args.device):
            loss = model(**batch, num_items_in_batch=num_targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    took = seconds(step, args)
    lora = "lora" in mode
    flops = flops_per_token(
        config,
        lora=lora,
        span=float((lengths**2).sum() / lengths.sum()),
        target_share=num_targets / tokens,
        adapter_parameters=count_parameters(model)[0] if lora else 0,
    )
    tflops = tokens * flops / took / 1e12
    figure = f"{tokens / took:,.0f} tok/s, {num_targets / took:,.0f} targets/s, {tflops:.3g} TFLOP/s"
    known = peak_tflops(torch.cuda.get_device_name()) if args.device == "cuda" else None
    if known:
        figure += f", MFU {tflops / known:.1%} of {known}"
    if report.gemm_tflops:
        figure += f", {tflops / report.gemm_tflops:.1%} of the measured product"
    return figure + peak(), num_targets / took


def mixed_precision(device: str) -> contextlib.AbstractContextManager:
    return torch.autocast("cuda", torch.bfloat16) if device == "cuda" else contextlib.nullcontext()


def packed_batch(
    config: Any, tokens: int, cut: int, device: str
) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """One full row, three quarters of it targets, and the lengths in it."""
    lengths, rng = np.array(conversations(8 * tokens, cut)), np.random.default_rng(1)
    lengths = lengths[plan(lengths, tokens)[0]]

    def segment(length):
        ids = rng.integers(3, config.vocab_size, length).astype(np.int32)
        return {"input_ids": ids, "labels": np.where(np.arange(length) < length // 4, -100, ids)}

    batch = Collator(0, 128 if device == "cuda" else 1, tokens)([[segment(length) for length in lengths]])
    return {name: tensor.to(device) for name, tensor in batch.items()}, lengths


def against_vendor(report: Report, name: str, useful: dict[str, float], weights: dict) -> None:
    for cut in CUTS if name == "7b" else CUTS[:1]:
        ways = {way: rate for way, rate in useful.items() if cut_of(way, False) == cut}
        title = f"{name} lora, vendor's way at {cut}"
        with report.row(title):
            report.require_time(20)
            rate = vendor_rate(report, name, weights, cut)
            report.add(title, f"{rate:,.0f} targets/s{peak()}")
            if ways:
                best = max(ways, key=lambda way: ways[way])
                ratio = f"{ways[best] / rate:.2f} times the targets/s ({best})"
                report.add(f"{name} lora, ours / vendor's at {cut}", ratio)


def vendor_rate(report: Report, name: str, weights: dict, cut: int) -> float:
    """Targets per second of the vendor's step on the same weights."""
    import peft

    args, config = report.args, config_of(name, report.args)
    with torch.device("meta"):
        model: Any = vendor.Model(config, checkpointing=True)
    shared = {
        key.replace("base_model.model.", "").replace(".base_layer", ""): p for key, p in weights.items()
    }
    model.load_state_dict({key: p for key, p in shared.items() if "lora_" not in key}, assign=True)
    model.requires_grad_(False)
    model.enable_input_require_grads()
    options = dict(r=8, lora_alpha=32, lora_dropout=0.0, target_modules=vendor.LORA_TARGETS)
    model = peft.get_peft_model(model, peft.LoraConfig(**options), autocast_adapter_dtype=False).train()
    optimizer = optimizer_of(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    batch, num_targets = padded_batch(config, cut // 16 if args.tiny else cut, args)

    def step():
        model(**batch).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return num_targets / seconds(step, args, max(1, args.rounds // 2))


def padded_batch(config: Any, cut: int, args: Any) -> tuple[dict[str, torch.Tensor], float]:
    """8,192 tokens of conversations padded to ``cut``, and the targets of such a batch on average."""
    size = (256 if args.tiny else 8192) // cut
    lengths = torch.tensor(conversations(size * cut, cut)[:size])[:, None]
    ids = torch.randint(3, config.vocab_size, (size, cut), generator=torch.Generator().manual_seed(1))
    place = torch.arange(cut)
    labels = ids.masked_fill((place < lengths // 4) | (place >= lengths), -100)
    batch = {"input_ids": ids, "labels": labels, "attention_mask": (place < lengths).long()}
    many = np.array(conversations(2**20, cut))  # the share in one batch would be luck
    num_targets = size * float((many - np.maximum(many // 4, 1)).mean())
    return {name: tensor.to(args.device) for name, tensor in batch.items()}, num_targets
