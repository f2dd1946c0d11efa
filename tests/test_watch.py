"""The side processes among fake ranks: plain processes that live, stop, end well, or end badly."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from fixtures import ROOT
from launching import free_port

from baichuan_sft.errors import PeerFault, UserError
from baichuan_sft.train import rendezvous, status

LIMIT = 4.0  # --peer_timeout of these tests: two beats, so that one may be late

# Does what a rank does, without torch, until its standard input says how to end; a directory is the store.
RANK = """
import os, sys, time
from pathlib import Path
from baichuan_sft.train import peers

class Store:
    folder = Path(os.environ["BAICHUAN_SFT_STATUS"])
    def set(self, name, value):
        self.folder.joinpath("store.tmp").write_text(value)
        self.folder.joinpath("store.tmp").rename(self.folder / ("store-" + name))
    def get(self, name):
        while not self.folder.joinpath("store-" + name).exists():
            time.sleep(0.05)
        return self.folder.joinpath("store-" + name).read_bytes()

peers.start_watch(Store(), {limit})
peers.tell("step " + str(10 + int(os.environ["RANK"])))
print("watched", flush=True)
for line in sys.stdin:
    if line.strip() == "bye":
        peers.goodbye()
        break
    if line.strip() == "fail":
        peers.tell("error KeyError: 'x'")
        os._exit(1)
"""


class Ranks:
    def __init__(self, size, folder, limit=LIMIT):
        self.processes = []
        for rank in range(size):
            env = {**os.environ, "PYTHONPATH": str(ROOT), "RANK": str(rank), "LOCAL_RANK": str(rank)}
            env |= {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(size), "BAICHUAN_SFT_STATUS": str(folder)}
            words = [sys.executable, "-c", RANK.replace("{limit}", str(limit))]
            pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            self.processes.append(subprocess.Popen(words, env=env, text=True, **pipes))
        for process in self.processes:
            while (line := process.stdout.readline()) != "watched\n":
                assert line, process.stderr.read()
        self.sides = [side_of(process.pid) for process in self.processes]
        time.sleep(2.5)  # one beat, so that all know each other's step
        self.since = time.monotonic()

    def say(self, rank, word):
        self.processes[rank].stdin.write(f"{word}\n")
        self.processes[rank].stdin.flush()

    def ends(self, *ranks, within):
        """Exit codes and error output; time counts from the start of the fault."""
        codes = [self.processes[rank].wait(within) for rank in ranks]
        assert time.monotonic() - self.since < within
        return codes, "".join(self.processes[rank].stderr.read() for rank in ranks)

    def fault(self, rank, signum):
        self.since = time.monotonic()
        os.kill(self.processes[rank].pid, signum)


def side_of(pid):
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    assert "watch.py" in Path(f"/proc/{child}/cmdline").read_text()
    return int(child)


def gone(pid):
    """No such process, or one that nobody has reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.fixture
def ranks(tmp_path):
    started = Ranks(3, tmp_path)
    yield started
    for process in started.processes:
        process.kill()
        process.wait()
    until = time.monotonic() + 5
    while not all(map(gone, started.sides)) and time.monotonic() < until:
        time.sleep(0.1)
    assert all(map(gone, started.sides)), "a side process outlived its rank"


def test_a_killed_rank_ends_the_others_with_one_line(ranks, tmp_path):
    ranks.fault(1, signal.SIGKILL)
    codes, errors = ranks.ends(0, 2, within=10)
    assert codes == [5, 5]
    host = os.uname().nodename
    assert errors == f"error (rank 0): host {host}, rank 1: its process is gone, last step 11\n"
    entry = json.loads((tmp_path / "rank-2.json").read_text())
    assert entry["error"]["exit_code"] == 5 and "rank 1: its process is gone" in entry["error"]["message"]


def test_rank_zero_killed_ends_the_others_too(ranks):
    ranks.fault(0, signal.SIGKILL)
    codes, errors = ranks.ends(1, 2, within=10)
    assert codes == [5, 5]
    assert errors.count("error (rank 1): ") == 1 and "rank 0: its process is gone" in errors


def test_a_stranger_on_the_port_is_no_rank(ranks):
    (hub,) = {item.laddr.port for item in psutil.Process(ranks.sides[0]).net_connections() if not item.raddr}
    for said in (b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b'{"rank": 5}\n', b"[" * 9999 + b"\n", b"\xff\n", b""):
        with socket.create_connection(("127.0.0.1", hub)) as stranger:
            stranger.sendall(said)
            stranger.settimeout(5)
            with contextlib.suppress(ConnectionResetError):
                while said and stranger.recv(4096):  # beats, until it is shown the door
                    pass
    ranks.fault(1, signal.SIGKILL)
    codes, errors = ranks.ends(0, 2, within=10)
    assert codes == [5, 5] and "rank 1: its process is gone" in errors


def test_the_reason_of_a_failed_rank_is_told(ranks):
    ranks.since = time.monotonic()
    ranks.say(2, "fail")
    codes, errors = ranks.ends(0, 1, within=10)
    assert codes == [5, 5] and "rank 2: KeyError: 'x'" in errors


def test_an_error_that_was_said_is_not_said_again(ranks):
    """Local rank 0 has said its own, and the others are of its host."""
    ranks.since = time.monotonic()
    ranks.say(0, "fail")
    codes, errors = ranks.ends(1, 2, within=10)
    assert (codes, errors) == ([5, 5], "")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_is_killed_and_the_others_end(ranks, rank):
    others = [other for other in range(3) if other != rank]
    ranks.fault(rank, signal.SIGSTOP)
    codes, errors = ranks.ends(*others, within=30)
    assert codes == [5, 5] and f"rank {rank}: stopped (SIGSTOP) for {LIMIT:g} s" in errors
    assert ranks.processes[rank].wait(10) == -signal.SIGKILL
    assert time.monotonic() - ranks.since > LIMIT


@pytest.mark.slow
def test_a_stopped_host_is_missed(ranks):
    """Rank and side process stopped together look like a host without power."""
    os.kill(ranks.sides[2], signal.SIGSTOP)
    ranks.fault(2, signal.SIGSTOP)
    codes, errors = ranks.ends(0, 1, within=30)
    assert codes == [5, 5] and f"rank 2: no sign of life for {LIMIT:g} s" in errors
    os.kill(ranks.sides[2], signal.SIGCONT)  # back again, it ends its own rank
    assert ranks.processes[2].wait(10) == -signal.SIGKILL


@pytest.mark.slow
def test_all_stopped_together_go_on(ranks):
    everybody = [process.pid for process in ranks.processes]
    for pid in everybody:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(2 * LIMIT)
    for pid in everybody:
        os.kill(pid, signal.SIGCONT)
    time.sleep(LIMIT)
    assert all(process.poll() is None for process in ranks.processes)


@pytest.mark.slow
def test_a_suspended_machine_goes_on(ranks):
    everybody = [*(process.pid for process in ranks.processes), *ranks.sides]
    for pid in everybody:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(2 * LIMIT)
    for pid in everybody:
        os.kill(pid, signal.SIGCONT)
    time.sleep(LIMIT)
    assert all(process.poll() is None for process in ranks.processes)


def test_ending_earlier_than_the_others_is_no_failure(ranks):
    for rank in (0, 1, 2):
        ranks.say(rank, "bye")
        assert ranks.processes[rank].wait(5) == 0
        time.sleep(1)


@pytest.mark.slow
def test_a_missing_rank_is_named(tmp_path):
    """Two of three come: both say who is missing, and who is there."""
    program = "import torch.distributed\nfrom baichuan_sft.train import rendezvous\n"
    program += "print('imported', flush=True)\ninput()\nrendezvous.arrive(2.0)"  # the clock starts together
    env = {**os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1"}
    env["MASTER_PORT"] = str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env={**env, "RANK": rank, "LOCAL_RANK": rank},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    for process in processes:
        assert process.stdout.readline() == "imported\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    host = os.uname().nodename
    for process in processes:
        error = process.communicate(timeout=60)[1]
        assert f"rendezvous: rank 2 is missing after 2 s; there are 0 ({host}), 1 ({host})" in error
        assert "MASTER_ADDR 127.0.0.1 is 127.0.0.1, this machine itself" in error


def test_nobody_listens(monkeypatch):
    for name, value in dict(RANK="1", WORLD_SIZE="2", MASTER_ADDR="localhost").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with pytest.raises(
        PeerFault, match=r"rank 0 is missing after 1 s; from .* nobody is heard at localhost:\d+"
    ):
        rendezvous.arrive(1.0)


def test_the_world_is_what_was_launched(monkeypatch):
    monkeypatch.setenv("BAICHUAN_SFT_WORLD", "2:16")
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(
        UserError, match="WORLD_SIZE is 8, but this run was launched as 2 hosts with 16 processes"
    ):
        rendezvous.check_world()
    monkeypatch.setenv("WORLD_SIZE", "16")
    rendezvous.check_world()


def test_status_is_a_whole_file_with_the_first_error(tmp_path, monkeypatch):
    monkeypatch.setattr(status, "_facts", {"phase": "start", "step": 0, "error": None})
    monkeypatch.setenv("BAICHUAN_SFT_STATUS", str(tmp_path))
    monkeypatch.setenv("RANK", "3")
    status.update(phase="train", step=17)
    try:
        raise KeyError("x")
    except KeyError as error:
        status.fail(error, 1)
    status.fail(PeerFault("what followed"), 5)
    entry = json.loads((tmp_path / "rank-3.json").read_text())
    assert (entry["rank"], entry["phase"], entry["step"]) == (3, "train", 17)
    assert (entry["pid"], entry["host"]) == (os.getpid(), os.uname().nodename)
    assert entry["error"]["kind"] == "KeyError" and entry["error"]["exit_code"] == 1
    assert 'raise KeyError("x")' in entry["error"]["traceback"]
    assert [path.name for path in tmp_path.iterdir()] == ["rank-3.json"]


def test_a_side_process_that_never_comes_is_missed(monkeypatch):
    """Its rank was killed before it began, or a firewall lets only the master's port through."""
    from baichuan_sft.train import watch

    monkeypatch.setattr(watch.os, "write", lambda *_: 0)  # the port, to a rank that is not there
    hub = watch.Watch({"host": "a", "rank": 0, "local_rank": 0, "step": 0}, 20.0, 3, None)
    try:
        assert hub.judge(hub.begun + 20 + watch.JOIN) is None
        facts, what = hub.judge(hub.begun + 21 + watch.JOIN)
        assert facts["rank"] == 1 and "--peer_timeout 0" in what
    finally:
        hub.server.close()
