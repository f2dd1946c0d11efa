"""What lies on disk of a benchmark: loaded, checked, with its examples apart; and seeded subsets of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from random import Random

from baichuan_sft.errors import UserError, pick
from baichuan_sft.evaluate.benchmarks import BENCHMARKS, Benchmark
from baichuan_sft.evaluate.formats import Folder, Part, bad, plain
from baichuan_sft.evaluate.items import Item, Loaded, Settings, Subject


class Absent(UserError):
    """The files of a benchmark are not there: where they come from, their licence, where to put them."""


def load(name: str, data_dir: str | Path, settings: Settings) -> Loaded:
    """All items of a benchmark.

    Where its authors ship no examples, some of each subject's items are drawn with the seed and never asked:
    as many as a prompt takes, at most half of the subject.

    Raises:
        Absent: no file of this benchmark lies below ``data_dir``.
        UserError: a file is not what it should be.
    """
    benchmark = pick("task", name, BENCHMARKS)
    if not Path(data_dir).is_dir():
        raise UserError(f"--data_dir {data_dir} is not a directory; put the benchmarks' own files below it.")
    folder = Folder(Path(data_dir), benchmark.folder)
    found = benchmark.read(folder)
    found.parts = [part for part in found.parts if part.items]
    if not found.parts:
        raise Absent(
            f"{benchmark.title}: no files of it below {data_dir}. Put {benchmark.files} there, "
            f"from {benchmark.source}; licence: {benchmark.licence}."
        )
    _check_ids(benchmark, found.parts)
    total = sum(len(part.items) for part in found.parts)
    own = sum(part.shots is None for part in found.parts)
    # the same examples are set apart for 0 shots as for 5, so that both ask the same
    wanted = max(benchmark.shots, settings.shots or 0)
    drawn = sum(_draw_shots(part, wanted, f"{settings.seed}/{name}/{part.name}") for part in found.parts)
    dropped = sum(_drop_asked(part) for part in found.parts)
    short = [part.name for part in found.parts if len(part.shots or ()) < wanted]
    notes = {
        f"{own} of {len(found.parts)} subjects come without examples: {drawn} items drawn as such with "
        f"seed {settings.seed}, never asked": drawn,
        f"{dropped} examples dropped: they are among the questions": dropped,
        f"{len(short)} of {len(found.parts)} subjects have fewer than {wanted} examples": short,
        f"{repeated(found.parts)} questions stand there twice and are asked twice": repeated(found.parts),
        f"{total:,} of the {benchmark.num_items:,} items": total + found.left_out < benchmark.num_items,
    }
    subjects = tuple(
        Subject(part.name, part.title or plain(part.name), tuple(part.items), tuple(part.shots or ()))
        for part in found.parts
    )
    files = dict(sorted(folder.sha256.items()))
    return Loaded(subjects, files, (*found.notes, *(note for note, holds in notes.items() if holds)))


def draw(loaded: Loaded, limit: int, seed: int) -> Loaded:
    """At most ``limit`` items, in the authors' order: a subject has its share, an item its chance."""
    random = Random(f"{seed}/draw")
    places = [
        (subject.name, i)
        for subject in loaded.subjects
        for i in random.sample(range(len(subject.items)), len(subject.items))
    ]
    if limit >= len(places):
        return loaded
    step = len(places) / limit
    start = random.random() * step
    chosen = {places[int(start + k * step)] for k in range(limit)}  # every step-th: spread over the subjects
    subjects = [
        Subject(
            s.name, s.title, tuple(item for i, item in enumerate(s.items) if (s.name, i) in chosen), s.shots
        )
        for s in loaded.subjects
    ]
    note = f"{limit:,} of {len(places):,} items drawn with seed {seed}"
    return Loaded(tuple(s for s in subjects if s.items), loaded.files, (*loaded.notes, note))


def _check_ids(benchmark: Benchmark, parts: list[Part]) -> None:
    counts = Counter(item.id for part in parts for item in (*part.items, *(part.shots or ())))
    if twice := [item for item, count in counts.items() if count > 1]:
        bad(
            f"{benchmark.folder}/",
            f"holds item {twice[0]!r} {counts[twice[0]]} times; remove what is not the authors'",
        )


def _same(item: Item) -> tuple[str, frozenset[str]]:
    """Equal where two items ask the same, however spaced and in whatever order of choices."""
    question = " ".join(f"{item.fields.get('passage', '')} {item.question}".split())
    return question, frozenset(" ".join(choice.split()) for choice in item.choices)


def repeated(parts: list[Part]) -> int:
    return sum(len(part.items) - len({_same(item) for item in part.items}) for part in parts)


def _draw_shots(part: Part, wanted: int, seed: str) -> int:
    """Examples from the items that stand there once, where none were shipped; how many."""
    if part.shots is not None:
        return 0
    often = Counter(map(_same, part.items))
    once = [i for i, item in enumerate(part.items) if often[_same(item)] == 1]
    places = set(Random(seed).sample(once, min(wanted, len(part.items) // 2, len(once))))
    part.shots = [item for i, item in enumerate(part.items) if i in places]
    part.items = [item for i, item in enumerate(part.items) if i not in places]
    return len(places)


def _drop_asked(part: Part) -> int:
    """Examples that are asked too leave the pool; how many."""
    asked = {_same(item) for item in part.items}
    kept = [item for item in part.shots or () if _same(item) not in asked]
    dropped = len(part.shots or ()) - len(kept)
    part.shots = kept
    return dropped
