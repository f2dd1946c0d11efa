"""What `baichuan-sft plan` prints."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from baichuan_sft.plan.choose import TIE, Candidate, Job, best_of
from baichuan_sft.plan.flops import num_parameters
from baichuan_sft.plan.memory import gib

WIDTH = 118  # columns of the widest table; a narrow terminal folds its lines, and shows all
WAYS = """*|
way|fits|GPU
GiB|host
GiB|rows x
steps|check-
pointing|s per
update|sent
GB|takes
s|not
hidden|tokens/s|MFU|disk
GB"""


def console() -> Console:
    made = Console(markup=False, highlight=False, emoji=False)
    made.width = max(WIDTH, made.width if made.is_terminal else 0)
    return made


def duration(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.3g} s"


def gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.0f}" if num_bytes >= 1e10 else f"{num_bytes / 1e9:.1g}"


def table(*columns: str, words: tuple[int, ...] = (0,)) -> Table:
    """Numbers to the right, the columns ``words`` to the left."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for i, name in enumerate(columns):
        made.add_column(name, justify="left" if i in words else "right", no_wrap=True, vertical="bottom")
    return made


def heading(job: Job) -> str:
    net, device = job.net, job.device
    hosts = f"{net.hosts} host{'s' * (net.hosts > 1)} x {net.gpus} = {net.ranks} GPU{'s' * (net.ranks > 1)}"
    return (
        f"{num_parameters(job.config) / 1e9:.2f} B parameters on {hosts} of {device.gib:g} GB, taken for "
        f"{device.name}: {gib(job.device_bytes)} GiB of each are usable\n"
        f"packed conversations of up to {job.max_length:,} tokens, about {job.batch_tokens:,.0f} per update"
    )


def plan(job: Job, found: list[Candidate], made: Any, args: argparse.Namespace) -> None:
    """The table of ways, what is picked and why, and the command; ``made`` is None where nothing fits."""
    out = console()
    out.print(Text(f"{args.model}: {heading(job)}", "bold"))
    out.print(ways(found, made and made.picked))
    if made is None:
        out.print(Text("Nothing fits: more hosts, larger GPUs, or a shorter --model_max_length.", "red"))
        return
    memory = made.picked.memory
    parts = table("GiB", "weights", "gradients", "optimizer", "activations", "logits, working", "all")
    numbers = [memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.working]
    for name, count in (("one GPU", 1), ("one host's GPUs", job.net.gpus)):
        parts.add_row(name, *(gib(count * number) for number in [*numbers, memory.total]))
    out.print(parts)
    for title, lines in (
        ("Run time", facts(job, made)),
        ("Picked", [f"{what:34} {why}" for what, why in reasons(job, found, made, args)]),
        ("Assumed", assumptions(job)),
        ("Run", [*hostfile(job), folded(made.command)]),
    ):
        out.print(Text(title, "bold"))
        for line in lines:
            out.print(f"  {line}", soft_wrap=True)
        out.print()


def ways(found: list[Candidate], picked: Candidate | None) -> Table:
    """All methods by all recipes; a star before the one that is picked."""
    made = table(*WAYS.removeprefix("*").split("|"), words=(0, 1, 2, 6))
    for i, one in enumerate(found):
        fast, moved = one.update, one.update.traffic
        made.add_row(
            "*" if one is picked else "",
            f"{one.method} {one.recipe}",
            f"{one.lacks.split(' ')[0]} full" if one.lacks else "yes",
            gib(one.memory.total),
            gib(max(one.host_bytes, one.load_bytes)),
            f"{one.rows} x {one.micro_steps}",
            one.level,
            f"{fast.seconds:.2f}",
            gb(moved.sent),
            f"{moved.seconds:.2f}",
            f"{moved.exposed / moved.seconds:.0%}" if moved.seconds else "-",
            f"{one.tokens_per_second:,.0f}",
            f"{fast.mfu:.0%}",
            gb(one.disk_bytes),
            style="bold" if one is picked else "dim" if one.lacks else "",
            end_section=one.method != found[min(i + 1, len(found) - 1)].method,
        )
    return made


def facts(job: Job, made: Any) -> Iterator[str]:
    one, good, net = made.picked, made.good, job.net
    moved = one.update.traffic
    if net.ranks > 1:
        yield (
            f"traffic     {gb(moved.sent)} GB sent by each GPU per update, {gb(moved.crossing)} GB"
            f" out of a host, at {net.intra / 1e9:g} and {net.inter / 1e9:g} GB/s: {moved.seconds:.2f} s, "
            f"of which {moved.exposed:.2f} s are not hidden"
        )
    training = f", {gib(one.host_bytes)} GiB while training" if one.host_bytes else ""
    yield f"host RAM    {gib(one.load_bytes)} GiB while {net.gpus} processes load{training}"
    yield (
        f"checkpoint  {gb(made.checkpoint)} GB; with {job.keep} that stay, one being written and the result "
        f"{gb(one.disk_bytes)} GB of disk"
    )
    yield (
        f"failures    one in {duration(good.mtbf)}; a save every {duration(good.interval)} loses least: "
        f"{good.useful:.1%} of the time is useful"
    )
    time = (
        f"{made.updates:,} updates for {made.tokens:,.0f} tokens: {duration(made.seconds)}, failures included"
    )
    yield f"time        {time if made.tokens else 'of an epoch: pass its --tokens, or --data_path'}"


def reasons(
    job: Job, found: list[Candidate], made: Any, args: argparse.Namespace
) -> Iterator[tuple[str, str]]:
    """What is picked, and one line why."""
    one = made.picked
    others = [other for other in found if other.method == one.method and other is not one]
    speed = one.tokens_per_second
    why = [
        f"{other.recipe} {other.tokens_per_second / speed - 1:+.0%}" for other in others if not other.lacks
    ]
    why = [f"tokens/s of others: {', '.join(why)}"] * bool(why)
    why += [f"{other.recipe}: {other.lacks} GiB" for other in others if other.lacks]
    whole = best_of(replace(job, large_buckets=True), one.method, one.recipe)
    if whole.tokens_per_second > (1 + TIE) * speed:
        why.append(f"--write FILE, with buckets of a layer: {whole.tokens_per_second / speed - 1:+.0%}")
    levels = {"none": "the fastest, and it fits", "selective": "little is computed again"}
    more = " (a row each is the least)" if one.update.tokens > 1.5 * job.batch_tokens else ""
    yield (
        one.method,
        "asked for" if args.method else "the first of full, lora, qlora that fits without offload",
    )
    yield f"--{job.half} True", "half the bytes of fp32" + "; no bf16 on it" * (job.half == "fp16")
    yield f"--deepspeed {args.write or one.recipe}" if one.recipe != "ddp" else "no DeepSpeed", "; ".join(why)
    yield (
        f"--per_device_train_batch_size {one.rows}",
        f"one packed row of {one.rows * job.max_length:,} tokens",
    )
    yield (
        f"--gradient_accumulation_steps {one.micro_steps}",
        f"{one.update.tokens:,.0f} tokens per update{more}",
    )
    yield f"--checkpointing {one.level}", levels.get(one.level, "nothing faster fits")


def assumptions(job: Job) -> Iterator[str]:
    device = job.device
    share, peak = f"{device.efficiency:.0%}", f"{device.tflops:g} TFLOP/s"
    yield f"{share} of {peak} where communication is hidden ({device.source})"
    yield "LoRA of rank 16 on W_pack; AdamW in fp32; every token a target that sees a full row"
    yield "time: within a fifth of published runs (docs/scale.md); memory: as counted on small models"


def hostfile(job: Job) -> Iterator[str]:
    if job.net.hosts > 1:
        yield f"hostfile: {job.net.hosts} lines like `worker-1 slots={job.net.gpus}`, see hostfile.example"


def folded(words: list[str]) -> str:
    """A command line, a flag and its value together, no longer than a terminal is wide."""
    lines = [""]
    for piece in " ".join(map(shlex.quote, words)).replace(" --", "\n--").split("\n"):
        if len(lines[-1]) + len(piece) > 100:
            lines.append("")
        lines[-1] += f" {piece}" if lines[-1] else piece
    return " \\\n      ".join(lines)


def scale(job: Job, rows: list[dict[str, Any]]) -> None:
    """Useful tokens per second and GPU, failures included, by GPUs and split."""
    out = console()
    out.print(Text("A simulation: nothing here was measured. docs/scale.md says what is assumed.", "bold"))
    out.print(
        f"{num_parameters(job.config) / 1e9:.2f} B parameters, hosts of {job.net.gpus} x {job.device.name}, "
        f"{job.net.inter / 1e9:g} GB/s between hosts, a failure of a host every {job.mtbf_hours:,.0f} h"
    )
    titles = {"weak": "16,384 tokens of each GPU", "fixed": f"{job.batch_tokens:,.0f} tokens of all GPUs"}
    for batch, title in titles.items():
        chosen = [row for row in rows if row["batch"] == batch]
        splits = list(dict.fromkeys((row["method"], row["recipe"]) for row in chosen))
        made = table("GPUs", *map(" ".join, splits), "time useful", "full: wins", words=(0, len(splits) + 2))
        for size in dict.fromkeys(row["gpus"] for row in chosen):
            line = [row for row in chosen if row["gpus"] == size]
            cells = [f"{row['useful_tokens_per_second']:,.0f}" if row["fits"] else "-" for row in line]
            wins = [row["recipe"] for row in line if row["wins"] and row["method"] == "full"]
            useful = f"{min(row['useful'] for row in line):.1%}"
            made.add_row(f"{size:,}", *cells, useful, ", ".join(wins) or "-")
        out.print(Text(f"\nuseful tokens per second and GPU, {title} in an update; - does not fit", "bold"))
        out.print(made)
