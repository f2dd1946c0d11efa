"""One conversation in the terminal: what was said, the next answer, and how either is shown.

Answers go to stdout and everything else to stderr, so that a pipe carries the answers alone.
"""

from __future__ import annotations

import os
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from baichuan_sft.errors import UserError, first_line
from baichuan_sft.infer.chat import check_text, states

# Moves the cursor, hides or reorders text. Joiners stay: emoji are made with them.
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


@dataclass
class Conversation:
    """Who answers, how, and what was said.

    Attributes:
        options: what ``model.chat`` takes over the model's own generation settings; a static cache too.
        system: text of the system message; empty for none.
        interactive: a person reads and types: there are prompts, and the speed is shown.
        messages: turns so far, user and assistant in alternation.
        settings: what of SETTINGS was given, as written on the command line; ``options`` follows from it.
        unanswered: the question that an error or Ctrl-C left without an answer, for ``/retry``.
        file: where the conversation was last saved.
    """

    model: Any
    tokenizer: Any
    options: dict[str, Any] = field(default_factory=dict)
    system: str = ""
    stream: bool = True
    interactive: bool = False
    messages: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, str] = field(default_factory=dict)
    unanswered: str = ""
    file: Path | None = None


def answer(chat: Conversation, text: str) -> None:
    """Print the answer to ``text`` as it grows, and add both to the conversation.

    Ctrl-C stops the answer; what was generated is kept. After an error neither is.

    Raises:
        UserError: the text, or what ``generate`` made of it.
    """
    check_text(text, chat.model.config.context_length)
    chat.unanswered = text
    system = [{"role": "system", "content": chat.system}] if chat.system else []
    question = {"role": "user", "content": text}
    reply, shown, num_tokens, stopped = "", 0, 0, False
    if chat.interactive:
        print("assistant> ", end="", flush=True)
    start = time.monotonic()

    def show(state: str) -> None:
        nonlocal reply, shown, num_tokens
        reply, num_tokens = state, num_tokens + 1
        if chat.stream:
            shown += write(complete(reply)[shown:])

    try:
        states(chat, [*system, *chat.messages, question], show)
    except KeyboardInterrupt:
        reply, stopped = complete(reply), True
    except (ValueError, RuntimeError, LookupError) as error:
        write("\n")
        raise UserError(first_line(error)) from error
    seconds = time.monotonic() - start
    write(reply[shown:] + "\n")
    if reply or not stopped:
        chat.messages += [question, {"role": "assistant", "content": reply}]
        chat.unanswered = ""
    if chat.interactive:
        speed = f"{num_tokens} tokens, {num_tokens / seconds:.1f} tokens/s"
        notice(f"stopped, {speed}" if stopped else speed)


def complete(text: str) -> str:
    """``text`` without the half character at its end, for which U+FFFD stands until its last byte."""
    return text.rstrip("\ufffd")


def write(text: str) -> int:
    """Print part of an answer at once, made harmless to the terminal; returns its length."""
    print(harmless(text), end="", flush=True)
    return len(text)


def harmless(text: str) -> str:
    return UNSAFE.sub(lambda match: ascii(match[0])[1:-1], text)


def notice(text: str) -> None:
    """One line beside the conversation, dim where a person reads it."""
    text, dim = harmless(text), sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    print(f"\x1b[2m{text}\x1b[0m" if dim else text, file=sys.stderr, flush=True)
