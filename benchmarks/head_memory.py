"""Peak memory of the head and its loss, forward and backward, against full logits; NormHead, V = 125,696.

python benchmarks/head_memory.py [--rows 4096] [--hidden 512] [--supervised 0.75] [--device cpu|cuda]

Each contestant runs in a process of its own. The peak is what the process grew by over the weights and
inputs (resident memory on a CPU, allocated memory on a GPU). `full` is the vendor's way: NormHead writes a
normalised weight, all logits, a shifted copy, cross-entropy over them.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.nn import functional as F

from baichuan_sft.model.head_baichuan import BaichuanHead

V = 125_696


def full(head, hidden, labels):
    logits = F.linear(hidden, F.normalize(head.weight)).float()
    shifted = logits[:, :-1].contiguous().view(-1, V)
    return F.cross_entropy(shifted, labels[:, 1:].flatten())


def chunked(head, hidden, labels):
    return head(hidden, labels)


def peak_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(args: argparse.Namespace) -> dict[str, float]:
    """One forward and backward of ``args.contestant`` in this process."""
    torch.manual_seed(0)
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    head = BaichuanHead(args.hidden, V, normalize=True, device=args.device, dtype=dtype)
    hidden = torch.randn(4, args.rows // 4, args.hidden, device=args.device, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, V, (4, args.rows // 4), device=args.device)
    labels[torch.rand(labels.shape, device=args.device) > args.supervised] = -100
    before, started = peak_bytes(args.device), time.process_time()
    loss = {"full": full, "chunked": chunked}[args.contestant](head, hidden, labels)
    loss.backward()
    assert head.weight.grad is not None and hidden.grad is not None
    return {
        "loss": loss.item(),
        "gradient": hidden.grad.norm().item(),
        "gib": (peak_bytes(args.device) - before) / 2**30,
        "cpu_seconds": time.process_time() - started,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--supervised", type=float, default=0.75)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--contestant", choices=["full", "chunked"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contestant:
        print(json.dumps(measure(args)))
        return
    results = {}
    for name in ("full", "chunked"):
        command = [sys.executable, __file__, *sys.argv[1:], "--contestant", name]
        results[name] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    print(f"{args.rows} rows, hidden {args.hidden}, V {V:,}, {args.supervised:.0%} supervised, {args.device}")
    print(f"{'':8} {'peak GiB':>9} {'CPU s':>7} {'loss':>10} {'|d hidden|':>11}")
    for name, row in results.items():
        numbers = f"{row['gib']:9.2f} {row['cpu_seconds']:7.1f} {row['loss']:10.6f} {row['gradient']:11.4e}"
        print(f"{name:8} {numbers}")
    print(f"peak, chunked / full: {results['chunked']['gib'] / results['full']['gib']:.3f}")


if __name__ == "__main__":
    main()
