"""Which files are read and how much of each: ``a.json:0.7,b.jsonl:0.3``, ``c.json#1000``, a YAML list."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from baichuan_sft.data.files import expand
from baichuan_sft.data.formats import FORMATS
from baichuan_sft.data.length import TRUNCATION
from baichuan_sft.data.survey import DOCUMENT
from baichuan_sft.errors import UserError, pick, suggest

MAX_WEIGHT, MAX_SAMPLES = 1e12, 10**9
SHARE = re.compile(r"(?P<path>.+?)(?::(?P<weight>[^:#/\\]*))?(?:#(?P<samples>[^:#/\\]*))?")


@dataclass(frozen=True)
class Source:
    """One file and what is wanted of it.

    Attributes:
        weight: its share of the conversations, relative to the other weights; None where none is given.
        samples: how many of its conversations; more than it has are repeated.
        group: files of one pattern share a weight or a count.
    """

    path: str
    weight: float | None = None
    samples: int | None = None
    truncation: str | None = None
    data_format: str | None = None
    group: int = 0


def parse_sources(spec: str | Sequence[str | Path], *, allow_outside: bool = False) -> list[Source]:
    """The files of ``--data_path``, patterns expanded, each at most once.

    Args:
        spec: ``FILE[:WEIGHT][#COUNT]`` with commas between, a list of these, or the name of a YAML list
            whose entries have ``path`` and may have the other fields of ``Source``; its paths count from
            its own directory.
        allow_outside: a YAML list may name files that are not below its directory.
    Raises:
        UserError: nothing there, one file twice, a weight on some sources only, or a value out of range.
    """
    given = [spec] if isinstance(spec, str) else [str(path) for path in spec]
    # A name may hold a comma.
    words = [word for one in given for word in ([one] if os.path.exists(one) else one.split(","))]
    words = [word.strip() for word in words if word.strip()]
    if not words:
        raise UserError("no data file given; pass --data_path FILE[,FILE...]")
    asked: list[Source] = []
    for word in words:
        if word.endswith((".yaml", ".yml")):
            asked += _read_list(Path(word), allow_outside)
        else:
            asked.append(_read_word(word))
    found = [
        replace(source, path=path, group=group)
        for group, source in enumerate(asked)
        for path in expand(source.path)
    ]
    _check(found)
    return found


def split_share(word: str) -> tuple[str, str]:
    """``a.json:0.7`` as ``a.json`` and ``:0.7``; the second is empty where nothing follows the name."""
    match = SHARE.fullmatch(word)
    assert match is not None  # the pattern matches any text
    return match["path"], word[len(match["path"]) :]


def _read_word(word: str) -> Source:
    if os.path.exists(word):  # a name may hold a colon
        return Source(word)
    match = SHARE.fullmatch(word)
    assert match is not None
    path, weight, samples = match["path"], match["weight"], match["samples"]
    if weight is None and samples is None:
        return Source(path)
    return Source(
        path,
        None if weight is None else _number(word, weight, float, "a weight, like 0.7"),
        None if samples is None else _number(word, samples, int, "a count, like 1000"),
    )


def _number(where: str, text: str, kind: type, rule: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise UserError(f"{where}: {text!r} is not {rule}; expected FILE[:WEIGHT][#COUNT]") from None


def _read_list(path: Path, allow_outside: bool) -> list[Source]:
    import yaml

    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(entries, list) or not entries:
        raise UserError(f'{path}: expected a list of sources, each with "path"; see data/mix.yaml')
    return [_entry(path, number, entry, allow_outside) for number, entry in enumerate(entries)]


def _entry(path: Path, number: int, entry: Any, allow_outside: bool) -> Source:
    where = f"{path} source {number}"
    entry = {"path": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
        raise UserError(f'{where}: expected "path" and its options, got {entry!r:.80}')
    known = [field.name for field in fields(Source) if field.name != "group"]
    for key in entry:
        if key not in known:
            hint = suggest(str(key), known) or "."
            raise UserError(f"{where}: unknown key {key!r}{hint} Known: {', '.join(known)}.")
    for key, kinds in (("weight", (int, float)), ("samples", (int,))):
        if key in entry and (isinstance(entry[key], bool) or not isinstance(entry[key], kinds)):
            raise UserError(f"{where}: {key} is {entry[key]!r}, expected a number")
    for key, table in (("truncation", TRUNCATION), ("data_format", [*FORMATS, DOCUMENT])):
        if key in entry:
            pick(key, entry[key], dict.fromkeys(table))
    folder = path.parent.resolve()
    file = folder / entry["path"]
    for found in [str(file)] if allow_outside else [str(file), *expand(str(file))]:
        if not allow_outside and not Path(found).resolve().is_relative_to(folder):
            way_out = "pass --allow_outside True if it is meant"
            raise UserError(f"{where}: {entry['path']} is outside {folder}; {way_out}")
    return Source(**{**entry, "path": str(file)})


def _check(sources: list[Source]) -> None:
    """Raise UserError where two sources contradict each other or a number makes no sense."""
    seen: dict[str, str] = {}
    for source in sources:
        real = os.path.realpath(source.path)
        if real in seen:
            raise UserError(
                f"{source.path} is listed twice (as {seen[real]}); name it once, with #COUNT to repeat it"
            )
        seen[real] = source.path
        if source.weight is not None and not 0 < source.weight <= MAX_WEIGHT:
            raise UserError(f"{source.path}: weight {source.weight:g}, expected a number > 0 and <= 1e12")
        if source.samples is not None and not 1 <= source.samples <= MAX_SAMPLES:
            rule = f"expected 1 to {MAX_SAMPLES:,}"
            raise UserError(f"{source.path}: {source.samples:,} conversations asked for, {rule}")
        if source.samples is not None and source.weight is not None:
            raise UserError(f"{source.path}: has a weight and a count, keep one")
    weighted = [source for source in sources if source.weight is not None]
    if weighted and len(weighted) < len(sources):
        other = next(source.path for source in sources if source.weight is None)
        raise UserError(
            f"{weighted[0].path} has a weight and {other} has none; give every source one, or none"
        )


def mix(sources: Sequence[Source], sizes: Sequence[int], seed: int) -> list[np.ndarray]:
    """Which records of each source are used, as numbers within it.

        weights 0.7, 0.3 of 70 and 60 records   ->   70 and 30: as many as there are without a repeat
        #100 of 70 records                      ->   each once, and 30 drawn a second time

    What is left out or drawn twice is drawn by ``seed``; the order is that of the file.

    Args:
        sizes: usable records of each source.
    """
    groups = sorted({source.group for source in sources})
    members = {g: [i for i, source in enumerate(sources) if source.group == g] for g in groups}
    size = {g: sum(sizes[i] for i in members[g]) for g in groups}
    first = {g: sources[members[g][0]] for g in groups}
    wanted = {g: size[g] if first[g].samples is None else first[g].samples or 0 for g in groups}
    if first[groups[0]].weight is not None:
        total_weight = sum(first[g].weight or 0 for g in groups)
        share = {g: (first[g].weight or 0) / total_weight for g in groups}
        total = min(size[g] / share[g] for g in groups)
        wanted = {g: min(size[g], round(total * share[g])) for g in groups}
    chosen: list[np.ndarray] = [np.empty(0, np.int64)] * len(sources)
    for g in groups:
        # One stream of numbers per group, so that a further source changes nothing in the others.
        picked = _draw(size[g], wanted[g] if size[g] else 0, np.random.default_rng([seed, g]))
        offset = 0
        for i in members[g]:
            chosen[i] = picked[(picked >= offset) & (picked < offset + sizes[i])] - offset
            offset += sizes[i]
    return chosen


def _draw(size: int, wanted: int, rng: np.random.Generator) -> np.ndarray:
    if wanted == size:
        return np.arange(size)
    whole, rest = divmod(wanted, max(size, 1))
    drawn = rng.permutation(size)[:rest]
    return np.sort(np.concatenate([np.tile(np.arange(size), whole), drawn]))
