"""``baichuan-sft web``: a page to talk to a model, or to two side by side.

The models are loaded here before anything is served, so what is wrong with them is one line and an exit
code; the page (web_page.py) finds them in this module, which every tab shares.
"""

from __future__ import annotations

import functools
import ipaddress
import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from baichuan_sft.arguments import Parser, number
from baichuan_sft.errors import EnvironmentFault, UserError
from baichuan_sft.infer import chat
from baichuan_sft.quantization import add_model_options

EXAMPLE = """baichuan-sft web out
  baichuan-sft web out/checkpoint-100 --compare out/checkpoint-50
  baichuan-sft web Baichuan2-13B-Chat --dtype bf16 --quantize nf4 --port 8600"""
PAGE = Path(__file__).with_name("web_page.py")
MAX_UPLOAD_MB = 20
# Given on the command line, which overrides the user's own Streamlit configuration.
SAFE = {
    "server.headless": "true",  # opens no browser, asks for no e-mail address
    "server.enableCORS": "true",  # of the WebSocket: pages of other origins are refused
    "server.enableXsrfProtection": "true",
    "server.enableStaticServing": "false",
    "server.fileWatcherType": "none",
    "server.maxUploadSize": str(MAX_UPLOAD_MB),
    "browser.gatherUsageStats": "false",
    "client.toolbarMode": "minimal",  # no "Deploy"
    "client.showErrorDetails": "none",  # a traceback belongs to the terminal
    "theme.primaryColor": "#e8590c",
}
HOSTS = ("127.0.0.1", "localhost", "::1")  # of the Host header: no name that an attacker's DNS points here
LOCK = Lock()  # one answer at a time: adapters are switched off and seeds set for a whole process


@dataclass(frozen=True)
class Side:
    """A model that answers on the page.

    Attributes:
        bare: its adapter is switched off while it answers.
    """

    name: str
    model: Any
    tokenizer: Any
    bare: bool = False


def build_parser() -> Parser:
    parser = Parser(
        prog="baichuan-sft web",
        description="Talk to a model in the browser. An adapter can be compared with its base as it is.",
        example=EXAMPLE,
    )
    port = number(int, "a port from 1 to 65535", lambda n: 1 <= n <= 65535)
    parser.add_argument("path", metavar="DIR", help="directory of a model, an adapter or a checkpoint")
    parser.add_argument("--compare", metavar="DIR2", help="another one, which answers beside it")
    add_model_options(parser)
    parser.add_argument("--host", default="127.0.0.1", help="a loopback address (%(default)s)")
    parser.add_argument("--port", type=port, default=8501, metavar="N", help="(%(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Load the models and serve the page until Ctrl-C; see ``--help``.

    Args:
        argv: the arguments after ``web``; None takes those of the process.
    Returns:
        The exit code, 0.
    Raises:
        UserError: wrong options, no Baichuan model there, an address others can reach, a taken port.
        EnvironmentFault: no such device, or Streamlit is missing or too old.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = build_parser().parse_args(argv)
    check_address(args.host, args.port)
    check_streamlit()
    for side in sides(*argv):
        if side.bare:
            continue
        print(f"{side.name}: {chat.describe(side.model)}", file=sys.stderr)
    from streamlit.web import cli

    flags = {**SAFE, "server.address": args.host, "server.port": str(args.port)}
    words = [f"--{name}={value}" for name, value in flags.items()]
    words += [f"--server.allowedHosts={name}" for name in HOSTS]
    try:
        cli.main(["run", *words, str(PAGE), "--", *argv], prog_name="baichuan-sft web", standalone_mode=False)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def check_address(host: str, port: int) -> None:
    """
    Raises:
        UserError: other machines could reach it, or another program has the port.
    """
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise UserError(
            f"--host {host}: the page has no password, so only this machine may reach it. Leave --host out; "
            f"on the other machine run `ssh -N -L {port}:127.0.0.1:{port} {socket.gethostname()}` and open "
            f"http://127.0.0.1:{port} there."
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # as the server does: not one in TIME_WAIT
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(f"--port {port}: {os.strerror(error.errno or 0)}; pass another.") from None


def check_streamlit() -> None:
    """
    Raises:
        EnvironmentFault: Streamlit is missing, or has no check of the Host header.
    """
    try:
        import streamlit
        from streamlit import config
    except ImportError:
        raise EnvironmentFault("the page needs Streamlit: pip install 'baichuan-sft[web]'.") from None
    if "server.allowedHosts" not in config.get_config_options() or not hasattr(streamlit, "bottom"):
        raise EnvironmentFault(
            f"Streamlit {streamlit.__version__} is too old: it cannot refuse requests of other sites "
            "(server.allowedHosts) or has no st.bottom; pip install -U streamlit."
        )


@functools.cache
def sides(*argv: str) -> tuple[Side, ...]:
    """The models of a command line, loaded once: the first, and what it can be compared with.

    Raises:
        UserError: no Baichuan model there. EnvironmentFault: no such device.
    """
    from baichuan_sft.checkpoint import base_of

    args = build_parser().parse_args(list(argv))
    name, other = _names(args.path, args.compare)
    first = Side(name, *_load(args, args.path))
    if args.compare:
        return first, Side(other, *_load(args, args.compare))
    if hasattr(first.model, "disable_adapter"):
        return first, Side(Path(base_of(args.path)).name, first.model, first.tokenizer, bare=True)
    return (first,)


def _load(args: Any, path: str) -> tuple[Any, Any]:
    words = ["--dtype", args.dtype]
    words += ["--quantize", args.quantize] if args.quantize else []
    words += ["--device", args.device] if args.device else []
    return chat.load(chat.build_parser().parse_args([*words, "--", path]))


def _names(path: str, other: str | None) -> tuple[str, str]:
    """Last parts of the two paths, or all of them where those are equal."""
    first, second = (Path(p or "").resolve() for p in (path, other))
    return (first.name, second.name) if first.name != second.name else (str(first), str(second))
