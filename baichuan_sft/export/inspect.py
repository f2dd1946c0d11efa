"""``baichuan-sft inspect``: what a directory is, its facts, what it lacks, and the command that uses it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict

from baichuan_sft.arguments import Parser
from baichuan_sft.errors import CheckpointFault
from baichuan_sft.export.kinds import Finding, inspect

EXAMPLE = """baichuan-sft inspect Baichuan2-7B-Chat
  baichuan-sft inspect out/checkpoint-100 --json"""


def rows(found: Finding) -> Iterator[tuple[str, str]]:
    """What is shown, name and text."""
    yield "what", found.kind
    for name, value in found.facts.items():
        for item in value if isinstance(value, list) else [value]:
            yield name, str(item)
    for item in found.lacks:
        yield "lacks", item
    for item in found.use:
        yield "use", item


def main(argv: list[str] | None = None) -> int:
    """Print what a path is.

    Returns:
        0, or 4 where something is lacking.
    Raises:
        UserError: there is no such path.
    """
    parser = Parser(
        prog="baichuan-sft inspect",
        description="What a directory is, its facts, what it lacks, and the command that uses it.",
        example=EXAMPLE,
    )
    parser.add_argument("path", metavar="DIR", help="any directory, or a GGUF file")
    parser.add_argument("--json", action="store_true", help="the same as data")
    args = parser.parse_args(argv)
    found = inspect(args.path)
    if args.json:
        print(json.dumps(asdict(found), ensure_ascii=False, indent=1, default=str))
    else:
        _show(found)
    return CheckpointFault.exit_code if found.lacks else 0


def _show(found: Finding) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    last = ""
    for name, text in rows(found):
        printable = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
        style = {"lacks": "red", "use": "green", "what": "bold"}.get(name, "")
        table.add_row(Text("" if name == last else name, "dim"), Text(printable, style, overflow="fold"))
        last = name
    console = Console(markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = 1 << 12  # a pipe takes whole lines
    console.print(Text(found.path, "bold"))
    console.print(table)
