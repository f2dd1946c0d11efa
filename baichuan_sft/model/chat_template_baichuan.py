"""The chat format of the Baichuan family: roles, their ids, and the tokenizer's ``apply_chat_template``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from transformers import BatchEncoding

# The roles stand at the same ids in both vocabularies under different names (<reserved_102> in
# Baichuan-1, <reserved_106> in Baichuan2), so they are known by number.
EOS_TOKEN_ID, USER_TOKEN_ID, ASSISTANT_TOKEN_ID = 2, 195, 196
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "Human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}

# USER, BOT and PREFIX are replaced by what the vocabulary has for them.
CHAT_TEMPLATE = """\
{%- set markers = {'user': 'USER', 'human': 'USER', 'Human': 'USER', 'assistant': 'BOT', 'gpt': 'BOT'} -%}
{%- for message in messages -%}
  {%- if message['role'] == 'system' -%}
    {%- if not loop.first -%}{{- raise_exception('a system message can only be the first') -}}{%- endif -%}
    {{- message['content'] -}}
  {%- elif message['role'] in markers -%}
    {{- markers[message['role']] -}}
    {%- if message['content'] -%}{{- 'PREFIX' + message['content'] -}}{%- endif -%}
  {%- else -%}
    {{- raise_exception('unknown role ' + message['role'] + '; known: system, user, assistant') -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and markers[messages[-1]['role']] != 'BOT' -%}{{- 'BOT' -}}{%- endif -%}
"""

ASSISTANT_MARK = -1  # no token, hence no padding id
# What transformers' apply_chat_template takes beside the conversation and template variables.
CHAT_OPTIONS = {"padding", "truncation", "max_length", "return_tensors", "return_dict"}
CHAT_OPTIONS |= {"return_assistant_tokens_mask", "tokenizer_kwargs", "sanitize_control_tokens"}

Turn = tuple[str, str]  # (role, text)


def read_messages(messages: Sequence[dict[str, Any]]) -> list[Turn]:
    """Chat messages as (role, text), role being "system", "user" or "assistant".

    Args:
        messages: ``{"role": ..., "content": ...}`` each; the aliases of ``ROLES`` are accepted.
    Raises:
        ValueError: no message, unknown role, a system message that is not the first, content
            that is not text.
    """
    if not messages:
        raise ValueError("the conversation has no messages, at least one is needed")
    turns = []
    for i, message in enumerate(messages):
        role, text = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(f"message {i}: unknown role {role!r}. Known: {', '.join(ROLES)}.")
        if ROLES[role] == "system" and i > 0:
            raise ValueError(f"message {i}: a system message can only be the first message")
        if not isinstance(text, str):
            raise ValueError(f"message {i}: content must be a string, got {type(text).__name__}")
        turns.append((ROLES[role], text))
    return turns


class ChatTemplateMixin:
    """Adds ``apply_chat_template`` to a tokenizer that can ``encode_texts`` the safe way."""

    sp_model: Any
    encode_texts: Any
    get_chat_template: Any

    @cached_property
    def default_chat_template(self) -> str:
        """Jinja form of the chat format, for engines that render text and encode it the vendor's way.

        Equal to the ids of ``apply_chat_template`` on ordinary text, but for one id: Baichuan-1's
        SentencePiece puts ``▁`` before any text, so without a system message the rendered string
        begins with it.
        """
        user, assistant = self.sp_model.id_to_piece([USER_TOKEN_ID, ASSISTANT_TOKEN_ID])
        # Encoded apart, each text of Baichuan-1 begins with ▁; inside one string a space gives that.
        prefix = " " if self.sp_model.encode("a", out_type=str)[0].startswith("▁") else ""
        return CHAT_TEMPLATE.replace("USER", user).replace("BOT", assistant).replace("PREFIX", prefix)

    def apply_chat_template(
        self,
        conversation: Any,
        tools: list[Any] | None = None,
        documents: list[Any] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        **options: Any,
    ) -> Any:
        """Prompt of one conversation or of a list of them: control ids by number, texts the safe way.

            system          user            assistant       user
            26553 29438 ... 195 16829 ...   196 20020 ...   195 ...     196 (add_generation_prompt)

        There is no ``</s>`` between turns, and no generation prompt after an assistant message.
        Arguments and results are those of transformers. No conversation is ever closed and every text
        is sanitized, so ``continue_final_message`` and ``sanitize_control_tokens`` hold already. A
        template other than ``default_chat_template`` goes to transformers, without that safety.

        Raises:
            ValueError: a message breaks a rule of ``read_messages``, or tools, documents or template
                variables are given, for which the format has no place.
        """
        if self.get_chat_template(chat_template, tools) == self.default_chat_template:
            given = {"tools": tools, "documents": documents, **options}
            unused = [name for name, value in given.items() if value and name not in CHAT_OPTIONS]
            if unused:
                raise ValueError(
                    f"the Baichuan chat format has no place for {', '.join(unused)}; leave it out"
                )
            if continue_final_message and add_generation_prompt:
                raise ValueError("continue_final_message and add_generation_prompt exclude each other")
            is_batch = bool(conversation) and isinstance(conversation[0], list | tuple)
            chats = [read_messages(chat) for chat in (conversation if is_batch else [conversation])]
            if tokenize:
                options.pop("sanitize_control_tokens", None)
                return self._encode_chats(chats, is_batch, add_generation_prompt, **options)
        return super().apply_chat_template(  # type: ignore[misc]
            conversation,
            tools=tools,
            documents=documents,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tokenize=tokenize,
            **options,
        )

    def _encode_chats(
        self,
        chats: list[list[Turn]],
        is_batch: bool,
        add_generation_prompt: bool,
        return_tensors: str | None = None,
        return_dict: bool = True,
        return_assistant_tokens_mask: bool = False,
        tokenizer_kwargs: dict[str, Any] | None = None,
        **pad_options: Any,
    ) -> Any:
        if return_assistant_tokens_mask and not return_dict:
            raise ValueError(
                "return_assistant_tokens_mask=True needs return_dict=True, it is an entry of the dict"
            )
        ids, marks = self._chat_ids(chats, add_generation_prompt)
        call = {**pad_options, **(tokenizer_kwargs or {}), "add_special_tokens": False}
        out = self(ids, **call)  # type: ignore[operator]
        if return_assistant_tokens_mask:
            # The marks go the way of the ids, so they are cut and padded alike.
            rows = self(marks, **call)["input_ids"]  # type: ignore[operator]
            out["assistant_masks"] = [[int(mark == ASSISTANT_MARK) for mark in row] for row in rows]
        if not is_batch and not return_tensors:
            out = BatchEncoding({key: rows[0] for key, rows in out.items()})
        out.convert_to_tensors(return_tensors)
        return out if return_dict else out["input_ids"]

    def _chat_ids(
        self, chats: list[list[Turn]], add_generation_prompt: bool
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Ids of each conversation, and as many marks: ``ASSISTANT_MARK`` over assistant text, else 0."""
        texts = iter(self.encode_texts([text for turns in chats for _, text in turns]))
        markers = {"system": [], "user": [USER_TOKEN_ID], "assistant": [ASSISTANT_TOKEN_ID]}
        ids: list[list[int]] = [[] for _ in chats]
        marks: list[list[int]] = [[] for _ in chats]
        for row, mark, turns in zip(ids, marks, chats):
            for role, _ in turns:
                text = next(texts)
                row += markers[role] + text
                mark += [0] * len(markers[role]) + [ASSISTANT_MARK if role == "assistant" else 0] * len(text)
            if add_generation_prompt and turns[-1][0] != "assistant":
                row.append(ASSISTANT_TOKEN_ID)
                mark.append(0)
        return ids, marks
