"""The data of a run: mixed, skipped, streamed, the same on every host; and what is refused at the start."""

import json
import os
import subprocess

import numpy as np
import pytest
import torch
from fixtures import ROOT, SMALL_VOCABULARY, tiny_config
from launching import BIN, environment, flags, log_of

from baichuan_sft import BaichuanForCausalLM, load_tokenizer
from baichuan_sft.cli import dispatch, run
from baichuan_sft.data.findings import DataFault
from baichuan_sft.errors import UserError
from baichuan_sft.train import inputs
from baichuan_sft.train.inputs import Inputs, require_same_data, restore_stream
from baichuan_sft.train.parse import parse
from baichuan_sft.train.sft import main

DATA = ROOT / "data"


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    directory = tmp_path_factory.mktemp("nano")
    torch.manual_seed(0)
    BaichuanForCausalLM(tiny_config("baichuan2-7b", max_position_embeddings=512)).save_pretrained(directory)
    load_tokenizer(SMALL_VOCABULARY).save_pretrained(directory)
    return directory


@pytest.fixture
def train(nano, tmp_path):
    """Train in this process; returns run.json's part about the data."""

    def call(*words, out="out", **options):
        values: dict = {
            "model_name_or_path": nano,
            "data_path": DATA / "belle_chat.json",
            "output_dir": tmp_path / out,
            "cache_dir": tmp_path / "cache",
            "max_steps": 1,
            "model_max_length": 64,
            "per_device_train_batch_size": 2,
            "save_strategy": "no",
            "check_reload": False,
        }
        assert main([*flags(**values | options), *words]) == 0
        return json.loads((tmp_path / out / "run.json").read_text())["data"]["report"]

    return call


def test_a_mix_is_drawn_by_weight(train):
    report = train(data_path=f"{DATA}/belle_chat.json:3,{DATA}/messages_chat.jsonl:1")
    assert [source["used"] for source in report["sources"]] == [15, 5]
    report = train(data_path=DATA / "mix.yaml")
    assert len(report["sources"]) == 3 and report["sources"][2]["used"] == 4
    report = train(data_path=f"{DATA}/*chat.json*")
    assert (
        report["read"] == sum(source["read"] for source in report["sources"]) and len(report["sources"]) == 3
    )


@pytest.mark.slow
def test_the_recipe_runs(tmp_path):
    env = {**environment(), "OUT": str(tmp_path), "BAICHUAN_SFT_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([ROOT / "scripts" / "instruction_mix.sh"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    sources = json.loads((tmp_path / "tuned" / "run.json").read_text())["data"]["report"]["sources"]
    used = [source["used"] for source in sources]
    assert used[2] == sources[2]["read"]  # the scarcest of the three decides
    for number, share in zip(used, (13000, 1000, 2300)):
        assert abs(number - sum(used) * share / 16300) <= 1


def test_faults_are_listed_before_a_model_loads(train, tmp_path, monkeypatch):
    path = tmp_path / "x.jsonl"
    good = (DATA / "belle_chat.jsonl").read_text()
    path.write_text(good + '{"conversations": [{"from": "humna", "value": "a"}]}\n[\n')
    monkeypatch.setattr("baichuan_sft.checkpoint.load_model", lambda *a, **k: pytest.fail("loaded a model"))
    with pytest.raises(DataFault, match=r"(?s)2 faults.*x\.jsonl:7:\d+ item 6 turn 0.*x\.jsonl:8:\d+ item 7"):
        train(data_path=path)
    assert len((tmp_path / "out" / "data_report.jsonl").read_text().splitlines()) == 2


def test_skip_trains_on_the_rest_and_keeps_the_bytes(train, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text((DATA / "belle_chat.jsonl").read_text() + "[\n")
    report = train(data_path=path, on_error="skip")
    assert (report["read"], report["used"], report["rejected"]) == (7, 6, 1)
    assert json.loads((tmp_path / "out" / "rejected.jsonl").read_text())["raw"] == "["


def test_a_checked_file_that_changed_is_refused_by_name(train, tmp_path, monkeypatch, capsys):
    path = tmp_path / "x.jsonl"
    path.write_text((DATA / "belle_chat.jsonl").read_text())
    check = [
        "data",
        "check",
        str(path),
        "--output_dir",
        str(tmp_path / "c"),
        "--cache_dir",
        str(tmp_path / "cache"),
    ]
    assert run(dispatch, check) == 0
    train(data_path=path)
    path.write_text(path.read_text().splitlines()[0])
    with pytest.raises(DataFault, match=r"DATA090 .*x\.jsonl: changed after it was checked .*data check"):
        train(data_path=path)
    assert run(dispatch, check) == 0
    train(data_path=path)


def test_prepared_data_is_used(train, tmp_path, nano, monkeypatch):
    words = [
        "data",
        "prepare",
        str(DATA / "belle_chat.json"),
        "--tokenizer",
        str(nano),
        "--model_max_length",
        "64",
    ]
    assert run(dispatch, [*words, "--cache_dir", str(tmp_path / "cache")]) == 0
    monkeypatch.setattr("baichuan_sft.data.prepare._build", lambda *a, **k: pytest.fail("tokenised again"))
    train()


def test_held_out_data_has_reports_of_its_own(train, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text((DATA / "belle_chat.jsonl").read_text() + "[\n")
    train(data_path=path, on_error="skip", eval_data_path=DATA / "belle_chat.json")
    assert (tmp_path / "out" / "rejected.jsonl").exists()
    report = json.loads((tmp_path / "out" / "run.json").read_text())["data"]["report"]
    assert report["held_out_data"]["used"] == 70


def test_a_finished_run_has_nothing_left(train, tmp_path):
    train(save_strategy="steps", save_steps=1)
    with pytest.raises(UserError, match="checkpoint-1: already at update 1 of 1, nothing is left"):
        train(save_strategy="steps", save_steps=1, resume_from_checkpoint=tmp_path / "out" / "checkpoint-1")


def test_held_out_records_that_are_trained_on_are_named(train, capsys):
    train(eval_data_path=DATA / "belle_chat.json")
    assert "warning: 70 of 70 held-out segments are trained on as well" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(packing=False), "--packing was True, is False"),
        (dict(per_device_train_batch_size=1), "--packing_tokens was 128, is 64"),
        (dict(gradient_accumulation_steps=2), "rows per update was 1, is 2"),
        (dict(seed=9), "--seed was 42, is 9"),
        (dict(data_path=DATA / "belle_chat.jsonl"), "the content of the data was"),
    ],
)
def test_a_run_resumes_with_the_rows_it_has_not_seen(train, tmp_path, change, words):
    options = dict(save_strategy="steps", save_steps=1, max_steps=2)
    train(**options)
    checkpoint = tmp_path / "out" / "checkpoint-1"
    with pytest.raises(UserError, match=f"checkpoint-1: .*{words}.*another order"):
        train(**options | change, resume_from_checkpoint=checkpoint)
    if "packing" in change:  # the same rows in another cut are the same rows
        cut = dict(per_device_train_batch_size=1, packing_tokens=128)
        train(**options | cut, resume_from_checkpoint=checkpoint)


# --- streaming ------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [dict(packing=False), dict(use_lora=True)])  # LoRA draws its dropout
def test_a_stream_resumes_bit_for_bit(train, tmp_path, more):
    options = dict(
        streaming=True,
        **more,
        max_steps=6,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=3,
        learning_rate=1e-3,
    )
    train(out="straight", **options)
    train(out="again", **options, resume_from_checkpoint=tmp_path / "straight" / "checkpoint-3")
    straight, again = log_of(tmp_path / "straight"), log_of(tmp_path / "again")
    assert len(straight) == 6 and [row["step"] for row in again] == [4, 5, 6]
    for one, other in zip(straight[3:], again):
        assert (one["loss"], one["grad_norm"]) == (other["loss"], other["grad_norm"])


def test_a_stream_evaluates_on_files_of_its_own(train, tmp_path):
    options = dict(eval_data_path=DATA / "belle_chat.jsonl", eval_strategy="steps", eval_steps=1)
    train(streaming=True, max_steps=2, **options)
    rows = [json.loads(line) for line in (tmp_path / "out" / "trainer_log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "eval_loss" in row] == [1, 2]


def test_a_stream_does_not_resume_with_other_processes(train, tmp_path, monkeypatch):
    options = dict(streaming=True, save_strategy="steps", save_steps=1)
    train(**options)
    checkpoint = tmp_path / "out" / "checkpoint-1"
    with pytest.raises(UserError, match=r"stream_rank_1\.json: not there .* as many processes as saved it"):
        restore_stream(None, checkpoint, 1)
    monkeypatch.setattr("baichuan_sft.train.resume.place", lambda: (0, 2))
    with pytest.raises(UserError, match=r"saved by 1 ranks.*--num_gpus 1 .*not with 2"):
        train(**options, resume_from_checkpoint=checkpoint)


@pytest.mark.parametrize(
    "words, message",
    [
        ("", "--streaming True has no end; say with --max_steps"),
        (
            "--max_steps 5 --dev_ratio 0.1",
            "--dev_ratio 0.1 is not possible with --streaming True: pass --eval",
        ),
        (
            "--max_steps 5 --dedup True",
            "--dedup True is not possible with --streaming True: run `baichuan-sft data",
        ),
        ("--max_steps 5 --train_sampling_strategy sequential", "the order is drawn while reading"),
        ("--max_steps 5 --dataloader_num_workers 2", "the place in the data would be unknown"),
        ("--max_steps 5 --eval_data_path README.md", "needs --eval_strategy steps"),
    ],
)
def test_what_a_stream_cannot_do(words, message, tmp_path):
    required = flags(
        model_name_or_path=ROOT / "tests", data_path=DATA / "belle_chat.json", output_dir=tmp_path
    )
    with pytest.raises(UserError, match=message):
        parse([*required, "--streaming", "True", *words.split()])


# --- several processes ------------------------------------------------------------------------------


def fake_ranks(monkeypatch, *gathered):
    import torch.distributed as dist

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: len(gathered))
    monkeypatch.setattr(dist, "all_gather_object", lambda out, mine: out.__setitem__(slice(None), gathered))


def test_ranks_compare_what_was_really_read(train, monkeypatch, tmp_path):
    """With the report as a run writes it, held-out files included."""
    path = DATA / "belle_chat.jsonl"
    report = train(eval_data_path=path)
    given = Inputs(None, None, None, report, [])
    held_out = report["held_out_data"]["sources"][0]["sha256"]
    mine = [(str(DATA / "belle_chat.json"), report["sources"][0]["sha256"]), (str(path), held_out)]
    gathered = []
    fake_ranks(monkeypatch, mine, mine)
    everyone = torch.distributed.all_gather_object
    gather = lambda out, one: (gathered.append(one), everyone(out, one))  # noqa: E731
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    require_same_data(given)
    assert gathered == [mine]


def test_ranks_with_other_data_are_named(monkeypatch):
    given = Inputs(None, None, None, {"sources": [{"path": "a.json", "sha256": "1" * 64}]}, ["a.json"])
    fake_ranks(monkeypatch, [("a.json", "1" * 64)], [("a.json", "1" * 64)])
    require_same_data(given)
    fake_ranks(monkeypatch, [("a.json", "1" * 64), ("b.json", "3" * 64)], [("a.json", "1" * 64)])
    with pytest.raises(UserError, match=r"nothing on rank 1 is not b\.json on rank 0"):
        require_same_data(given)
    fake_ranks(monkeypatch, [("a.json", "1" * 64)], [("/other/a.json", "2" * 64)])
    with pytest.raises(UserError, match=r"/other/a\.json on rank 1 is not a\.json on rank 0 \(sha256 2222"):
        require_same_data(given)


@pytest.mark.slow
def test_other_local_ranks_wait_for_the_first(nano, tmp_path, monkeypatch):
    """Rank 1 of a host comes first and must not tokenise, nor end, before rank 0 has."""
    code = "import sys; from baichuan_sft.train import inputs, parse; "
    code += "print(len(inputs.read_inputs(parse.parse(sys.argv[1:])).train))"
    words = flags(
        model_name_or_path=nano,
        data_path=DATA / "belle_chat.json",
        output_dir=tmp_path / "out",
        cache_dir=tmp_path / "cache",
    )
    started = []
    for rank in ("1", "0"):
        env = {**environment(), "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # as launchers do
        command = [str(BIN / "python"), "-c", code, *words]
        started.append(subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True))
        if rank == "1":
            with pytest.raises(subprocess.TimeoutExpired):
                started[0].wait(timeout=12)
    outputs = [process.communicate(timeout=120)[0].split()[-1] for process in started]
    assert outputs == ["70", "70"] and os.path.isdir(tmp_path / "cache")


def test_held_out_is_found_by_content(train, tmp_path):
    """Equal records stay on one side, so nothing held out is trained on."""
    records = json.loads((DATA / "belle_chat.json").read_text())
    path = tmp_path / "twice.json"
    path.write_text(json.dumps(records * 2))
    kept = {}
    lay_out = inputs.read_inputs

    def keep(settings):
        kept["inputs"] = lay_out(settings)
        return kept["inputs"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("baichuan_sft.train.sft.read_inputs", keep)
        train(data_path=path, dev_ratio=0.2)
    train_set, dev = kept["inputs"].train, kept["inputs"].held_out
    assert len(train_set) + len(dev) == 140 and not np.isin(dev.hashes, train_set.hashes).any()
