"""Packed rows against padding: targets per CPU-second of whole training steps, on the same conversations.

python benchmarks/packing.py --data FILE [--tokenizer FILE] [--rounds 5] [--row_tokens 512,1024,4096]

    pad to max   every conversation is padded to the longest that may be, with a mask, as the vendor's script
    dynamic      batches of 8 in random order, each padded to its longest
    packed       rows of that many tokens, filled by best fit (data/packing.py)

A step is forward, backward and AdamW of a small model of the family in fp32 with sdpa; ids are folded into
its vocabulary. The contestants take turns in one process, so what else runs on the machine hits all alike.
Useful / computed is counted over all conversations. The small model's attention weighs more than in a 7B
model, where it is 7 % of a row of 4,096: packed rows need a mask of T x T here, and pay for it.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from baichuan_sft import BaichuanConfig, BaichuanForCausalLM, load_tokenizer
from baichuan_sft.data.check import Rules
from baichuan_sft.data.dataset import build_dataset
from baichuan_sft.data.packing import Collator, one_per_row, plan
from baichuan_sft.data.template import IGNORE

ROOT = Path(__file__).resolve().parents[1]
V = 4096
SHAPE = dict(hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4)
BATCH = 8
CONTESTANTS = ("pad to max", "dynamic", "packed")
STEP_TOKENS = 4096  # computed in one step, about


def batches(name, segments, capacity, seed):
    """Lists of rows of segment numbers without end, and useful / computed over all of them."""
    lengths = segments.lengths
    rng = np.random.default_rng(seed)
    if name == "packed":
        rows, size = plan(lengths, capacity, seed=seed), max(1, STEP_TOKENS // capacity)
    else:
        rows, size = (
            one_per_row(len(lengths)),
            BATCH if name == "dynamic" else max(1, STEP_TOKENS // capacity),
        )
    order = rng.permutation(len(rows))
    parts = [order[start : start + size] for start in range(0, len(order), size)]
    longest = [capacity if name == "pad to max" else rows.tokens(lengths)[part].max() for part in parts]
    computed = sum(len(part) * -(-int(tokens) // 8) * 8 for part, tokens in zip(parts, longest))
    return [[rows[row] for row in part] for part in parts], lengths.sum() / computed


def tensors(name, rows, segments, capacity):
    collate = Collator(0, pad_to_capacity=capacity if name == "pad to max" else None)
    members = [[segments[int(i)] for i in row] for row in rows]
    batch = collate(members)
    if name == "pad to max":
        del batch["position_ids"]
        tokens = torch.tensor([sum(len(segment["input_ids"]) for segment in row) for row in members])
        batch["attention_mask"] = (torch.arange(capacity) < tokens[:, None]).long()
    batch["input_ids"] %= V
    batch["labels"] = torch.where(batch["labels"] == IGNORE, IGNORE, batch["labels"] % V)
    return batch


def measure(model, optimizer, batch) -> tuple[int, float]:
    """Targets of one step, and its CPU-seconds."""
    num_targets = int((batch["labels"][:, 1:] != IGNORE).sum())
    started = time.process_time()
    model(**batch, num_items_in_batch=num_targets).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return num_targets, time.process_time() - started


def compare(segments, capacity, rounds, position):
    """Rates per contestant and round, and useful / computed."""
    torch.manual_seed(0)
    limit = {"max_position_embeddings" if position == "rope" else "model_max_length": 4096}
    model = BaichuanForCausalLM(
        BaichuanConfig(vocab_size=V, lm_head="norm", attn_implementation="sdpa", **SHAPE, **limit)
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    work, useful = {}, {}
    for name in CONTESTANTS:
        work[name], useful[name] = batches(name, segments, capacity, seed=0)
    rates = {name: [] for name in CONTESTANTS}
    for turn in range(rounds + 1):
        for name in CONTESTANTS:
            batch = tensors(name, work[name][turn], segments, capacity)
            num_targets, seconds = measure(model, optimizer, batch)
            if turn:  # the first warms up
                rates[name].append(num_targets / seconds)
    return rates, useful


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default=str(ROOT / "data/belle_chat.json"))
    parser.add_argument("--tokenizer", default=str(ROOT / "data/tokenizer/baichuan2_like.model"))
    parser.add_argument("--row_tokens", default="512,1024,4096")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--position", choices=["rope", "alibi"], default="rope")
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.tokenizer)
    print(f"{args.data}, {args.position}, {torch.get_num_threads()} threads, {args.rounds} rounds")
    print("| tokens | | useful / computed | targets per CPU-s | packed is faster by: median (min - max) |")
    print("|---|---|---|---|---|")
    for capacity in map(int, args.row_tokens.split(",")):
        segments = build_dataset([args.data], tokenizer, Rules(max_length=capacity)).train
        rates, useful = compare(segments, capacity, args.rounds, args.position)
        for name in CONTESTANTS:
            ratios = [ours / theirs for ours, theirs in zip(rates["packed"], rates[name])]
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})"
            rate = statistics.median(rates[name])
            print(f"| {capacity:,} | {name} | {useful[name]:.3f} | {rate:,.0f} | {spread} |", flush=True)


if __name__ == "__main__":
    main()
