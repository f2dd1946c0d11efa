"""Benchmarks' own files: what is read of each layout, what is refused and how it is said."""

import gzip
import hashlib
import json
import re
import shutil
import zipfile
from dataclasses import replace

import pytest
from benchmark_files import ITEMS, agi, csv_text, jsonl, question, write_benchmarks
from fixtures import SHARED

from baichuan_sft.errors import UserError
from baichuan_sft.evaluate.benchmarks import BENCHMARKS, DOMAINS, asked_as, origin, select
from baichuan_sft.evaluate.choices import split_choices
from baichuan_sft.evaluate.data import Absent, draw, load
from baichuan_sft.evaluate.items import LETTERS, Settings
from baichuan_sft.evaluate.readers import boxed

SAMPLES = SHARED / "evaldata"
needs_samples = pytest.mark.skipif(
    not SAMPLES.is_dir(), reason=f"needs the samples in {SAMPLES}, which is absent"
)
# benchmark -> subjects, questions, examples in the hand-made files; drawn where the authors ship none
MADE = {
    "ceval": (3, 3 * ITEMS, 15), "mmlu": (3, 3 * ITEMS, 15), "cmmlu": (2, 2 * ITEMS, 10),
    "gaokao": (2, 2 * ITEMS, 10), "agieval": (2, 2 * ITEMS, 10), "bbh": (2, 2 * ITEMS, 6),
    "jecqa": (2, 2 * ITEMS, 10), "medical": (5, 5 * ITEMS, 25), "medqa-usmle": (1, ITEMS, 5),
    "medqa-mcmle": (1, ITEMS, 5), "medmcqa": (1, ITEMS, 5), "gsm8k": (1, ITEMS, 5),
    "math": (2, 2 * ITEMS, 10), "humaneval": (1, ITEMS, 0), "mbpp": (1, ITEMS, 10),
    **dict.fromkeys(DOMAINS["translation"], (1, ITEMS, 8)),
}  # fmt: skip
# the same of the samples; None: the sample lacks it
SAMPLED = {
    "ceval": (1, 12, 0), "mmlu": (57, 151, 117), "cmmlu": (8, 96, 40), "gaokao": (6, 58, 26),
    "agieval": (5, 35, 23), "bbh": (27, 60, 57), "jecqa": (2, 35, 10), "medical": (9, 65, 24),
    "medqa-usmle": (1, 3, 3), "medqa-mcmle": None, "medmcqa": (1, 15, 5), "gsm8k": (1, 100, 40),
    "math": (7, 37, 23), "humaneval": (1, 164, 0), "mbpp": (1, 110, 10), "flores-en": (1, 142, 8),
    "flores-de": (1, 142, 8), **{f"flores-{code}": None for code in ("fr", "es", "ar", "ru", "ja")},
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_benchmarks(tmp_path_factory.mktemp("benchmarks"))


@pytest.fixture
def only(data, tmp_path):
    """Copies a benchmark's folder into a directory of the test's own."""

    def copy(name):
        folder = BENCHMARKS[name].folder
        shutil.copytree(data / folder, tmp_path / folder)
        return tmp_path / folder

    return copy


def counts(loaded):
    return tuple(map(sum, zip(*((1, len(s.items), len(s.shots)) for s in loaded.subjects), strict=True)))


def check(benchmark, loaded):
    """What holds of every benchmark."""
    everything = [item for subject in loaded.subjects for item in (*subject.items, *subject.shots)]
    assert len({item.id for item in everything}) == len(everything) > 0
    for subject in loaded.subjects:
        asked = {(item.question, item.choices, item.fields.get("passage")) for item in subject.items}
        assert not asked & {
            (shot.question, shot.choices, shot.fields.get("passage")) for shot in subject.shots
        }
        assert subject.title and subject.items
    for item in everything:
        assert item.question.strip() and item.answer.strip()
        if benchmark.kind == "choice":
            assert item.answer in LETTERS[: len(item.choices)] and len(item.answer) == 1
        else:
            assert item.choices == ()


@pytest.mark.parametrize("name", BENCHMARKS)
def test_authors_layout(data, name):
    loaded = load(name, data, Settings())
    check(BENCHMARKS[name], loaded)
    assert counts(loaded) == MADE[name]
    assert loaded.files == {f: hashlib.sha256((data / f).read_bytes()).hexdigest() for f in loaded.files}
    assert loaded == load(name, data, Settings())


@needs_samples
@pytest.mark.parametrize("name", BENCHMARKS)
def test_samples(name):
    if SAMPLED[name] is None:
        with pytest.raises(Absent, match=re.escape(BENCHMARKS[name].files)):
            load(name, SAMPLES, Settings())
        return
    loaded = load(name, SAMPLES, Settings())
    check(BENCHMARKS[name], loaded)
    assert counts(loaded) == SAMPLED[name]
    if (
        name != "humaneval"
    ):  # the one sample that is whole; the size of Gaokao's sample is told by its subjects
        assert any("items" in note for note in loaded.notes)


def subject_of(data, name, subject):
    return next(s for s in load(name, data, Settings()).subjects if s.name == subject)


def test_what_an_item_holds(data):
    law = subject_of(data, "ceval", "law")
    assert law.title == "法学" and law.items[1].id == "law/1" and law.items[1].answer == "B"
    assert law.items[1].choices == tuple(question("law", 1)[1:5]) and law.shots[0].id == "law/dev/0"
    assert subject_of(data, "mmlu", "abstract_algebra").title == "abstract algebra"
    assert subject_of(data, "cmmlu", "agronomy").title == "农学"
    assert subject_of(data, "medical", "mmlu/anatomy").title == "anatomy"
    assert subject_of(data, "medical", "cmmlu/anatomy").title == "解剖学"
    history = subject_of(data, "gaokao", "2010-2022_History_MCQs")
    assert history.title == "历史" and history.items[0].choices[2].endswith("之丙")
    sat = subject_of(data, "agieval", "sat-en")
    assert sat.items[0].fields == {"passage": "A passage."} and not sat.items[0].choices[0].startswith("(A)")
    date = subject_of(data, "bbh", "date_understanding")
    assert date.items[1].answer == "(B)" and [shot.answer for shot in date.shots] == ["(A)", "(B)", "(C)"]
    assert date.shots[0].fields["reasoning"].startswith("Let's think step by step.\n")
    assert date.items[0].fields == {"instruction": "Do the task."}
    assert len(subject_of(data, "medqa-usmle", "usmle").items[0].choices) == 5
    assert [item.answer for item in subject_of(data, "medmcqa", "medmcqa").items] == list("ABCDAB")
    sums = subject_of(data, "gsm8k", "gsm8k")
    assert sums.items[3].answer == "1003" and sums.items[3].fields["solution"].endswith("#### 1,003")
    algebra = subject_of(data, "math", "counting_and_probability")
    assert [item.id for item in algebra.items][:3] == [f"counting_and_probability/{n}" for n in (0, 5, 10)]
    assert algebra.items[2].answer == r"\frac{2}{7}"
    code = subject_of(data, "mbpp", "mbpp")
    assert [item.id for item in (*code.items, *code.shots)][-10:][:4] == [
        "mbpp/2",
        "mbpp/3",
        "mbpp/4",
        "mbpp/1",
    ]
    assert code.items[0].id == "mbpp/11" and "\r" not in code.items[0].answer
    assert subject_of(data, "humaneval", "humaneval").items[2].fields["entry_point"] == "f2"
    line = subject_of(data, "flores-fr", "flores-fr").items[2]
    assert (line.question, line.answer) == ("中 devtest 2\u2028end.", "fr devtest 2\u2028end.")


def test_what_is_left_out_is_counted(data):
    def notes(name):
        return " ".join(load(name, data, Settings()).notes)

    assert "2 items with several answers" in notes("gaokao") and "2 items without four choices" in notes(
        "gaokao"
    )
    assert "1 items with several answers" in notes("agieval") and "1 items without an answer" in notes(
        "agieval"
    )
    assert "2 items with several answers" in notes("jecqa") and "1 items of type multi" in notes("medmcqa")
    assert "not public" in notes("ceval") and "of the 1,346 items" in notes("ceval")
    assert "ceval" not in notes("medical") and "cmmlu: no files of clinical_knowledge" in notes("medical")


def test_text_of_a_csv_stays_text(only):
    folder = only("mmlu")
    rows = [["Which?", "NA", "None", "1", "1.0", "A"], ['say "x",\nthen?', "nan", "true", "", "01-02", "D"]]
    (folder / "data" / "test" / "anatomy_test.csv").write_text("\ufeff" + csv_text(rows), encoding="utf-8")
    items = subject_of(folder.parent, "mmlu", "anatomy").items
    assert [item.choices for item in items] == [("NA", "None", "1", "1.0"), ("nan", "true", "", "01-02")]
    assert [item.question for item in items] == ["Which?", 'say "x",\nthen?']  # no byte order mark


def test_examples_are_drawn_where_none_are_shipped(data):
    """The same for any number of examples up to the vendor's, other ones with another seed; never asked."""
    drawn = [load("jecqa", data, Settings(shots=shots, seed=0)).subjects for shots in (None, 0, 2, 5)]
    assert drawn[0] == drawn[1] == drawn[2] == drawn[3]
    other = load("jecqa", data, Settings(seed=1)).subjects
    assert [s.shots for s in other] != [s.shots for s in drawn[0]]
    assert {i.id for s in other for i in (*s.items, *s.shots)} == {
        i.id for s in drawn[0] for i in (*s.items, *s.shots)
    }
    loaded = load("jecqa", data, Settings(shots=50))
    assert [len(subject.shots) for subject in loaded.subjects] == [
        (ITEMS + 5) // 2
    ] * 2  # half is left to ask
    assert any("2 of 2 subjects have fewer than 50 examples" in note for note in loaded.notes)
    assert any("10 items drawn as such with seed 0" in note for note in load("jecqa", data, Settings()).notes)


def test_missing_examples_file(only):
    folder = only("cmmlu")
    (folder / "dev" / "agronomy.csv").unlink()
    loaded = load("cmmlu", folder.parent, Settings())
    assert [len(subject.shots) for subject in loaded.subjects] == [3, 5]
    assert any("1 of 2 subjects come without examples" in note for note in loaded.notes)


def test_an_example_that_is_asked_leaves_the_pool(only):
    folder = only("cmmlu")
    header, row = ["", *"Question A B C D Answer".split()], question("agronomy", 2)
    spaced = [
        "0",
        row[0] + "  ",
        *row[1:5][::-1],
        "C",
    ]  # spacing and the order of choices do not make it another
    text = csv_text([header, spaced, ["1", *question("x", 0)]])
    (folder / "dev" / "agronomy.csv").write_text(text, encoding="utf-8")
    subject = subject_of(folder.parent, "cmmlu", "agronomy")
    assert len(subject.items) == ITEMS and [shot.id for shot in subject.shots] == ["agronomy/dev/1"]
    assert any(
        note.startswith("1 examples dropped") for note in load("cmmlu", folder.parent, Settings()).notes
    )


def test_questions_that_stand_twice_are_counted(only):
    folder = only("cmmlu")
    (folder / "test" / "agronomy.csv").write_text(
        csv_text([["", *"Question A B C D Answer".split()], *[["0", *question("a", 0)]] * 3]),
        encoding="utf-8",
    )
    loaded = load("cmmlu", folder.parent, Settings())
    assert len(loaded.subjects[0].items) == 3
    assert "2 questions stand there twice and are asked twice" in loaded.notes


def test_what_stands_twice_is_no_example(tmp_path):
    """Else its twin would be asked under the same prompt, with the answer."""
    (tmp_path / "agieval").mkdir()
    (tmp_path / "agieval" / "x.jsonl").write_text(jsonl([*agi("x", 8), *agi("x", 5)]), encoding="utf-8")
    for seed in range(20):
        subject = load("agieval", tmp_path, Settings(seed=seed)).subjects[0]
        assert len(subject.items) == 10 and {shot.id for shot in subject.shots} == {"x/5", "x/6", "x/7"}


def test_archives_and_compressed_files(only):
    """A zip is read in place, files beside it win; so does HumanEval.jsonl.gz, which its authors ship."""
    folder = only("ceval")
    packed = load("ceval", folder.parent, Settings())
    with zipfile.ZipFile(folder / "ceval-exam.zip") as archive:
        archive.extractall(folder)
    assert load("ceval", folder.parent, Settings()).subjects == packed.subjects
    assert list(packed.files) == ["ceval/ceval-exam.zip"]
    (folder / "val" / "._law_val.csv").write_bytes(b"\x00\x05\x16\x07")  # what macOS leaves
    assert load("ceval", folder.parent, Settings()).subjects == packed.subjects
    code = only("humaneval")
    whole = (code / "HumanEval.jsonl").read_bytes()
    (code / "HumanEval.jsonl").write_bytes(whole.split(b"\n")[0])
    (code / "HumanEval.jsonl.gz").write_bytes(gzip.compress(whole))
    assert counts(load("humaneval", folder.parent, Settings())) == (1, ITEMS, 0)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_absent(name, tmp_path):
    benchmark = BENCHMARKS[name]
    with pytest.raises(Absent) as error:
        load(name, tmp_path, Settings())
    for said in (benchmark.title, str(tmp_path), benchmark.files, benchmark.source, benchmark.licence):
        assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_no_data_directory(tmp_path):
    with pytest.raises(UserError, match=r"--data_dir .*nowhere is not a directory") as error:
        load("ceval", tmp_path / "nowhere", Settings())
    assert not isinstance(error.value, Absent)


def test_draw(data):
    """Exactly the number asked for, spread over the subjects, reproducible, other ones with another seed."""
    loaded = load("medical", data, Settings())
    ids = {item.id for s in loaded.subjects for item in s.items}
    for limit in range(1, len(ids)):
        drawn = [item.id for s in draw(loaded, limit, 0).subjects for item in s.items]
        assert len(set(drawn)) == len(drawn) == limit and set(drawn) < ids
    five = draw(loaded, 5, 0)
    assert [len(s.items) for s in five.subjects] == [1] * 5
    assert (
        five == draw(loaded, 5, 0)
        and five.files == loaded.files
        and "5 of 30 items drawn with seed 0" in five.notes
    )
    assert (
        len({tuple(i.id for s in draw(loaded, 5, seed).subjects for i in s.items) for seed in range(9)}) > 5
    )
    assert draw(loaded, 1000, 0) is loaded
    order = [item.id for s in loaded.subjects for item in s.items]
    places = [order.index(item.id) for s in draw(loaded, 13, 3).subjects for item in s.items]
    assert places == sorted(places)
    # every item has the same chance: 3 of 30 over 600 seeds is 60 times, 5 standard deviations are 37
    often = dict.fromkeys(order, 0)
    for seed in range(600):
        for subject in draw(loaded, 3, seed).subjects:
            for item in subject.items:
                often[item.id] += 1
    assert min(often.values()) > 60 - 37 and max(often.values()) < 60 + 37


def test_select():
    assert select("all") == list(BENCHMARKS) and select("cmmlu") == ["cmmlu"]
    assert select("code, ceval,general") == [
        "ceval",
        "mmlu",
        "cmmlu",
        "gaokao",
        "agieval",
        "bbh",
        "humaneval",
        "mbpp",
    ]
    assert select("math") == ["gsm8k", "math"] and select("MATH") == ["math"]
    assert all(select(asked_as(name)) == [name] for name in BENCHMARKS)
    assert [name for domain in DOMAINS for name in DOMAINS[domain]] == list(BENCHMARKS)
    for tasks, said in (
        ("cmlu", "did you mean 'cmmlu'"),
        (",", "names no task"),
        ("ceval,nothing", "Known: all; general"),
    ):
        with pytest.raises(UserError, match=said):
            select(tasks)


def test_table():
    """The vendor's shots (README of Baichuan2)."""
    shots = {name: benchmark.shots for name, benchmark in BENCHMARKS.items()}
    assert shots.pop("bbh") == shots.pop("mbpp") == 3 and shots.pop("humaneval") == 0
    assert shots.pop("gsm8k") == shots.pop("math") == 4
    assert {name for name, count in shots.items() if count == 8} == set(DOMAINS["translation"])
    assert set(shots.values()) == {5, 8}
    assert origin(BENCHMARKS["medical"], "cmmlu/anatomy").name == "cmmlu"
    assert origin(BENCHMARKS["mmlu"], "anatomy").name == "mmlu"


@pytest.mark.parametrize(
    ("text", "question", "choices"),
    [
        ("1．（ ）\nA．一 B．二\nC．三D．四\n", "1．（ ）", ("一", "二", "三", "四")),
        ("A. x 与 DNA. 有关？ A. 1\nB. 2\nC. 3\nD. 4", "A. x 与 DNA. 有关？", ("1", "2", "3", "4")),
        ("A: 1 B: 2 C: 3 D: 4 E: 5", "", ("1", "2", "3", "4", "5")),
        ("A．一 B．二", "A．一 B．二", ()),
        ("没有", "没有", ()),
        ("选\nA. A、B两点\nB. A点\n C. B点\nD. A、B、C、D", "选", ("A、B两点", "A点", "B点", "A、B、C、D")),
        ("7\nA. 1 B. 2\n8 A. 3\nB. 4\nC. 5\nD. 6", "7\nA. 1 B. 2\n8", ("3", "4", "5", "6")),
    ],
)
def test_choices_in_a_question(text, question, choices):
    assert split_choices(text) == (question, choices)


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"so \boxed{1} or $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"\fbox{3}", "3"),
        (r"$\boxed 5$ it is", "5"),
        (r"\boxed{1", None),
        (r"\boxed $", None),
        ("none", None),
    ],
)
def test_boxed(solution, answer):
    assert boxed(solution) == answer


def test_jecqa_as_its_own_authors_ship_it(tmp_path):
    (tmp_path / "jec-qa").mkdir()
    record = {
        "statement": "问",
        "option_list": {"A": "一", "B": "二", "C": "三", "D": "四"},
        "answer": ["B"],
        "id": "0_1",
    }
    text = jsonl([{**record, "statement": f"问{i}"} for i in range(4)] + [{**record, "answer": ["A", "B"]}])
    (tmp_path / "jec-qa" / "0_train.json").write_text(text, encoding="utf-8")
    subject = load("jecqa", tmp_path, Settings()).subjects[0]
    assert (len(subject.items), len(subject.shots), subject.title) == (2, 2, "国家司法")
    assert subject.items[0].answer == "B" and subject.items[0].choices == ("一", "二", "三", "四")


def test_what_the_vendor_left_out_is_not_missing(tmp_path, monkeypatch):
    """A whole dev.json of MedMCQA is called whole, although a part of it is not asked."""
    monkeypatch.setitem(BENCHMARKS, "medmcqa", replace(BENCHMARKS["medmcqa"], num_items=12))
    (tmp_path / "medmcqa").mkdir()
    options = {"opa": "1", "opb": "2", "opc": "3", "opd": "4", "cop": 1}
    kinds = ["single"] * 8 + ["multi"] * 4
    for whole in (True, False):
        records = [{"question": f"Q{i}", **options, "choice_type": kind} for i, kind in enumerate(kinds)]
        (tmp_path / "medmcqa" / "dev.json").write_text(jsonl(records[: None if whole else -1]))
        notes = load("medmcqa", tmp_path, Settings()).notes
        assert any("of type multi left out" in note for note in notes)
        assert any("of the 12 items" in note for note in notes) is not whole


def test_mmlu_as_prompts(tmp_path):
    (tmp_path / "mmlu").mkdir()
    header = "The following are multiple choice questions (with answers) about  law.\n\n"
    prompts = [f"{header}Is {i}\nso?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:" for i in range(4)]
    text = jsonl([{"subject": "law", "input": prompt, "output": "C"} for prompt in prompts])
    (tmp_path / "mmlu" / "val.jsonl").write_text(text)
    subject = load("mmlu", tmp_path, Settings()).subjects[0]
    assert {item.question for item in (*subject.items, *subject.shots)} == {f"Is {i}\nso?" for i in range(4)}
    assert subject.items[0].answer == "C" and subject.items[0].choices == ("1", "2", "3", "4")
    (tmp_path / "mmlu" / "val.jsonl").write_text(
        json.dumps({"subject": "law", "input": "Is it?", "output": "C"})
    )
    with pytest.raises(UserError, match=r"val.jsonl:1 is no prompt with a question"):
        load("mmlu", tmp_path, Settings())
