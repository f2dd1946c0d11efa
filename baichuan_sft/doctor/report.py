"""What the doctor prints: checks by hosts, then one line for each failure and warning; the same as JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from baichuan_sft.doctor.cells import Cell, listed
from baichuan_sft.doctor.checks import CHECKS

MARKS = {"pass": "✓", "warn": "!", "fail": "✗", "skip": "-"}
PLAIN_MARKS = {"pass": "ok", "warn": "!", "fail": "FAIL", "skip": "-"}  # for a terminal without those signs
COLOURS = {"pass": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}
ORDER = ("fail", "warn", "pass", "skip")  # what to say of several hosts
MOST_COLUMNS = 8  # hosts side by side; of more, those without a finding share a column
PIPE_WIDTH = 120  # columns where there is no terminal

Cells = dict[str, dict[str, Cell]]


def columns(table: Cells, names: list[str]) -> dict[str, list[str]]:
    """Heading -> hosts of that column."""
    if len(names) <= MOST_COLUMNS:
        return {name: [name] for name in names}
    marked = [name for name in names if any(cells[name].mark in ("warn", "fail") for cells in table.values())]
    rest = [name for name in names if name not in marked]
    alone = marked[: MOST_COLUMNS - 1]
    more = marked[MOST_COLUMNS - 1 :]
    shared = {f"{len(more)} more": more} if more else {}
    return {name: [name] for name in alone} | shared | ({f"other {len(rest)}": rest} if rest else {})


def worst(cells: list[Cell]) -> Cell:
    return min(cells, key=lambda cell: ORDER.index(cell.mark))


def show(table: Cells, names: list[str]) -> None:
    """Print the table and the findings to stdout."""
    console = Console(markup=False, highlight=False, emoji=False)  # a path may be named "[bold]"
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    signs = MARKS if can_show("".join(MARKS.values())) else PLAIN_MARKS
    lines = Table(box=box.SIMPLE_HEAD if signs is MARKS else box.ASCII2, pad_edge=False)
    lines.add_column("check", no_wrap=True)
    by_column = columns(table, names)
    for heading in by_column:
        lines.add_column(heading, justify="center", overflow="fold")
    lines.add_column("found")
    for name, cells in table.items():
        marks = [worst([cells[host] for host in hosts]).mark for hosts in by_column.values()]
        row = [Text(signs[mark], COLOURS[mark]) for mark in marks]
        lines.add_row(CHECKS[name].title, *row, Text(worst(list(cells.values())).found))
    console.print(lines)
    for mark in ("fail", "warn"):
        for name, cells in table.items():
            for cell, hosts in equal(cells, mark).items():
                text = Text(f"{signs[mark]} {line(name, hosts, cell)}", COLOURS[mark])
                console.print(text, soft_wrap=True)
    console.print(Text(summary(table)), soft_wrap=True)


def equal(cells: dict[str, Cell], mark: str) -> dict[Cell, list[str]]:
    """Hosts of which the same is to be said."""
    found: dict[Cell, list[str]] = {}
    for host, cell in cells.items():
        if cell.mark == mark:
            found.setdefault(cell, []).append(host)
    return found


def line(name: str, hosts: list[str], cell: Cell) -> str:
    """``h2, data files: train.json: ... ; expected ...; repair: rsync ...``"""
    where = f"{listed(hosts, MOST_COLUMNS)}, {CHECKS[name].title}"
    return f"{where}: {cell.found}; expected {cell.expected}; repair: {cell.repair}"


def count(table: Cells, mark: str) -> int:
    return sum(cell.mark == mark for cells in table.values() for cell in cells.values())


def summary(table: Cells) -> str:
    parts = [f"{count(table, mark)} {word}" for mark, word in (("pass", "passed"), ("fail", "failed"))]
    parts += [f"{count(table, 'warn')} warned", f"{count(table, 'skip')} not reached or not tried"]
    return ", ".join(parts)


def as_json(table: Cells, names: list[str]) -> str:
    checks = {name: {host: vars(cell) for host, cell in cells.items()} for name, cells in table.items()}
    value: dict[str, Any] = {"hosts": names, "healthy": count(table, "fail") == 0, "checks": checks}
    return json.dumps(value, indent=1, ensure_ascii=False)


def can_show(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
