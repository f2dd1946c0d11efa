"""Files to prepared directories in the cache: checked as a whole, tokenised once per content."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from baichuan_sft.data import cache, files
from baichuan_sft.data.check import Rules
from baichuan_sft.data.findings import DataFault, Finding
from baichuan_sft.data.sources import Source
from baichuan_sft.data.survey import MAX_SHOWN, FindingLog, Survey, layout_of, survey_file
from baichuan_sft.data.tokens import ShardWriter
from baichuan_sft.errors import UserError

PARALLEL_BYTES = 64 << 20  # below this, starting processes takes longer than they save
REPORTS = ("data_report.jsonl", "rejected.jsonl")
PATIENCE = 30  # seconds without anybody at work, after which a waiting process works itself


@dataclass(frozen=True)
class Entry:
    """One file: where its segments are or will be, or the faults for which it cannot be read."""

    source: Source
    rules: Rules
    state: cache.Identity | None
    directory: Path
    faults: Sequence[Finding] = ()

    @property
    def is_missing(self) -> bool:
        return not self.faults and not self.directory.exists()

    def survey(self) -> Survey:
        """What was found in the file when it was prepared."""
        if self.faults:
            return _unread(self.faults)
        found = Survey.from_dict(json.loads((self.directory / "survey.json").read_text()))
        found.errors = [error.of(self.source.path) for error in found.errors]
        return found


def entries_of(sources: list[Source], tokenizer: Any, rules: Rules, root: Path) -> list[Entry]:
    """What each file is and where its segments are or will be."""
    return [_entry(source, tokenizer, rules_for(source, rules), root) for source in sources]


def _entry(source: Source, tokenizer: Any, rules: Rules, root: Path) -> Entry:
    try:
        files.require_file(source.path)
        state = cache.identity(source.path, root)
    except DataFault as fault:
        return Entry(source, rules, None, root, fault.findings)
    return Entry(source, rules, state, root / _content_key(source.path, state, tokenizer, rules))


def _unread(faults: Sequence[Finding]) -> Survey:
    counts = Counter(f"code:{fault.code}" for fault in faults)
    return Survey(counts + Counter(errors=len(faults)), errors=list(faults))


def rules_for(source: Source, rules: Rules) -> Rules:
    """The rules of a source: its own where it has some."""
    truncation = source.truncation or rules.truncation
    return replace(rules, truncation=truncation, data_format=source.data_format or rules.data_format)


def _content_key(path: str, state: cache.Identity, tokenizer: Any, rules: Rules) -> str:
    """sha256 over all that decides the ids: data, vocabulary, the code that reads and renders, settings."""
    code = sorted(
        [*Path(__file__).parent.glob("*.py"), *Path(inspect.getfile(type(tokenizer))).parent.glob("*.py")]
    )
    return cache.digest(
        [version("sentencepiece"), tokenizer.sp_model_kwargs, asdict(rules), layout_of(path, rules)[1]],
        state.sha256,
        *[source.read_bytes() for source in code],
        Path(tokenizer.vocab_file).read_bytes(),
    )


def prepare(
    entries: list[Entry],
    tokenizer: Any,
    root: Path,
    *,
    on_error: str = "stop",
    report_dir: Path | None = None,
    num_workers: int | None = None,
    wait: bool = False,
) -> None:
    """Make every entry exist; write the findings of all files, and raise them where that is asked for.

    Args:
        wait: let another process of this host do the work.
    Raises:
        DataFault: findings; with ``on_error`` "skip" only a file that is not there.
    """
    try:
        if any(entry.is_missing for entry in entries):
            name = cache.digest(sorted(str(entry.directory) for entry in entries))
            lock = FileLock(root / f"{name}.lock")
            if wait:
                _wait(entries, lock)
            with lock:
                _make(entries, tokenizer, on_error, report_dir, num_workers)
    except OSError as error:
        raise cache.no_cache(root, error) from error
    for name in REPORTS:
        _gather(entries, name, report_dir)
    surveys = [entry.survey() for entry in entries]
    errors = [error for found in surveys for error in found.errors]
    if errors and (on_error == "stop" or any(error.code == "DATA001" for error in errors)):
        raise fault_of(errors, sum(found.counts["errors"] for found in surveys), report_dir)


def _wait(entries: list[Entry], lock: FileLock) -> None:
    """Until all is there, or nobody has been at work for a while."""
    last_at_work = time.monotonic()
    while any(entry.is_missing for entry in entries) and time.monotonic() - last_at_work < PATIENCE:
        time.sleep(0.2)
        try:
            with lock.acquire(timeout=0):
                pass
        except Timeout:
            last_at_work = time.monotonic()


def _make(
    entries: list[Entry], tokenizer: Any, on_error: str, report_dir: Path | None, num_workers: int | None
) -> None:
    missing = [entry for entry in entries if entry.is_missing]
    is_large = sum(entry.state.size for entry in missing if entry.state) > PARALLEL_BYTES
    # Checking takes a tenth of the time of tokenising; for little data both come at once.
    if on_error == "stop" and (is_large or any(entry.faults for entry in entries)):
        check_all(entries, report_dir, num_workers)
    for entry in missing:
        _build(entry, tokenizer, num_workers)


def check_all(entries: list[Entry], report_dir: Path | None, num_workers: int | None) -> None:
    """Check all files before the first is tokenised.

    Raises:
        DataFault: every finding of severity ERROR.
    """
    total = Survey()
    for entry in entries:
        if entry.state is None:
            found = _unread(entry.faults)
            write_findings(entry.faults, report_dir)
        else:
            workers = workers_for(entry.state.size, num_workers)
            size, path = entry.state.size, entry.state.path
            found = survey_file(path, entry.rules, size=size, directory=report_dir, num_workers=workers)
        total.merge(found)
    if total.errors:
        raise fault_of(total.errors, total.counts["errors"], report_dir)


def _build(entry: Entry, tokenizer: Any, num_workers: int | None) -> None:
    """Write ``entry.directory`` as a whole or not at all: beside it, then renamed."""
    assert entry.state is not None
    root, name = entry.directory.parent, entry.directory.name
    with FileLock(root / f"{name}.lock"):  # another mix may hold the same file
        if entry.directory.exists():
            return
        for left in root.glob(f"{name}.*.tmp"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(".tmp", f"{name}.", root))
        try:
            found = _tokenise(entry.state, entry.rules, temporary, tokenizer, num_workers)
            cache.require_unchanged(entry.state)
            (temporary / "survey.json").write_text(json.dumps(found.to_dict()))
            os.chmod(temporary, 0o755)  # a directory for temporary files is its owner's alone
            os.rename(temporary, entry.directory)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _tokenise(
    state: cache.Identity, rules: Rules, directory: Path, tokenizer: Any, num_workers: int | None
) -> Survey:
    with ShardWriter(directory) as writer:
        return survey_file(
            state.path,
            rules,
            size=state.size,
            directory=directory,
            tokenizer=tokenizer,
            num_workers=workers_for(state.size, num_workers),
            each=lambda part: writer.write(part.segments) if part.segments else None,
        )


def workers_for(size: int, num_workers: int | None) -> int:
    """Processes for a file of ``size`` bytes: as asked, else one per core where the file is large."""
    if num_workers is not None:
        return num_workers
    return 1 if size < PARALLEL_BYTES else min(8, os.cpu_count() or 1)


def fault_of(errors: list[Finding], total: int, report_dir: Path | None) -> DataFault:
    """All findings as one error: the first 20 shown, the rest in the report."""
    can_skip = all(error.code != "DATA001" for error in errors)
    if total == 1:
        return DataFault(f"{errors[0]}{'; --on_error skip leaves it out' if can_skip else ''}", errors)
    lines = [f"  {finding}" for finding in errors[:MAX_SHOWN]]
    if total > MAX_SHOWN:
        lines.append(f"  ... and {total - MAX_SHOWN:,} more")
    said = ["--on_error skip leaves such records out"] * can_skip
    said += [f"all are in {report_dir}/data_report.jsonl"] * (report_dir is not None)
    hints = f" ({'; '.join(said)})" if said else ""
    head = f"{total:,} faults in the data{hints}:"
    return DataFault("\n".join([head, *lines]), errors)


def report_directory(report_dir: str | Path | None, sources: Sequence[Source] = ()) -> Path | None:
    """The directory of the reports, without those of an earlier run.

    Raises:
        UserError: it cannot be made, or a report would replace a file that is going to be read.
    """
    if report_dir is None:
        return None
    directory = Path(report_dir)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{directory}: no directory for reports: {error.strerror}") from None
    for name in REPORTS:
        report = directory / name
        for source in sources:
            if report.exists() and os.path.exists(source.path) and os.path.samefile(report, source.path):
                raise UserError(
                    f"{source.path} is where the report goes; pass another --output_dir, or move it"
                )
        report.unlink(missing_ok=True)
    return directory


def write_findings(findings: Sequence[Finding], directory: Path | None) -> None:
    """Add findings that are about whole files to the reports."""
    with FindingLog(directory, Survey()) as log:
        for finding in findings:
            log.add(finding, None)


def _gather(entries: list[Entry], name: str, report_dir: Path | None) -> None:
    """The entries' files of this name, one after the other, under today's paths."""
    if report_dir is None:
        return
    (report_dir / name).unlink(missing_ok=True)
    for entry in entries:
        if entry.faults and name == REPORTS[0]:
            write_findings(entry.faults, report_dir)
        elif not entry.faults and (entry.directory / name).exists():
            old, new = entry.directory / name, report_dir / name
            with new.open("a", encoding="utf-8") as out, old.open(encoding="utf-8") as lines:
                for line in lines:
                    found = {**json.loads(line), "path": entry.source.path}
                    out.write(json.dumps(found, ensure_ascii=False) + "\n")
