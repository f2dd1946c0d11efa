"""The commands of the terminal chat: ``/undo``, ``/set temperature 0.3`` and the others."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from baichuan_sft.errors import UserError, first_line, pick
from baichuan_sft.infer import belle
from baichuan_sft.infer.chat import build_parser, check_room, check_text, generation_options
from baichuan_sft.infer.talk import Conversation, answer, harmless, notice

FENCE = '"""'
SAMPLING = ("temperature", "top_p", "top_k")
SETTINGS = ("max_new_tokens", *SAMPLING, "repetition_penalty", "greedy", "seed")


def clear(chat: Conversation, rest: str) -> None:
    chat.messages.clear()
    chat.unanswered, chat.file = "", None
    notice("the conversation begins anew")


def leave(chat: Conversation, rest: str) -> None:
    raise EOFError


def set_stream(chat: Conversation, state: str) -> None:
    if state not in ("on", "off", ""):
        raise UserError(f"/stream {state}: it is on or off.")
    chat.stream = state == "on" if state else not chat.stream
    notice(f"stream {'on' if chat.stream else 'off'}")


def set_system(chat: Conversation, text: str) -> None:
    check_text(text, chat.model.config.context_length)
    chat.system = text
    notice("system message set" if text else "no system message")


def set_option(chat: Conversation, rest: str) -> None:
    """``/set temperature 0.3``, ``/set temperature`` for the model's own, ``/set greedy on``, ``/set``.

    Raises:
        UserError: no such setting, or a value that the command line would refuse too.
    """
    if not rest:
        config = getattr(chat.model, "generation_config", None)
        own = {name: getattr(config, name, None) for name in SETTINGS}
        own["greedy"] = "off" if getattr(config, "do_sample", None) else "on"
        for name in SETTINGS:
            notice(f"{name:18} {chat.settings.get(name, f'{own[name]} (the model)' if own[name] else '-')}")
        return
    name, _, value = rest.partition(" ")
    pick("setting", name, dict.fromkeys(SETTINGS))
    value = value.strip()
    if name == "greedy" and value not in ("on", "off", ""):
        raise UserError(f"/set greedy {value}: it is on or off.")
    # Greedy decoding samples nothing: the newer of the two is what is wanted.
    excluded = SAMPLING if name == "greedy" else ("greedy",) if name in SAMPLING and value else ()
    settings = {key: text for key, text in chat.settings.items() if key not in (name, *excluded)}
    if value not in ("", "off"):
        settings[name] = value
    words = ["--greedy" if key == "greedy" else f"--{key}={text}" for key, text in settings.items()]
    args = build_parser().parse_args([*words, "--", "DIR"])
    check_room(args, chat.model.config.context_length)
    options = generation_options(args)
    if name == "seed" and value:
        from transformers import set_seed

        set_seed(args.seed)
    kept = {key: value for key, value in chat.options.items() if key not in (*SETTINGS, "do_sample")}
    chat.options, chat.settings = {**kept, **options}, settings
    notice(f"{name} {settings.get(name, 'off' if name == 'greedy' else 'as the model has it')}")


def undo(chat: Conversation, rest: str) -> None:
    """
    Raises:
        UserError: nothing was said.
    """
    if not chat.messages:
        raise UserError("/undo: nothing was said yet.")
    question = chat.messages[-2]["content"]
    del chat.messages[-2:]
    chat.unanswered = ""
    notice(f"undone: {shorten(question)}")


def retry(chat: Conversation, rest: str) -> None:
    """Answer the last question again; where that fails, the old answer stays.

    Raises:
        UserError: nothing was asked, or what ``generate`` refuses.
    """
    before = [] if chat.unanswered else chat.messages[-2:]
    question = chat.unanswered or (before[0]["content"] if before else "")
    if not question:
        raise UserError("/retry: nothing was asked yet.")
    if before:
        del chat.messages[-2:]
    try:
        answer(chat, question)
    finally:
        if before and chat.unanswered:
            chat.messages += before
            chat.unanswered = ""


def edit(chat: Conversation, rest: str) -> None:
    """
    Raises:
        UserError: there is no such editor, it failed, or left no UTF-8.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "message.txt")
        file.touch()
        try:
            command = shlex.split(os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vim")
            subprocess.run([*command, str(file)], check=True)
            text = file.read_text(encoding="utf-8")
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            raise UserError(f"/edit: {first_line(error)}. EDITOR names the editor to be used.") from None
    if text.strip():
        print(harmless(text.rstrip("\n")))
        chat.unanswered = ""
        answer(chat, text.rstrip("\n"))


def save(chat: Conversation, rest: str) -> None:
    """
    Raises:
        UserError: nothing to save, no file name, a file of others, or one that cannot be written.
    """
    file = _path(rest) if rest else chat.file
    if file is None:
        raise UserError("/save FILE: say where.")
    if file != chat.file and os.path.lexists(file):
        raise UserError(f"{file}: exists already; give another name.")
    count = belle.save(file, chat.system, chat.messages)
    chat.file = file
    notice(f"{count} turns saved; baichuan-sft train --data_path {shlex.quote(str(file))}")


def load_file(chat: Conversation, rest: str) -> None:
    """Go on with a saved conversation, or with number N of a data set; what was said here is dropped.

    Raises:
        UserError: no such file, or no conversation in it.
    """
    name, _, number = rest.rpartition(" ")
    if not (name and re.fullmatch("[1-9][0-9]{0,8}", number)):
        name, number = rest, ""
    if not name:
        raise UserError("/load FILE: say which.")
    messages = belle.load(_path(name), int(number or 1) - 1)
    chat.system = messages.pop(0)["content"] if messages[0]["role"] == "system" else ""
    chat.messages, chat.unanswered, chat.file = messages, "", None
    said = f", system message: {shorten(chat.system)}" if chat.system else ""
    notice(f"{len(messages) // 2} turns loaded{said}; the last: {shorten(messages[-2]['content'])}")


def _path(name: str) -> Path:
    """
    Raises:
        UserError: ``~name`` of nobody.
    """
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise UserError(f"{name}: {first_line(error)}") from None


def shorten(text: str) -> str:
    """The beginning of a text, on one line."""
    line = " ".join(text[:200].split())
    return line if len(line) <= 60 else line[:57] + "..."


def show_help(chat: Conversation, rest: str) -> None:
    for name, (_, arguments, text) in COMMANDS.items():
        notice(f"{name + ' ' + arguments:20} {text}")
    notice(f"{FENCE:20} begins and ends a message of many lines, which may look like a command")
    notice(f"{'':20} {', '.join(WORDS)} work without the slash")


# name -> (function(conversation, rest of the line), arguments, one line of help)
COMMANDS: dict[str, tuple[Callable[[Conversation, str], None], str, str]] = {
    "/clear": (clear, "", "forget what was said"),
    "/undo": (undo, "", "forget the last question and its answer"),
    "/retry": (retry, "", "answer the last question again"),
    "/edit": (edit, "", "write a message in an editor: $VISUAL, $EDITOR or vim"),
    "/set": (set_option, "NAME VALUE", "set the temperature, top_k, seed, ...; alone show them"),
    "/stream": (set_stream, "on|off", "show answers as they grow, or when they are complete"),
    "/system": (set_system, "TEXT", "set the system message; without TEXT remove it"),
    "/save": (save, "FILE", "write the conversation as Belle JSON, which training reads"),
    "/load": (load_file, "FILE [N]", "go on with a saved conversation, or with number N of a data set"),
    "/help": (show_help, "", "show this"),
    "/exit": (leave, "", "end the conversation, as Ctrl-D does"),
}
# The words of the vendor's cli_demo.py, and quit.
WORDS = {"clear": "/clear", "vim": "/edit", "stream": "/stream", "exit": "/exit", "quit": "/exit"}
