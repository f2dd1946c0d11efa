"""What flows through an evaluation: items of a benchmark, requests to a model, its responses, outcomes.

    files -> read -> Loaded(Subject(Item)) -> Prompter.request -> Request -> Scorer -> Response
          -> Prompter.judge -> Outcome -> one line of items/<benchmark>.<style>.jsonl -> summary

No tokenizer, model or prompt is known here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        id: unique in its benchmark: subject, slash, place or own name ("agronomy/0", "HumanEval/17").
        question: as in the authors' file, without its choices.
        choices: texts of A, B, ...; empty where the answer is free.
        answer: a letter of the choices, else the reference: number, translation, canonical solution.
        fields: what only this benchmark has (passage, test, entry_point, examples ...).
    """

    id: str
    question: str
    answer: str
    choices: tuple[str, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Subject:
    """Items that share their examples.

    Attributes:
        name: as in the authors' files ("agronomy"); the benchmark's own name where it has no subjects.
        title: as a prompt says it ("农学").
        shots: the pool of examples, in the authors' order; holds none of ``items``.
    """

    name: str
    title: str
    items: tuple[Item, ...]
    shots: tuple[Item, ...]


@dataclass(frozen=True)
class Loaded:
    """What lies on disk of a benchmark.

    Attributes:
        files: path below the data directory -> sha256.
        notes: one line each on what was left out, with its count ("480 items with several answers").
    """

    subjects: tuple[Subject, ...]
    files: Mapping[str, str]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """One question to a model.

    Attributes:
        text: the whole prompt.
        choices: what may follow it; empty to generate.
        by: "logit": the last position's logit of each choice's one token; "loglikelihood": the sum of the
            log-probabilities of each choice's tokens.
        stop: strings that end a generated answer.
        max_new_tokens, samples, temperature: of generation; temperature 0 is greedy.
    """

    text: str
    choices: tuple[str, ...] = ()
    by: str = "logit"
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 0
    samples: int = 1
    temperature: float = 0.0


@dataclass(frozen=True)
class Response:
    """
    Attributes:
        scores: one per choice; empty where text was generated.
        texts: one per sample, without the stop string and what follows it.
        tokens: of the prompt and of what was scored or generated.
        prompt_tokens: of the prompt alone.
    """

    scores: tuple[float, ...] = ()
    texts: tuple[str, ...] = ()
    tokens: int = 0
    prompt_tokens: int = 0


@dataclass(frozen=True)
class Outcome:
    """
    Attributes:
        prediction: letter, number or text that was judged.
        score: 1 right, 0 wrong; for code the share of samples that pass; None where only the whole set
            has a score (BLEU).
        detail: what a reader of the per-item file wants to know too ("timeout", the passing samples ...).
    """

    prediction: str
    score: float | None
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """How to ask, the same for all tasks.

    Attributes:
        shots: examples per prompt; None for each benchmark's own number.
        seed: of the shuffle of examples and of sampling.
        samples: generated programs per code item, for pass@k.
        allow_unsandboxed: run generated programs where no sandbox can be made.
    """

    shots: int | None = None
    seed: int = 0
    samples: int = 1
    allow_unsandboxed: bool = False


class Prompter(Protocol):
    """How one style asks the items of one subject.

    Attributes:
        num_shots: examples in a whole prompt; fewer where the prompt would not fit into the context.
    """

    num_shots: int

    def shot_ids(self, item: Item, num_shots: int) -> tuple[str, ...]:
        """Ids of the examples in ``request(item, num_shots)``, in their order. Never the item's own."""

    def request(self, item: Item, num_shots: int) -> Request:
        """The prompt with the last ``num_shots`` of the examples: header and question are never cut."""

    def judge(self, item: Item, response: Response) -> Outcome:
        """What the model's response is worth."""


class Style(Protocol):
    """``prompter`` of a style's module."""

    def __call__(self, benchmark: Any, subject: Subject, settings: Settings) -> Prompter: ...


def letter(scores: Sequence[float]) -> str:
    """Of the highest score; the first one of equals."""
    return LETTERS[max(range(len(scores)), key=lambda i: scores[i])]
