"""All ranks of a run arrive by name, before anything that takes long; who is missing is named."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import time
from typing import Any

from baichuan_sft.errors import EnvironmentFault, PeerFault, UserError, first_line

CONNECT_SECONDS = 60.0  # for what takes milliseconds where ranks reach each other
CHECK_SECONDS = 2.0
READ_SECONDS = 10.0  # a rank that has arrived has so long to read that others are missing


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_world() -> None:
    """Raise UserError where this rank sees another number of processes than its launcher started."""
    expected = os.environ.get("BAICHUAN_SFT_WORLD")
    if expected and int(expected.partition(":")[2]) != world_size():
        hosts, _, ranks = expected.partition(":")
        raise UserError(
            f"WORLD_SIZE is {world_size()}, but this run was launched as {hosts} hosts with {ranks} "
            "processes (BAICHUAN_SFT_WORLD); start all hosts with one `baichuan-sft launch`."
        )


def arrive(seconds: float) -> Any:
    """Store of this run on rank 0, after every rank has told its name there.

    Raises:
        PeerFault: after ``seconds`` with the ranks that are missing, on all ranks that are not.
    """
    from torch.distributed import PrefixStore, TCPStore

    rank, size = int(os.environ["RANK"]), world_size()
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    until = time.monotonic() + seconds
    # torchrun's agent has one already
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not serves:
        _wait_for_server(address, port, until, seconds)
    limit = datetime.timedelta(seconds=seconds + CONNECT_SECONDS)
    try:
        server = TCPStore(address, port, None, serves, limit, wait_for_workers=False)
    except RuntimeError as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            raise EnvironmentFault(
                f"port {port} is taken on {socket.gethostname()}, by another run? Pass another --master_port."
            ) from None
        raise
    # A group restarted by torchrun's agent finds the keys of the one before in the same store.
    store = PrefixStore(f"baichuan_sft/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", server)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    store.set(f"rank/{rank}", json.dumps([socket.gethostname(), local_rank]))
    store.add("arrived", 1)
    if rank == 0:
        while store.add("arrived", 0) < size and time.monotonic() < until:
            time.sleep(0.1)
        store.set("verdict", _verdict(store, size, seconds, address))
    try:
        while not store.check(["verdict"]):
            if time.monotonic() > until + CONNECT_SECONDS:
                raise PeerFault(f"rendezvous: rank 0 says nothing since {seconds + CONNECT_SECONDS:g} s")
            time.sleep(0.1)
        verdict = json.loads(store.get("verdict"))
        num_read = store.add("read", 1)
    except RuntimeError:  # the store went with rank 0
        raise PeerFault("rendezvous: rank 0 ended before all had come; its own error says why") from None
    if "missing" in verdict:
        end = time.monotonic() + READ_SECONDS  # the others read it from this process
        while serves and num_read < store.add("arrived", 0) and time.monotonic() < end:
            time.sleep(0.1)
            num_read = store.add("read", 0)
        raise PeerFault(verdict["missing"])
    if rank == 0:
        print(verdict["world"], flush=True)
    return store


def wait_for_all(store: Any, name: str) -> None:
    """Until every rank has come here, however long: the watch ends this one where another is lost."""
    store.add(name, 1)
    pause = 0.05
    while store.add(name, 0) < world_size():
        time.sleep(pause)
        pause = min(2 * pause, 1.0)


def _wait_for_server(address: str, port: int, until: float, seconds: float) -> None:
    """Until somebody listens; in steps, so that a signal need not wait for the limit."""
    while True:
        try:
            socket.create_connection((address, port), timeout=CHECK_SECONDS).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise PeerFault(
                    f"rendezvous: rank 0 is missing after {seconds:g} s; from {socket.gethostname()} nobody "
                    f"is heard at {address}:{port} ({first_line(error)}).{_loopback(address)}"
                ) from None
            time.sleep(0.5)


def _verdict(store: Any, size: int, seconds: float, address: str) -> str:
    """What rank 0 tells all: the world line, or who is missing."""
    here = {
        rank: json.loads(store.get(f"rank/{rank}")) for rank in range(size) if store.check([f"rank/{rank}"])
    }
    missing = [rank for rank in range(size) if rank not in here]
    if missing:
        who = f"ranks {', '.join(map(str, missing))} are" if len(missing) > 1 else f"rank {missing[0]} is"
        there = ", ".join(f"{rank} ({host})" for rank, (host, _) in here.items())
        text = f"rendezvous: {who} missing after {seconds:g} s; there are {there}."
        return json.dumps({"missing": text + _loopback(address)})
    hosts = [rank for rank, (_, local_rank) in here.items() if local_rank == 0]
    sizes = [end - begin for begin, end in zip(hosts, [*hosts[1:], size], strict=True)]
    share = f"x {sizes[0]}" if len(set(sizes)) == 1 else f"with {' + '.join(map(str, sizes))}"
    names = ", ".join(here[rank][0] for rank in hosts)
    plural = "s" if len(hosts) > 1 else ""
    return json.dumps({"world": f"world: {len(hosts)} host{plural} {share} = {size} processes ({names})"})


def _loopback(address: str) -> str:
    """A further sentence where the master's name means each machine itself."""
    with contextlib.suppress(OSError):
        ip = socket.gethostbyname(address)
        if ip.startswith("127."):
            return (
                f" On {socket.gethostname()} MASTER_ADDR {address} is {ip}, this machine itself: other hosts "
                "need an address of rank 0's host that all reach; pass it as --master_addr."
            )
    return ""
