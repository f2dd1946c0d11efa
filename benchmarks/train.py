"""Whole training steps against other trainers: targets per CPU-second, on the same conversations and weights.

python benchmarks/train.py --data FILE --tokenizer FILE [--plan mt512] [--position alibi] [--mode lora]

    vendor          Baichuan2's fine-tune.py (vendor.py): padded to the cut-off, tokenised in every step
    vendor_dynamic  the same, padded to the longest of a batch
    trl             TRL's SFTTrainer: its packing, collator, loss and SDPA; RoPE only, in Llama's layout
    trl_rows        the same with one row per micro-batch, accumulated: a smaller mask
    ours            packed rows of --update_tokens, the attention that --attn auto takes, fused AdamW
    ours_rows       the same with rows as long as the cut-off
    ours_compile    as ours, each decoder layer compiled

A plan is mt (conversations as they are) or st (the first question and answer only) and the cut-off in tokens,
the same for all; the vendor and TRL cut at a token, ours at a turn. A step begins before the data is read and
ends after AdamW; of about --update_tokens computed tokens, gradients clipped at 1. Counted are targets, the
labels that a step learnt. Ids are folded into the small vocabulary; weights are equal at the start. No
contestant checkpoints unless --vendor_checkpointing; the vendor's command and TRL do by default, which costs
up to a third and is not held against them here. LoRA is r=8 on W_pack (TRL: q, k, v), without dropout. In
TRL's layout NormHead is a plain head of the normalised weight: trained in full mode, frozen in LoRA's. On a
CPU TRL's loss covers every position, not the targets only; that is its own choice.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from benchmarks import contest
from benchmarks.contestants import CONTESTANTS, choose_contestants
from benchmarks.steps import Contestant, Work, setup

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
aten = torch.ops.aten


def sdpa_flops(query, key, value, *args, out_shape=None, **kwargs):
    return sdpa_flop_count(query, key, value)


def sdpa_backward_flops(grad, query, key, value, *args, out_shape=None, **kwargs):
    """Scores again, and the products that give dV, dP, dQ and dK: five where the forward has two."""
    return sdpa_flop_count(query, key, value) * 5 // 2


def addmm_flops(total, a, b, *args, out_shape=None, **kwargs):
    return 2 * a[0] * a[1] * b[1]


# What the counter does not know by itself: a CPU's attention, and products added in place. Causal
# attention counts as full.
MORE_FLOPS = {
    aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flops,
    aten.addmm_: addmm_flops,
}


def count(contestant: Contestant) -> tuple[Work, float, float]:
    """One step, uncompiled: what it did, FLOPs of its matrix products, bytes it kept for backward."""
    kept: dict[int, int] = {}
    most = [0]
    own = {p.untyped_storage().data_ptr() for p in contestant.model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def begin(module, args):  # a micro-batch has its own, at addresses of the one before
        most.append(sum(kept.values()))
        kept.clear()

    hook = contestant.model.register_forward_pre_hook(begin)
    counter = FlopCounterMode(display=False, custom_mapping=MORE_FLOPS)
    with torch.compiler.set_stance("force_eager"), counter, saved_tensors_hooks(keep, lambda tensor: tensor):
        work = contestant.step()
    hook.remove()
    return work, counter.get_total_flops(), max(*most, sum(kept.values()))


def measure(args: argparse.Namespace) -> dict[str, list[contest.Turn]]:
    """Turns of each contestant; prints the table."""
    shared = setup(args)
    contestants = {name: CONTESTANTS[name](shared) for name in choose_contestants(args)}
    counts = {name: count(contestant) for name, contestant in contestants.items()}
    steps = {name: contestant.step for name, contestant in contestants.items()}
    turns = contest.interleave(steps, args.rounds, args.device)
    clock = "wall" if args.device == "cuda" else "cpu"
    rates = {name: [t.result.targets / getattr(t, clock) for t in taken] for name, taken in turns.items()}
    best = "ours" if "ours" in rates else next(iter(rates))
    ahead = {name: contest.ratios(rates[best], theirs) for name, theirs in rates.items()}
    rows = []
    for name, taken in turns.items():
        work, flops, kept = counts[name]
        total = [sum(numbers) for numbers in zip(*((t.cpu, t.wall, *tokens(t.result)) for t in taken))]
        cpu, wall, targets, real, computed = total
        gain = contest.spread(ahead[name])
        per_target = flops / work.computed * computed / targets
        rows.append(
            (name, f"{real / computed:.3f}", f"{targets / cpu:,.0f}", f"{targets / wall:,.0f}", gain,
             f"{gain.quartile:.2f}", f"{per_target / 1e6:,.0f}", f"{kept / GIB:.2f}")
        )  # fmt: skip
    print(f"{args.plan}, {args.position}, {args.mode}, {len(shared.segments)} conversations", end=", ")
    print(f"{args.rounds} rounds, attention {shared.config._attn_implementation}")
    print(contest.machine(args.device))
    where = (
        "the vendor's only" if args.vendor_checkpointing else "off; the vendor's command and TRL have it on"
    )
    print(f"checkpointing: {where}")
    per = "s" if clock == "wall" else "CPU-s"
    header = ["", "useful / computed", "targets per CPU-s", "targets per s"]
    header += [f"{best} has more targets per {per} by: median (min - max)", "lower quartile"]
    header += ["matmul MFLOPs per target", "kept for backward, GiB"]
    print(contest.table(header, rows))
    if args.plot:
        title = f"{args.plan} {args.position} {args.mode}: {best} against others"
        contest.plot(args.plot, title, f"{best} / other, targets per {clock} second", ahead)
    return turns


def tokens(work: Work) -> tuple[int, int, int]:
    return work.targets, work.real, work.computed


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default=str(ROOT / "data/belle_chat.json"))
    parser.add_argument("--tokenizer", default=str(ROOT / "data/tokenizer/baichuan2_like.model"))
    parser.add_argument("--plan", default="mt512")
    parser.add_argument("--position", choices=["rope", "alibi"], default="rope")
    parser.add_argument("--mode", choices=["full", "lora"], default="full")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--contestants", default="vendor,vendor_dynamic,trl,ours")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--conversations", type=int, default=1000, help="how many of the file")
    parser.add_argument("--update_tokens", type=int, default=4096, help="computed in one step, about")
    for name, number in dict(layers=8, vocab=4096, width=512, heads=8, intermediate=1376).items():
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--vendor_checkpointing", action="store_true")
    parser.add_argument("--plot", help="write a PNG there")
    return parser.parse_args(words)


if __name__ == "__main__":
    measure(arguments())
