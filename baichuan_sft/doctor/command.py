"""``baichuan-sft doctor``: can these hosts train together? A table, each fault's repair, exit code 0 or 3."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from baichuan_sft.arguments import Parser, at_least_1, number
from baichuan_sft.doctor import report
from baichuan_sft.doctor.checks import CHECKS, judge
from baichuan_sft.doctor.facts import FACTS
from baichuan_sft.doctor.rounds import examine
from baichuan_sft.errors import EnvironmentFault, pick
from baichuan_sft.hosts import Host, read_hostfile
from baichuan_sft.plan.flops import Shape, num_parameters, shape_of
from baichuan_sft.plan.simulate import checkpoint_bytes, num_trained

EXAMPLE = """baichuan-sft doctor
  baichuan-sft doctor --hostfile hostfile --model_name_or_path Baichuan2-7B-Base \\
      --data_path data/belle_chat.json --output_dir out --deepspeed ds_config.json
  baichuan-sft doctor --hostfile hostfile --skip bandwidth,rendezvous --json"""
USUAL_MODEL = "baichuan2-7b"  # for the bandwidth's verdict where no model is named


def truth(text: str) -> bool:
    return pick("value", text.lower(), {"true": True, "false": False})


a_port = number(int, "a port from 1 to 65534", lambda n: 1 <= n <= 65534)
# flag, what its value is called, what reads it, its default, its help
FLAGS: tuple[tuple[str, str, Callable[[str], Any], Any, str], ...] = (
    ("hostfile", "FILE", str, None, "hosts to check over ssh; without it this machine alone"),
    ("model_name_or_path", "DIR", str, None, "must be the same on all hosts"),
    ("data_path", "FILES", str, None, "as for train; must be the same on all hosts"),
    ("output_dir", "DIR", str, None, "writable, shared or not, with room for checkpoints"),
    ("deepspeed", "FILE", str, None, "must be the same on all hosts"),
    ("use_lora", "True|False", truth, False, "for the room needed"),
    ("save_total_limit", "N", at_least_1, 1, "checkpoints kept, for the room; default 1"),
    ("master_port", "P", a_port, 29500, "default 29500"),
    ("skip", "NAMES", str, "", f"checks to leave out, of {', '.join(CHECKS)}"),
)


def main(argv: list[str] | None = None) -> int:
    """
    Returns:
        0 where no check failed (warnings may have been), else 3.
    Raises:
        UserError: wrong options, or a fault in the hostfile. EnvironmentFault: no ssh on this machine.
    """
    args = parser().parse_args(sys.argv[1:] if argv is None else argv)
    skipped = [word for word in args.skip.split(",") if word]
    for word in skipped:
        pick("check", word, CHECKS)
    hosts = read_hostfile(args.hostfile) if args.hostfile else [Host("localhost", 0)]
    wanted = [name for name in CHECKS if name not in skipped]
    try:
        table = diagnose(hosts, asked(args, len(hosts)), wanted)
    except FileNotFoundError as error:
        raise EnvironmentFault(f"{error.filename}: not found; install it (Debian: openssh-client)") from None
    names = [host.name for host in hosts]
    if args.json:
        print(report.as_json(table, names))
    else:
        report.show(table, names)
    return 3 if report.count(table, "fail") else 0


def parser() -> Parser:
    made = Parser(
        prog="baichuan-sft doctor",
        description="Whether this machine, or the hosts of a file, can train (together).",
        example=EXAMPLE,
    )
    for name, metavar, kind, default, text in FLAGS:
        made.add_argument(f"--{name}", metavar=metavar, type=kind, default=default, help=text)
    made.add_argument("--json", action="store_true", help="the findings as data")
    return made


def asked(args: Any, num_hosts: int) -> dict[str, Any]:
    """What the hosts are asked, and what the checks hold it against."""
    ask: dict[str, Any] = {
        "model": args.model_name_or_path,
        "data": args.data_path,
        "output": args.output_dir,
        "config": args.deepspeed,
        "port": args.master_port,
        "lora": args.use_lora,
    }
    shape = shape_of(args.model_name_or_path or USUAL_MODEL)
    method = "lora" if args.use_lora else "full"
    if args.model_name_or_path:
        ask["needed"] = room(shape, method, args.save_total_limit)
    ask["traffic"] = payloads(shape, num_hosts)
    return ask


def room(shape: Shape, method: str, kept: int) -> float:
    """Bytes of the checkpoints kept, the one that is written before the oldest goes, and the result."""
    return (kept + 1) * checkpoint_bytes(shape, method, "zero2") + 2.0 * num_trained(shape, method)


def payloads(shape: Shape, num_hosts: int) -> dict[str, float]:
    """Bytes that each host sends in an update of one micro-step, by how the model is shared.

    Two per number: gradients out and weights back; under ZeRO-3 all weights twice, for forward and backward.
    """
    share = (num_hosts - 1) / num_hosts  # of a ring
    trained, whole = 2 * num_trained(shape, "lora"), 2 * num_parameters(shape)
    return {"LoRA": share * 2 * trained, "ZeRO-1/2": share * 2 * whole, "ZeRO-3": share * 3 * whole}


def diagnose(hosts: list[Host], ask: dict[str, Any], wanted: list[str]) -> report.Cells:
    """Cells by check and host; nothing runs on any host afterwards."""
    facts = {CHECKS[name].fact for name in wanted if not CHECKS[name].asked or ask.get(CHECKS[name].asked)}
    facts |= {"names", "devices"} & set(FACTS)  # the ports' repairs name addresses, the bandwidth's devices
    meets = bool({"rendezvous", "bandwidth"} & set(wanted))
    ports = "port" in wanted or bool({"output", "disk"} & set(wanted) and ask.get("output"))
    world = examine(hosts, ask, sorted(facts & set(FACTS)), ports=ports, rendezvous=meets)
    return judge(world, wanted)
