"""The benchmarks of the family's own tables: kind, examples, and where the files come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from baichuan_sft.errors import UserError, suggest
from baichuan_sft.evaluate import choices, readers
from baichuan_sft.evaluate.formats import Folder, Found


@dataclass(frozen=True)
class Benchmark:
    """
    Attributes:
        name: on the command line.
        title: as the vendor's tables say it.
        kind: "choice", "number" (GSM8K), "expression" (MATH), "answer" (BBH), "code" or "translation".
        shots: examples in the vendor's own runs.
        read: of the folder with the authors' files.
        files: what belongs below the data directory; the part before the first slash is the folder.
        num_items: of the whole benchmark, with those drawn as examples where the authors ship none.
    """

    name: str
    title: str
    domain: str
    kind: str
    shots: int
    read: Callable[[Folder], Found]
    files: str
    source: str
    licence: str
    num_items: int

    @property
    def folder(self) -> str:
        return self.files.split("/")[0]


LANGUAGES = {"en": "英", "fr": "法", "es": "西班牙", "ar": "阿拉伯", "ru": "俄", "ja": "日", "de": "德"}
_MEDQA = "https://github.com/jind11/MedQA (data_clean.zip)"
_CEVAL = "https://huggingface.co/datasets/ceval/ceval-exam"
_MMLU = "https://github.com/hendrycks/test (data.tar, unpacked)"
_CMMLU = "https://github.com/haonan-li/CMMLU (data/)"
_FLORES = "https://github.com/facebookresearch/flores (flores101_dataset.tar.gz, unpacked)"
_TABLE: list[tuple[Any, ...]] = [
    # name, title, domain, kind, shots, read, files, source, licence, items
    ("ceval", "C-Eval", "general", "choice", 5, choices.ceval, "ceval/ceval-exam.zip, or {dev,val}/*.csv",
     _CEVAL, "CC BY-NC-SA 4.0", 1346),
    ("mmlu", "MMLU", "general", "choice", 5, choices.mmlu, "mmlu/{dev,test}/*.csv", _MMLU, "MIT", 14042),
    ("cmmlu", "CMMLU", "general", "choice", 5, choices.cmmlu, "cmmlu/{dev,test}/*.csv",
     _CMMLU, "CC BY-NC-SA 4.0", 11582),
    ("gaokao", "Gaokao", "general", "choice", 5, choices.gaokao, "gaokao/2010-2022_*.json",
     "https://github.com/OpenLMLab/GAOKAO-Bench (Data/Objective_Questions/)", "Apache-2.0", 1499),
    ("agieval", "AGIEval", "general", "choice", 5, choices.agieval, "agieval/*.jsonl",
     "https://github.com/ruixiangcui/AGIEval (data/v1/)", "MIT; parts under their own terms", 4858),
    ("bbh", "BBH", "general", "answer", 3, readers.bbh, "bbh/*.json and cot-prompts/*.txt",
     "https://github.com/suzgunmirac/BIG-Bench-Hard", "MIT", 6511),
    ("jecqa", "JEC-QA", "law", "choice", 5, choices.jecqa, "jec-qa/jec-qa-{kd,ca}.jsonl, or {0,1}_train.json",
     "https://github.com/ruixiangcui/AGIEval (data/v1/) or https://jecqa.thunlp.org", "research only", 1012),
    ("medical", "CEval-MMLU-CMMLU", "medicine", "choice", 5, choices.medical,
     "ceval/, mmlu/, cmmlu/ as for these alone", f"{_CEVAL}, {_MMLU}, {_CMMLU}", "that of each", 2935),
    ("medqa-usmle", "MedQA-USMLE", "medicine", "choice", 5, partial(choices.medqa, "US"),
     "medqa/data_clean.zip, or US/{dev,test}.jsonl", _MEDQA, "MIT", 1273),
    ("medqa-mcmle", "MedQA-MCMLE", "medicine", "choice", 5, partial(choices.medqa, "Mainland"),
     "medqa/data_clean.zip, or Mainland/{dev,test}.jsonl", _MEDQA, "MIT", 3426),
    ("medmcqa", "MedMCQA", "medicine", "choice", 5, choices.medmcqa, "medmcqa/{train,dev}.json",
     "https://github.com/medmcqa/medmcqa (data.zip)", "MIT", 4183),
    ("gsm8k", "GSM8K", "math", "number", 4, readers.gsm8k, "gsm8k/{train,test}.jsonl",
     "https://github.com/openai/grade-school-math (grade_school_math/data/)", "MIT", 1319),
    ("math", "MATH", "math", "expression", 4, readers.math, "math/{train,test}/*/*.json",
     "https://github.com/hendrycks/math (MATH.tar, unpacked)", "MIT", 5000),
    ("humaneval", "HumanEval", "code", "code", 0, readers.humaneval, "humaneval/HumanEval.jsonl.gz",
     "https://github.com/openai/human-eval (data/)", "MIT", 164),
    ("mbpp", "MBPP", "code", "code", 3, readers.mbpp, "mbpp/mbpp.jsonl",
     "https://github.com/google-research/google-research (mbpp/)", "CC BY 4.0", 500),
    *(
        (f"flores-{code}", f"中-{title}", "translation", "translation", 8, partial(readers.flores, code),
         f"flores101/{{dev,devtest}}/{{zho_simpl,{readers.FLORES[code][0]}}}.{{dev,devtest}}",
         _FLORES, "CC BY-SA 4.0", 1012)
        for code, title in LANGUAGES.items()
    ),
]  # fmt: skip
BENCHMARKS: dict[str, Benchmark] = {row[0]: Benchmark(*row) for row in _TABLE}
DOMAINS: dict[str, tuple[str, ...]] = {
    domain: tuple(b.name for b in BENCHMARKS.values() if b.domain == domain)
    for domain in dict.fromkeys(b.domain for b in BENCHMARKS.values())
}


def origin(benchmark: Benchmark, subject: str) -> Benchmark:
    """The benchmark a subject was taken from: another one's only in "medical" ("mmlu/anatomy")."""
    return BENCHMARKS.get(subject.split("/")[0], benchmark) if benchmark.name == "medical" else benchmark


def asked_as(name: str) -> str:
    """The word in --tasks that means this benchmark alone."""
    return BENCHMARKS[name].title if name in DOMAINS else name


def select(tasks: str) -> list[str]:
    """Names of the benchmarks in a list such as "general,cmmlu", in the tables' order, each once.

    "math" is the domain, so the benchmark of that name alone is asked for by its title: "MATH".

    Raises:
        UserError: an unknown name, or none at all.
    """
    titles = {b.title: (b.name,) for b in BENCHMARKS.values()}
    known = {**titles, **{name: (name,) for name in BENCHMARKS}, **DOMAINS, "all": tuple(BENCHMARKS)}
    words = [word.strip() for word in tasks.split(",") if word.strip()]
    names = f"Known: all; {', '.join(DOMAINS)}; {', '.join(map(asked_as, BENCHMARKS))}."
    for word in words:
        if word not in known:
            raise UserError(f"unknown task {word!r}{suggest(word, list(known)) or '.'} {names}")
    if not words:
        raise UserError(f"--tasks {tasks!r} names no task. {names}")
    chosen = {name for word in words for name in known[word]}
    return [name for name in BENCHMARKS if name in chosen]
