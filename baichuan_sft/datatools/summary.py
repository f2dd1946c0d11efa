"""What ``baichuan-sft data check`` prints: every error, then what the files hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from baichuan_sft.data.findings import CODES
from baichuan_sft.data.formats import Message
from baichuan_sft.data.survey import Survey
from baichuan_sft.data.texts import plain
from baichuan_sft.datatools.facts import (
    REPORTS,
    balances,
    counts_of,
    findings_by_code,
    first_findings,
    length_histogram,
    listed,
    named,
    numbers_of,
    percentiles,
    range_of,
    remarks,
    rendered,
    shortened,
    turns_of,
)
from baichuan_sft.datatools.preview import joined, num_targets, pieces

if TYPE_CHECKING:
    from baichuan_sft.datatools.command import Check

COLOUR = {"ERROR": "bold red", "WARN": "yellow", "NOTE": "dim"}
EIGHTHS = "▏▎▍▌▋▊▉█"
BAR = 40  # characters of the longest
PIPE_WIDTH = 120  # columns where there is no terminal


def show(found: Check, *, dropped: int) -> None:
    """Print the errors, one plain line each, and after them the summary.

    Args:
        dropped: records left out because they are equal to an earlier one.
    """
    console = Console(markup=False, highlight=False, emoji=False)  # a file may be named "[bold].jsonl"
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    _errors(console, found)
    for balance in balances(found, dropped):
        console.print(Text(balance, "bold"), soft_wrap=True)
    console.print()
    _findings(console, found)
    _files(console, found)
    _lengths(console, found)
    _facts(console, found, dropped)
    _examples(console, found)
    _way_out(console, found)


def _errors(console: Console, found: Check) -> None:
    errors = found.total.errors
    for error in errors:
        console.out(plain(str(error)), highlight=False)
    if more := counts_of(found)["errors"] - len(errors):
        console.out(f"... and {more:,} more errors in data_report.jsonl", highlight=False)
    if errors:
        console.print()


def _findings(console: Console, found: Check) -> None:
    """One line per code; an example of what is not an error, for the errors stand above."""
    codes = findings_by_code(found)
    if not codes:
        return
    firsts = first_findings(found)
    table = _table("finding", "", "number", "")
    for code, number in codes.items():
        severity, title = CODES[code]
        table.add_row(Text(severity, COLOUR[severity]), code, f"{number:,}", title)
        if severity != "ERROR" and code in firsts:
            first = firsts[code][0]
            table.add_row("", "", "", Text(plain(f"{first.place()}: {first.words}"), "dim"))
    console.print(table, "")


def _files(console: Console, found: Check) -> None:
    table = _table("file", "records", "rejected", "good", "turns", "formats and roles as written")
    for source, survey in zip(found.sources, found.surveys, strict=True):
        table.add_row(plain(source.path), *_row(survey))
    if len(found.sources) > 1:
        table.add_section()
        table.add_row(f"{len(found.sources):,} files", *_row(found.total), style="bold")
    console.print(table, "")


def _row(survey: Survey) -> list[str]:
    names = "; ".join(filter(None, [listed(named(survey, kind)) for kind in ("format", "role")]))
    return [*numbers_of(survey), names]


def _table(*columns: str) -> Table:
    """A table without frames; columns of numbers are set to the right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        is_number = column in ("records", "rejected", "good", "turns", "number")
        table.add_column(column, justify="right" if is_number else "left", no_wrap=is_number, overflow="fold")
    return table


def _lengths(console: Console, found: Check) -> None:
    bars = length_histogram(found)
    if not bars:
        return
    unit = "tokens" if found.data is not None else "characters"
    most = max(number for _, _, number in bars)
    labels = [range_of(bar) for bar in bars]
    left, right = max(map(len, labels)), len(f"{most:,}")
    console.print(f"length in {unit}", style="bold")
    for label, (_, _, number) in zip(labels, bars):
        bar = (_bar(number / most), "cyan")
        console.print(Text.assemble(f"{label:>{left}} {number:>{right},} ", bar))
    if found.data is not None:
        cut = f"{found.rules.max_length:,} "
        console.print(f"{cut:─>{left + 1}}{'':─<{right + 1 + BAR}} cut", style="dim")
        console.print(percentiles(found))
    console.print()


def _bar(share: float) -> str:
    """Of ``BAR`` characters where the share is 1; whatever is not nothing can be seen."""
    eighths = max(round(8 * BAR * share), share > 0)
    whole, rest = divmod(eighths, 8)
    return EIGHTHS[-1] * whole + (EIGHTHS[rest - 1] if rest else "")


def _facts(console: Console, found: Check, dropped: int) -> None:
    lines = remarks(found, dropped)
    table = Table.grid(padding=(0, 2, 0, 0))
    for name, line in lines.items():
        table.add_row(Text(name, "bold"), Text(line))
    if lines:
        console.print(table, "")


def _examples(console: Console, found: Check) -> None:
    """The first conversations: with a tokenizer as ``preview`` shows them, else role by role."""
    coloured = console.color_system is not None
    if found.first and found.tokenizer is not None:
        console.print("trained tokens are green\n" if coloured else "trained tokens stand in ⟦ ⟧\n")
    for place, messages in found.first:
        console.print(Text(plain(place), "bold"), soft_wrap=True)
        console.print(_conversation(found, messages, coloured), soft_wrap=True)
        console.print()


def _conversation(found: Check, messages: list[Message], coloured: bool) -> Text:
    if found.tokenizer is None:
        turns = turns_of(messages)
        return Text("\n").join([Text.assemble((f"{role}: ", "dim"), text) for role, text in turns])
    segment = rendered(found, messages)
    short = [(shortened(text), style) for text, style in pieces(segment, found.tokenizer)]
    counts = f"  {num_targets(segment)} of {len(segment.input_ids)} tokens trained"
    return joined(short, coloured).append(counts, "dim")


def _way_out(console: Console, found: Check) -> None:
    if errors := counts_of(found)["errors"]:
        count = f"{errors:,} error{'s' * (errors > 1)}"
        skip = "--on_error skip leaves such records out, --fix OUT with it writes the good ones"
        console.print(Text(f"{count}: {skip}", "bold red"), soft_wrap=True)
    written = [name for name in REPORTS if name == REPORTS[0] or (found.directory / name).exists()]
    console.out(f"reports in {plain(str(found.directory))}: {', '.join(written)}", highlight=False)
