"""Every way to train on given hosts: what it needs, whether it fits, how fast it is; and the one to take."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baichuan_sft.errors import UserError
from baichuan_sft.plan.communication import Network
from baichuan_sft.plan.flops import layer_parameters, num_parameters
from baichuan_sft.plan.memory import GIB, LEVELS, Memory, Step, estimate, gib, reserve
from baichuan_sft.plan.simulate import (
    LORA_DROPOUT,
    LORA_RANK,
    LORA_TARGETS,
    Device,
    Update,
    checkpoint_bytes,
    num_trained,
    update,
)

METHODS = ("full", "lora", "qlora")
STAGES = {
    "ddp": 0,
    "zero1": 1,
    "zero2": 2,
    "zero3": 3,
    "hpz": 3,
    "offload": 3,
}  # ddp: no DeepSpeed
RECIPES = Path(__file__).parents[2] / "recipes"
GOOD_TOKENS, MICRO_TOKENS = 8192, 16384  # of one micro-step on one device: enough, and at most
BUCKETS = ("reduce_bucket_size", "stage3_prefetch_bucket_size")
TIE = 0.02  # as fast: the simulation is not finer
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # of a weight: 4 bits, a scale per 64 in 8 bits, a scale of these
VISIBLE = 0.98  # of a GPU's size, what a process sees of it: 79.2 of 80 GiB, 139.8 of 141 GB


@dataclass(frozen=True)
class Job:
    """What is asked.

    Attributes:
        mtbf_hours: between failures of one host.
        host_memory, disk: bytes of RAM of a host, and free where the result goes; None: not known.
        keep: checkpoints that stay.
        large_buckets: a layer per message, as `--write` has it; else transformers' "auto", D * D numbers.
    """

    config: Any
    device: Device
    net: Network
    max_length: int
    batch_tokens: float
    half: str
    mtbf_hours: float
    host_memory: float | None = None
    disk: float | None = None
    keep: int = 2
    large_buckets: bool = False

    @property
    def bucket(self) -> int:
        """Numbers of one message."""
        return layer_parameters(self.config) if self.large_buckets else self.config.hidden_size**2

    @property
    def device_bytes(self) -> float:
        total = VISIBLE * self.device.gib * GIB
        return total - reserve(total)


@dataclass(frozen=True)
class Candidate:
    """One way to train.

    Attributes:
        rows: --per_device_train_batch_size. level: of checkpointing.
        host_bytes: RAM of a host while training, load_bytes while loading.
        lacks: what is too small, in words; empty where it fits.
    """

    method: str
    recipe: str
    rows: int
    micro_steps: int
    level: str
    memory: Memory
    host_bytes: float
    load_bytes: float
    disk_bytes: float
    update: Update
    lacks: str

    @property
    def tokens_per_second(self) -> float:
        return self.update.tokens / self.update.seconds


def step_of(job: Job, method: str, recipe: str, tokens: int) -> Step:
    """One packed row of so many tokens, as `train` would have it: bf16, Adam in fp32, varlen attention."""
    parameters, engine = num_parameters(job.config), recipe != "ddp"
    trained, lora = num_trained(job.config, method), method != "full"
    each = 4 if recipe == "ddp" else 2  # of a trained weight
    base = 2.0 * parameters
    if method == "qlora":
        linears = job.config.num_hidden_layers * layer_parameters(job.config)
        base = 2.0 * (parameters - linears) + NF4_BYTES * linears
    return Step(
        rows=1,
        row_tokens=tokens,
        num_trained=trained,
        weight_bytes=base + each * trained if lora else float(each * parameters),
        trained_bytes=each,
        compute_bytes=2,
        stream_bytes=2 if lora else each,
        attention="varlen",
        targets=LORA_TARGETS if lora else (),
        rank=LORA_RANK * lora,
        dropout=LORA_DROPOUT * lora,
        on_gpu=True,
        engine=engine,
        stage=STAGES[recipe],
        world_size=job.net.ranks,
        secondary=min(job.net.gpus, job.net.ranks) if recipe == "hpz" else 0,
        bucket=job.bucket,
        offload_states=recipe == "offload",
        offload_weights=recipe == "offload",
    )


def host_bytes(job: Job, method: str, recipe: str) -> tuple[float, float]:
    """RAM of one host: under offload (fp32 weights, gradients and moments, half weights), and while loading,
    where every process reads the whole model at first (as counted: 2 bytes per parameter of its own in bf16),
    a quantised one layer by layer."""
    trained, parameters = num_trained(job.config, method), num_parameters(job.config)
    training = (16 * trained + 2 * parameters) / job.net.hosts if recipe == "offload" else 0.0
    each = 4.0 if method == "full" and recipe == "ddp" else 2.0
    loaded = 2 * layer_parameters(job.config) if method == "qlora" else each * parameters
    return training, job.net.gpus * loaded


def candidate(job: Job, method: str, recipe: str, rows: int, level: str) -> Candidate:
    tokens = rows * job.max_length
    micro_steps = max(1, math.ceil(job.batch_tokens / (tokens * job.net.ranks)))
    memory = estimate(job.config, step_of(job, method, recipe, tokens), level)
    in_host, loading = host_bytes(job, method, recipe)
    disk = (job.keep + 1) * checkpoint_bytes(job.config, method, recipe)
    disk += 2.0 * num_trained(job.config, method)  # the result; a new checkpoint comes before the oldest goes
    lacks = [
        f"{what} {gib(need)} of {gib(have)}"
        for what, need, have in (
            ("device", memory.total, job.device_bytes),
            ("host", max(in_host, loading), job.host_memory),
            ("disk", disk, job.disk),
        )
        if have is not None and need > have
    ]
    fast = update(
        job.config,
        method,
        recipe,
        job.device,
        job.net,
        tokens=tokens,
        micro_steps=micro_steps,
        level=level,
        span=job.max_length,
        bucket=job.bucket,
    )
    shape = (method, recipe, rows, micro_steps, level, memory)
    return Candidate(*shape, in_host, loading, disk, fast, ", ".join(lacks))


def best_of(job: Job, method: str, recipe: str, *, tie: float = TIE) -> Candidate:
    """Over rows of a micro-batch and levels of checkpointing: the fastest that fits, or the smallest.

    Those within ``tie`` are equally fast. Of them the one that computes least again and then needs least, but
    rather a micro-batch of GOOD_TOKENS than a smaller one, which a device computes less well.
    """
    most = max(1, MICRO_TOKENS // job.max_length)
    wanted = max(1, round(job.batch_tokens / (job.max_length * job.net.ranks)))  # rows of an update on a rank
    sizes = [rows for rows in range(1, min(most, wanted) + 1) if wanted % rows == 0]
    found = [candidate(job, method, recipe, rows, level) for rows in sizes for level in LEVELS]
    fit = [one for one in found if not one.lacks]
    if not fit:
        return min(found, key=lambda one: one.memory.total)
    fastest = max(one.tokens_per_second for one in fit)
    good = [one for one in fit if one.tokens_per_second >= (1 - tie) * fastest]

    def merit(one: Candidate) -> tuple[float, ...]:
        return min(one.rows * job.max_length, GOOD_TOKENS), -LEVELS.index(one.level), -one.memory.total

    return max(good, key=merit)


def possible(job: Job, method: str, recipe: str) -> str:
    """Why a pair cannot be trained at all; empty where it can."""
    if method == "qlora" and STAGES[recipe] == 3:
        return "quantised weights cannot be split"
    if recipe == "hpz" and job.net.hosts == 1:
        return "one host: the same as zero3"
    return ""


def candidates(job: Job) -> Iterator[Candidate]:
    """The best of each method and recipe that is possible."""
    for method in METHODS:
        for recipe in STAGES:
            if not possible(job, method, recipe):
                yield best_of(job, method, recipe)


def choose(found: list[Candidate], method: str | None, *, with_file: bool = False) -> Candidate | None:
    """The one to take: of the method that was asked for, or of the first that fits without offload.

    Of those as fast as the fastest the one that the table has first: fewer parts that can fail.

    Args:
        with_file: only those that have a DeepSpeed file.
    """
    fit = [one for one in found if not one.lacks and method in (None, one.method)]
    fit = [one for one in fit if not (with_file and one.recipe == "ddp")]
    for wanted in METHODS:
        group = [one for one in fit if one.method == wanted and one.recipe != "offload"]
        if group:
            fastest = max(one.tokens_per_second for one in group)
            return next(one for one in group if one.tokens_per_second >= (1 - TIE) * fastest)
    return fit[0] if fit else None


def deepspeed_file(job: Job, recipe: str) -> dict[str, Any]:
    """The recipe with the hosts' GPUs and buckets of a layer; the rest stays "auto", which the flags fill.

    Raises:
        UserError: the recipes are not there (an installation without the checkout).
    """
    try:
        config = json.loads((RECIPES / f"{recipe}.json").read_text())
    except OSError as error:
        raise UserError(f"recipe {recipe}: {error}; run from a checkout of the repository.") from None
    zero = config["zero_optimization"]
    zero |= {name: layer_parameters(job.config) for name in BUCKETS if name in zero}
    if recipe == "hpz":
        zero["zero_hpz_partition_size"] = job.net.gpus
    return config
