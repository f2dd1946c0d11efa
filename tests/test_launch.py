"""`baichuan-sft launch` on this machine, with a rank that is a few lines of Python."""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from fixtures import ROOT
from hosts import children, wait_for
from launching import free_port
from torch.distributed import TCPStore

from baichuan_sft import machine, ops_cache
from baichuan_sft.errors import UserError
from baichuan_sft.hosts import Host
from baichuan_sft.launch import modes, outcome, restart
from baichuan_sft.launch.command import main
from baichuan_sft.launch.environment import forwarded, shown
from baichuan_sft.launch.outcome import Failure
from baichuan_sft.launch.ranks import Rank, marked
from baichuan_sft.launch.restart import why_not
from baichuan_sft.launch.supervise import START_SECONDS, Job, Stop, Watch
from baichuan_sft.train.processes import LOST_PEER

# What a rank does, by the first word. It tells its phase as a training rank does.
WORKER = """
import json, os, signal, subprocess, sys, time
rank, what = int(os.environ["RANK"]), sys.argv[1]
def tell(phase, step=None, error=None):
    path = os.path.join(os.environ["BAICHUAN_SFT_STATUS"], f"rank-{rank}.json")
    with open(path + ".tmp", "w") as file:
        json.dump(dict(rank=rank, phase=phase, step=step, error=error), file)
    os.replace(path + ".tmp", path)
def wait(): time.sleep(600)
tell("rendezvous")
print(f"rank {rank} of {os.environ['WORLD_SIZE']}, world {os.environ['BAICHUAN_SFT_WORLD']}", flush=True)
print("launch is", os.environ.get("BAICHUAN_SFT_LAUNCH"), flush=True)
if what != "hang": tell("train", 17)
last = int(os.environ["WORLD_SIZE"]) - 1
if what == "ok": sys.exit(0)
if what == "raise" and rank == last:
    subprocess.Popen(["sleep", "600"], start_new_session=True)
    time.sleep(0.5)
    raise ValueError("no such 词")
if what == "echo":
    if rank == 0:
        sys.exit("RuntimeError: Connection closed by peer")
    time.sleep(1)
    error = dict(kind="NumericalFault", message="loss is nan", traceback="Traceback of it", exit_code=6)
    tell("train", 18, error)
    sys.exit(6)
if what == "killed" and rank == last: os.kill(os.getpid(), signal.SIGKILL)
if what == "once":
    first = not os.path.exists(sys.argv[2])
    if rank == last and first:
        while not os.path.exists(sys.argv[2] + "-0"): time.sleep(0.01)
        time.sleep(0.5)  # until what rank 0 has printed is read
        open(sys.argv[2], "w").close()
        raise OSError("the first time")
    open(sys.argv[2] + "-" + str(rank), "w").close()
    wait() if first else sys.exit(0)
if what == "always": raise OSError("each time")
if what == "save":
    def save(*_):
        print("saved", flush=True)
        sys.exit(143)
    signal.signal(signal.SIGTERM, save)
if what == "stubborn": signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
wait()
"""


@pytest.fixture
def worker(tmp_path):
    path = tmp_path / "worker.py"
    path.write_text(WORKER)
    return path


def words(tmp_path, *flags):
    return [sys.executable, "-m", "baichuan_sft.cli", "launch", "--log_dir", tmp_path / "logs", *flags]


def start(tmp_path, *flags, **options) -> subprocess.Popen:
    # under nohup SIGHUP would be ignored, as it should be there
    default = ("env", "--default-signal=HUP,INT")
    command = [str(word) for word in (*default, *words(tmp_path, "--num_processes", 2, *flags))]
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return subprocess.Popen(command, cwd=ROOT, text=True, start_new_session=True, **streams, **options)


def launch(tmp_path, *flags, **options) -> tuple[int, str]:
    process = start(tmp_path, *flags, **options)
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


def until(process, text) -> str:
    """What a launch said up to a line with ``text``."""
    said = ""
    for line in process.stdout:
        said += line
        if text in line:
            return said
    raise AssertionError(f"ended before {text!r}: {said}")


def until_all_ready(process, tmp_path):
    until(process, "ready")
    wait_for("rank 1", lambda: "ready" in (tmp_path / "logs" / "rank-1.log").read_text())


def alive(worker) -> list[int]:
    """Processes that have this test's worker in their command line."""
    return [pid for pid in machine.processes() if str(worker) in machine.command_line(pid)]


def wait_until_gone(worker, seconds, but=0):
    wait_for("end", lambda: not set(alive(worker)) - {but}, seconds)


# --- how a run ends ----------------------------------------------------------------------------------


def test_all_ranks_end_well(worker, tmp_path):
    code, output = launch(tmp_path, worker, "ok")
    assert code == 0
    assert "1 host x 2 = 2 processes" in output
    assert "rank 0 of 2, world 1:2" in output and "rank 1 of 2" not in output
    assert "rank 1 of 2" in (tmp_path / "logs" / "rank-1.log").read_text()
    assert re.search(r"localhost +rank 0,1 ok +nothing left", output)


def test_a_failure_ends_all_ranks_and_is_told_once(worker, tmp_path):
    """`raise` leaves a sleep with a session of its own, which is ended too."""
    began, before = time.monotonic(), sleeping()
    code, output = launch(tmp_path, worker, "raise")
    assert time.monotonic() - began < 10  # the limit, from start to end
    assert code == 1 and "nothing left" in output
    assert output.count("Traceback") == 1 and output.count("= run failed =") == 1
    assert "localhost, rank 1: ValueError: no such 词" in output
    assert "phase train, step 17, exit code 1" in output
    assert f"log: {tmp_path}/logs/rank-1.log on localhost" in output
    assert "rank 0 ended by the launcher, rank 1 exit code 1" in output
    assert alive(worker) == [] and sleeping() <= before


def sleeping() -> set[int]:
    """Those of this machine alone: other tests have hosts, with processes of their own."""
    here = os.readlink("/proc/self/ns/pid")
    found = set()
    for pid in machine.processes():
        with contextlib.suppress(OSError):
            if machine.command_line(pid) == "sleep 600" and os.readlink(f"/proc/{pid}/ns/pid") == here:
                found.add(pid)
    return found


def test_the_rank_that_knows_the_cause_is_named(worker, tmp_path):
    """Rank 0 notices first that rank 1 is gone; rank 1 says why."""
    code, output = launch(tmp_path, worker, "echo")
    assert code == 6
    assert "localhost, rank 1: loss is nan" in output
    assert "phase train, step 18, exit code 6" in output
    assert "Traceback" not in output  # an error of ours is one sentence


def test_a_rank_killed_from_outside(worker, tmp_path):
    code, output = launch(tmp_path, worker, "killed")
    assert code == 5
    assert "localhost, rank 1: killed by SIGKILL" in output


@pytest.mark.slow
def test_a_rendezvous_that_never_ends_is_named(worker, tmp_path):
    code, output = launch(tmp_path, worker, "hang", "--rendezvous_timeout", "1")
    assert code == 5
    assert re.search(r"localhost, rank 0: no rendezvous after \d+ s.*also rank 1 \(localhost\)", output)
    assert "phase rendezvous" in output


def test_a_killed_agent_takes_its_ranks_along(worker, tmp_path):
    process = start(tmp_path, worker, "wait")
    until(process, "ready")
    for pid in children(process.pid):
        os.kill(pid, signal.SIGKILL)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 5
    assert "localhost: host lost with rank 0,1: the connection to its agent ended" in output
    wait_until_gone(worker, 5)


def test_a_killed_launcher_leaves_nothing(worker, tmp_path):
    process = start(tmp_path, worker, "stubborn")
    until(process, "ready")
    assert alive(worker)
    process.kill()
    process.wait()
    wait_until_gone(worker, 25)


def test_a_frozen_launcher_is_not_waited_for(worker, tmp_path):
    process = start(tmp_path, "--peer_timeout", 3, worker, "stubborn")
    until(process, "ready")
    process.send_signal(signal.SIGSTOP)
    try:
        wait_until_gone(worker, 15, but=process.pid)
    finally:
        process.kill()
        process.communicate()


# --- signals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number, expected", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)]
)
def test_the_first_signal_lets_the_ranks_save(number, expected, worker, tmp_path):
    process = start(tmp_path, worker, "save")
    until_all_ready(process, tmp_path)
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == expected
    assert "saved" in output and "saved" in (tmp_path / "logs" / "rank-1.log").read_text()
    assert "the ranks finish their step, save and end" in output
    assert "rank 0,1 saved and ended" in output and "run failed" not in output


def test_the_second_interrupt_ends_at_once(worker, tmp_path):
    process = start(tmp_path, worker, "stubborn")
    until_all_ready(process, tmp_path)
    process.send_signal(signal.SIGINT)
    until(process, "the ranks finish")
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "ending all ranks at once" in output and "ended by the launcher" in output
    assert alive(worker) == []


# --- restarts ----------------------------------------------------------------------------------------


def test_a_failure_that_passes_is_restarted_from_the_last_checkpoint(worker, tmp_path):
    code, output = launch(tmp_path, "--max_restarts", 1, worker, "once", tmp_path / "mark")
    assert code == 0
    assert "OSError: the first time" in output
    assert "restart 1 of 1 from the last checkpoint: 1 host, 2 processes" in output
    # the same launch for `train`, whose saves and lock are its own
    (own, first), (same, second) = re.findall(r"launch is (\w{16}):(\d)", output)
    assert (first, second) == ("0", "1") and own == same


def test_the_same_failure_twice_is_not_tried_again(worker, tmp_path):
    code, output = launch(tmp_path, "--max_restarts", 5, worker, "always")
    assert code == 1
    assert output.count("= run failed =") == 2
    assert "not started again: the same error at the same step as before" in output


@pytest.mark.parametrize("code", [2, 3, 4, 6])
def test_a_failure_that_would_come_back_is_not_restarted(code):
    failure = Failure("a", 0, "train", 3, code, "x")
    assert f"exit code {code} comes back" in why_not(failure, [], 3)


def test_restarts_are_counted_over_the_whole_run():
    failures = [Failure("a", 0, "train", step, 5, "killed by SIGKILL") for step in range(3)]
    assert why_not(failures[2], failures[:1], 2) == ""
    assert "--max_restarts 2 is used up" in why_not(failures[2], failures[:2], 2)


def test_whoever_asks_for_an_end_gets_no_restart(monkeypatch):
    """A rank that fails while it saves for that."""
    attempts = []

    def attempt(job, stop):
        attempts.append(job)
        stop.first = signal.SIGTERM
        return 7, Failure("a", 0, "save", 3, 7, "x")

    monkeypatch.setattr(restart, "attempt", attempt)
    monkeypatch.setattr(restart, "hosts_left", lambda job: job.hosts)
    job = Job([Host("localhost", 1)], ["true"], {}, [], "logs")
    assert restart.run_with_restarts(job, 2, Stop()) == 7 and len(attempts) == 1


# --- addresses, environment, the command line ---------------------------------------------------------


def test_a_port_in_use_is_named_with_its_process(worker, tmp_path):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        code, output = launch(tmp_path, "--master_port", port, worker, "ok")
    assert code == 3
    assert f"port {port}: Address already in use, by process {os.getpid()} (" in output
    assert "Traceback" not in output


def test_a_port_that_is_found_is_not_given_to_others_by_chance():
    """The ranks take it seconds later."""
    for _ in range(20):
        with machine.listen(0) as found:
            assert found.getsockname()[1] in machine.FREE_PORTS


def test_a_listener_is_known_by_its_word():
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert "own" not in machine.reach(("127.0.0.1", other.getsockname()[1]), "word")


@pytest.fixture
def watch():
    """A launch that watches rank 0 on host a and rank 1 on host b, and hears nothing."""
    links = [SimpleNamespace(name="a", ranks=[0]), SimpleNamespace(name="b", ranks=[1])]
    job = Job([Host("a", 1), Host("b", 1)], [], {}, [], "logs")
    return Watch(SimpleNamespace(links=links), job, Stop())


def test_a_rank_that_never_gets_past_its_imports_is_named(watch):
    watch.check_limits()
    watch.states[1].since -= START_SECONDS + 1
    watch.check_limits()
    assert watch.failures == []  # a program that tells no phases has no limits
    watch.states[0].note(dict(phase="rendezvous", step=0))
    watch.check_limits()
    (failure,) = watch.failures
    assert (failure.host, failure.rank, failure.code) == ("b", 1, 5)
    assert failure.message == "still not past its imports after 120 s"


def test_data_may_take_its_time_but_is_named(watch, capsys):
    watch.states[0].note(dict(phase="rendezvous", step=0))
    watch.states[1].note(dict(phase="data", step=0))
    for state in watch.states.values():
        state.since -= 3600
    watch.check_limits()
    watch.check_limits()
    assert watch.failures == []
    assert capsys.readouterr().err == "launch: rank 0 waits for rank 1 (b) in phase data, 3600 s so far\n"


def test_what_goes_along():
    given = dict(NCCL_DEBUG="INFO", HF_HOME="/h", HF_TOKEN="t", HOME="/root", RANK="3", WANDB_API_KEY="k")
    given |= dict(BAICHUAN_SFT_STATUS="/s", TOKENIZERS_PARALLELISM="false")
    chosen = dict(NCCL_DEBUG="INFO", HF_HOME="/h", TOKENIZERS_PARALLELISM="false")
    assert forwarded(given, []) == chosen
    assert forwarded(given, ["HF_TOKEN"]) == {**chosen, "HF_TOKEN": "t"}
    with pytest.raises(UserError, match="--env NOTHING: is not set here"):
        forwarded(given, ["NOTHING"])
    assert shown("HF_TOKEN", "t") == "HF_TOKEN=***"
    assert shown("http_proxy", "http://me:word@proxy:3128") == "http_proxy=http://***@proxy:3128"


FAULTS = {
    "no_command": ([], "the following arguments are required: train"),
    "unknown_command": (["trian"], "unknown command 'trian'"),
    "no_script": (["nothing.py"], "nothing.py: no such file"),
    "no_hostfile": (["--hostfile", "hostfil", "train"], "--hostfile hostfil: no such file"),
    "unknown_mode": (["--mode", "pdhs", "train"], "unknown mode 'pdhs', did you mean 'pdsh'"),
    "unknown_flag": (["--hostfiles", "x", "train"], "unrecognized arguments: --hostfiles"),
    "both": (["--hostfile", "hostfile.example", "--num_processes", "2", "train"], "contradict"),
    "zero": (["--num_processes", "0", "train"], "'0' is not a whole number of at least 1"),
    "port": (["--master_port", "99999", "train"], "'99999' is not a port"),
    "restarts": (["--mode", "torchrun", "--max_restarts", "2", "train"], "--max_restarts needs --mode ssh"),
    "node_rank": (["--node_rank", "1", "train"], "--node_rank is for --mode torchrun"),
    "node_rank_9": (
        "--mode torchrun --hostfile hostfile.example --node_rank 9 train".split(),
        "has 2 hosts, ",
    ),
    "slurm": (["--mode", "slurm", "train"], "SLURM_JOB_NODELIST is not set"),
    "env": (["--env", "NO_SUCH_NAME", "train"], "--env NO_SUCH_NAME: is not set here"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_the_command_line(name, monkeypatch):
    argv, expected = FAULTS[name]
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    with pytest.raises(UserError, match=re.escape(expected)):
        main(argv)


def test_a_dry_run_shows_what_would_run_and_no_secret(tmp_path, monkeypatch, capsys):
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("far-1 slots=2\nfar-2 slots=1 port=2222 user=me python=/v/python workdir=/w\n")
    monkeypatch.setenv("HF_TOKEN", "planted")
    flags = ["--dry_run", "--hostfile", str(hostfile), "--env", "HF_TOKEN"]
    assert main([*flags, "train", "--data_path", "a b.json"]) == 0
    shown = capsys.readouterr().out
    assert "2 hosts, 3 processes" in shown and "# far-2, rank 2: the agent" in shown
    agent = r"^ssh .*-p 2222 -l me -- far-2 .*/w /v/python -m baichuan_sft.launch.agent"
    assert re.search(agent, shown, re.M)
    assert "/v/python -m baichuan_sft.cli train --data_path 'a b.json'" in shown
    assert "HF_TOKEN=***" in shown and "planted" not in shown


# --- other modes -------------------------------------------------------------------------------------


def test_torchrun_commands(tmp_path, capsys, monkeypatch):
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("a slots=2\nb slots=1 python=/v/python\n")
    flags = ["--mode", "torchrun", "--hostfile", str(hostfile), "--master_port", "2345"]
    assert main([*flags, "train", "--bf16", "True"]) == 0
    first, second = re.findall(r"^env .*$", capsys.readouterr().out, re.M)
    assert "BAICHUAN_SFT_WORLD=2:3" in first
    assert "--nnodes 2 --node_rank 0 --nproc_per_node 2 --master_addr a --master_port 2345 -m" in first
    assert "/v/python -m torch.distributed.run" in second and "--node_rank 1 --nproc_per_node 1" in second
    assert second.endswith("-m baichuan_sft.cli train --bf16 True")


@pytest.mark.slow
def test_torchrun_runs_this_hosts_command(worker, tmp_path):
    """The worker tells its phase to a directory that here no launcher has made."""
    env = {**os.environ, "BAICHUAN_SFT_STATUS": str(tmp_path)}
    flags = ["--mode", "torchrun", "--node_rank", 0, "--master_port", free_port(), worker]
    code, output = launch(tmp_path, *flags, "ok", env=env)
    assert code == 0, output
    assert "rank 0 of 2, world 1:2" in output and "rank 1 of 2, world 1:2" in output
    code, output = launch(tmp_path, *flags, "killed", env=env)
    assert code != 0


SRUN = """#!/bin/sh
# a stand-in: two tasks on this machine
echo "$@" > {log}
while [ "$1" != env ]; do shift; done
export SLURM_NTASKS=2 SLURM_NTASKS_PER_NODE=2
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" || exit $?
SLURM_PROCID=1 SLURM_LOCALID=1 "$@"
"""


def test_slurm_starts_one_task_per_rank(worker, tmp_path):
    tools = {"srun": SRUN.format(log=tmp_path / "srun"), "scontrol": "#!/bin/sh\necho node1\n"}
    (tmp_path / "bin").mkdir()
    for name, text in tools.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node1"}
    env["BAICHUAN_SFT_STATUS"] = str(tmp_path)
    code, output = launch(tmp_path, "--mode", "slurm", worker, "ok", env=env)
    assert code == 0, output
    assert "rank 0 of 2, world 1:2" in output and "rank 1 of 2, world 1:2" in output
    assert "--nodes 1 --ntasks 2 --ntasks-per-node 2 --kill-on-bad-exit=1" in (tmp_path / "srun").read_text()
    code, _ = launch(tmp_path, "--mode", "slurm", worker, "always", env=env)
    assert code != 0


def test_pdsh_quotes_what_a_shell_would_read(capsys, tmp_path, monkeypatch):
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("a slots=2\nb slots=2\n")
    monkeypatch.setenv("NCCL_DEBUG", "$(reboot) 5%h")
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".deepspeed_env").write_text("# mine\n\nMINE=1 2\n")
    assert main(["--mode", "pdsh", "--dry_run", "--hostfile", str(hostfile), "train", "--x", "a;b c"]) == 0
    line = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert "ServerAliveInterval=5" in line[0]
    remote = " ".join(line[line.index("a,b") + 1 :])
    assert "export NCCL_DEBUG='$(reboot) 5%%h'; " in remote and "export MINE='1 2'; " in remote
    assert remote.endswith("baichuan_sft.cli train --x 'a;b c'")
    assert (tmp_path / ".deepspeed_env").read_text() == "# mine\n\nMINE=1 2\n"
    hostfile.write_text("a slots=2\nb slots=2 port=23\n")
    with pytest.raises(UserError, match="line 2 of the hostfile needs --mode ssh"):
        main(["--mode", "pdsh", "--dry_run", "--hostfile", str(hostfile), "train"])


# --- compiled ops ------------------------------------------------------------------------------------


def test_a_lock_of_a_dead_build_is_removed_and_a_live_one_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("LOCAL_RANK", "0")
    for name in ("dead", "live"):
        (tmp_path / "py" / name).mkdir(parents=True)
    (tmp_path / "py" / "dead" / "lock").touch()
    with (tmp_path / "py" / "live" / "lock").open("w"):
        notices = ops_cache.use_ops_cache(["cpu_adam"])
        assert ops_cache.building(tmp_path) == ["live"]
    assert [path.parent.name for path in tmp_path.glob("*/*/lock")] == ["live"]
    assert notices == [
        f"{tmp_path}/py/dead/lock: left by a build that was killed, removed",
        "compiling cpu_adam for this host, about 2 min (once)",
    ]
    (tmp_path / "py" / "live" / "cpu_adam.so").touch()
    (tmp_path / "py" / "live" / "lock").unlink()
    assert ops_cache.use_ops_cache(["cpu_adam"]) == []


def test_the_directory_of_compiled_ops_is_the_hosts_own(tmp_path, monkeypatch):
    monkeypatch.setenv("BAICHUAN_SFT_CACHE", str(tmp_path))
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", "/mine")
    variables = ops_cache.variables()
    assert list(variables) == ["TORCH_EXTENSIONS_DIR"]
    assert socket.gethostname() in variables["TORCH_EXTENSIONS_DIR"]
    assert ops_cache.ops_root().is_relative_to(tmp_path)


def test_ranks_carry_the_mark_by_which_they_are_swept():
    child = subprocess.Popen(["sleep", "60"], env={**os.environ, "BAICHUAN_SFT_RUN": "mark-of-this-test"})
    try:
        assert marked("mark-of-this-test") == [child.pid]
    finally:
        child.kill()
        child.wait()
    assert json.dumps(marked("mark-of-this-test")) == "[]"


@pytest.mark.parametrize("killed", [False, True], ids=["second interrupt", "killed"])
def test_ranks_in_sessions_of_their_own_end_with_their_launcher(tmp_path, killed):
    """torchrun gives each rank one, and ends none where it is killed."""
    begun, stop = tmp_path / "begun", Stop()
    program = "import signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    program += "open(sys.argv[1], 'w').close(); time.sleep(600)"
    then = f"until [ -e '{begun}' ]; do sleep 0.1; done; kill -9 $$" if killed else "sleep 60"
    rank = [sys.executable, "-c", program, str(begun)]

    def interrupt():
        try:
            wait_for("rank", begun.exists)
        finally:
            stop.first, stop.again = signal.SIGINT, True

    interrupting = threading.Thread(target=interrupt)
    if not killed:
        interrupting.start()
    code = modes.run_one(["sh", "-c", f'setsid "$@" & {then}', "sh", *rank], os.environ, stop)
    assert code == (5 if killed else 130)
    wait_for("end", lambda: " ".join(rank) not in map(machine.command_line, machine.processes()), seconds=5)
    if not killed:
        interrupting.join()


def test_a_log_that_is_deleted_is_read_on(tmp_path):
    program = "import time; print('before', flush=True); time.sleep(1); print('after')"
    rank = Rank(0, 0, tmp_path / "rank-0.log")
    rank.start([sys.executable, "-c", program], os.environ)
    wait_for("word", lambda: "before" in rank.tail())
    rank.log.unlink()
    assert rank.process.wait(60) == 0
    assert rank.new_output() == "before\nafter\n" and rank.tail().endswith("after")
    rank.remove_status()


def test_a_store_that_is_gone_is_known_by_its_words():
    """torch's own, of a rank 0 that was killed before there was a group."""
    server = "import sys, time; from torch.distributed import TCPStore\n"
    server += "store = TCPStore('127.0.0.1', int(sys.argv[1]), is_master=True, wait_for_workers=False)\n"
    server += "print('ready', flush=True); time.sleep(600)"
    port = free_port()
    with subprocess.Popen([sys.executable, "-c", server, str(port)], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        store = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
        store.add("data is read", 1)
        process.kill()
        process.wait()
    for call in (
        lambda: store.add("data is read", 0),
        lambda: store.get("watch"),
        lambda: store.check(["x"]),
    ):
        with pytest.raises(RuntimeError) as caught:
            call()
        assert LOST_PEER.search(str(caught.value)) and outcome.LOST_PEER.search(str(caught.value))
