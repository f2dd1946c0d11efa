"""`baichuan-sft eval`: files that survive a kill, tasks that fail alone, and what stands in results.json."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from fixtures import ROOT, SHARED, SMALL_VOCABULARY, needs_shared, tiny_config
from launching import environment

from baichuan_sft import load_tokenizer
from baichuan_sft.cli import run as guarded
from baichuan_sft.errors import EnvironmentFault, NumericalFault, UserError
from baichuan_sft.evaluate import command, journal, runner, sandbox
from baichuan_sft.evaluate.benchmarks import BENCHMARKS
from baichuan_sft.evaluate.items import Item, Loaded, Outcome, Request, Response, Settings, Subject
from baichuan_sft.evaluate.scorer import Scorer
from baichuan_sft.model.modeling_baichuan import BaichuanForCausalLM

CMMLU = BENCHMARKS["cmmlu"]
FACTS = {"path": "m", "variant": None, "fingerprint": "f" * 64, "dtype": "float32", "quantization": None}
WORDS = 12  # of the fake's context
DEFAULT = Settings()
SIZE = 3  # items of its batches


class Plain:
    """A style with prompts of one word per example and ``item.fields["words"]`` of its own."""

    def __init__(self, benchmark, subject, settings):
        self.num_shots, self.shots = 5 if settings.shots is None else settings.shots, subject.shots

    def shot_ids(self, item, num_shots):
        return tuple(shot.id for shot in self.shots[len(self.shots) - num_shots :])

    def request(self, item, num_shots):
        words = [*self.shot_ids(item, num_shots), *[item.question] * item.fields["words"]]
        return Request(" ".join(words), choices=("A", "B"))

    def judge(self, item, response):
        prediction = "AB"[response.scores[1] > response.scores[0]]
        return Outcome(
            prediction, float(prediction == item.answer), {"odd": [len(response.scores), "\u2028é\ud800"]}
        )


class FakeScorer:
    """Random scores of the default generator; stops before batch number ``stop``."""

    max_length, chat, batch_tokens = WORDS, False, None

    def __init__(self, stop=None, stop_with=KeyboardInterrupt):
        self.stop, self.stop_with, self.asked = stop, stop_with, []

    def length(self, request):
        return len(request.text.split())

    def plan(self, requests):
        order = sorted(range(len(requests)), key=lambda i: (-self.length(requests[i]), i))
        return [order[i : i + SIZE] for i in range(0, len(order), SIZE)]

    def run(self, requests):
        if len(self.asked) == self.stop:
            raise self.stop_with
        self.asked.append(requests)
        return [Response(tuple(torch.rand(2).tolist()), (), self.length(r), 1) for r in requests]


def loaded(num=10):
    """Ten questions of 4 to 13 words, of which all with more than 12 - shots words lose examples."""
    items = tuple(Item(f"s/{i}", f"q{i}", "AB"[i % 2], ("x", "y"), {"words": 4 + i}) for i in range(num))
    shots = tuple(Item(f"s/dev{i}", "", "A", ("x", "y"), {"words": 1}) for i in range(5))
    return Loaded((Subject("s", "S", items, shots),), {"cmmlu/test/s.csv": "0" * 64}, ("a note",))


def ask(file, scorer=None, settings=DEFAULT, facts=FACTS, num=10):
    scorer = scorer or FakeScorer()
    with patch.dict(runner.STYLES, plain=f"{__name__}:Plain"):
        return runner.run(CMMLU, "plain", loaded(num), scorer, settings, file, facts=facts)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Bytes of a file that was written in one go."""
    file = tmp_path_factory.mktemp("whole") / "items.jsonl"
    ask(file)
    return file.read_bytes()


def test_items_and_entry(tmp_path):
    scorer = FakeScorer()
    entry = ask(tmp_path / "items" / "cmmlu.plain.jsonl", scorer)
    identity, *rows = map(json.loads, (tmp_path / "items" / "cmmlu.plain.jsonl").read_text().split("\n")[:-1])
    # 4 to 7 words leave room for 5 examples, then one less for each word more; 13 words do not fit at all.
    assert entry["shots"] == {"0": 1, "1": 1, "2": 1, "3": 1, "4": 1, "5": 4}
    assert entry["skipped"] == {"too long": 1} and entry["items"] == len(rows) == 9
    assert [len(batch) for batch in scorer.asked] == [3, 3, 3]
    assert identity["model"] == FACTS["fingerprint"] and identity["prompts_sha256"] == entry["prompts_sha256"]
    by_id = {row["id"]: row for row in rows}
    assert by_id["s/7"]["shot_ids"] == [f"s/dev{i}" for i in range(5 - by_id["s/7"]["num_shots"], 5)]
    assert entry["value"] == pytest.approx(100 * sum(row["score"] for row in rows) / 9)
    assert all(row["score"] == (row["gold"] == row["prediction"]) for row in rows)
    assert entry["tokens"] == sum(row["tokens"] for row in rows) and entry["notes"] == ["a note"]
    assert entry.keys() == runner.blank(CMMLU, "plain").keys() and entry["error"] is None


@pytest.mark.parametrize("batch", range(3))
def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path, whole, batch):
    file = tmp_path / "items.jsonl"
    with pytest.raises(KeyboardInterrupt):
        ask(file, FakeScorer(stop=batch))
    assert file.read_bytes().count(b"\n") == 1 + SIZE * batch and whole.startswith(file.read_bytes())
    scorer = FakeScorer()
    entry = ask(file, scorer)
    assert file.read_bytes() == whole and len(scorer.asked) == 3 - batch
    straight = ask(None)
    timed = {"seconds", "tokens_per_second", "items_per_second", "notes"}
    assert {k: v for k, v in entry.items() if k not in timed} == {
        k: v for k, v in straight.items() if k not in timed
    }


def test_a_file_torn_anywhere_is_mended(tmp_path, whole, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # 1 ms each; that it is called, see below
    file = tmp_path / "items.jsonl"
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    cuts = {*range(0, len(whole), 101), *(end + more for end in ends for more in (-1, 0, 1))} - {
        len(whole) + 1
    }
    for cut in sorted(cuts):
        for lost in (b"", b"\0" * 50, b"{}\n"):  # what a power cut can leave behind it, or a foreign hand
            file.write_bytes(whole[:cut] + lost)
            scorer = FakeScorer()
            if lost.endswith(b"\n") and cut < ends[0]:
                continue  # a whole line that is no identity: refused, see below
            ask(file, scorer)
            assert file.read_bytes() == whole, cut
            assert len(scorer.asked) == 3 - sum(cut >= ends[SIZE * n] for n in (1, 2, 3)), cut


def test_every_batch_is_one_write_and_one_fsync(tmp_path, monkeypatch):
    calls = []
    sync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: calls.append(os.fstat(descriptor).st_size) or sync(descriptor)
    )
    ask(file := tmp_path / "items.jsonl")
    lines = file.read_bytes().splitlines(keepends=True)
    assert calls == [sum(map(len, lines[:n])) for n in (1, 4, 7, 10)]


@pytest.mark.parametrize(
    "change, text",
    [
        (dict(settings=Settings(seed=1)), "seed 0, now 1"),
        (dict(settings=Settings(shots=2)), "shots None, now 2"),
        (dict(facts={**FACTS, "fingerprint": "e" * 64}), "model ffffffffffffffff, now eeeeeeeeeeeeeeee"),
        (dict(num=5), "items 9, now 5"),
    ],
)
def test_another_run_is_refused_with_the_difference(tmp_path, whole, change, text):
    file = tmp_path / "items.jsonl"
    file.write_bytes(whole)
    with pytest.raises(UserError, match=rf"of another run: {text}.*--output_dir"):
        ask(file, **change)
    assert file.read_bytes() == whole
    file.write_bytes(whole[: whole.index(b"\n") + 1])  # nothing would be lost
    ask(file, **change)
    assert file.read_bytes().startswith(whole[:30]) and file.read_bytes() != whole


def test_a_file_is_written_by_one_process(tmp_path, whole):
    file = tmp_path / "items.jsonl"
    file.write_bytes(whole)
    with open(file) as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process writes it"):
            ask(file)
    ask(file)


def test_faults_of_a_batch_leave_the_file_whole(tmp_path, whole, monkeypatch):
    file = tmp_path / "items.jsonl"
    with pytest.raises(EnvironmentFault, match="--batch_tokens"):
        ask(file, FakeScorer(stop=1, stop_with=torch.OutOfMemoryError("CUDA out of memory")))
    monkeypatch.setattr(torch, "rand", lambda n: torch.tensor([0.5, float("nan")]))
    with pytest.raises(NumericalFault, match="--dtype"):
        ask(file)
    monkeypatch.undo()
    assert whole.startswith(file.read_bytes()) and file.read_bytes().count(b"\n") == 1 + SIZE

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(journal.os, "fsync", full)
    with pytest.raises(EnvironmentFault, match=r"items\.jsonl: cannot be written: No space left"):
        ask(file)
    monkeypatch.undo()
    ask(file)
    assert file.read_bytes() == whole


def test_sampling_follows_the_seed_and_leaves_no_trace(tmp_path, whole):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second = ask(tmp_path / "a"), ask(tmp_path / "b", settings=Settings(seed=1))
    assert torch.equal(before, torch.get_rng_state())
    assert (tmp_path / "a").read_bytes() == whole and first["prompts_sha256"] == second["prompts_sha256"]
    scores = [json.loads(line)["scores"] for line in (tmp_path / "b").read_text().split("\n")[1:-1]]
    assert scores != [json.loads(line)["scores"] for line in whole.decode().split("\n")[1:-1]]


def test_nothing_fits(tmp_path):
    scorer = FakeScorer()
    scorer.max_length = 3
    with pytest.raises(UserError, match="cmmlu: none of 10 items fits into 3 tokens"):
        ask(tmp_path / "items.jsonl", scorer)


def test_code_is_not_asked_where_it_cannot_be_judged(monkeypatch):
    monkeypatch.setattr(sandbox, "check", lambda: "no user namespaces")
    with pytest.raises(EnvironmentFault, match=r"no user namespaces; --allow_unsandboxed"):
        runner.check_sandbox(BENCHMARKS["humaneval"], Settings())
    runner.check_sandbox(BENCHMARKS["humaneval"], Settings(allow_unsandboxed=True))
    runner.check_sandbox(CMMLU, Settings())


# --- the command ------------------------------------------------------------------------------------------


def write_cmmlu(data, subject, num=6):
    for part, count in (("dev", 5), ("test", num)):
        lines = [f"{i},题目{part}{i}，哪个对？,{i}甲,{i}乙,{i}丙,{i}丁,{'ABCD'[i % 4]}" for i in range(count)]
        path = data / "cmmlu" / part / f"{subject}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join([",Question,A,B,C,D,Answer", *lines, ""]), encoding="utf-8")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Data of two benchmarks, one of them broken, and two models."""
    place = tmp_path_factory.mktemp("place")
    write_cmmlu(place / "data", "agronomy")
    write_cmmlu(place / "data", "anatomy", 4)
    bad = place / "data" / "jec-qa" / "jec-qa-kd.jsonl"
    bad.parent.mkdir()
    bad.write_text('{"question": "no end')
    tokenizer = load_tokenizer(SMALL_VOCABULARY)
    for seed, name in enumerate(("base", "tuned")):
        torch.manual_seed(seed)
        model = BaichuanForCausalLM(tiny_config("baichuan2-7b", max_position_embeddings=4096))
        model.save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    return place


def evaluate(place, out, *words, models=("tuned",)):
    paths = [place / name for name in models]
    argv = [*paths, "--data_dir", place / "data", "--output_dir", out, *words]
    return guarded(command.main, [str(word) for word in argv])


def results(out):
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


def test_a_broken_task_fails_alone(place, tmp_path, capsys):
    assert evaluate(place, tmp_path, "--tasks", "general,law", "--style", "both") == 2
    found = results(tmp_path)
    tasks = {(task["benchmark"], task["style"]): task for task in found["tasks"]}
    assert list(tasks) == [(name, style) for name in ("cmmlu", "jecqa") for style in ("baichuan", "harness")]
    assert tasks["cmmlu", "baichuan"]["items"] == tasks["cmmlu", "harness"]["items"] == 10
    assert "jec-qa-kd.jsonl" in tasks["jecqa", "harness"]["error"]
    assert all(task.keys() == tasks["cmmlu", "baichuan"].keys() for task in tasks.values())
    assert len(found["absent"]) == 5 and any("C-Eval" in line for line in found["absent"])
    assert found["model"]["fingerprint"] and found["versions"]["torch"] and found["settings"]["seed"] == 0
    shown = capsys.readouterr().out
    assert "cmmlu" in shown and "jec-qa-kd.jsonl" in shown and str(tmp_path) in shown
    assert {"items", "results.json", "table.md", "bars.png"} <= {path.name for path in tmp_path.iterdir()}


def test_another_command_adds_to_the_results(place, tmp_path, monkeypatch, capsys):
    words = ("--style", "baichuan", "--limit", 5)
    assert evaluate(place, tmp_path, "--tasks", "cmmlu", *words) == 0
    first = results(tmp_path)["tasks"][0]
    assert first["items"] == 5 and first["items_per_second"] > 0
    monkeypatch.setattr(Scorer, "run", None)  # nothing is asked again
    assert evaluate(place, tmp_path, "--tasks", "cmmlu", *words) == 0
    again = results(tmp_path)["tasks"][0]
    assert {**again, "notes": first["notes"]} == first
    monkeypatch.undo()
    assert evaluate(place, tmp_path, "--tasks", "cmmlu", "--style", "harness", "--limit", 5) == 0
    assert [task["style"] for task in results(tmp_path)["tasks"]] == ["baichuan", "harness"]

    def files():
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    whole = files()
    assert evaluate(place, tmp_path, "--tasks", "cmmlu", "--limit", 6) == 2  # of another run
    assert "another run: limit 5, now 6" in capsys.readouterr().err
    assert evaluate(place, tmp_path, "--tasks", "cmmlu", "--limit", 5, models=("base",)) == 2
    assert "another run: model " in capsys.readouterr().err and files() == whole
    with open(tmp_path / "items" / "cmmlu.baichuan.jsonl") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert evaluate(place, tmp_path, "--tasks", "cmmlu", *words) == 2
    assert "another process writes it" in capsys.readouterr().out
    assert results(tmp_path)["tasks"] == json.loads(whole[tmp_path / "results.json"])["tasks"]


def test_a_report_that_cannot_be_written_is_one_line(place, tmp_path, capsys):
    (tmp_path / "table.md").mkdir()
    assert evaluate(place, tmp_path, "--tasks", "cmmlu", "--limit", 5) == 3
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert "/table.md" in line and "cannot be written: Is a directory" in line and "goes on" in line
    assert results(tmp_path)["tasks"][0]["items"] == 5


def test_ctrl_c_keeps_what_was_answered(place, tmp_path, monkeypatch, capsys):
    words = ("--tasks", "cmmlu", "--batch_tokens", 100)
    assert evaluate(place, tmp_path / "whole", *words) == 0
    name = "items/cmmlu.baichuan.jsonl"
    calls, score = [], Scorer.run

    def stop(self, requests):
        calls.append(len(requests))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score(self, requests)

    monkeypatch.setattr(Scorer, "run", stop)
    assert evaluate(place, tmp_path / "again", *words) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert len((tmp_path / "again" / name).read_bytes().splitlines()) == 1 + sum(calls[:2])
    assert evaluate(place, tmp_path / "again", *words) == 0
    assert sum(calls) - calls[2] == 10
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_before_and_after(place, tmp_path, capsys):
    assert evaluate(place, tmp_path, "--tasks", "cmmlu", "--compare", place / "base") == 0
    (verdict,) = results(tmp_path)["verdicts"]
    after, before = results(tmp_path)["tasks"][0], results(tmp_path / "before")["tasks"][0]
    assert (verdict["before"], verdict["after"]) == (before["value"], after["value"])
    assert verdict["verdict"] in ("gained", "lost", "within noise") and verdict["items"] == 10
    assert verdict["verdict"] in capsys.readouterr().out
    # Results of an earlier run do as well as a model; other shots cannot be compared.
    assert evaluate(place, tmp_path / "b", "--tasks", "cmmlu", "--compare", tmp_path / "before") == 0
    assert results(tmp_path / "b")["verdicts"] == [verdict]
    words = ("--tasks", "cmmlu", "--shots", 1, "--compare", tmp_path / "before")
    assert evaluate(place, tmp_path / "c", *words) == 2
    assert "other prompts" in results(tmp_path / "c")["verdicts"][0]["error"]


def test_several_models_and_their_curve(place, tmp_path, capsys):
    assert evaluate(place, tmp_path, "--tasks", "cmmlu", models=("base", "tuned")) == 0
    prints = [results(tmp_path / name)["model"]["fingerprint"] for name in ("base", "tuned")]
    assert prints[0] != prints[1]
    table = (tmp_path / "curve.md").read_text()
    assert "base" in table and "tuned" in table and (tmp_path / "curve.png").stat().st_size > 5000
    assert "base" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(
    "paths, labels",
    [
        (["a/checkpoint-5", "a/checkpoint-10/"], ["checkpoint-5", "checkpoint-10"]),
        (["a/checkpoint-5", "b/checkpoint-5"], ["a_checkpoint-5", "b_checkpoint-5"]),
        (["a/before", "b"], ["a_before", None]),
    ],
)
def test_labels_tell_models_apart(paths, labels):
    args = command.build_parser().parse_args(paths)
    found = [target.label for target in command.targets(args)]
    assert all(label in (None, name) for label, name in zip(labels, found)) and len(set(found)) == len(paths)


@pytest.mark.parametrize(
    "words, text",
    [
        ("", "no model is named"),
        ("tuned", "--data_dir is missing"),
        ("tuned --data_dir nowhere", "--data_dir nowhere: no such directory"),
        ("tuned --data_dir data --tasks cmlu", "did you mean 'cmmlu'"),
        ("tuned --data_dir data --tasks cmmlu --samples 3", "--samples is of code tasks"),
        ("tuned --data_dir data --tasks cmmlu --allow_unsandboxed", "--allow_unsandboxed is of code tasks"),
        ("tuned --data_dir data --tasks ceval", "nothing to ask: C-Eval"),
        ("tuned --data_dir data --tasks math", "nothing to ask: data has none of --tasks math"),
        ("tuned tuned --data_dir data", "two are the same"),
        ("tuned base --data_dir data --revisions a", "2 DIRs are given"),
        ("tuned --data_dir data --revisions a,a", "one twice"),
        ("tuned --data_dir data --tasks cmmlu --revisions a", "is a directory"),
        ("tuned data --data_dir data --tasks cmmlu", "data: not a model: there is no config.json in it"),
        ("tuned tunde --data_dir data --tasks cmmlu", "tunde: no such directory"),
        ("tuned --data_dir data --tasks cmmlu --compare bsae", "bsae: no such directory"),
        (
            "tuned --data_dir data --tasks cmmlu --compare data",
            "data: not a model: there is no config.json in it",
        ),
        ("tuned --data_dir data --limit 0", "a whole number of at least 1"),
    ],
)
def test_mistakes_are_one_line(place, monkeypatch, capsys, words, text):
    monkeypatch.chdir(place)
    assert guarded(command.main, words.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and text in line
    assert not (place / "evaluation").exists()


def test_list(place, capsys):
    assert guarded(command.main, ["--list", "--data_dir", str(place / "data")]) == 0
    shown = capsys.readouterr().out
    assert all(
        f"{name} " in shown and b.source in shown and b.licence in shown for name, b in BENCHMARKS.items()
    )
    assert "10 items there" in shown and "ABSENT" in shown


@pytest.mark.slow
def test_a_killed_process_goes_on_to_the_same_bytes(place, tmp_path):
    write_cmmlu(tmp_path / "data", "agronomy", 150)
    words = ["--tasks", "cmmlu", "--batch_tokens", "1", "--data_dir", tmp_path / "data"]
    argv = [str(word) for word in (place / "tuned", *words, "--output_dir")]
    assert guarded(command.main, [*argv, str(tmp_path / "whole")]) == 0
    name = "items/cmmlu.baichuan.jsonl"
    whole, file = (tmp_path / "whole" / name).read_bytes(), tmp_path / "killed" / name
    assert whole.count(b"\n") == 151
    command_line = [sys.executable, "-m", "baichuan_sft.cli", "eval", *argv, str(tmp_path / "killed")]
    with open(log := tmp_path / "log", "w") as out:
        process = subprocess.Popen(command_line, cwd=ROOT, env=environment(), stdout=out, stderr=out)
    try:
        until = time.monotonic() + 300
        while not (file.exists() and file.read_bytes().count(b"\n") > 20):
            assert process.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    left = file.read_bytes()
    assert whole.startswith(left) and len(left) < len(whole)
    assert guarded(command.main, [*argv, str(tmp_path / "killed")]) == 0
    assert file.read_bytes() == whole


@pytest.mark.slow
@needs_shared
def test_the_authors_own_files_in_both_styles(place, tmp_path, monkeypatch, capsys):
    data = SHARED / "evaldata"
    if not data.is_dir():
        pytest.skip(f"needs samples of the benchmarks in {data}")
    score = Scorer.run
    short = lambda requests: [replace(r, max_new_tokens=min(r.max_new_tokens, 8)) for r in requests]  # noqa: E731
    monkeypatch.setattr(
        Scorer, "run", lambda self, requests: score(self, short(requests))
    )  # seconds, not minutes
    words = ["--data_dir", str(data), "--output_dir", str(tmp_path), "--style", "both", "--limit", "1"]
    assert guarded(command.main, [str(place / "tuned"), *words]) == 0, capsys.readouterr()
    found = results(tmp_path)
    asked = {(task["benchmark"], task["style"]) for task in found["tasks"] if task["items"] == 1}
    absent = sum(len(line.split(":")[0].split(", ")) for line in found["absent"])
    assert len(asked) + 2 * absent == 2 * len(BENCHMARKS)
    assert not [task["error"] for task in found["tasks"] if task["error"]]
