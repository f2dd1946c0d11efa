"""Files to prepared directories in the cache: checked as a whole, tokenised once per content."""

from __future__ import annotations

import inspect
import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from baichuan_sft.data import cache, files
from baichuan_sft.data.check import Rules
from baichuan_sft.data.findings import DataFault, Finding
from baichuan_sft.data.sources import Source
from baichuan_sft.data.survey import MAX_LISTED, MAX_SHOWN, Survey, survey_file
from baichuan_sft.data.tokens import ShardWriter

PARALLEL_BYTES = 64 << 20  # below this, starting processes takes longer than they save
REPORTS = ("data_report.jsonl", "rejected.jsonl")


@dataclass(frozen=True)
class Entry:
    """One prepared file: its directory in the cache and what the pass over it counted."""

    source: Source
    state: cache.Identity
    rules: Rules
    directory: Path


def entries_of(
    sources: list[Source], tokenizer: Any, rules: Rules, root: Path, report_dir: Path | None
) -> list[Entry]:
    """What each file is and where its segments are or will be.

    Raises:
        DataFault: some files are not there or cannot be read; the findings in the others come with it.
    """
    entries, faults = [], []
    for source in sources:
        try:
            files.require_file(source.path)
            entries.append(_entry(source, tokenizer, rules, root))
        except DataFault as fault:
            faults += fault.findings
    if faults:
        check_all(entries, report_dir, None, faults)
    return entries


def _entry(source: Source, tokenizer: Any, rules: Rules, root: Path) -> Entry:
    state, rules = cache.identity(source.path, root), rules_for(source, rules)
    return Entry(source, state, rules, root / _content_key(state, tokenizer, rules))


def rules_for(source: Source, rules: Rules) -> Rules:
    """The rules of a source: its own where it has some."""
    truncation = source.truncation or rules.truncation
    return replace(rules, truncation=truncation, data_format=source.data_format or rules.data_format)


def _content_key(state: cache.Identity, tokenizer: Any, rules: Rules) -> str:
    """sha256 over all that decides the ids: data, vocabulary, the code that reads and renders, settings."""
    code = sorted(
        [*Path(__file__).parent.glob("*.py"), *Path(inspect.getfile(type(tokenizer))).parent.glob("*.py")]
    )
    return cache.digest(
        [version("sentencepiece"), tokenizer.sp_model_kwargs, asdict(rules), state.sha256],
        *[source.read_bytes() for source in code],
        Path(tokenizer.vocab_file).read_bytes(),
    )


def prepare(
    entries: list[Entry],
    tokenizer: Any,
    root: Path,
    on_error: str,
    report_dir: Path | None,
    num_workers: int | None,
) -> None:
    """Make every entry exist; write the findings of all files, and raise them where that is asked for."""
    from filelock import FileLock

    try:
        lock = FileLock(root / f"{cache.digest(sorted(str(entry.directory) for entry in entries))}.lock")
        with lock:
            missing = [entry for entry in entries if not entry.directory.exists()]
            # Checking takes a tenth of the time of tokenising; for little data both come at once.
            if on_error == "stop" and sum(entry.state.size for entry in missing) > PARALLEL_BYTES:
                check_all(entries, report_dir, num_workers)
            for entry in missing:
                _build(entry, tokenizer, num_workers)
    except OSError as error:
        raise cache.no_cache(root, error) from error
    for name in REPORTS:
        _gather(entries, name, report_dir)
    errors = [finding for entry in entries for finding in _errors(entry)]
    if errors and on_error == "stop":
        raise fault_of(errors, sum(survey_of(entry).counts["errors"] for entry in entries), report_dir)


def check_all(
    entries: list[Entry], report_dir: Path | None, num_workers: int | None, faults: Sequence[Finding] = ()
) -> None:
    """Check all files before the first is tokenised, which takes many times as long.

    Raises:
        DataFault: ``faults``, and every finding of severity ERROR.
    """
    total = Survey(Counter(errors=len(faults)), errors=list(faults))
    for entry in entries:
        workers = workers_for(entry.state.size, num_workers)
        total.merge(
            survey_file(
                entry.state.path,
                entry.rules,
                size=entry.state.size,
                directory=report_dir,
                num_workers=workers,
            )
        )
    if total.errors:
        raise fault_of(total.errors, total.counts["errors"], report_dir)


def _build(entry: Entry, tokenizer: Any, num_workers: int | None) -> None:
    """Write ``entry.directory`` as a whole or not at all: beside it, then renamed."""
    temporary = entry.directory.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a process that was killed
    temporary.mkdir()
    writer = ShardWriter(temporary)
    try:
        found = survey_file(
            entry.state.path,
            entry.rules,
            size=entry.state.size,
            directory=temporary,
            tokenizer=tokenizer,
            num_workers=workers_for(entry.state.size, num_workers),
            each=lambda part: writer.write(part.segments) if part.segments else None,
        )
        writer.close()
        cache.require_unchanged(entry.state)
        (temporary / "survey.json").write_text(json.dumps(found.to_dict()))
        os.rename(temporary, entry.directory)
    finally:
        writer.close()
        shutil.rmtree(temporary, ignore_errors=True)


def workers_for(size: int, num_workers: int | None) -> int:
    """Processes for a file of ``size`` bytes: as asked, else one per core where the file is large."""
    if num_workers is not None:
        return num_workers
    return 1 if size < PARALLEL_BYTES else min(8, os.cpu_count() or 1)


def fault_of(errors: list[Finding], total: int, report_dir: Path | None) -> DataFault:
    """All findings as one error: the first 20 shown, the rest in the report."""
    if total == 1:
        return DataFault(f"{errors[0]}; nothing was trained, --on_error skip leaves it out", errors)
    lines = [f"  {finding}" for finding in errors[:MAX_SHOWN]]
    if total > MAX_SHOWN:
        lines.append(f"  ... and {total - MAX_SHOWN:,} more")
    where = f"; all are in {report_dir}/data_report.jsonl" if report_dir else ""
    head = (
        f"{total:,} faults in the data, nothing was trained (--on_error skip leaves such records out{where}):"
    )
    return DataFault("\n".join([head, *lines]), errors)


def report_directory(report_dir: str | Path | None) -> Path | None:
    if report_dir is None:
        return None
    directory = Path(report_dir)
    directory.mkdir(parents=True, exist_ok=True)
    for name in REPORTS:
        (directory / name).unlink(missing_ok=True)
    return directory


def _gather(entries: list[Entry], name: str, report_dir: Path | None) -> None:
    """The entries' files of this name, one after the other, under today's paths."""
    if report_dir is None:
        return
    with (report_dir / name).open("w", encoding="utf-8") as out:
        for entry in entries:
            if (entry.directory / name).exists():
                for line in (entry.directory / name).open(encoding="utf-8"):
                    found = {**json.loads(line), "path": entry.state.path}
                    out.write(json.dumps(found, ensure_ascii=False) + "\n")
    if not (report_dir / name).stat().st_size:
        (report_dir / name).unlink()


def survey_of(entry: Entry) -> Survey:
    return Survey.from_dict(json.loads((entry.directory / "survey.json").read_text()))


def _errors(entry: Entry) -> list[Finding]:
    return [finding.of(entry.state.path) for finding in survey_of(entry).errors[:MAX_LISTED]]
