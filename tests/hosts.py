"""Several hosts on one machine: network namespaces joined by a bridge, each with its own sshd and hostname.

    with hosts(3) as cluster:                       # h1 10.77.0.1, h2 10.77.0.2, h3 10.77.0.3
        cluster.run(1, ["ssh", "h2", "hostname"])
        cluster.cut(3)

A host has its own network, hostname, processes, home (~/.ssh), /etc/hosts, /run and /dev/shm; the rest of the
file system is the machine's. Namespaces have no names: they are gone with their processes, and those are
killed with the process that made them, however that ends. By hand: `tests/hosts.py 3 -- ssh h2 hostname`.
"""

import contextlib
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

NETWORK = "10.77.0"
SCRATCH = "baichuan-sft-hosts-"  # then the pid that made it
TOOLS = ("ip", "mount", "nsenter", "setpriv", "ssh", "ssh-keygen", "unshare")
SSHD = "/usr/sbin/sshd"  # by its full name, or it refuses to start
CARRIED = ("PATH", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "BAICHUAN_SFT_CACHE", "TORCH_EXTENSIONS_DIR")

# Process 1 of a host; bash reaps what loses its parent there. $1 is the host's directory, the rest its own
# tmpfs's. /etc/passwd moves root's home: ssh reads no HOME.
INIT = f"""set -e
dir=$1; shift
hostname "$(cat $dir/name)"
for file in hosts passwd; do mount --bind $dir/$file /etc/$file; done
for path in /run /dev/shm "$@"; do mount -t tmpfs tmpfs "$path"; done
mkdir /run/sshd
ip link set lo up
{SSHD} -D -E $dir/sshd.log -f $dir/sshd_config &
touch $dir/ready
while :; do sleep infinity & wait $!; done
"""


@cache
def missing() -> str:
    """Why there can be no such hosts here; empty where there can."""
    if not sys.platform.startswith("linux") or os.geteuid():
        return "network namespaces need Linux and root"
    absent = [tool for tool in TOOLS if not shutil.which(tool)] + [SSHD] * (not Path(SSHD).exists())
    if absent:
        return f"needs {', '.join(absent)} (Debian: iproute2, openssh-server, openssh-client, util-linux)"
    if subprocess.run(["unshare", "--net", "--mount", "true"], capture_output=True).returncode:
        return "this root may not make namespaces"
    return ""


needs_hosts = pytest.mark.skipif(bool(missing()), reason=missing() or "there can be hosts")


def call(*words) -> str:
    """Output of a command that must succeed."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


def wait_for(what, condition, seconds=20.0):
    """The first true value of ``condition()``."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"no {what} within {seconds} s"
        time.sleep(0.005)
    return value


def children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


@dataclass
class Machine:
    """One host: its number from 1, directory of its own files, process outside and process 1 inside."""

    number: int
    directory: Path
    unshare: subprocess.Popen
    init: int

    @property
    def name(self) -> str:
        return f"h{self.number}"

    @property
    def home(self) -> Path:
        return self.directory / "home"


@dataclass
class Cluster:
    """Hosts 1 to n; ``i`` is a host's number everywhere."""

    directory: Path
    bridge: int = 0
    machines: dict[int, Machine] = field(default_factory=dict)
    started: list[subprocess.Popen] = field(default_factory=list)

    # --- commands on a host

    def popen(self, i: int, argv: Sequence, *, cwd=None, env=None, **options) -> subprocess.Popen:
        """A command on host ``i``, in a process group of its own; `send` reaches it, killing this does not.

        Args:
            env: added to the user's environment.
        """
        # a test run in the background ignores SIGINT, and so would what it starts
        words = [*self._enter(i), "env", "--default-signal=INT", "-C", cwd or Path.cwd(), *argv]
        settings = {**os.environ, **carried(), "HOME": str(self.machines[i].home), **(env or {})}
        process = subprocess.Popen(
            [str(word) for word in words], env=settings, start_new_session=True, **options
        )
        self.started.append(process)
        return process

    def run(self, i: int, argv: Sequence, timeout=60.0, env=None, cwd=None) -> subprocess.CompletedProcess:
        """Exit code and output of a command on host ``i``, stderr after stdout; killed after ``timeout``."""
        process = self.popen(
            i, argv, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            raise AssertionError(f"{argv} ran past {timeout} s and said: {output}") from None
        return subprocess.CompletedProcess([str(word) for word in argv], process.returncode, output)

    def send(self, process: subprocess.Popen, number=signal.SIGINT) -> None:
        """Send a signal to the command of a `popen`, not to what entered the host for it."""
        for pid in wait_for("command to signal", lambda: children(process.pid)):
            os.kill(pid, number)

    def processes(self, i: int) -> list[str]:
        """Command lines on host ``i``, but for its sshd (sessions do count) and process 1."""
        return list(self._processes(i).values())

    def kill(self, i: int, pattern: str, number=signal.SIGKILL) -> int:
        """Signal every process of host ``i`` whose command line has ``pattern`` (re.search); how many."""
        found = [pid for pid, line in self._processes(i, sshd=True).items() if re.search(pattern, line)]
        assert found, f"no process of h{i} has {pattern!r}: {self.processes(i)}"
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        for process in self.started:  # nsenter stops itself when its command is stopped
            if number in (signal.SIGCONT, signal.SIGKILL) and set(children(process.pid)) & set(found):
                process.send_signal(signal.SIGCONT)
        return len(found)

    def freeze(self, i: int, pattern: str) -> int:
        return self.kill(i, pattern, signal.SIGSTOP)

    def thaw(self, i: int, pattern: str) -> int:
        return self.kill(i, pattern, signal.SIGCONT)

    # --- faults

    def cut(self, i: int) -> None:
        """Pull the cable: nothing comes or goes, and nobody is told."""
        self._bridge("link", "set", f"v{i}", "down")

    def mend(self, i: int) -> None:
        self._bridge("link", "set", f"v{i}", "up")

    def firewall(self, i: int, first_port: int, last_port: int | None = None) -> None:
        """Nobody on another host gets an answer from these TCP ports of host ``i``."""
        # A rule on the answers, for not every kernel has packet filters; what is local is looked up before.
        self._rule(i, "add", first_port, last_port or first_port)

    def open_ports(self, i: int, first_port: int, last_port: int | None = None) -> None:
        """Take a `firewall` away again."""
        self._rule(i, "del", first_port, last_port or first_port)

    def stop_sshd(self, i: int) -> None:
        """End the listener: new connections are refused, open ones stay (kill "sshd: root" for those)."""
        self.kill(i, rf"^(sshd: )?{SSHD} -D")

    def start_sshd(self, i: int) -> None:
        self.popen(i, [SSHD, "-D", "-f", self.machines[i].directory / "sshd_config"])
        self._wait_for_sshd(i)

    def replace(self, i: int, path: Path, content: str) -> None:
        """Another content of an existing file, on host ``i`` alone."""
        mine = Path(tempfile.mkstemp(dir=self.machines[i].directory)[1])
        mine.write_text(content)
        mine.chmod(0o644)
        call(*self._enter(i), "mount", "--bind", mine, path)

    def private(self, i: int, path: Path, options="size=1g") -> None:
        """An empty tmpfs over an existing directory, on host ``i`` alone."""
        call(*self._enter(i), "mount", "-t", "tmpfs", "-o", options, "tmpfs", path)

    def etc_hosts(self, i: int) -> Path:
        """The file behind /etc/hosts of host ``i``, to be rewritten in place."""
        return self.machines[i].directory / "hosts"

    def hostfile(self, path: Path, slots=1) -> Path:
        path.write_text("".join(f"{machine.name} slots={slots}\n" for machine in self.machines.values()))
        return path

    # --- how it is made

    def _rule(self, i: int, verb: str, first_port: int, last_port: int) -> None:
        assert last_port < 32768, "the host's own connections leave from the higher ones"
        rule = f"ip rule {verb} ipproto tcp sport {first_port}-{last_port} blackhole"
        call(*self._enter(i), *rule.split())

    def _enter(self, i: int) -> list[str]:
        return ["nsenter", "-t", str(self.machines[i].init), "-n", "-u", "-m", "-p", "--"]

    def _bridge(self, *words: str) -> None:
        call("nsenter", "-t", self.bridge, "-n", "--", "ip", *words)

    def _wait_for_sshd(self, i: int) -> None:
        wait_for("sshd", lambda: call(*self._enter(i), "ss", "-Hltn", "sport = :22"))

    def _processes(self, i: int, sshd=False) -> dict[int, str]:
        """Pid outside -> command line; nothing that has ended."""
        init, found = self.machines[i].init, {}
        home = os.readlink(f"/proc/{init}/ns/pid")
        for entry in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{entry}/ns/pid") != home or int(entry) == init:
                    continue
                line = Path(f"/proc/{entry}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
                # and not yet the command itself
                entering = line.startswith(("nsenter -t ", "env --default-signal=INT "))
                own = line == "sleep infinity" or entering or (f"{SSHD} -D" in line and not sshd)
                if line and not own:
                    found[int(entry)] = line
        return found

    def _start(self, i: int, local: Sequence[Path]) -> None:
        directory = self.directory / f"h{i}"
        words = [*unshare("--net", "--uts", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc")]
        process = subprocess.Popen(
            [*words, "bash", "-c", INIT, "init", directory, *map(str, local)], stdin=subprocess.DEVNULL
        )
        self.started.append(process)
        init = wait_for("process 1", lambda: children(process.pid))[0]
        machine = self.machines[i] = Machine(i, directory, process, init)
        wait_for(f"{machine.name}, see its sshd.log", (directory / "ready").exists)
        call(*f"ip link add v{i} netns {self.bridge} type veth peer name eth0 netns {init}".split())
        self._bridge("link", "set", f"v{i}", "master", "bridge0", "up")
        call("nsenter", "-t", init, "-n", "--", *f"ip addr add {NETWORK}.{i}/24 dev eth0".split())
        call("nsenter", "-t", init, "-n", "--", *"ip link set eth0 up".split())

    def _stop(self) -> None:
        for process in self.started:
            process.kill()  # SIGKILL: unshare takes its host along, SIGTERM leaves sshd
        for process in self.started:
            process.wait()
        gone = [machine.init for machine in self.machines.values()]
        wait_for("end of the hosts", lambda: not any(Path(f"/proc/{pid}").exists() for pid in gone))
        shutil.rmtree(self.directory)


def unshare(*kinds: str) -> list[str]:
    """Words that start a command in new namespaces; it is killed when this process ends, however."""
    return ["setpriv", "--pdeathsig", "KILL", "unshare", *kinds]


def carried() -> dict[str, str]:
    """What every host's environment has: of the user's, what ssh would leave out."""
    compiled = Path.home() / ".cache" / "torch_extensions"  # homes differ, DeepSpeed's compiled ops need not
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TORCH_EXTENSIONS_DIR": str(compiled)}
    settings |= {name: os.environ[name] for name in CARRIED if name in os.environ}
    settings["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{settings['PATH']}"
    return settings


def write_files(directory: Path, count: int) -> None:
    """All that the hosts read: keys, configuration of sshd, names, homes."""
    for name in ("host_key", "user_key"):
        call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", directory / name)
    names = {f"h{i}": f"{NETWORK}.{i}" for i in range(1, count + 1)}
    public = (directory / "host_key.pub").read_text()
    variables = " ".join(f'"{name}={value}"' for name, value in carried().items())
    user = pwd.getpwuid(0)
    for name in names:
        own = directory / name
        ssh = own / "home" / ".ssh"
        ssh.mkdir(parents=True, mode=0o700)
        (own / "name").write_text(name)
        table = "".join(f"{address} {other}\n" for other, address in names.items())
        (own / "hosts").write_text(f"127.0.0.1 localhost\n{table}")
        others = Path("/etc/passwd").read_text().splitlines(keepends=True)[1:]
        (own / "passwd").write_text(f"root:x:0:0:root:{own / 'home'}:{user.pw_shell}\n{''.join(others)}")
        (own / "sshd_config").write_text(
            f"HostKey {directory}/host_key\nAuthorizedKeysFile {directory}/user_key.pub\nPidFile none\n"
            f"StrictModes no\nPasswordAuthentication no\nUsePAM no\nMaxStartups 100\nSetEnv {variables}\n"
        )
        shutil.copy(directory / "user_key", ssh / "id_ed25519")
        known = ",".join([*names, *names.values()])
        (ssh / "known_hosts").write_text(f"{known} {public}")


def sweep() -> None:
    """Remove what a test run left that was killed itself; its processes ended with it."""
    for path in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*"):
        if not Path(f"/proc/{path.name.split('-')[3]}").exists():
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def hosts(count: int, local: Sequence[Path] = ()) -> Iterator[Cluster]:
    """``count`` hosts that reach each other by ssh without a password; all is gone afterwards.

    Args:
        local: existing directories over which each host has an empty tmpfs of its own.
    """
    sweep()
    cluster = Cluster(Path(tempfile.mkdtemp(prefix=f"{SCRATCH}{os.getpid()}-")))
    try:
        cluster.directory.chmod(0o755)
        write_files(cluster.directory, count)
        bridge = subprocess.Popen([*unshare("--net"), "sleep", "infinity"])
        cluster.started.append(bridge)
        cluster.bridge = bridge.pid
        mine = os.readlink("/proc/self/ns/net")
        wait_for("namespace", lambda: os.readlink(f"/proc/{bridge.pid}/ns/net") != mine)
        cluster._bridge("link", "add", "bridge0", "type", "bridge")
        cluster._bridge("link", "set", "bridge0", "up")
        for i in range(1, count + 1):
            cluster._start(i, local)
        for i in cluster.machines:
            cluster._wait_for_sshd(i)
        yield cluster
    finally:
        cluster._stop()


def main(words: list[str]) -> int:
    """`hosts.py N [-- COMMAND]`: a command (or a shell) on h1 of N hosts; $HOSTFILE names them all."""
    if missing():
        print(f"no hosts here: {missing()}", file=sys.stderr)
        return 3
    count, command = int(words[0]), words[2:] or ["bash"]
    with hosts(count) as cluster:
        hostfile = cluster.hostfile(cluster.directory / "hostfile")
        process = cluster.popen(1, command, env={"HOSTFILE": str(hostfile)})
        try:
            return process.wait()
        except KeyboardInterrupt:
            cluster.send(process)
            return process.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
