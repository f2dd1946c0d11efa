"""Readers of the benchmarks with a free answer: the authors' files -> questions, and their examples."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

from baichuan_sft.evaluate.formats import POOL, Folder, Found, Part, bad, text_of
from baichuan_sft.evaluate.items import Item


def bbh(folder: Folder) -> Found:
    """27 tasks; the examples are those of the authors' chain-of-thought prompts."""
    found = Found()
    for file in folder.find("/bbh/*.json", "/*.json"):
        name = file.rsplit("/", 1)[1].removesuffix(".json")
        prompt = folder.first(f"/cot-prompts/{name}.txt", f"/cot-prompt_{name}.txt")
        shots = _thoughts(folder, prompt, name) if prompt else None
        about = {"instruction": shots[0].fields["instruction"]} if shots else {}
        items = [
            Item(f"{name}/{i}", text_of(*line, "input"), text_of(*line, "target"), fields=about)
            for i, line in enumerate(folder.listed(file, "examples"))
        ]
        found.parts.append(Part(name, items, shots))
    return found


def _thoughts(folder: Folder, file: str, name: str) -> list[Item]:
    """Examples of a prompt file: canary, "-----", instruction, then "Q: ...", "A: ... So the answer is X."

    Fields: "instruction" of the task, "reasoning" that ends with the answer.
    """
    instruction, *blocks = re.split(r"\n+Q: ", folder.text(file).split("-----\n", 1)[-1].strip())
    shots = []
    for i, block in enumerate(blocks):
        question, _, reasoning = block.rpartition("\nA: ")
        answer = reasoning.rpartition("the answer is ")[2].strip().removesuffix(".")
        if not question or "the answer is " not in reasoning:
            bad(file, f"example {i} is not 'Q: ...', 'A: ... So the answer is ...'")
        fields = {"instruction": instruction.strip(), "reasoning": reasoning.strip()}
        shots.append(Item(f"{name}/cot/{i}", question.strip(), answer, fields=fields))
    return shots or bad(file, "has no examples 'Q: ...', 'A: ...'")


def gsm8k(folder: Folder) -> Found:
    """Answers end with "#### 18"; field "solution" is the whole."""

    def items(file: str | None, name: str, most: int | None) -> list[Item]:
        made = []
        for i, (where, record) in enumerate(islice(folder.jsonl(file), most)):
            solution = text_of(where, record, "answer")
            number = solution.rpartition("####")[2].strip().replace(",", "")
            if "####" not in solution or not re.fullmatch(r"-?\d+(\.\d+)?", number):
                bad(where, "has no answer that ends with '#### ' and a number")
            question = text_of(where, record, "question")
            made.append(Item(f"{name}/{i}", question, number, fields={"solution": solution}))
        return made

    train = folder.first("/train.jsonl")
    shots = items(train, "gsm8k/train", POOL) if train else None
    return Found([Part("gsm8k", items(folder.first("/test.jsonl"), "gsm8k", None), shots)])


def boxed(solution: str) -> str | None:
    r"""What the last \boxed{...} holds, braces balanced ("\boxed 5" too); None without one."""
    start = max(solution.rfind("\\boxed"), solution.rfind("\\fbox"))
    if start < 0:
        return None
    rest = solution[start:].split("box", 1)[1].removeprefix("ed").lstrip()
    if not rest.startswith("{"):
        return next(iter(rest.split("$")[0].split()), None)
    depth = 0
    for i, letter in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if not depth:
            return rest[1:i]
    return None


def math(folder: Folder) -> Found:
    """MATH: a directory per type and a file per problem, or records of many problems in one file."""

    def by_type(split: str, most: int | None) -> dict[str, list[Item]]:
        pools: dict[str, list[Item]] = {}
        files = folder.find(f"/{split}/*/*.json")
        for file in sorted(files, key=lambda file: (len(file), file)):  # 2.json before 10.json
            pool = pools.setdefault(file.split("/")[-2], [])
            if most is None or len(pool) < most:
                pool.append(
                    _problem(file, folder.record(file), file.split(f"/{split}/")[1].removesuffix(".json"))
                )
        return pools

    items, shots = by_type("test", None), by_type("train", POOL)
    for file in [] if items else folder.find(".jsonl"):
        for line in folder.jsonl(file):
            kind = (item := _problem(*line, "")).fields["type"]
            pool = items.setdefault(kind, [])
            pool.append(replace(item, id=f"{kind}/{len(pool)}"))
    pools = {kind: [replace(shot, id=f"train/{shot.id}") for shot in pool] for kind, pool in shots.items()}
    return Found([Part(kind, pool, pools.get(kind)) for kind, pool in sorted(items.items())])


def _problem(where: str, record: Mapping[str, Any], name: str) -> Item:
    """Fields: "solution", "type" as the authors' directories are named, "level"."""
    other = record.get("other")
    more = {**record, **other} if isinstance(other, dict) else record
    solution = text_of(where, more, "solution")
    answer = record.get("answer") or boxed(solution)
    if not answer:
        bad(where, "has a solution without \\boxed{...} and no answer")
    kind = text_of(where, more, "type", "subject").lower().replace(" & ", "_and_").replace(" ", "_")
    fields = {"solution": solution, "type": kind, "level": str(more.get("level", ""))}
    return Item(name, text_of(where, record, "problem", "question"), str(answer), fields=fields)


def humaneval(folder: Folder) -> Found:
    """Fields: "prompt", "test", "entry_point"."""
    items = []
    for where, record in folder.jsonl(folder.first("/HumanEval.jsonl.gz", "/HumanEval.jsonl")):
        fields = {name: text_of(where, record, name) for name in ("prompt", "test", "entry_point")}
        answer = text_of(where, record, "canonical_solution")
        items.append(Item(text_of(where, record, "task_id"), fields["prompt"], answer, fields=fields))
    return Found([Part("humaneval", items, [])])


def mbpp(folder: Folder) -> Found:
    """Task 11 to 510 are asked, 1 to 10 are examples: 2, 3, 4 first, which the authors' own prompt has.

    Fields: "test_list", "test_setup_code", "code".
    """
    tasks: dict[int, Item] = {}
    for where, record in folder.jsonl(folder.first("/mbpp.jsonl")):
        number, tests = record.get("task_id"), record.get("test_list")
        if type(number) is not int or not isinstance(tests, list) or not tests:
            bad(where, "has no whole number 'task_id' or no list 'test_list'")
        code = text_of(where, record, "code").replace("\r\n", "\n")
        setup = str(record.get("test_setup_code") or "").replace("\r\n", "\n")
        fields = {"test_list": tuple(map(str, tests)), "test_setup_code": setup, "code": code}
        if number in tasks:
            bad(where, f"is task {number} again")
        tasks[number] = Item(f"mbpp/{number}", text_of(where, record, "text", "prompt"), code, fields=fields)
    items = [item for number, item in tasks.items() if 11 <= number <= 510]
    shots = [tasks[number] for number in (2, 3, 4, 1, *range(5, 11)) if number in tasks]
    return Found([Part("mbpp", items, shots or None)])


# code -> the file's name in Flores-101, in Flores-200, the language in a prompt
FLORES = {
    "zh": ("zho_simpl", "zho_Hans", "Chinese"),
    "en": ("eng", "eng_Latn", "English"),
    "fr": ("fra", "fra_Latn", "French"),
    "es": ("spa", "spa_Latn", "Spanish"),
    "ar": ("ara", "arb_Arab", "Arabic"),
    "ru": ("rus", "rus_Cyrl", "Russian"),
    "ja": ("jpn", "jpn_Jpan", "Japanese"),
    "de": ("deu", "deu_Latn", "German"),
}


def flores(code: str, folder: Folder) -> Found:
    """Chinese to another language: the same line of two files."""

    def pairs(split: str, name: str, *others: str) -> list[Item] | None:
        files = []
        for language in ("zh", code):
            short = [f"/{split}/{file}.{split}" for file in FLORES[language][:2]]
            files.append(folder.first(*short, *(other.format(language) for other in others)))
        zh, other = files
        if zh is None or other is None:
            return None
        lines = [folder.text(file).rstrip("\n").split("\n") for file in (zh, other)]
        if len(lines[0]) != len(lines[1]):
            bad(other, f"has {len(lines[1])} lines, {zh} {len(lines[0])}: they are not translations")
        for file, some in zip((zh, other), lines, strict=True):
            for number, line in enumerate(some, 1):
                if not line.strip():
                    bad(f"{file}:{number}", "is empty, so there is nothing to translate")
        both = enumerate(zip(*lines, strict=True))
        return [Item(f"{name}/{i}", source.strip(), target.strip()) for i, (source, target) in both]

    items = pairs("devtest", f"flores-{code}", "/devtest*.{}", "/test.{}.txt") or []
    shots = pairs("dev", f"flores-{code}/dev", "/dev.{}", "/dev.{}.txt")
    return Found([Part(f"flores-{code}", items, shots, FLORES[code][2])])
