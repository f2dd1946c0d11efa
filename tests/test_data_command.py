"""``baichuan-sft data check`` and ``data prepare``: what they leave, and that they harm nothing."""

import json
import os
import re
import signal
import subprocess
import sys

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fixtures import ROOT, SMALL_VOCABULARY

from baichuan_sft.cli import dispatch, run
from baichuan_sft.data.formats import FORMATS, parse
from baichuan_sft.datatools.command import as_record

DATA = ROOT / "data"
GOOD = json.dumps({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]})


@pytest.fixture
def data(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("BAICHUAN_SFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def data(*words):
        code = run(dispatch, ["data", *map(str, words)])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return data


@pytest.mark.parametrize("name", ["belle_chat.jsonl", "messages_chat.jsonl", "alpaca.json", "text.jsonl"])
def test_fix_keeps_what_is_learnt_and_fixing_twice_changes_nothing(data, tmp_path, name):
    assert data("check", DATA / name, "--fix", "one.jsonl")[0] == 0
    assert data("check", "one.jsonl", "--fix", "two.jsonl")[0] == 0
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
    fixed = [parse(json.loads(line))[0] for line in (tmp_path / "one.jsonl").read_text().splitlines()]
    text = (DATA / name).read_text()
    raw = json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.splitlines()]
    assert fixed == [parse(record)[0] for record in raw]


def test_every_format_becomes_a_record_that_is_read_back():
    for name in FORMATS:
        key = {"messages": "messages", "text": "text", "alpaca": "instruction"}.get(name, "conversations")
        turns = [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
        ]
        raw = (
            {"instruction": "a", "output": "b"}
            if name == "alpaca"
            else {key: "t" if name == "text" else turns}
        )
        messages = parse(raw, name)[0]
        assert parse(as_record(messages))[0] == messages


def test_dedup_before_a_file_name_and_in_the_fixed_file(data, tmp_path):
    (tmp_path / "x.jsonl").write_text(f"{GOOD}\n{GOOD}\n")
    code, printed = data("check", "--dedup", "x.jsonl", "--fix", "fixed.jsonl")
    assert code == 0 and re.search(r"read 2 = used 1 .*duplicates dropped 1", printed)
    assert (tmp_path / "fixed.jsonl").read_text().count("\n") == 1


def test_fix_harms_no_source(data, tmp_path):
    (tmp_path / "x.jsonl.tmp").write_text(GOOD)
    assert data("check", "x.jsonl.tmp", "--fix", "x.jsonl")[0] == 0
    assert (tmp_path / "x.jsonl.tmp").exists() and (tmp_path / "x.jsonl").stat().st_size
    code, printed = data("check", "x.jsonl", "--fix", "./x.jsonl")
    assert code == 2 and "is one of the files that are read; name another one" in printed
    (tmp_path / "bad.jsonl").write_text("[")
    assert (
        data("check", "bad.jsonl", "none.jsonl", "x.jsonl", "--on-error", "skip", "--fix", "x2.jsonl")[0] == 0
    )
    code, printed = data("check", "data_check/rejected.jsonl")
    assert (
        code == 2
        and "is where the report goes" in printed
        and (tmp_path / "data_check/rejected.jsonl").exists()
    )


def test_paths_are_given_as_in_training(data, tmp_path):
    for name in ("a.jsonl", "b.jsonl", "c,d.jsonl"):
        (tmp_path / name).write_text(GOOD)
    code, printed = data("check", "a.jsonl:0.7,b.jsonl:0.3")
    assert code == 0 and "read 2 = used 2" in printed
    assert "read 1 = used 1" in data("check", "c,d.jsonl")[1]


@pytest.mark.parametrize("on_error, expected", [("stop", 2), ("skip", 0)])
def test_too_long_is_an_error_where_that_is_asked_for(data, tmp_path, on_error, expected):
    words = ["--tokenizer", SMALL_VOCABULARY, "--model_max_length", 16, "--truncation", "error"]
    code, printed = data("check", DATA / "belle_chat.json", *words, "--on-error", on_error)
    assert code == expected and "ERROR DATA024" in printed
    report = (tmp_path / "data_check" / "data_report.jsonl").read_text().splitlines()
    number = sum('"DATA024"' in line for line in report)
    assert (
        number > 5 and f"rejected {number}" in printed and (tmp_path / "data_check" / "report.html").exists()
    )


def test_names_that_could_drive_a_terminal(data, tmp_path):
    for name in ("[bold]a.jsonl", "x[y].jsonl", "e\x1b[31m\n.jsonl"):
        (tmp_path / name).write_text("[")
        code, printed = data("check", name)
        assert code == 2 and "\x1b" not in printed and "Traceback" not in printed


@pytest.mark.parametrize(
    "words, message",
    [
        (["check"], "required: PATH"),
        (["check", "x", "--on-eror", "skip"], "unknown flag --on_eror, did you mean '--on_error'"),
        (["check", "x", "--truncation", "drop"], "--truncation counts tokens, and there is no tokenizer"),
        (["check", "x", "--model_max_length", "9"], "--model_max_length counts tokens"),
        (["check", "x", "--max_line_mib", "0"], "--max_line_mib is 0; it must be at least 1"),
        (["check", "x", "--encoding", "utf-88"], "unknown encoding 'utf-88'"),
        (
            ["check", DATA / "belle_chat.json", "--output_dir", DATA / "belle_chat.json"],
            "no directory for reports",
        ),
        (["prepare", "x"], "required: --tokenizer"),
        (["chek", "x"], "invalid choice: 'chek'"),
        ([], "required: check|prepare"),
    ],
)
def test_wrong_words(data, words, message):
    code, printed = data(*words)
    assert code == 2 and message in printed and "Traceback" not in printed


def test_prepare_says_what_became_of_every_record(data):
    code, printed = data("prepare", DATA / "mix.yaml", "--tokenizer", SMALL_VOCABULARY)
    assert code == 0 and "not drawn" in printed and "prepared:" in printed and "tokens: rendered" in printed


def test_gb18030_is_read_when_it_is_said(data, tmp_path):
    text = (DATA / "belle_chat.json").read_text()
    (tmp_path / "x.json").write_bytes(text.encode("gb18030"))
    code, printed = data("check", "x.json")
    assert code == 2 and "pass --encoding gb18030" in printed
    assert data("check", "x.json", "--encoding", "gb18030", "--fix", "a.jsonl")[0] == 0
    assert data("check", DATA / "belle_chat.json", "--fix", "b.jsonl")[0] == 0
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_rejected_rows_of_a_table_are_kept(data, tmp_path):
    rows = [
        {"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": answer}]}
        for answer in ("答", "")
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    assert data("check", "x.parquet", "--on-error", "skip")[0] == 0
    (line,) = (tmp_path / "data_check" / "rejected.jsonl").read_text().splitlines()
    assert json.loads(json.loads(line)["raw"]) == rows[1]


POOL = """
import os, signal, sys, time
from baichuan_sft.data.check import in_order
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts with & ignores it
    for number, _ in enumerate(in_order(time.sleep, iter(lambda: 0.05, None), 2)):
        if not number:
            print("begun", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_processes_that_read_end_with_their_parent(tmp_path, number):
    program = tmp_path / "pool.py"  # spawned processes read it again
    program.write_text(POOL)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    with subprocess.Popen(
        [sys.executable, program], env={**os.environ, "PYTHONPATH": str(ROOT)}, **pipes
    ) as run:
        try:
            assert run.stdout.readline() == b"begun\n"
            family = psutil.Process(run.pid).children(recursive=True)
            if number == signal.SIGINT:  # a terminal sends it to all
                os.killpg(run.pid, number)
            else:
                run.kill()
            said = run.communicate(timeout=60)[1].decode()
        finally:
            run.kill()
    assert len(family) >= 2 and not psutil.wait_procs(family, timeout=20)[1]
    assert said.count("Traceback") == (number == signal.SIGINT), said  # the parent's own
