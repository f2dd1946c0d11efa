"""Everything worth running on one GPU, in under nine minutes: its table comes last.

python benchmarks/gpu.py                    all of it: Baichuan2's shapes, random bf16 weights
python benchmarks/gpu.py --only train,loss  some of it
python benchmarks/gpu.py --tiny             the same code at sizes for a CPU, as the tests run it

    ceilings    bf16 matrix product of 8192^3, copy of 4 GiB: what the shares below are shares of
    attention   forward and backward of one layer's attention, a packed row, every backend that works
    loss        the head over 8,192 targets, frozen and trained
    train       gpu_train.py: steps of 7B and 13B LoRA, QLoRA and full training, and of the vendor's way
    decode      tokens per second of 7B and 13B, bf16 growing and static cache, int8, NF4
    tests       the gpu tests of model, attention and kernels, as time is left

A contestant that runs out of memory or time says so in its row; one that fails makes the exit code 1. `bar`
and `aim` are the project's targets for the device, where it has some.
"""

import argparse
import contextlib
import gc
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from baichuan_sft import BaichuanConfig
from baichuan_sft.attention import BACKENDS
from baichuan_sft.errors import first_line
from baichuan_sft.model.head_baichuan import BaichuanHead
from baichuan_sft.variants import VARIANTS
from benchmarks import attention as bench_attention
from benchmarks import contest, decode

GIB = 2**30
ROOT = Path(__file__).resolve().parents[1]
TINY = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=512)
# Device, then row: bar and aim. Tokens/s are computed ones, GB the peak.
TARGETS = {
    "H100": {
        "7b lora, none": ("15,000 tok/s, 46 GB", "18,500 tok/s, 43 GB"),
        "7b lora, none, compiled": ("15,000 tok/s, 46 GB", "18,500 tok/s, 43 GB"),
        "7b lora, none, cut 4096": ("14,500 tok/s", "16,300 tok/s"),
        "7b lora, full": ("21 GB", "19.5 GB"),
        "13b lora, none": ("8,200 tok/s, 75 GB", "10,000 tok/s, 71.5 GB"),
        "13b lora, none, compiled": ("8,200 tok/s, 75 GB", "10,000 tok/s, 71.5 GB"),
        "13b lora, full": ("36 GB", "34.5 GB"),
        "7b qlora, full": ("9 GB", "7.5 GB"),
        "13b qlora, full": ("14 GB", "11.5 GB"),
        "7b lora, ours / vendor's at 512": ("2.3", "3"),
        "7b lora, ours / vendor's at 1024": ("3.5", "4.5"),
        "7b lora, ours / vendor's at 4096": ("10", "16"),
        "loss, trained": ("90 ms, 4.2 GB", "60 ms, 3.1 GB"),
        "loss, frozen": ("1.0 GB", "32 ms, 0.6 GB"),
        "7b decode static": ("140 tok/s", "165 tok/s"),
        "13b decode static": ("75 tok/s", "90 tok/s"),
        "13b decode int8": ("110 tok/s", "150 tok/s"),
    },
    "H200": {
        "7b full 8-bit, selective": ("10,500 tok/s", "12,000 tok/s"),
        "7b decode static": ("195 tok/s", "235 tok/s"),
        "13b decode static": ("105 tok/s", "128 tok/s"),
        "13b decode int8": ("150 tok/s", "210 tok/s"),
    },
}


class OutOfTime(Exception):
    pass


class Report:
    """Rows of the last table, and the clock that all sections share."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.rows, self.started = args, [], time.monotonic()
        self.gemm_tflops = self.copy_bandwidth = 0.0
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        self.targets = next((rows for name, rows in TARGETS.items() if name in device), {})

    def add(self, name: str, figure: str) -> None:
        self.rows.append([name, figure, *self.targets.get(name, ("", ""))])
        print(f"{time.monotonic() - self.started:5.0f} s  {name}: {figure}", flush=True)

    def require_time(self, seconds: float = 30) -> None:
        """Do not begin what takes about so many seconds where fewer are left."""
        if time.monotonic() - self.started + seconds > 60 * self.args.minutes:
            raise OutOfTime

    @contextlib.contextmanager
    def row(self, name: str):
        """One contestant: what it lacks, memory or time, becomes its figure."""
        free()  # not only at the end, where a traceback still holds the step that failed
        try:
            yield
        except OutOfTime:
            self.add(name, "not run: too little time left")
        except torch.OutOfMemoryError:
            self.add(name, "out of memory")
        except Exception as error:  # one kernel that a release lacks must not cost all other rows
            self.add(name, f"failed: {type(error).__name__}: {first_line(error)[:120]}")
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
    names = ("gpu", "attention", "fused", "quantization", "decode")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        *(f"tests/test_{name}.py" for name in names),
    ]
    with report.row("tests on the GPU"):
        report.require_time(120)
        left = 60 * report.args.minutes - (time.monotonic() - report.started)
        # a session of its own: what the tests launch must not outlive them on the GPU
        run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
        try:
            said = run.communicate(timeout=left)[0]
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)
        print(said[-6000:])
        line = (said.strip().splitlines() or ["no output"])[-1]
        report.add("tests on the GPU", line if run.returncode == 0 else f"failed: {line}")


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
    for kind in ("frozen", "trained"):
        with report.row(f"loss, {kind}"):
            report.require_time()
            report.add(f"loss, {kind}", loss_of(kind, report.args))


def loss_of(kind: str, args: argparse.Namespace) -> str:
    config, rows = config_of("7b", args), 64 if args.tiny else 8192
    head = BaichuanHead(config.hidden_size, config.vocab_size, True, args.device, args.dtype)
    torch.nn.init.normal_(head.weight, std=0.02).requires_grad_(kind == "trained")
    hidden = torch.randn(1, rows + 1, config.hidden_size, device=args.device, dtype=args.dtype)
    hidden.requires_grad_()
    labels = torch.randint(0, config.vocab_size, (1, rows + 1), device=args.device)
    before = torch.cuda.memory_allocated() if args.device == "cuda" else 0

    def step():
        head(hidden, labels).backward()
        head.weight.grad = hidden.grad = None

    return f"{1000 * seconds(step, args):.1f} ms{peak(before)} above its inputs"


def decoding(report: Report) -> None:
    for name in ("7b", "13b"):
        for kind, needed in (("eager", 30), ("static", 60), ("nf4", 60), ("int8", 90)):
            with report.row(f"{name} decode {kind}"):
                report.require_time(needed)
                report.add(f"{name} decode {kind}", decoding_of(report, name, kind))


def decoding_of(report: Report, name: str, kind: str) -> str:
    args, quantised = report.args, kind in ("int8", "nf4")
    torch._dynamo.reset()  # else another shape's graphs would be made dynamic
    words = ["--model", "tiny" if args.tiny else name, "--device", args.device, "--contestants", kind]
    options = decode.arguments([*words, "--tokens", "8" if args.tiny else "32" if quantised else "96"])
    options.context = 16 if args.tiny else 512
    decoder = decode.contestants(options)[kind]
    warmup = 2 if kind == "static" and not args.tiny else 1
    turns = contest.interleave({"": decoder}, 2 if quantised else 3, args.device, warmup=warmup)[""]
    rate = statistics.median(turn.result for turn in turns)
    figure = f"{rate:.1f} tok/s"
    if report.copy_bandwidth:
        figure += f", {rate * decoder.bytes_per_token() / report.copy_bandwidth:.0%} of copy bandwidth"
    return f"{figure}, weights {decode.weight_bytes(decoder.model) / GIB:.2f} GiB"


def training(report: Report) -> None:
    from benchmarks.gpu_train import train

    train(report)


SECTIONS = {
    "ceilings": ceilings,
    "attention": attention,
    "loss": loss,
    "train": training,
    "decode": decoding,
    "tests": tests,
}


def main(argv: list[str] | None = None) -> list[list[str]]:
    """Returns the rows of the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, commas between")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=8.8, help="what would end later is left out")
    parser.add_argument("--tiny", action="store_true", help="on the CPU, at sizes for a test")
    args = parser.parse_args(argv)
    if unknown := set(args.only.split(",")) - SECTIONS.keys():
        parser.error(f"no section {', '.join(sorted(unknown))}; known: {', '.join(SECTIONS)}")
    args.device, args.dtype = ("cpu", torch.float32) if args.tiny else ("cuda", torch.bfloat16)
    if not args.tiny and not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py needs a CUDA GPU; --tiny runs the same code on a CPU.")
    report = Report(args)
    for name in args.only.split(","):
        with report.row(name):
            SECTIONS[name](report)
    print(f"\n{contest.machine(args.device)}, {time.monotonic() - report.started:.0f} s\n")
    print(contest.table(["what", "measured", "bar", "aim"], report.rows))
    return report.rows


if __name__ == "__main__":
    sys.exit(any("failed" in figure for _, figure, *_ in main()))
