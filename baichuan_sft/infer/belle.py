"""A conversation as a file: Belle JSON, which training reads too."""

from __future__ import annotations

import contextlib
import json
import os
from itertools import islice
from pathlib import Path
from typing import Any

from baichuan_sft.errors import UserError, first_line

NAMES = {"system": "system", "user": "human", "assistant": "gpt"}
Turns = list[dict[str, Any]]  # {"role", "content"}, and "train": False where an answer is not to be learnt


def save(file: Path, system: str, messages: Turns) -> int:
    """Write one conversation, whole or not at all; a question that was answered with nothing is left out.

    Returns:
        the number of questions written.
    Raises:
        UserError: no answer to save, or a file that cannot be written.
    """
    pairs = [(q, a) for q, a in zip(messages[::2], messages[1::2], strict=True) if a["content"].strip()]
    if not pairs:
        raise UserError("nothing to save: no question was answered yet.")
    turns = [{"role": "system", "content": system}] if system.strip() else []
    turns += [turn for pair in pairs for turn in pair]
    extra = [{} if turn.get("train", True) else {"train": False} for turn in turns]
    belle = [{"from": NAMES[t["role"]], "value": t["content"]} | more for t, more in zip(turns, extra)]
    part = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with open(part, "w", encoding="utf-8") as out:
            json.dump([{"conversations": belle}], out, ensure_ascii=False, indent=1)
            out.write("\n")
        os.replace(part, file)
    except (OSError, ValueError) as error:
        with contextlib.suppress(OSError, ValueError):
            part.unlink()
        raise UserError(f"{file}: cannot be written: {first_line(error)}.") from None
    return len(pairs)


def load(file: Path, item: int = 0) -> Turns:
    """Conversation number ``item`` of a file in any format that training reads.

    Raises:
        UserError: no such file or number, or what lies there is no conversation.
    """
    from baichuan_sft.data import formats, reader
    from baichuan_sft.data.findings import Finding, RecordFault

    faults: list[Finding] = []
    try:
        if not file.exists():
            raise UserError(f"{file}: no such file.")
        records = reader.read_raw(file, lambda finding, _: faults.append(finding.of(str(file))))
        record = next(islice(records, item, None), None)
    except OSError as error:
        raise UserError(f"{file}: {first_line(error)}.") from None
    if errors := [fault for fault in faults if fault.severity == "ERROR"]:
        raise UserError(f"{errors[0].place()}: {errors[0].words}")
    if record is None:
        raise UserError(f"{file}: has no conversation number {item + 1}.")
    try:
        messages, _ = formats.parse(reader.decode(record.data))
    except RecordFault as fault:
        found = reader.locate(record, fault, str(file))
        raise UserError(f"{found.place()}: {found.words}") from None
    if messages[0].role == "text":
        raise UserError(f"{file}: conversation {item + 1} is a text without turns.")
    return [{"role": m.role, "content": m.text} | ({} if m.train else {"train": False}) for m in messages]
