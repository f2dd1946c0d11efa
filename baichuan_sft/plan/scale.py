"""64 to 4,096 GPUs: what each way to split would reach; a simulation, nothing here was measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from baichuan_sft.plan.choose import TIE, Job, best_of
from baichuan_sft.plan.simulate import goodput_of

SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
SPLITS = [("full", recipe) for recipe in ("ddp", "zero1", "zero2", "zero3", "hpz")] + [("lora", "ddp")]
WEAK_TOKENS = 16384  # of each GPU in an update, where the batch grows with the GPUs


def rows_of(job: Job) -> Iterator[dict[str, Any]]:
    """One row per number of GPUs, batch (``weak`` grows with the GPUs, ``fixed`` is the job's) and split.

    tokens_per_second: of one GPU; useful: share of the time that failures leave; wins: as many useful tokens
    as the best of its method has, of those that fit. A fixed batch fits where it has a row for each GPU.
    """
    for size in SIZES:
        if size % job.net.gpus:
            continue
        net = replace(job.net, hosts=size // job.net.gpus)
        for batch, tokens in (("weak", float(size * WEAK_TOKENS)), ("fixed", job.batch_tokens)):
            here = replace(job, net=net, batch_tokens=tokens, large_buckets=True)
            rows = [_row(here, method, recipe) for method, recipe in SPLITS]
            for row in rows:
                same = [other for other in rows if other["method"] == row["method"] and other["fits"]]
                best = max((other["useful_tokens_per_second"] for other in same), default=0.0)
                row["wins"] = row["fits"] and row["useful_tokens_per_second"] >= (1 - TIE) * best
                yield {"gpus": size, "batch": batch} | row


def _row(job: Job, method: str, recipe: str) -> dict[str, Any]:
    best = best_of(job, method, recipe, tie=0.0)
    good = goodput_of(job.config, method, recipe, job.net.hosts, job.mtbf_hours)
    each = best.tokens_per_second / job.net.ranks
    return {
        "method": method,
        "recipe": recipe,
        "fits": not best.lacks and best.update.tokens < 1.5 * job.batch_tokens,
        "rows": best.rows,
        "micro_steps": best.micro_steps,
        "checkpointing": best.level,
        "tokens_per_update": best.update.tokens,
        "tokens_per_second": each,
        "mfu": best.update.mfu,
        "exposed": best.update.exposed / best.update.seconds,
        "useful": good.useful,
        "save_every_seconds": good.interval,
        "useful_tokens_per_second": each * good.useful,
    }
