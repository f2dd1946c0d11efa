"""How full rows are: useful tokens per computed token, by how conversations become rows. Counted, not timed.

python benchmarks/packing.py --data FILE --tokenizer FILE [--cut 512,1024,4096] [--plot packing.png]

    pad to max     each conversation padded to the cut-off, as the vendor's script does
    dynamic        16 at random, padded to their longest
    rows of cut    packed into rows as long as the cut-off
    one row        packed into one row per micro-batch of --tokens: what training does
    window         the same, seeing 1,024 conversations at a time, as --streaming does

Useful over useful is what packing alone can gain over padding.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from baichuan_sft import load_tokenizer
from baichuan_sft.data.check import Rules
from baichuan_sft.data.dataset import build_dataset
from baichuan_sft.data.packing import plan
from benchmarks import contest

ROOT = Path(__file__).resolve().parents[1]


def dynamic(lengths: np.ndarray, size: int = 16) -> float:
    """Useful share of batches of ``size`` in random order, each padded to its longest."""
    order = np.random.default_rng(0).permutation(lengths)
    return lengths.sum() / sum(
        len(part) * part.max() for part in np.split(order, range(size, len(order), size))
    )


def shares(lengths: np.ndarray, cut: int, tokens: int) -> dict[str, float]:
    long = max(cut, tokens)
    return {
        "pad to max": lengths.mean() / cut,
        "dynamic": dynamic(lengths),
        "rows of cut": plan(lengths, cut).efficiency(lengths, cut),
        "one row": plan(lengths, long).efficiency(lengths, long),
        "window": plan(lengths, long, window=1024).efficiency(lengths, long),
    }


def plot(path: str, found: dict[int, dict[str, float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    names = list(next(iter(found.values())))
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        spots = np.arange(len(found)) + place * width
        bars = axes.bar(spots, [of[name] for of in found.values()], width, label=name)
        axes.bar_label(bars, fmt="%.3f", fontsize=7)
    axes.set(title="Useful tokens per computed token", xlabel="cut-off, tokens", ylim=(0, 1.1))
    axes.set_xticks(np.arange(len(found)) + 0.4 - width / 2, [f"{cut:,}" for cut in found])
    axes.legend(ncols=len(names), fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> dict[int, dict[str, float]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default=str(ROOT / "data/belle_chat.json"))
    parser.add_argument("--tokenizer", default=str(ROOT / "data/tokenizer/baichuan2_like.model"))
    parser.add_argument("--cut", default="512,1024,4096")
    parser.add_argument("--tokens", type=int, default=4096, help="of a micro-batch")
    parser.add_argument("--plot", metavar="PATH")
    args = parser.parse_args(argv)
    tokenizer, found = load_tokenizer(args.tokenizer), {}
    for cut in map(int, args.cut.split(",")):
        lengths = build_dataset([args.data], tokenizer, Rules(max_length=cut)).train.lengths
        found[cut] = shares(lengths, cut, args.tokens)
    started = time.process_time()
    plan(lengths, max(cut, args.tokens))
    seconds = time.process_time() - started
    names = list(found[cut])
    rows = [
        [f"{cut:,}", *(f"{of[name]:.3f}" for name in names), f"{of['one row'] / of['pad to max']:.2f}"]
        for cut, of in found.items()
    ]
    print(f"{args.data}: {len(lengths):,} conversations; the last plan took {seconds:.2f} CPU-seconds\n")
    print(contest.table(["cut", *names, "one row / pad to max"], rows))
    if args.plot:
        plot(args.plot, found)
    return found


if __name__ == "__main__":
    main()
