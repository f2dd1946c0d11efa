"""One benchmark in one style on one model: asked in batches, written down as it goes, summed up.

    items/cmmlu.baichuan.jsonl
        {"format": 1, "benchmark": "cmmlu", "style": "baichuan", "model": <sha256>, ...}    the run's identity
        {"id": "agronomy/3", "subject": "agronomy", "gold": "B", "prediction": "C", ...}    in order of asking

A batch is one write and one fsync, and how items are cut into batches follows from the items alone: after a
kill whole batches stand, a torn one is asked again, and the file ends with the same bytes.
"""

from __future__ import annotations

import importlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from baichuan_sft import __version__
from baichuan_sft.errors import EnvironmentFault, NumericalFault, UserError, first_line, pick
from baichuan_sft.evaluate.items import Item, Loaded, Outcome, Prompter, Request, Response, Settings, Style
from baichuan_sft.evaluate.journal import Row, append, dumps, opened, sha256

FORMAT = 1
# name -> module:prompter(benchmark, subject, settings)
STYLES = {
    "baichuan": "baichuan_sft.evaluate.vendor_style:prompter",
    "harness": "baichuan_sft.evaluate.harness_style:prompter",
}
# Task's entry in results.json, filled in as far as the task came.
BLANK: dict[str, Any] = {
    **dict.fromkeys(("metric", "value", "low", "high")),
    **dict(items=0, skipped={}, shots={}, data_sha256=None, prompts_sha256=None),
    **dict.fromkeys(("seconds", "tokens", "tokens_per_second", "items_per_second", "published")),
    **dict(per_subject={}, more={}, notes=[], error=None),
}


@dataclass(frozen=True)
class Question:
    """An item as it is asked, with the most examples that leave room for the answer."""

    item: Item
    subject: str
    prompter: Prompter
    request: Request
    num_shots: int
    shot_ids: tuple[str, ...]
    num_tokens: int  # of the prompt and the longest answer

    @property
    def prompt_sha256(self) -> str:
        return sha256(self.request.text)


def blank(benchmark: Any, style: str, error: str | None = None) -> dict[str, Any]:
    """Entry of a task that was not run."""
    names = {"benchmark": benchmark.name, "style": style, "domain": benchmark.domain}
    return {**names, **json.loads(json.dumps(BLANK)), "error": error}


def run(
    benchmark: Any,
    style: str,
    loaded: Loaded,
    scorer: Any,
    settings: Settings,
    file: Path | None,
    *,
    facts: dict[str, Any],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Ask all items, or those that ``file`` does not hold yet.

    Args:
        style: a name in STYLES.
        file: where the items' lines go; None keeps them in memory alone.
        facts: of the model; its ``fingerprint`` tells it from others.
        progress: is told tokens done and tokens in all, before each batch.
    Returns:
        the task's entry of results.json.
    Raises:
        UserError: no item fits, or ``file`` is of another run. NumericalFault: scores that are no numbers.
        EnvironmentFault: out of memory, no sandbox, or ``file`` cannot be written.
    """
    from baichuan_sft.evaluate import published, scores

    started = time.monotonic()
    check_sandbox(benchmark, settings)
    questions, num_long = ask(benchmark, style, loaded, scorer, settings)
    requests = [question.request for question in questions]
    plan = scorer.plan(requests)
    identity = identity_of(benchmark, style, loaded, scorer, settings, facts, questions)
    total = sum(question.num_tokens for question in questions)
    rows: dict[int, Row] = {}
    with opened(file, identity, [[questions[i].item.id for i in batch] for batch in plan]) as (out, kept):
        rows.update(zip((i for batch in plan for i in batch), kept))
        num_kept, begun = len(rows), time.monotonic()
        done = sum(questions[i].num_tokens for i in rows)
        for number, batch in enumerate(plan):
            if batch[0] in rows:
                continue
            if progress is not None:
                progress(done, total)
            done += sum(questions[i].num_tokens for i in batch)
            responses = answers(scorer, [requests[i] for i in batch], settings.seed, number)
            lines = [dumps(row_of(questions[i], response)) for i, response in zip(batch, responses)]
            if out is not None:
                append(out, b"".join(lines))
            # Read back, so that a resumed run sums up the very same values.
            rows.update(zip(batch, map(json.loads, lines)))
    spent = time.monotonic() - begun
    outcomes = [Outcome(rows[i]["prediction"], rows[i]["score"], rows[i]["detail"]) for i in range(len(rows))]
    found = scores.summary(benchmark, [question.item for question in questions], outcomes)
    asked = list(rows.values())[num_kept:]
    tokens = sum(row["tokens"] for row in asked)
    return {
        **blank(benchmark, style),
        **dict(metric=found.metric, value=found.value, low=found.low, high=found.high, items=found.num_items),
        "skipped": {"too long": num_long} if num_long else {},
        "shots": {
            str(n): count for n, count in sorted(Counter(r["num_shots"] for r in rows.values()).items())
        },
        "data_sha256": identity["data_sha256"],
        "prompts_sha256": identity["prompts_sha256"],
        "seconds": time.monotonic() - started,
        "tokens": sum(row["tokens"] for row in rows.values()),
        "tokens_per_second": tokens / spent if asked else None,
        "items_per_second": len(asked) / spent if asked else None,
        "published": published.figure(benchmark.name, facts),
        "per_subject": dict(found.per_subject),
        "more": dict(found.more),
        "notes": [*loaded.notes, *([f"{num_kept} items were there from an earlier run"] if num_kept else [])],
    }


def check_sandbox(benchmark: Any, settings: Settings) -> None:
    """
    Raises:
        EnvironmentFault: generated programs are to be run, and no sandbox can be made.
    """
    if benchmark.kind == "code" and not settings.allow_unsandboxed:
        from baichuan_sft.evaluate import sandbox

        if why := sandbox.check():
            raise EnvironmentFault(
                f"{benchmark.name}: runs generated programs and there is no sandbox for them: {why}; "
                "--allow_unsandboxed runs them without one."
            )


def ask(
    benchmark: Any, style: str, loaded: Loaded, scorer: Any, settings: Settings
) -> tuple[list[Question], int]:
    """All items as they are asked, and how many do not fit into the context even without examples.

    Raises:
        UserError: none fits.
    """
    module, _, function = pick("style", style, STYLES).partition(":")
    prompter_of: Style = getattr(importlib.import_module(module), function)
    questions, num_long = [], 0
    for subject in loaded.subjects:
        prompter = prompter_of(benchmark, subject, settings)
        for item in subject.items:
            for num_shots in range(prompter.num_shots, -1, -1):
                request = prompter.request(item, num_shots)
                if (num_tokens := scorer.length(request)) <= scorer.max_length:
                    shot_ids = tuple(prompter.shot_ids(item, num_shots))
                    assert item.id not in shot_ids, f"{item.id} is among its own examples"
                    questions.append(
                        Question(item, subject.name, prompter, request, num_shots, shot_ids, num_tokens)
                    )
                    break
            else:
                num_long += 1
    if not questions:
        why = f"none of {num_long} items fits into {scorer.max_length} tokens, even without examples"
        raise UserError(f"{benchmark.name}: {why if num_long else 'has no items'}.")
    return questions, num_long


def identity_of(
    benchmark: Any,
    style: str,
    loaded: Loaded,
    scorer: Any,
    settings: Settings,
    facts: dict[str, Any],
    questions: list[Question],
) -> dict[str, Any]:
    """What must be equal for two runs to share a file: all that the items' lines follow from."""
    prompts = [[question.item.id, asdict(question.request)] for question in questions]
    return {
        "format": FORMAT,
        "benchmark": benchmark.name,
        "style": style,
        "model": facts.get("fingerprint"),
        **{name: facts.get(name) for name in ("dtype", "quantization")},
        **{name: getattr(scorer, name, None) for name in ("chat", "max_length", "batch_tokens")},
        **asdict(settings),
        "items": len(questions),
        "data_sha256": sha256(json.dumps(dict(loaded.files), sort_keys=True)),
        "prompts_sha256": sha256(json.dumps(prompts)),
        "version": __version__,
    }


def answers(scorer: Any, requests: list[Request], seed: int, number: int) -> list[Response]:
    """Of one batch; sampling depends on the seed and the batch's number alone, and leaves no trace.

    Raises:
        NumericalFault: a score is NaN or infinite. EnvironmentFault: out of memory.
    """
    import torch

    try:
        with torch.random.fork_rng(devices=[]):  # samples are drawn by the CPU's
            torch.default_generator.manual_seed(int(sha256(f"{seed} {number}")[:15], 16))
            responses = scorer.run(requests)
    except torch.OutOfMemoryError as error:
        raise EnvironmentFault(f"out of memory, give a smaller --batch_tokens: {first_line(error)}") from None
    assert len(responses) == len(requests)
    if not all(math.isfinite(score) for response in responses for score in response.scores):
        raise NumericalFault("the model's scores are NaN or infinite; try --dtype bf16, or fp32.")
    return responses


def row_of(question: Question, response: Response) -> Row:
    outcome = question.prompter.judge(question.item, response)
    return {
        "id": question.item.id,
        "subject": question.subject,
        "prompt_sha256": question.prompt_sha256,
        "num_shots": question.num_shots,
        "shot_ids": question.shot_ids,
        "gold": question.item.answer,
        "prediction": outcome.prediction,
        "score": outcome.score,
        **({"scores": response.scores} if question.request.choices else {"texts": response.texts}),
        "tokens": response.tokens,
        "detail": dict(outcome.detail),
    }
