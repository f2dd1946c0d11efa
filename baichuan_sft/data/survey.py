"""One pass over one file: every record examined, every finding written down, nothing kept in memory."""

from __future__ import annotations

import base64
import json
import math
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np

from baichuan_sft.data import reader
from baichuan_sft.data.check import Examined, Rules, blocks, examine, in_order
from baichuan_sft.data.findings import Finding
from baichuan_sft.data.formats import count_name
from baichuan_sft.data.progress import Progress
from baichuan_sft.data.reader import RawRecord
from baichuan_sft.errors import EnvironmentFault

MAX_LISTED, MAX_SHOWN = 1000, 20
BINS_PER_OCTAVE = 4
DOCUMENT = "document"  # declared as a format: every file is one text

Noted: TypeAlias = tuple[Finding, "bytes | None"]


@dataclass
class Survey:
    """What a pass over a file, or over several, has found.

    Attributes:
        counts: see ``check.Examined``; ``errors`` counts the findings of that severity.
        characters: how many conversations have 2^(i/4) to 2^((i+1)/4) characters.
        errors: the first ``MAX_LISTED``.
        prompts: tokens before the first target, of conversations in which none was left.
    """

    counts: Counter[str] = field(default_factory=Counter)
    characters: Counter[int] = field(default_factory=Counter)
    errors: list[Finding] = field(default_factory=list)
    shortest_prompt: int | None = None

    def add(self, found: Examined) -> None:
        add_counts(self.counts, found.counts)
        octaves = np.log2(np.maximum(found.characters, 1)) * BINS_PER_OCTAVE
        self.characters.update(octaves.astype(int).tolist())
        known = [*found.prompts, *([self.shortest_prompt] if self.shortest_prompt else [])]
        self.shortest_prompt = min(known, default=None)

    def to_dict(self) -> dict[str, Any]:
        return {
            "counts": dict(self.counts),
            "characters": sorted(self.characters.items()),
            "errors": [asdict(error) for error in self.errors],
            "shortest_prompt": self.shortest_prompt,
        }

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Survey:
        """The inverse of ``to_dict``, after JSON."""
        return cls(
            Counter(saved["counts"]),
            Counter(dict(saved["characters"])),
            [Finding(**error) for error in saved["errors"]],
            saved["shortest_prompt"],
        )

    def merge(self, other: Survey) -> None:
        """Add what another file holds."""
        add_counts(self.counts, other.counts)
        self.characters.update(other.characters)
        self.errors += other.errors[: MAX_LISTED - len(self.errors)]


def add_counts(total: Counter[str], part: Counter[str]) -> None:
    """Add ``part``; of the keys that nothing reads only so many names are kept."""
    for name, number in part.items():
        if name.startswith("key:"):
            count_name(total, name, number)
        else:
            total[name] += number


class FindingLog:
    """Findings in the order of the file, to ``data_report.jsonl``; rejected records to ``rejected.jsonl``.

    Args:
        directory: where the two files go; None writes none.
    """

    def __init__(self, directory: Path | None, survey: Survey) -> None:
        self.directory, self.survey = directory, survey
        self.files: dict[str, IO[str]] = {}

    def __enter__(self) -> FindingLog:
        return self

    def __exit__(self, *exception: object) -> None:
        for name, file in self.files.items():
            try:
                file.close()
            except OSError as error:
                where = f"{self.directory}/{name}"
                raise EnvironmentFault(f"{where}: cannot be written: {error.strerror}") from error

    def add(self, finding: Finding, raw: bytes | None) -> None:
        """Write one down; the files, and their directory, are made by the first."""
        self._write("data_report.jsonl", finding.to_dict())
        if finding.severity != "ERROR":
            return
        self.survey.counts["errors"] += 1
        if len(self.survey.errors) < MAX_LISTED:
            self.survey.errors.append(finding)
        self._write("rejected.jsonl", {**finding.to_dict(), **_as_text(raw)})

    def _write(self, name: str, entry: dict[str, Any]) -> None:
        if self.directory is None:
            return
        try:
            if name not in self.files:
                self.directory.mkdir(parents=True, exist_ok=True)
                self.files[name] = (self.directory / name).open("a", encoding="utf-8")
            self.files[name].write(json.dumps(entry, ensure_ascii=False) + "\n")
        except OSError as error:
            raise EnvironmentFault(f"{self.directory / name}: cannot be written: {error.strerror}") from error


def _as_text(raw: bytes | None) -> dict[str, str]:
    """The raw bytes so that nothing is lost: as text where they are UTF-8."""
    if raw is None:
        return {}
    try:
        return {"raw": raw.decode()}
    except UnicodeDecodeError:
        return {"raw_base64": base64.b64encode(raw).decode()}


def survey_file(
    path: str,
    rules: Rules,
    *,
    size: int,
    directory: Path | None = None,
    tokenizer: Any = None,
    num_workers: int = 1,
    each: Callable[[Examined], None] = lambda found: None,
) -> Survey:
    """Read, decode and check every record of a file; with a tokenizer also render and cut.

    Args:
        size: bytes of the file, for the progress bar; what a packed file holds is not known.
        directory: see ``FindingLog``.
        each: called with the result of every block, in order.
    """
    survey = Survey()
    early: list[Noted] = []  # of the reader, which runs ahead of the blocks
    seen: list[int] = []  # the first record, once there is one
    ends: deque[tuple[int, int]] = deque()  # last item and bytes of each block handed out
    label = f"{'tokenising' if tokenizer else 'checking'} {Path(path).name}"
    rules, layout = layout_of(path, rules)
    threads = -1 if num_workers <= 1 else 1  # of SentencePiece in each process
    done = 0
    with (
        FindingLog(directory, survey) as log,
        Progress(label, 0 if path.endswith((".gz", ".zst")) else size) as progress,
    ):

        def tell(finding: Finding, raw: bytes | None) -> None:
            early.append((finding, raw))
            if not seen and len(early) > MAX_LISTED:  # no record is on its way that would come before
                _log_unread(survey, log, early)

        records = reader.read_raw(path, tell, layout=layout, options=rules.reading)
        work = _remembered(blocks(_noticed(records, seen)), ends)
        for found in in_order(examine, work, num_workers, path, rules, tokenizer, threads):
            last_item, num_bytes = ends.popleft()
            ready = [noted for noted in early if item_of(noted) <= last_item]
            early[:] = [noted for noted in early if item_of(noted) > last_item]
            _count_unread(survey, ready)
            survey.add(found)
            for noted in sorted(ready + found.findings, key=item_of):
                log.add(*noted)
            each(found)
            progress.update(done := done + num_bytes)
        _log_unread(survey, log, early)
    return survey


def _log_unread(survey: Survey, log: FindingLog, early: list[Noted]) -> None:
    """Count and write down what waits, and forget it."""
    _count_unread(survey, early)
    for noted in sorted(early, key=item_of):
        log.add(*noted)
    early.clear()


def layout_of(path: str, rules: Rules) -> tuple[Rules, str]:
    """The format of the records and the layout of the file that a declared format means."""
    if rules.data_format == DOCUMENT:
        return replace(rules, data_format="text"), "document"
    plain = Path(path.removesuffix(".gz").removesuffix(".zst")).suffix == ".txt"
    return rules, "lines" if plain and rules.data_format == "text" else "json"


def _noticed(records: Iterator[RawRecord], seen: list[int]) -> Iterator[RawRecord]:
    for record in records:
        if not seen:
            seen.append(record.item)
        yield record


def _remembered(work: Iterator[list[RawRecord]], ends: deque[tuple[int, int]]) -> Iterator[list[RawRecord]]:
    for block in work:
        num_bytes = sum([len(record.data) for record in block if isinstance(record.data, bytes)])
        ends.append((block[-1].item, num_bytes))
        yield block


def item_of(noted: Noted) -> float:
    """Where a finding stands among the records; what is about the whole file comes first or last."""
    finding = noted[0]
    if finding.item is not None:
        return finding.item
    return math.inf if finding.severity == "ERROR" else -1


def _count_unread(survey: Survey, unread: list[Noted]) -> None:
    """Count what the reader could not make a record of."""
    for finding, _ in unread:
        survey.counts[f"code:{finding.code}"] += 1
        if finding.severity == "ERROR" and finding.item is not None:
            survey.counts.update(read=1, rejected=1)
