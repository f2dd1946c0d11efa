"""Files to a memory-mapped dataset of token ids: which records are used, and what became of the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from baichuan_sft.data import cache, formats, length, template
from baichuan_sft.data.check import Rules
from baichuan_sft.data.prepare import Entry, entries_of, prepare, report_directory
from baichuan_sft.data.report import DataReport, SourceReport
from baichuan_sft.data.sources import mix, parse_sources
from baichuan_sft.data.survey import DOCUMENT, Survey
from baichuan_sft.data.tokens import TokenDataset
from baichuan_sft.errors import UserError, pick

ON_ERROR = {"stop": "list every finding and end", "skip": "leave the record out, keep its bytes"}


@dataclass(frozen=True)
class Data:
    """Segments to learn, segments held out where that is asked for, and what became of the rest."""

    train: TokenDataset
    dev: TokenDataset | None
    report: DataReport


def build_dataset(
    paths: str | Sequence[str | Path],
    tokenizer: Any,
    rules: Rules,
    *,
    on_error: str = "stop",
    dedup: bool = False,
    dev_ratio: float = 0.0,
    seed: int = 42,
    cache_dir: str | Path | None = None,
    report_dir: str | Path | None = None,
    num_workers: int | None = None,
    allow_outside: bool = False,
    wait: bool = False,
) -> Data:
    """The segments of all files in order, from the cache where the same content was prepared before.

    Large files are checked as a whole before the first is tokenised; then records are chosen. Any number
    of processes may call it at once: one prepares, the others wait and map its files.

    Args:
        paths: see ``sources.parse_sources``.
        on_error: "stop" at findings once all are known, or "skip" the records.
        dedup: leave out records equal to an earlier one of any file.
        dev_ratio: share of the records to hold out; equal records stay on one side.
        seed: of what is drawn: shares of a mix, held-out records.
        cache_dir: default ``$BAICHUAN_SFT_CACHE``, else ``~/.cache/baichuan_sft``.
        report_dir: gets data_report.jsonl with every finding and rejected.jsonl with what was left out.
        num_workers: processes that tokenise; default one per core for large files, up to 8.
        wait: let another process of this host prepare, as long as one is at work.
    Raises:
        DataFault: findings, with ``on_error`` "stop". UserError: a wrong path or setting, or nothing is
            left to train on. EnvironmentFault: the cache cannot be written.
    """
    pick("on_error", on_error, ON_ERROR)
    pick("train_on", rules.train_on, template.TRAIN_ON)
    pick("truncation", rules.truncation, length.TRUNCATION)
    if rules.data_format not in (None, DOCUMENT):
        pick("data format", rules.data_format, formats.FORMATS)
    if rules.max_length < 2:
        raise UserError(f"max_length is {rules.max_length}; at least 2: one token to see and one to predict")
    if not 0 <= dev_ratio < 1:
        raise UserError(f"dev_ratio is {dev_ratio}; expected a share, at least 0 and below 1")
    root = cache.cache_root(cache_dir)
    sources = parse_sources(paths, allow_outside=allow_outside)
    reports = report_directory(report_dir, sources)
    entries = entries_of(sources, tokenizer, rules, root)
    options: dict[str, Any] = {"report_dir": reports, "num_workers": num_workers, "wait": wait}
    prepare(entries, tokenizer, root, on_error=on_error, **options)
    entries = [entry for entry in entries if not entry.faults]
    if not entries:
        raise UserError("none of the files can be read; name at least one that holds records")
    data = _choose(entries, dedup=dedup, dev_ratio=dev_ratio, seed=seed)
    if not len(data.train):
        raise _nothing_left(data.report, entries)
    if data.dev is not None and not len(data.dev):
        raise UserError(f"dev_ratio {dev_ratio:g}: all usable records are equal, none can be held out")
    return data


def _choose(entries: list[Entry], *, dedup: bool, dev_ratio: float, seed: int) -> Data:
    """Duplicates, shares of a mix and held-out records: all a choice of rows of the prepared segments."""
    surveys = [entry.survey() for entry in entries]
    total = Survey()
    for found in surveys:
        total.merge(found)
    everything = TokenDataset([entry.directory for entry in entries])
    first = everything.records()  # (R,) first segment of each record
    source_of, content = everything.sources[first], everything.hashes[first]
    is_copy = np.ones(len(first), bool)
    is_copy[np.unique(content, return_index=True)[1]] = False
    offered = np.flatnonzero(~is_copy) if dedup else np.arange(len(first))
    of_source = [offered[source_of[offered] == number] for number in range(len(entries))]
    for entry, rows in zip(entries, of_source, strict=True):
        if not len(rows) and (entry.source.weight is not None or entry.source.samples is not None):
            raise UserError(
                f"{entry.source.path}: none of its records can be used, so it has no share in a mix"
            )
    drawn = mix([entry.source for entry in entries], [len(rows) for rows in of_source], seed)
    chosen = [rows[picked] for rows, picked in zip(of_source, drawn, strict=True)]
    tokens_of = np.add.reduceat(everything.lengths, first) if len(first) else np.empty(0, np.int64)
    reports = [
        _report_source(
            entry, found, rows, is_copy[source_of == number], tokens_of, source_of == number, dedup
        )
        for number, (entry, found, rows) in enumerate(zip(entries, surveys, chosen, strict=True))
    ]
    used = np.concatenate(chosen)
    held_out = _hold_out(content[used], dev_ratio, seed)
    train = everything.select(_segments_of(used[~held_out], first, len(everything)))
    dev_rows = np.unique(used[held_out])  # what is repeated to be learnt is asked once
    dev = everything.select(_segments_of(dev_rows, first, len(everything))) if dev_ratio else None
    return Data(train, dev, DataReport.of(reports, total, train, dev, [entry.rules for entry in entries]))


def _report_source(
    entry: Entry,
    found: Survey,
    rows: np.ndarray,
    copies: np.ndarray,
    tokens_of: np.ndarray,
    mine: np.ndarray,
    dedup: bool,
) -> SourceReport:
    distinct = np.unique(rows)
    dropped = int(copies.sum()) if dedup else 0
    counts = found.counts
    return SourceReport(
        path=entry.source.path,
        sha256=entry.state.sha256 if entry.state else "",
        read=counts["read"],
        used=len(distinct),
        rejected=counts["rejected"],
        duplicates=int(copies.sum()),
        duplicates_dropped=dropped,
        no_target=counts["no_target"],
        too_long=counts["too_long"],
        not_drawn=int(mine.sum()) - dropped - len(distinct),
        repeats=len(rows) - len(distinct),
        tokens_rendered=counts["rendered"],
        tokens_used=int(tokens_of[distinct].sum()),
        tokens_lost=counts["lost"],
        tokens_not_used=int(tokens_of[mine].sum() - tokens_of[distinct].sum()),
    )


def _segments_of(records: np.ndarray, first: np.ndarray, num_segments: int) -> np.ndarray:
    """The segments of these records, in their order."""
    ends = np.append(first[1:], num_segments)
    sizes = (ends - first)[records] if len(records) else np.empty(0, np.int64)
    if sizes.sum() == len(records):
        return first[records]
    starts = np.repeat(first[records] - np.cumsum(sizes) + sizes, sizes)
    return starts + np.arange(sizes.sum())


def _hold_out(content: np.ndarray, ratio: float, seed: int) -> np.ndarray:
    """Which records are held out: those whose content, mixed with the seed, comes first."""
    if not ratio or not len(content):
        return np.zeros(len(content), bool)
    with np.errstate(over="ignore"):
        key = (content ^ np.uint64(seed % 2**64)) * np.uint64(0x9E3779B97F4A7C15)
        key = (key ^ (key >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    different = np.unique(key)
    wanted = min(max(1, round(ratio * len(different))), len(different) - 1)
    return key < different[wanted] if wanted else np.zeros(len(content), bool)


def _nothing_left(report: DataReport, entries: list[Entry]) -> UserError:
    prompts = [found for entry in entries if (found := entry.survey().shortest_prompt)]
    why = report.balance()
    if prompts:
        least, limit = min(prompts), entries[0].rules.max_length
        why = (
            f"max_length {limit} leaves no target in any; the shortest prompt is {least} tokens. Pass a "
            f"--model_max_length of at least {least + 2}, better one that holds the answers too"
        )
    return UserError(f"nothing is left of {report.total('read'):,} records: {why}.")
