"""What holds for every text of a record, and how values are shown in messages.

``at`` is always the path from the record to the value: ``("conversations", 2, "value")``.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from typing import Any

from baichuan_sft.data.findings import RecordFault

JSON_KINDS = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
SURROGATE = re.compile("[\ud800-\udfff]")
CONTROL_TOKEN = re.compile(r"<(?:/?s|unk|reserved_\d+)>")
# C0 without tab and line ends, DEL, C1, and what turns the direction of text around.
CONTROL_CHARACTER = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
HARMLESS = "\n\r\t\u3000\xa0\u200b\u200d\ufeff"  # not printable in Python's eyes, common in Chinese text
# White space and what has no width: nothing can be seen of a text that holds nothing else.
BLANK = "".join(filter(str.isspace, map(chr, range(0x3001)))) + "\u200b\u200c\u200d\u2060\ufeff"

Place = tuple[str | int, ...]


def require_text(value: Any, turn: int | None, at: Place) -> str:
    """``value`` if it is a string, whatever is in it; the last of ``at`` is its name in the message."""
    if isinstance(value, str):
        return value
    what = f"is {kind(value)}, expected text"
    if isinstance(value, list) and any(isinstance(part, dict) for part in value):
        parts = Counter(_part(part) for part in value).most_common(5)
        counts = ", ".join(f"{count} {name} part{'s' * (count > 1)}" for name, count in parts)
        what = f"is a list of content parts; this model is text-only ({counts})"
    elif isinstance(value, list) and value and all(isinstance(part, str) for part in value):
        what = "is a list of strings, expected text; join them"
    name = at[-1] if isinstance(at[-1], str) else at[0]
    raise RecordFault("DATA016", f'"{name}" {what}', turn=turn, at=at)


def _part(part: Any) -> str:
    if not isinstance(part, dict):
        return kind(part).split(" (")[0].removeprefix("a ").removeprefix("an ")
    name = part.get("type")
    return shown(name, 30)[1:-1] if isinstance(name, str) else "untyped"


def clean(texts: list[str]) -> bool:
    """True if ``inspect`` would find nothing in any of them."""
    joined = "".join(texts)
    if "<" in joined or "" in texts or any(map(str.isspace, texts)):
        return False
    return joined.isprintable() or (_printable(joined) and not any(map(is_blank, texts)))


def is_blank(text: str) -> bool:
    return not text.strip(BLANK)


def _printable(text: str) -> bool:
    """False for every surrogate and control character, and for a few others: C speed instead of a regex."""
    if text.isprintable():
        return True
    for char in HARMLESS:
        text = text.replace(char, "")
    return text.isprintable()


def inspect(role: str, text: str, turn: int | None, at: Place) -> list[RecordFault]:
    """What is worth saying of one text.

    Raises:
        RecordFault: it cannot be encoded, or an assistant says nothing.
    """
    printable = _printable(text)
    half = None if printable else SURROGATE.search(text)
    if half:
        what = f"lone surrogate U+{ord(half[0]):04X} - not encodable as UTF-8"
        raise RecordFault("DATA017", what, turn=turn, at=at)
    notes = []
    if is_blank(text):
        if role == "assistant":
            how = "only white space" if text else "empty"
            what = f"assistant text is {how} - it would teach the model to say nothing"
            raise RecordFault("DATA018", what, turn=turn, at=at)
        if role == "user":
            what = "user turn of only white space" if text else "empty user turn"
            notes.append(RecordFault("DATA031", what, turn=turn, at=at))
    if "<" in text and (tokens := dict.fromkeys(CONTROL_TOKEN.findall(text))):
        what = f"text of a control token, encoded as plain text: {_some(list(tokens))}"
        notes.append(RecordFault("DATA032", what, turn=turn, at=at))
    if not printable and (characters := sorted(set(CONTROL_CHARACTER.findall(text)))):
        what = f"control characters {_some([f'U+{ord(char):04X}' for char in characters])}"
        notes.append(RecordFault("DATA033", what, turn=turn, at=at))
    return notes


def _some(names: list[str]) -> str:
    return " ".join(names[:10]) + (" ..." if len(names) > 10 else "")


def key_names(record: dict[str, Any]) -> str:
    """The first keys of a record, printable: "[id, text]"."""
    names = ", ".join(shown(key, 30)[1:-1] for key in list(record)[:10])
    return f"[{names}{', ...' if len(record) > 10 else ''}]"


def kind(value: Any) -> str:
    """What a JSON value is, in words, with the value where it is a number: "a number (42)"."""
    return JSON_KINDS.get(type(value)) or f"a number ({str(value)[:20]})"


def shown(text: str, limit: int = 80) -> str:
    """``text`` in double quotes for a terminal: cut at ``limit`` characters, control characters escaped."""
    cut = text if len(text) <= limit else text[:limit] + "..."
    return f'"{plain(cut)}"'


def plain(text: str) -> str:
    """The text with everything escaped that moves a cursor or cannot be seen."""
    return text if text.isprintable() else "".join(map(escaped, text))


def escaped(char: str) -> str:
    """One character, or its escape where printing it could move the cursor, hide or reorder text."""
    if char in ' "' or not unicodedata.category(char).startswith(("C", "Z")):
        return char
    return char.encode("unicode_escape").decode("ascii")
