"""Readers of the multiple-choice benchmarks: the authors' files -> questions, and examples where shipped."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from itertools import islice

from baichuan_sft.evaluate import titles
from baichuan_sft.evaluate.formats import POOL, Folder, Found, Line, Part, bad, plain, text_of
from baichuan_sft.evaluate.items import LETTERS, Item


def _choice(line: Line, item_id: str, *, several: bool = False) -> Item:
    """A question with choices, of any of the authors' spellings.

    Args:
        several: more than one right letter is allowed, as in "AC".
    Raises:
        UserError: no question, choices or answer, or an answer that is none of the choices ("NA").
    """
    where, record = line
    options = next((record[k] for k in ("options", "option_list", "choices") if record.get(k)), None)
    if options is None:
        names = next((n for n in (tuple("abcd"), ("opa", "opb", "opc", "opd")) if n[0] in record), ())
        options = [text_of(where, record, name) for name in names]
    values = [options[key] for key in sorted(options)] if isinstance(options, dict) else options
    if not isinstance(values, list) or len(values) < 2:
        bad(where, f"has {', '.join(map(repr, record)):.200}; needed: question, A, B, C, D, answer")
    letters = LETTERS[: len(values)]
    gold = next(
        (record[k] for k in ("label", "answer_idx", "answer", "cop") if record.get(k) is not None), None
    )
    if type(gold) is int:
        answer = letters[gold] if 0 <= gold < len(letters) else ""
    else:  # AGIEval has "A B D" and ["A", "C", "D", "。"] too
        answer = re.sub(
            r"[\W_]", "", "".join(map(str, gold)) if isinstance(gold, list) else str(gold)
        ).upper()
    if not answer or not set(answer) <= set(letters) or len(answer) > (len(letters) if several else 1):
        bad(where, f"has the answer {gold!r:.60}, which is not one of {', '.join(letters)}")
    fields = {"passage": text_of(where, record, "passage")} if record.get("passage") else {}
    question = text_of(where, record, "question", "statement")
    return Item(item_id, question, answer, tuple(map(str, values)), fields)


def _choices(lines: Iterable[Line], name: str) -> list[Item]:
    return [_choice(line, f"{name}/{i}") for i, line in enumerate(lines)]


def _left_out(**counts: int) -> list[str]:
    """Notes on what the vendor's filter, one right answer of four choices, takes away."""
    return [
        f"{n:,} items {why.replace('_', ' ')} left out, as the vendor did" for why, n in counts.items() if n
    ]


def _csv(
    folder: Folder, split: str, names: Mapping[str, str], only: Collection[str], columns: tuple[str, ...] = ()
) -> Found:
    """Subjects with one csv file per split."""
    dev, found = folder.split("dev"), Found()
    for subject, file in folder.split(split).items():
        if not only or subject in only:
            shots = _choices(folder.rows(dev[subject], columns), f"{subject}/dev") if subject in dev else None
            items = _choices(folder.rows(file, columns), subject)
            found.parts.append(Part(subject, items, shots, names.get(subject, "")))
    return found


def ceval(folder: Folder, only: Collection[str] = ()) -> Found:
    found = _csv(folder, "val", titles.CEVAL, only)
    if found.parts:
        found.notes.append(
            "val items: the published figures are of the test set, whose answers are not public"
        )
    return found


def cmmlu(folder: Folder, only: Collection[str] = ()) -> Found:
    return _csv(folder, "test", titles.CMMLU, only)


# a question that was already made a prompt (QLoRA's copy of MMLU)
_PROMPT = re.compile(
    r"The following are[^\n]*\n\n(.*)\nA\. (.*)\nB\. (.*)\nC\. (.*)\nD\. (.*)\nAnswer:", re.DOTALL
)


def mmlu(folder: Folder, only: Collection[str] = ()) -> Found:
    """hendrycks/test: csv without a header; else records with their subject, raw or as whole prompts."""
    found = _csv(folder, "test", {}, only, ("question", "a", "b", "c", "d", "answer"))
    if found.parts:
        return found
    lines: dict[str, list[Line]] = {}
    for file in folder.find(".jsonl"):
        for where, record in folder.jsonl(file):
            subject = text_of(where, record, "subject", "type")
            if "input" in record:
                match = _PROMPT.fullmatch(text_of(where, record, "input").strip())
                if not match:
                    bad(where, "is no prompt with a question, choices A. to D. and 'Answer:'")
                values = (*match.groups(), text_of(where, record, "output"))
                record = dict(zip(("question", "a", "b", "c", "d", "answer"), values, strict=True))
            if not only or subject in only:
                lines.setdefault(subject, []).append((where, record))
    return Found([Part(subject, _choices(some, subject)) for subject, some in lines.items()])


MEDICAL = {
    "ceval": (ceval, ("clinical_medicine", "basic_medicine")),
    "mmlu": (mmlu, ("clinical_knowledge", "anatomy", "college_medicine", "college_biology", "nutrition",
                    "virology", "medical_genetics", "professional_medicine")),
    "cmmlu": (cmmlu, ("anatomy", "clinical_knowledge", "college_medicine", "genetics", "nutrition",
                      "traditional_chinese_medicine", "virology")),
}  # fmt: skip


def medical(folder: Folder) -> Found:
    """The medical subjects of three benchmarks, named "mmlu/anatomy". Source: Baichuan2 README."""
    found = Found()
    for name, (read, subjects) in MEDICAL.items():
        inner = Folder(folder.data_dir, name)
        parts = read(inner, subjects).parts
        folder.sha256.update(inner.sha256)
        for part in parts:
            items, shots = (
                [replace(item, id=f"{name}/{item.id}") for item in pool]
                for pool in (part.items, part.shots or ())
            )
            title = part.title or plain(part.name)
            found.parts.append(
                Part(f"{name}/{part.name}", items, None if part.shots is None else shots, title)
            )
        if missing := sorted(set(subjects) - {part.name for part in parts}):
            found.notes.append(f"{name}: no files of {', '.join(missing)}")
    return found


_MARK = re.compile(r"(?<![A-Za-z0-9])([A-Z])\s*[.．、:：]")  # what stands before a choice


def split_choices(text: str) -> tuple[str, tuple[str, ...]]:
    """A question that ends with its choices, as both; without choices where A to D are not found.

    "1. Which?\\nA. one  B. two C．threeD．four" -> ("1. Which?", ("one", "two", "three", "four"))
    """
    marks = list(_MARK.finditer(text))
    # those that begin a line are preferred: "A. A、B are equal"
    lines = [mark for mark in marks if text[: mark.start()].rstrip(" \t\u3000").endswith("\n")]
    for some in (lines, marks):
        for start in reversed([i for i, mark in enumerate(some) if mark[1] == "A"]):
            run: list[re.Match[str]] = []
            for mark in some[start:]:
                run += [mark] if mark[1] == LETTERS[len(run)] else []
            if len(run) >= 4:
                ends = [*(mark.start() for mark in run[1:]), len(text)]
                choices = tuple(text[mark.end() : end].strip() for mark, end in zip(run, ends, strict=True))
                if some is marks or "\n" not in choices[0]:  # in that would stand an earlier question
                    return text[: run[0].start()].strip(), choices
    return text, ()


def gaokao(folder: Folder) -> Found:
    """GAOKAO-Bench: the choices stand in the question."""
    found, groups, several, other = Found(), 0, 0, 0
    for file in folder.find("/Objective_Questions/*_MCQs.json", "_MCQs.json"):
        name = file.rsplit("/", 1)[1].removesuffix(".json")
        part = Part(name, [], title=next((zh for word, zh in titles.GAOKAO.items() if word in name), ""))
        for i, (where, record) in enumerate(folder.listed(file, "example")):
            question, choices = split_choices(text_of(where, record, "question"))
            answers = record.get("answer")
            if not isinstance(answers, list) or len(answers) != 1:
                groups += 1
            elif len(str(answers[0])) > 1:
                several += 1
            elif len(choices) != 4:
                other += 1
            else:
                line = {"question": question, "choices": list(choices), "answer": answers[0]}
                part.items.append(_choice((where, line), f"{name}/{i}"))
        found.parts.append(part)
    found.notes = _left_out(
        of_several_questions_to_one_text=groups, with_several_answers=several, without_four_choices=other
    )
    return found


def _agi(folder: Folder, files: list[str]) -> Found:
    """AGIEval's records, and JEC-QA's own."""
    found, several, other, unanswered = Found(), 0, 0, 0
    for file in files:
        name = file.rsplit("/", 1)[1].split(".")[0]
        part = Part(name, [], title=titles.AGIEVAL.get(name, ""))
        for i, (where, record) in enumerate(folder.jsonl(file)):
            options = record.get("options") or record.get("option_list")
            if isinstance(options, list):
                record = {**record, "options": [_unlettered(*option) for option in enumerate(options)]}
            if not isinstance(options, list | dict) or len(options) != 4:
                other += 1
            elif record.get("label", record.get("answer")) in ([], None):
                unanswered += 1
            else:
                item = _choice((where, record), f"{name}/{i}", several=True)
                several += len(item.answer) > 1
                part.items += [item] if len(item.answer) == 1 else []
        found.parts.append(part)
    found.notes = _left_out(
        with_several_answers=several, without_four_choices=other, without_an_answer=unanswered
    )
    return found


def _unlettered(place: int, option: object) -> str:
    """A choice without its letter: "(A)text", "  A．text", "A text"."""
    return re.sub(rf"^\s*(\([A-E]\)|{LETTERS[place]}[.．、:：?\s])\s*", "", str(option)).strip()


def agieval(folder: Folder) -> Found:
    return _agi(folder, folder.find("/v1/*.jsonl", ".jsonl"))  # the vendor ran the first version


def jecqa(folder: Folder) -> Found:
    """AGIEval's two files, or the authors' own train files (their test files have no answers)."""
    found = _agi(folder, folder.find("/jec-qa-*.jsonl", "/[01]_train.json"))
    for part in found.parts:
        part.title = titles.AGIEVAL["jec-qa-kd"]
    return found


def medqa(region: str, folder: Folder) -> Found:
    """One country of MedQA's data_clean ("US", "Mainland"), the version with five choices."""
    short = {"US": "usmle", "Mainland": "mcmle"}[region]
    test, dev = (folder.first(f"/{region}/{s}.jsonl", f"/{short}*{s}*.jsonl") for s in ("test", "dev"))
    shots = _choices(islice(folder.jsonl(dev), POOL), f"{short}/dev") if dev else None
    items = _choices(folder.jsonl(test), short)
    counts = Counter(len(item.choices) for item in items)
    odd = ", ".join(f"{n} items with {k} choices" for k, n in sorted(counts.items()) if k != 5)
    title = {"US": "United States medical licensing", "Mainland": "执业医师资格"}[region]
    return Found(
        [Part(short, items, shots, title)], [f"{odd}: the published figures are of five"] if odd else []
    )


def medmcqa(folder: Folder) -> Found:
    """The authors' dev.json (test has no answers); "cop" counts from 1 there, from 0 in other copies."""
    dev, train = folder.first("/dev.json", "/dev*.jsonl"), folder.first("/train.json", "/train*.jsonl")
    read = [list(folder.jsonl(dev)), list(islice(folder.jsonl(train), POOL))]
    one = 0 if any(record.get("cop") == 0 for _, record in read[0]) else 1
    multi = sum(record.get("choice_type") == "multi" for _, record in read[0])
    pools = []
    for lines, name in zip(read, ("medmcqa", "medmcqa/train"), strict=True):
        for where, record in lines:
            if type(record.get("cop")) is not int:
                bad(where, f"has cop {record.get('cop')!r}, not the number of the right choice")
        single = [(w, {**r, "cop": r["cop"] - one}) for w, r in lines if r.get("choice_type") != "multi"]
        pools.append(_choices(single, name))
    parts = [Part("medmcqa", pools[0], pools[1] if train else None, "medical entrance")]
    return Found(parts, _left_out(of_type_multi=multi), multi)
