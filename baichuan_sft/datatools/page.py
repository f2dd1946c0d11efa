"""``report.html`` of ``data check``: one file that loads nothing and runs no script."""

from __future__ import annotations

import html
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baichuan_sft.data.cache import Identity
from baichuan_sft.data.findings import CODES
from baichuan_sft.data.formats import Message
from baichuan_sft.data.survey import Survey
from baichuan_sft.data.texts import plain
from baichuan_sft.datatools import facts
from baichuan_sft.datatools.page_style import CHINESE, COLOUR, STYLE
from baichuan_sft.datatools.preview import MARKER, SEEN, TRAINED, num_targets, pieces

if TYPE_CHECKING:
    from baichuan_sft.datatools.command import Check

CLASSES = {TRAINED: "trained", SEEN: "seen", MARKER: "marker"}
# Nothing may be loaded and no script run, whatever the data holds.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def write_page(found: Check, path: Path, *, dropped: int = 0) -> None:
    """Write the page.

    Args:
        dropped: records left out because they are equal to an earlier one.
    """
    names = ", ".join(source.path for source in found.sources[:3]) + " ..." * (len(found.sources) > 3)
    sections = [
        _section("What became of the data", _balance(found, dropped)),
        _section("Overview", _pairs(_overview(found, dropped))),
        _section("Length", _histogram(found)),
        _section("Language", _languages(found)),
        _section("Findings", _findings(found)),
        _section("Files", _files(found)),
        _section("First conversations", "".join(_example(found, *first) for first in found.first)),
        _section("Errors", _errors(found)),
    ]
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    head += '<meta name="viewport" content="width=device-width, initial-scale=1">'
    body = f"<h1>Data report {CHINESE['Data report']}</h1><p>{_e(names)}</p>{_verdict(found)}"
    page = f"<title>{_e(names)}</title><style>{STYLE}</style></head><body>{body}{''.join(sections)}"
    text = f'<!doctype html><html lang="en"><head>{head}{page}</body></html>\n'
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def _e(text: Any) -> str:
    """Text of the data or of a file name as it may stand in HTML."""
    return html.escape(plain(str(text)))


def _label(english: str) -> str:
    chinese = CHINESE.get(english)
    return f'{_e(english)} <span lang="zh">{chinese}</span>' if chinese else _e(english)


def _section(title: str, content: str) -> str:
    """Nothing where there is no content."""
    return f"<section><h2>{_label(title)}</h2>{content}</section>" if content else ""


def _verdict(found: Check) -> str:
    errors = facts.counts_of(found)["errors"]
    if not errors:
        return f'<p class="good">{_label("no errors")}</p>'
    way_out = "--on_error skip leaves such records out, --fix OUT with it writes the good ones"
    return f'<p class="bad"><a href="#errors">{errors:,} {_label("errors")}</a> &middot; {way_out}</p>'


def _balance(found: Check, dropped: int) -> str:
    lines = facts.balances(found, dropped)
    return "".join(f"<p>{_e(line)}</p>{_stack(facts.parts_of(line))}" for line in lines)


def _stack(parts: dict[str, Any], form: str = "{:,}") -> str:
    """A bar of parts side by side, with their names and numbers below."""
    there = {name: form.format(value) for name, value in parts.items() if value}
    spans = [
        f'<span class="p{COLOUR[name]}" style="flex-grow:{parts[name]}" title="{name} {text}"></span>'
        for name, text in there.items()
    ]
    names = [f'<li class="p{COLOUR[name]}">{_label(name)} <b>{text}</b></li>' for name, text in there.items()]
    return f'<div class="stack">{"".join(spans)}</div><ul>{"".join(names)}</ul>' if there else ""


def _overview(found: Check, dropped: int) -> dict[str, str]:
    """One line on each thing that is not drawn."""
    total = found.total
    good, turns = total.characters.total(), total.counts["turns"]
    lines = {"conversations": f"{good:,}", "turns each": f"{turns / max(good, 1):.1f} (mean)"}
    if found.data is not None:
        report = found.data.report
        lines["supervised"] = facts.of(report.supervised_tokens, report.tokens) + " tokens"
    lines |= facts.remarks(found, dropped)
    lines.pop("letters", None)
    return lines


def _pairs(lines: dict[str, str]) -> str:
    cards = [f"<div><dt>{_label(name)}</dt><dd>{_e(line)}</dd></div>" for name, line in lines.items()]
    return f'<dl class="cards">{"".join(cards)}</dl>'


def _histogram(found: Check) -> str:
    bars = facts.length_histogram(found)
    if not bars:
        return ""
    most = max(number for _, _, number in bars)
    rows = [
        f'<dt>{facts.range_of(bar)}</dt><dd><i style="width:{75 * bar[2] / most:.2f}%"></i>{bar[2]:,}</dd>'
        for bar in bars
    ]
    if found.data is None:
        return f'<p>{_label("characters")}</p><dl class="bars">{"".join(rows)}</dl>'
    rows.append(f'<dt class="cut">{found.rules.max_length:,}</dt><dd class="cut">{_label("cut")}</dd>')
    return f'<p>{_label("tokens")}: {facts.percentiles(found)}</p><dl class="bars">{"".join(rows)}</dl>'


def _languages(found: Check) -> str:
    bar = _stack({name: 100 * share for name, share in facts.languages(found.total).items()}, "{:.1f} %")
    return f"<p>{_label('letters in one of 200 records')}</p>{bar}" if bar else ""


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Cells are HTML; numbers are set to the right."""
    head = "".join(f"<th>{_label(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(content: str) -> str:
    kind = ' class="n"' if content.replace(",", "").isdigit() else ""
    return f"<td{kind}>{content}</td>"


def _findings(found: Check) -> str:
    firsts, codes = facts.first_findings(found), facts.findings_by_code(found)
    rows = []
    for code, number in codes.items():
        severity, title = CODES[code]
        places = "<br>".join(_e(f"{first.place()}: {first.words}") for first in firsts.get(code, []))
        rows.append(
            [f'<b class="{severity}">{severity}</b>', code, f"{number:,}", title, f"<small>{places}</small>"]
        )
    return _table(["severity", "code", "number", "meaning", "first"], rows) if rows else ""


def _errors(found: Check) -> str:
    errors = found.total.errors
    if not errors:
        return ""
    rows = [[f"<code>{error.code}</code>", _e(error.place()), _e(error.words)] for error in errors]
    more = facts.counts_of(found)["errors"] - len(errors)
    rest = f"<p>... and {more:,} more in data_report.jsonl</p>" if more else ""
    return f'<div id="errors">{_table(["code", "place", "text"], rows)}</div>{rest}'


def _files(found: Check) -> str:
    columns = ["file", "sha256", "records", "rejected", "good", "turns", "formats", "roles"]
    sources = zip(found.sources, found.states, found.surveys, strict=True)
    rows = [[_e(source.path), *_file(state, survey)] for source, state, survey in sources]
    if len(rows) > 1:
        rows.append([f"<b>{len(rows):,} files</b>", *_file(None, found.total)])
    return _table(columns, rows)


def _file(state: Identity | None, survey: Survey) -> list[str]:
    names = [_e(facts.listed(facts.named(survey, kind))) for kind in ("format", "role")]
    return [f"<code>{state.sha256[:12] if state else ''}</code>", *facts.numbers_of(survey), *names]


def _example(found: Check, place: str, messages: list[Message]) -> str:
    if found.tokenizer is None:
        texts = [f"<p><b>{_e(role)}</b> {_e(text)}</p>" for role, text in facts.turns_of(messages)]
        return f"<article><h3>{_e(place)}</h3>{''.join(texts)}</article>"
    segment = facts.rendered(found, messages)
    spans = [
        f'<span class="{CLASSES[style]}">{_e(facts.shortened(text))}</span>'
        for text, style in pieces(segment, found.tokenizer)
    ]
    counts = f"{num_targets(segment)} / {len(segment.input_ids)} {_label('tokens trained')}"
    return f"<article><h3>{_e(place)}</h3><p>{''.join(spans)}</p><small>{counts}</small></article>"
