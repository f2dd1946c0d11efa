"""The vendor's prompts: its own script for C-Eval and what is asked like it, the authors' scripts for MMLU
and CMMLU, OpenCompass for what is generated, as the README of Baichuan2 says.

The shuffle of examples is seeded; of the vendor's two scripts for C-Eval one is, with 123, the other is not.
OpenCompass chooses those of Flores by an embedding model; the first ones are taken here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import islice

import numpy as np

from baichuan_sft.evaluate import answers
from baichuan_sft.evaluate.benchmarks import Benchmark, origin
from baichuan_sft.evaluate.examples import EXAMPLES
from baichuan_sft.evaluate.items import LETTERS, Item, Outcome, Request, Response, Settings, Subject, letter
from baichuan_sft.evaluate.readers import FLORES

SAMPLES_TEMPERATURE = 0.8  # best for pass@100, Chen et al. 2021 (arXiv:2107.03374) fig. 5


@dataclass(frozen=True)
class Form:
    """One kind of prompt: header, examples, question.

    Attributes:
        header: before the examples; ``{title}`` is the subject's, ``{instruction}`` a task's of BBH.
        question: ``{question}`` with its passage, ``{choices}`` one on each line, ``{target}`` a language.
        answer: of an example, behind its question.
        stop: what begins the next question; none may stand inside an answer.
        shuffled: whether the examples are shuffled before the first are taken.
    """

    header: str
    question: str
    answer: str
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 0
    shuffled: bool = False


FORMS = {
    # Source: baichuan-inc/Baichuan-7B evaluation/evaluate_zh.py ``build_prompt``.
    "zh": Form(
        "以下是中国关于{title}考试的单项选择题，请选出其中的正确答案。\n\n",
        "{question}\n{choices}\n答案：", "{answer}\n", shuffled=True,
    ),
    # Source: haonan-li/CMMLU src/mp_utils.py ``gen_prompt``.
    "cmmlu": Form(
        "以下是关于{title}的单项选择题，请直接给出正确答案的选项。\n\n",
        "题目：{question}\n{choices}\n答案是：", "{answer}\n\n",
    ),
    # Source: baichuan-inc/Baichuan-7B evaluation/evaluate_mmlu.py; its ``format_subject`` leaves two blanks.
    "mmlu": Form(
        "The following are multiple choice questions (with answers) about  {title}.\n\n",
        "{question}\n{choices}\nAnswer:", " {answer}\n\n",
    ),
    # Source: open-compass/opencompass gsm8k_gen_1d7fe4, math_gen_265cce, flores_gen_806ede, mbpp_gen_830460,
    # humaneval_gen; MBPP without the quotes and blanks that those put around programs.
    "gsm8k": Form(
        "", "Question: {question}\nLet's think step by step\nAnswer:", "\n{answer}\n\n",
        ("\nQuestion:",), 512,
    ),
    "math": Form(
        "", "Problem:\n{question}\nSolution:\n", "{answer}\n\n", ("\nProblem:", "I hope it is correct."), 512,
    ),
    "flores": Form(
        "", "Translate the following Chinese (Simpl) statements to {target}.\n{question}\n", "{answer}\n",
        ("\nTranslate the following",), 256,
    ),
    "mbpp": Form(
        "", "You are an expert Python programmer, and here is your task: {question} "
        "Your code should pass these tests:\n\n{tests}\n[BEGIN]\n", "{answer}\n[DONE]\n\n", ("[DONE]",), 512,
    ),
    # "\ndef" and "\n#" of the literature would cut helpers, and all of a chat model's fenced program.
    "humaneval": Form(
        "", "Complete the following python code:\n{question}", "{answer}\n\n",
        ("\nif __name__", "\nassert "), 512,
    ),
    # Source: suzgunmirac/BIG-Bench-Hard cot-prompts/.
    "bbh": Form(
        "{instruction}", "Q: {question}\nA: Let's think step by step.", "\n{answer}\n\n", ("\nQ:",), 512,
    ),
}  # fmt: skip
TEXTS = {
    "number": (answers.number, answers.same_number),
    "expression": (answers.expression, answers.same_expression),
    "answer": (answers.short, answers.same_short),
}


def prompter(benchmark: Benchmark, subject: Subject, settings: Settings) -> VendorPrompter:
    """How the vendor asks the items of one subject."""
    benchmark = origin(benchmark, subject.name)
    form = FORMS.get(benchmark.name.partition("-")[0]) or FORMS["zh" if _is_chinese(subject) else "mmlu"]
    return VendorPrompter(benchmark, subject, settings, form)


def _is_chinese(subject: Subject) -> bool:
    """Its title or most of its questions; such a subject takes the form of C-Eval, any other that of MMLU."""
    if re.search(r"[\u4e00-\u9fff]", subject.title):  # English of the Gaokao is asked like its other subjects
        return True
    questions = [item.question for item in (*subject.shots, *subject.items)]
    return 2 * sum(bool(re.search(r"[\u4e00-\u9fff]", question)) for question in questions) > len(questions)


class VendorPrompter:
    """One subject in the vendor's prompts; ``items.Prompter``.

    All items of a subject have the same examples, so that a model reads those once.
    """

    def __init__(self, benchmark: Benchmark, subject: Subject, settings: Settings, form: Form):
        self.benchmark, self.title, self.settings, self.form = benchmark, subject.title, settings, form
        pool = list(subject.shots)
        if form.shuffled:
            # as datasets' shuffle, so that seed 123 gives the examples of the vendor's seeded script
            pool = [pool[i] for i in np.random.default_rng(settings.seed).permutation(len(pool))]
        self.pool: dict[tuple[str, ...], Item] = {}
        for shot in (*EXAMPLES.get(benchmark.name, ()), *pool):
            self.pool.setdefault(same_question(shot), shot)
        self.num_shots = min(benchmark.shots if settings.shots is None else settings.shots, len(self.pool))

    def _shots(self, item: Item, num_shots: int) -> list[Item]:
        own = same_question(item)
        shots = list(islice((shot for same, shot in self.pool.items() if same != own), self.num_shots))
        return shots[max(0, len(shots) - num_shots) :]

    def shot_ids(self, item: Item, num_shots: int) -> tuple[str, ...]:
        return tuple(shot.id for shot in self._shots(item, num_shots))

    def request(self, item: Item, num_shots: int) -> Request:
        form, kind = self.form, self.benchmark.kind
        instruction = f"{item.fields['instruction']}\n\n" if "instruction" in item.fields else ""
        examples = [
            self._question(shot) + form.answer.format(answer=_worked(kind, shot))
            for shot in self._shots(item, num_shots)
        ]
        header = form.header.format(title=self.title, instruction=instruction)
        text = "".join([header, *examples, self._question(item)])
        if kind == "choice":
            return Request(text, tuple(LETTERS[: len(item.choices)]))
        samples = self.settings.samples if kind == "code" else 1
        temperature = SAMPLES_TEMPERATURE if samples > 1 else 0.0
        return Request(
            text, (), "logit", form.stop, form.max_new_tokens, samples=samples, temperature=temperature
        )

    def _question(self, item: Item) -> str:
        passage = item.fields.get("passage")
        return self.form.question.format(
            question=f"{passage}\n{item.question}" if passage else item.question,
            choices="\n".join(f"{LETTERS[i]}. {choice}" for i, choice in enumerate(item.choices)),
            tests="\n".join(item.fields.get("test_list", ())),
            target=FLORES[self.benchmark.name[-2:]][2] if self.benchmark.kind == "translation" else "",
        )

    def judge(self, item: Item, response: Response) -> Outcome:
        kind = self.benchmark.kind
        if kind == "choice":
            chosen = letter(response.scores)
            return Outcome(chosen, float(chosen == item.answer))
        if kind == "translation":
            return Outcome(next(iter(response.texts[0].strip().splitlines()), "").strip(), None)
        if kind == "code":
            return self._run(item, response.texts)
        find, same = TEXTS[kind]
        found = find(response.texts[0])
        return Outcome(found, float(same(found, item.answer)))

    def _run(self, item: Item, texts: tuple[str, ...]) -> Outcome:
        from baichuan_sft.evaluate import sandbox

        prompt, entry_point = (str(item.fields.get(name, "")) for name in ("prompt", "entry_point"))
        programs = [answers.program(text, prompt, entry_point) for text in texts]
        allowed = self.settings.allow_unsandboxed
        verdicts = [
            sandbox.passes(sandbox.programs(item, each), allow_unsandboxed=allowed) for each in programs
        ]
        passed = [verdict.passed for verdict in verdicts]
        detail = {"passed": passed, "reasons": [verdict.reason for verdict in verdicts]}
        return Outcome(programs[0], sum(passed) / len(passed), detail)


def same_question(item: Item) -> tuple[str, ...]:
    """Equal for the same question with the same choices and passage, however it is spaced."""
    texts = (str(item.fields.get("passage") or ""), item.question, *item.choices)
    return tuple(" ".join(text.split()) for text in texts)


def _worked(kind: str, shot: Item) -> str:
    """An example's answer as its protocol writes it."""
    if kind == "answer":
        reasoning = str(shot.fields.get("reasoning", f"So the answer is {shot.answer}."))
        return reasoning.removeprefix("Let's think step by step.").strip()
    if "solution" not in shot.fields:
        return shot.answer
    solution = str(shot.fields["solution"])
    if kind == "number":  # GSM8K says "48/2 = <<48/2=24>>24" to a calculator
        return re.sub(r"<<.*?>>", "", solution).replace("####", "The answer is")
    return f"{solution}\nFinal Answer: The final answer is ${shot.answer}$. I hope it is correct."
