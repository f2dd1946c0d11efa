"""`baichuan-sft plan`: what a run needs and how long it takes, before there is a GPU; the command to run."""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from baichuan_sft.arguments import Parser, at_least_1, number
from baichuan_sft.errors import UserError, first_line, pick
from baichuan_sft.plan import show
from baichuan_sft.plan.choose import METHODS, Candidate, Job, candidates, choose, deepspeed_file
from baichuan_sft.plan.communication import INTER, Network
from baichuan_sft.plan.flops import BY_SIZE, DEVICES, EFFICIENCY, peak_tflops, shape_of
from baichuan_sft.plan.memory import GIB
from baichuan_sft.plan.scale import SIZES, rows_of
from baichuan_sft.plan.simulate import MTBF_GPU_HOURS, Device, Goodput, checkpoint_bytes, goodput_of
from baichuan_sft.variants import VARIANTS

EXAMPLE = """baichuan-sft plan --model baichuan2-13b --gpus 8x80 --hosts 4
  baichuan-sft plan --model Baichuan2-7B-Base --gpus 8xA100 --data_path train.jsonl --write ds.json
  baichuan-sft plan --model baichuan2-7b --gpus 8xH100 --bandwidth_inter 360 --scale"""
BATCH, SCALE_BATCH = 131072, 4194304  # tokens of an update
SAMPLE = 2000  # records of a data file that are tokenised
positive = number(float, "a number above 0", lambda n: n > 0)


def build_parser() -> Parser:
    parser = Parser(
        prog="baichuan-sft plan",
        description="Estimates memory, time, traffic and disk of a run, and picks settings. Needs no GPU.",
        example=EXAMPLE,
    )
    add = parser.add_argument
    add("--model", required=True, help="a directory with config.json, or baichuan2-13b and the like")
    add("--gpus", required=True, metavar="8x80", help="GPUs of a host x GB, or x name: 8xH100, 8xA100-40")
    add("--hosts", type=at_least_1, default=1)
    add("--method", choices=METHODS, help="default: full where it fits, else lora, else qlora")
    add("--tokens", type=positive, help="of an epoch, as they are trained on")
    add("--data_path", metavar="FILE", help="tokens of an epoch, estimated from this file")
    add("--epochs", type=positive, default=1.0, help="default 1")
    add("--model_max_length", type=at_least_1, default=4096, help="tokens of a conversation; default 4096")
    add(
        "--global_batch_tokens",
        type=positive,
        help=f"of an update; default {BATCH}, {SCALE_BATCH} at --scale",
    )
    add("--save_total_limit", type=at_least_1, default=2, help="checkpoints that stay; default 2")
    add("--bandwidth_inter", type=positive, metavar="GB/s", help="of a host, all its ports; default 45")
    add("--bandwidth_intra", type=positive, metavar="GB/s", help="of a GPU in its host; default its kind's")
    add("--host_memory", type=positive, metavar="GiB", help="RAM of a host")
    add("--disk", type=positive, metavar="GB", help="free where the result goes")
    add("--mtbf_hours", type=positive, help="between failures of one host; default Llama 3's, by its GPUs")
    add("--peak_tflops", type=positive, help="of one GPU in half precision; default by its name")
    add("--scale", action="store_true", help=f"{SIZES[0]} to {SIZES[-1]} GPUs instead: which split wins")
    add("--write", metavar="FILE", help="write the DeepSpeed file of what is picked")
    add("--json", action="store_true", help="print everything as JSON, in bytes and seconds")
    return parser


NOT_OF_SCALE = "hosts method tokens data_path epochs save_total_limit host_memory disk write".split()


def main(argv: list[str] | None = None) -> int:
    """Print the plan.

    Returns:
        0; 3 where nothing fits.
    Raises:
        UserError: wrong options, an unknown model or device.
    """
    parser = build_parser()
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if args.tokens and args.data_path:
        raise UserError("--tokens and --data_path are both given; keep one.")
    if args.epochs != 1 and not (args.tokens or args.data_path):
        raise UserError("--epochs needs --tokens or --data_path: how long is one?")
    for name in NOT_OF_SCALE:
        if args.scale and getattr(args, name) != parser.get_default(name):
            raise UserError(f"--{name} says nothing with --scale; leave one of them out.")
    job = job_of(args)
    if args.scale:
        rows = list(rows_of(job))
        print(json.dumps(rows, indent=1)) if args.json else show.scale(job, rows)
        return 0
    found = list(candidates(job))
    picked = choose(found, args.method, with_file=bool(args.write))
    plan = None if picked is None else plan_of(job, picked, args)
    if args.write and picked:
        try:
            Path(args.write).write_text(json.dumps(deepspeed_file(job, picked.recipe), indent=2) + "\n")
        except OSError as error:
            raise UserError(f"--write {args.write}: {error.strerror}.") from None
    if args.json:
        whole = {"ways": [asdict(one) for one in found], "plan": plan and asdict(plan)}
        print(json.dumps(whole, indent=1))
    else:
        show.plan(job, found, plan, args)
    return 0 if plan else 3


def job_of(args: argparse.Namespace) -> Job:
    """
    Raises:
        UserError: an unknown model, a device that nobody knows.
    """
    found = re.fullmatch(r"([1-9]\d*)x(?:([A-Za-z]+\d+[A-Za-z]*|4090)(?:-(\d+))?|(\d+))", args.gpus)
    if not found:
        raise UserError(f"--gpus {args.gpus}: expected 8x80 (GB each), 8xH100 or 8xA100-40.")
    name = found[2] or BY_SIZE.get(int(found[4]), f"{found[4]} GB")
    if name not in DEVICES and not (found[4] and args.peak_tflops):
        name = name.upper() if found[2] else name
        why = f"no device of {name} is known here; add --peak_tflops"
        if found[4]:
            raise UserError(f"--gpus {args.gpus}: {why}.")
        pick("device", name, DEVICES)
    size, intra = DEVICES.get(name, (0, 12))
    peak = args.peak_tflops or peak_tflops(name) or 0.0
    gigabytes = float(found[3] or found[4] or size)
    inter = args.bandwidth_inter * 1e9 if args.bandwidth_inter else INTER
    gpus = int(found[1])
    return Job(
        config=shape_of(args.model),
        device=Device(name, gigabytes, peak, *EFFICIENCY.get(name, EFFICIENCY[""])),
        net=Network(gpus, args.hosts, (args.bandwidth_intra or intra) * 1e9, inter),
        max_length=args.model_max_length,
        batch_tokens=args.global_batch_tokens or (SCALE_BATCH if args.scale else BATCH),
        half="fp16" if name == "V100" else "bf16",
        mtbf_hours=args.mtbf_hours or MTBF_GPU_HOURS / gpus,
        host_memory=args.host_memory and args.host_memory * GIB,
        disk=args.disk and args.disk * 1e9,
        keep=args.save_total_limit,
        large_buckets=bool(args.write),
    )


@dataclass(frozen=True)
class Plan:
    """What is picked and what follows; tokens, updates, seconds: of all epochs, 0 where not known."""

    picked: Candidate
    checkpoint: float
    good: Goodput
    tokens: float
    updates: int
    seconds: float
    command: list[str]


def plan_of(job: Job, picked: Candidate, args: argparse.Namespace) -> Plan:
    good = goodput_of(job.config, picked.method, picked.recipe, job.net.hosts, job.mtbf_hours)
    tokens = (
        args.tokens or (count_tokens(args.data_path, args.model) if args.data_path else 0)
    ) * args.epochs
    updates = max(1, round(tokens / picked.update.tokens)) if tokens else 0
    seconds = updates * picked.update.seconds / good.useful
    save_steps = max(1, round(good.interval / picked.update.seconds))
    too_long = seconds / args.epochs > good.interval  # an epoch, the default between saves
    words = command_of(job, picked, args) + (
        ["--save_strategy", "steps", "--save_steps", str(save_steps)] if too_long else []
    )
    size = checkpoint_bytes(job.config, picked.method, picked.recipe)
    return Plan(picked, size, good, tokens, updates, seconds, words)


def command_of(job: Job, picked: Candidate, args: argparse.Namespace) -> list[str]:
    """The words that start the run."""
    many = ["--hostfile", "hostfile"] if job.net.hosts > 1 else ["--num_processes", str(job.net.gpus)]
    launch = ["launch", *many, "train"] if job.net.ranks > 1 else ["train"]
    named = VARIANTS.get(args.model.lower()) if not Path(args.model).is_dir() else None
    flags: dict[str, Any] = {
        "model_name_or_path": Path(named.source).name if named else args.model,
        "data_path": args.data_path or "train.jsonl",
        "output_dir": "out",
        "num_train_epochs": f"{args.epochs:g}",
        "model_max_length": args.model_max_length,
        "per_device_train_batch_size": picked.rows,
        "gradient_accumulation_steps": picked.micro_steps,
        "checkpointing": picked.level,
        job.half: True,
        "save_total_limit": args.save_total_limit,
    }
    flags |= {"use_lora": True} if picked.method != "full" else {}
    flags |= {"quantize": "nf4"} if picked.method == "qlora" else {}
    flags |= {"deepspeed": args.write or picked.recipe} if picked.recipe != "ddp" else {}
    return ["baichuan-sft", *launch, *(word for name in flags for word in (f"--{name}", str(flags[name])))]


def count_tokens(path: str, model: str) -> float:
    """About how many tokens a data file has: its characters, times what its first records take in tokens.

    Markers of turns, and what is cut off, are not counted. Where no tokenizer.model lies in ``model``, 0.6
    tokens per character, about what Baichuan2's vocabulary takes for Chinese.
    """
    from baichuan_sft.data.reader import decode, read_raw
    from baichuan_sft.data.sources import parse_sources

    def text_of(value: Any) -> str:
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return value if isinstance(value, str) else "".join(map(text_of, parts))

    encode, vocabulary = None, Path(model) / "tokenizer.model"
    if vocabulary.is_file():
        from sentencepiece import SentencePieceProcessor

        encode = SentencePieceProcessor(model_file=str(vocabulary)).encode
    sizes, sampled, tokens = 0, 0, 0
    for source in parse_sources(path):
        for raw in read_raw(source.path, _refuse):
            try:
                text = text_of(decode(raw.data) if isinstance(raw.data, bytes) else raw.data)
            except Exception as error:  # whatever is wrong, `data check` names it
                raise UserError(
                    f"{source.path}: {first_line(error)}; see `baichuan-sft data check`."
                ) from None
            if encode and raw.item < SAMPLE:
                sampled, tokens = sampled + len(text), tokens + len(encode(text))
            sizes += len(text)
    if not sizes:
        raise UserError(f"--data_path {path}: no text in it.")
    return sizes * (tokens / sampled if sampled else 0.6)


def _refuse(finding: Any, raw: bytes | None) -> None:
    """A file that cannot be read."""
    if finding.severity == "ERROR":
        raise UserError(f"{finding.path}: {finding.text}; see `baichuan-sft data check`.")
