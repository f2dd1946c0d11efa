"""Everything worth running on one GPU, in under nine minutes: its table comes last.

python benchmarks/gpu.py                    all of it: Baichuan2's shapes, random bf16 weights
python benchmarks/gpu.py --only train,loss  some of it
python benchmarks/gpu.py --tiny             the same code at sizes for a CPU, as the tests run it

    tests       tests/test_gpu.py and the gpu tests of attention and kernels: first whether it is right
    ceilings    bf16 matrix product of 8192^3, copy of 4 GiB: what the shares below are shares of
    attention   forward and backward of one layer's attention, a packed row, every backend that works
    loss        the head over 8,192 targets, frozen and trained, against full logits
    train       a step of 7B and 13B LoRA and of 7B full with 8-bit Adam: packed rows, levels of
                checkpointing, compiled, and the vendor's way on such conversations: tokens/s, MFU, peak
    decode      tokens per second of 7B and 13B, bf16 growing and static cache, int8, NF4

Lengths of conversations are lognormal, as of real multi-turn data (mean 530), cut at 512. A contestant that
runs out of memory or time says so in its row; one that fails makes the exit code 1. `bar` and `aim` are the
project's targets for an H100.
"""

import argparse
import contextlib
import gc
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from baichuan_sft import BaichuanConfig
from baichuan_sft.attention import BACKENDS, choose
from baichuan_sft.data.packing import Collator, plan
from baichuan_sft.model.head_baichuan import BaichuanHead
from baichuan_sft.plan import flops_per_token, peak_tflops
from baichuan_sft.train.adapters import add_lora, count_parameters
from baichuan_sft.train.args import LoraArguments
from baichuan_sft.train.checkpointing import apply
from baichuan_sft.train.fused import compile_blocks
from baichuan_sft.variants import VARIANTS
from benchmarks import attention as bench_attention
from benchmarks import contest, decode, vendor

GIB = 2**30
ROOT = Path(__file__).resolve().parents[1]
TINY = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=512)
CUTOFF = 512
# name of a row, and its bar and aim on an H100 (PERF targets: tokens/s computed, GB, ms)
TARGETS = {
    "7b lora, none": ("15,000 tok/s, 46 GB", "18,500 tok/s, 43 GB"),
    "7b lora, full": ("21 GB", "19.5 GB"),
    "13b lora, none": ("8,200 tok/s, 75 GB", "10,000 tok/s, 71.5 GB"),
    "13b lora, full": ("36 GB", "34.5 GB"),
    "7b full 8-bit, selective": ("9,500 tok/s, 80 GB", "12,000 tok/s"),
    "loss, trained": ("90 ms, 4.2 GB", "60 ms, 3.1 GB"),
    "loss, frozen": ("1.0 GB", "32 ms, 0.6 GB"),
    "7b decode eager": ("-", "-"),
    "7b decode static": ("140 tok/s", "165 tok/s"),
    "13b decode static": ("75 tok/s", "90 tok/s"),
}


class OutOfTime(Exception):
    pass


class Report:
    """Rows of the last table, and the clock that all sections share."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.rows, self.started = args, [], time.monotonic()
        self.gemm_tflops = self.copy_bandwidth = 0.0

    def add(self, name: str, figure: str) -> None:
        bar, aim = TARGETS.get(name, ("", ""))
        self.rows.append([name, figure, bar, aim])
        print(f"{time.monotonic() - self.started:5.0f} s  {name}: {figure}", flush=True)

    def require_time(self) -> None:
        if time.monotonic() - self.started > 60 * self.args.minutes:
            raise OutOfTime

    @contextlib.contextmanager
    def row(self, name: str):
        """One contestant: what it lacks, memory or time, becomes its figure."""
        try:
            yield
        except OutOfTime:
            self.add(name, "not run: no time left")
        except torch.OutOfMemoryError:
            self.add(name, "out of memory")
        except Exception as error:  # one kernel that a release lacks must not cost all other rows
            self.add(name, f"failed: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
        free()


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak(above: float = 0.0) -> str:
    """Largest memory since the last row began; nothing is said of a CPU."""
    if not torch.cuda.is_available():
        return ""
    return f", peak {(torch.cuda.max_memory_allocated() - above) / 1e9:.2f} GB"


def seconds(step, args: argparse.Namespace, rounds: int | None = None) -> float:
    """Median wall-seconds of a step, the first two left out."""
    turns = contest.interleave({"": step}, rounds or args.rounds, args.device, warmup=2)[""]
    return statistics.median(turn.wall for turn in turns)


# --- sections ---------------------------------------------------------------------------------------


def tests(report: Report) -> None:
    files = ["test_gpu.py", "test_attention.py", "test_fused.py", "test_quantization.py", "test_decode.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *(f"tests/{file}" for file in files)]
    with report.row("tests on the GPU"):
        report.require_time()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
        print(done.stdout[-6000:])
        report.add("tests on the GPU", done.stdout.strip().splitlines()[-1])


def ceilings(report: Report) -> None:
    args, size = report.args, 256 if report.args.tiny else 8192
    a, b = (torch.randn(size, size, device=args.device, dtype=args.dtype) for _ in range(2))
    report.gemm_tflops = 2 * size**3 / seconds(lambda: a @ b, args) / 1e12
    report.add("ceiling: matrix product", f"{report.gemm_tflops:.3g} TFLOP/s")
    source = torch.empty(2**20 if args.tiny else 4 * GIB, dtype=torch.uint8, device=args.device)
    target = torch.empty_like(source)
    report.copy_bandwidth = 2 * source.numel() / seconds(lambda: target.copy_(source), args)
    report.add("ceiling: copy", f"{report.copy_bandwidth / 1e12:.3g} TB/s")


def config_of(name: str, args: argparse.Namespace) -> BaichuanConfig:
    shape = VARIANTS[f"baichuan2-{name}"].config
    return BaichuanConfig(**{**shape, **(TINY if args.tiny else {})}, lm_head="norm")


def attention(report: Report) -> None:
    args = report.args
    tokens = 256 if args.tiny else 16384
    for model in ("7b", "13b"):
        config = config_of(model, args)
        for name, backend in BACKENDS.items():
            if backend.make_extra is None or backend.why_not(args.device, args.dtype):
                continue  # a T x T mask of 16k tokens and 40 heads is 20 GB
            title = f"{model} attention, {name}"
            with report.row(title):
                report.require_time()
                took = seconds(bench_attention.step_of(name, config, tokens, args.device, args.dtype), args)
                report.add(title, f"{1000 * took:.2f} ms{peak()}")


def loss(report: Report) -> None:
    args, config = report.args, config_of("7b", report.args)
    rows = 64 if args.tiny else 8192
    for kind in ("frozen", "trained"):
        with report.row(f"loss, {kind}"):
            report.require_time()
            head = BaichuanHead(config.hidden_size, config.vocab_size, True, args.device, args.dtype)
            torch.nn.init.normal_(head.weight, std=0.02).requires_grad_(kind == "trained")
            hidden = torch.randn(1, rows + 1, config.hidden_size, device=args.device, dtype=args.dtype)
            hidden.requires_grad_()
            labels = torch.randint(0, config.vocab_size, (1, rows + 1), device=args.device)
            before = torch.cuda.memory_allocated() if args.device == "cuda" else 0

            def step(head=head, hidden=hidden, labels=labels):
                head(hidden, labels).backward()
                head.weight.grad = hidden.grad = None

            took = seconds(step, args)
            report.add(f"loss, {kind}", f"{1000 * took:.1f} ms{peak(before)} above its inputs")


def conversations(total: int, args: argparse.Namespace) -> list[int]:
    return bench_attention.conversations(total, 32 if args.tiny else CUTOFF)


def packed_batch(config: BaichuanConfig, args: argparse.Namespace, tokens: int) -> dict[str, torch.Tensor]:
    """One full row, three quarters of it targets."""
    lengths, rng = np.array(conversations(8 * tokens, args)), np.random.default_rng(1)
    row = plan(lengths, tokens)[0]

    def segment(length):
        ids = rng.integers(3, config.vocab_size, length).astype(np.int32)
        return {"input_ids": ids, "labels": np.where(np.arange(length) < length // 4, -100, ids)}

    batch = Collator(0, 128 if args.device == "cuda" else 1, tokens)([[segment(n) for n in lengths[row]]])
    return {name: tensor.to(args.device) for name, tensor in batch.items()}


def padded_batch(config: BaichuanConfig, args: argparse.Namespace, size: int) -> dict[str, torch.Tensor]:
    """The vendor's: ``size`` conversations, each padded to the cut-off."""
    cutoff = 32 if args.tiny else CUTOFF
    lengths = torch.tensor(conversations(size * cutoff, args)[:size])[:, None]
    ids = torch.randint(3, config.vocab_size, (size, cutoff), generator=torch.Generator().manual_seed(1))
    place = torch.arange(cutoff)
    labels = ids.masked_fill((place < lengths // 4) | (place >= lengths), -100)
    batch = {"input_ids": ids, "labels": labels, "attention_mask": (place < lengths).long()}
    return {name: tensor.to(args.device) for name, tensor in batch.items()}


def adapted(model: Any, lora: bool) -> Any:
    if not lora:
        return model.train()
    return add_lora(model, LoraArguments(use_lora=True, lora_rank=8, lora_alpha=32, lora_dropout=0.0)).train()


def optimizer_of(model: Any, eight_bit: bool) -> Any:
    trained = [p for p in model.parameters() if p.requires_grad]
    if eight_bit:
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(trained, lr=1e-5)
    return torch.optim.AdamW(trained, lr=1e-5, fused=True)


def train(report: Report) -> None:
    for name, mode, levels in (
        ("7b", "lora", ("none", "selective", "full", "none, compiled")),
        ("13b", "lora", ("none", "full")),
        ("7b", "full 8-bit", ("selective", "full")),
    ):
        lora, args = mode == "lora", report.args
        with report.row(f"{name} {mode}"):
            report.require_time()
            config = config_of(name, args)
            config._attn_implementation, why = choose(
                "auto", config.position_embedding, args.device, args.dtype
            )
            print(f"{name} {mode}: attention {config._attn_implementation}, {why}")
            model = adapted(decode.build(config, args.device).requires_grad_(True), lora)
            useful = at_levels(report, f"{name} {mode}", model, config, levels, lora)
            if lora:
                against_vendor(report, name, config, useful, dict(model.named_parameters()))


def at_levels(
    report: Report, name: str, model: Any, config: Any, levels: tuple[str, ...], lora: bool
) -> dict[str, float]:
    """Targets per second at each level of checkpointing."""
    args, tokens = report.args, 128 if report.args.tiny else 8192
    optimizer = optimizer_of(model, eight_bit=not lora)
    batch = packed_batch(config, args, tokens)
    num_targets = int((batch["labels"][:, 1:] != -100).sum())
    lengths = np.array(conversations(tokens, args))
    flops = flops_per_token(
        config,
        lora=lora,
        span=float((lengths**2).sum() / lengths.sum()),
        target_share=num_targets / tokens,
        adapter_parameters=count_parameters(model)[0] if lora else 0,
    )
    useful = {}

    def step():
        model(**batch, num_items_in_batch=num_targets).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for level in levels:
        compiled = level.endswith("compiled")
        if compiled and args.tiny:
            continue  # a minute of compiling that tests/test_fused.py takes already
        with report.row(f"{name}, {level}"):
            report.require_time()
            apply(model, level.split(",")[0])
            if compiled:
                compile_blocks(model)
            took = seconds(step, args)
            useful[f"{name}, {level}"] = num_targets / took
            report.add(f"{name}, {level}", speed(report, tokens, took, flops, num_targets))
    return useful


def speed(report: Report, tokens: int, took: float, flops: float, num_targets: int) -> str:
    tflops = tokens * flops / took / 1e12
    figure = f"{tokens / took:,.0f} tok/s, {num_targets / took:,.0f} targets/s, {tflops:.3g} TFLOP/s"
    known = peak_tflops(torch.cuda.get_device_name()) if report.args.device == "cuda" else None
    if known:
        figure += f", MFU {tflops / known:.1%} of {known}"
    if report.gemm_tflops:
        figure += f", {tflops / report.gemm_tflops:.1%} of the measured product"
    return figure + peak()


def against_vendor(report: Report, name: str, config: Any, useful: dict[str, float], weights: dict) -> None:
    """The vendor's step on the same weights: 16 conversations padded to the cut-off, all checkpointed."""
    args, title = report.args, f"{name} lora, vendor's way"
    with report.row(title):
        report.require_time()
        import peft

        with torch.device("meta"):
            model = vendor.Model(config, checkpointing=True)
        shared = {
            key.replace("base_model.model.", "").replace(".base_layer", ""): p for key, p in weights.items()
        }
        model.load_state_dict({key: p for key, p in shared.items() if "lora_" not in key}, assign=True)
        model.requires_grad_(False)
        model.enable_input_require_grads()
        options = dict(r=8, lora_alpha=32, lora_dropout=0.0, target_modules=vendor.LORA_TARGETS)
        model = peft.get_peft_model(model, peft.LoraConfig(**options)).train()
        optimizer = optimizer_of(model, eight_bit=False)
        batch = padded_batch(config, args, 2 if args.tiny else 16)
        num_targets = int((batch["labels"][:, 1:] != -100).sum())

        def step():
            model(**batch).backward()
            optimizer.step()
            optimizer.zero_grad()

        rate = num_targets / seconds(step, args, max(3, args.rounds // 2))
        report.add(title, f"{rate:,.0f} targets/s{peak()}")
        if useful:
            best = max(useful, key=lambda key: useful[key])
            ratio = f"{useful[best] / rate:.2f} times the targets/s ({best})"
            report.add(f"{name} lora, ours / vendor's at 512", ratio)


def decoding(report: Report) -> None:
    args = report.args
    for name in ("7b", "13b"):
        for contestant in ("eager", "static", "int8", "nf4"):
            title = f"{name} decode {contestant}"
            with report.row(title):
                report.require_time()
                words = ["--model", "tiny" if args.tiny else name, "--device", args.device]
                options = decode.arguments(
                    [*words, "--contestants", contestant, "--tokens", "8" if args.tiny else "96"]
                )
                options.context = 16 if args.tiny else 512
                decoder = decode.contestants(options)[contestant]
                turns = contest.interleave({"": decoder}, 3, args.device, warmup=1 if args.tiny else 2)[""]
                rate = statistics.median(turn.result for turn in turns)
                share = (
                    rate * decoder.bytes_per_token() / report.copy_bandwidth if report.copy_bandwidth else 0
                )
                gib = decode.weight_bytes(decoder.model) / GIB
                report.add(title, f"{rate:.1f} tok/s, {share:.0%} of copy bandwidth, weights {gib:.2f} GiB")
                del decoder


SECTIONS = {
    "tests": tests,
    "ceilings": ceilings,
    "attention": attention,
    "loss": loss,
    "train": train,
    "decode": decoding,
}


def main(argv: list[str] | None = None) -> list[list[str]]:
    """Returns the rows of the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, commas between")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=8.0, help="what has not begun by then is left out")
    parser.add_argument("--tiny", action="store_true", help="on the CPU, at sizes for a test")
    args = parser.parse_args(argv)
    if unknown := set(args.only.split(",")) - SECTIONS.keys():
        parser.error(f"no section {', '.join(sorted(unknown))}; known: {', '.join(SECTIONS)}")
    args.device, args.dtype = ("cpu", torch.float32) if args.tiny else ("cuda", torch.bfloat16)
    if not args.tiny and not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py needs a CUDA GPU; --tiny runs the same code on a CPU.")
    report = Report(args)
    for name in args.only.split(","):
        SECTIONS[name](report)
    print(f"\n{contest.machine(args.device)}, {time.monotonic() - report.started:.0f} s\n")
    print(contest.table(["what", "measured", "bar, H100", "aim, H100"], report.rows))
    return report.rows


if __name__ == "__main__":
    sys.exit(any("failed" in figure for _, figure, *_ in main()))
