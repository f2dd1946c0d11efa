"""The hosts of other tests: they are hosts, their faults are faults, and nothing of them is left."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import hosts as script
import pytest
from fixtures import ROOT
from hosts import hosts, needs_hosts, wait_for

from baichuan_sft import machine

pytestmark = needs_hosts
SCRIPT = [sys.executable, ROOT / "tests" / "hosts.py", "2", "--", "sh", "-c"]
SSH = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=2"]


def alive(maker: int) -> list[str]:
    """Command lines that name the hosts which process ``maker`` made."""
    lines = map(machine.command_line, machine.processes())
    return [line for line in lines if f"{script.SCRATCH}{maker}-" in line]


def traces() -> dict[str, object]:
    """What hosts could leave on the machine."""
    ssh = Path.home() / ".ssh"
    return {
        "processes": alive(os.getpid()),
        "mounts": Path("/proc/mounts").read_text(),
        "links": script.call("ip", "-o", "link"),
        "namespaces": script.call("ip", "netns"),
        "/etc/hosts": Path("/etc/hosts").read_text(),
        "/etc/passwd": Path("/etc/passwd").read_text(),
        "~/.ssh": sorted(map(str, ssh.glob("*"))) if ssh.exists() else None,
        "scratch": list(Path("/tmp").glob(f"{script.SCRATCH}{os.getpid()}-*")),
    }


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    local = tmp_path_factory.mktemp("local")
    before = traces()
    with hosts(3, local=[local]) as made:
        made.local = local
        yield made
    assert traces() == before


def test_three_hosts_reach_each_other(cluster, tmp_path):
    for i, j in ((1, 2), (2, 1), (3, 1), (1, 1)):
        done = cluster.run(i, [*SSH, f"h{j}", "hostname"])
        assert (done.returncode, done.stdout) == (0, f"h{j}\n")
    assert cluster.run(2, [*SSH, "10.77.0.3", "hostname"]).stdout == "h3\n"
    assert cluster.run(1, [*SSH, "h2", "echo $OMP_NUM_THREADS"]).stdout == "1\n"
    hostfile = cluster.hostfile(tmp_path / "hostfile", slots=2)
    assert hostfile.read_text() == "h1 slots=2\nh2 slots=2\nh3 slots=2\n"


def test_a_host_has_its_own_processes_and_files(cluster, tmp_path):
    assert cluster.processes(1) == []
    for path in ("/dev/shm", "/run", cluster.local, Path.home()):
        assert not (Path(path) / "mark").exists()
    for path in ("/dev/shm", "/run", cluster.local, "~"):
        cluster.run(1, ["sh", "-c", f"echo one > {path}/mark"])
        assert cluster.run(2, ["sh", "-c", f"cat {path}/mark"]).returncode == 1
        assert not (Path(path).expanduser() / "mark").exists()
    shared = tmp_path / "data.json"
    shared.write_text("same")
    cluster.replace(2, shared, "other")
    assert [cluster.run(i, ["cat", shared]).stdout for i in (1, 2, 3)] == ["same", "other", "same"]


def test_a_cut_cable_is_silent_until_it_is_mended(cluster):
    cluster.cut(2)
    done = cluster.run(1, [*SSH, "h2", "true"])
    assert done.returncode == 255 and ("timed out" in done.stdout or "No route" in done.stdout)
    assert cluster.run(1, [*SSH, "h3", "true"]).returncode == 0
    cluster.mend(2)
    wait_for("way to h2", lambda: cluster.run(1, [*SSH, "h2", "true"]).returncode == 0)


def test_processes_are_frozen_thawed_signalled_and_killed(cluster):
    count = "import time\nfor i in range(10**6): print(i, flush=True); time.sleep(0.01)"
    process = cluster.popen(3, [sys.executable, "-c", count], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    [line] = cluster.processes(3)
    assert "range" in line
    assert cluster.freeze(3, "range") == 1
    pid = next(iter(cluster._processes(3)))
    wait_for("stop", lambda: ") T " in Path(f"/proc/{pid}/stat").read_text())
    cluster.thaw(3, "range")
    cluster.send(process, signal.SIGINT)
    assert process.wait(10) != 0 and cluster.processes(3) == []
    process = cluster.popen(3, ["sleep", "100"])
    wait_for("sleep", lambda: cluster.processes(3))
    cluster.kill(3, "^sleep 100$")
    assert process.wait(10) != 0 and cluster.processes(3) == []
    with pytest.raises(AssertionError, match="no process of h3"):
        cluster.kill(3, "^sleep 100$")


def test_sshd_ends_and_comes_back(cluster):
    cluster.stop_sshd(2)
    # one that came before sshd was gone is reset
    wait_for("refusal", lambda: "refused" in cluster.run(1, [*SSH, "h2", "true"]).stdout)
    cluster.start_sshd(2)
    assert cluster.run(1, [*SSH, "h2", "true"]).returncode == 0


def test_a_firewalled_port_is_silent_and_the_next_one_open(cluster):
    cluster.firewall(3, 29500)
    listen = "import socket, time; s = [socket.create_server(('', 29500 + i)) for i in (0, 1)]; "
    listen += "time.sleep(60)"
    process = cluster.popen(3, [sys.executable, "-c", listen])
    connect = "import socket,sys; socket.create_connection(('h3', int(sys.argv[1])), 1)"
    wait_for("server", lambda: cluster.run(1, [sys.executable, "-c", connect, "29501"]).returncode == 0)
    done = cluster.run(1, [sys.executable, "-c", connect, "29500"])
    assert done.returncode == 1 and "timed out" in done.stdout
    cluster.open_ports(3, 29500)
    assert cluster.run(1, [sys.executable, "-c", connect, "29500"]).returncode == 0
    cluster.send(process, signal.SIGKILL)
    process.wait(10)


@pytest.mark.slow
def test_nothing_is_left_after_a_failed_test_an_interrupt_and_a_kill():
    before = traces()
    for failure in (AssertionError, KeyboardInterrupt):
        with pytest.raises(failure), hosts(2) as made:
            made.popen(2, ["sleep", "1000"])
            raise failure
        assert traces() == before

    process = subprocess.Popen([*SCRIPT, "echo $HOSTFILE; sleep 1000"], stdout=subprocess.PIPE, text=True)
    scratch = Path(process.stdout.readline()).parent
    assert scratch.is_dir()
    process.kill()
    process.wait()
    wait_for("end of the hosts", lambda: not alive(process.pid))
    script.sweep()
    assert not scratch.exists() and traces() == before


def test_the_command_by_hand_passes_its_exit_code_on():
    done = subprocess.run([*SCRIPT, "ssh h2 hostname; exit 7"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (7, "h2\n"), done.stderr
