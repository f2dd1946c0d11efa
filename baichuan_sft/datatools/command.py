"""``baichuan-sft data check`` and ``data prepare``: what files hold, and segments made before training."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any

from baichuan_sft.arguments import Parser
from baichuan_sft.data import cache, files
from baichuan_sft.data.arguments import DataArguments, add_options, with_truth
from baichuan_sft.data.check import Rules, blocks, examine
from baichuan_sft.data.duplicates import Copies, Duplicates
from baichuan_sft.data.findings import DataFault, Finding
from baichuan_sft.data.formats import Message
from baichuan_sft.data.prepare import report_directory, rules_for, workers_for
from baichuan_sft.data.reader import read_raw
from baichuan_sft.data.sources import Source, parse_sources
from baichuan_sft.data.survey import FindingLog, Survey, layout_of, survey_file
from baichuan_sft.errors import UserError

# Of DataArguments; the others are about training.
SHARED = """data_format model_max_length truncation train_on on_error dedup merge_consecutive encoding
    max_line_mib max_unpacked_gib allow_outside cache_dir preprocessing_num_workers""".split()
OF_LENGTH = ("DATA024", "DATA036")  # what only a tokenizer can find
EXAMPLE = """baichuan-sft data check data/belle_chat.json 'more/*.jsonl.gz' --output_dir check
  baichuan-sft data check train.jsonl --on-error skip --fix clean.jsonl --dedup
  baichuan-sft data prepare train.jsonl --tokenizer ~/models/Baichuan2-7B-Base --model_max_length 4096"""


def main(argv: list[str] | None = None) -> int:
    """``data check`` or ``data prepare``.

    Returns:
        0, or 2 where ``check`` found a fault and was not told to skip it.
    Raises:
        UserError: wrong options or paths.
    """
    args = _parser().parse_args(with_truth(sys.argv[1:] if argv is None else argv))
    return args.run(args)


def _parser() -> Parser:
    parser = Parser(
        prog="baichuan-sft data", description="Check data files, or tokenise them.", example=EXAMPLE
    )
    commands = parser.add_subparsers(required=True, metavar="check|prepare", parser_class=_Command)
    checking = commands.add_parser("check", help="list every fault, and say what the files hold")
    checking.set_defaults(run=check, tokenizer=None)
    checking.add_argument("--output_dir", default="data_check", help="of the reports; default data_check")
    checking.add_argument("--fix", metavar="OUT", help="write the good records, normalised, as JSON Lines")
    checking.add_argument("--tokenizer", metavar="DIR", help="model or tokenizer.model: lengths in tokens")
    preparing = commands.add_parser(
        "prepare", help="tokenise; training with the same flags starts from there"
    )
    preparing.set_defaults(run=prepare)
    preparing.add_argument("--tokenizer", "--model_name_or_path", required=True, metavar="DIR")
    for command in (checking, preparing):
        command.add_argument(
            "paths", nargs="+", metavar="PATH", help="files, patterns, a YAML list of sources"
        )
        add_options(command, SHARED)
    return parser


class _Command(Parser):
    def __init__(self, **options: Any) -> None:
        super().__init__(example=EXAMPLE, **options)


def data_arguments(args: Any) -> DataArguments:
    """The shared flags, checked as training checks them."""
    for name in ("max_line_mib", "max_unpacked_gib", "preprocessing_num_workers"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}; it must be at least 1.")
    return DataArguments(data_path=",".join(args.paths), **{name: getattr(args, name) for name in SHARED})


# --- prepare --------------------------------------------------------------------------------------


def prepare(args: Any) -> int:
    """Tokenise into the cache, and say what became of every record."""
    from baichuan_sft.checkpoint import load_tokenizer
    from baichuan_sft.data.dataset import build_dataset

    flags = data_arguments(args)
    data = build_dataset(args.paths, load_tokenizer(args.tokenizer), flags.rules(), **flags.options())
    print(data.report)
    root = cache.cache_root(args.cache_dir)
    print(
        f"prepared: {len(data.train):,} segments in {root}; train with the same data flags starts from there"
    )
    return 0


# --- check ----------------------------------------------------------------------------------------


@dataclass
class Check:
    """What a check has found so far.

    Attributes:
        states: the files that could be read, one per source or None.
        surveys: one per source.
        first: up to three conversations, each with its place.
        copies: numbers of the good records that are copies, over all sources.
        data: the prepared segments, where there is a tokenizer and nothing to repair.
    """

    rules: Rules
    sources: list[Source]
    directory: Path
    states: list[cache.Identity | None] = field(default_factory=list)
    surveys: list[Survey] = field(default_factory=list)
    first: list[tuple[str, list[Message]]] = field(default_factory=list)
    duplicates: Duplicates = field(default_factory=Duplicates)
    copies: Copies | None = None
    tokenizer: Any = None
    data: Any = None

    @property
    def total(self) -> Survey:
        """All files together."""
        total = Survey()
        for survey in self.surveys:
            total.merge(survey)
        return total


def check(args: Any) -> int:
    """List every finding, say what the files hold, and write the reports."""
    from baichuan_sft.datatools.page import write_page
    from baichuan_sft.datatools.summary import show

    flags = data_arguments(args)
    for name in ("model_max_length", "truncation"):
        if args.tokenizer is None and getattr(flags, name) != getattr(DataArguments, name):
            raise UserError(
                f"--{name} counts tokens, and there is no tokenizer; pass --tokenizer DIR as well."
            )
    sources = parse_sources(args.paths, allow_outside=args.allow_outside)
    directory = report_directory(args.output_dir, sources)
    assert directory is not None
    found = Check(flags.rules(), sources, directory)
    root = cache.cache_root(args.cache_dir)
    for which in range(len(sources)):
        _survey(found, which, root, args.preprocessing_num_workers)
    found.copies = found.duplicates.copies()
    usable = _is_usable(found, args.on_error)
    if usable and args.fix:
        write_fixed(found, Path(args.fix), args.dedup)
    if usable and args.tokenizer and None not in found.states:
        _measure(found, args, flags)
        usable = _is_usable(found, args.on_error)
    _report_copies(found, found.copies)
    dropped = found.copies.total if args.dedup else 0
    for state in found.states:
        if usable and state is not None:
            cache.pin(state, root)
    write_page(found, directory / "report.html", dropped=dropped)
    show(found, dropped=dropped)  # last: whoever reads it may have seen enough before the end
    return 0 if usable else 2


def _is_usable(found: Check, on_error: str) -> bool:
    counts = found.total.counts
    return counts["read"] > counts["rejected"] and (on_error == "skip" or not counts["errors"])


def _measure(found: Check, args: Any, flags: DataArguments) -> None:
    """Tokenise, which also finds what is too long where that is an error."""
    from baichuan_sft.checkpoint import load_tokenizer
    from baichuan_sft.data.dataset import build_dataset

    found.tokenizer = load_tokenizer(args.tokenizer)
    survey = found.surveys[0]
    with tempfile.TemporaryDirectory() as directory:
        options = {**flags.options(), "on_error": "skip", "report_dir": directory}
        found.data = build_dataset(args.paths, found.tokenizer, found.rules, **options)
        report = Path(directory, "data_report.jsonl")
        with FindingLog(found.directory, survey) as log:
            for line in report.open(encoding="utf-8") if report.exists() else ():
                entry = json.loads(line)
                severity = entry.pop("severity")
                if entry["code"] in OF_LENGTH:
                    log.add(Finding(**entry), None)
                    survey.counts[f"code:{entry['code']}"] += 1
                    survey.counts["rejected"] += severity == "ERROR"


def _survey(found: Check, which: int, root: Path, num_workers: int | None) -> None:
    """Add what the source holds; a file that cannot be read is a finding like others."""
    source = found.sources[which]
    rules = rules_for(source, found.rules)
    try:
        files.require_file(source.path)
        cache.unpin(source.path, root)
        state = cache.identity(source.path, root)
    except DataFault as fault:
        survey = Survey(Counter(f"code:{finding.code}" for finding in fault.findings))
        with FindingLog(found.directory, survey) as log:
            for finding in fault.findings:
                log.add(finding, None)
        found.states.append(None)
        found.surveys.append(survey)
        return
    found.states.append(state)
    found.surveys.append(
        survey_file(
            source.path,
            rules,
            size=state.size,
            directory=found.directory,
            num_workers=workers_for(state.size, num_workers),
            each=lambda part: found.duplicates.add(part.hashes, [which << 40 | item for item in part.items]),
        )
    )
    cache.require_unchanged(state, hashed=True)
    if len(found.first) < 3:
        found.first += islice(_conversations(source, rules), 3 - len(found.first))


def _conversations(source: Source, rules: Rules) -> Iterator[tuple[str, list[Message]]]:
    """The good records of a file, each with its place."""
    rules, layout = layout_of(source.path, rules)
    records = read_raw(source.path, lambda finding, raw: None, layout=layout, options=rules.reading)
    for block in blocks(records):
        good = examine(block, source.path, rules, keep=True)
        of_item = {record.item: record for record in block}
        for item, messages in zip(good.items, good.normalised, strict=True):
            place = Finding(
                "DATA003", source.path, "", of_item[item].line, of_item[item].column, item
            ).place()
            yield place, messages


def _report_copies(found: Check, copies: Copies) -> None:
    """A warning for each copy that is listed."""
    if not copies.total:
        return
    survey = Survey()
    with FindingLog(found.directory, survey) as log:
        for copy, first in zip(copies.copies, copies.firsts):
            source, item = _where(found, int(copy))
            other, first_item = _where(found, int(first))
            of = f"item {first_item}" + ("" if other == source else f" of {other}")
            log.add(Finding("DATA034", source, f"exact duplicate of {of}", item=item), None)
    found.surveys[0].counts["code:DATA034"] += copies.total


def _where(found: Check, record: int) -> tuple[str, int]:
    label = found.duplicates.label(record)
    return found.sources[label >> 40].path, label & (1 << 40) - 1


def write_fixed(found: Check, out: Path, dedup: bool) -> None:
    """The good records of all sources, normalised, one per line; all is written or nothing.

    Raises:
        UserError: ``out`` is one of the sources, or cannot be written. DataFault: a source changed meanwhile.
    """
    for source in found.sources:
        if out.exists() and os.path.exists(source.path) and out.samefile(source.path):
            raise UserError(f"--fix {out}: is one of the files that are read; name another one")
    states = [state for state in found.states if state is not None]
    for state in states:
        cache.require_unchanged(state, hashed=True)
    try:
        # Beside it, under a name that nobody has: a full disk leaves what was there.
        with tempfile.NamedTemporaryFile("w", dir=out.parent, encoding="utf-8", delete=False) as file:
            try:
                _write_good(found, file, dedup)
            except BaseException:
                os.unlink(file.name)
                raise
        os.chmod(file.name, 0o644)
        os.replace(file.name, out)
    except OSError as error:
        raise UserError(f"--fix {out}: cannot be written: {error.strerror}") from None
    for state in states:
        cache.require_unchanged(state, hashed=True)


def _write_good(found: Check, file: IO[str], dedup: bool) -> None:
    assert found.copies is not None
    record = 0
    for source in found.sources:
        if not os.path.exists(source.path):
            continue
        for _, messages in _conversations(source, rules_for(source, found.rules)):
            if not (dedup and found.copies.is_copy(record)):
                file.write(json.dumps(as_record(messages), ensure_ascii=False) + "\n")
            record += 1


def as_record(messages: list[Message]) -> dict[str, Any]:
    """A conversation in the Belle format, a document as ``{"text": ...}``."""
    if messages[0].role == "text":
        return {"text": messages[0].text}
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    turns = [
        {"from": names[m.role], "value": m.text} | ({} if m.train else {"train": False}) for m in messages
    ]
    return {"conversations": turns}
