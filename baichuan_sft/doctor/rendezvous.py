"""One process of a dry run: joins the others as training does, adds numbers whose sum is known, leaves."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

SIZES = {"nccl": 256 << 20, "gloo": 16 << 20}  # bytes of an all-reduce: large enough for the link to fill
ROUNDS = 3


def join(ask: dict[str, Any], say: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Tell each phase; the last answer has the sum's verdict and the bandwidth.

    Args:
        ask: rank, world, address, port, seconds, interface (None: the libraries' choice).
    """
    log = Path(tempfile.mkdtemp()) / "nccl.log"
    os.environ.update({"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,NET", "NCCL_DEBUG_FILE": str(log)})
    if ask["interface"]:
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, ask["interface"])
    import torch
    import torch.distributed as dist

    say({"phase": "import"})
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    try:
        host = f"[{ask['address']}]" if ":" in ask["address"] else ask["address"]  # IPv6, as a URL has it
        world = {"rank": ask["rank"], "world_size": ask["world"]}
        limit = timedelta(seconds=ask["seconds"])
        dist.init_process_group(backend, f"tcp://{host}:{ask['port']}", timeout=limit, **world)
        say({"phase": "joined"})
        device = torch.device("cuda", 0) if backend == "nccl" else torch.device("cpu")
        wrong = check_sum(torch, dist, device, ask)
        say({"phase": "summed"})
        speed = bandwidth(torch, dist, device, backend) if ask["world"] > 1 else None
        dist.barrier()
        dist.destroy_process_group()
        found = {"backend": backend, "wrong": wrong, "transport": transport(log, backend)}
        return {"phase": "done", "bytes_per_second": speed, **found}
    finally:
        log.unlink(missing_ok=True)
        log.parent.rmdir()


def check_sum(torch: Any, dist: Any, device: Any, ask: dict[str, Any]) -> str:
    """Every rank gives rank + 1 in a million places: what is not n (n + 1) / 2 was damaged on the way."""
    n = ask["world"]
    numbers = torch.full((1 << 20,), ask["rank"] + 1, dtype=torch.int32, device=device)
    dist.all_reduce(numbers)
    wrong = int((numbers != n * (n + 1) // 2).sum())
    return f"{wrong:,} of {len(numbers):,} sums are wrong" if wrong else ""


def bandwidth(torch: Any, dist: Any, device: Any, backend: str) -> float:
    """Bytes/s on a host's link in the fastest of a few all-reduces, which send 2 (n - 1) / n of a payload."""
    payload = torch.zeros(SIZES[backend] // 4, device=device)
    times = []
    for _ in range(ROUNDS + 1):  # the first one opens the connections
        dist.barrier()
        start = time.monotonic()
        dist.all_reduce(payload)
        if backend == "nccl":
            torch.cuda.synchronize()
        times.append(time.monotonic() - start)
    n = dist.get_world_size()
    return 2 * (n - 1) / n * SIZES[backend] / min(times[1:])


def transport(log: Path, backend: str) -> str:
    """What NCCL sends over between hosts, by its own log: ``IB`` or ``Socket``."""
    if backend != "nccl" or not log.exists():
        return "Socket"
    text = log.read_text(errors="replace")
    return "IB" if "NET/IB : Using" in text or "via NET/IB" in text else "Socket"
