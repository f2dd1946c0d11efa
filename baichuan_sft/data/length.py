"""What becomes of a conversation that is longer than max_length: a table of policies.

Whatever the policy, a turn that is kept whole keeps the label of its end, and what is lost is counted by
the caller.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from baichuan_sft.data.findings import RecordFault
from baichuan_sft.data.template import EOS, IGNORE, Rendered
from baichuan_sft.errors import pick


def fit(segment: Rendered, max_length: int, policy: str) -> list[Rendered]:
    """The segment in pieces of at most ``max_length`` tokens: none where no target would be left.

    A document (no turns) is split and loses nothing, unless it is dropped or an error.

    Raises:
        UserError: unknown policy. RecordFault: the policy is "error" and the segment is too long.
    """
    cut = pick("truncation", policy, TRUNCATION)
    if len(segment.input_ids) <= max_length:
        return [segment]
    is_document = not segment.turns and policy.startswith("cut")
    pieces = _split(segment, max_length) if is_document else cut(segment, max_length)
    return [piece for piece in pieces if has_target(piece)]


def has_target(segment: Rendered) -> bool:
    """Whether anything can be learnt; label 0 never is, nothing stands before it."""
    return bool((segment.labels[1:] != IGNORE).any())


def prompt_tokens(segment: Rendered) -> int | None:
    """Tokens before the first that is learnt; None where nothing is."""
    targets = np.flatnonzero(segment.labels[1:] != IGNORE)
    return int(targets[0]) + 1 if len(targets) else None


def cut_turns(segment: Rendered, max_length: int) -> list[Rendered]:
    """Drop turns from the end. Where not even the first answer fits, it is cut, and teaches no end.

        ids     195  11 196  21 195  12 196  22  23   2        at 7:  195  11 196  21   2
        labels    .   .   .  21   2   .   .  22  23   2                 .   .   .  21   2

    The label of a turn's end stands over the next user marker; there the kept part ends, with eos.
    """
    for start in reversed(segment.turns[2::2]):  # markers of user turns after the first
        if start < max_length:
            ids = segment.input_ids[: start + 1].copy()
            ids[start] = EOS
            kept = Rendered(ids, segment.labels[: start + 1], segment.turns)
            if has_target(kept):
                return [kept]
    # An answer whose end label alone would be cut off loses a token as well: a whole turn teaches its end.
    is_whole = max_length in segment.turns or max_length == len(segment.input_ids) - 1
    end = max_length - is_whole
    return [Rendered(segment.input_ids[:end], segment.labels[:end], segment.turns)]


def cut_left(segment: Rendered, max_length: int) -> list[Rendered]:
    """Drop turns from the beginning, never the system text; of a last pair that is too long the question's
    beginning. An answer that does not fit by itself leaves nothing.
    """
    ids, labels = segment.input_ids, segment.labels
    system = segment.turns[0]
    for start in segment.turns[2::2]:
        if system + len(ids) - start <= max_length:
            # What its marker's label would end is gone.
            return [Rendered(np.append(ids[:system], ids[start:]), _blank(system + 1, labels[start + 1 :]))]
    user, assistant = segment.turns[-2:] if len(segment.turns) > 1 else (system, len(ids))
    start = len(ids) - (max_length - system - 1)
    if start > assistant:
        return []
    kept = np.concatenate([ids[:system], ids[user : user + 1], ids[start:]])
    return [Rendered(kept, _blank(system + 1, labels[start:]))]


def _blank(number: int, labels: np.ndarray) -> np.ndarray:
    """The labels, with as many of what is not learnt before them."""
    return np.append(np.full(number, IGNORE, np.int32), labels)


def drop(segment: Rendered, max_length: int) -> list[Rendered]:
    """Leave the whole conversation out."""
    return []


def refuse(segment: Rendered, max_length: int) -> list[Rendered]:
    """
    Raises:
        RecordFault: always, with the lengths.
    """
    total = len(segment.input_ids)
    prompt = prompt_tokens(segment) or total
    text = f"{total} tokens, the prompt alone {prompt}, longer than model_max_length {max_length}"
    raise RecordFault("DATA024", f"{text}; raise it, or pass --truncation cut_turns, cut_left or drop")


def _split(segment: Rendered, max_length: int) -> list[Rendered]:
    ends = [*range(0, len(segment.input_ids), max_length), len(segment.input_ids)]
    if ends[-1] - ends[-2] == 1:  # eos alone would be label 0 of its piece, and learnt from nothing
        ends[-2] -= 1
    pieces = [(segment.input_ids[i:j], segment.labels[i:j]) for i, j in zip(ends, ends[1:])]
    return [Rendered(ids, _blank(1, labels[1:])) for ids, labels in pieces]


# name -> what is left of a segment that is too long
TRUNCATION: dict[str, Callable[[Rendered, int], list[Rendered]]] = {
    "cut_turns": cut_turns,
    "cut_left": cut_left,
    "drop": drop,
    "error": refuse,
}
