"""Prompts, and what is read out of answers: over every benchmark, in both styles."""

import ast
import random
from dataclasses import replace
from functools import cache
from importlib import import_module

import datasets
import pytest
from fixtures import SHARED

from baichuan_sft.evaluate import answers, data, sandbox, scores, vendor_style
from baichuan_sft.evaluate.benchmarks import BENCHMARKS, LANGUAGES
from baichuan_sft.evaluate.items import LETTERS, Item, Loaded, Response, Settings, Subject
from baichuan_sft.evaluate.runner import STYLES

SAMPLES = SHARED / "evaldata"
DEFAULTS = Settings()
NUM_OPTIONS = {"medqa-usmle": 5, "medqa-mcmle": 5}
SUBJECTS = {
    "ceval": "law",
    "mmlu": "anatomy",
    "cmmlu": "agronomy",
    "medical": "mmlu/anatomy",
    "gaokao": "2010-2022_Biology_MCQs",
    "agieval": "sat-math",
    "jecqa": "jec-qa-kd",
    "bbh": "date_understanding",
    "math": "algebra",
}


def made_item(name: str, place: str, number: int) -> Item:
    """One question in the form that a benchmark's reader gives it."""
    kind, item_id = BENCHMARKS[name].kind, f"{SUBJECTS.get(name, name)}/{place}{number}"
    ask = (
        "下一个是什么？" if name in ("ceval", "cmmlu", "gaokao") else ""
    ) + f"Which number follows {number}?"
    if kind == "choice":
        count = NUM_OPTIONS.get(name, 4)
        return Item(item_id, ask, LETTERS[number % count], tuple(f"{number + i} pears" for i in range(count)))
    if kind == "translation":
        return Item(item_id, f"第{number}句话。", f"This is sentence {number} of several; it ends here.")
    if name == "humaneval":
        prompt = f'def f{number}(x):\n    """Adds {number}."""\n'
        test = f"def check(candidate):\n    assert candidate(1) == {number + 1}\n"
        fields = {"prompt": prompt, "entry_point": f"f{number}", "test": test}
        return Item(item_id, prompt, f"    return x + {number}\n", fields=fields)
    code = f"def f{number}(x):\n    return x + {number}\n"
    tests = tuple(f"assert f{number}({i}) == {i + number}" for i in range(3))
    thought = f"Let's think step by step.\nWe count. So the answer is (C{number})."
    answer, fields = {
        "number": (f"{number + 1}", {"solution": f"It is <<{number}+1>>next.\n#### {number + 1}"}),
        "expression": (
            f"\\frac{{{number}}}{{7}}",
            {"solution": f"It is $\\boxed{{\\frac{{{number}}}{{7}}}}$."},
        ),
        "answer": (f"(C{number})", {"instruction": "Count.", "reasoning": thought}),
        "code": (code, {"test_list": tests, "test_setup_code": "", "code": code}),
    }[kind]
    return Item(item_id, ask, answer, fields=fields)


@cache
def subjects(name: str) -> tuple[Subject, ...]:
    """Hand-made items, and some of the authors' own where the reference data lies beside the repository."""
    made = [made_item(name, "", i) for i in range(20, 32)]
    shots = [made_item(name, "dev/", i) for i in range(100, 110)] if name != "humaneval" else []
    found = [Subject(SUBJECTS.get(name, name), "农学", tuple(made), tuple(shots))]
    try:
        loaded = data.load(name, SAMPLES, Settings()) if SAMPLES.is_dir() else Loaded((), {})
    except data.Absent:
        loaded = Loaded((), {})
    return (*found, *data.draw(loaded, 30, 0).subjects)


def maker(style: str):
    if style == "harness":
        pytest.importorskip("lm_eval")
    module, _, function = STYLES[style].partition(":")
    return getattr(import_module(module), function)


def prompters(name: str, style: str, settings: Settings = DEFAULTS):
    """Prompter and items of each subject that a style can ask."""
    make = maker(style)
    return [(make(BENCHMARKS[name], subject, settings), subject) for subject in subjects(name)]


def told(request, text: str) -> str:
    """A generated text as the scorer gives it: up to the first stop string."""
    return text[: min([text.find(stop) for stop in request.stop if stop in text], default=len(text))]


def oracle(name: str, item: Item, request) -> Response:
    """The right answer in the form that the examples teach."""
    if request.choices:
        return constant(item.answer, request)
    ends = f"The final answer is ${item.answer}$. I hope it is correct."
    text = {
        "number": f"\nWe count.\nThe answer is {item.answer}\n#### {item.answer}\n\nQuestion: next",
        "expression": f"So it is.\nFinal Answer: {ends}\n\nProblem:",
        "answer": f"\nWe count. So the answer is {item.answer}.\n\nQ: next",
    }.get(BENCHMARKS[name].kind, item.answer)
    return Response(texts=(told(request, text),) * request.samples)


def constant(letter: str, request) -> Response:
    return Response(scores=tuple(float(LETTERS[i] == letter) for i in range(len(request.choices))))


every_task = pytest.mark.parametrize("name", BENCHMARKS)
both_styles = pytest.mark.parametrize("style", STYLES)


@every_task
@both_styles
def test_an_oracle_scores_100_percent(name, style):
    if BENCHMARKS[name].kind == "code" and sandbox.check():
        pytest.skip(f"no sandbox here: {sandbox.check()}")
    if BENCHMARKS[name].kind == "translation":
        pytest.importorskip("sacrebleu")
    most = 3 if BENCHMARKS[name].kind == "code" else None  # a program takes 0.2 s
    asked, outcomes = [], []
    for prompter, subject in prompters(name, style):
        for item in subject.items[:most]:
            asked.append(item)
            outcomes.append(prompter.judge(item, oracle(name, item, prompter.request(item, 0))))
    wrong = [(i.id, i.answer, o.prediction) for i, o in zip(asked, outcomes) if o.score not in (1.0, None)]
    assert wrong == []
    # BLEU adds logarithms
    assert scores.summary(BENCHMARKS[name], asked, outcomes).value == pytest.approx(100)


@pytest.mark.parametrize("name", [name for name, b in BENCHMARKS.items() if b.kind == "choice"])
@both_styles
def test_a_constant_letter_scores_its_share(name, style):
    for letter in "ABC":
        asked, outcomes = [], []
        for prompter, subject in prompters(name, style):
            asked += subject.items
            outcomes += [prompter.judge(i, constant(letter, prompter.request(i, 0))) for i in subject.items]
        share = 100 * sum(item.answer == letter for item in asked) / len(asked)
        assert 0 < share < 100
        assert scores.summary(BENCHMARKS[name], asked, outcomes).value == pytest.approx(share)


def _plain(text: str) -> str:
    return " ".join(text.split())


@every_task
@both_styles
def test_no_prompt_holds_its_own_question_with_its_answer(name, style):
    asked = 0
    for prompter, subject in prompters(name, style):
        for item in subject.items:
            request = prompter.request(item, prompter.num_shots)
            ids = prompter.shot_ids(item, prompter.num_shots)
            assert item.id not in ids and len(set(ids)) == len(ids) <= prompter.num_shots
            before, question, _ = _plain(request.text).rpartition(_plain(item.question))
            assert question, item.id
            # an example may ask the same of other choices ("Which is right?")
            same = [_plain(text) in before for text in (item.question, *item.choices)]
            assert not all(same), item.id
            asked += 1
    assert asked >= 12


@every_task
@both_styles
def test_the_item_itself_among_its_examples_is_passed_over(name, style):
    subject = subjects(name)[0]
    leaking = Subject(subject.name, subject.title, subject.items, (*subject.items[:6], *subject.shots))
    prompter = maker(style)(BENCHMARKS[name], leaking, Settings())
    for item in leaking.items:
        assert item.id not in prompter.shot_ids(item, prompter.num_shots)
        assert prompter.request(item, prompter.num_shots).text.count(item.question.strip()) == 1


@every_task
@both_styles
def test_fewer_shots_drop_the_first_and_cut_neither_header_nor_question(name, style):
    for prompter, subject in prompters(name, style)[:3]:
        item = subject.items[-1]
        whole, ids = (
            prompter.request(item, prompter.num_shots).text,
            prompter.shot_ids(item, prompter.num_shots),
        )
        bare = prompter.request(item, 0).text
        for num_shots in range(prompter.num_shots, -1, -1):
            text = prompter.request(item, num_shots).text
            assert prompter.shot_ids(item, num_shots) == ids[len(ids) - num_shots :]
            assert len(text) < len(whole) or num_shots == prompter.num_shots
            header = next((i for i, (a, b) in enumerate(zip(bare, text)) if a != b), len(bare))
            assert text.startswith(bare[:header]) and text.endswith(bare[header:][-len(item.question) // 2 :])


CHOICE = Item("law/0", "民法调整什么？", "C", ("A是", "B是", "C是", "D是"))
SHOT = Item("law/dev/0", "一加一？", "B", ("1", "2", "3", "4"))


def text_of(name, item, shots, title, **settings):
    subject = Subject(item.id.split("/")[0], title, (item,), tuple(shots))
    return vendor_style.prompter(BENCHMARKS[name], subject, Settings(**settings)).request(item, 5).text


def test_prompts_are_the_vendors_to_the_letter():
    options = "A. A是\nB. B是\nC. C是\nD. D是\n"
    assert text_of("ceval", CHOICE, [SHOT], "法学") == (
        "以下是中国关于法学考试的单项选择题，请选出其中的正确答案。\n\n"
        f"一加一？\nA. 1\nB. 2\nC. 3\nD. 4\n答案：B\n民法调整什么？\n{options}答案："
    )
    assert text_of("cmmlu", CHOICE, [SHOT], "法学") == (
        "以下是关于法学的单项选择题，请直接给出正确答案的选项。\n\n"
        f"题目：一加一？\nA. 1\nB. 2\nC. 3\nD. 4\n答案是：B\n\n题目：民法调整什么？\n{options}答案是："
    )
    assert text_of("mmlu", CHOICE, [SHOT], "jurisprudence") == (
        "The following are multiple choice questions (with answers) about  jurisprudence.\n\n"
        f"一加一？\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: B\n\n民法调整什么？\n{options}Answer:"
    )


def test_a_subject_with_a_chinese_title_takes_the_chinese_form():
    english = replace(CHOICE, question="Which?", choices=("a", "b", "c", "d"))
    for name, title in (("gaokao", "英语"), ("agieval", "高考英语")):
        assert text_of(name, english, [], title).startswith(f"以下是中国关于{title}考试的单项选择题")
    assert text_of("agieval", english, [], "sat en").startswith("The following are")


def test_examples_are_shuffled_by_the_seed_where_the_vendor_shuffles():
    def order(name, seed):
        prompter, subject = prompters(name, "baichuan", Settings(seed=seed))[0]
        return prompter.shot_ids(subject.items[0], prompter.num_shots)

    assert order("ceval", 0) == order("ceval", 0) != order("ceval", 1)
    ids = [shot.id for shot in subjects("ceval")[0].shots]
    shuffled = datasets.Dataset.from_dict({"id": ids}).shuffle(seed=123)["id"]  # as the vendor's script does
    assert list(order("ceval", 123)) == list(shuffled)[: len(order("ceval", 123))] != ids
    for name in ("mmlu", "cmmlu", "mbpp", "flores-en"):
        first = [shot.id for shot in subjects(name)[0].shots]
        assert list(order(name, 0)) == list(order(name, 1)) == first[: BENCHMARKS[name].shots]


def test_the_number_of_shots_is_the_benchmarks_own_or_the_users():
    subject = subjects("gsm8k")[0]
    made = {n: vendor_style.prompter(BENCHMARKS["gsm8k"], subject, Settings(shots=n)) for n in (None, 0, 6)}
    assert [each.num_shots for each in made.values()] == [4, 0, 6]
    assert made[6].shot_ids(subject.items[0], 6)[3:5] == ("gsm8k/example-4", "gsm8k/dev/100")
    assert "It is next.\nThe answer is 101\n" in made[6].request(subject.items[0], 6).text  # no <<100+1>>


def test_several_samples_are_asked_of_programs_alone():
    for name, several in (("humaneval", True), ("gsm8k", False)):
        prompter, subject = prompters(name, "baichuan", Settings(samples=10))[0]
        request = prompter.request(subject.items[0], 0)
        assert (request.samples, request.temperature > 0) == ((10, True) if several else (1, False))


@pytest.mark.skipif(not SAMPLES.is_dir(), reason=f"needs the benchmarks' samples ({SAMPLES} is absent)")
@pytest.mark.parametrize("name", [n for n, b in BENCHMARKS.items() if b.kind not in ("choice",)])
def test_stop_strings_cut_no_reference_answer(name):
    checked = 0
    for prompter, subject in prompters(name, "baichuan"):
        for item in (*subject.items, *subject.shots):
            text = str(item.fields.get("solution") or item.fields.get("reasoning") or item.answer)
            assert told(prompter.request(item, 0), text) == text, item.id
            checked += 1
    assert checked > 20


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("16-3-4=9 eggs.\nThe answer is $1,018.", "1018"),
        ("So he pays 5.\n#### 5", "5"),
        ("\\boxed{-3.50}", "-3.5"),
        ("The answer is 3*6 = 18 dollars", "18"),
        ("The answer is 18 (16 - 3 + 5 = 18, of 20 eggs)", "18"),
        ("He has 10-5=5 apples", "5"),
        ("It is 10-5", "5"),
        ("答案是：３０％", "30"),
        ("First 3, then 4, so 12 in all.", "12"),
        ("The answer is −7", "-7"),
        ("We need 2 steps. The answer is 4. The final answer is 6", "6"),
        ("Answer: Janet sells 16 - 3 - 4 = 9 eggs.\nShe makes 9 * 2 = $18 every day.", "18"),
        ("**Answer:** She has 16 - 3 = 13 eggs.\n\n\\boxed{18} of 20", "18"),
        ("**Answer:** \\$18 for 2 days", "18"),
        ("答案：小明有 16 - 3 = 13 个，共 18 个", "18"),
        ("\\boxed{70{,}000}", "70000"),
        ("\\boxed{70\\,000}", "70000"),
        ("So the total is $\\$1{,}018$.", "1018"),
        ("The answer is $3\\times 6 = 18$ of 20", "18"),
    ],
)
def test_number(text, gold):
    assert answers.same_number(answers.number(text), gold)


@pytest.mark.parametrize("text", ["", "no idea", "The answer is", "9" * 5000, "0/0"])
def test_what_is_no_right_number(text):
    assert not answers.same_number(answers.number(text), "1")


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("Final Answer: The final answer is $[2,5)$. I hope it is correct.", "[2,5)"),
        ("so $x=\\boxed{\\frac{1}{2}}$.", "\\dfrac12"),
        ("The answer is $0.5$.", "\\frac{1}{2}"),
        ("The final answer is 1,000", "1000"),
        ("The final answer is \\(-\\tfrac{3}{2}\\)", "-1\\frac12"),
        ("$x = 5\\text{ cm}$", "5"),
        ("The final answer is **5**.", "5"),
        ("The answer is **\\frac{1}{2}**", "\\frac12"),
        ("The final answer is:\n\n\\[\n\\boxed{5}\n\\]", "5"),
        ("The answer is\n$$\n\\frac{3}{4}\n$$ as $1$", "\\frac34"),
        ("the final answer is $90^\\circ$. I hope", "90"),
        ("\\boxed{\\left( 3, \\frac{\\pi}{2} \\right)}", "(3,\\frac{\\pi}{2})"),
        ("\\boxed{\\text{Evelyn}}", "Evelyn"),
        ("\\boxed{\\sqrt3}", "\\sqrt{3}"),
        ("\\boxed{\\$32{,}348}", "32348"),
        ("\\boxed{50\\%}", "50"),
        ("\\boxed{(1/2, 3)}", "(\\frac12,3)"),
        ("$\\binom{2/5 \\\\-1}{x}$", "\\binom{\\frac{2}{5}\\\\ -1}{x}"),
    ],
)
def test_expression(text, gold):
    assert answers.same_expression(answers.expression(text), gold)


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("", ""), ("", "5"), ("$(1,2)$", "(2,1)"), ("$1,2$", "12"), ("$-5$", "5"), ("$\\frac{1}{0}$", "0"),
        ("$\\sqrt{2}$", "2"), ("$2^3$", "23"), ("$(1\\\\2)$", "(12)"), ("\\boxed{", "5"), ("$3+2$", "5"),
        ("$" + "9" * 5000 + "$", "9"), ("$1e999999999$", "9"),
    ],
)  # fmt: skip
def test_what_is_another_expression(text, gold):
    assert not answers.same_expression(answers.expression(text), gold)


@pytest.mark.parametrize(
    ("text", "gold", "same"),
    [
        ("We see.\nSo the answer is (D).", "(D)", True),
        ("So the answer is (D) 12/14/1937.", "(D)", True),
        ("The answer is: **D**", "(D)", True),
        ("So the answer is Definitely not", "(D)", False),
        ("So the answer is (A) and (B).", "(A)", False),
        ("So the answer is (A), (B), or (C).", "(A)", False),
        ("So the answer is A or B.", "(A)", False),
        ("So the answer is (A) (B)", "(A)", False),
        ("So the answer is (A), A pear and an apple.", "(A)", True),
        ("So the answer is (A), as (B) is wrong.", "(A)", True),
        ("So the answer is true.", "True", True),
        ("So the answer is ] ) }.", "] ) }", True),
        ("So the answer is ])}", "] ) }", True),
        ("So the answer is ])", "] ) }", False),
        ("So the answer is alpha beta.", "alpha  beta", True),
        ("So the answer is beta alpha.", "alpha beta", False),
        ("I think\nyes", "Yes", True),
        ("Quite: No. So the answer is Queen.\nMore", "Queen", True),
        ("", "Yes", False),
    ],
)
def test_short(text, gold, same):
    assert answers.same_short(answers.short(text), gold) is same


PROMPT = 'from typing import List\n\n\ndef f(x: int) -> int:\n    """Twice."""\n'


@pytest.mark.parametrize(
    "text",
    [
        "    return 2 * x\n",
        "    return 2 * x\n\n\nprint(f(3))\nassert f(3) == 7\n",
        "    return twice(x)\n\n\ndef twice(x):\n    return 2 * x\n\n\nWith this we",
        "    return 2 * x\n\n\ndef g(x):\n    return x\n\n\ndef f(x):\n    return 0\n",
        "Here:\n```python\nimport re\n@staticmethod\ndef g(): pass\n\ndef f(x):\n    return 2 * x\nf()\n```",
        "```\nprint(1)\n```\nand\n```python\ndef f(x):\n    return 2 * x\n```",
        "The function is\n\ndef f(x):\n    return 2 * x\n\nand that is all.",
        "    return 2 * x\n```\n",
        "    return 2 * x\n```\n\nThis function doubles.\n",
        "    return 2 * x\n\nFor example:\n\n```python\nprint(f(1))\n```",
        "    return 2 * x\n```\nor\n```python\ndef f(x):\n    return 0\n```",
        '    """Holds ```."""\n    return 2 * x\n',
        "    y = 2 * x\n    return y\n\n# next\nif __name__ == '__main__':\n    f(",
    ],
)
def test_program_is_what_goes_on_with_the_function(text):
    names = {}
    exec(PROMPT + answers.program(text, PROMPT, "f"), names)
    assert names["f"](3) == 6


@pytest.mark.parametrize("head", ["", "[BEGIN]\n", "\n[BEGIN]\n", "Sure:\n```python\n"])
@pytest.mark.parametrize("tail", ["", "```\n", "```\nIt doubles.", "```\n\n```python\nprint(g(1))\n```\n"])
def test_program_without_a_prompt_is_taken_whole(head, tail):
    names = {}
    code = "x = [2]\nfor i in range(1):\n    x.append(i)\ndef g(y):\n    return x[0] * y\n"
    exec(answers.program(head + code + tail, ""), names)
    assert names["g"](3) == 6 and names["x"] == [2, 0]


def test_prose_between_a_program_and_its_example_is_left_out():
    text = "def g(y):\n    return 2 * y\n\nFor example:\n```python\ng(1)\n```\n"
    assert answers.program(text) == "def g(y):\n    return 2 * y\n\n"


@pytest.mark.parametrize("text", ["", "\0", "I cannot.", "    return 2 *", "(" * 300])
def test_what_is_no_program_stays_as_it_is(text):
    assert answers.program(text, PROMPT, "f") == text


@pytest.mark.skipif(not SAMPLES.is_dir(), reason=f"needs the benchmarks' samples ({SAMPLES} is absent)")
def test_every_canonical_solution_of_humaneval_stays_whole():
    items = data.load("humaneval", SAMPLES, Settings()).subjects[0].items
    assert len(items) == 164
    for item in items:
        prompt = item.fields["prompt"]
        for text in (item.answer, f"Sure:\n```python\n{prompt}{item.answer}```\n"):
            made = ast.parse(prompt + answers.program(text, prompt, item.fields["entry_point"]))
            assert ast.dump(made.body[-1]) == ast.dump(ast.parse(prompt + item.answer).body[-1]), item.id


@pytest.mark.parametrize("seed", range(20))
def test_no_text_makes_reading_an_answer_fail(seed):
    draw = random.Random(seed)
    pieces = [
        "\\boxed{",
        "\\frac",
        "\\(",
        "\\)",
        "answer is",
        "def f",
        "9" * 30,
        "\ud800",
        *"{}$#-1,/.\n`(D)（￥ =",
    ]
    for _ in range(300):
        text = "".join(draw.choices(pieces, k=draw.randrange(30)))
        for find, same in vendor_style.TEXTS.values():
            assert same(find(text), "no such answer") is False
        assert isinstance(answers.program(text, PROMPT, "f"), str)


def test_language_of_a_translation_is_named():
    for code in LANGUAGES:
        prompter, subject = prompters(f"flores-{code}", "baichuan")[0]
        assert prompter.request(subject.items[0], 8).text.count("statements to ") == 9
