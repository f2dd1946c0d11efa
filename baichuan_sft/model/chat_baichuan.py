"""Chat format of the Baichuan family: messages to prompt ids, and ``chat()`` of the model.

    system 195 user 196 assistant 195 user 196        every text encoded apart, nothing between the turns

Source: baichuan-inc/Baichuan2-7B-Chat ``generation_utils.py`` and the July 2023
baichuan-inc/Baichuan-13B-Chat ``modeling_baichuan.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from .chat_template_baichuan import ASSISTANT_TOKEN_ID, EOS_TOKEN_ID, USER_TOKEN_ID, read_messages

logger = logging.get_logger(__name__)

DEFAULT_MAX_NEW_TOKENS = 2048


def build_chat_input(
    tokenizer: Any, messages: Sequence[dict[str, Any]], *, model_max_length: int, max_new_tokens: int
) -> list[int]:
    """Prompt ids of Baichuan2 and of Baichuan-13B-Chat from August 2023 on.

    A round begins at each user message. Rounds are kept whole from the newest backwards while they
    fit beside the system text; the newest is always kept, and then loses its beginning.

    Args:
        model_max_length, max_new_tokens: their difference is the prompt's room, in tokens.
    Returns:
        ids ending with the assistant id, unless the last message is the assistant's own.
    Raises:
        ValueError: a message breaks a rule of ``read_messages``.
    """
    turns = read_messages(messages)
    texts = tokenizer.encode_texts([text for _, text in turns])
    system = texts[0] if turns[0][0] == "system" else []
    rounds: list[list[int]] = []
    for (role, _), text in zip(turns, texts, strict=True):
        if role == "system":
            continue
        if role == "user" or not rounds:
            rounds.append([])
        rounds[-1] += [USER_TOKEN_ID if role == "user" else ASSISTANT_TOKEN_ID, *text]
    max_input = model_max_length - max_new_tokens
    ids = system + _newest_rounds(rounds, max_input - len(system))
    if turns[-1][0] != "assistant":
        ids.append(ASSISTANT_TOKEN_ID)
    whole = len(system) + sum(map(len, rounds)) + (turns[-1][0] != "assistant")
    # The vendor's slice as it stands: a room of 0 keeps everything.
    ids = ids[-max_input:]
    _log_cut(len(ids), whole)
    return ids


def build_chat_input_v1(
    tokenizer: Any, messages: Sequence[dict[str, Any]], *, model_max_length: int, max_new_tokens: int
) -> list[int]:
    """Prompt ids of the July 2023 Baichuan-13B-Chat: eos after every assistant text, no system message.

    The room is at least half of ``model_max_length``; the assistant id always follows, beyond the room.

    Raises:
        ValueError: a message breaks a rule of ``read_messages``, or is the system's.
    """
    turns = read_messages(messages)
    if turns[0][0] == "system":
        raise ValueError("message 0: the July 2023 chat format has no system message; leave it out")
    texts = tokenizer.encode_texts([text for _, text in turns])
    rounds: list[list[int]] = []
    for (role, _), text in zip(turns, texts, strict=True):
        if role == "user":
            rounds.append([USER_TOKEN_ID, *text])
        elif rounds:  # an assistant message that answers nothing is left out
            rounds[-1] += [ASSISTANT_TOKEN_ID, *text, EOS_TOKEN_ID]
    max_input = max(model_max_length // 2, model_max_length - max_new_tokens)
    ids = _newest_rounds(rounds, max_input)[-max_input:]
    _log_cut(len(ids), sum(map(len, rounds)))
    return [*ids, ASSISTANT_TOKEN_ID]


def _newest_rounds(rounds: list[list[int]], room: int) -> list[int]:
    """The newest round, and as many before it as fit into ``room`` tokens together with it."""
    ids: list[int] = []
    for one in reversed(rounds):
        if ids and len(ids) + len(one) > room:
            break
        ids = one + ids
        if len(ids) >= room:
            break
    return ids


def _log_cut(kept: int, whole: int) -> None:
    if kept < whole:
        logger.warning(f"the conversation has {whole} tokens, the prompt keeps {kept} of them")


class ChatMixin:
    """Adds ``chat()`` to a model that generates and whose config has a ``context_length``."""

    def chat(
        self,
        tokenizer: Any,
        messages: Sequence[dict[str, Any]],
        stream: bool = False,
        generation_config: GenerationConfig | None = None,
        **generate_kwargs: Any,
    ) -> str | Iterator[str]:
        """The model's answer to a conversation.

        Args:
            generation_config: None takes the model's own.
            generate_kwargs: over ``generation_config``, or for ``generate`` itself.
        Returns:
            the answer, not stripped; with ``stream`` an iterator over the whole answer so far, one
            item per token, whose end may be U+FFFD while a character is incomplete. Closing it ends
            generation, and what fails in generation is raised from it.
        Raises:
            ValueError: a message breaks a rule of ``read_messages``.
        """
        config = copy.deepcopy(generation_config or self.generation_config)  # type: ignore[attr-defined]
        if not generate_kwargs.get("do_sample", config.do_sample):
            # Greedy decoding ignores the model's own sampling settings, and transformers would warn of them.
            config.update(temperature=1.0, top_p=1.0, top_k=50)
        generate_kwargs = config.update(**generate_kwargs)
        length = self.config.context_length  # type: ignore[attr-defined]
        config.max_new_tokens = _room_for_answer(config.max_new_tokens, length)
        config.eos_token_id = _stop_ids(config.eos_token_id)
        ids = build_chat_input(
            tokenizer, messages, model_max_length=length, max_new_tokens=config.max_new_tokens
        )
        prompt = torch.tensor([ids], device=self.device)  # type: ignore[attr-defined]
        generate_kwargs.update(generation_config=config, attention_mask=torch.ones_like(prompt))

        def generate(**kwargs: Any) -> torch.Tensor:
            return self.generate(prompt, **{**generate_kwargs, **kwargs})  # type: ignore[attr-defined]

        if not stream:
            return answer_text(tokenizer, generate()[0, len(ids) :].tolist())
        return _stream(tokenizer, generate, generate_kwargs.pop("stopping_criteria", []))


def _room_for_answer(max_new_tokens: int | None, length: int) -> int:
    wanted = max_new_tokens or DEFAULT_MAX_NEW_TOKENS
    if wanted < length:
        return wanted
    taken = length // 2
    logger.warning(
        f"max_new_tokens {wanted} leaves no room for a prompt in {length} tokens: {taken} are taken"
    )
    return taken


def _stop_ids(eos_token_id: int | list[int] | None) -> list[int]:
    """The configured ids, eos, and the user id: a model that opens the user's turn has ended its own."""
    given = [eos_token_id] if isinstance(eos_token_id, int) else eos_token_id or []
    return sorted({*given, EOS_TOKEN_ID, USER_TOKEN_ID})


def answer_text(tokenizer: Any, ids: list[int]) -> str:
    # To the tokenizer the user id is a piece like others, so it would be shown.
    return tokenizer.decode([i for i in ids if i != USER_TOKEN_ID], skip_special_tokens=True)


def _stream(tokenizer: Any, generate: Callable[..., Any], stopping_criteria: list[Any]) -> Iterator[str]:
    """Answers so far, from ``generate`` running in a thread that ends when this iterator is closed."""
    tokens = _TokenQueue()
    stop = _StopWhenSet(Event())

    def work() -> None:
        try:
            generate(streamer=tokens, stopping_criteria=StoppingCriteriaList([*stopping_criteria, stop]))
            tokens.queue.put(None)
        except BaseException as error:
            tokens.queue.put(error)

    thread = Thread(target=work, daemon=True)
    thread.start()
    ids: list[int] = []
    try:
        while (item := tokens.queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            ids.append(item)
            yield answer_text(tokenizer, ids)
    finally:
        stop.event.set()
        thread.join()


class _TokenQueue(BaseStreamer):
    """Passes generated ids to another thread, one by one; the first ``put`` is the prompt."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[int | BaseException | None] = SimpleQueue()
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self.prompt_seen:
            for token_id in value.reshape(-1).tolist():
                self.queue.put(token_id)
        self.prompt_seen = True

    def end(self) -> None:
        """Nothing: the thread itself says when it is done, also after an error."""


class _StopWhenSet(StoppingCriteria):
    def __init__(self, event: Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)
