"""Raw records to checked conversations, in blocks that any number of processes may share.

The results come out in the order of the file, so findings and counts do not depend on how many work.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import xxhash

from baichuan_sft import machine
from baichuan_sft.data import formats, length, reader, template
from baichuan_sft.data.files import ReadOptions
from baichuan_sft.data.findings import Finding, RecordFault
from baichuan_sft.data.formats import Message
from baichuan_sft.data.plain import PlainReader
from baichuan_sft.data.reader import RawRecord
from baichuan_sft.errors import EnvironmentFault

T = TypeVar("T")

BLOCK_BYTES, BLOCK_RECORDS = 1 << 20, 1000
# Letters per script are counted in one of so many records; a regex over all text would halve the speed.
LANGUAGE_SAMPLE = 200
SCRIPTS = {
    "zh": re.compile("[\u4e00-\u9fff]"),
    "en": re.compile("[A-Za-z]"),
    "ja": re.compile("[\u3040-\u30ff]"),
    "ko": re.compile("[\uac00-\ud7af]"),
    "ru": re.compile("[\u0400-\u04ff]"),
}


@dataclass(frozen=True)
class Rules:
    """How records become segments; what is equal here, and read from equal bytes, gives equal segments.

    Attributes:
        max_length: longest segment, in tokens.
        train_on: a name in ``template.TRAIN_ON``.
        truncation: a name in ``length.TRUNCATION``.
        data_format: a name in ``formats.FORMATS``; None tells it from each record's keys.
    """

    max_length: int = 512
    train_on: str = "all"
    truncation: str = "cut_turns"
    data_format: str | None = None
    merge_consecutive: bool = False
    reading: ReadOptions = field(default_factory=ReadOptions)


@dataclass
class Examined:
    """What a block of records holds.

    Attributes:
        counts: records, and each thing counted: ``read``, ``rejected``, ``code:DATA031``, ``role:human``...
        findings: with the raw bytes of what was rejected.
        hashes: xxh3 of each good conversation's roles and texts, uint64.
        items: the record of each.
        characters: of each good conversation.
        segments: ids, labels and numbers of the segments, where there was a tokenizer.
        prompts: tokens before the first target, of those in which no target was left.
        normalised: the conversations themselves, where they are asked for.
    """

    counts: Counter[str] = field(default_factory=Counter)
    findings: list[tuple[Finding, bytes | None]] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)
    items: list[int] = field(default_factory=list)
    characters: list[int] = field(default_factory=list)
    segments: Segments | None = None
    prompts: list[int] = field(default_factory=list)
    normalised: list[list[Message]] = field(default_factory=list)


@dataclass(frozen=True)
class Segments:
    """Segments laid end to end as Arrow stores them; N segments, T tokens in all."""

    input_ids: np.ndarray  # int32 (T,)
    labels: np.ndarray  # int32 (T,)
    lengths: np.ndarray  # int32 (N,)
    targets: np.ndarray  # int32 (N,), labels that are learnt
    items: np.ndarray  # int64 (N,), record of the file; pieces of one document share it
    hashes: np.ndarray  # uint64 (N,)


def examine(
    records: list[RawRecord],
    path: str,
    rules: Rules,
    tokenizer: Any = None,
    num_threads: int = -1,
    keep: bool = False,
) -> Examined:
    """Check, and with a tokenizer also render and cut, the records of one block.

    Args:
        num_threads: of SentencePiece; -1 takes all cores.
        keep: return the conversations as well.
    """
    found = Examined(Counter(read=len(records)))
    good: list[tuple[RawRecord, list[Message]]] = []
    plain = PlainReader(rules.data_format) if rules.train_on == "all" else None
    for record in records:
        quick = plain.read(record.data) if plain else None
        if quick is not None:
            messages = quick.messages() if tokenizer is not None or keep else []
            _count_good(found, record.item, quick.shape.letters, quick.texts)
            good.append((record, messages))
            continue
        try:
            raw = reader.decode(record.data)
            messages, notes = formats.parse(
                raw, rules.data_format, merge_consecutive=rules.merge_consecutive, tally=found.counts
            )
            if rules.train_on != "all":  # that some turn is trained, the format has seen to
                template.trained_turns(messages, rules.train_on)
        except RecordFault as fault:
            _reject(found, record, path, fault)
            continue
        for note in notes:
            _note(found, reader.locate(record, note, path))
        good.append((record, messages))
        letters = "".join([role[0] if train else "x" for role, _, train in messages])
        _count_good(found, record.item, letters, [message.text for message in messages])
    if plain:
        found.counts.update(plain.tally())
    if tokenizer is not None:
        _tokenise(found, good, path, rules, tokenizer, num_threads)
    if keep:
        found.normalised = [messages for _, messages in good]
    return found


def _count_good(found: Examined, item: int, letters: str, texts: list[str]) -> None:
    """Take down one good record; ``letters`` are the first ones of its roles."""
    text = "\x1e".join([letters, *texts])
    if text.count("\x1e") != len(texts):  # the separator in a text: say where each ends
        text = f"{list(map(len, texts))}{text}"
    # UTF-16 is how Python holds Chinese: a copy, where UTF-8 would be work.
    found.hashes.append(xxhash.xxh3_64_intdigest(text.encode("utf-16-le")))
    found.items.append(item)
    found.characters.append(sum(map(len, texts)))
    if item % LANGUAGE_SAMPLE == 0:
        for name, script in SCRIPTS.items():
            found.counts[f"letters:{name}"] += len(script.findall("".join(texts)))


def _reject(found: Examined, record: RawRecord, path: str, fault: RecordFault) -> None:
    raw = record.data if isinstance(record.data, bytes) else json.dumps(record.data, default=str).encode()
    found.findings.append((reader.locate(record, fault, path), raw))
    found.counts.update({"rejected": 1, f"code:{fault.code}": 1})


def _note(found: Examined, finding: Finding) -> None:
    found.findings.append((finding, None))
    found.counts[f"code:{finding.code}"] += 1


def _tokenise(
    found: Examined,
    good: list[tuple[RawRecord, list[Message]]],
    path: str,
    rules: Rules,
    tokenizer: Any,
    num_threads: int,
) -> None:
    """Render and cut; sets ``segments`` and counts what was lost on the way."""
    pieces: list[tuple[int, int, template.Rendered]] = []
    conversations = [messages for _, messages in good]
    rendered = template.render_batch(conversations, tokenizer, rules.train_on, num_threads)
    for (record, _), content, segment in zip(good, found.hashes, rendered, strict=True):
        total = len(segment.input_ids)
        try:
            kept = length.fit(segment, rules.max_length, rules.truncation)
        except RecordFault as fault:
            _reject(found, record, path, fault)
            continue
        left = sum([len(piece.input_ids) for piece in kept])
        why = "used" if kept else "too_long" if rules.truncation == "drop" else "no_target"
        found.counts.update({why: 1, "rendered": total, "lost": total - left})
        found.counts["cut"] += bool(kept) and left < total
        if not kept:
            prompt = length.prompt_tokens(segment) or total
            found.prompts.append(prompt)
            what = f"prompt alone is {prompt} tokens" if prompt >= rules.max_length else f"{total} tokens"
            rest = "" if why == "too_long" else ": no supervised token would remain"
            note = RecordFault("DATA036", f"{what} > model_max_length {rules.max_length}{rest}")
            _note(found, reader.locate(record, note, path))
        pieces += [(record.item, content, piece) for piece in kept]
    found.segments = _lay_out(pieces)


def _lay_out(pieces: list[tuple[int, int, template.Rendered]]) -> Segments:
    ids = [segment.input_ids for _, _, segment in pieces]
    labels = [segment.labels for _, _, segment in pieces]
    assert all(len(one) == len(other) for one, other in zip(ids, labels, strict=True))
    empty = [np.empty(0, np.int32)]
    return Segments(
        np.concatenate(ids or empty),
        np.concatenate(labels or empty),
        np.array([len(one) for one in ids], np.int32),
        np.array([np.count_nonzero(one != template.IGNORE) for one in labels], np.int32),
        np.array([item for item, _, _ in pieces], np.int64),
        np.array([content for _, content, _ in pieces], np.uint64),
    )


# --- blocks ---------------------------------------------------------------------------------------


def blocks(records: Iterable[RawRecord]) -> Iterator[list[RawRecord]]:
    """The records in lists of about a megabyte."""
    block: list[RawRecord] = []
    size = 0
    for record in records:
        block.append(record)
        size += len(record.data) if isinstance(record.data, bytes) else 1000
        if size >= BLOCK_BYTES or len(block) >= BLOCK_RECORDS:
            yield block
            block, size = [], 0
    if block:
        yield block


def in_order(function: Callable[..., T], work: Iterable[Any], num_workers: int, *args: Any) -> Iterator[T]:
    """``function(piece, *args)`` of each piece in order, a few pieces ahead in ``num_workers`` processes.

    Args:
        args: sent to each process once, so they may be large.
    """
    if num_workers <= 1:
        for piece in work:
            yield function(piece, *args)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of running threads
    with ProcessPoolExecutor(num_workers, context, initializer=_remember, initargs=(function, args)) as pool:
        running: deque[Future[T]] = deque()
        try:
            for piece in work:
                with signals_blocked():  # the first pieces start the processes
                    running.append(pool.submit(_call, piece))
                if len(running) > 2 * num_workers:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        except BrokenProcessPool:
            way_out = "out of memory? --preprocessing_num_workers 1 takes the least"
            raise EnvironmentFault(
                f"a process that reads the data was ended from outside; {way_out}"
            ) from None


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """A process started here never gets what a terminal sends to all: it ends with its parent."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_job: tuple[Callable[..., Any], tuple[Any, ...]]


def _remember(function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    global _job
    machine.die_with_parent()
    parent = multiprocessing.parent_process()
    if parent and os.getppid() != parent.pid:  # gone before this one could ask to be told
        os._exit(1)
    _job = (function, args)


def _call(piece: Any) -> Any:
    function, args = _job
    return function(piece, *args)
