"""What the summary and the page of ``data check`` say, as numbers: one place for every sum."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from baichuan_sft.data.findings import CODES, Finding
from baichuan_sft.data.formats import Message
from baichuan_sft.data.length import fit
from baichuan_sft.data.survey import BINS_PER_OCTAVE, Survey
from baichuan_sft.data.template import Rendered, render
from baichuan_sft.data.texts import plain
from baichuan_sft.errors import UserError

if TYPE_CHECKING:
    from baichuan_sft.datatools.command import Check

MAX_ROWS = 12  # of the histogram
MAX_TEXT, MAX_TURNS = 300, 20  # characters of a text in an example, and turns where it is not tokenised
MAX_PLACES = 3  # findings quoted for each code
REPORTS = ("report.html", "data_report.jsonl", "rejected.jsonl")
SEVERITIES = ("ERROR", "WARN", "NOTE")
CODE = re.compile(r'"code": "(\w+)"')

Bar = tuple[int, int, int]  # first and last length, number of conversations


def balances(found: Check, dropped: int) -> list[str]:
    """``read 10,000 = used 9,993 + rejected 5 + duplicates dropped 2``, and the same of the tokens."""
    if found.data is not None:
        return [found.data.report.balance(), found.data.report.token_balance()]
    total = found.total
    read, rejected, used = total.counts["read"], total.counts["rejected"], total.characters.total() - dropped
    assert read == used + rejected + dropped and used >= 0, (read, rejected, used, dropped)
    copies = f" + duplicates dropped {dropped:,}" if dropped else ""
    return [f"read {read:,} = used {used:,} + rejected {rejected:,}{copies}"]


def parts_of(balance: str) -> dict[str, int]:
    """The terms of its sum: ``read 5 = used 3 + rejected 2; 1 held out`` -> used 3, rejected 2."""
    terms = balance.partition(" = ")[2].partition(";")[0].split(" + ")
    pairs = [term.rsplit(" ", 1) for term in terms]
    return {words: int(number.replace(",", "")) for words, number in pairs}


def counts_of(found: Check) -> Counter[str]:
    """All that was counted; what is known only once the texts are tokenised comes from there."""
    counts = found.total.counts
    return counts if found.data is None else counts | found.data.report.counts


def findings_by_code(found: Check) -> dict[str, int]:
    """How many findings of each code there are, errors first."""
    listed = Counter(f"code:{error.code}" for error in found.total.errors)
    counts = counts_of(found) | listed
    codes = sorted(CODES, key=lambda code: (SEVERITIES.index(CODES[code][0]), code))
    return {code: counts[f"code:{code}"] for code in codes if counts[f"code:{code}"]}


def first_findings(found: Check) -> dict[str, list[Finding]]:
    """The first findings of each code, read back from the report."""
    firsts: dict[str, list[Finding]] = {}
    report = found.directory / "data_report.jsonl"
    if not report.exists():
        return firsts
    with report.open(encoding="utf-8") as lines:
        for line in lines:
            code = CODE.search(line)
            of_code = firsts.setdefault(code[1], []) if code else []
            if code and len(of_code) < MAX_PLACES:
                saved = json.loads(line)
                of_code.append(Finding(**{name: saved[name] for name in saved if name != "severity"}))
    return firsts


def length_histogram(found: Check) -> list[Bar]:
    """Conversations by length: in tokens of what is trained on, or in characters where there are none."""
    longest = None
    bins = found.total.characters
    if found.data is not None:
        lengths = np.maximum(found.data.train.lengths, 1)
        bins = Counter((np.log2(lengths) * BINS_PER_OCTAVE).astype(int).tolist())
        longest = int(lengths.max()) if len(lengths) else None
    if not bins:
        return []
    low, high = min(bins), max(bins)
    width = -(-(high + 1 - low) // MAX_ROWS)
    bars = []
    for start in range(low, high + 1, width):
        first, after = (math.ceil(2 ** (i / BINS_PER_OCTAVE)) for i in (start, start + width))
        last = min(after - 1, longest or after)
        if first <= last:  # between 1 and 2 lie four bins and one whole number
            bars.append((first, last, sum(bins[i] for i in range(start, start + width))))
    return bars


def range_of(bar: Bar) -> str:
    first, last, _ = bar
    return f"{first:,}" if first == last else f"{first:,}-{last:,}"


def percentiles(found: Check) -> str:
    """The lengths in one line; empty where they are not in tokens."""
    if found.data is None:
        return ""
    lengths = [f"{length:,}" for length in found.data.report.lengths]
    return "50 % up to {} tokens, 90 % {}, 99 % {}, longest {}".format(*lengths)


def languages(total: Survey) -> dict[str, float]:
    """Share of the letters of each script, the greatest first."""
    letters = Counter({script: number for script, number in named(total, "letters").items() if number})
    return {script: number / letters.total() for script, number in letters.most_common()}


def named(survey: Survey, kind: str) -> dict[str, int]:
    """``role:human`` and its like by their names, printable, the most frequent first."""
    counts = {plain(k.split(":", 1)[1]): n for k, n in survey.counts.items() if k.startswith(f"{kind}:")}
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def numbers_of(survey: Survey) -> list[str]:
    """Records, rejected ones, good ones and turns."""
    counts = survey.counts
    numbers = [counts["read"], counts["rejected"], survey.characters.total(), counts["turns"]]
    return [f"{number:,}" for number in numbers]


def remarks(found: Check, dropped: int) -> dict[str, str]:
    """One line on whatever else is there; nothing on what is not."""
    total, counts = found.total, counts_of(found)
    good = total.characters.total()
    lines = {}
    if found.data is not None:
        report = found.data.report
        lines["cut"] = f"{of(counts['cut'], good)} to {report.max_length:,} tokens ({report.truncation})"
        lines["no target left"] = of(counts["no_target"], good)
    if copies := counts["code:DATA034"]:
        if found.data is not None:
            dropped = report.total("duplicates_dropped")
        state = "left out" if dropped else "kept; --dedup leaves them out"
        lines["copies"] = f"{of(copies, good)} equal to an earlier one, {state}"
    if unread := named(total, "key"):
        lines["keys not read"] = listed(unread)
    if shares := languages(total):
        mix = ", ".join(f"{script} {100 * share:.1f} %" for script, share in shares.items())
        lines["letters"] = f"{mix} (of a sample: 1 record in 200)"
    return lines


def of(number: int, total: int) -> str:
    """``37 of 9,993 (0.4 %)``."""
    return f"{number:,} of {total:,} ({100 * number / max(total, 1):.1f} %)"


def listed(counts: dict[str, int], limit: int = 10) -> str:
    """``human 140, gpt 139``, cut after ``limit`` names."""
    shown = [f"{name} {number:,}" for name, number in list(counts.items())[:limit]]
    return ", ".join(shown + [f"... {len(counts) - limit:,} more"] * (len(counts) > limit))


def shortened(text: str) -> str:
    """At most ``MAX_TEXT`` characters, printable, and how many more there are."""
    more = len(text) - MAX_TEXT
    return plain(text[:MAX_TEXT]) + (f" ... {more:,} more" if more > 0 else "")


def turns_of(messages: list[Message]) -> list[tuple[str, str]]:
    """Role and text of the first turns, and how many more there are."""
    more = len(messages) - MAX_TURNS
    turns = [(message.role, shortened(message.text)) for message in messages[:MAX_TURNS]]
    return turns + [("...", f"{more:,} more turns")] * (more > 0)


def rendered(found: Check, messages: list[Message]) -> Rendered:
    """A conversation as it is trained on; whole, where nothing of it is left."""
    segment = render(messages, found.tokenizer, train_on=found.rules.train_on)
    try:
        return next(iter(fit(segment, found.rules.max_length, found.rules.truncation)), segment)
    except UserError:  # too long under the policy "error": the record is among the findings
        return segment
