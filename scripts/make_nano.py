"""Write a nano model: a real architecture of the family with random weights, in seconds, on any machine.

python scripts/make_nano.py out/nano --arch baichuan2-7b
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from transformers.utils.logging import disable_progress_bar  # noqa: E402

from baichuan_sft import BaichuanConfig, BaichuanForCausalLM, load_tokenizer  # noqa: E402
from baichuan_sft.variants import VARIANTS  # noqa: E402

NANO = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("directory")
    parser.add_argument("--arch", default="baichuan2-7b", choices=VARIANTS)
    parser.add_argument("--tokenizer", default=str(ROOT / "data/tokenizer/baichuan2_like.model"))
    parser.add_argument("--seed", type=int, default=0)
    for name, value in NANO.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()

    disable_progress_bar()
    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer(args.tokenizer)
    shape = {name: getattr(args, name) for name in NANO}
    head = "norm" if args.arch.startswith("baichuan2") else "plain"
    config = {**VARIANTS[args.arch].config, **shape, "vocab_size": tokenizer.vocab_size, "lm_head": head}
    model = BaichuanForCausalLM(BaichuanConfig(**config))
    model.save_pretrained(args.directory)
    tokenizer.save_pretrained(args.directory)
    print(f"{args.directory}: {args.arch}, {model.num_parameters():,} random parameters")


if __name__ == "__main__":
    main()
