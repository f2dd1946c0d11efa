"""The lane that nearly all records take: plain chat records, proved to be faultless by counting.

What ``formats.parse`` would accept without a note is told here in a third of the time; of everything else
``read`` says nothing, and the careful way decides. Both ways agree on every record (tests/test_plain.py).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import repeat
from typing import Any, NamedTuple

import orjson

from baichuan_sft.data.findings import RecordFault
from baichuan_sft.data.texts import clean
from baichuan_sft.data.turns import MAKE, ROLE_ALIASES, Message, check_order

# declared formats -> the key of the turns, their role and their text
LANES = {
    "belle": ("conversations", "from", "value"),
    "sharegpt": ("conversations", "from", "value"),
    "messages": ("messages", "role", "content"),
}


@dataclass(frozen=True)
class Shape:
    """A sequence of roles as written, which is one of a good conversation; ``roles`` are what they mean."""

    format: str
    written: tuple[str, ...]
    roles: tuple[str, ...]
    letters: str


class Plain(NamedTuple):
    """One good record without anything worth a note."""

    shape: Shape
    texts: list[str]

    def messages(self) -> list[Message]:
        return list(map(MAKE, zip(self.shape.roles, self.texts, repeat(True))))


class PlainReader:
    """Reads plain records and counts what they hold.

    Args:
        data_format: as declared; None reads the first of ``LANES`` whose key is there.
    """

    def __init__(self, data_format: str | None) -> None:
        names = ("belle", "messages") if data_format is None else (data_format,)
        self.lanes = [(name, *LANES[name]) for name in names if name in LANES]
        self.lane = self.lanes[0] if self.lanes else None
        self.shapes: dict[tuple[str, ...], Shape | None] = {}
        self.counts: Counter[Shape] = Counter()

    def read(self, data: Any) -> Plain | None:
        """The record if it is plain; None says nothing of it."""
        if type(data) is not bytes:
            return None
        try:
            raw = orjson.loads(data)
            if self.lane is None or self.lane[1] not in raw:  # files are of one format, so this is rare
                self.lane = next(lane for lane in self.lanes if lane[1] in raw)
            name, key, role, text = self.lane
            turns = raw[key]
            if len(raw) > 2 or (len(raw) == 2 and type(raw.get("id")) not in (str, int)):
                return None
            written = tuple([turn[role] for turn in turns])
            texts = [turn[text] for turn in turns]
            # Each key has one colon, the texts have theirs: one more, and some key was given twice.
            colons = len(raw) + 2 * len(turns) + "".join(texts).count(":")
            if sum(map(len, turns)) != 2 * len(turns) or data.count(b":") != colons:
                return None
            if b"\\" in data and b"\\u003" in data:  # the first is quicker, and mostly the end of it
                return None
            shape = self.shapes[written] if written in self.shapes else self._learn(name, written)
        except (orjson.JSONDecodeError, KeyError, TypeError, StopIteration):
            return None
        if shape is None or not clean(texts):
            return None
        self.counts[shape] += 1
        return Plain(shape, texts)

    def _learn(self, name: str, written: tuple[str, ...]) -> Shape | None:
        roles = tuple(ROLE_ALIASES.get(role, "") for role in written)
        self.shapes[written] = None
        try:
            check_order([Message(role, "") for role in roles])
        except RecordFault:
            return None
        if "" not in roles and roles[-1] == "assistant":
            self.shapes[written] = Shape(name, written, roles, "".join(role[0] for role in roles))
        return self.shapes[written]

    def tally(self) -> Counter[str]:
        """What ``formats.parse`` counts, of all plain records so far."""
        total: Counter[str] = Counter()
        for shape, number in self.counts.items():
            total[f"format:{shape.format}"] += number
            total["turns"] += number * len(shape.written)
            for role in shape.written:
                total[f"role:{role}"] += number
        return total
