"""The process group of a run: made before anything reads it, taken down after success."""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import socket
import time
from collections.abc import Iterator
from typing import Any

from baichuan_sft import machine
from baichuan_sft.errors import EnvironmentFault, PeerFault, first_line
from baichuan_sft.ops_cache import use_ops_cache
from baichuan_sft.train import peers
from baichuan_sft.train.args import Settings
from baichuan_sft.train.rendezvous import CONNECT_SECONDS, arrive, check_world, wait_for_all, world_size
from baichuan_sft.train.zero import deepspeed_config

# What gloo, NCCL and the store say of a rank that is gone.
LOST_PEER = re.compile(
    r"closed by peer|reset by peer|Broken pipe|remote process exited|likely closed", re.IGNORECASE
)
VERDICT_SECONDS = 8.0  # until the watch has said whose end it is, and ended this rank


@contextlib.contextmanager
def joined(settings: Settings) -> Iterator[Any]:
    """All ranks have arrived and watch each other; gives the store for the group, None for one process.

    Raises:
        PeerFault: ranks did not arrive, or one ended; its own error explains more.
    """
    import torch.distributed

    check_world()
    if world_size() == 1 or torch.distributed.is_initialized():  # by a caller who has several runs to do
        yield None
        return
    store = arrive(float(settings.training["rendezvous_timeout"]))
    try:
        peers.start_watch(store, settings.training["peer_timeout"])
        yield store
    except BaseException as error:
        if isinstance(error, RuntimeError) and LOST_PEER.search(str(error)):
            time.sleep(VERDICT_SECONDS if peers.watched() else 0)
            raise PeerFault("another rank ended; its error says why") from None
        if getattr(error, "everywhere", False):
            peers.goodbye()
        else:
            peers.tell_error(error)
        raise
    peers.goodbye()


@contextlib.contextmanager
def processes(settings: Settings, store: Any = None) -> Iterator[None]:
    """The process group of this run, where it has several processes or DeepSpeed, taken down at the end.

    It must exist before TrainingArguments: ZeRO-3 would partition for one process, and the time limit
    of the group would not be ours.
    """
    import torch.distributed

    deepspeed_too = bool(settings.training["deepspeed"])
    if torch.distributed.is_initialized() or not (deepspeed_too or world_size() > 1):
        yield
        return
    on_cpu = settings.training["use_cpu"]
    limit = datetime.timedelta(seconds=settings.training["ddp_timeout"])
    if store is not None:
        wait_for_all(store, "data is read")  # a host without the cache may tokenise for an hour
        form_group(store, "gloo" if on_cpu else "nccl", limit)
    if deepspeed_too:
        for notice in use_ops_cache(compiled_ops(settings.training["deepspeed"])):
            print(notice, flush=True)
        import deepspeed

        if on_cpu:
            # Compiled at every first start, for minutes and in silence; training never calls it.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        for name, value in _one_process().items():
            os.environ.setdefault(name, value)
        deepspeed.init_distributed("gloo" if on_cpu else "nccl", timeout=limit)
    yield
    # Left to the interpreter's exit, gloo's threads end the process with a random exit code. Only after
    # success: NCCL would wait here for ranks that wait for this one.
    torch.distributed.destroy_process_group()


def compiled_ops(config: str) -> list[str]:
    """The DeepSpeed ops that a run compiles where they are not there yet."""
    zero = deepspeed_config(config).get("zero_optimization", {})
    return ["cpu_adam"] if zero.get("offload_optimizer", {}).get("device", "none") != "none" else []


def form_group(store: Any, backend: str, limit: datetime.timedelta) -> None:
    """The default group, tried with a sum that is known.

    Raises:
        EnvironmentFault: ranks reach rank 0, but not each other, or their sum is wrong.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _set_pg_timeout

    rank, size = int(os.environ["RANK"]), world_size()
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    elif socket.gethostbyname(socket.gethostname()).startswith("127."):
        _name_interface()
    short = datetime.timedelta(seconds=CONNECT_SECONDS)
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=short)
        total = torch.tensor([rank + 1.0], device=device)
        dist.all_reduce(total, async_op=True).wait(short)
    except RuntimeError as error:
        if LOST_PEER.search(str(error)):
            raise
        raise EnvironmentFault(
            f"rank {rank} on {socket.gethostname()} reaches rank 0, but the first all-reduce of {size} ranks "
            f"failed: {first_line(error)}. A firewall, or the wrong interface? Set "
            f"{'GLOO' if backend == 'gloo' else 'NCCL'}_SOCKET_IFNAME to the one that joins the hosts."
        ) from None
    if total.item() != size * (size + 1) / 2:
        raise EnvironmentFault(
            f"the first all-reduce gave {total.item():g} instead of {size * (size + 1) / 2:g} on rank {rank}."
        )
    _set_pg_timeout(limit)  # only the start is expected to be fast


def _name_interface() -> None:
    """Have gloo take the interface that leads to rank 0 where this host's name means 127.0.1.1."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])))
        name = machine.interface_of(probe.getsockname()[0])
        if name is not None and name != "lo":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


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
