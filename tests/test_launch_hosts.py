"""`baichuan-sft launch` over real hosts: each fault ends all of them within its limit, and is named."""

import contextlib
import re
import signal
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
from fixtures import ROOT
from hosts import hosts, needs_hosts, wait_for
from test_launch import WORKER

pytestmark = [needs_hosts, pytest.mark.slow]

KILLED, SILENT = 10, 30  # seconds; the limits for a host that is killed, and one that is frozen or cut
OURS = r"worker\.py|launch\.agent"


class Run:
    """One launch on h1 of the cluster, and what came of it."""

    def __init__(self, cluster, directory):
        self.cluster, self.directory = cluster, directory
        self.worker = directory / "worker.py"
        self.worker.write_text(WORKER)
        self.hostfile = cluster.hostfile(directory / "hostfile")

    def words(self, *flags):
        launch = [sys.executable, "-m", "baichuan_sft.cli", "launch", "--hostfile", self.hostfile]
        return [*launch, "--log_dir", self.directory / "logs", *flags]

    def whole(self, *flags):
        done = self.cluster.run(1, self.words(*flags), cwd=ROOT)
        assert "Traceback" not in done.stdout or "run failed" in done.stdout, done.stdout
        return done.returncode, done.stdout

    def start(self, *flags):
        """A launch whose ranks are all in their loop."""
        self.output = self.directory / "output"
        with self.output.open("w") as file:
            self.process = self.cluster.popen(1, self.words(*flags), cwd=ROOT, stdout=file, stderr=file)
        logs = [self.directory / "logs" / f"rank-{rank}.log" for rank in range(3)]

        def ready():
            assert self.process.poll() is None, self.output.read_text()
            return all(log.exists() and "ready" in log.read_text() for log in logs)

        wait_for("ready ranks", ready, 30)
        time.sleep(0.5)  # until the agents have told the launcher

    def end(self, seconds):
        """Exit code and output; within ``seconds`` nothing of the run is left on the hosts named."""
        self.process.wait(timeout=seconds)
        return self.process.returncode, self.output.read_text()

    def left(self, *numbers):
        return [line for i in numbers or self.cluster.machines for line in self.cluster.processes(i)]

    def wait_until_gone(self, seconds, *numbers):
        wait_for("end", lambda: not self.left(*numbers), seconds)


@pytest.fixture(scope="module")
def cluster():
    with hosts(3) as made:
        yield made


@pytest.fixture
def run(cluster, tmp_path):
    yield Run(cluster, tmp_path)
    for i in cluster.machines:
        for line in cluster.processes(i):
            with contextlib.suppress(AssertionError):  # it has ended meanwhile
                cluster.kill(i, re.escape(line))


def test_ranks_of_three_hosts_meet(run):
    code, output = run.whole(run.worker, "ok")
    assert code == 0, output
    assert "3 hosts x 1 = 3 processes, 10.77.0.1 port" in output
    for rank in range(3):
        log = (run.directory / "logs" / f"rank-{rank}.log").read_text()
        assert f"rank {rank} of 3, world 3:3" in log
        assert re.search(rf"h{rank + 1} +rank {rank} +eth0", output)
        assert re.search(rf"h{rank + 1} +rank {rank} ok +nothing left", output)
    run.wait_until_gone(KILLED)


def test_a_name_that_leads_home_is_not_the_address(run):
    """Debian writes 127.0.1.1 for a host's own name."""
    tables = {i: run.cluster.etc_hosts(i) for i in run.cluster.machines}
    before = {i: table.read_text() for i, table in tables.items()}
    try:
        for i, table in tables.items():
            table.write_text(f"127.0.1.1 h{i}\n{before[i]}")
        code, output = run.whole(run.worker, "ok")
    finally:
        for i, table in tables.items():
            table.write_text(before[i])
    assert code == 0, output
    assert "10.77.0.1 port" in output


def test_an_exception_on_one_host(run):
    began = time.monotonic()
    code, output = run.whole(run.worker, "raise")
    assert time.monotonic() - began < KILLED + 10  # the start takes its time too
    assert code == 1
    assert "h3, rank 2: ValueError: no such 词" in output and "phase train, step 17" in output
    assert f"log: {run.directory}/logs/rank-2.log on h3" in output
    assert output.count("Traceback") == 1
    run.wait_until_gone(KILLED)


def test_all_processes_of_a_host_killed(run):
    run.start(run.worker, "wait")
    run.cluster.kill(3, OURS)
    code, output = run.end(KILLED)
    assert code == 5
    assert re.search(r"h3: host lost with rank 2|h3, rank 2: killed by SIGKILL", output)
    assert "phase train, step 17" in output and "rank-2.log on h3" in output
    run.wait_until_gone(KILLED)


def test_a_frozen_host(run):
    run.start(run.worker, "wait")
    run.cluster.freeze(2, OURS)
    code, output = run.end(SILENT)
    assert code == 5
    assert "h2: host lost with rank 1: no sign of life for 20 s" in output
    assert "not reachable: its agent ends what is left by itself" in output
    run.wait_until_gone(KILLED, 1, 3)
    run.cluster.thaw(2, OURS)
    run.wait_until_gone(KILLED, 2)


def test_a_frozen_rank(run):
    """Its agent lives; training ranks notice by themselves, this worker does not."""
    run.start("--peer_timeout", 5, run.worker, "wait")
    run.cluster.freeze(2, r"python \S*worker\.py")
    code, output = run.end(SILENT)
    assert code == 5
    assert re.search(r"h2, rank 1: stopped \(SIGSTOP or a debugger\) for \d+ s", output)
    run.wait_until_gone(KILLED)


def test_a_cut_link(run):
    run.start(run.worker, "wait")
    run.cluster.cut(3)
    try:
        code, output = run.end(SILENT)
        assert code == 5
        assert re.search(r"h3: host lost with rank 2: .*(no sign of life for 20 s|not responding)", output)
        run.wait_until_gone(SILENT, 1, 2)
        # sshd itself waits for the network
        wait_for("end on h3", lambda: not any(re.search(OURS, line) for line in run.left(3)), SILENT)
    finally:
        run.cluster.mend(3)


def test_ended_ssh_connections(run):
    run.start(run.worker, "wait")
    run.cluster.kill(2, r"sshd(-session)?: root")
    code, output = run.end(KILLED)
    assert code == 5
    assert "h2: host lost with rank 1: the connection to its agent ended" in output
    run.wait_until_gone(KILLED)


def test_a_killed_launcher(run):
    run.start(run.worker, "stubborn")
    run.cluster.kill(1, r"baichuan_sft\.cli launch")
    run.wait_until_gone(25)


@pytest.mark.parametrize("number, expected", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_ranks_of_all_hosts_save(number, expected, run):
    run.start(run.worker, "save")
    run.cluster.send(run.process, number)
    code, output = run.end(KILLED)
    assert code == expected
    for rank in range(3):
        assert "saved" in (run.directory / "logs" / f"rank-{rank}.log").read_text()
        assert re.search(rf"h{rank + 1} +rank {rank} saved and ended +nothing left", output)
    run.wait_until_gone(KILLED)


def test_restart_on_the_hosts_left(run):
    run.start("--max_restarts", 1, run.worker, "wait")
    run.cluster.stop_sshd(3)
    try:
        run.cluster.kill(3, rf"{OURS}|sshd(-session)?: root")
        # on the screen: a second Ctrl-C does not wait for lines on their way to it
        wait_for("restart", lambda: run.output.read_text().count("ready") >= 2, 30)
        run.cluster.send(run.process, signal.SIGINT)
        run.cluster.send(run.process, signal.SIGINT)
        code, output = run.end(KILLED)
    finally:
        run.cluster.start_sshd(3)
    assert code == 130
    assert "restart 1 of 1 from the last checkpoint: 2 hosts, 2 processes, without h3" in output
    assert "rank 0 of 2, world 2:2" in output and re.search(r"launch is \w{16}:1", output)


# --- before the start --------------------------------------------------------------------------------


def refused(run, *flags) -> str:
    """A launch that ends before any rank started, in time and in words."""
    began = time.monotonic()
    code, output = run.whole(*flags, run.worker, "ok")
    assert time.monotonic() - began < SILENT
    assert code == 3, output
    assert "Traceback" not in output and "error: " in output
    assert not (run.directory / "logs").exists()
    run.wait_until_gone(KILLED, 1, 2)
    return output


def test_all_hosts_that_cannot_be_reached_are_named(run):
    run.hostfile.write_text("h1 slots=1\nh2 slots=1 port=23\nnowhere slots=1\n")
    output = refused(run)
    assert "h2: ssh: connect to host h2 port 23: Connection refused; try: ssh -p 23 h2 true" in output
    assert "nowhere: ssh: Could not resolve hostname nowhere" in output


def test_a_host_without_its_network(run):
    run.cluster.cut(3)
    try:
        output = refused(run)
    finally:
        run.cluster.mend(3)
    assert re.search(r"h3: ssh: connect to host h3 port 22: .*; try: ssh h3 true", output)
    run.wait_until_gone(KILLED)


def test_a_key_that_changed(run):
    known = run.cluster.machines[1].home / ".ssh" / "known_hosts"
    before = known.read_text()
    other = (run.cluster.directory / "user_key.pub").read_text()
    known.write_text(f"h2,10.77.0.2 {other}")
    try:
        output = refused(run)
    finally:
        known.write_text(before)
    assert re.search(r"h2: .*Host key verification failed.*; try: ssh h2 true", output)


def test_a_python_or_directory_that_is_not_there(run):
    run.hostfile.write_text("h1 slots=1\nh2 slots=1 python=/no/python\nh3 slots=1 workdir=/no/dir\n")
    output = refused(run)
    assert "h2: cannot run /no/python there; name its Python with python= in the hostfile" in output
    assert "h3: no directory /no/dir there; name one with workdir= in the hostfile" in output


def test_a_firewall_on_the_port(run):
    run.cluster.firewall(1, 23456)
    output = refused(run, "--master_port", 23456)
    assert "h2: cannot reach h1 at one address with all others, port 23456" in output
    assert "h3: cannot reach h1" in output


def test_one_machine_under_two_names(run):
    run.hostfile.write_text("h2 slots=1\n10.77.0.2 slots=1\n")
    assert "h2 and 10.77.0.2 are one machine" in refused(run)


def test_a_host_with_another_version_or_other_data(run):
    data = run.directory / "data.json"
    data.write_text("[]")
    run.cluster.replace(2, data, "[1]")
    package = next(path for path in metadata.files("peft") if path.name == "METADATA").locate()
    run.cluster.replace(3, Path(package), "Metadata-Version: 2.1\nName: peft\nVersion: 0.0.1\n")
    try:
        code, output = run.whole(run.worker, "ok", "--data_path", data)
    finally:
        run.cluster.run(3, ["umount", package])
    assert code == 3
    assert re.search(rf"h2: file {data} is 3 bytes, sha256 \w+, on h1 2 bytes, sha256 \w+", output)
    assert re.search(r"h3: peft is 0\.0\.1, on h1 [\d.]+", output)


# --- pdsh --------------------------------------------------------------------------------------------


def test_deepspeeds_launcher_through_pdsh(run):
    pytest.importorskip("deepspeed")
    script = run.directory / "plain.py"
    script.write_text(
        "import os, socket, sys\n"
        "if os.environ['RANK'] == '0': socket.create_server(('', int(os.environ['MASTER_PORT'])))\n"
        "print('rank', os.environ['RANK'], os.environ['BAICHUAN_SFT_WORLD'], sys.argv[1:], flush=True)\n"
        "if sys.argv[1] == 'fail' and os.environ['RANK'] == '2': sys.exit(6)\n"
    )
    code, output = run.whole("--mode", "pdsh", script, "a b;c $HOME")
    assert code == 0, output
    for rank in range(3):
        assert f"rank {rank} 3:3 ['a b;c $HOME']" in output
    code, output = run.whole("--mode", "pdsh", script, "fail")
    assert code not in (0, None)
    run.wait_until_gone(KILLED)
