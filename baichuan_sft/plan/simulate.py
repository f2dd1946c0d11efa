"""How long an update takes, on one host or on hundreds: arithmetic on stated assumptions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from baichuan_sft.plan.communication import Load, Network, Traffic, traffic
from baichuan_sft.plan.flops import flops_per_token, linear_shapes, num_parameters, recomputed_per_token

# LoRA as `train` has it by default
LORA_TARGETS, LORA_RANK, LORA_DROPOUT = ("W_pack",), 16, 0.05
# torchtune's README, 3B on an A100: 8,035 tokens/s with QLoRA, 8,210 with LoRA.
QUANTIZED_SPEED = 0.98
DDP_BUCKET = 25 * 2**20  # bytes, torch's default
# Adam reads and writes 30 bytes per parameter, at the bandwidth of an A100's memory.
ADAM_BYTES_MOVED, DEVICE_BANDWIDTH = 30.0, 2.0e12
HOST_BANDWIDTH, PCIE = 100e9, 20e9  # bytes/s: DRAM of a host under DeepSpeed's CPU Adam; of each GPU to it
# GPUs of one kind differ: a rank is slower than the mean by a normal share of this deviation, and an update
# ends with the slowest. Sinha et al. 2022 ("Not All GPUs Are Created Equal", SC'22): 8 % between such GPUs.
SPREAD = 0.02
# Llama 3 (arXiv 2407.21783, 3.3.4): 419 unexpected interruptions of 16,384 GPUs in 54 days.
MTBF_GPU_HOURS = 54 * 24 * 16384 / 419
# Assumed: what a host writes to shared storage, and what all together can; a start up to the first update.
WRITE_HOST, WRITE_ALL, RESTART_SECONDS = 2e9, 50e9, 300.0


@dataclass(frozen=True)
class Device:
    """What computes.

    Attributes:
        gib: as its maker says it. tflops: peak in half precision. efficiency: share of it that is reached.
        source: of the efficiency.
    """

    name: str
    gib: float
    tflops: float
    efficiency: float
    source: str


@dataclass(frozen=True)
class Update:
    """Seconds of one update and what they go into; tokens over all ranks; mfu as the log has it."""

    seconds: float
    compute: float
    exposed: float
    optimizer: float
    tokens: float
    mfu: float
    traffic: Traffic


def num_trained(config: Any, method: str) -> int:
    """Trained parameters of ``full``, ``lora`` or ``qlora``."""
    if method == "full":
        return num_parameters(config)
    widths = (sum(linear_shapes(config)[name]) for name in LORA_TARGETS)
    return config.num_hidden_layers * LORA_RANK * sum(widths)


def load_of(config: Any, method: str, recipe: str, bucket: int) -> Load:
    """Bytes of gradients and weights that travel; without DeepSpeed in fp32, in DDP's buckets."""
    each, message = (4, DDP_BUCKET) if recipe == "ddp" else (2, 2 * bucket)
    trained, whole = each * num_trained(config, method), 2.0 * num_parameters(config)
    passed = whole if recipe in ("zero3", "hpz", "offload") else trained
    return Load(trained, trained, whole, math.ceil(passed / message))


def slowest(ranks: int, against: int = 8) -> float:
    """Time of the slowest of so many ranks, as a multiple of that on one host, where efficiency was measured.

    The mean of the largest of n normal numbers, by Blom's approximation.
    """

    def largest(n: int) -> float:
        return NormalDist().inv_cdf((n - 0.375) / (n + 0.25)) if n > 1 else 0.0

    return (1 + SPREAD * largest(ranks)) / (1 + SPREAD * largest(against))


def update(
    config: Any,
    method: str,
    recipe: str,
    device: Device,
    net: Network,
    *,
    tokens: float,
    micro_steps: int,
    level: str,
    span: float,
    bucket: int,
) -> Update:
    """One update of ``micro_steps`` times ``tokens`` on each rank, in messages of ``bucket`` numbers.

    See ``flops_per_token`` for span.
    """
    lora = method != "full"
    trained = num_trained(config, method)
    model = flops_per_token(config, lora=lora, span=span, adapter_parameters=trained if lora else 0)
    again = recomputed_per_token(config, level, span)
    forward = 2 * num_parameters(config) + 2 * config.num_hidden_layers * config.hidden_size * span
    speed = device.tflops * 1e12 * device.efficiency / slowest(net.ranks)
    speed *= QUANTIZED_SPEED if method == "qlora" else 1
    per_step = tokens * (model + again) / speed
    ahead = tokens * forward / speed
    load = load_of(config, method, recipe, bucket)
    moved = traffic(recipe, load, net, micro_steps, ahead, per_step - ahead)
    split = net.ranks if recipe != "ddp" else 1
    optimizer = ADAM_BYTES_MOVED * trained / split / DEVICE_BANDWIDTH
    if recipe == "offload":  # gradients go down, weights come up, in every pass
        over_pcie = (4 * trained + 4 * micro_steps * num_parameters(config)) / net.ranks
        optimizer = ADAM_BYTES_MOVED * trained / net.hosts / HOST_BANDWIDTH + over_pcie / PCIE
    compute = micro_steps * per_step
    seconds = compute + moved.exposed + optimizer
    mfu = micro_steps * tokens * model / (seconds * device.tflops * 1e12)
    return Update(seconds, compute, moved.exposed, optimizer, micro_steps * tokens * net.ranks, mfu, moved)


def checkpoint_bytes(config: Any, method: str, recipe: str) -> float:
    """On disk: weights (or adapters), and what a resumed run needs.

    DeepSpeed keeps fp32 weights and two moments; up to stage 2 also the half-precision weights, beside the
    result's own. Without it, fp32 weights and the moments.
    """
    trained = num_trained(config, method)
    if recipe == "ddp":
        return (4 + 8) * trained
    return (2 + 12 + (2 if recipe in ("zero1", "zero2") else 0)) * trained


@dataclass(frozen=True)
class Goodput:
    """useful: share of the time that training gets on; interval and mtbf: seconds between saves, failures."""

    useful: float
    interval: float
    mtbf: float


def goodput(hosts: int, mtbf_hours: float, save: float, restart: float) -> Goodput:
    """With saves as often as Young says, and failures that come at random, by Daly's expectation.

    Args:
        mtbf_hours: of one host. save, restart: seconds.
    Source: Daly 2006 (Future Generation Computer Systems 22), equations 13 and 20.
    """
    mtbf = mtbf_hours * 3600 / hosts
    interval = math.sqrt(2 * save * mtbf)
    expected = mtbf * math.exp(restart / mtbf) * math.expm1((interval + save) / mtbf)
    return Goodput(interval / expected, interval, mtbf)


def goodput_of(config: Any, method: str, recipe: str, hosts: int, mtbf_hours: float) -> Goodput:
    """Every host writes its part of a checkpoint at once; without DeepSpeed the first rank writes all."""
    rate = WRITE_HOST if recipe == "ddp" else min(hosts * WRITE_HOST, WRITE_ALL)
    save = checkpoint_bytes(config, method, recipe) / rate
    return goodput(hosts, mtbf_hours, save, RESTART_SECONDS + save)
