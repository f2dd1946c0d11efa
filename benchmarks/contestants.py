"""Who takes part in train.py: each makes its own updates and gradients; the loop around them is one."""

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from baichuan_sft import BaichuanForCausalLM
from baichuan_sft.data.packing import Collator, PackedDataset, plan
from benchmarks import vendor
from benchmarks.steps import Contestant, Setup, Update

LEFT_OUT = {  # asked for by name, and why it cannot run in one environment with the others
    "llamafactory": "0.9.5 needs transformers <= 5.6, trl <= 0.24; older ones fail to import beside newer",
}


def endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def padded(setup: Setup, dynamic: bool = False) -> Contestant:
    args = setup.args
    size = args.update_tokens // setup.cutoff
    if dynamic:
        size = dynamic_batch(setup.segments.lengths, args.update_tokens)
    loader = DataLoader(
        vendor.Dataset(setup.records, setup.tokenizer, setup.cutoff),
        max(1, size),
        shuffle=True,
        collate_fn=vendor.collate_dynamic if dynamic else None,
        generator=torch.Generator().manual_seed(0),
    )
    model = vendor.Model(setup.config, checkpointing=args.vendor_checkpointing)
    model.load_state_dict(setup.weights)
    if args.mode == "lora":
        model.enable_input_require_grads()
    model = setup.adapt(model, vendor.LORA_TARGETS)

    def backward(update):
        loss = model(**setup.place(update.batches[0]))
        loss.backward()
        return loss.detach()

    updates = (Update([setup.fold(batch)], int(batch["attention_mask"].sum())) for batch in endless(loader))
    return Contestant(model, updates, backward, fused=False, lr=args.lr)


def dynamic_batch(lengths: np.ndarray, tokens: int) -> int:
    """How many conversations make a batch of about so many tokens, padded to its longest."""
    shuffled = np.random.default_rng(0).permutation(lengths)

    def computed(size):
        whole = shuffled[: len(shuffled) // size * size].reshape(-1, size)
        return size * whole.max(axis=1).mean()

    return min(range(1, min(len(lengths), tokens // 16) + 1), key=lambda size: abs(computed(size) - tokens))


def packed(setup: Setup, row_tokens: int | None = None, compiled: bool = False) -> Contestant:
    args = setup.args
    row_tokens = row_tokens or max(args.update_tokens, setup.cutoff)
    collate = Collator(0)

    def make(rows):
        return setup.fold(collate(rows)), sum(len(part["input_ids"]) for row in rows for part in row)

    rows = PackedDataset(setup.segments, plan(setup.segments.lengths, row_tokens))
    loader = DataLoader(rows, max(1, args.update_tokens // row_tokens), collate_fn=make)
    model = BaichuanForCausalLM(setup.config)
    model.load_state_dict(setup.weights)
    model = setup.adapt(model, vendor.LORA_TARGETS)
    if compiled:
        for layer in (model if args.mode == "full" else model.get_base_model()).model.layers:
            layer.compile()

    def backward(update):
        num_targets = update.num_targets
        loss = model(**setup.place(update.batches[0]), num_items_in_batch=num_targets).loss
        loss.backward()
        return loss.detach()

    updates = (Update([batch], num_real) for batch, num_real in endless(loader))
    return Contestant(model, updates, backward, fused=True, lr=args.lr)


def llama(setup: Setup) -> Any:
    """A Llama model with the same weights: W_pack cut in three, NormHead as a plain head of unit rows."""
    from transformers import LlamaConfig, LlamaForCausalLM

    same = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads rms_norm_eps".split()
    )
    shape = {name: getattr(setup.config, name) for name in same}
    model = LlamaForCausalLM(
        LlamaConfig(max_position_embeddings=4096, pad_token_id=0, **shape, attn_implementation="sdpa")
    )
    weights = {}
    for name, tensor in setup.weights.items():
        if "W_pack" in name:
            for part, letter in zip(tensor.chunk(3), "qkv"):
                weights[name.replace("W_pack", f"{letter}_proj")] = part
        else:
            weights[name] = torch.nn.functional.normalize(tensor) if name == "lm_head.weight" else tensor
    model.load_state_dict(weights)
    return model


def trl(setup: Setup, accumulate: bool = False) -> Contestant:
    """SFTTrainer's own batches, loss and backward; only the loop around them is ours."""
    import datasets
    from trl import SFTConfig, SFTTrainer

    args, cutoff = setup.args, setup.cutoff
    size = max(1, args.update_tokens // cutoff)
    num_batches, rows = (size, 1) if accumulate else (1, size)
    columns = {"input_ids": [], "labels": []}
    for item in (
        vendor.Dataset(setup.records, setup.tokenizer, cutoff)[i] for i in range(len(setup.records))
    ):
        num_real = int(item["attention_mask"].sum())
        item = setup.fold(item)
        for name, column in columns.items():
            column.append(item[name][:num_real].tolist())
    settings = SFTConfig(
        output_dir=tempfile.mkdtemp(), packing=True, max_length=cutoff, gradient_checkpointing=False,
        per_device_train_batch_size=rows, gradient_accumulation_steps=num_batches,
        use_cpu=args.device == "cpu", bf16=False, report_to=[], disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    model = setup.adapt(llama(setup), ["q_proj", "k_proj", "v_proj"])
    data = datasets.Dataset.from_dict(columns)
    trainer = SFTTrainer(model, settings, train_dataset=data, processing_class=copy.deepcopy(setup.tokenizer))
    trainer.current_gradient_accumulation_steps = num_batches

    def updates():
        while True:
            batches = iter(trainer.get_train_dataloader())
            while taken := trainer.get_batch_samples(batches, num_batches, trainer.args.device)[0]:
                yield Update(taken, sum(batch["input_ids"].numel() for batch in taken))  # it never pads

    def backward(update):
        total = torch.tensor(update.num_targets, device=trainer.args.device)
        return sum(trainer.training_step(trainer.model, dict(batch), total) for batch in update.batches)

    return Contestant(trainer.model, updates(), backward, fused=True, lr=args.lr)


# name -> how it is made
CONTESTANTS: dict[str, Callable[[Setup], Contestant]] = {
    "vendor": padded,
    "vendor_dynamic": lambda setup: padded(setup, dynamic=True),
    "trl": trl,
    "trl_rows": lambda setup: trl(setup, accumulate=True),
    "ours": packed,
    "ours_rows": lambda setup: packed(setup, row_tokens=setup.cutoff),
    "ours_compile": lambda setup: packed(setup, compiled=True),
}


def choose_contestants(args: argparse.Namespace) -> list[str]:
    """Names asked for that can run here; says which cannot, and why."""
    names = args.contestants.split(",")
    if unknown := set(names) - CONTESTANTS.keys() - LEFT_OUT.keys():
        sys.exit(
            f"--contestants: {', '.join(sorted(unknown))}; known: {', '.join((*CONTESTANTS, *LEFT_OUT))}"
        )
    reasons = {name: LEFT_OUT[name] for name in names if name in LEFT_OUT}
    if args.position == "alibi":
        reasons |= {name: "no ALiBi in Llama's layout" for name in names if name.startswith("trl")}
    for name, reason in reasons.items():
        print(f"{name} is left out: {reason}")
    return [name for name in names if name not in reasons]
