"""What the model says to a few held-out questions, before training and after."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from baichuan_sft.data.template import EOS, IGNORE
from baichuan_sft.errors import UserError
from baichuan_sft.train.progress import say
from baichuan_sft.train.state import random_state, set_random_state

MAX_NEW_TOKENS = 128
SHOWN = 160  # characters of an answer in the log


@contextlib.contextmanager
def aside(trainer: Any) -> Iterator[Any]:
    """The model to ask something of, on all ranks alike: in training nothing is other for it afterwards."""
    model, before = trainer.model_wrapped, random_state()
    was_training = model.training
    model.eval()
    try:
        with trainer.speed.paused(), torch.no_grad(), trainer.compute_loss_context_manager():
            yield trainer._base_model()
    finally:
        model.train(was_training)
        set_random_state(before)


def pick_questions(
    held_out: Any, tokenizer: Any, count: int, *, seed: int, context: int
) -> list[dict[str, Any]]:
    """Conversations up to the first answer that is learnt, drawn by the seed, and that answer.

    Raises:
        UserError: there is none, as of plain text.
    """
    found: list[dict[str, Any]] = []
    for number in np.random.default_rng(seed).permutation(len(held_out)):
        ids, labels = (np.asarray(held_out[int(number)][name]) for name in ("input_ids", "labels"))
        is_learnt = labels != IGNORE
        start = int(is_learnt.argmax())
        if not start or ids[start - 1] != tokenizer.assistant_token_id or start + MAX_NEW_TOKENS > context:
            continue
        stop = start + int(np.append(is_learnt[start:], False).argmin())
        answer = [int(label) for label in labels[start:stop] if label != EOS]
        found.append({"prompt_ids": ids[:start].tolist(), "reference": tokenizer.decode(answer)})
        if len(found) == count:
            return found
    if not found:
        raise UserError(
            f"--eval_answers {count}: no held-out conversation has a question with room for an answer of "
            f"{MAX_NEW_TOKENS} tokens in {context}; leave the flag out."
        )
    say(f"eval_answers: {len(found)} of {count}, there are no more held-out questions")
    return found


def answer(trainer: Any, questions: list[dict[str, Any]], when: str) -> None:
    """Answer greedily, one after the other, and put it into the run's report; every rank calls it.

    Args:
        when: "before" or "after".
    """
    from baichuan_sft.model.chat_baichuan import answer_text

    tokenizer = trainer.processing_class
    # All of it said: the model's own settings would fill the rest.
    plain = dict(do_sample=False, temperature=1.0, top_k=50, top_p=1.0, repetition_penalty=1.0)
    ends = {"eos_token_id": [EOS, tokenizer.user_token_id], "pad_token_id": 0}
    config = GenerationConfig(max_new_tokens=MAX_NEW_TOKENS, **plain, **ends)
    facts = trainer.record.facts
    known = {row["prompt"]: row for row in facts.get("held_out_answers", [])}  # of the run before, too
    prompts = [tokenizer.decode(question["prompt_ids"]) for question in questions]
    rows = facts["held_out_answers"] = [known.get(prompt, {"prompt": prompt}) for prompt in prompts]
    with aside(trainer) as model:
        for row, question in zip(rows, questions, strict=True):
            ids = torch.tensor([question["prompt_ids"]], device=trainer.args.device)
            made = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
            row["reference"] = question["reference"]
            row[when] = answer_text(tokenizer, made[0, ids.shape[1] :].tolist())
    for row in rows:
        say(f"held-out answer {when}: {' '.join(row[when].split())[:SHOWN]!r}")
