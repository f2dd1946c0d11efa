"""What holds for the turns of every data format: their keys and roles, what is trained, and the order."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from baichuan_sft.data.findings import RecordFault
from baichuan_sft.data.texts import Place, clean, inspect, key_names, kind, require_text, shown

ROLE_ALIASES = {
    "system": "system",
    "developer": "system",
    "human": "user",
    "user": "user",
    "用户": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "助手": "assistant",
}
TOOL_ROLES = {"tool", "function", "tool_call", "function_call", "observation", "tool_response", "工具"}
TOOL_KEYS = ("tool_calls", "function_call")
TURN_KEYS = {"from", "value", "role", "content", "train", "weight", *TOOL_KEYS}
TRAIN_VALUES = {"train": "true or false", "weight": "0 or 1"}
OTHER_NAME = {"from": "role", "role": "from", "value": "content", "content": "value"}


class Message(NamedTuple):  # a frozen dataclass takes 2.5 times as long to make
    """One turn of a conversation.

    Attributes:
        role: "system", "user" or "assistant"; "text" for the one message of continued pre-training.
        text: as written in the file, neither stripped nor formatted.
        train: False keeps an assistant turn as context and makes none of its tokens a target.
    """

    role: str
    text: str
    train: bool = True


Columns = tuple[list[str], list[str], list[bool]]
MAKE = partial(tuple.__new__, Message)  # Message(*row) without its Python frame


def read_turns(
    raw: dict[str, Any], key: str, fields: tuple[str, str], merge: bool
) -> tuple[list[Message], list[RecordFault]]:
    """The conversation under ``raw[key]``, ending with an assistant turn, and what is to say of it.

    Args:
        fields: names of the role and of the text, for messages; either pair of names is read.
        merge: join turns of one role in a row instead of refusing them.
    Raises:
        RecordFault: a type, a role, a text or the order of the turns is wrong.
    """
    turns = raw[key]
    if type(turns) is not list:
        what = "is null, expected a list of turns" if turns is None else f"must be a list, got {kind(turns)}"
        raise RecordFault("DATA012", f'"{key}" {what}', at=(key,))
    roles, texts, train = _plain(turns, *fields) or _careful(turns, key, fields)
    messages = list(map(MAKE, zip(roles, texts, train)))
    notes: list[RecordFault] = []
    if not clean(texts):
        for index, (turn, role, text) in enumerate(zip(turns, roles, texts)):
            name = fields[1] if fields[1] in turn else OTHER_NAME[fields[1]]
            notes += inspect(role, text, index, (key, index, name))
    places: Sequence[int] = range(len(messages))
    if merge:
        messages, places = _merge(messages, key, notes)
    check_order(messages, key, places)
    if messages[-1].role == "user":
        place = places[len(messages) - 1]
        notes.append(RecordFault("DATA030", "trailing user turn dropped", turn=place, at=(key, place)))
        messages.pop()
    return messages, notes


def _plain(turns: list[Any], role: str, text: str) -> Columns | None:
    """Roles, texts and train, if all turns have these two keys, a role as the table has it, and a text.

    Nearly all records are such, and this takes a third of the time of ``_careful``, which says what is wrong.
    """
    try:
        roles = [ROLE_ALIASES[turn[role]] for turn in turns]
        texts = [turn[text] for turn in turns]
        "".join(texts)  # TypeError unless all are text
    except (KeyError, TypeError):
        return None
    return (roles, texts, [True] * len(turns)) if sum(map(len, turns)) == 2 * len(turns) else None


def _careful(turns: list[Any], key: str, fields: tuple[str, str]) -> Columns:
    rows = [_turn(turn, (key, index), fields) for index, turn in enumerate(turns)]
    return [row.role for row in rows], [row.text for row in rows], [row.train for row in rows]


def _turn(turn: Any, at: Place, fields: tuple[str, str]) -> Message:
    index = int(at[-1])
    if type(turn) is not dict:
        what = f"expected an object {{{', '.join(fields)}}}, got {kind(turn)}"
        raise RecordFault("DATA013", what, turn=index, at=at)
    for name in TOOL_KEYS:
        if turn.get(name):
            raise _no_tools(f'"{name}" is not empty', index, (*at, name))
    role = _role(turn, fields[0], index, at)
    name = _one_name(turn, fields[1], index, at)
    text = require_text(turn[name], index, (*at, name))
    return Message(role, text, _train(turn, role, index, at))


def _one_name(turn: dict[str, Any], name: str, index: int, at: Place) -> str:
    other = OTHER_NAME[name]
    if name in turn and other in turn:
        what = f'has both "{name}" and "{other}", keep one'
        raise RecordFault("DATA023", what, turn=index, at=(*at, other))
    if name not in turn and other not in turn:
        raise RecordFault("DATA014", f'no key "{name}"; keys: {key_names(turn)}', turn=index, at=at)
    return name if name in turn else other


def _role(turn: dict[str, Any], field: str, index: int, at: Place) -> str:
    field = _one_name(turn, field, index, at)
    value, known = turn[field], ", ".join(ROLE_ALIASES)
    if not isinstance(value, str):
        what = f'"{field}" is {kind(value)}, expected a role: {known}'
        raise RecordFault("DATA016", what, turn=index, at=(*at, field))
    name = value.casefold()
    if name in ROLE_ALIASES:
        return ROLE_ALIASES[name]
    if name in TOOL_ROLES:
        raise _no_tools(f"role {shown(value)}", index, (*at, field))
    close = difflib.get_close_matches(name.strip()[:40], ROLE_ALIASES, n=1)
    hint = f' - did you mean "{close[0]}"?' if close else "."
    what = f"unknown role {shown(value)}{hint} Known: {known}."
    raise RecordFault("DATA015", what, turn=index, at=(*at, field))


def _train(turn: dict[str, Any], role: str, index: int, at: Place) -> bool:
    """What "train" (a boolean) or OpenAI's "weight" (0, 1 or null) says; True where neither is there."""
    given = [name for name in TRAIN_VALUES if name in turn and (name, turn[name]) != ("weight", None)]
    if not given:
        return True
    name, value = given[-1], turn[given[-1]]
    what = ""
    if len(given) > 1:
        what = 'has both "train" and "weight", keep one'
    elif isinstance(value, bool) != (name == "train") or value not in (0, 1):
        what = f'"{name}" is {kind(value)}, expected {TRAIN_VALUES[name]}'
    elif value and role != "assistant":
        what = f'"{name}": {json.dumps(value)} on a {role} turn; only assistant turns can be learnt'
    if what:
        raise RecordFault("DATA021", what, turn=index, at=(*at, name))
    return bool(value)


def _no_tools(what: str, turn: int | None, at: Place) -> RecordFault:
    what = f"{what}; tool calls are not supported, remove the record"
    return RecordFault("DATA022", what, turn=turn, at=at)


def refuse_tools(raw: dict[str, Any]) -> None:
    """Raise RecordFault if the record offers tools."""
    for name in ("tools", "functions"):
        if raw.get(name) and raw[name] != "[]":
            raise _no_tools(f'"{name}" is not empty', None, (name,))


def _merge(messages: list[Message], key: str, notes: list[RecordFault]) -> tuple[list[Message], list[int]]:
    """Turns of one role in a row as one, and the index of the first of each; ``notes`` says which."""
    starts = [i for i, m in enumerate(messages) if i == 0 or m.role != messages[i - 1].role]
    merged = []
    for start, end in zip(starts, [*starts[1:], len(messages)]):
        group = messages[start:end]
        merged.append(Message(group[0].role, "\n".join(m.text for m in group), all(m.train for m in group)))
        if len(group) > 1:
            what = f"{len(group)} {group[0].role} turns in a row joined (turns {start}-{end - 1})"
            untrained = [start + index for index, message in enumerate(group) if not message.train]
            if 0 < len(untrained) < len(group):
                what += f"; none of it is learnt, because turn {untrained[0]} is not"
            notes.append(RecordFault("DATA035", what, turn=start, at=(key, start)))
    return merged, starts


def check_order(messages: list[Message], key: str = "turns", places: Sequence[int] = ()) -> None:
    """Raise RecordFault unless the turns are [system] user assistant ... [user] with one to learn.

    Args:
        key: of the record, where the turns stand.
        places: index there of each message, where turns may have been joined.
    """
    if not messages:
        raise RecordFault("DATA012", "conversation has no turns", at=(key,))
    roles = [message.role for message in messages]
    first = 1 if roles[0] == "system" else 0
    if roles[first:] != (["user", "assistant"] * len(roles))[: len(roles) - first]:
        _find_misplaced(roles, key, places)
    elif len(roles) > first + 1 and messages[first + 1].train:
        return  # nearly all conversations
    if "user" not in roles:
        raise RecordFault("DATA020", "no user turn - there is no question to learn the answer of", at=(key,))
    if "assistant" not in roles:
        raise RecordFault("DATA020", "no assistant turn - nothing to supervise", at=(key,))
    if roles[first] == "assistant":
        what = "the conversation starts with the assistant, expected a user turn"
        raise _misplaced(what, first, key, places)
    if not any(train for role, _, train in messages if role == "assistant"):
        what = 'every assistant turn has "train": false or "weight": 0 - nothing to supervise'
        raise RecordFault("DATA020", what, at=(key,))


def _find_misplaced(roles: list[str], key: str, places: Sequence[int]) -> None:
    """Raise for the first turn that cannot follow the one before it; return if there is none."""
    for index in range(1, len(roles)):
        role = roles[index]
        if role == roles[index - 1]:
            rows = f"two {role} turns in a row (turns {index - 1}-{index})"
            what = f"{rows}; join or remove one, or pass --merge_consecutive True"
            raise _misplaced(what, index, key, places)
        if role == "system":
            raise _misplaced("system turn after the conversation started", index, key, places)


def _misplaced(what: str, index: int, key: str, places: Sequence[int]) -> RecordFault:
    turn = places[index] if places else index
    return RecordFault("DATA019", what, turn=turn, at=(key, turn))
