"""A run that was stopped goes on as if it had not been: same rows, same numbers, or it says why not."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from fixtures import ROOT, SMALL_VOCABULARY, tiny_config
from launching import environment, flags, log_of

from baichuan_sft import BaichuanForCausalLM, load_tokenizer
from baichuan_sft.commit import sha256_of
from baichuan_sft.data.packing import EMPTY_ROW
from baichuan_sft.errors import CheckpointFault, UserError
from baichuan_sft.train.args import SECTIONS
from baichuan_sft.train.order import STRATEGIES, RowOrder
from baichuan_sft.train.same_run import ALLOWED, FREE, ROWS
from baichuan_sft.train.sft import main
from baichuan_sft.train.state import load_schedule, random_state, read_tree, set_random_state, write_tree

DATA = ROOT / "data" / "belle_chat.json"


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    directory = tmp_path_factory.mktemp("nano")
    torch.manual_seed(0)
    BaichuanForCausalLM(tiny_config("baichuan2-13b")).save_pretrained(directory)
    load_tokenizer(SMALL_VOCABULARY).save_pretrained(directory)
    return directory


def options_of(nano, root, **options):
    """A short run that saves after each of its six updates, three to an epoch; NEFTune draws noise."""
    values = dict(
        model_name_or_path=nano,
        data_path=DATA,
        output_dir=root / "out",
        cache_dir=root.parent / "cache",
        num_train_epochs=2,
        model_max_length=64,
        packing_tokens=128,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        neftune_noise_alpha=5.0,
        learning_rate=1e-3,
        save_strategy="steps",
        save_steps=1,
        check_reload=False,
        seed=5,
    )
    return flags(**{name: value for name, value in (values | options).items() if value is not None})


@pytest.fixture
def train(nano, tmp_path):
    """Train in this process; returns the output directory."""

    def call(**options):
        # accelerate 1.13 keeps the accumulation of an earlier run of this process
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        assert main(options_of(nano, tmp_path, **options)) == 0
        return options.get("output_dir", tmp_path / "out")

    return call


@pytest.fixture(scope="module")
def finished(nano, tmp_path_factory):
    """A whole run, to be copied."""
    root = tmp_path_factory.mktemp("finished")
    assert main(options_of(nano, root)) == 0
    return root / "out"


@pytest.fixture
def stopped(finished, tmp_path):
    """A run that ended after its fourth update, in its second epoch."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    for name in ("checkpoint-5", "checkpoint-6"):
        shutil.rmtree(out / name)
    (out / "COMMIT").unlink()
    return out


PLAIN = dict(neftune_noise_alpha=None)  # nothing is drawn but the order of the rows


@pytest.fixture(scope="module")
def plain(nano, tmp_path_factory):
    """A whole run whose numbers do not depend on how an update is cut."""
    root = tmp_path_factory.mktemp("plain")
    assert main(options_of(nano, root, **PLAIN)) == 0
    return root / "out"


def numbers(directory):
    """Loss and gradient norm of each update, exactly."""
    return {row["step"]: (row["loss"].hex(), row["grad_norm"].hex()) for row in log_of(directory)}


def weights(directory):
    return sha256_of(directory / "model.safetensors")


def assert_went_on(directory, finished, first):
    """Updates from ``first`` on, again or anew, and the result, are those of the run that was not stopped."""
    again = {row["step"]: row for row in log_of(directory)[-(len(log_of(finished)) - first + 1) :]}
    assert sorted(again) == list(range(first, len(log_of(finished)) + 1))
    straight = numbers(finished)
    for step, row in again.items():
        assert (row["loss"].hex(), row["grad_norm"].hex()) == straight[step]
    assert weights(directory) == weights(finished)


def assert_close(directory, straight, steps):
    """fp32 sums in another order: the losses were 2e-7 apart, and the norms, of 636,000 numbers, 3e-6."""
    one, other = ({row["step"]: row for row in log_of(run)} for run in (directory, straight))
    assert sorted(one) == steps
    for step in steps:
        assert one[step]["loss"] == pytest.approx(other[step]["loss"], rel=1e-6)
        assert one[step]["grad_norm"] == pytest.approx(other[step]["grad_norm"], rel=1e-5)


# --- what is kept -----------------------------------------------------------------------------------


def test_a_tree_comes_back_as_it_was(tmp_path):
    shared = torch.arange(5, dtype=torch.uint8)
    tree = {
        "state": {0: {"step": torch.tensor(3.0), "m": torch.randn(2, 3).bfloat16(), "qmap": shared}},
        "groups": [
            {"betas": (0.9, 0.98), "lr": 0.1 + 0.2, "params": [0, 1], "foreach": None, "amsgrad": False}
        ],
        "best": float("-inf"),
    }
    tree["state"][1] = {"qmap": shared, "m": torch.randn(4, 2).t()}
    write_tree(tree, tmp_path / "optimizer")
    assert {path.name for path in tmp_path.iterdir()} == {"optimizer.json", "optimizer.safetensors"}
    back = read_tree(tmp_path / "optimizer")
    assert back["groups"] == tree["groups"] and isinstance(back["groups"][0]["betas"], tuple)
    assert back["best"] == tree["best"] and back["state"].keys() == {0, 1}
    for number, state in tree["state"].items():
        for name, tensor in state.items():
            assert back["state"][number][name].dtype == tensor.dtype
            assert torch.equal(back["state"][number][name], tensor)
    assert back["state"][0]["qmap"] is back["state"][1]["qmap"]
    write_tree({"scale": 2.0}, tmp_path / "scaler")
    assert not (tmp_path / "scaler.safetensors").exists() and read_tree(tmp_path / "scaler") == {"scale": 2.0}
    with pytest.raises(AssertionError, match="needs a pickle"):
        write_tree({"x": object()}, tmp_path / "x")
    with pytest.raises(CheckpointFault, match=r"nothing\.json: not there"):
        read_tree(tmp_path / "nothing")


def test_random_numbers_go_on_where_they_were():
    def draw():
        return random.random(), np.random.standard_normal(), torch.rand(3).tolist()

    draw()  # NumPy keeps the second of two normal numbers
    kept = json.loads(json.dumps(random_state()))
    first = draw()
    assert draw() != first
    set_random_state(kept)
    assert draw() == first


def test_nothing_of_ours_is_a_pickle(finished):
    words = re.compile(r"torch\.(save|load)\(|pickle\.(load|dump)|import (pickle|joblib)|allow_pickle=True")
    files = list((ROOT / "baichuan_sft").rglob("*.py"))
    assert len(files) > 50
    (reader,) = [path for path in files if words.search(path.read_text())]
    assert reader == ROOT / "baichuan_sft" / "checkpoint" / "files.py"  # the vendor's .bin files
    loads = [line for line in reader.read_text().splitlines() if words.search(line)]
    assert loads and all("weights_only=True" in line for line in loads)
    found = [path.name for path in finished.rglob("*") if path.suffix in (".pt", ".pth", ".bin", ".pkl")]
    assert found == []
    assert (finished / "checkpoint-1" / "optimizer.safetensors").is_file()


def test_a_schedule_goes_on_with_the_rate_that_is_asked_for():
    def schedule(rate):
        weight = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([weight], lr=rate)
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    one = schedule(0.3)
    for _ in range(3):
        one.optimizer.step()
        one.step()
    same, other = schedule(0.3), schedule(0.6)
    for new, factor in ((same, 1), (other, 2)):
        load_schedule(new, one.state_dict())
        assert new.get_last_lr() == [factor * one.get_last_lr()[0]]
        one_more = schedule(0.3 * factor)
        for _ in range(4):
            one_more.optimizer.step()
            one_more.step()
        new.optimizer.step()
        new.step()
        assert new.optimizer.param_groups[0]["lr"] == one_more.optimizer.param_groups[0]["lr"]


# --- the rows of an update --------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_update_has_the_same_rows_on_any_number_of_ranks(strategy):
    """One order for 1 to 7 ranks, of batches of 1 to 3 rows; where 12 rows do not come out even, holes."""
    lengths = np.random.default_rng(1).integers(1, 90, 100)
    straight = RowOrder(lengths, batch_size=3, accumulation=2, world_size=2, strategy=strategy, seed=7)
    assert straight.rows_per_update == 12
    holes = 0
    for world_size in range(1, 8):
        for batch_size in (1, 2, 3):
            accumulation = -(-12 // (world_size * batch_size))
            cut = dict(batch_size=batch_size, accumulation=accumulation, world_size=world_size)
            ranks = [
                RowOrder(lengths, rows_per_update=12, rank=rank, strategy=strategy, seed=7, **cut)
                for rank in range(world_size)
            ]
            for epoch in (0, 1):
                for order in (straight, *ranks):
                    order.set_epoch(epoch)
                batches = [list(order) for order in ranks]
                assert len({len(taken) for taken in batches}) == 1
                assert len(batches[0]) == len(ranks[0]) == straight.num_updates * accumulation
                for number, expected in enumerate(straight.updates()):
                    steps = slice(number * accumulation, (number + 1) * accumulation)
                    taken = [row for rank in batches for batch in rank[steps] for row in batch]
                    assert max(len(batch) for rank in batches for batch in rank) <= batch_size
                    holes += taken.count(EMPTY_ROW)
                    assert sorted(row for row in taken if row != EMPTY_ROW) == sorted(expected)
    assert holes > 0


# --- what is asked for ------------------------------------------------------------------------------


def test_every_flag_is_compared_or_known_to_be_free():
    """A flag that a run may change must exist, and what is free may not be allowed or decide rows as well."""
    from fnmatch import fnmatch

    names = {name for section in SECTIONS for name in section.__dataclass_fields__}
    assert set(ROWS) <= names and set(ALLOWED) <= names and not set(ROWS) & set(ALLOWED)
    assert not [name for name in (*ROWS, *ALLOWED) if any(fnmatch(name, pattern) for pattern in FREE)]
    deciding = (
        "learning_rate weight_decay adam_beta2 optim bf16 fp16 lora_rank lora_dropout freeze seed".split()
    )
    assert not [name for name in deciding if any(fnmatch(name, pattern) for pattern in FREE)]


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {},
            r"out holds checkpoint-4, .* of a run \(model .*data .*seed 5\).*--resume auto",
        ),
        ({"resume": "newest-one"}, "--resume newest-one: no such directory"),
        ({"resume": "auto", "resume_from_checkpoint": True}, "are both given; keep one"),
        ({"resume": "auto", "overwrite_output_dir": True}, "--resume auto does not; keep one"),
        ({"resume": "auto", "allow_change": "lerning_rate"}, "did you mean 'learning_rate'"),
        ({"resume": "auto", "allow_change": "seed"}, "--allow_change seed is not possible"),
    ],
)
def test_what_is_refused_before_anything_is_read(train, stopped, change, message):
    with pytest.raises(UserError, match=message):
        train(**change)
    assert (stopped / "checkpoint-4" / "COMMIT").exists()


def test_without_checkpoints_auto_begins_and_true_does_not(train, tmp_path):
    with pytest.raises(UserError, match="no checkpoint-"):
        train(resume_from_checkpoint=True)
    assert sorted(numbers(train(resume="auto", max_steps=1))) == [1]


def test_overwriting_begins_anew_and_removes_the_old_checkpoints(train, stopped, finished):
    train(overwrite_output_dir=True, max_steps=1, save_steps=5)
    assert sorted(numbers(stopped)) == [1]
    assert [path.name for path in stopped.glob("checkpoint-*")] in ([], ["checkpoint-1"])


# --- going on ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{"resume": "auto"}, {"resume_from_checkpoint": True}, {"resume": 2}])
def test_a_stopped_run_goes_on_bit_for_bit(train, stopped, finished, how):
    if how.get("resume") == 2:
        how = {"resume": stopped / "checkpoint-2"}
    train(**how)
    assert_went_on(stopped, finished, 3 if "resume" in how and how["resume"] != "auto" else 5)


def test_adapters_go_on_bit_for_bit_with_an_8_bit_optimizer(train, tmp_path):
    pytest.importorskip("bitsandbytes")
    options = dict(use_lora=True, lora_dropout=0.1, lora_rank=64, lora_target="all-linear")
    options |= dict(optim="adamw_bnb_8bit", optim_args=None)
    straight = train(output_dir=tmp_path / "straight", **options)
    again = train(output_dir=tmp_path / "again", **options, resume=straight / "checkpoint-4")
    assert [numbers(straight)[step] for step in (5, 6)] == [numbers(again)[step] for step in (5, 6)]
    result = "adapter_model.safetensors"
    assert sha256_of(straight / result) == sha256_of(again / result)
    from safetensors.torch import load_file

    states = load_file(straight / "checkpoint-4" / "optimizer.safetensors").values()
    assert any(state.dtype == torch.uint8 for state in states)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "no COMMIT": lambda path: (path / "COMMIT").unlink(),
    "model.safetensors: checksum differs": lambda path: flip(path / "model.safetensors"),
    "optimizer.safetensors: checksum differs": lambda path: flip(path / "optimizer.safetensors"),
    "rng_state_0.json: missing": lambda path: (path / "rng_state_0.json").unlink(),
    "trainer_state.json: .* short": lambda path: (path / "trainer_state.json").write_text(""),
    "manifest.json": lambda path: flip(path / "manifest.json"),
}


@pytest.mark.parametrize("problem", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(train, stopped, finished, capsys, problem):
    DAMAGE[problem](stopped / "checkpoint-4")
    train(resume="auto")
    assert re.search(rf"checkpoint-4: .*{problem}.*, using checkpoint-3", capsys.readouterr().out)
    assert_went_on(stopped, finished, 4)


def test_a_damaged_checkpoint_that_was_asked_for_is_refused(train, stopped):
    flip(stopped / "checkpoint-4" / "model.safetensors")
    with pytest.raises(CheckpointFault, match=r"checkpoint-4: model\.safetensors: checksum differs"):
        train(resume=stopped / "checkpoint-4")
    for path in stopped.glob("checkpoint-*"):
        (path / "COMMIT").unlink(missing_ok=True)
    with pytest.raises(CheckpointFault, match=r"checkpoint-4: .*checkpoint-1: "):
        train(resume_from_checkpoint=True)


def test_a_run_without_a_whole_checkpoint_begins_anew(train, stopped, finished, capsys):
    for path in stopped.glob("checkpoint-*"):
        (path / "COMMIT").unlink()
    train(resume="auto")
    assert "checkpoint-4: incomplete (no COMMIT), beginning anew" in capsys.readouterr().out
    assert_went_on(stopped, finished, 1)


# --- the same run -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"learning_rate": 2e-3}, "--learning_rate was 0.001, is 0.002.*--allow_change learning_rate takes"),
        ({"weight_decay": 0.1}, r"--weight_decay was 0.0001, is 0.1\. Resume with"),
        ({"seed": 6}, "--seed was 5, is 6. The rows would come in another order"),
        ({"packing_tokens": 64}, "--packing_tokens was 128, is 64.*--packing_tokens 128 --per_device_tr"),
        ({"gradient_accumulation_steps": 5}, "rows per update was 6, is 15.*--gradient_accumulation_steps 2"),
        ({"data_path": ROOT / "data" / "messages_chat.jsonl"}, "the content of the data was"),
        ({"num_train_epochs": 3, "adam_beta2": 0.9}, "--num_train_epochs was 2.*--adam_beta2 was 0.98, is 0"),
        ({"bf16": True}, "--bf16 was False, is True"),
        ({"use_lora": True, "learning_rate": 1e-3}, "--use_lora was False, is True"),
    ],
)  # fmt: skip
def test_another_run_is_refused_with_what_differs(train, stopped, change, message, capsys):
    with pytest.raises(UserError, match=message):
        train(resume="auto", **change)
    if "gradient" not in message and "rows per" not in message:
        assert re.search(r"^ +was +is$", capsys.readouterr().out, re.MULTILINE)
    assert (stopped / "checkpoint-4" / "COMMIT").exists()


def test_another_model_is_refused(train, stopped, tmp_path, nano):
    other = tmp_path / "other"
    shutil.copytree(nano, other)
    content = bytearray((other / "model.safetensors").read_bytes())
    content[-1000:] = bytes(1000)
    (other / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="the base model was"):
        train(resume="auto", model_name_or_path=other)


def test_what_changes_no_result_may_change(train, stopped, finished, tmp_path, nano):
    """The model and the data under other names, other saves, another cut of each update."""
    shutil.copytree(nano, tmp_path / "moved")
    shutil.copy(DATA, tmp_path / "moved.json")
    train(
        resume="auto",
        model_name_or_path=tmp_path / "moved",
        data_path=tmp_path / "moved.json",
        save_steps=2,
        dataloader_num_workers=1,
    )
    assert_went_on(stopped, finished, 5)


@pytest.mark.parametrize("batch, micro_batches", [(4, 2), (2, 3), (1, 6)])
def test_another_batch_takes_the_same_rows(train, plain, tmp_path, capsys, batch, micro_batches):
    again = train(resume=plain / "checkpoint-2", **PLAIN, per_device_train_batch_size=batch)
    said = (
        f"6 rows per update as before, on 1 ranks x {micro_batches} micro-batches of up to {batch} rows (was"
    )
    assert said in capsys.readouterr().out
    assert_close(again, plain, [3, 4, 5, 6])


def test_an_allowed_change_takes_effect(train, stopped, finished):
    train(
        resume="auto", learning_rate=2e-3, num_train_epochs=3, allow_change="learning_rate,num_train_epochs"
    )
    rows = log_of(stopped)[6:]  # after those of the whole run
    assert [row["step"] for row in rows] == [5, 6, 7, 8, 9]
    # a cosine of nine updates, at the fifth
    assert rows[0]["learning_rate"] == pytest.approx(2e-3 * 0.5 * (1 + np.cos(np.pi * 4 / 9)), rel=1e-6)
    assert rows[0]["loss"] == log_of(finished)[4]["loss"]  # that of the weights before


# --- the end ----------------------------------------------------------------------------------------


def test_a_finished_run_says_so(train, finished, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    before = (out / "COMMIT").stat().st_mtime_ns
    train(resume="auto")
    assert re.search(r"checkpoint-6: already at update 6 of 6; the result lies in", capsys.readouterr().out)
    assert (out / "COMMIT").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"checkpoint-6: already at update 6 of 6, nothing is left"):
        train(resume=out / "checkpoint-6")


def test_a_run_killed_before_its_result_was_saved_saves_it(train, finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / "COMMIT").unlink()
    (out / "model.safetensors").unlink()
    train(resume="auto")
    assert weights(out) == weights(finished)
    assert len(log_of(out)) == 6  # no update more


def test_the_result_of_another_run_is_not_taken_for_this_ones(train, finished, tmp_path):
    """--overwrite_output_dir leaves the old result until the new one is written; the kill comes before."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    train(overwrite_output_dir=True, seed=6)
    other = weights(out)
    assert other != weights(finished)
    for path in finished.iterdir():
        if path.is_file():
            shutil.copy2(path, out)
    train(resume="auto", seed=6)
    assert weights(out) == other


def test_a_restart_of_a_launch_repeats_its_flags_and_goes_on(train, finished, tmp_path, monkeypatch, capsys):
    """What the launch has saved counts; before its first save it begins where its flags say."""
    monkeypatch.setenv("BAICHUAN_SFT_LAUNCH", "8f3c:0")
    start = {"resume": finished / "checkpoint-4"}
    train(**start)
    out = tmp_path / "out"
    (out / "COMMIT").unlink()
    shutil.rmtree(out / "checkpoint-6")
    monkeypatch.setenv("BAICHUAN_SFT_LAUNCH", "8f3c:1")
    train(**start)
    assert "resume: " + str(out / "checkpoint-5") in capsys.readouterr().out
    assert weights(out) == weights(finished)
    shutil.rmtree(out)
    train(**start)  # lost before its first save
    assert sorted(numbers(out)) == [5, 6] and weights(out) == weights(finished)


@pytest.mark.slow
def test_a_killed_run_goes_on_by_itself(nano, finished, tmp_path):
    command = [
        sys.executable,
        "-m",
        "baichuan_sft.cli",
        "train",
        *options_of(nano, tmp_path),
        "--resume",
        "auto",
    ]
    running = subprocess.Popen(
        command, env=environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    until = time.monotonic() + 400
    while not (tmp_path / "out" / "checkpoint-2" / "COMMIT").exists():
        assert running.poll() is None and time.monotonic() < until, running.stdout.read().decode()
        time.sleep(0.01)
    os.kill(running.pid, signal.SIGKILL)
    running.communicate()
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first = int(re.search(r"resume: .*checkpoint-(\d)", done.stdout).group(1))
    assert first >= 2
    assert weights(tmp_path / "out") == weights(finished)
    straight = numbers(finished)
    assert all(straight[step] == value for step, value in numbers(tmp_path / "out").items())
