"""``baichuan-sft serve``: an OpenAI-compatible API for a model and its adapters.

FastAPI on uvicorn with a decode loop of our own (server_engine.py), not ``transformers serve``: that one
refuses ``n`` and ``logprobs``, answers errors in another schema, and has no token, queue bound or body limit.
Its continuous batching takes one seed and one setting for all requests, and packs them into one row over a
paged cache, where ALiBi's bias, made from places in the row, would measure from one request to another.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import sys
from pathlib import Path

from baichuan_sft.arguments import Parser, at_least_1, number
from baichuan_sft.errors import EnvironmentFault, UserError, first_line
from baichuan_sft.infer.chat import describe
from baichuan_sft.quantization import add_model_options

KEY_VARIABLE = "BAICHUAN_SFT_API_KEY"
MIN_KEY = 16  # characters
LOOPBACK_NAMES = {"localhost", "127.0.0.1", "::1"}
EXAMPLE = """baichuan-sft serve out
  baichuan-sft serve Baichuan2-7B-Chat --adapter poems=out/poems --adapter law=out/law --dtype bf16
  baichuan-sft serve out --host 0.0.0.0 --allow_host model.example.org --api_key_file key.txt

  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"model": "out", "messages": [{"role": "user", "content": "Hello"}], "stream": true}'"""


def build_parser() -> Parser:
    parser = Parser(
        prog="baichuan-sft serve",
        description="Answer OpenAI's chat completions and completions over HTTP, on this machine only unless "
        f"told otherwise. Clients must show the token in --api_key_file or ${KEY_VARIABLE}, if one is set.",
        example=EXAMPLE,
    )
    port = number(int, "a port from 0 to 65535", lambda n: 0 <= n <= 65535)
    body = number(int, "a whole number of at least 1024", lambda n: n >= 1024)
    parser.add_argument("path", metavar="DIR", help="directory of a model, an adapter or a checkpoint")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="serve an adapter of the same base too, under this model name; may be repeated",
    )
    parser.add_argument("--name", help="model name of DIR (its last part)")
    add_model_options(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=port, default=8000, help="0 takes a free one (%(default)s)")
    parser.add_argument("--api_key_file", metavar="FILE", help=f"token, before ${KEY_VARIABLE}")
    parser.add_argument(
        "--allow_host", action="append", default=[], metavar="NAME", help="a name of this server; repeatable"
    )
    parser.add_argument(
        "--allow_origin",
        action="append",
        default=[],
        metavar="https://NAME",
        help="web pages from there may call this server; repeatable",
    )
    parser.add_argument("--max_batch", type=at_least_1, default=8, help="answers at once (%(default)s)")
    parser.add_argument("--max_queue", type=at_least_1, default=64, help="requests that wait (%(default)s)")
    parser.add_argument("--max_body", type=body, default=2**20, help="of a request, bytes (%(default)s)")
    parser.set_defaults(compile=False, max_new_tokens=None, seed=None)  # what ``load`` asks for beside these
    return parser


def main(argv: list[str] | None = None) -> int:
    """Serve until a signal comes; see ``--help``.

    Args:
        argv: the arguments after ``serve``; None takes those of the process.
    Returns:
        The exit code, 0.
    Raises:
        UserError: wrong options, or no Baichuan model there. EnvironmentFault: a missing library, no such
            device, an address that cannot be bound.
    """
    args = build_parser().parse_args(argv)
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise EnvironmentFault(f"serve needs {error.name}: pip install 'baichuan-sft[serve]'") from None
    from baichuan_sft.infer.server_app import build_app
    from baichuan_sft.infer.server_gate import Limits, Server
    from baichuan_sft.infer.server_model import load_engine
    from baichuan_sft.infer.server_types import MAX_N

    largest = min(args.max_batch, MAX_N)
    if args.max_queue < largest:
        raise UserError(
            f"--max_queue {args.max_queue}: one request may have {largest} prompts, which must all find a "
            f"place; pass --max_queue {largest} or more."
        )
    token = read_token(args.api_key_file)
    check_exposed(args.host, token)
    hosts = {*LOOPBACK_NAMES, args.host.lower(), *map(str.lower, args.allow_host)}
    if args.host in ("0.0.0.0", "::"):
        hosts.add("*")  # by number: no page can rebind a number
    limits = Limits(frozenset(hosts), frozenset(args.allow_origin), token, args.max_body)
    listener = bind(args.host, args.port)
    engine = load_engine(args)
    server = Server(build_app(engine, limits), engine.close)
    host = f"[{args.host}]" if ":" in args.host else args.host
    address = f"http://{host}:{listener.getsockname()[1]}/v1"
    print(
        f"{describe(engine.peft)}\nserving {', '.join(engine.adapters)} at {address}",
        file=sys.stderr,
        flush=True,
    )
    server.run(sockets=[listener])
    return 0


def read_token(path: str | None) -> str | None:
    """The token clients must show, from a file or the environment; None where neither is given.

    Raises:
        UserError: not readable, or too short to be a secret. The message does not hold it.
    """
    try:
        token = (
            os.environ.get(KEY_VARIABLE) if path is None else Path(path).read_text(encoding="ascii").strip()
        )
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--api_key_file {path}: {first_line(error)}") from None
    if token is not None and not re.fullmatch(rf"[!-~]{{{MIN_KEY},}}", token):
        raise UserError(
            f"{path or KEY_VARIABLE}: a token has at least {MIN_KEY} visible ASCII characters and no spaces; "
            "`openssl rand -hex 32` makes one."
        )
    return token


def check_exposed(host: str, token: str | None) -> None:
    """
    Raises:
        UserError: other machines could reach the server, and anyone there could use it.
    """
    try:
        loopback = host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False  # a name may stand for any address
    if token is None and not loopback:
        raise UserError(
            f"--host {host} lets other machines in, which needs a token: put one into a file and pass "
            f"--api_key_file, or set {KEY_VARIABLE}; or listen on 127.0.0.1."
        )


def bind(host: str, port: int) -> socket.socket:
    """
    Raises:
        EnvironmentFault: no such address here, or one that is taken. Known before a model is loaded.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise EnvironmentFault(
            f"--host {host} --port {port}: {first_line(error)}; pass another --port."
        ) from None
