"""`baichuan-sft launch`: one command for one GPU, one host or many."""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from baichuan_sft.arguments import at_least_1, number
from baichuan_sft.errors import UserError, pick
from baichuan_sft.hosts import Host, read_hostfile
from baichuan_sft.launch import modes
from baichuan_sft.launch.environment import forwarded
from baichuan_sft.launch.restart import run_with_restarts
from baichuan_sft.launch.supervise import Job, Stop

MODES = {
    "ssh": "our own agents, over ssh to other hosts: all is watched, ended and restarted together",
    "pdsh": "DeepSpeed's launcher over pdsh, with ssh keep-alives and the environment made for it",
    "torchrun": "no ssh: prints one torchrun command per host; with --node_rank K runs the one of host K",
    "slurm": "inside an allocation: one task per rank through srun (tried with a stand-in of srun only)",
}
# What a run reads on every host, by the flags that name it.
READ_FLAGS = ("data_path", "eval_data_path", "model_name_or_path", "deepspeed", "config")

HOSTFILE = "lines of 'HOST slots=NUMBER', see hostfile.example; without: this machine"
RESTARTS = "after a failure that may pass, go on from the last checkpoint on the hosts left, N times in all"
whole = number(int, "a whole number from 0", lambda n: n >= 0)
port = number(int, "a port (1 to 65535)", lambda n: 0 < n < 65536)
# flag, what its value is called, what reads it, its default, its help
FLAGS: tuple[tuple[str, str, Callable[[str], Any], Any, str], ...] = (
    ("hostfile", "FILE", str, None, HOSTFILE),
    ("num_processes", "N", at_least_1, None, "without --hostfile: processes here; default its GPUs, or 1"),
    ("mode", "MODE", str, "ssh", f"{', '.join(MODES)}; default ssh"),
    ("max_restarts", "N", whole, 0, RESTARTS),
    ("master_addr", "ADDRESS", str, None, "of the first host; default: found, as the others reach it"),
    ("master_port", "PORT", port, 0, "on the first host; default: a free one"),
    ("log_dir", "DIR", str, None, "one log per rank, on its host; default OUTPUT_DIR/logs"),
    ("peer_timeout", "SECONDS", at_least_1, 20, "silence after which a host is lost; 20"),
    ("node_rank", "K", whole, None, "with --mode torchrun: run the command of host K (from 0) here"),
)
ENV = "pass this environment variable on too; repeatable"
DRY_RUN = "print the plan and the exact command per host, start nothing"

EXAMPLE = """modes:
{modes}

examples:
  baichuan-sft launch train --model_name_or_path Baichuan2-7B-Base --data_path data.json --output_dir out
  baichuan-sft launch --hostfile hostfile --dry_run train ...
  baichuan-sft launch --hostfile hostfile --max_restarts 3 train ...

The first Ctrl-C or SIGTERM lets the ranks save and end (exit code 130 or 143), a second Ctrl-C ends them
at once. Exit codes: 0 all ranks ended well; 2 flags or files; 3 a machine or connection; 4 a checkpoint;
5 a rank or host lost; 6 numbers; 130 interrupted; 143 saved after SIGTERM; else the failing rank's own."""


def main(argv: list[str]) -> int:
    """Launch as the flags say.

    Returns:
        the exit code: 0 only where every rank ended with 0.
    """
    args = build_parser().parse_args(argv)
    known = with_config(args.flags)
    columns = str(shutil.get_terminal_size((100, 24)).columns)
    job = Job(
        hosts=hosts_of(args),
        command=rank_command(args.command, args.flags),
        environment=forwarded(os.environ, args.env) | {"PYTHONUNBUFFERED": "1", "COLUMNS": columns},
        files=files_of(known),
        log_dir=args.log_dir or str(Path(flag(known, "output_dir") or "launch") / "logs"),
        address=args.master_addr,
        port=args.master_port,
        rendezvous_seconds=seconds(flag(known, "rendezvous_timeout")),
        silence=args.peer_timeout,
    )
    # three files per host
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    stop = Stop()
    stop.install()
    if args.mode != "ssh":
        return modes.run(args.mode, job, node_rank=args.node_rank, dry_run=args.dry_run, stop=stop)
    if args.dry_run:
        modes.show_ssh(job)
        return 0
    return run_with_restarts(job, args.max_restarts, stop)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):  # type: ignore[override]
        raise UserError(f"{message}. See baichuan-sft launch --help.")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="baichuan-sft launch",
        usage="%(prog)s [--hostfile FILE] [flags] train <flags of train>",
        description="Train on one or many hosts; nothing of a run outlives its failure.",
        epilog=EXAMPLE.format(modes="\n".join(f"  {name:8}  {text}" for name, text in MODES.items())),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for name, metavar, kind, default, text in FLAGS:
        parser.add_argument(f"--{name}", metavar=metavar, type=kind, default=default, help=text)
    parser.add_argument("--env", action="append", default=[], metavar="NAME", help=ENV)
    parser.add_argument("--dry_run", action="store_true", help=DRY_RUN)
    parser.add_argument("command", metavar="train", help="'train', or a script of yours (*.py)")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="its flags")
    return parser


def hosts_of(args: argparse.Namespace) -> list[Host]:
    """The hosts of the hostfile, or this machine."""
    pick("mode", args.mode, MODES)
    if args.node_rank is not None and args.mode != "torchrun":
        raise UserError("--node_rank is for --mode torchrun; the other modes start every host themselves.")
    if args.max_restarts and args.mode != "ssh":
        why = f"--mode {args.mode} does not see which hosts are left"
        raise UserError(f"--max_restarts needs --mode ssh; {why}.")
    if args.mode == "slurm" and args.hostfile is not None:
        raise UserError("--mode slurm takes the hosts of the allocation; leave --hostfile out.")
    if args.hostfile is None:
        return [Host("localhost", args.num_processes or local_devices())]
    if args.num_processes is not None:
        raise UserError("--num_processes and --hostfile contradict: slots= in the hostfile says how many.")
    hosts = read_hostfile(args.hostfile)
    if args.node_rank is not None and args.node_rank >= len(hosts):
        held = f"{args.hostfile} has {len(hosts)} hosts"
        raise UserError(f"--node_rank {args.node_rank}: {held}, counted from 0.")
    return hosts


def local_devices() -> int:
    """How many GPUs this process may use, at least 1 for a CPU."""
    import torch

    return max(1, torch.cuda.device_count())


def rank_command(command: str, flags: list[str]) -> list[str]:
    """What follows the Python of each rank."""
    if command == "train":
        return ["-m", "baichuan_sft.cli", "train", *flags]
    if command.endswith(".py"):
        if not Path(command).is_file():
            raise UserError(f"{command}: no such file; name a script of yours, or 'train'.")
        return [str(Path(command)), *flags]
    raise UserError(f"unknown command {command!r}; launch runs 'train', or a script of yours (*.py).")


def flag(flags: list[str], name: str) -> str | None:
    """The last value of a flag among those of `train`, ``--name value`` or ``--name=value``."""
    found = None
    for word, following in zip(flags, [*flags[1:], ""]):
        if word == f"--{name}":
            found = following
        elif word.startswith(f"--{name}="):
            found = word.partition("=")[2]
    return found


def with_config(flags: list[str]) -> list[str]:
    """The flags after those of the --config file among them; what is wrong with it, `train` says."""
    with contextlib.suppress(OSError, UnicodeDecodeError, yaml.YAMLError):
        entries = yaml.safe_load(Path(flag(flags, "config") or os.devnull).read_text(encoding="utf-8-sig"))
        if isinstance(entries, dict):
            return [*(f"--{name}={value}" for name, value in entries.items()), *flags]
    return flags


def seconds(text: str | None) -> float:
    """Of --rendezvous_timeout; a wrong one is refused by `train`."""
    try:
        return float(text or 120)
    except ValueError:
        return 120.0


def files_of(flags: list[str]) -> list[str]:
    """Files and directories that the flags name and every host reads."""
    named = [path for name in READ_FLAGS for path in (flag(flags, name) or "").split(",")]
    return [path for path in dict.fromkeys(named) if path and Path(path).exists()]
