"""One training step of train.py, and what its contestants share."""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from baichuan_sft import BaichuanConfig, BaichuanForCausalLM, load_tokenizer
from baichuan_sft.attention import choose
from baichuan_sft.data.check import Rules
from baichuan_sft.data.dataset import build_dataset

IGNORE = -100
LORA = dict(r=8, lora_alpha=32, lora_dropout=0.0)
ADAMW = dict(lr=2e-5, betas=(0.9, 0.98), eps=1e-8, weight_decay=1e-4)  # the vendor's README


@dataclass(frozen=True)
class Update:
    """One optimizer step's micro-batches on the CPU, and how many of their tokens are no padding."""

    batches: list[dict[str, Any]]
    num_real: int

    @property
    def num_targets(self) -> int:
        return sum(int((batch["labels"][:, 1:] != IGNORE).sum()) for batch in self.batches)


@dataclass(frozen=True)
class Work:
    """What one step did; ``loss`` is the mean over its targets."""

    targets: int
    real: int
    computed: int
    loss: float


@dataclass
class Contestant:
    """
    Attributes:
        updates: without end; making one is part of the step.
        backward: gradients of an update's mean loss, which it returns.
    """

    model: torch.nn.Module
    updates: Iterator[Update]
    backward: Callable[[Update], torch.Tensor]
    fused: bool
    lr: float

    def __post_init__(self) -> None:
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        options = {**ADAMW, "lr": self.lr, "fused": self.fused}
        self.optimizer = torch.optim.AdamW(self.trained, **options)

    def step(self) -> Work:
        update = next(self.updates)
        loss = self.backward(update)
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        computed = sum(batch["input_ids"].numel() for batch in update.batches)
        return Work(update.num_targets, update.num_real, computed, loss.item())


@dataclass(frozen=True)
class Setup:
    """What all contestants share: arguments, tokenizer, records, their segments, first weights."""

    args: argparse.Namespace
    tokenizer: Any
    records: list[dict]
    segments: Any
    cutoff: int
    config: BaichuanConfig
    weights: dict[str, torch.Tensor]

    def fold(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Ids into the small vocabulary."""
        V = self.config.vocab_size
        labels = batch["labels"]
        folded = torch.where(labels == IGNORE, IGNORE, labels % V)
        return {**batch, "input_ids": batch["input_ids"] % V, "labels": folded}

    def place(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {name: tensor.to(self.args.device) for name, tensor in batch.items()}

    def adapt(self, model: Any, targets: list[str]) -> Any:
        """The model on its device, with adapters where they are asked for."""
        model = model.to(self.args.device).train()
        if self.args.mode == "full":
            return model
        import peft

        return peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, **LORA))


def setup(args: argparse.Namespace) -> Setup:
    kind, cutoff = args.plan[:2], int(args.plan[2:])
    if kind not in ("mt", "st"):
        sys.exit(f"--plan {args.plan}: mt or st, then the cut-off, such as mt512")
    records = json.loads(Path(args.data).read_text(encoding="utf-8"))[: args.conversations]
    if kind == "st":
        records = [{**record, "conversations": record["conversations"][:2]} for record in records]
    tokenizer = load_tokenizer(args.tokenizer)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "part.json")
        path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
        # what is cached stays mapped after its files are gone
        data = build_dataset([path], tokenizer, Rules(max_length=cutoff), cache_dir=directory)
    limit = {"max_position_embeddings" if args.position == "rope" else "model_max_length": 4096}
    shape = dict(hidden_size=args.width, intermediate_size=args.intermediate, num_hidden_layers=args.layers)
    attention, _ = choose("auto", args.position, args.device, torch.float32)
    config = BaichuanConfig(
        vocab_size=args.vocab, num_attention_heads=args.heads, lm_head="norm", attn_implementation=attention,
        **shape, **limit,
    )  # fmt: skip
    torch.manual_seed(0)
    return Setup(
        args, tokenizer, records, data.train, cutoff, config, BaichuanForCausalLM(config).state_dict()
    )
