"""Attention alone, forward and backward over packed rows, of every backend that works here, against eager.

python benchmarks/attention.py [--tokens 512,1024,2048,4096] [--heads 8] [--width 64] [--plot attention.png]
python benchmarks/attention.py --device cuda --tokens 4096,16384 --heads 32 --width 128

A row holds conversations as long as in real multi-turn data (lognormal, mean 530), cut at 512 or at the row.
The mask or layout is made once for all layers, so it is made before. On a CPU times are CPU-seconds, in fp32.
A mask of more than 4 GiB is not tried.
"""

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from baichuan_sft import BaichuanConfig
from baichuan_sft.attention import BACKENDS
from baichuan_sft.model.attention_baichuan import PREPARE, attention_bias
from benchmarks import contest

MAX_MASK_BYTES = 2**32


def conversations(total: int, cutoff: int, seed: int = 0) -> list[int]:
    """Lengths of at most ``cutoff`` that fill ``total`` tokens exactly."""
    rng, lengths = np.random.default_rng(seed), []
    while total:
        lengths.append(min(total, int(np.clip(rng.lognormal(np.log(350), 0.9), 16, cutoff))))
        total -= lengths[-1]
    return lengths


def step_of(name: str, config: BaichuanConfig, tokens: int, device: str, dtype: torch.dtype):
    """Forward and backward of one layer's attention over one packed row."""
    lengths = conversations(tokens, min(512, tokens))
    position_ids = torch.cat([torch.arange(length) for length in lengths])[None].to(device)
    index = torch.arange(tokens, device=device)
    like = torch.zeros(1, tokens, 1, device=device, dtype=dtype)
    wide = torch.float32 if name == "eager" else dtype
    mask = PREPARE.get(name, attention_bias)(config, like, None, position_ids, index, tokens, wide)
    shape = (1, config.num_attention_heads, tokens, config.head_dim)
    generator = torch.Generator(device).manual_seed(0)
    options = dict(device=device, dtype=dtype, generator=generator)
    qkv = [torch.randn(shape, **options).requires_grad_() for _ in range(3)]
    module = torch.nn.Module().train()

    def step():
        out, _ = BACKENDS[name].attend(module, *qkv, mask, scaling=config.head_dim**-0.5)
        out.sum().backward()
        for tensor in qkv:
            tensor.grad = None

    return step


def usable(name: str, config: BaichuanConfig, tokens: int, device: str, dtype: torch.dtype) -> bool:
    backend = BACKENDS[name]
    same_as_segments = name == "augmented" and config.position_embedding == "rope"
    if backend.why_not(device, dtype) or same_as_segments:
        return False
    heads = config.num_attention_heads if name == "eager" or config.position_embedding == "alibi" else 1
    return backend.make_extra is not None or 4 * heads * tokens**2 <= MAX_MASK_BYTES


def config_of(position: str, heads: int, width: int) -> BaichuanConfig:
    limit = {"max_position_embeddings" if position == "rope" else "model_max_length": 4096}
    return BaichuanConfig(vocab_size=64, hidden_size=heads * width, num_attention_heads=heads, **limit)


def main(argv: list[str] | None = None) -> list[list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", default="512,1024,2048,4096", help="of a row, commas between")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=64, help="of a head")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--plot", metavar="PATH", help="eager's time over each backend's")
    args = parser.parse_args(argv)
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    lines, shown = [], {}
    for position in ("rope", "alibi"):
        config = config_of(position, args.heads, args.width)
        for tokens in map(int, args.tokens.split(",")):
            names = [name for name in BACKENDS if usable(name, config, tokens, args.device, dtype)]
            steps = {name: step_of(name, config, tokens, args.device, dtype) for name in names}
            turns = contest.interleave(steps, args.rounds, args.device)
            seconds = {
                name: [turn.cpu if args.device == "cpu" else turn.wall for turn in of]
                for name, of in turns.items()
            }
            for name in names:
                gains = contest.ratios(seconds[names[0]], seconds[name])
                shown[f"{position} {tokens:,} {name}"] = gains
                took = f"{1000 * statistics.median(seconds[name]):.1f}"
                lines.append([position, f"{tokens:,}", name, took, str(contest.spread(gains))])
                print(*lines[-1], flush=True)
    print(f"\n{contest.machine(args.device)}; {args.heads} heads of {args.width}, {args.rounds} rounds\n")
    print(contest.table(["", "tokens", "backend", "ms", "faster than the first: median (range)"], lines))
    if args.plot:
        best = {name: of for name, of in shown.items() if not name.endswith(" eager")}
        contest.plot(args.plot, "Attention, forward and backward", "eager's time / backend's", best)
    return lines


if __name__ == "__main__":
    main()
