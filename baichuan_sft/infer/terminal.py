"""``baichuan-sft chat``: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import io
import os
import sys

from baichuan_sft.errors import UserError, first_line, pick
from baichuan_sft.infer.chat import build_parser, describe, generation_options, load, static_cache
from baichuan_sft.infer.commands import COMMANDS, FENCE, SETTINGS, WORDS
from baichuan_sft.infer.talk import Conversation, answer, notice


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
    given = {name: str(value) for name in SETTINGS if (value := getattr(args, name)) is not None}
    if not args.greedy:
        del given["greedy"]
    sys.stdin = sys.stdin or io.StringIO()  # where the caller has closed it
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
    chat.settings = given
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
    """Answer message after message, until ``/exit`` or the end of input; without a person, also Ctrl-C.

    Returns:
        The exit code, 0.
    """
    with contextlib.suppress(EOFError):
        while True:
            try:
                take_turn(chat)
            except KeyboardInterrupt:
                if not chat.interactive:
                    break
                # A second Ctrl-C meant for the answer comes too late and lands here.
                notice("/exit or Ctrl-D ends the conversation")
    return 0


def take_turn(chat: Conversation) -> None:
    """One message or command, read and carried out; what is wrong with it is one line on stderr.

    Raises:
        EOFError: the conversation ends. KeyboardInterrupt: Ctrl-C while no answer was being made.
    """
    line = read_line(chat, "user> ")
    word = line.strip()
    try:
        if "\n" not in word and (word.startswith("/") or word in WORDS):
            return run_command(chat, WORDS.get(word, word))
        chat.unanswered = ""
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
    except OSError as error:  # a terminal that has gone, or a directory
        notice(f"error: cannot read any further: {first_line(error)}")
        raise EOFError from None
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
