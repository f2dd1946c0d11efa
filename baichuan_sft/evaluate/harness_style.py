"""The prompts, requests, filters and metrics of lm-evaluation-harness, over our items.

Every subject becomes one task of lm-eval (``harness_tasks``), which builds contexts and continuations and
scores the responses. What differs from lm-eval 0.4.13, and why:

- Items are those our readers found; nothing is downloaded.
- Examples are as many as the vendor took, from the subject's pool alone (the first 500 of a train file).
  lm-eval draws those of AGIEval from the tested items, the very item with its answer among them, and then
  stops, since its list of gold answers is no text.
- BBH ends at "Q:", not at every capital Q, which seven of its answers hold.
- Programs run in the sandbox; several samples are drawn at the temperature of its ``humaneval_64``.
- MATH needs no ``lm-eval[math]``: both sides are normalised by lm-eval, then compared by ``answers``.
"""

from __future__ import annotations

import random
from typing import Any

from baichuan_sft.evaluate.benchmarks import Benchmark, origin
from baichuan_sft.evaluate.harness_tasks import FAMILIES, Doc, Family, make_task
from baichuan_sft.evaluate.items import Item, Outcome, Request, Response, Settings, Subject, letter
from baichuan_sft.evaluate.vendor_style import same_question

SAMPLES_TEMPERATURE = 0.2
MAX_NEW_TOKENS = 256  # lm-eval's own, where a task names none


def prompter(benchmark: Benchmark, subject: Subject, settings: Settings) -> HarnessPrompter:
    """How lm-eval asks the items of one subject.

    Raises:
        EnvironmentFault: lm-eval is missing, or this version has no such task.
    """
    source = origin(benchmark, subject.name)
    family = FAMILIES["flores" if source.kind == "translation" else source.name]
    return HarnessPrompter(source, subject, settings, family)


class HarnessPrompter:
    """One task of lm-eval; ``items.Prompter``.

    Examples are drawn as lm-eval draws them: the first of the pool, or at random for each item in turn, with
    ``settings.seed`` as its ``fewshot_random_seed``.
    """

    def __init__(self, benchmark: Benchmark, subject: Subject, settings: Settings, family: Family):
        self.kind, self.settings, self.family = benchmark.kind, settings, family
        pool = [(shot.id, same_question(shot), family.doc(shot)) for shot in subject.shots]
        self.task, samples, first = make_task(
            family, benchmark, subject, [family.doc(item) for item in subject.items]
        )
        if samples:  # lm-eval brings its own examples
            questions = [
                Item(f"lm-eval/{self.task.task_name}/{i}", doc[family.question], "")
                for i, doc in enumerate(samples)
            ]
            pool = [(item.id, same_question(item), doc) for item, doc in zip(questions, samples, strict=True)]
        shots = benchmark.shots if settings.shots is None else settings.shots
        self.num_shots = min(shots, len(pool))
        self.shots: dict[str, list[tuple[str, Doc]]] = {}
        known, generator = {same for _, same, _ in pool}, random.Random(settings.seed)
        for item in subject.items:
            same = same_question(item)
            allowed = [shot for shot in pool if shot[1] != same] if same in known else pool
            count = min(self.num_shots, len(allowed))
            chosen = allowed[:count] if first else generator.sample(allowed, count)
            self.shots[item.id] = [(name, doc) for name, _, doc in chosen]

    def _last(self, item: Item, num_shots: int) -> list[tuple[str, Doc]]:
        return self.shots[item.id][-num_shots:] if num_shots else []

    def shot_ids(self, item: Item, num_shots: int) -> tuple[str, ...]:
        return tuple(name for name, _ in self._last(item, num_shots))

    def _instances(self, item: Item, num_shots: int) -> list[Any]:
        """lm-eval's requests for an item: one for each choice, or one to generate."""
        doc, shots = self.family.doc(item), [doc for _, doc in self._last(item, num_shots)]
        self.task.sampler.replace_df(shots)
        made = self.task.construct_requests(doc, self.task.fewshot_context(doc, len(shots)))
        return made if isinstance(made, list) else [made]

    def request(self, item: Item, num_shots: int) -> Request:
        instances = self._instances(item, num_shots)
        text, asked = instances[0].arguments
        if self.kind == "choice":
            return Request(text, tuple(each.arguments[1] for each in instances), by="loglikelihood")
        samples = self.settings.samples if self.kind == "code" else 1
        return Request(
            text,
            stop=tuple(asked["until"]),
            max_new_tokens=asked.get("max_gen_toks", MAX_NEW_TOKENS),
            samples=samples,
            temperature=SAMPLES_TEMPERATURE if samples > 1 else 0.0,
        )

    def judge(self, item: Item, response: Response) -> Outcome:
        if self.kind == "translation":
            return Outcome(response.texts[0].strip(), None)
        if self.kind == "code":
            return self._run(item, response)
        if self.kind == "choice":
            scores = [(score, False) for score in response.scores]
            results = self.task.process_results(self.family.doc(item), scores)
            detail = {name: value for name, value in results.items() if name != "acc"}
            return Outcome(letter(response.scores), float(results["acc"]), detail)
        return self._filtered(item, response.texts[0])

    def _filtered(self, item: Item, text: str) -> Outcome:
        """By the task's filters and its first metric; of several filters the first one's result counts."""
        (instance,) = self._instances(item, 0)
        instance.resps = [text]
        self.task._instances = [instance]
        self.task.apply_filters()
        metric = next(iter(self.task.aggregation()))
        scores = {
            name: float(self.task.process_results(instance.doc, [found])[metric])
            for name, found in instance.filtered_resps.items()
        }
        first = next(iter(scores))
        return Outcome(instance.filtered_resps[first], scores[first], scores if len(scores) > 1 else {})

    def _run(self, item: Item, response: Response) -> Outcome:
        from baichuan_sft.evaluate import sandbox

        verdicts = [
            sandbox.passes(sandbox.programs(item, text), allow_unsandboxed=self.settings.allow_unsandboxed)
            for text in response.texts
        ]
        passed = [verdict.passed for verdict in verdicts]
        detail = {"passed": passed, "reasons": [verdict.reason for verdict in verdicts]}
        return Outcome(response.texts[0], sum(passed) / len(passed), detail)
