"""Raw records to conversations: the table of data formats, and how a record tells which one it has.

No tokenizer and no files here. A fault says the turn and the path to the value within the record;
the reader knows the file and finds the line. What holds in every format is in turns.py and texts.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from baichuan_sft.data.findings import RecordFault
from baichuan_sft.data.texts import Place, escaped, inspect, is_blank, key_names, kind, require_text, shown
from baichuan_sft.data.turns import TURN_KEYS, Message, check_order, read_turns, refuse_tools
from baichuan_sft.errors import pick

__all__ = ["FORMATS", "Message", "check_order", "escaped", "kind", "parse", "shown"]

# What data sets say about a record and nobody misses: not worth a line in the report.
SILENT_KEYS = {"id", "idx", "source", "lang", "language", "category"}
NOT_THERE = (None, "")  # values of an optional key
MAX_NAMES, OTHER_KEYS = 200, "key:..."  # a file may give every record keys of its own
Parsed = tuple[list[Message], list[RecordFault]]


def parse(
    raw: Any,
    data_format: str | None = None,
    *,
    merge_consecutive: bool = False,
    tally: Counter[str] | None = None,
) -> Parsed:
    """The conversation of one record, ready to render.

    Args:
        raw: what the JSON parser made of the record.
        data_format: a name in ``FORMATS``; None tells it from the keys of the record.
        merge_consecutive: join turns of one role in a row with a line break instead of refusing them.
        tally: counts what was accepted: ``turns``, ``format:belle``, ``role:human`` as written in the
            file, ``key:NAME`` of each key of a record or turn that nothing reads (see ``count_name``).
    Returns:
        The messages, ending with an assistant turn or being one of role "text", and what is worth
        saying of them (DATA030 to DATA035).
    Raises:
        UserError: unknown format.
        RecordFault: the record breaks a rule.
    """
    if type(raw) is not dict:
        raise RecordFault("DATA010", f"expected an object, got {kind(raw)}")
    name = data_format or detect(raw)
    form = pick("data format", name, FORMATS)
    if form.keys[0] not in raw and data_format:
        raise _no_key(raw, form.keys[0])
    messages, notes = form.read(raw, merge_consecutive)
    if tally is not None:
        tally[f"format:{name}"] += 1
        tally["turns"] += len(messages)
        _count_names(raw, form, tally)
    return messages, notes


def detect(raw: dict[str, Any]) -> str:
    """The name of the format whose marks are keys of ``raw``.

    Raises:
        RecordFault: no format's, or those of two.
    """
    marks = MARKS.keys() & raw.keys()
    if len(marks) > 1:
        marks.discard("text")  # Alpaca's own files repeat the whole prompt there
    if len(marks) == 1:
        return MARKS[marks.pop()]
    names = {MARKS[mark]: mark for mark in reversed(MARKS) if mark in marks}
    if not names:
        raise _no_key(raw, "conversations")
    if len(names) > 1:
        both = " and ".join(f'"{mark}" ({name})' for name, mark in reversed(names.items()))
        raise RecordFault("DATA011", f"keys of {len(names)} formats: {both}; pass --data_format")
    return next(iter(names))


def _no_key(raw: dict[str, Any], key: str) -> RecordFault:
    known = f"Known formats: {', '.join(FORMATS)}; pass --data_format"
    return RecordFault("DATA011", f'no key "{key}"; keys: {key_names(raw)}. {known}')


def _count_names(raw: dict[str, Any], form: Format, tally: Counter[str]) -> None:
    unread = [key for key in raw if key not in form.keys and key not in SILENT_KEYS]
    turns = raw[form.keys[0]]
    if type(turns) is list:
        roles = [turn.get("from") or turn["role"] for turn in turns]
        for role in dict.fromkeys(roles):
            tally["role:" + role] += roles.count(role)
        if sum(map(len, turns)) != 2 * len(turns):
            unread += [key for turn in turns for key in turn if key not in TURN_KEYS]
    for key in unread:
        count_name(tally, "key:" + shown(key, 30)[1:-1])


def count_name(tally: Counter[str], name: str, number: int = 1) -> None:
    """``tally[name] += number``; keys that nothing reads share an entry once there are ``MAX_NAMES``."""
    if len(tally) >= MAX_NAMES and name not in tally and name.startswith("key:"):
        name = OTHER_KEYS
    tally[name] += number


def belle(raw: dict[str, Any], merge: bool) -> Parsed:
    """A Belle (ShareGPT) record: ``{"conversations": [{"from", "value", "train"?}, ...], "system"?}``.

    ``role`` and ``content`` are read as ``from`` and ``value``, a ``system`` beside the turns as a
    first system turn.

    Source: github.com/LianjiaTech/BELLE and baichuan-inc/Baichuan2 fine-tune/data.
    """
    return _conversation(raw, "conversations", ("from", "value"), merge)


def openai(raw: dict[str, Any], merge: bool) -> Parsed:
    """An OpenAI fine-tuning record: ``{"messages": [{"role", "content", "weight"?}, ...]}``.

    "weight": 0 on an assistant message is "train": false; the role "developer" is a system.

    Source: platform.openai.com/docs/api-reference/fine-tuning/chat-input.
    """
    return _conversation(raw, "messages", ("role", "content"), merge)


def _conversation(raw: dict[str, Any], key: str, fields: tuple[str, str], merge: bool) -> Parsed:
    refuse_tools(raw)
    messages, notes = read_turns(raw, key, fields, merge)
    if "system" not in raw:
        return messages, notes
    system, said = _system(raw)
    if system and messages[0].role == "system":
        what = 'a system turn, and "system" stands beside the turns as well; keep one'
        raise RecordFault("DATA019", what, turn=0, at=(key, 0))
    return system + messages, said + notes


def alpaca(raw: dict[str, Any], merge: bool) -> Parsed:
    """An Alpaca record: ``{"instruction", "input"?, "output", "history"?, "system"?}``.

        history [[q0, a0]], instruction i, input x, output o
        -> user q0, assistant a0, user i + line break + x, assistant o

    Turns count from 0 in that order; the answers of the history are learnt as the last one is. An
    optional key that is null or "" is not there.

    Source: tatsu-lab/stanford_alpaca; history and the join as in LLaMA-Efficient-Tuning.
    """
    refuse_tools(raw)
    for key in ("instruction", "output"):
        if key not in raw:
            raise RecordFault("DATA014", f'no key "{key}"; keys: {key_names(raw)}')
    history = _history(raw)
    said = [_system(raw), *history, _question(raw, len(history))]
    said.append(_message("assistant", raw["output"], len(history) + 1, ("output",)))
    return [m for messages, _ in said for m in messages], [note for _, notes in said for note in notes]


def _history(raw: dict[str, Any]) -> list[Parsed]:
    """The messages before the instruction, two for each pair."""
    pairs = [] if raw.get("history") in NOT_THERE else raw["history"]
    if type(pairs) is not list:
        what = f'"history" must be a list of [question, answer], got {kind(pairs)}'
        raise RecordFault("DATA012", what, at=("history",))
    said = []
    for index, pair in enumerate(pairs):
        if type(pair) is not list or len(pair) != 2:
            got = f"a list of {len(pair)}" if type(pair) is list else kind(pair)
            what = f"expected [question, answer], got {got}"
            raise RecordFault("DATA013", what, turn=2 * index, at=("history", index))
        said.append(_message("user", pair[0], 2 * index, ("history", index, 0)))
        said.append(_message("assistant", pair[1], 2 * index + 1, ("history", index, 1)))
    return said


def _question(raw: dict[str, Any], turn: int) -> Parsed:
    """The user turn of an Alpaca record; one half may be blank, so it is looked at with no role."""
    alone = raw.get("input") in NOT_THERE
    (first,), notes = _message("user" if alone else "", raw["instruction"], turn, ("instruction",))
    if alone:
        return [first], notes
    role = "user" if is_blank(first.text) else ""
    (second,), more = _message(role, raw["input"], turn, ("input",))
    both = "\n".join(part for part in (first.text, second.text) if part)
    return [Message("user", both)], notes + more


def text(raw: dict[str, Any], merge: bool) -> Parsed:
    """A record of continued pre-training: ``{"text"}``; every token of it is learnt."""
    messages, notes = _message("text", raw["text"], None, ("text",))
    if is_blank(messages[0].text):
        raise RecordFault("DATA020", '"text" is empty - nothing to learn', at=("text",))
    return messages, notes


def _system(raw: dict[str, Any]) -> Parsed:
    """The system message beside the turns, none where it is null or empty."""
    if raw.get("system") in NOT_THERE:
        return [], []
    return _message("system", raw["system"], None, ("system",))


def _message(role: str, value: Any, turn: int | None, at: Place) -> Parsed:
    checked = require_text(value, turn, at)
    return [Message(role, checked)], inspect(role, checked, turn, at)


@dataclass(frozen=True)
class Format:
    """How one format is read.

    Attributes:
        read: of the record and ``merge_consecutive``.
        keys: of the record that it reads; it cannot do without the first.
        marks: keys of which one tells the format; none for a second name of a format.
    """

    read: Callable[[dict[str, Any], bool], Parsed]
    keys: tuple[str, ...]
    marks: tuple[str, ...] = ()


CHAT = ("system", "tools", "functions")
FORMATS: dict[str, Format] = {
    "belle": Format(belle, ("conversations", *CHAT), ("conversations",)),
    "sharegpt": Format(belle, ("conversations", *CHAT)),
    "messages": Format(openai, ("messages", *CHAT), ("messages",)),
    "alpaca": Format(alpaca, ("instruction", "input", "output", "history", *CHAT), ("instruction", "output")),
    "text": Format(text, ("text",), ("text",)),
}
MARKS = {mark: name for name, form in FORMATS.items() for mark in form.marks}
