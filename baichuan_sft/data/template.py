"""Conversations to token ids and labels: what a model of the family is trained on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from baichuan_sft.data.findings import RecordFault
from baichuan_sft.data.formats import Message
from baichuan_sft.errors import UserError, pick

IGNORE = -100
EOS = 2  # of both vocabularies; the role ids come from the tokenizer
# name -> the part of a conversation's assistant turns that is trained, where their `train` allows it
TRAIN_ON = {"all": slice(None), "last": slice(-1, None)}


@dataclass(frozen=True)
class Rendered:
    """One conversation or document, unpadded and untruncated.

    Attributes:
        input_ids, labels: int32, of one length.
        turns: where the marker of each user and assistant turn stands; none in a document.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    turns: list[int] = field(default_factory=list)


def render(messages: list[Message], tokenizer: Any, *, train_on: str = "all") -> Rendered:
    """``render_batch`` of one conversation."""
    return render_batch([messages], tokenizer, train_on)[0]


def render_batch(
    conversations: list[list[Message]], tokenizer: Any, train_on: str = "all", num_threads: int = -1
) -> list[Rendered]:
    """Token ids and labels of conversations; all texts are encoded in one call.

        ids     195  11  12 196  21  22 195  13 196  23   2
        labels    .   .   .   .  21  22   2   .   .  23   2        (. = IGNORE)
        turns     0           3           6       8

    A system text stands before the first user id. End of turn is learnt where the next user marker
    stands, so label 2 sits over id 195. Label 0 is IGNORE: in a packed row it would be predicted by
    the previous segment. No text can give a control id. A document (one message of role "text") is
    its tokens and eos, all of them targets.

    Args:
        tokenizer: has ``encode_texts``, ``user_token_id`` and ``assistant_token_id``.
        num_threads: of SentencePiece; -1 takes all cores.
        train_on: "all" assistant turns or only the "last" one, and of these the turns with ``train``.
    Raises:
        UserError: unknown ``train_on``, no assistant turn, no trained one, two turns in a row from
            one role, a system turn that is not the first. The caller adds the place in the file.
    Source: baichuan-inc/Baichuan2 fine-tune.py ``SupervisedDataset.preprocessing``, but that it trains
        unknown roles as assistant text and gives label EOS to the first user marker; documents as
        Baichuan-7B train.py.
    """
    trained = [trained_turns(messages, train_on) for messages in conversations]
    encoded = iter(
        tokenizer.encode_texts([m.text for messages in conversations for m in messages], num_threads)
    )
    markers = {"user": [tokenizer.user_token_id], "assistant": [tokenizer.assistant_token_id]}
    rendered = []
    for messages, targets in zip(conversations, trained, strict=True):
        texts = [next(encoded) for _ in messages]
        if messages[0].role == "text":
            rendered.append(_document(texts[0]))
            continue
        end = [EOS] * (messages[-1].role == "assistant")
        rendered.append(_join([markers.get(m.role, []) for m in messages], texts, targets, end))
    return rendered


def _document(text: list[int]) -> Rendered:
    ids = np.array([*text, EOS], np.int32)
    labels = ids.copy()
    labels[0] = IGNORE
    return Rendered(ids, labels)


def _join(markers: list[list[int]], texts: list[list[int]], trained: set[int], end: list[int]) -> Rendered:
    """Ids and labels of the turns and what ends the last; ``trained`` holds turn indices."""
    flat: list[int] = []
    turns: list[int] = []
    spans: list[tuple[int, int]] = []  # texts that are targets
    for i, (marker, text) in enumerate(zip(markers, texts, strict=True)):
        if marker:
            turns.append(len(flat))
        flat += marker
        if i in trained:
            spans.append((len(flat), len(flat) + len(text)))
        flat += text
    ids = np.array(flat + end, np.int32)
    labels = np.full(len(ids), IGNORE, np.int32)
    for start, stop in spans:
        labels[start:stop] = ids[start:stop]
        labels[stop : stop + 1] = EOS  # over the next marker or eos; none where the user's turn is open
    return Rendered(ids, labels, turns)


def trained_turns(messages: list[Message], train_on: str) -> set[int]:
    """Indices of the turns whose text is a target, once the order of turns has been checked.

    Raises:
        UserError: as ``render_batch``.
    """
    part = pick("train_on", train_on, TRAIN_ON)
    roles = [m.role for m in messages]
    if roles == ["text"]:
        return {0}
    for i, role in enumerate(roles[1:], 1):
        if role == "system":
            raise UserError(f"turn {i}: a system turn after the conversation started, only the first can be")
        if role == roles[i - 1]:
            raise UserError(f"turn {i}: two {role} turns in a row (turns {i - 1}-{i}); join or remove one")
    turns = [i for i, role in enumerate(roles) if role == "assistant"]
    if not turns:
        raise UserError("no assistant turn - nothing to supervise")
    trained = {i for i in turns[part] if messages[i].train}
    if not trained:
        text = f'no trained turn: "train" is false on every assistant turn of train_on={train_on!r}'
        raise RecordFault("DATA021", text, turn=turns[-1])
    return trained
