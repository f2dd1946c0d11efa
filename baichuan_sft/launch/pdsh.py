"""DeepSpeed's own launcher over pdsh; our agents beside it find the address and end what is left."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import time
from contextlib import closing
from pathlib import Path

from baichuan_sft.errors import EnvironmentFault, UserError
from baichuan_sft.hosts import SSH_OPTIONS
from baichuan_sft.launch import screen
from baichuan_sft.launch.fleet import Fleet
from baichuan_sft.launch.meeting import ANSWER_SECONDS, meet
from baichuan_sft.launch.ranks import MARK
from baichuan_sft.launch.supervise import END_SECONDS, Job, Stop

USER_FILES = (Path("~/.deepspeed_env"), Path(".deepspeed_env"))


def launch(job: Job, *, dry_run: bool, stop: Stop) -> int:
    """Run the job through DeepSpeed's launcher.

    Raises:
        UserError: what pdsh cannot do; EnvironmentFault: no pdsh, or hosts that cannot meet.
    """
    special = [host for host in job.hosts if host.port or host.user or host.python or host.workdir]
    if special:
        where = f"line {special[0].line} of the hostfile needs --mode ssh (port=, user=, python=, workdir=)"
        raise UserError(f"--mode pdsh starts all hosts alike; {where}.")
    if dry_run:
        words, environment = pdsh_words(job, job.address or job.hosts[0].name, job.port or 29500, {})
        print(f"PDSH_SSH_ARGS_APPEND={shlex.quote(environment['PDSH_SSH_ARGS_APPEND'])} {shlex.join(words)}")
        return 0
    if not shutil.which("pdsh"):
        raise EnvironmentFault("there is no pdsh on this machine; install it, or use --mode ssh.")
    import deepspeed.launcher.runner  # noqa: F401  takes seconds, in which no agent would hear a beat

    with closing(Fleet(job.hosts, job.silence)) as fleet:
        meeting = meet(fleet, job.files, job.address, job.port)
        fleet.ask("release")
        fleet.gather("released", ANSWER_SECONDS)
        extra = {MARK: fleet.run_id, "BAICHUAN_SFT_WORLD": meeting.world}
        shared = set(meeting.interfaces.values())
        if len(shared) == 1 and "GLOO_SOCKET_IFNAME" not in job.environment:  # one line of exports serves all
            extra["GLOO_SOCKET_IFNAME"] = str(shared.pop())
        words, environment = pdsh_words(job, meeting.address, meeting.port, extra)
        screen.note(f"{job.size}, {meeting.address} port {meeting.port}, pdsh")
        process = subprocess.Popen(words, env=environment, start_new_session=True, stdin=subprocess.DEVNULL)
        stop.armed = True
        try:
            return watch(process, fleet, stop)
        finally:
            stop.armed = False


def watch(process: subprocess.Popen[bytes], fleet: Fleet, stop: Stop) -> int:
    """Until pdsh has ended, a host is lost, or a second signal came; then nothing of the run is left."""
    asked = False
    while process.poll() is None and not stop.again and not any(link.lost for link in fleet.links):
        fleet.turn()
        if stop.first is not None and not asked:
            asked = True
            fleet.ask("signal", number=int(signal.SIGTERM))
            screen.note("the ranks save and end; Ctrl-C (again) ends them at once, unsaved")
    lost = [f"{link.name}: {link.lost}" for link in fleet.links if link.lost]
    fleet.end(END_SECONDS)
    limit = time.monotonic() + 1
    while process.poll() is None and time.monotonic() < limit:
        time.sleep(0.05)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for line in lost:
        screen.say(f"launch: host lost: {line}", screen.RED)
    screen.note(f"pdsh ended with exit code {process.returncode}")
    if stop.first is not None:
        return Stop.code(stop.first)
    if lost or process.returncode < 0:  # DeepSpeed's own runner would end with 0 after a signal
        return 5
    return process.returncode


def pdsh_words(job: Job, address: str, port: int, extra: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    """Argv and environment of pdsh, as DeepSpeed's runner builds them, with every word quoted."""
    from deepspeed.launcher import runner
    from deepspeed.launcher.multinode_runner import PDSHRunner

    module, script, *flags = job.command if job.command[0] == "-m" else ["", *job.command]
    options = ["--master_addr", address, "--master_port", str(port), "--launcher", "pdsh", "--no_local_rank"]
    args = runner.parse_args([*options, *(["--module"] if module else []), script, *flags])
    resources = {host.name: list(range(host.slots)) for host in job.hosts}
    build = PDSHRunner(args, runner.encode_world_info(resources))
    # The remote shell reads these, and pdsh its own % before it; DeepSpeed quotes blanks alone.
    build.user_arguments = [quoted(word) for word in flags]
    build.exports = {name: quoted(value) for name, value in (job.environment | extra | own_exports()).items()}
    keep_alive = " ".join(f"-o {name}={value}" for name, value in SSH_OPTIONS.items())
    given = os.environ.get("PDSH_SSH_ARGS_APPEND", "")
    environment = {**os.environ, "PDSH_SSH_ARGS_APPEND": f"{given} {keep_alive}".strip()}
    words, _, environment = build.get_cmd(environment, resources)
    return words, environment


def quoted(word: str) -> str:
    return shlex.quote(word).replace("%", "%%")


def own_exports() -> dict[str, str]:
    """The lines of the user's ~/.deepspeed_env and ./.deepspeed_env, of which DeepSpeed reads NAME=value."""
    found = {}
    for path in USER_FILES:
        path = path.expanduser()
        for line in path.read_text().splitlines() if path.is_file() else ():
            name, equals, value = line.strip().partition("=")
            if equals and not name.startswith("#"):
                found[name] = value
    return found
