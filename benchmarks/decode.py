"""Tokens per second of greedy decoding, one conversation, against what memory bandwidth allows.

python benchmarks/decode.py --model 7b --device cuda        all contestants
python benchmarks/decode.py --model 13b --device cuda --context 2048 --contestants eager,static --plot 13b.png

    eager      bf16, growing cache, each kernel launched from Python: what `generate` does by default
    static     bf16, static cache; on a GPU transformers compiles the step into CUDA graphs (`chat --compile`)
    int8       LLM.int8() linear layers, growing cache (`chat --quantize int8`)
    nf4        4-bit linear layers, growing cache (`chat --quantize nf4`)
    X-other    eager or static with the other position embedding, RoPE or ALiBi, at the same shape and weights

Contestants take turns in one process, on the same random weights (fp32 on a CPU) and prompt. A turn is one
`generate`; its rate counts the steps after the first token, so the prompt is not in it. On a CPU rates are
per CPU-second, and nothing is compiled. Read per token are all weights but the embedding, and the cache: as
far as it is filled, on average over the turn; a static one whole. The share is of the bandwidth measured by
copying.
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import StaticCache
from transformers.generation.streamers import BaseStreamer
from transformers.integrations import replace_with_bnb_linear

from baichuan_sft.model.configuration_baichuan import BaichuanConfig
from baichuan_sft.model.modeling_baichuan import BaichuanForCausalLM
from baichuan_sft.quantization import KEPT, quantization_config, weight_bytes
from baichuan_sft.variants import LINEARS, VARIANTS
from benchmarks import contest

GIB = 2**30
TINY = dict(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
MODELS = {
    "tiny": dict(TINY, max_position_embeddings=4096, lm_head="norm", position_embedding="rope"),
    **{name: dict(VARIANTS[f"baichuan2-{name}"].config, lm_head="norm") for name in ("7b", "13b")},
}
OTHER = "-other"
CONTESTANTS = ("eager", "static", "int8", "nf4", f"eager{OTHER}", f"static{OTHER}")
# GB that the vendor's README gives for Baichuan2; its bf16 rows are the whole process, and GiB.
PUBLISHED = {
    "7b": {"bf16": 15.3, "int8": 8.0, "nf4": 5.1},
    "13b": {"bf16": 27.5, "int8": 16.1, "nf4": 8.6},
}


def weights_of(contestant: str) -> str:
    return contestant if contestant in ("int8", "nf4") else "bf16"


# --- memory, by counting ----------------------------------------------------------------------------


def expected_bytes(config: BaichuanConfig, weights: str) -> int:
    """Bytes of a model of this shape: decoder linears in ``weights``, all else in bf16; nothing is allocated.

    int8 keeps one fp32 scale per row. NF4 keeps one byte per block of 64 weights, one fp32 per 256 of these
    bytes, two tables (16 and 256 fp32) and an fp32 offset per matrix.
    """
    with torch.device("meta"):
        model = BaichuanForCausalLM(config)
    total = 0
    for name, weight in model.named_parameters():
        n = weight.numel()
        if weights == "bf16" or name.split(".")[-2] not in LINEARS:
            total += 2 * n
        elif weights == "int8":
            total += n + 4 * weight.shape[0]
        else:
            blocks = -(-n // 64)
            total += -(-n // 2) + blocks + 4 * -(-blocks // 256) + 4 * (16 + 256 + 1)
    return total


# --- contestants ------------------------------------------------------------------------------------


def build(
    config: BaichuanConfig, device: str, weights: str = "bf16", dtype: torch.dtype | None = None
) -> BaichuanForCausalLM:
    """A model with random weights, made where it runs; ``dtype`` None is bf16 on a GPU, fp32 on a CPU."""
    torch.manual_seed(0)
    dtype = dtype or (torch.bfloat16 if device == "cuda" else torch.float32)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = BaichuanForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    if weights != "bf16":
        quantize(model, weights, device, dtype)
    return model.eval().requires_grad_(False)


def quantize(model: Any, weights: str, device: str, dtype: torch.dtype) -> None:
    """What loading with ``quantize`` does, from weights in memory."""
    import bitsandbytes

    kind = {"int8": bitsandbytes.nn.Int8Params, "nf4": bitsandbytes.nn.Params4bit}[weights]
    linears = {name: m.weight.data for name, m in model.named_modules() if name.split(".")[-1] in LINEARS}
    model = replace_with_bnb_linear(model, KEPT, quantization_config(weights, dtype))
    for name in list(linears):
        module = model.get_submodule(name)
        options = {k: v for k, v in module.weight.__dict__.items() if k != "SCB"}
        # from the CPU: what lies on a GPU already would be taken as it is
        module.weight = kind(linears.pop(name).cpu(), requires_grad=False, **options).to(device)


class Clock(BaseStreamer):
    """When each token came."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now, self.stamps = now, []

    def put(self, value: torch.Tensor) -> None:
        self.stamps.append(self.now())  # the first is the prompt

    def end(self) -> None:
        pass

    def rate(self) -> float:
        """Tokens per second after the first."""
        tokens = self.stamps[1:]
        return (len(tokens) - 1) / (tokens[-1] - tokens[0])


@dataclass
class Decoder:
    """One contestant; calling it is a turn.

    Attributes:
        cache_len: tokens of a static cache; None for a growing one.
        ids: new tokens of the last turn.
    """

    model: Any
    prompt: torch.Tensor
    num_tokens: int
    cache_len: int | None = None
    ids: list[int] = field(default_factory=list)
    cache: Any = None

    def __call__(self) -> float:
        options: dict[str, Any] = {}
        if self.cache_len is not None:
            if self.cache is None:
                self.cache = StaticCache(config=self.model.config, max_cache_len=self.cache_len)
            self.cache.reset()
            options["past_key_values"] = self.cache
        on_gpu = self.prompt.is_cuda
        clock = Clock(time.perf_counter if on_gpu else time.process_time)
        lengths = dict(max_new_tokens=self.num_tokens, min_new_tokens=self.num_tokens)
        out = self.model.generate(
            self.prompt,
            attention_mask=torch.ones_like(self.prompt),
            do_sample=False,
            pad_token_id=0,
            streamer=clock,
            **lengths,
            **options,
        )
        self.ids = out[0, self.prompt.shape[1] :].tolist()
        return clock.rate()

    def bytes_per_token(self) -> float:
        config = self.model.config
        weights = weight_bytes(self.model) - weight_bytes(self.model.model.embed_tokens)
        keys = self.cache_len or self.prompt.shape[1] + self.num_tokens / 2
        element = self.model.dtype.itemsize
        return weights + 2 * config.num_hidden_layers * config.hidden_size * element * keys


def with_other_position(model: BaichuanForCausalLM) -> BaichuanForCausalLM:
    """The same weights, not copied, under the other position embedding."""
    other = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    position = {"rope": "alibi", "alibi": "rope"}[model.config.position_embedding]
    for module in other.modules():
        if hasattr(module, "config"):
            module.config.position_embedding = position
    return other


def contestants(args: argparse.Namespace) -> dict[str, Decoder]:
    config = BaichuanConfig(**MODELS[args.model])
    config._attn_implementation = args.attn
    torch.manual_seed(1)
    prompt = torch.randint(300, config.vocab_size, (1, args.context), device=args.device)
    models: dict[str, Any] = {}
    for name in args.contestants:
        key = weights_of(name)
        models[key] = models.get(key) or build(config, args.device, key)
    if any(name.endswith(OTHER) for name in args.contestants):
        models[OTHER] = with_other_position(models["bf16"])
    return {
        name: Decoder(
            models[OTHER if name.endswith(OTHER) else weights_of(name)],
            prompt,
            args.tokens,
            cache_len=args.context + args.tokens if name.startswith("static") else None,
        )
        for name in args.contestants
    }


def copy_bandwidth(device: str) -> float:
    """Bytes per second, read and written, of a device's copy of 4 GiB; the best of five."""
    source = torch.empty(4 * GIB, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    turns = contest.interleave({"copy": lambda: target.copy_(source)}, 5, device)["copy"]
    return 2 * source.numel() / min(turn.wall for turn in turns)


# --- report -----------------------------------------------------------------------------------------


def report(
    args: argparse.Namespace, decoders: dict[str, Decoder], turns: dict[str, list[contest.Turn]]
) -> str:
    bandwidth = copy_bandwidth(args.device) if args.device == "cuda" else None
    rates = {name: [turn.result for turn in of] for name, of in turns.items()}
    first = next(iter(rates))
    lines = []
    for name, decoder in decoders.items():
        rate, read = statistics.median(rates[name]), decoder.bytes_per_token()
        kind, config = weights_of(name), decoder.model.config
        published = PUBLISHED.get(args.model, {}).get(kind, "-")
        lines.append(
            [
                f"{name} ({config.position_embedding})",
                f"{rate:.1f} ({min(rates[name]):.1f} - {max(rates[name]):.1f})",
                contest.spread(contest.ratios(rates[name], rates[first])),
                f"{read / 1e9:.3g}",
                f"{rate * read / bandwidth:.0%}" if bandwidth else "-",
                f"{weight_bytes(decoder.model) / GIB:.3g}",
                f"{expected_bytes(config, kind) / GIB:.3g}",
                published,
            ]
        )
    unit = "tokens/s" if args.device == "cuda" else "tokens/CPU-s"
    header = [
        "contestant",
        unit,
        f"/ {first}",
        "GB read/token",
        "of copy bandwidth",
        "weights GiB",
        "expected, bf16 GiB",
        "vendor GB",
    ]
    heading = f"{args.model}, {args.context} + {args.tokens} tokens, {args.rounds} rounds"
    if bandwidth:
        heading += f", copy {bandwidth / 1e12:.2f} TB/s"
    return f"{heading}; {contest.machine(args.device)}\n\n{contest.table(header, lines)}"


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--attn", choices=["sdpa", "eager"], default="sdpa")
    parser.add_argument("--contestants", default=",".join(CONTESTANTS))
    parser.add_argument("--tokens", type=int, default=128, help="new tokens per turn, at least 3")
    parser.add_argument("--context", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--plot", metavar="PATH", help="rates over the first contestant's, per round")
    args = parser.parse_args(argv)
    args.contestants = args.contestants.split(",")
    if unknown := set(args.contestants) - set(CONTESTANTS):
        parser.error(f"no contestant {', '.join(sorted(unknown))}; known: {', '.join(CONTESTANTS)}")
    if args.tokens < 3 or args.context < 1 or args.rounds < 1:
        parser.error("--tokens must be >= 3, --context and --rounds >= 1")
    return args


def main(argv: list[str] | None = None) -> dict[str, list[float]]:
    """Returns the rates of all rounds, by contestant."""
    args = arguments(argv)
    decoders = contestants(args)
    turns: dict[str, list[contest.Turn]] = contest.interleave(decoders, args.rounds, args.device, warmup=2)
    print(report(args, decoders, turns))
    rates = {name: [turn.result for turn in of] for name, of in turns.items()}
    if args.plot:
        first = next(iter(rates))
        shown = {name: contest.ratios(of, rates[first]) for name, of in rates.items()}
        contest.plot(args.plot, f"Decoding, {args.model}", f"tokens per second / {first}", shown)
    return rates


if __name__ == "__main__":
    main()
