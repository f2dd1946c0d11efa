"""The page of ``baichuan-sft web``, a Streamlit script: run from top to bottom after everything a user does.

An answer is generated at the end of a run, in which all but the stop button is disabled; whatever begins
the next run ends it, and what was generated until then stays.
"""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import streamlit as st
from streamlit import runtime
from streamlit.runtime.scriptrunner import get_script_run_ctx

from baichuan_sft.errors import UserError, first_line
from baichuan_sft.infer import chat, web
from baichuan_sft.infer.web_chat import Turn, as_markdown, from_belle, harmless, take, to_belle
from baichuan_sft.infer.web_text import LANGUAGES, words

MAX_QUESTION = 200_000  # characters, far beyond any context
INTERVAL = 0.05  # seconds between two looks at a growing answer: it is sent whole each time
AVATARS = {"user": ":material/person:", "assistant": ":material/smart_toy:"}
SIDES = web.sides(*sys.argv[1:])


class Gone(Exception):
    """The browser has left; nobody reads the answer."""


def main() -> None:
    state = st.session_state
    st.set_page_config(page_title=f"{SIDES[0].name} · baichuan-sft", page_icon="🏞️", layout="wide")
    if "conversation" not in state:
        state.pending, state.busy, state.problem, state.uploads, state.num_items = None, False, "", 0, 0
        state.name, state.conversation = take(st.query_params.get("c"))
        state.system = state.conversation.system
        state.language = st.query_params.get("lang") or (st.context.locale or "en")[:2]
        if state.language not in LANGUAGES:
            state.language = "en"
        st.query_params["c"] = state.name
    # A run may begin before the one it ends has ended. So the question is taken, not looked at, and what
    # a late token changes is no longer in the conversation.
    turns, (turn, state.pending) = state.conversation.turns, (state.pending, None)
    if state.busy and turns and turns[-1] is not turn:
        turns[-1] = replace(turns[-1], answers=dict(turns[-1].answers), notes=dict(turns[-1].notes))
    state.busy = turn is not None
    with st.sidebar:
        show_settings()
    text = words(state.language)
    show_conversation(text)
    show_input(text)
    if turn is not None:
        answer(turn, text)
        st.rerun()


# --- what a user does: each runs before the script does -------------------------------------------------


def ask() -> None:
    state = st.session_state
    if state.question.strip():
        state.pending, state.problem = Turn(state.question), ""
        state.conversation.turns.append(state.pending)


def stop() -> None:
    """Nothing: the run that a click begins ends the one that generates."""


def retry() -> None:
    state = st.session_state
    state.pending, state.problem = Turn(state.conversation.turns[-1].question), ""
    state.conversation.turns[-1] = state.pending


def clear() -> None:
    state = st.session_state
    state.conversation.turns.clear()
    state.problem = ""
    state.uploads += 1  # a new key empties the file field


def set_system() -> None:
    st.session_state.conversation.system = st.session_state.system


def set_language() -> None:
    st.query_params["lang"] = st.session_state.language


def load_file() -> None:
    st.session_state.item, st.session_state.num_items = 1, 0
    load()


def load() -> None:
    """Show one conversation of the uploaded file, or say in one line what is wrong with it."""
    state = st.session_state
    file, state.problem = state[f"file{state.uploads}"], ""
    if file is None:
        return
    try:
        loaded, state.num_items = from_belle(file.getvalue(), file.name, state.item - 1)
    except UserError as error:
        state.problem = words(state.language)["bad_file"].format(what=error)
        return
    state.conversation.turns[:] = loaded.turns
    state.conversation.system = state.system = loaded.system


# --- sidebar --------------------------------------------------------------------------------------------


def show_settings() -> None:
    """Everything that holds for the answers to come."""
    state = st.session_state
    st.segmented_control(
        "Language · 语言", LANGUAGES, format_func=LANGUAGES.__getitem__, key="language", required=True,
        on_change=set_language, disabled=state.busy, label_visibility="collapsed",
    )  # fmt: skip
    text, off = words(state.language), state.busy
    st.button(text["clear"], icon=":material/edit_square:", on_click=clear, disabled=off, width="stretch")
    if len(SIDES) == 2:
        name = side_name(1, text)
        st.toggle(text["compare"].format(name=name), not SIDES[1].bare, key="compare", disabled=off)
    st.text_area(
        text["system"], key="system", on_change=set_system, help=text["system_hint"], disabled=off, height=80
    )
    with st.expander(text["file"], icon=":material/description:"):
        show_file(text)
    with st.expander(text["answers"], expanded=True, icon=":material/tune:"):
        show_generation(text)


def show_generation(text: dict[str, str]) -> None:
    """The first model's own settings, to be changed; limits stay wide enough for what they are."""
    off = st.session_state.busy
    own = SIDES[0].model.generation_config
    length = min(side.model.config.context_length for side in SIDES)
    longest = own.max_new_tokens or 2048
    longest = longest if longest < length else length // 2
    st.toggle(text["markdown"], True, key="markdown", disabled=off)
    st.number_input(text["max_new_tokens"], 1, length - 1, longest, key="max_new_tokens", disabled=off)
    value = own.repetition_penalty or 1.0
    st.slider(
        text["repetition_penalty"], 1.0 if value >= 1 else value, max(2.0, value), value, 0.01,
        key="repetition_penalty", disabled=off,
    )  # fmt: skip
    sample = st.toggle(
        text["sample"], bool(own.do_sample), key="sample", help=text["sample_hint"], disabled=off
    )
    if not sample:
        return
    value = own.temperature or 1.0
    st.slider(
        text["temperature"], min(0.05, value), max(2.0, value), value, 0.05, key="temperature", disabled=off
    )
    value = 1.0 if own.top_p is None else own.top_p
    st.slider(text["top_p"], min(0.01, value), 1.0, value, 0.01, key="top_p", disabled=off)
    value = 50 if own.top_k is None else own.top_k
    st.number_input(text["top_k"], 0, max(1000, value), value, key="top_k", disabled=off)
    st.number_input(
        text["seed"], 0, 2**32 - 1, None, key="seed", help=text["seed_hint"], placeholder="—", disabled=off
    )


def show_file(text: dict[str, str]) -> None:
    state = st.session_state
    st.caption(text["file_hint"])
    for side in shown_sides():
        belle = to_belle(state.conversation, side)
        label = text["save"] if side == 0 else text["save_of"].format(name=side_name(side, text))
        st.download_button(
            label, belle, f"conversation-{side + 1}.json", "application/json",
            icon=":material/download:", on_click="ignore", disabled=state.busy or not belle, width="stretch",
            key=f"save{side}",
        )  # fmt: skip
    st.file_uploader(
        text["load"], ["json", "jsonl"], key=f"file{state.uploads}", on_change=load_file, disabled=state.busy
    )
    if state[f"file{state.uploads}"] is not None and state.num_items > 1:
        st.number_input(text["item"], 1, state.num_items, key="item", on_change=load, disabled=state.busy)


# --- conversation ---------------------------------------------------------------------------------------


def side_name(side: int, text: dict[str, str]) -> str:
    name = SIDES[side].name
    return text["bare"].format(name=name) if SIDES[side].bare else name


def shown_sides() -> range:
    return range(2 if st.session_state.get("compare") else 1)


def show_conversation(text: dict[str, str]) -> None:
    """All turns; the places of the last one's answers are kept for ``answer`` to fill."""
    state = st.session_state
    turns = state.conversation.turns
    st.subheader(" ↔ ".join(side_name(side, text) for side in shown_sides()), anchor=False)
    if not turns:
        st.caption(chat.describe(SIDES[0].model))
        st.caption(text["empty"])
    state.places = {}
    for index, turn in enumerate(turns):
        last = index == len(turns) - 1
        with st.chat_message("user", avatar=AVATARS["user"]):
            st.text(harmless(turn.question))
        sides = shown_sides()
        for side, column in zip(sides, st.columns(len(sides))):
            with column, st.chat_message("assistant", avatar=AVATARS["assistant"]):
                if len(sides) > 1:
                    st.caption(f"**{harmless(side_name(side, text))}**")
                places = SimpleNamespace(answer=st.empty(), note=st.empty())
                if last:
                    state.places[side] = places
                show_answer(places.answer, turn.answers.get(side, ""))
                if note := turn.notes.get(side):
                    places.note.caption(note)
    if state.problem:
        st.error(as_markdown(state.problem), icon=":material/error:")


def show_input(text: dict[str, str]) -> None:
    """In a place of its own: a stop button that moves with a growing answer is hard to hit."""
    state = st.session_state
    with st.bottom:
        if state.busy:
            st.button(text["stop"], icon=":material/stop_circle:", on_click=stop, type="primary")
        elif state.conversation.turns:
            st.button(text["retry"], icon=":material/refresh:", on_click=retry, type="tertiary")
        st.chat_input(text["ask"], key="question", on_submit=ask, max_chars=MAX_QUESTION, disabled=state.busy)


def show_answer(place: Any, answer: str) -> None:
    if st.session_state.get("markdown", True):
        place.markdown(as_markdown(answer))
    else:
        place.text(harmless(answer))


def options() -> dict[str, Any]:
    """The settings as ``model.chat`` takes them, through the options of `baichuan-sft chat`."""
    state = st.session_state
    names = ["max_new_tokens", "repetition_penalty"]
    names += ["temperature", "top_p", "top_k"] if state.sample else []
    flags = [f"--{name}={state[name]!r}" for name in names] + ([] if state.sample else ["--greedy"])
    return chat.generation_options(chat.build_parser().parse_args([*flags, SIDES[0].name]))


def answer(turn: Turn, text: dict[str, str]) -> None:
    """Fill in what the sides say to the last question, one after the other."""
    state = st.session_state
    waiting = next(iter(state.places.values())).note
    while not web.LOCK.acquire(timeout=0.2):
        waiting.caption(text["waiting"])  # also where a click on stop gets through
    try:
        for side in shown_sides():
            answer_side(side, turn, text)
    except Gone:
        pass
    except (UserError, ValueError, RuntimeError, LookupError) as error:
        state.problem = text["failed"].format(what=first_line(error))
    finally:
        web.LOCK.release()


def answer_side(side: int, turn: Turn, text: dict[str, str]) -> None:
    """Stream one model's answer into its place and into ``turn``.

    Raises:
        Gone: nobody is there any more. ValueError, RuntimeError, LookupError: of the generation.
    """
    from transformers import set_seed

    state, model, tokenizer = st.session_state, SIDES[side].model, SIDES[side].tokenizer
    place, given, messages = state.places[side], options(), state.conversation.prompt(side)
    session = get_script_run_ctx()
    assert session is not None
    last, shown, num_tokens = "", 0.0, 0

    def show(answer: str) -> None:
        nonlocal last, shown, num_tokens
        last, num_tokens = answer, num_tokens + 1
        turn.answers[side] = answer.rstrip("\ufffd")  # a character of which bytes are still to come
        if time.monotonic() - shown < INTERVAL:
            return
        shown = time.monotonic()
        if runtime.exists() and not runtime.get_instance().is_active_session(session.session_id):
            raise Gone
        show_answer(place.answer, turn.answers[side] + " ▌")

    # Of a greedy answer a seed says nothing; the field is not there then.
    if state.sample and state.seed is not None:
        set_seed(state.seed)
    turn.notes[side] = text["stopped"]
    place.note.caption(text["thinking"])
    start = time.monotonic()
    with model.disable_adapter() if SIDES[side].bare else contextlib.nullcontext():
        chat.states(SimpleNamespace(model=model, tokenizer=tokenizer, options=given), messages, show)
    seconds = time.monotonic() - start
    note = text["speed"].format(tokens=num_tokens, rate=num_tokens / seconds)
    room = model.config.context_length - given["max_new_tokens"]
    whole = len(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    turn.answers[side] = last
    turn.notes[side] = note if whole <= room else f"{note} · {text['cut'].format(whole=whole, room=room)}"
    show_answer(place.answer, last)
    place.note.caption(turn.notes[side])


main()
