"""Curves of 64 to 4,096 GPUs by baichuan_sft.plan's simulation, and the simulation against published runs.

python benchmarks/scale.py                    prints both, writes benchmarks/plots/scale_*.png (seconds)

Nothing here measures anything: see docs/scale.md for what is assumed and what is left out.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from baichuan_sft.plan.command import build_parser, job_of
from baichuan_sft.plan.communication import Network
from baichuan_sft.plan.flops import Shape, layer_parameters
from baichuan_sft.plan.scale import rows_of
from baichuan_sft.plan.simulate import MTBF_GPU_HOURS, Device, goodput, update

PLOTS = Path(__file__).parent / "plots"
# Hosts of 8 H100: a 400 Gb/s port per GPU, and 100 Gb/s Ethernet for all of them, at 90 %.
LINKS = {"InfiniBand, 8 x 400 Gb/s": 360, "Ethernet, 100 Gb/s": 11}
NAMES = {
    "full ddp": "all weights, no ZeRO",
    "full zero1": "ZeRO-1",
    "full zero2": "ZeRO-2",
    "full zero3": "ZeRO-3",
    "full hpz": "ZeRO-3 with hpZ",
    "lora ddp": "LoRA, no ZeRO",
}


class Run(NamedTuple):
    """A published run: one micro-step per update, FSDP, hosts of 8 x H100 with 8 x 400 Gb/s."""

    size: str
    gpus: int
    tokens_per_second: float  # of one GPU


# mosaicml/llm-foundry, scripts/train/benchmarking/README.md, H100 BF16, sequences of 2,048:
# size -> width, layers, heads, sequences of a micro-batch, sharding, checkpointing
SIZES = {
    "3B": (2560, 32, 20, 8, "zero2", "none"),
    "7B": (4096, 32, 32, 6, "zero3", "none"),
    "13B, small batch": (5120, 40, 40, 2, "zero3", "none"),
    "13B": (5120, 40, 40, 16, "zero3", "full"),
    "30B": (7168, 48, 56, 8, "zero3", "full"),
}
RUNS = [
    *(Run("3B", *row) for row in ((128, 23422), (256, 22772), (512, 21664))),
    *(Run("7B", *row) for row in ((8, 10643), (128, 10475), (256, 10119), (512, 9670))),
    *(Run("13B, small batch", *row) for row in ((8, 4792), (16, 4767), (32, 4811), (64, 4800))),
    *(Run("13B", *row) for row in ((128, 5080), (256, 4989), (512, 4952))),
    *(Run("30B", *row) for row in ((128, 2199), (256, 2148), (512, 2115))),
]
# Llama 3 (arXiv 2407.21783, 3.3.4): 16,384 GPUs in hosts of 8, more than 90 % of the time effective.
LLAMA3_GPUS, LLAMA3_USEFUL = 16384, 0.90


def simulated(run: Run) -> float:
    """Tokens per second and GPU; MPT's MLP has two matrices of 4 D, taken here for three of 8/3 D."""
    width, layers, heads, sequences, recipe, level = SIZES[run.size]
    shape = Shape(
        width, round(8 * width / 3), layers, heads, 50432 // 2, "alibi"
    )  # one table of words, not two
    device = Device("H100", 80, 989.5, 0.46, "")
    net = Network(8, run.gpus // 8, 370e9, 360e9)
    options = dict(tokens=sequences * 2048, micro_steps=1, level=level, span=2048)
    found = update(shape, "full", recipe, device, net, bucket=layer_parameters(shape), **options)
    return found.tokens / found.seconds / run.gpus


def against_published() -> str:
    lines = ["| run | GPUs | published | simulated | ratio | kept of the first row: published, simulated |"]
    lines.append("|---|---|---|---|---|---|")
    for size in SIZES:
        rows = [(run, simulated(run)) for run in RUNS if run.size == size]
        (first, ours), *_ = rows
        for run, found in rows:
            kept = f"{run.tokens_per_second / first.tokens_per_second:.3f}, {found / ours:.3f}"
            speeds = f"{run.tokens_per_second:,} | {found:,.0f} | {found / run.tokens_per_second:.2f}"
            lines.append(f"| {size} | {run.gpus} | {speeds} | {kept} |")
    return "\n".join(lines)


def failures() -> str:
    """Useful share of 16,384 GPUs under saves and restarts of different lengths."""
    lines = ["| save, s | restart, s | useful |", "|---|---|---|"]
    for save, restart in ((10, 180), (10, 300), (30, 300), (60, 300), (60, 600)):
        found = goodput(LLAMA3_GPUS // 8, MTBF_GPU_HOURS / 8, save, restart)
        lines.append(f"| {save} | {restart} | {found.useful:.3f} |")
    return "\n".join(lines)


def curves(model: str, inter: float, batch: str) -> dict[str, list[tuple[int, float]]]:
    """Split -> GPUs and useful tokens per second of one of them, where it fits."""
    words = f"--model {model} --gpus 8xH100 --bandwidth_inter {inter} --scale".split()
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows_of(job_of(build_parser().parse_args(words))):
        if row["fits"] and row["batch"] == batch:
            points = found.setdefault(f"{row['method']} {row['recipe']}", [])
            points.append((row["gpus"], row["useful_tokens_per_second"]))
    return found


def plot(model: str, path: Path) -> None:
    """Links across, batches down."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    batches = {"weak": "16,384 tokens of each GPU", "fixed": "4,194,304 tokens of all GPUs"}
    figure, rows = plt.subplots(2, 2, figsize=(11, 7.5), sharex=True, sharey=True)
    for axes_of, (batch, batch_name) in zip(rows, batches.items()):
        for axes, (link, inter) in zip(axes_of, LINKS.items()):
            for i, (split, name) in enumerate(NAMES.items()):
                points = curves(model, inter, batch).get(split)
                if points:
                    axes.plot(*zip(*points), marker="os^Dv*"[i], color=f"C{i}", label=name, ms=4, lw=1.3)
            axes.set(xscale="log", ylim=(0, None), title=f"{link}; {batch_name} per update")
            axes.title.set_fontsize(9)
            ticks = [64, 128, 256, 512, 1024, 2048, 4096]
            axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=8)
            axes.minorticks_off()
            axes.grid(alpha=0.3)
    rows[0][0].set_ylabel("useful tokens/s and GPU")
    rows[1][0].set_ylabel("useful tokens/s and GPU")
    for axes in rows[1]:
        axes.set_xlabel("GPUs, hosts of 8 x H100")
    rows[1][1].legend(fontsize=8, loc="center right")
    figure.suptitle(f"{model}: simulated, not measured; failures and stragglers included")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--models", default="baichuan2-7b,baichuan2-13b")
    args = parser.parse_args()
    print(against_published(), failures(), sep="\n\n")
    for model in args.models.split(","):
        path = PLOTS / f"scale_{model.removeprefix('baichuan2-')}.png"
        plot(model, path)
        print(f"\n{path}")


if __name__ == "__main__":
    main()
