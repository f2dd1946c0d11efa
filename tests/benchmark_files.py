"""Hand-made files in the layouts of the benchmarks' authors, so that tests need none of the real ones.

Every subject has ``ITEMS`` questions to ask and examples beside them; where its authors ship none, five
questions more, which an evaluation draws as its examples.
"""

import csv
import io
import json
import zipfile
from pathlib import Path

ITEMS = 6
LANGUAGES = {
    "zho_simpl": "中",
    "eng": "en",
    "fra": "fr",
    "spa": "es",
    "ara": "ar",
    "rus": "ru",
    "jpn": "ja",
    "deu": "de",
}


def csv_text(rows) -> str:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue()


def jsonl(records) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def question(subject: str, i: int) -> list[str]:
    """Question, four choices, letter; letters go round A, B, C, D."""
    return [f"{subject} 第{i}题：选哪个？", *(f"{subject} {i} 之{k}" for k in "甲乙丙丁"), "ABCD"[i % 4]]


def exam(subject: str, header: list[str] | None, numbered: bool, count: int) -> str:
    rows = [[str(i), *question(subject, i)] if numbered else question(subject, i) for i in range(count)]
    return csv_text([header, *rows] if header else rows)


def agi(subject: str, count: int) -> list[dict]:
    rows = [question(subject, i) for i in range(count)]
    made = []
    for q, *choices, letter in rows:
        options = [f"({k}){choice}" for k, choice in zip("ABCD", choices, strict=True)]
        made.append({"passage": None, "question": q, "options": options, "label": letter, "answer": None})
    return made


def write_benchmarks(root: Path) -> Path:
    """Files of all benchmarks below ``root``; returns it."""
    files: dict[str, str] = {}
    with_id, cmmlu_header = (
        ["id", *"question A B C D answer".split()],
        ["", *"Question A B C D Answer".split()],
    )
    packed = {}
    for subject in ("law", "clinical_medicine", "basic_medicine"):
        packed[f"dev/{subject}_dev.csv"] = exam(f"{subject} dev", with_id, True, 5)
        packed[f"val/{subject}_val.csv"] = exam(subject, with_id, True, ITEMS)
        packed[f"test/{subject}_test.csv"] = csv_text(
            [with_id[:-1], *([str(i), *question("t", i)[:-1]] for i in range(3))]
        )
    (root / "ceval").mkdir(parents=True)
    with zipfile.ZipFile(root / "ceval" / "ceval-exam.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in packed.items():
            archive.writestr(name, text)
    for subject in ("abstract_algebra", "anatomy", "virology"):
        files[f"mmlu/data/dev/{subject}_dev.csv"] = exam(f"{subject} dev", None, False, 5)
        files[f"mmlu/data/test/{subject}_test.csv"] = exam(subject, None, False, ITEMS)
    for subject in ("agronomy", "anatomy"):
        files[f"cmmlu/dev/{subject}.csv"] = exam(f"{subject} dev", cmmlu_header, True, 5)
        files[f"cmmlu/test/{subject}.csv"] = exam(subject, cmmlu_header, True, ITEMS)
    for subject in ("History", "Physics"):
        rows = [question(subject, i) for i in range(ITEMS + 5)]
        example = [
            {"question": f"{q}\nA．{a}  B．{b}\nC．{c}D．{d}\n", "answer": [k]} for q, a, b, c, d, k in rows
        ]
        example += [{**example[0], "answer": ["AC"]}, {**example[0], "answer": ["A", "B"]}]
        example += [{"question": "没有选项", "answer": ["A"]}]
        text = json.dumps({"example": example}, ensure_ascii=False)
        files[f"gaokao/Data/Objective_Questions/2010-2022_{subject}_MCQs.json"] = text
    several = {**agi("s", 1)[0], "label": ["A", "C", "。"]}
    files["agieval/data/v1/sat-en.jsonl"] = jsonl(
        [{**record, "passage": "A passage."} for record in agi("sat", ITEMS + 5)] + [{**several, "label": []}]
    )
    files["agieval/data/v1/gaokao-mathqa.jsonl"] = jsonl(
        [*agi("mathqa", ITEMS + 5), {**several, "label": "A B D"}]
    )
    five = {**several, "options": [f"({k})x" for k in "ABCDE"], "label": "E"}
    files["agieval/data/v1/aqua-rat.jsonl"] = jsonl([five, {**five, "options": None}])
    for subject in ("jec-qa-kd", "jec-qa-ca"):
        files[f"jec-qa/{subject}.jsonl"] = jsonl([*agi(subject, ITEMS + 5), several])
    for task in ("date_understanding", "word_sorting"):
        examples = [{"input": f"{task} {i}", "target": f"({'ABC'[i % 3]})"} for i in range(ITEMS)]
        files[f"bbh/bbh/{task}.json"] = json.dumps({"canary": "c", "examples": examples})
        blocks = [f"Q: {task} example {i}\nA: Let's think step by step.\nWell. So the answer is ({k})."
                  for i, k in enumerate("ABC")]  # fmt: skip
        files[f"bbh/cot-prompts/{task}.txt"] = "canary\n-----\nDo the task.\n\n" + "\n\n".join(blocks)
    for region in ("US", "Mainland"):
        for split, count in (("dev", 5), ("test", ITEMS)):
            rows = [question(f"{region} {split}", i) for i in range(count)]
            records = [{"question": q, "answer": cs["ABCD".index(a)], "answer_idx": a, "meta_info": "step1",
                        "options": dict(zip("ABCDE", [*cs, "都不对"], strict=True))}
                       for q, *cs, a in rows]  # fmt: skip
            files[f"medqa/data_clean/questions/{region}/{split}.jsonl"] = jsonl(records)
    for split, count in (("train", 5), ("dev", ITEMS)):
        rows = [question(f"mcq {split}", i) for i in range(count)]
        records = [{"id": f"{split}{i}", "question": q, "opa": a, "opb": b, "opc": c, "opd": d,
                    "cop": "ABCD".index(k) + 1, "choice_type": "single"}
                   for i, (q, a, b, c, d, k) in enumerate(rows)]  # fmt: skip
        files[f"medmcqa/{split}.json"] = jsonl([*records, {**records[0], "choice_type": "multi"}])
    for split, count in (("train", 5), ("test", ITEMS)):
        sums = [
            {"question": f"{split}:\u2028{i} + 1000?", "answer": f"It is <<{i}+1000>>.\n#### 1,00{i}"}
            for i in range(count)
        ]
        files[f"gsm8k/{split}.jsonl"] = jsonl(sums)
        for kind in ("Algebra", "Counting & Probability"):
            folder = kind.lower().replace(" & ", "_and_")
            for i in range(count):
                solution = f"So $\\boxed{{\\frac{{{i}}}{{7}}}}$."
                record = {
                    "problem": f"{split} {kind} {i}",
                    "level": "Level 1",
                    "type": kind,
                    "solution": solution,
                }
                files[f"math/MATH/{split}/{folder}/{i * 5}.json"] = json.dumps(record)
    tasks = []
    for i in range(ITEMS):
        task = {"task_id": f"HumanEval/{i}", "prompt": f"def f{i}(x):\n", "entry_point": f"f{i}"}
        test = f"def check(candidate):\n    assert candidate(1) == {i + 1}\n"
        tasks.append({**task, "canonical_solution": f"    return x + {i}\n", "test": test})
    files["humaneval/HumanEval.jsonl"] = jsonl(tasks)
    tasks = []
    for i in [*range(1, 11 + ITEMS), 511]:
        task = {"task_id": i, "text": f"Write a function that adds {i}.", "test_setup_code": ""}
        tests = {"test_list": [f"assert g{i}(1) == {i + 1}"], "challenge_test_list": []}
        tasks.append({**task, "code": f"def g{i}(x):\r\n  return x + {i}", **tests})
    files["mbpp/mbpp.jsonl"] = jsonl(tasks)
    for split, count in (("dev", 8), ("devtest", ITEMS)):
        for code, word in LANGUAGES.items():
            lines = [f"{word} {split} {i}\u2028end." for i in range(count)]
            files[f"flores101/flores101_dataset/{split}/{code}.{split}"] = "\n".join(lines) + "\n"
    # what else lies in a clone of the authors' repositories: answers of other models
    files["gaokao/Results/gpt_4_obj/gpt-4_2010-2022_History_MCQs.json"] = "{}"
    files["bbh/code-davinci-002-outputs/date_understanding.json"] = "{}"
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8", newline="")
    return root
