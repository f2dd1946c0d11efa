"""``baichuan-sft chat``: a conversation in the terminal.

Answers go to stdout and everything else to stderr, so that a pipe carries the answers alone.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from baichuan_sft.errors import UserError, pick
from baichuan_sft.infer.chat import (
    build_parser,
    describe,
    first_line,
    generation_options,
    load,
    states,
    static_cache,
)

FENCE = '"""'
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
    """

    model: Any
    tokenizer: Any
    options: dict[str, Any] = field(default_factory=dict)
    system: str = ""
    stream: bool = True
    interactive: bool = False
    messages: list[dict[str, str]] = field(default_factory=list)


def main(argv: list[str] | None = None) -> int:
    """Talk to a model, an adapter or a checkpoint until the input ends; see ``--help``.

    Args:
        argv: the arguments after ``chat``; None takes those of the process.
    Returns:
        The exit code, 0.
    Raises:
        UserError: wrong options, or no Baichuan model there. EnvironmentFault: no such device.
    """
    args = build_parser().parse_args(argv)
    options = generation_options(args)
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a stray byte is no reason to end a conversation
    model, tokenizer = load(args)
    notice(describe(model))
    if args.compile:
        options["past_key_values"] = static_cache(model)
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        edit_lines()
        notice("/help lists the commands, Ctrl-C stops an answer, Ctrl-D ends the conversation")
    chat = Conversation(
        model, tokenizer, options, args.system, stream=not args.no_stream, interactive=interactive
    )
    try:
        return converse(chat)
    except BrokenPipeError:  # whoever read the answers has gone; the interpreter still flushes at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def edit_lines() -> None:
    """Let ``input()`` edit and remember lines, and take a pasted text of many lines as one message."""
    with contextlib.suppress(ImportError):  # not every Python has it
        import readline

        readline.parse_and_bind("set enable-bracketed-paste on")


# --- conversation -----------------------------------------------------------------------------------


def converse(chat: Conversation) -> int:
    """Answer message after message, until ``/exit``, the end of input, or Ctrl-C at the prompt.

    Returns:
        The exit code, 0.
    """
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            take_turn(chat)
    return 0


def take_turn(chat: Conversation) -> None:
    """One message or command, read and carried out; what is wrong with it is one line on stderr.

    Raises:
        EOFError, KeyboardInterrupt: the conversation ends.
    """
    line = read_line(chat, "user> ")
    word = line.strip()
    try:
        if "\n" not in word and (word.startswith("/") or word in WORDS):
            return run_command(chat, WORDS.get(word, word))
        text = read_block(chat) if word == FENCE else line
        if text.strip():
            answer(chat, text)
    except UserError as error:
        notice(f"error: {error}")


def run_command(chat: Conversation, line: str) -> None:
    """
    Raises:
        UserError: there is no such command, or it takes no arguments.
    """
    name, _, rest = line.partition(" ")
    function, arguments, _ = pick("command", name, COMMANDS)
    if rest.strip() and not arguments:
        raise UserError(f"{name} takes nothing after it, got {rest.strip()!r}.")
    function(chat, rest.strip())


def read_line(chat: Conversation, prompt: str) -> str:
    try:
        return input(prompt if chat.interactive else "")
    except (EOFError, KeyboardInterrupt):
        if chat.interactive:
            print()  # the shell's prompt begins a line of its own
        raise


def read_block(chat: Conversation) -> str:
    """Lines up to the closing fence; empty after Ctrl-C, which drops the block.

    Raises:
        EOFError: the input ended first; nothing of the block is sent.
    """
    lines: list[str] = []
    try:
        while (line := read_line(chat, "... ")).strip() != FENCE:
            lines.append(line)
    except KeyboardInterrupt:
        return ""
    except EOFError:
        notice(f"error: the input ended before the closing {FENCE}, {len(lines)} lines are dropped")
        raise
    return "\n".join(lines)


def answer(chat: Conversation, text: str) -> None:
    """Print the answer to ``text`` as it grows, and add both to the conversation.

    Ctrl-C stops the answer; what was generated is kept. After an error neither is.
    """
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
    if chat.interactive:
        speed = f"{num_tokens} tokens, {num_tokens / seconds:.1f} tokens/s"
        notice(f"stopped, {speed}" if stopped else speed)


def complete(text: str) -> str:
    """``text`` without the half character at its end, for which U+FFFD stands until its last byte."""
    return text.rstrip("\ufffd")


def write(text: str) -> int:
    """Print part of an answer at once, made harmless to the terminal; returns its length."""
    print(UNSAFE.sub(lambda match: ascii(match[0])[1:-1], text), end="", flush=True)
    return len(text)


def notice(text: str) -> None:
    """One line beside the conversation, dim where a person reads it."""
    dim = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    print(f"\x1b[2m{text}\x1b[0m" if dim else text, file=sys.stderr, flush=True)


# --- commands ---------------------------------------------------------------------------------------


def clear(chat: Conversation, rest: str) -> None:
    chat.messages.clear()
    notice("the conversation begins anew")


def leave(chat: Conversation, rest: str) -> None:
    raise EOFError


def set_stream(chat: Conversation, state: str) -> None:
    if state not in ("on", "off", ""):
        raise UserError(f"/stream {state}: it is on or off.")
    chat.stream = state == "on" if state else not chat.stream
    notice(f"stream {'on' if chat.stream else 'off'}")


def set_system(chat: Conversation, text: str) -> None:
    chat.system = text
    notice("system message set" if text else "no system message")


def show_help(chat: Conversation, rest: str) -> None:
    for name, (_, arguments, text) in COMMANDS.items():
        notice(f"{name + ' ' + arguments:16} {text}")
    notice(f"{FENCE:16} begins and ends a message of many lines, which may look like a command")
    notice(f"{'':16} {', '.join(WORDS)} work without the slash")


# name -> (function(conversation, rest of the line), arguments, one line of help)
COMMANDS: dict[str, tuple[Callable[[Conversation, str], None], str, str]] = {
    "/clear": (clear, "", "forget what was said"),
    "/stream": (set_stream, "on|off", "show answers as they grow, or when they are complete"),
    "/system": (set_system, "TEXT", "set the system message; without TEXT remove it"),
    "/help": (show_help, "", "show this"),
    "/exit": (leave, "", "end the conversation, as Ctrl-D does"),
}
# The words of the vendor's cli_demo.py, and quit.
WORDS = {"clear": "/clear", "stream": "/stream", "exit": "/exit", "quit": "/exit"}
