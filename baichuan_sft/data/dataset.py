"""Files to a memory-mapped dataset of token ids, built once per content and counted to the last record.

# a segment is one conversation as ids and labels, cut to max_length
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baichuan_sft.data import formats, reader, segments, template
from baichuan_sft.data.formats import Message
from baichuan_sft.data.segments import CHUNK, Chunk, render_chunk, tally, tracked, write_arrow
from baichuan_sft.errors import EnvironmentFault, UserError, pick

if TYPE_CHECKING:
    import datasets

CACHE_VERSION = 1  # raise when this file or segments.py changes what is written
MAX_FINDINGS, MAX_SHOWN = 1000, 20
NO_ITEM = -1  # the item of a segment that stands for no record


@dataclass(frozen=True)
class DataReport:
    """What became of every record and every token; both balances hold exactly.

    ``read = used + dropped_no_target`` and ``rendered tokens = tokens + tokens_lost``.

    Attributes:
        read: records in the files.
        used: segments in the dataset.
        dropped_no_target: segments in which no token is left to learn after the cut.
        truncated: used segments that were cut to max_length.
        trailing_user_turns_dropped: user turns at the end, which nothing answers.
        empty_user_turns: user turns without text; they are kept.
        tokens: ids in the dataset.
        supervised_tokens: targets, the labels a loss is computed on (never label 0).
        tokens_lost: ids cut off, and all ids of dropped segments.
        max_length: the cut, in tokens.
    """

    read: int
    used: int
    dropped_no_target: int
    truncated: int
    trailing_user_turns_dropped: int
    empty_user_turns: int
    tokens: int
    supervised_tokens: int
    tokens_lost: int
    max_length: int

    def __post_init__(self) -> None:
        assert self.read == self.used + self.dropped_no_target, self

    def __str__(self) -> str:
        share = 100 * self.supervised_tokens / max(self.tokens, 1)
        return (
            f"read {self.read} = used {self.used} + dropped {self.dropped_no_target} without a target; "
            f"{self.truncated} cut to {self.max_length} tokens, "
            f"{self.trailing_user_turns_dropped} trailing user turns dropped, "
            f"{self.empty_user_turns} empty user turns\n"
            f"tokens: used {self.tokens}, supervised {self.supervised_tokens} ({share:.1f} %), "
            f"lost to length {self.tokens_lost}"
        )

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


def build_dataset(
    paths: str | Sequence[str | Path],
    tokenizer: Any,
    *,
    max_length: int,
    train_on: str = "all",
    data_format: str | None = None,
    cache_dir: str | Path | None = None,
) -> tuple[datasets.Dataset, DataReport]:
    """The segments of all files in order, from the cache where the same content was built before.

    Any number of processes may call it at once: the first builds, the others wait and map its file.

    Args:
        paths: file names, as a list or separated by commas.
        max_length: longest segment in tokens; what is longer is cut on the right.
        train_on: "all" assistant turns or only the "last" one are targets.
        data_format: a name in ``formats.FORMATS``; None tells it from the record.
        cache_dir: default ``$BAICHUAN_SFT_CACHE``, else ``~/.cache/baichuan_sft``.
    Returns:
        A dataset with the columns ``input_ids`` and ``labels`` (int32 lists of one length),
        ``length``, and ``item`` (number of the record, counted over all files); and its report.
    Raises:
        UserError: one message with every finding in the files, or nothing is left to train on.
        EnvironmentFault: the cache cannot be written.
    """
    import datasets

    files = split_paths(paths)
    pick("train_on", train_on, template.TRAIN_ON)
    if max_length < 2:
        raise UserError(f"max_length is {max_length}; at least 2: one token to see and one to predict")
    read = partial(read_conversations, files, train_on=train_on, data_format=data_format)
    render = partial(render_chunk, tokenizer=tokenizer, max_length=max_length, train_on=train_on)
    settings = {"max_length": max_length, "train_on": train_on, "data_format": data_format}
    try:
        entry = _cache_root(cache_dir) / _content_key(files, tokenizer, settings)
    except UserError:
        read()  # a missing file is one finding among those of the other files
        raise
    _once(entry, lambda: _build(entry, *read(), render, max_length=max_length))
    report = DataReport(**json.loads((entry / "report.json").read_text()))
    return datasets.Dataset.from_file(str(entry / "data.arrow")), report


def fill_last_update(dataset: datasets.Dataset, rows: int) -> datasets.Dataset:
    """The dataset with empty segments up to a multiple of ``rows``, so that every update has as many.

    Without them accelerate repeats records on the ranks that would have none, and an epoch's last update
    counts these twice. An empty segment has one token and no target.
    """
    import datasets

    num_empty = -len(dataset) % rows
    if not num_empty:
        return dataset
    empty = {"input_ids": [0], "labels": [template.IGNORE], "length": 1, "item": NO_ITEM}
    filler = datasets.Dataset.from_list([empty] * num_empty, features=dataset.features)
    return datasets.concatenate_datasets([dataset, filler])


def split_paths(paths: str | Sequence[str | Path]) -> list[str]:
    """``"a.json, b.json"`` or a list as a list of file names; UserError when there is none."""
    parts = paths.split(",") if isinstance(paths, str) else [str(path) for path in paths]
    files = [part.strip() for part in parts if part.strip()]
    if not files:
        raise UserError("no data file given; pass --data_path FILE[,FILE...]")
    return files


def read_conversations(
    files: Sequence[str], *, train_on: str = "all", data_format: str | None = None
) -> tuple[list[list[Message]], Counter[str]]:
    """Every conversation of the files in order, and how often each note of ``formats.parse`` was made.

    Raises:
        UserError: any record or file is wrong. All findings are collected first, up to 1000; the
            message lists the first 20, one per line, and the total.
    """
    conversations: list[list[Message]] = []
    notes: Counter[str] = Counter()
    findings: list[UserError] = []
    for path in files:
        for record in reader.read_records(path, on_error=findings.append):
            try:
                messages, made = formats.parse(record.raw, data_format)
                _require_target(messages, train_on)
            except UserError as error:
                findings.append(record.locate(error))
            else:
                conversations.append(messages)
                notes.update(made)
            if len(findings) >= MAX_FINDINGS:
                raise _all_findings(findings)
    if findings:
        raise _all_findings(findings)
    return conversations, notes


def _require_target(messages: list[Message], train_on: str) -> None:
    if train_on == "last" and not messages[-1].train:
        turn = len(messages) - 1
        raise UserError(f'turn {turn}: "train" is false on the last assistant turn, and train_on is "last"')


def _all_findings(findings: list[UserError]) -> UserError:
    total = len(findings)
    if total == 1:
        return findings[0]
    lines = [f"  {finding}" for finding in findings[:MAX_SHOWN]]
    if total > MAX_SHOWN:
        lines.append(f"  ... and {total - MAX_SHOWN} more")
    at_least = "at least " if total >= MAX_FINDINGS else ""
    return UserError("\n".join([f"{at_least}{total} faults in the data, nothing was trained:", *lines]))


def _cache_root(cache_dir: str | Path | None) -> Path:
    root = Path(cache_dir or os.environ.get("BAICHUAN_SFT_CACHE") or "~/.cache/baichuan_sft").expanduser()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _no_cache(root, error) from None
    return root


def _no_cache(root: Path, error: OSError) -> EnvironmentFault:
    way_out = "set BAICHUAN_SFT_CACHE to a writable directory with space"
    return EnvironmentFault(f"cache directory {root}: {error.strerror}; {way_out}")


def _once(entry: Path, build: Callable[[], None]) -> None:
    """Make ``entry`` exist: ``build`` it in one process at a time, unless it is there already."""
    from filelock import FileLock

    if entry.exists():
        return
    try:
        with FileLock(f"{entry}.lock"):
            if not entry.exists():  # another process may have built it while this one waited
                build()
    except OSError as error:
        raise _no_cache(entry.parent, error) from error


def _content_key(files: Sequence[str], tokenizer: Any, settings: dict[str, Any]) -> str:
    """sha256 over all that decides the ids: data, vocabulary, the code that reads and renders, settings."""
    from baichuan_sft.model import sentencepiece_baichuan

    code: list[Any] = [formats, reader, template, segments, sentencepiece_baichuan, type(tokenizer)]
    versions = {"sentencepiece": version("sentencepiece"), "sp_model_kwargs": tokenizer.sp_model_kwargs}
    settings = settings | versions
    parts = [str(CACHE_VERSION).encode(), json.dumps(settings, sort_keys=True).encode()]
    parts += [Path(inspect.getfile(source)).read_bytes() for source in code]
    parts.append(Path(tokenizer.vocab_file).read_bytes())
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    for path in files:
        digest.update(hashlib.sha256(reader.read_bytes(path)).digest())
    return digest.hexdigest()


def _build(
    entry: Path,
    conversations: list[list[Message]],
    notes: Counter[str],
    render: Callable[[tuple[int, list[list[Message]]]], Chunk],
    *,
    max_length: int,
) -> None:
    """Write ``entry`` as a whole or not at all: into a directory beside it, then renamed."""
    starts = range(0, len(conversations), CHUNK)
    chunks = [(start, conversations[start : start + CHUNK]) for start in starts]
    temporary = entry.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a process that was killed
    temporary.mkdir()
    try:
        counts: Counter[str] = Counter()
        reach: list[int] = []
        rendered = map(render, chunks)  # SentencePiece itself uses all cores
        write_arrow(temporary / "data.arrow", tally(tracked(rendered, len(chunks)), counts, reach))
        counts["trailing_user_turns_dropped"] = notes[formats.DROPPED_TRAILING_USER]
        counts["empty_user_turns"] = notes[formats.EMPTY_USER_TURN]
        counts["max_length"] = max_length
        if not counts["used"]:
            raise _nothing_left(len(conversations), max_length, reach)
        report = DataReport(**{field.name: counts[field.name] for field in fields(DataReport)})
        assert report.read == len(conversations)
        (temporary / "report.json").write_text(json.dumps(report.to_dict(), indent=1))
        os.rename(temporary, entry)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _nothing_left(read: int, max_length: int, reach: list[int]) -> UserError:
    return UserError(
        f"nothing is left of {read} conversations: max_length {max_length} cuts every one before its first "
        f"target; the shortest prompt is {min(reach)} tokens. Pass a max_length above {min(reach)}, "
        "better one that holds the answers too."
    )
