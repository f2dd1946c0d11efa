"""The tasks of lm-evaluation-harness, made from its own YAML files, over documents made from our items.

Gaokao, MCMLE and Chinese to X have no file there: theirs are put together from the nearest one's.
"""

from __future__ import annotations

import ast
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from baichuan_sft.errors import EnvironmentFault, first_line
from baichuan_sft.evaluate.answers import same_expression
from baichuan_sft.evaluate.benchmarks import Benchmark
from baichuan_sft.evaluate.items import LETTERS, Item, Subject
from baichuan_sft.evaluate.readers import FLORES

Doc = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """Benchmarks that are asked in the same way.

    Attributes:
        file: of lm-eval's task, below its tasks; ``{}`` is the subject's name.
        doc: an item as that task's document.
        config: replaces what the file says.
        template: the file for subjects without one of their own (a user's).
        description: before the examples, with the template; ``{}`` is the subject's title.
        question: key of the question in the examples that lm-eval brings.
    """

    file: str
    doc: Callable[[Item], Doc]
    config: Mapping[str, Any] = field(default_factory=dict)
    template: str = ""
    description: str = ""
    question: str = ""


def make_task(
    family: Family, benchmark: Benchmark, subject: Subject, docs: list[Doc]
) -> tuple[Any, list[Doc], bool]:
    """lm-eval's ``ConfigurableTask`` of a subject, whose sampler takes the examples it is given.

    Returns:
        The task; examples that lm-eval brings; whether it takes the first of the pool or draws at random.
    """
    config = _config(family, benchmark, subject)
    few = config["fewshot_config"]
    samples, first = few.pop("samples", None), few.get("sampler") == "first_n"
    few["sampler"] = "first_n"
    from lm_eval import utils
    from lm_eval.api.task import ConfigurableTask

    if not hasattr(utils.env.from_string, "cache_info"):  # compiling the templates anew is 98 % of a prompt
        utils.env.from_string = cache(utils.env.from_string)
    splits = {"items": _Docs(docs), "shots": _Docs()}
    task = ConfigurableTask(config={**config, "custom_dataset": lambda **_: splits})
    return task, (samples() if callable(samples) else samples or []), first


class _Docs(list):
    """Documents with the one attribute of a ``datasets.Dataset`` that lm-eval asks for."""

    @property
    def features(self) -> dict[str, None]:
        return dict.fromkeys(self[0])


def _config(family: Family, benchmark: Benchmark, subject: Subject) -> dict[str, Any]:
    """What lm-eval's own file says, with our documents instead of its data set.

    The file is read by itself: lm-eval's index of all tasks leaves a broken one out without a word.
    """
    name = subject.name.split("/")[-1]
    path = _tasks() / family.file.format(name)
    template = bool(family.template) and not path.is_file()
    try:
        from lm_eval.tasks._yaml_loader import load_yaml

        config = load_yaml(_tasks() / family.template if template else path, resolve_func=False)
        config = _resolved(config)
    except Exception as error:  # whatever yaml, an include or a task's own Python file raises
        raise EnvironmentFault(
            f"lm-eval {version('lm-eval')} cannot give the task {path} ({first_line(error)}); "
            "--style harness follows version 0.4.13: pip install 'lm-eval==0.4.13'."
        ) from None
    if template:
        config |= {
            "task": f"{benchmark.name}_{name}",
            "description": family.description.format(subject.title),
        }
    if benchmark.kind == "code":  # judged by the sandbox
        config |= {"metric_list": [{"metric": "bypass", "aggregation": "bypass", "higher_is_better": True}]}
    if benchmark.kind == "translation":
        *_, target = FLORES[benchmark.name.split("-")[1]]
        config |= {
            "doc_to_text": "Chinese phrase: {{question}}\n" + target + " phrase:",
            "doc_to_target": "{{answer}}",
        }
    few = {**config.get("fewshot_config", {}), **family.config.get("fewshot_config", {})}
    data = ("dataset_path", "dataset_name", "training_split", "validation_split", "num_fewshot", "metadata")
    config = {key: value for key, value in config.items() if key not in data} | dict(family.config)
    ours = {"test_split": "items", "fewshot_split": "shots", "unsafe_code": False}
    return {**config, "fewshot_config": few, **ours}


def _resolved(value: Any) -> Any:
    """``!function utils.name``, which is read as a path, becomes the function."""
    if isinstance(value, dict):
        return {key: _resolved(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_resolved(inner) for inner in value]
    if isinstance(value, str) and value.startswith(f"{_tasks()}/"):
        file, _, name = value.removeprefix(f"{_tasks()}/").rpartition(".")
        return _module(f"{file}.py")[name]
    return value


@cache
def _module(file: str) -> dict[str, Any]:
    """Definitions of a task's own Python file, without what it tries to import: that of MATH wants sympy's
    LaTeX parser and one version of antlr4, those of HumanEval and MBPP fetch a metric from the hub."""
    path = _tasks() / file
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [
        node
        for node in tree.body
        if not isinstance(node, ast.Try)
        and not (isinstance(node, ast.Import) and node.names[0].name == "evaluate")
    ]
    names: dict[str, Any] = {"__name__": f"lm_eval.tasks.{path.parent.name}.{path.stem}"}
    exec(compile(tree, str(path), "exec"), names)
    return names


@cache
def _tasks() -> Path:
    """Where lm-eval keeps its task files."""
    found = find_spec("lm_eval")
    if found is None or found.origin is None:
        raise EnvironmentFault("--style harness needs lm-eval: pip install 'baichuan-sft[eval]'.")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every custom_dataset
    return Path(found.origin).resolve().parent / "tasks"


def _gold(item: Item) -> int:
    return LETTERS.index(item.answer)


def _lettered(item: Item) -> Doc:
    letters = list(LETTERS[: len(item.choices)])
    named = dict(zip(letters, item.choices, strict=True))
    texts = {
        "question": item.question,
        "Question": item.question,
        "answer": item.answer,
        "Answer": item.answer,
    }
    return {**named, **texts, "letters": letters, "choices": list(item.choices), "gold": _gold(item)}


def _mmlu(item: Item) -> Doc:
    return {"question": item.question, "choices": list(item.choices), "answer": _gold(item)}


def _medmcqa(item: Item) -> Doc:
    options = dict(zip(("opa", "opb", "opc", "opd"), item.choices, strict=True))
    return {"question": item.question, "cop": _gold(item), **options}


def _agieval(item: Item) -> Doc:
    """As in the data sets that lm-eval's files name: the authors' zero-shot prompt, options with letters.

    Source: ruixiangcui/AGIEval src/dataset_loader.py ``convert_zero_shot``.
    """
    subject, last = item.id.split("/")[0], LETTERS[len(item.choices) - 1]
    options = [f"({LETTERS[i]}){text}" for i, text in enumerate(item.choices)]
    ask, listed, lead = "问题：", "选项：", f"答案：从A到{last}, 我们应选择"
    if subject.startswith(("lsat", "sat", "logiqa-en", "aqua", "gaokao-english")):
        ask, listed, lead = "Q: ", "Answer Choices: ", f"A: Among A through {last}, the answer is"
    query = f"{item.fields.get('passage') or ''}{ask}{item.question} {listed}{' '.join(options)}\n{lead}"
    return {"query": query, "choices": options, "gold": [_gold(item)]}


def _worked(question: str, worked: str, answer: str = "") -> Callable[[Item], Doc]:
    """Keys of a question, its worked answer (where the authors give one) and its bare answer."""

    def doc(item: Item) -> Doc:
        made = {question: item.question, worked: item.fields.get("solution", item.answer)}
        return {**made, answer: item.answer} if answer else made

    return doc


def _humaneval(item: Item) -> Doc:
    return {"prompt": item.question, **item.fields}


def _mbpp(item: Item) -> Doc:
    tests = item.fields["test_list"]  # lm-eval's prompt shows three
    return {"text": item.question, "code": item.answer, "test_list": [*tests, *[""] * (3 - len(tests))]}


def _math_answers(texts: list[list[str]], _docs: list[Doc]) -> list[list[str]]:
    own = _module("minerva_math/utils.py")
    return [[own["normalize_final_answer"](own["get_unnormalized_answer"](t)) for t in row] for row in texts]


def _math_results(doc: Doc, results: list[str]) -> dict[str, float]:
    """lm-eval's ``exact_match`` of MATH with our comparison for its sympy's."""
    gold = _module("minerva_math/utils.py")["normalize_final_answer"](doc["answer"])
    return {"exact_match": float(results[0] == gold or same_expression(results[0], doc["answer"]))}


_LETTERS = {"doc_to_choice": "letters", "doc_to_target": "gold"}
_OPTIONS = (
    "{{question.strip()}}\n{% for choice in choices %}{{letters[loop.index0]}}. {{choice}}\n{% endfor %}"
)
_CEVAL = "ceval/_default_ceval_yaml"
_AGIEVAL = Family(
    "agieval/{}.yaml",
    _agieval,
    {"fewshot_config": {"doc_to_target": "{{choices[gold[0]]}}"}},
    "agieval/aqua-rat.yaml",
)
FAMILIES: dict[str, Family] = {
    "ceval": Family(
        "ceval/ceval-valid_{}.yaml", _lettered, {}, _CEVAL,
        "以下是中国关于{}的单项选择题，请选出其中的正确答案。\n\n",
    ),
    "cmmlu": Family(
        "cmmlu/cmmlu_{}.yaml", _lettered, {}, "cmmlu/_default_template_yaml",
        "以下是关于{}的单项选择题，请直接给出正确答案的选项。\n\n",
    ),
    "mmlu": Family(
        "mmlu/default/mmlu_{}.yaml", _mmlu, {}, "mmlu/default/_default_template_yaml",
        "The following are multiple choice questions (with answers) about {}.\n\n",
    ),
    "gaokao": Family(
        "", _lettered, {"doc_to_text": _OPTIONS + "答案：", **_LETTERS}, _CEVAL,
        "以下是中国高考{}的单项选择题，请选出其中的正确答案。\n\n",
    ),
    "agieval": _AGIEVAL,
    "jecqa": _AGIEVAL,
    "medqa-usmle": Family(
        "medqa/medqa.yaml", _lettered, {"doc_to_text": "Question: " + _OPTIONS + "Answer:", **_LETTERS}
    ),
    "medqa-mcmle": Family(
        "", _lettered, {"doc_to_text": _OPTIONS + "答案：", **_LETTERS}, _CEVAL,
        "以下是中国执业医师资格考试的单项选择题，请选出其中的正确答案。\n\n",
    ),
    "medmcqa": Family("medmcqa/medmcqa.yaml", _medmcqa),
    "bbh": Family(
        "bbh/cot_fewshot/{}.yaml", _worked("input", "target"),
        {"generation_kwargs": {"max_gen_toks": 1024, "until": ["</s>", "Q:", "\n\n"]}}, question="input",
    ),
    "gsm8k": Family("gsm8k/gsm8k.yaml", _worked("question", "answer")),
    "math": Family(
        "minerva_math/minerva_math_algebra.yaml", _worked("problem", "solution", "answer"),
        {
            "process_docs": None,
            "process_results": _math_results,
            "filter_list": [{"name": "answer", "filter": [
                {"function": "custom", "filter_fn": _math_answers}, {"function": "take_first"},
            ]}],
        },
        question="problem",
    ),
    "humaneval": Family("humaneval/humaneval.yaml", _humaneval, {"filter_list": None}),
    "mbpp": Family("mbpp/mbpp.yaml", _mbpp, question="text"),
    "flores": Family(
        "", _worked("question", "answer"), {"fewshot_config": {"sampler": "first_n"}},
        "translation/wmt_common_yaml",
    ),
}  # fmt: skip
