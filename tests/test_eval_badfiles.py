"""Benchmarks' files that are not what they should be: one clear line, nothing extracted, no traceback."""

import gzip
import shutil
import zipfile

import pytest
from benchmark_files import exam, jsonl, write_benchmarks

from baichuan_sft.errors import UserError
from baichuan_sft.evaluate import formats
from baichuan_sft.evaluate.benchmarks import BENCHMARKS
from baichuan_sft.evaluate.data import Absent, load
from baichuan_sft.evaluate.items import Settings


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


GOOD = exam("law", ["id", *"question A B C D answer".split()], True, 2)
BAD = {  # benchmark, file, its content, what is said
    "columns": (
        "ceval",
        "val/law_val.csv",
        "id,frage,x\n1,2,3\n",
        r"ceval/val/law_val.csv:2 has 'id', 'frage', 'x'; needed",
    ),
    "column": (
        "ceval",
        "val/law_val.csv",
        GOOD.replace(",C,", ",Z,"),
        r"law_val.csv:2 has no 'c', but 'id', 'question', 'a'",
    ),
    "a comma too many": (
        "ceval",
        "val/law_val.csv",
        GOOD + "1,q,a,b,c,d,e,A\n",
        r"law_val.csv:4 has 8 columns, not 7 \(id, ",
    ),
    "answer NA": (
        "cmmlu",
        "test/x_test.csv",
        ",Question,A,B,C,D,Answer\n0,q,1,2,3,4,NA\n",
        r"x_test.csv:2 has the answer 'NA', which is not one of A, B, C, D",
    ),
    "answer E": (
        "mmlu",
        "test/x_test.csv",
        "q,1,2,3,4,E\n",
        r"x_test.csv:1 has the answer 'E', which is not",
    ),
    "two answers": (
        "mmlu",
        "test/x_test.csv",
        "q,1,2,3,4,AB\n",
        r"x_test.csv:1 has the answer 'AB', which is not",
    ),
    "no rows": ("cmmlu", "test/x_test.csv", ",Question,A,B,C,D,Answer\n", r"x_test.csv has no rows"),
    "empty": ("gsm8k", "test.jsonl", "\n", r"gsm8k/test.jsonl is empty"),
    "broken JSON": (
        "gsm8k",
        "test.jsonl",
        '{"question": "q", "answer": "#### 1"}\n{"question": \n',
        r"test.jsonl:2 is not JSON",
    ),
    "no object": ("gsm8k", "test.jsonl", "[1]\n", r"test.jsonl\[0\] is int, not an object"),
    "no number": (
        "gsm8k",
        "test.jsonl",
        '{"question": "q", "answer": "one"}',
        r"test.jsonl:1 has no answer that ends",
    ),
    "deep JSON": ("bbh", "x.json", "[" * 100_000, r"bbh/x.json is not JSON"),
    "no list": ("bbh", "x.json", '{"examples": 3}', r"bbh/x.json has no list 'examples'"),
    "no text": (
        "bbh",
        "x.json",
        '{"examples": [{"input": 3, "target": "x"}]}',
        r"x.json: examples 0 has input 3, not a text",
    ),
    "thoughts": ("bbh", "cot-prompts/w.txt", "c\n-----\nDo.\n\nQ: x\nA: y\n", r"w.txt example 0 is not 'Q: "),
    "cop": (
        "medmcqa",
        "dev.json",
        jsonl([{"question": "q", **dict.fromkeys(("opa", "opb", "opc", "opd"), "x"), "cop": 5}]),
        r"dev.json:1 has the answer 4, which is not one of A, B, C, D",
    ),
    "GBK": (
        "gsm8k",
        "test.jsonl",
        "{}\n问题".encode("gb18030"),
        r"test.jsonl:2 is not UTF-8; convert it, for GBK: iconv",
    ),
    "no box": (
        "math",
        "test/algebra/1.json",
        '{"problem": "p", "type": "Algebra", "solution": "s"}',
        r"1.json has a solution without",
    ),
    "tests": (
        "mbpp",
        "mbpp.jsonl",
        '{"task_id": 11, "test_list": [], "text": "t", "code": "c"}',
        r"mbpp.jsonl:1 has no whole number",
    ),
    "twice": (
        "humaneval",
        "HumanEval.jsonl",
        jsonl(
            [{"task_id": "H/0", "prompt": "p", "entry_point": "f", "test": "t", "canonical_solution": "s"}]
            * 2
        ),
        r"humaneval/ holds item 'H/0' 2 times",
    ),
    "gzip": (
        "humaneval",
        "HumanEval.jsonl.gz",
        gzip.compress(b"{}" * 99)[:-9],
        r"HumanEval.jsonl.gz is a damaged gzip file",
    ),
    "gzip bomb": (
        "humaneval",
        "HumanEval.jsonl.gz",
        gzip.compress(b" " * (4 << 20)),
        r"unpacks to more than 200 times its size",
    ),
    "zip": (
        "ceval",
        "ceval-exam.zip",
        b"PK\x03\x04 not one",
        r"ceval/ceval-exam.zip is no readable zip archive",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_file_is_one_line(case, tmp_path):
    name, file, content, message = BAD[case]
    path = tmp_path / BENCHMARKS[name].folder / file
    path.parent.mkdir(parents=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    if case == "thoughts":
        (tmp_path / "bbh" / "w.json").write_text('{"examples": [{"input": "q", "target": "x"}]}')
    with pytest.raises(UserError, match=message) as error:
        load(name, tmp_path, Settings())
    assert (
        "\n" not in str(error.value) and not isinstance(error.value, Absent) and len(str(error.value)) < 400
    )


def member(name="val/law_val.csv", mode=0o100644):
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    info.compress_type = zipfile.ZIP_DEFLATED
    return info


HOSTILE = {
    "slip": (
        [(member("../../law_val.csv"), GOOD)],
        r"ceval-exam.zip/\.\./\.\./law_val.csv leads out of its archive",
    ),
    "root": ([(member("/tmp/law_val.csv"), GOOD)], r"leads out of its archive"),
    "link": ([(member(mode=0o120777), "/etc/passwd")], r"law_val.csv is a symbolic link inside an archive"),
    "bomb": ([(member(), b"a" * (4 << 20))], r"law_val.csv unpacks to more than 200 times its size"),
    "twice": ([(member(), GOOD), (member(), GOOD)], r"law_val.csv is in its archive twice"),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_archive(case, tmp_path):
    members, message = HOSTILE[case]
    (tmp_path / "ceval").mkdir()
    with zipfile.ZipFile(tmp_path / "ceval" / "ceval-exam.zip", "w") as archive:
        for info, content in members:
            archive.writestr(info, content)
    with pytest.raises(UserError, match=message):
        load("ceval", tmp_path, Settings())
    assert [path.name for path in tmp_path.rglob("*")] == ["ceval", "ceval-exam.zip"]  # nothing was extracted


def test_damaged_member(only):
    path = only("ceval") / "ceval-exam.zip"
    whole = bytearray(path.read_bytes())
    whole[60] ^= 0xFF  # inside the first member's data
    path.write_bytes(whole)
    with pytest.raises(UserError, match=r"law_dev.csv is damaged .*; download ceval/ceval-exam.zip again"):
        load("ceval", path.parents[1], Settings())


def test_too_large(only, monkeypatch):
    monkeypatch.setattr(formats, "MAX_BYTES", 100)
    with pytest.raises(UserError, match="more than the 100 a benchmark's file may have"):
        load("gsm8k", only("gsm8k").parent, Settings())


def test_links(only, tmp_path):
    """The folder itself may be a link; a file in it may not lead out of it."""
    folder = only("gsm8k")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "gsm8k").symlink_to(folder)
    assert load("gsm8k", elsewhere, Settings()) == load("gsm8k", tmp_path, Settings())
    (elsewhere / "secret").write_text("{}")
    (folder / "more.jsonl").symlink_to(elsewhere / "secret")
    with pytest.raises(UserError, match=r"gsm8k/more.jsonl is a link out of gsm8k/"):
        load("gsm8k", tmp_path, Settings())


def test_two_files_of_one_subject(only):
    folder = only("cmmlu")
    (folder / "copy" / "test").mkdir(parents=True)
    shutil.copy(folder / "test" / "agronomy.csv", folder / "copy" / "test")
    with pytest.raises(
        UserError, match=r"cmmlu/test/agronomy.csv is subject 'agronomy' again, after cmmlu/copy"
    ):
        load("cmmlu", folder.parent, Settings())


def test_translations_that_do_not_match(only):
    folder = only("flores-en") / "flores101_dataset" / "devtest"
    with (folder / "eng.devtest").open("a", encoding="utf-8") as file:
        file.write("one more\n")
    with pytest.raises(
        UserError, match=r"eng.devtest has 7 lines, .*zho_simpl.devtest 6: they are not translations"
    ):
        load("flores-en", folder.parents[2], Settings())
    (folder / "eng.devtest").write_text("x\n\n" + "x\n" * 4)
    with pytest.raises(UserError, match=r"eng.devtest:2 is empty"):
        load("flores-en", folder.parents[2], Settings())
