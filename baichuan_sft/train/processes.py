"""The process group of a run: made before anything reads it, taken down after success."""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
from collections.abc import Iterator

from baichuan_sft.train.args import Settings


@contextlib.contextmanager
def processes(settings: Settings) -> Iterator[None]:
    """The process group of this run, where a launcher or DeepSpeed asks for one, taken down at the end.

    It must exist before TrainingArguments: ZeRO-3 would partition for one process, and the time limit
    of the group would not be ours.
    """
    import torch.distributed

    if not settings.training["deepspeed"] or torch.distributed.is_initialized():
        yield
        return
    import deepspeed

    on_cpu = settings.training["use_cpu"]
    if on_cpu:
        # Compiled at every first start, for minutes and in silence; training never calls it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for name, value in _one_process().items():
        os.environ.setdefault(name, value)
    seconds = settings.training["ddp_timeout"]
    deepspeed.init_distributed("gloo" if on_cpu else "nccl", timeout=datetime.timedelta(seconds=seconds))
    yield
    # Left to the interpreter's exit, gloo's threads end the process with a random exit code. Only after
    # success: NCCL would wait here for ranks that wait for this one.
    torch.distributed.destroy_process_group()


def _one_process() -> dict[str, str]:
    """What a launcher would have set for a run of one process."""
    if "RANK" in os.environ:
        return {}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


@contextlib.contextmanager
def outside_zero3() -> Iterator[None]:
    """Load a model as if DeepSpeed were not active: one rank alone may not partition weights."""
    from transformers.integrations import deepspeed as integration

    active = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = active
