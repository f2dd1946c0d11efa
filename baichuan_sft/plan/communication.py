"""Bytes that an update moves between processes, and the time they take that no computing hides.

Payload, an operation's larger side: G gradients and T weights of the trained parameters, A all weights,
k micro-steps of an update; counted by benchmarks/comm.py for the first four:

    ddp, zero1   reduce-scatter G once, all-gather T after the step (ddp: all-reduce, as much)
    zero2        reduce-scatter G in every micro-step, all-gather T
    zero3        every micro-step: all-gather A in forward and in backward, reduce-scatter G
    hpz          as zero3, but only the first gather of an update crosses hosts (DeepSpeed 0.19 keeps a copy
                 split within each host until the weights change)
    offload      as zero3

A ring over n ranks sends payload * (n - 1) / n from each rank, and as much out of each host, however many
ranks that has: its ring enters and leaves a host once. So it costs the slower of the two links, and a
latency per step: those of NCCL's own tables (NVIDIA/nccl, src/graph/tuning.cc, ring, protocol Simple).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

LATENCY_BASE, LATENCY_INTRA, LATENCY_INTER = 8.4e-6, 3.4e-6, 9.6e-6  # seconds
GATHERED_BYTES = 1e9  # of weights at a time after the step, DeepSpeed's default of 5e8 numbers
INTRA, INTER = 370e9, 45e9  # bytes/s: a GPU on NVLink (H100), a host with one 400 Gb/s port at 90 %


@dataclass(frozen=True)
class Network:
    """Hosts of the same number of GPUs.

    Attributes:
        intra: bytes/s that one GPU sends to another of its host.
        inter: bytes/s that one host sends, over all its ports together.
    """

    gpus: int
    hosts: int
    intra: float = INTRA
    inter: float = INTER

    @property
    def ranks(self) -> int:
        return self.gpus * self.hosts

    def within_host(self) -> Network:
        return replace(self, hosts=1)

    def sent(self, payload: float) -> float:
        """Bytes that each rank sends in a ring's reduce-scatter or all-gather of ``payload``."""
        return payload * (self.ranks - 1) / self.ranks

    def seconds(self, payload: float, messages: int = 1) -> float:
        """A reduce-scatter or an all-gather of ``payload`` bytes in so many messages."""
        if self.ranks == 1:
            return 0.0
        slowest = min(self.intra if self.gpus > 1 else math.inf, self.inter if self.hosts > 1 else math.inf)
        crossing = self.hosts - 1
        steps = (self.ranks - 1 - crossing) * LATENCY_INTRA + crossing * LATENCY_INTER
        return self.sent(payload) / slowest + messages * (LATENCY_BASE + steps)

    def all_reduce_seconds(self, payload: float, messages: int = 1) -> float:
        """The faster of a ring and a tree, as NCCL picks; a tree's latency grows by the logarithm only."""
        if self.ranks == 1:
            return 0.0
        slowest = min(self.intra if self.gpus > 1 else math.inf, self.inter if self.hosts > 1 else math.inf)
        depth = (self.gpus - 1) * LATENCY_INTRA + math.log2(self.hosts) * LATENCY_INTER
        tree = 2 * payload / (0.9 * slowest) + messages * (LATENCY_BASE + 2 * depth)
        return min(tree, 2 * self.seconds(payload, messages))


class Load(NamedTuple):
    """What travels, in bytes: G, T and A; messages: of one pass over them."""

    gradients: float
    weights: float
    all_weights: float
    messages: int


@dataclass(frozen=True)
class Traffic:
    """Of one update: bytes that a rank sends, those of them that cross hosts at some link, seconds in all
    and seconds that no computing hides."""

    sent: float
    crossing: float
    seconds: float
    exposed: float


def traffic(
    recipe: str, load: Load, net: Network, micro_steps: int, forward: float, backward: float
) -> Traffic:
    """One update under a recipe.

    Args:
        forward, backward: seconds of computing of one micro-step, which hide what runs beside them.
    """
    k, m = micro_steps, load.messages
    near = net.within_host()
    sent = crossing = total = open_ = 0.0

    def add(payload: float, seconds: float, beside: float, times: int, network: Network = net) -> None:
        """``beside``: seconds that may hide it; the first message has nothing to hide behind."""
        nonlocal sent, crossing, total, open_
        sent += times * network.sent(payload)
        crossing += times * network.sent(payload) * (network.hosts > 1)
        total += times * seconds
        open_ += times * (min(seconds, seconds / m + max(0.0, seconds * (1 - 1 / m) - beside)))

    g, t = load.gradients, load.weights
    if recipe == "ddp":
        add(2 * g, net.all_reduce_seconds(g, m), backward, 1)
    elif recipe in ("zero1", "zero2"):  # recipes/zero1.json does not overlap
        add(g, net.seconds(g, m), *((backward, k) if recipe == "zero2" else (0.0, 1)))
        add(t, net.seconds(t, 1 + int(t / GATHERED_BYTES)), 0.0, 1)
    else:
        first = net.seconds(load.all_weights, m)
        again, away = (near.seconds(load.all_weights, m), near) if recipe == "hpz" else (first, net)
        scatter = net.seconds(g, m)
        add(load.all_weights, first, forward, 1)
        add(load.all_weights, again, forward, k - 1, away)
        # gathers and reductions of backward share the links
        share = again / (again + scatter) if again + scatter else 0.0
        add(load.all_weights, again, backward * share, k, away)
        add(g, scatter, backward * (1 - share), k)
    return Traffic(sent, crossing, total, open_)
