"""The page's conversation apart from the page: turns, what a model is sent, Belle JSON, harmless text."""

from __future__ import annotations

import copy
import json
import re
import secrets
import tempfile
from collections import OrderedDict
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

from baichuan_sft.errors import UserError

MAX_RECORD = 1 << 20  # bytes of a conversation that is loaded: more the browser shows slowly, no model reads
MAX_KEPT = 64  # conversations that a reload finds again
FENCE = re.compile(r" {0,3}(```|~~~)")
# An image has its address in parentheses, or elsewhere behind ]: or in a second pair of brackets.
ADDRESS = re.compile(r"\](?:\(|:|\[)")


@dataclass
class Turn:
    """A question, and by side the answer so far and the line below it.

    Attributes:
        train: False of a loaded turn whose answer is not to be learnt.
    """

    question: str
    answers: dict[int, str] = field(default_factory=dict)
    notes: dict[int, str] = field(default_factory=dict)
    train: bool = True


@dataclass
class Conversation:
    system: str = ""
    turns: list[Turn] = field(default_factory=list)

    def answered(self, side: int) -> list[tuple[Turn, str]]:
        """Turns and answers as this side knows them.

        A turn in which it was not asked has the first side's answer, one without any is left out.
        """
        known = [(turn, turn.answers.get(side) or turn.answers.get(0) or "") for turn in self.turns]
        return [(turn, answer) for turn, answer in known if answer.strip()]

    def prompt(self, side: int) -> list[dict[str, str]]:
        """What the model of a side is sent, to answer the last turn."""
        found = [{"role": "system", "content": self.system}] if self.system.strip() else []
        for turn, answer in Conversation(turns=self.turns[:-1]).answered(side):
            found.append({"role": "user", "content": turn.question})
            found.append({"role": "assistant", "content": answer})
        return [*found, {"role": "user", "content": self.turns[-1].question}]


# --- kept over a reload -------------------------------------------------------------------------------

_kept: OrderedDict[str, Conversation] = OrderedDict()
_kept_lock = Lock()


def take(name: str | None) -> tuple[str, Conversation]:
    """A copy of the conversation of this name, or an empty one, and the new name it is kept under.

    A copy, so that two tabs with the same address do not write into each other.
    """
    with _kept_lock:
        conversation = copy.deepcopy(_kept.get(name or "", Conversation()))
        new = secrets.token_urlsafe(12)
        _kept[new] = conversation
        while len(_kept) > MAX_KEPT:
            _kept.popitem(last=False)
    return new, conversation


# --- Belle JSON ---------------------------------------------------------------------------------------


def to_belle(conversation: Conversation, side: int) -> str:
    """What was said with one side, as a file that `baichuan-sft data check` takes; empty for nothing."""
    turns: list[dict[str, Any]] = []
    if conversation.system.strip():
        turns.append({"from": "system", "value": conversation.system})
    answered = conversation.answered(side)
    for turn, answer in answered:
        turns.append({"from": "human", "value": turn.question})
        turns.append({"from": "gpt", "value": answer} | ({} if turn.train else {"train": False}))
    return json.dumps([{"conversations": turns}], ensure_ascii=False, indent=1) + "\n" if answered else ""


def from_belle(data: bytes, name: str, item: int = 0) -> tuple[Conversation, int]:
    """The conversation number ``item`` of a file's bytes, and how many the file has.

    Read as training data are, all formats and faults alike.

    Raises:
        UserError: the file or the record is not a conversation, or there is no such record.
    """
    from baichuan_sft.data import formats, reader
    from baichuan_sft.data.findings import Finding, RecordFault

    faults: list[Finding] = []
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        records = list(reader.read_raw(file.name, lambda finding, _: faults.append(finding.of(name))))
    if errors := [fault for fault in faults if fault.severity == "ERROR"]:
        raise UserError(f"{errors[0].place()}: {errors[0].words}")
    if item >= len(records):
        raise UserError(f"{name}: has {len(records)} conversations, there is no number {item + 1}.")
    record = records[item]
    assert isinstance(record.data, bytes)
    if len(record.data) > MAX_RECORD:
        raise UserError(f"{name}: conversation {item + 1} is larger than {MAX_RECORD >> 20} MiB.")
    try:
        messages, _ = formats.parse(reader.decode(record.data))
    except RecordFault as fault:
        found = reader.locate(record, fault, name)
        raise UserError(f"{found.place()}: {found.words}") from None
    if messages[0].role == "text":
        raise UserError(f"{name}: conversation {item + 1} is a text without turns.")
    conversation = Conversation()
    if messages[0].role == "system":
        conversation.system = messages.pop(0).text
    for question, answer in zip(messages[::2], messages[1::2]):
        conversation.turns.append(Turn(question.text, {0: answer.text}, train=answer.train))
    return conversation, len(records)


# --- shown --------------------------------------------------------------------------------------------


def harmless(text: str) -> str:
    """``text`` with escapes for what hides or reorders the text around it."""
    from baichuan_sft.data.texts import CONTROL_CHARACTER, escaped

    return CONTROL_CHARACTER.sub(lambda match: escaped(match[0]), text)


def as_markdown(text: str) -> str:
    """An answer as Markdown that loads nothing from elsewhere and keeps its line breaks.

    An image would tell its server what was said; any can only be where some address follows a bracket,
    so that ``vec![1, 2]`` in code stays as it is. HTML is escaped by the page itself.
    """
    text = harmless(text)
    if ADDRESS.search(text):
        text = text.replace("![", "!\\[")
    lines, fence = text.split("\n"), ""
    for index, line in enumerate(lines):
        found = FENCE.match(line)
        if found and fence in ("", found[1]):
            fence = "" if fence else found[1]
        elif not fence and line and index + 1 < len(lines):
            lines[index] = f"{line}  "  # a line break, which Markdown would join to one paragraph
    return "\n".join(lines)
