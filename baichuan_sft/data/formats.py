"""Raw records to conversations: the table of data formats and the rules every conversation obeys.

No tokenizer and no files here. A message of an error starts with the turn it is about
("turn 2: ..."); the reader puts the file, the line and the item in front.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from baichuan_sft.errors import UserError, pick, suggest

ROLE_ALIASES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "用户": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "助手": "assistant",
}
JSON_KINDS = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}

DROPPED_TRAILING_USER = "trailing user turn dropped"
EMPTY_USER_TURN = "empty user turn"


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: "system", "user" or "assistant".
        text: as written in the file, neither stripped nor formatted.
        train: False keeps an assistant turn as context and makes none of its tokens a target.
    """

    role: str
    text: str
    train: bool = True


def parse(raw: Any, data_format: str | None = None) -> tuple[list[Message], list[str]]:
    """The conversation of one record, ready to render.

    Args:
        raw: what the JSON parser made of the record.
        data_format: a name in ``FORMATS``; None means "belle".
    Returns:
        The messages, ending with an assistant turn, and the name of every normalisation or
        warning the record caused (``DROPPED_TRAILING_USER``, ``EMPTY_USER_TURN``).
    Raises:
        UserError: unknown format, or the record breaks a rule; no file location in the message.
    """
    messages = pick("data format", data_format or "belle", FORMATS)(raw)
    notes = [EMPTY_USER_TURN for m in messages if m.role == "user" and not m.text]
    if messages[-1].role == "user":
        # Nothing answers it, so nothing in it can be learnt.
        messages = messages[:-1]
        notes.append(DROPPED_TRAILING_USER)
    return messages, notes


def belle(raw: Any) -> list[Message]:
    """A Belle (ShareGPT) record: ``{"conversations": [{"from", "value", "train"?}, ...], "system"?}``.

    ``role`` and ``content`` are read as ``from`` and ``value``, a ``system`` beside the turns as a
    first system turn; other keys are left alone.

    Returns:
        The messages in file order; a last user turn is still there.
    Raises:
        UserError: a key, a type, a role or the order of the turns is wrong.
    Source: github.com/LianjiaTech/BELLE and baichuan-inc/Baichuan2 fine-tune/data.
    """
    if not isinstance(raw, dict):
        raise UserError(f"expected an object, got {kind(raw)}")
    if "conversations" not in raw:
        raise UserError(f'no key "conversations"; keys: {_names(raw)}. Known formats: {", ".join(FORMATS)}.')
    turns = raw["conversations"]
    if turns is None:
        raise UserError('"conversations" is null, expected a list of turns')
    if not isinstance(turns, list):
        raise UserError(f'"conversations" must be a list, got {kind(turns)}')
    messages = [_belle_turn(f"turn {index}", turn) for index, turn in enumerate(turns)]
    check_order(messages)
    return _system_beside(raw, messages)


def _system_beside(raw: dict[str, Any], messages: list[Message]) -> list[Message]:
    if raw.get("tools") not in (None, "", "[]", []):
        raise UserError('"tools" is not empty; tool calls are not supported, remove the record or the key')
    if raw.get("system") in (None, ""):
        return messages
    text = _text('key "system"', "system", raw["system"])
    if messages[0].role == "system":
        raise UserError('turn 0: a system turn, and "system" stands beside the turns as well; keep one')
    return [Message("system", text), *messages]


def _belle_turn(where: str, turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise UserError(f"{where}: expected an object {{from, value}}, got {kind(turn)}")
    role = _role(where, *_field(where, turn, "from", "role"))
    text = _text(where, *_field(where, turn, "value", "content"))
    train = turn.get("train", True)
    if not isinstance(train, bool):
        raise UserError(f'{where}: "train" is {kind(train)}, expected true or false')
    if train and "train" in turn and role != "assistant":
        raise UserError(f'{where}: "train": true on a {role} turn; only assistant turns can be learnt')
    if role == "assistant" and not text:
        raise UserError(f"{where}: assistant text is empty - it would teach the model to say nothing")
    return Message(role, text, train)


def _field(where: str, turn: dict[str, Any], name: str, other: str) -> tuple[str, Any]:
    if name in turn and other in turn:
        raise UserError(f'{where}: has both "{name}" and "{other}", keep one')
    key = name if name in turn else other
    if key not in turn:
        raise UserError(f'{where}: no key "{name}"; keys: {_names(turn)}')
    return key, turn[key]


def _role(where: str, key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UserError(f'{where}: "{key}" is {kind(value)}, expected a role: {", ".join(ROLE_ALIASES)}')
    name = value.casefold()
    if name not in ROLE_ALIASES:
        hint = suggest(name, list(ROLE_ALIASES)) or "."
        raise UserError(f"{where}: unknown role {shown(value)}{hint} Known: {', '.join(ROLE_ALIASES)}.")
    return ROLE_ALIASES[name]


def _text(where: str, key: str, value: Any) -> str:
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        parts = Counter(str(part.get("type", "untyped")) for part in value)
        counts = ", ".join(f"{count} {shown(name)} part" for name, count in parts.items())
        raise UserError(f'{where}: "{key}" is a list of content parts ({counts}); this model is text-only')
    if not isinstance(value, str):
        raise UserError(f'{where}: "{key}" is {kind(value)}, expected text')
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"U+{ord(value[error.start]):04X}"
        raise UserError(f'{where}: "{key}" has a lone surrogate {half}, not encodable as UTF-8') from None
    return value


def check_order(messages: list[Message]) -> None:
    """Raise UserError unless the turns are [system] user assistant ... [user] with one to learn."""
    if not messages:
        raise UserError("conversation has no turns")
    first = 1 if messages[0].role == "system" else 0
    for index in range(first, len(messages)):
        role = messages[index].role
        if role == "system":
            raise UserError(f"turn {index}: system turn after the conversation started")
        if index > first and role == messages[index - 1].role:
            raise UserError(f"turn {index}: two {role} turns in a row (turns {index - 1}-{index})")
    roles = {message.role for message in messages}
    if "user" not in roles:
        raise UserError("no user turn - there is no question to learn the answer of")
    if "assistant" not in roles:
        raise UserError("no assistant turn - nothing to supervise")
    if messages[first].role == "assistant":
        raise UserError(f"turn {first}: the conversation starts with the assistant, expected a user turn")
    if not any(message.role == "assistant" and message.train for message in messages):
        raise UserError('every assistant turn has "train": false - nothing to supervise')


def kind(value: Any) -> str:
    """What a JSON value is, in words, with the value where it is a number: "a number (42)"."""
    return JSON_KINDS.get(type(value)) or f"a number ({str(value)[:20]})"


def shown(text: str, limit: int = 80) -> str:
    """``text`` in double quotes for a terminal: cut at ``limit`` characters, control characters escaped."""
    cut = text if len(text) <= limit else text[:limit] + "..."
    return '"' + "".join(escaped(char) for char in cut) + '"'


def escaped(char: str) -> str:
    """One character, or its escape where printing it could move the cursor, hide or reorder text."""
    if char in ' "' or not unicodedata.category(char).startswith(("C", "Z")):
        return char
    return char.encode("unicode_escape").decode("ascii")


def _names(record: dict[str, Any]) -> str:
    names = ", ".join(shown(key, 30)[1:-1] for key in list(record)[:10])
    return f"[{names}{', ...' if len(record) > 10 else ''}]"


FORMATS: dict[str, Callable[[Any], list[Message]]] = {"belle": belle, "sharegpt": belle}
