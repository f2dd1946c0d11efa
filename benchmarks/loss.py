"""The head and its loss, forward and backward: peak memory, time and errors; NormHead, V = 125,696.

python benchmarks/loss.py                                    2,048 rows of width 512, 35 % of them targets
python benchmarks/loss.py --rows 4096 --supervised 0.75 --plot loss.png
python benchmarks/loss.py --device cuda --rows 16384 --hidden 4096

    full       the vendor's way: a normalised weight, all logits, a shifted copy, cross-entropy over them
    chunked    ours: targets only, some rows at a time, no normalised weight
    liger      Liger's fused linear cross-entropy over a normalised weight and the targets only, where it is

Each contestant runs in a process of its own. `peak` is the most that tensors made by the step held at a time:
every allocation is recorded (the allocator's own count on a GPU), exact to the byte. `resident` is what the
process grew by. Errors are those of a small problem in the same dtype, of many chunks, against fp64.
"""

import argparse
import importlib.util
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.nn import functional as F

from baichuan_sft.model import head_baichuan
from baichuan_sft.model.head_baichuan import IGNORE, BaichuanHead

V = 125_696
BAR, AIM = 0.30, 0.18  # peak, chunked / full, at the defaults
CHECK = dict(rows=512, hidden=64, vocabulary=4096, logits_per_chunk=2**18)  # 64 rows a chunk


def full(head, hidden, labels):
    logits = F.linear(hidden, F.normalize(head.weight))
    shifted = logits[:, :-1].contiguous().view(-1, logits.shape[-1])
    return F.cross_entropy(shifted, labels[:, 1:].flatten())


def chunked(head, hidden, labels):
    return head(hidden, labels)


def liger(head, hidden, labels):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    targets = labels[:, 1:].flatten()
    kept = (targets != IGNORE).nonzero().squeeze(1)  # Liger computes the logits of ignored rows too
    rows = hidden[:, :-1].flatten(0, 1)[kept]
    return LigerFusedLinearCrossEntropyLoss()(F.normalize(head.weight), rows, targets[kept])


CONTESTANTS = {"full": full, "chunked": chunked, "liger": liger}


def available(device: str) -> list[str]:
    """Liger's kernels are Triton's: a GPU only, and only where both can be imported."""
    found = all(importlib.util.find_spec(name) for name in ("triton", "liger_kernel"))
    return [name for name in CONTESTANTS if name != "liger" or (found and device == "cuda")]


def problem(rows, hidden_size, vocabulary, supervised, device, dtype):
    """Head, hidden states and labels of four rows."""
    torch.manual_seed(0)
    head = BaichuanHead(hidden_size, vocabulary, normalize=True, device=device, dtype=dtype)
    hidden = torch.randn(4, rows // 4, hidden_size, device=device, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, vocabulary, (4, rows // 4), device=device)
    labels[torch.rand(labels.shape, device=device) > supervised] = IGNORE
    return head, hidden, labels


def resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def allocations(profile) -> tuple[int, list[tuple[int, str]]]:
    """Most bytes held at a time, and what they were: (bytes, operator that asked for them)."""
    events, stack = [], [(event, ()) for event in profile.profiler.kineto_results.experimental_event_tree()]
    while stack:
        event, path = stack.pop()
        if event.typed[0].name == "Allocation":
            events.append((event.start_time_ns, event.typed[1], " > ".join(path[:3])))
        stack += [(child, (*path, event.name)) for child in event.children]
    live, held, peak, at_peak = {}, 0, 0, []
    for _, allocation, operator in sorted(events, key=lambda one: one[0]):
        if allocation.alloc_size > 0:
            live[allocation.ptr] = (allocation.alloc_size, operator)
        elif allocation.ptr not in live:
            continue  # made before the step
        else:
            del live[allocation.ptr]
        held += allocation.alloc_size
        if held > peak:
            peak, at_peak = held, list(live.values())
    return peak, sorted(at_peak, reverse=True)


def measure(args: argparse.Namespace) -> dict:
    """One forward and backward of ``args.contestant`` in this process."""
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    head, hidden, labels = problem(args.rows, args.hidden, V, args.supervised, args.device, dtype)
    step = CONTESTANTS[args.contestant]

    def once():
        head.weight.grad = hidden.grad = None
        loss = step(head, hidden, labels)
        loss.backward()
        return loss

    at_peak: list = []
    before = resident()
    if args.device == "cuda":
        once()  # compiles
        torch.cuda.reset_peak_memory_stats()
        head.weight.grad = hidden.grad = None
        before = torch.cuda.memory_allocated()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        loss = once()
        end.record()
        torch.cuda.synchronize()
        seconds, wall = (start.elapsed_time(end) / 1000,) * 2
        grown = peak = torch.cuda.max_memory_allocated() - before
    else:
        started, wall_started = time.process_time(), time.perf_counter()
        loss = once()
        seconds, wall = time.process_time() - started, time.perf_counter() - wall_started
        grown = resident() - before
        activity = [torch.profiler.ProfilerActivity.CPU]
        head.weight.grad = hidden.grad = None
        with torch.profiler.profile(activities=activity, profile_memory=True) as profile:
            once()
        peak, at_peak = allocations(profile)
    return {
        "loss": loss.item(),
        "peak": peak,
        "resident": grown,
        "seconds": seconds,
        "wall_seconds": wall,
        "at_peak": at_peak[:8],
        "errors": errors(step, args.device, dtype),
    }


def errors(step, device, dtype) -> dict[str, float]:
    """Relative errors of loss and gradients on a small problem, against fp64."""
    size = CHECK["rows"], CHECK["hidden"], CHECK["vocabulary"], 0.75, device, dtype
    head, hidden, labels = problem(*size)
    exact_head = BaichuanHead(CHECK["hidden"], CHECK["vocabulary"], True, device=device, dtype=torch.float64)
    exact_head.load_state_dict(head.state_dict())
    exact_hidden = hidden.detach().double().requires_grad_()
    logits = F.linear(exact_hidden, F.normalize(exact_head.weight))[:, :-1].flatten(0, 1)  # stays fp64
    exact = F.cross_entropy(logits, labels[:, 1:].flatten())
    exact.backward()
    with mock.patch.object(head_baichuan, "LOGITS_PER_CHUNK", CHECK["logits_per_chunk"]):
        loss = step(head, hidden, labels)
    loss.backward()

    def relative(ours, truth):
        return ((ours.double() - truth).norm() / truth.norm()).item()

    return {
        "loss": relative(loss.detach(), exact.detach()),
        "d hidden": relative(hidden.grad, exact_hidden.grad),
        "d weight": relative(head.weight.grad, exact_head.weight.grad),
    }


def table(results: dict[str, dict]) -> str:
    head = "| | peak MiB | / full | resident MiB | seconds | wall s | loss |"
    lines = [f"{head} error of loss | of d hidden | of d weight |", "|---" * 10 + "|"]
    for name, row in results.items():
        share = row["peak"] / results["full"]["peak"]
        numbers = f"{row['peak'] / 2**20:,.1f} | {share:.3f} | {row['resident'] / 2**20:,.0f}"
        times = f"{row['seconds']:.3g} | {row['wall_seconds']:.3g} | {row['loss']:.6f}"
        off = " | ".join(f"{value:.1e}" for value in row["errors"].values())
        lines.append(f"| {name} | {numbers} | {times} | {off} |")
    return "\n".join(lines)


def plot(results: dict[str, dict], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8, 3.5))
    for axis, measure_name, unit, label in (
        (axes[0], "peak", 2**20, "peak MiB"),
        (axes[1], "seconds", 1, "seconds"),
    ):
        axis.bar(list(results), [row[measure_name] / unit for row in results.values()])
        axis.set(ylabel=label)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--supervised", type=float, default=0.35)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--plot", help="write a PNG here")
    parser.add_argument("--json", help="write the figures here")
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contestant:
        print(json.dumps(measure(args)))
        return
    results = {}
    for name in available(args.device):
        command = [sys.executable, __file__, *sys.argv[1:], "--contestant", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results[name] = json.loads(done.stdout.splitlines()[-1])
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1))
    if args.plot:
        plot(results, args.plot)
    for name, row in results.items():
        for size, operator in row["at_peak"]:
            if size > row["peak"] / 100:
                print(f"{name} at its peak: {size / 2**20:8.1f} MiB of {operator or 'the caller'}")
    ratio = results["chunked"]["peak"] / results["full"]["peak"]
    print(f"{args.rows} rows, hidden {args.hidden}, V {V:,}, {args.supervised:.0%} supervised, {args.device}")
    print(f"peak, chunked / full: {ratio:.3f} (bar {BAR:.2f}, aim {AIM:.2f} at the defaults on a CPU)")
    print(table(results))


if __name__ == "__main__":
    main()
