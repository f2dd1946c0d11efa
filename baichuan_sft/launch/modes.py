"""The other ways to start the same ranks, and what `--dry_run` shows of each."""

from __future__ import annotations

import os
import secrets
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import partial

from baichuan_sft import machine
from baichuan_sft.errors import EnvironmentFault, UserError
from baichuan_sft.hosts import module_words
from baichuan_sft.launch import pdsh, screen
from baichuan_sft.launch.environment import shown
from baichuan_sft.launch.fleet import AGENT
from baichuan_sft.launch.outcome import span
from baichuan_sft.launch.ranks import MARK, sweep
from baichuan_sft.launch.supervise import Job, Stop

PORT = 29500  # where none can be looked for on the first host
# SLURM's variables of a task become torch's; ":?" ends a task that lacks one.
SLURM_TASK = "exec env RANK=${SLURM_PROCID:?} LOCAL_RANK=${SLURM_LOCALID:?} WORLD_SIZE=${SLURM_NTASKS:?} "
SLURM_TASK += 'LOCAL_WORLD_SIZE=${SLURM_NTASKS_PER_NODE:?} "$@"'


def run(mode: str, job: Job, *, node_rank: int | None, dry_run: bool, stop: Stop) -> int:
    """Launch, or show, in any mode but ssh."""
    if mode == "pdsh":
        return pdsh.launch(job, dry_run=dry_run, stop=stop)
    words = slurm_words(job) if mode == "slurm" else torchrun_words(job, node_rank or 0)
    if mode == "torchrun" and (node_rank is None or dry_run):
        for rank, host in enumerate(job.hosts):
            if node_rank in (None, rank):
                print(f"# {host.name}, in {host.workdir or os.getcwd()}")
                print(shlex.join(torchrun_words(job, rank)) + "\n")
        return 0
    if dry_run:
        print(shlex.join(words))
        return 0
    return run_one(words, {**os.environ, **job.environment}, stop)


def show_ssh(job: Job) -> None:
    """The plan of the ssh mode on stdout: what starts where, quoted for a shell."""
    print(f"# {job.size}; logs in {job.log_dir}/rank-N.log on each host")
    where = f"address {job.address or 'found at the start'}, port {job.port or 'a free one'}"
    print(f"# the first leads; {where}")
    first = 0
    for host in job.hosts:
        print(f"\n# {host.name}, rank {span(range(first, first + host.slots))}: the agent")
        print(shlex.join(module_words(host, AGENT)))
        print("# which starts each rank, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set")
        print(shlex.join([host.python or sys.executable, *job.command]))
        first += host.slots
    print("\n# (--mode torchrun prints commands to start by hand)\n# environment that goes along")
    for name, value in sorted(job.environment.items()):
        print(shown(name, value))


def torchrun_words(job: Job, node_rank: int) -> list[str]:
    """Torch's own launcher, for one host."""
    host = job.hosts[node_rank]
    return [
        *("env", f"BAICHUAN_SFT_WORLD={len(job.hosts)}:{job.world}"),
        *(host.python or sys.executable, "-m", "torch.distributed.run"),
        *("--nnodes", str(len(job.hosts)), "--node_rank", str(node_rank)),
        *("--nproc_per_node", str(host.slots)),
        *("--master_addr", job.address or ("127.0.0.1" if len(job.hosts) == 1 else job.hosts[0].name)),
        *("--master_port", str(job.port or PORT)),
        *job.command,
    ]


def slurm_words(job: Job, environment: Mapping[str, str] = os.environ) -> list[str]:
    """One task per rank through srun.

    Raises:
        UserError: outside an allocation.
        EnvironmentFault: scontrol cannot name the nodes.
    """
    nodes = environment.get("SLURM_JOB_NODELIST")
    if nodes is None:
        way = "run it inside an allocation (sbatch, or salloc)"
        raise UserError(f"--mode slurm: SLURM_JOB_NODELIST is not set; {way}.")
    try:
        named = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True)
    except FileNotFoundError:
        raise EnvironmentFault("--mode slurm: there is no scontrol on this machine.") from None
    names = named.stdout.split()
    if named.returncode or not names:
        raise EnvironmentFault(f"scontrol show hostnames {nodes}: {named.stderr.strip() or 'names no host'}")
    each = job.hosts[0].slots
    world = len(names) * each
    return [
        *("srun", "--nodes", str(len(names)), "--ntasks", str(world), "--ntasks-per-node", str(each)),
        *("--kill-on-bad-exit=1", "--label", "--export=ALL"),
        *("env", f"BAICHUAN_SFT_WORLD={len(names)}:{world}", f"MASTER_ADDR={job.address or names[0]}"),
        *(f"MASTER_PORT={job.port or PORT}", "sh", "-c", SLURM_TASK, "sh", sys.executable, *job.command),
    ]


def run_one(words: list[str], environment: Mapping[str, str], stop: Stop) -> int:
    """Run another launcher to its end; the signals that ask for an end go on to it."""
    screen.note(shlex.join(words))
    mark = secrets.token_hex(8)  # torchrun gives each rank a session of its own
    try:
        die = partial(machine.die_with_parent, signal.SIGTERM)  # it ends its ranks then
        process = subprocess.Popen(
            words, env={**environment, MARK: mark}, start_new_session=True, preexec_fn=die
        )
    except FileNotFoundError:
        raise EnvironmentFault(f"{words[0]}: no such program on this machine.") from None
    stop.armed, asked = True, False
    while process.poll() is None:
        if stop.again:
            os.killpg(process.pid, signal.SIGKILL)
            sweep(mark)
        elif stop.first is not None and not asked:
            asked = True
            process.send_signal(signal.SIGTERM)
            screen.note("the ranks save and end; Ctrl-C (again) ends them at once, unsaved")
        time.sleep(0.1)
    code = process.returncode
    if code < 0:  # killed, it has ended none of its ranks
        sweep(mark)
    screen.note(f"{words[0] if words[0] != 'env' else 'torchrun'} ended with exit code {code}")
    if stop.first is not None:
        return Stop.code(stop.first)
    return code if code >= 0 else 5  # killed by a signal is no success
