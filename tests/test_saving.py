"""Saves under mishaps: killed at any call, power cut, full disk, failing rank, two runs in one directory."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import pytest
import torch
from fixtures import ROOT, SMALL_VOCABULARY, tiny_config
from launching import deepspeed, environment, flags, free_port, log_of, run
from safetensors.torch import load_file, save_file

from baichuan_sft import BaichuanForCausalLM, commit, load_model, load_tokenizer
from baichuan_sft.errors import CheckpointFault, EnvironmentFault, NumericalFault, UserError
from baichuan_sft.train import lock, space
from baichuan_sft.train.saving import Saving
from baichuan_sft.train.sft import main
from baichuan_sft.train.trainer import SftTrainer

DATA = ROOT / "data" / "belle_chat.json"
CHILD, PRELOADED = ROOT / "tests" / "crash_save.py", ROOT / "tests" / "crashpoint.c"
# Every 7th call in CI, in less than a minute; all of them with BAICHUAN_SFT_SOAK=1.
STRIDE = 1 if os.environ.get("BAICHUAN_SFT_SOAK") else 7


def make_tiny(directory, seed=0):
    torch.manual_seed(seed)
    BaichuanForCausalLM(tiny_config("baichuan2-13b")).save_pretrained(directory)
    load_tokenizer(SMALL_VOCABULARY).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def words(tiny, out, **options):
    values: dict = {
        "model_name_or_path": tiny,
        "data_path": DATA,
        "output_dir": out,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "save_strategy": "steps",
        "save_steps": 2,
        "check_reload": False,
        "seed": 5,
    }
    return flags(**(values | options))


@pytest.fixture
def train(tiny, tmp_path):
    def call(**options):
        out = options.pop("output_dir", tmp_path / "out")
        base = options.pop("base", tiny)
        assert main(words(base, out, cache_dir=tmp_path / "cache", **options)) == 0
        return out

    return call


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """A result with checkpoint-2 in it, not to be changed."""
    out = tmp_path_factory.mktemp("trained") / "out"
    assert main(words(tiny, out, max_steps=2, cache_dir=out.with_name("cache"))) == 0
    return out


def names(out):
    return [path.name for path in commit.checkpoints(out)]


# --- what a run leaves --------------------------------------------------------------------------------


def test_every_checkpoint_and_the_result_are_committed(train, capsys):
    out = train()
    assert names(out) == ["checkpoint-6", "checkpoint-4", "checkpoint-2"]
    for path in (*commit.checkpoints(out), out):
        assert commit.problems(path) == []
    assert capsys.readouterr().out.count(" committed, training waited ") == 3
    listed = commit.read_manifest(out)["files"]
    assert {"model.safetensors", "config.json", "tokenizer.model", "run.json"} <= listed.keys()
    assert not any(name.startswith(("checkpoint-", "trainer_log", "loss.png", lock.NAME)) for name in listed)
    assert not (out / lock.NAME).exists()
    assert not list(out.rglob("training_args.bin"))


def test_retention_follows_a_commit(train):
    out = train(save_total_limit=1)
    assert names(out) == ["checkpoint-6"]
    assert commit.problems(out / "checkpoint-6") == []


@pytest.mark.parametrize("options", [{}, {"use_lora": True}], ids=["full", "lora"])
def test_saving_in_the_background_changes_no_result(train, tmp_path, options):
    one = train(output_dir=tmp_path / "async", async_save=True, **options)
    other = train(output_dir=tmp_path / "sync", async_save=False, **options)
    rows = [[row["loss"].hex() for row in log_of(out)] for out in (one, other)]
    assert rows[0] == rows[1] and len(rows[0]) == 6
    for path in one.rglob("*.safetensors"):
        left, right = load_file(path), load_file(other / path.relative_to(one))
        assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_a_result_that_was_interrupted_does_not_count(train, monkeypatch):
    out = train(save_strategy="no")
    monkeypatch.setattr("baichuan_sft.train.saving.verify", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(output_dir=out, save_strategy="no", overwrite_output_dir=True)
    with pytest.raises(CheckpointFault, match=r"incomplete \(no COMMIT\)"):
        load_model(out)


# --- mishaps at every call of a save ------------------------------------------------------------------


@pytest.fixture(scope="module")
def mishaps(tiny, tmp_path_factory):
    """Ends of a save that was killed before each call, cut off from power there, or out of disk space."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler for the calls that kill")
    place = tmp_path_factory.mktemp("mishaps")
    library = place / "crashpoint.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", library, PRELOADED, "-ldl", "-lpthread"]
    subprocess.run([str(word) for word in command], check=True)
    options = {"max_steps": 4, "save_total_limit": 1, "cache_dir": place / "cache"}
    done = run(
        [sys.executable, CHILD, place / "results.json", STRIDE, *words(tiny, place / "out", **options)],
        LD_PRELOAD=str(library),
        PYTHONPATH=str(ROOT),
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout
    return json.loads((place / "results.json").read_text()), done.stdout


@pytest.mark.slow
def test_a_save_without_mishap_is_the_newest(mishaps):
    whole = mishaps[0]["whole"]
    assert whole["chosen"] == "checkpoint-4" and whole["left"] == ["checkpoint-4"]
    assert whole["calls"] > 100  # of every file at least creation, writing and fsync


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kill", "power_cut"])
def test_killed_at_any_call_the_last_or_the_one_before_loads(mishaps, kind):
    ends = mishaps[0][kind]
    assert len(ends) >= mishaps[0]["whole"]["calls"] // STRIDE
    assert {end["status"] for end in ends} == {signal.SIGKILL}
    chosen = [end["chosen"] for end in ends]
    assert set(chosen) == {"checkpoint-2", "checkpoint-4"}  # None would be a run that is lost
    assert chosen == sorted(chosen)
    for end in ends:
        incomplete = ["checkpoint-4: incomplete (no COMMIT), using checkpoint-2"]
        assert end["lines"] == (incomplete if end["left"][0] != end["chosen"] else [])


@pytest.mark.slow
def test_a_full_disk_leaves_the_checkpoint_before_and_nothing_else(mishaps):
    ends = mishaps[0]["full"]
    assert len(ends) == 50
    for end in ends:
        assert (end["status"], end["failed"]) == (0, 1)
        assert (end["chosen"], end["left"]) == ("checkpoint-2", ["checkpoint-2"])
    said = [line for line in mishaps[1].splitlines() if line.startswith("checkpoint-4: not saved")]
    assert len(said) == 50
    expected = re.compile(r" \(1 of 3 in a row\), no space: need 7\.\d\d MB, ")
    assert all(expected.search(line) for line in said), said[0]


# --- disk space ---------------------------------------------------------------------------------------


def torch_writer():
    torch.save({"a": torch.zeros(1000)}, "/dev/full")


def text_writer():
    with open("/dev/full", "w") as file:
        file.write("a" * 100_000)


def hidden_writer():
    try:
        text_writer()
    except OSError:
        raise ValueError("cannot save") from None


@pytest.mark.parametrize("writer", [torch_writer, text_writer, hidden_writer])
def test_a_full_disk_is_recognised_behind_any_writer(writer):
    with pytest.raises((OSError, RuntimeError, ValueError)) as caught:
        writer()
    assert space.disk_reason(caught.value) == "no space"


def test_other_errors_are_not_the_disk(tmp_path):
    for error in (ValueError("x"), OSError(errno.ENOENT, "x"), RuntimeError("shape"), KeyError(28)):
        assert space.disk_reason(error) is None
    with pytest.raises(Exception, match=r"os error 2\b") as caught:
        save_file({"a": torch.zeros(2)}, tmp_path / "absent" / "x.safetensors")
    assert space.disk_reason(caught.value) is None
    for number in (errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.ENOSPC):
        assert space.disk_reason(OSError(number, "x")) == space.DISK[number]
        rust = RuntimeError(f"Error while serializing: I/O error: something (os error {number})")
        assert space.disk_reason(rust) == space.DISK[number]


@pytest.mark.parametrize(
    "size, text",
    [(0, "0 bytes"), (999, "999 bytes"), (255e6, "255 MB"), (1.2e12, "1.2 TB"), (1e16, "1e+04 TB")],
)
def test_sizes_read_as_a_disk_is_sold(size, text):
    assert space.short(size) == text


def test_a_run_that_will_not_fit_is_refused_at_the_start(train, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1e9, 1e9, 10e6))
    with pytest.raises(
        EnvironmentFault,
        match=r"no space: 3 checkpoints of 7.\d+ MB and the result of 2.\d+ MB, "
        r"need 2\d.\d MB, 10 MB free on /.*--save_total_limit 1",
    ) as caught:
        train()
    assert caught.value.exit_code == 3
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1e9, 1e9, 20e6))
    train(save_total_limit=1)  # two of them at a time, and the result


def test_an_estimate_is_near_what_is_written(trained, tiny):
    """In bytes: from the shapes before, from the files afterwards, without code, tokenizer and logs."""
    out, model = trained, load_model(tiny)
    checkpoint, result = space.estimate(model, "adamw_torch", False)
    files = commit.read_manifest(out / "checkpoint-2")["files"]
    other = sum(entry["size"] for name, entry in files.items() if not name.endswith(".safetensors"))
    assert sum(entry["size"] for entry in files.values()) - other == pytest.approx(checkpoint, rel=0.01)
    assert files["model.safetensors"]["size"] == pytest.approx(result, rel=0.01)


def test_an_output_directory_that_takes_no_files_is_refused_at_the_start(train, tmp_path):
    (tmp_path / "file").write_text("here")
    with pytest.raises(UserError) as caught:
        train(output_dir=tmp_path / "file")
    assert "file" in str(caught.value)


def test_a_disk_that_stays_full_ends_the_run(train, tmp_path, monkeypatch, capsys):
    def full(directory, names, rank=0):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(commit, "entries_of", full)
    with pytest.raises(
        EnvironmentFault, match=r"checkpoint-4: not saved \(2 of 2 in a row\), no space: need "
    ) as caught:
        train(max_failed_saves=2)
    assert caught.value.exit_code == 3
    assert "checkpoint-2: not saved (1 of 2 in a row), no space: need " in capsys.readouterr().out
    assert names(tmp_path / "out") == []


def test_failures_that_are_not_in_a_row_do_not_add_up(train, monkeypatch):
    entries_of, calls = commit.entries_of, []

    def full_every_other_time(*args):
        calls.append(args)
        if len(calls) in (1, 3):
            raise OSError(errno.EIO, "Input/output error")
        return entries_of(*args)

    monkeypatch.setattr(commit, "entries_of", full_every_other_time)
    out = train(max_steps=8, max_failed_saves=2)
    assert names(out) == ["checkpoint-8", "checkpoint-4"]


def test_a_log_that_cannot_be_written_ends_no_run(train, monkeypatch, capsys):
    def full(path, *args, **kwargs):
        return open("/dev/full" if str(path).endswith("trainer_log.jsonl") else path, *args, **kwargs)

    monkeypatch.setattr("baichuan_sft.train.record.open", full, raising=False)
    train(max_steps=2, save_strategy="no")
    assert capsys.readouterr().out.count("trainer_log.jsonl: not written (no space)") == 1


def test_bad_numbers_after_a_save_do_not_cost_it(train, monkeypatch, tmp_path):
    """The step after a save is bad, and found so before the save is committed."""
    monkeypatch.setattr(Saving, "hashed_everywhere", lambda self: False)
    compute_loss = SftTrainer.compute_loss

    def bad(self, *args, **kwargs):
        if self.state.global_step == 2:
            fault = NumericalFault("step 3: the loss is nan")
            fault.everywhere = True
            raise fault
        return compute_loss(self, *args, **kwargs)

    monkeypatch.setattr(SftTrainer, "compute_loss", bad)
    with pytest.raises(NumericalFault):
        train()
    assert names(tmp_path / "out") == ["checkpoint-2"]
    assert commit.problems(tmp_path / "out" / "checkpoint-2") == []


def test_the_end_of_a_loader_worker_is_no_writers_error():
    """torch raises it wherever the process is; the other ranks are inside the writer's collectives."""
    saving = types.SimpleNamespace(fault=None)

    def fails(said):
        raise RuntimeError(said)

    with pytest.raises(RuntimeError, match="worker"):
        Saving._attempt(saving, fails, "DataLoader worker (pid 7) is killed by signal: Killed.")
    assert saving.fault is None
    Saving._attempt(saving, fails, "disk")
    assert str(saving.fault) == "disk"


def test_no_room_for_the_result_is_said(train, monkeypatch):
    write = commit.write_manifest

    def full(directory, entries, **facts):
        if not directory.name.startswith("checkpoint-"):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(directory, entries, **facts)

    monkeypatch.setattr(commit, "write_manifest", full)
    with pytest.raises(EnvironmentFault, match=r"the result is not saved, no space: need .* free on /"):
        train()


# --- weights that are not what was saved --------------------------------------------------------------


def flip(path):
    content = bytearray(path.read_bytes())
    content[-7] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage, expected",
    [
        (flip, "model.safetensors: checksum differs"),
        (lambda path: os.truncate(path, path.stat().st_size - 4096), "model.safetensors: 4,096 bytes short"),
        (lambda path: path.write_bytes(b"version https://git-lfs"), "is a Git LFS pointer"),
        (lambda path: path.write_bytes(b"<html>"), "is an HTML page"),
        (lambda path: flip(path.with_name("config.json")), "config.json: checksum differs"),
        (lambda path: path.with_name("COMMIT").unlink(), r"incomplete \(no COMMIT\)"),
    ],
)
def test_damaged_weights_are_refused_before_use(trained, tmp_path, damage, expected):
    out = shutil.copytree(trained, tmp_path / "out")
    damage(out / "model.safetensors")
    with pytest.raises(CheckpointFault, match=expected) as caught:
        load_model(out)
    assert caught.value.exit_code == 4 and str(out) in str(caught.value)
    assert load_model(out / "checkpoint-2") is not None


def test_settings_may_be_edited_and_downloads_have_no_manifest(trained, tmp_path, tiny):
    out = shutil.copytree(trained, tmp_path / "out")
    settings = json.loads((out / "generation_config.json").read_text())
    (out / "generation_config.json").write_text(json.dumps(settings | {"temperature": 0.5}))
    assert load_model(out).generation_config.temperature == 0.5
    assert not (tiny / "manifest.json").exists()
    load_model(tiny)


def test_an_adapter_is_refused_on_another_base_of_its_shapes(train, tmp_path):
    base = make_tiny(tmp_path / "base")
    out = train(base=base, use_lora=True, save_strategy="no")
    load_model(out)
    BaichuanForCausalLM.from_pretrained(base).to(torch.float32).save_pretrained(base, max_shard_size="1MB")
    (base / "model.safetensors").unlink(missing_ok=True)
    load_model(out)  # the same weights in other files
    shutil.rmtree(base)
    make_tiny(base, seed=1)
    with pytest.raises(
        UserError, match=f"this adapter was trained on {base} .* has the same shapes and other weights"
    ):
        load_model(out)


# --- locks --------------------------------------------------------------------------------------------


HOLD = """
import sys, time
from baichuan_sft.train.lock import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def held(tmp_path):
    """An output directory that another process holds."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        text=True,
        env=environment(),
    )
    assert holder.stdout.readline() == "held\n"
    yield tmp_path, holder
    holder.kill()
    holder.wait()
    holder.stdout.close()


def test_a_second_run_is_refused_at_once_and_the_first_unharmed(held):
    path, holder = held
    before, started = (path / lock.NAME).read_bytes(), time.monotonic()
    with (
        pytest.raises(UserError, match=rf"in use by pid {holder.pid} on host \S+ since \S+ ") as caught,
        lock.locked(str(path)),
    ):
        pass
    assert time.monotonic() - started < 10
    assert caught.value.exit_code == 2
    assert (path / lock.NAME).read_bytes() == before and holder.poll() is None


def test_a_killed_runs_lock_is_taken_over_with_a_line(held, capsys):
    path, holder = held
    holder.kill()
    holder.wait()
    with lock.locked(str(path)):
        assert json.loads((path / lock.NAME).read_text())["pid"] == os.getpid()
        assert f"pid {holder.pid} is gone" in capsys.readouterr().out
    assert not (path / lock.NAME).exists()


def left_behind(path, **changes):
    (path / lock.NAME).write_text(json.dumps({**lock.identity(), **changes}))


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"pid": 2**22 + 1}, "is gone"),
        ({"started": 1}, "is another process now"),
        ({"boot": "another"}, "before this machine's last boot"),
    ],
)
def test_stale_locks_are_recognised(tmp_path, capsys, changes, reason):
    left_behind(tmp_path, **changes)
    with lock.locked(str(tmp_path)):
        assert reason in capsys.readouterr().out


@pytest.mark.parametrize("elsewhere", [{"host": "h2", "boot": "other"}, {"pids": "pid:[7]"}])
def test_another_hosts_lock_is_stale_when_it_is_no_longer_touched(tmp_path, capsys, elsewhere):
    left_behind(tmp_path, **elsewhere)
    with pytest.raises(UserError, match="in use by pid"), lock.locked(str(tmp_path)):
        pass
    hour_ago = time.time() - 3600
    os.utime(tmp_path / lock.NAME, (hour_ago, hour_ago))
    with lock.locked(str(tmp_path)):
        assert "no sign of life for 3" in capsys.readouterr().out


def test_a_restart_of_the_same_launch_takes_over_from_another_host(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("BAICHUAN_SFT_LAUNCH", "8f3c:1")
    left_behind(tmp_path, host="h2", boot="other")
    monkeypatch.setenv("BAICHUAN_SFT_LAUNCH", "another:1")
    with pytest.raises(UserError, match="in use by pid"), lock.locked(str(tmp_path)):
        pass
    monkeypatch.setenv("BAICHUAN_SFT_LAUNCH", "8f3c:1")
    with lock.locked(str(tmp_path)):
        assert "before its restart" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 3}', "\0" * 100])
def test_a_lock_with_nothing_in_it_is_taken(tmp_path, text):
    (tmp_path / lock.NAME).write_text(text)
    with lock.locked(str(tmp_path)):
        assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()


def test_a_lock_is_released_on_every_error(tmp_path):
    for error in (ValueError, KeyboardInterrupt, SystemExit):
        with pytest.raises(error), lock.locked(str(tmp_path)):
            raise error
        assert not (tmp_path / lock.NAME).exists()


def test_forks_do_not_hold_the_lock(tmp_path):
    with lock.locked(str(tmp_path)):
        child = os.fork()
        if not child:
            time.sleep(30)
            os._exit(0)
    try:
        with lock.locked(str(tmp_path)):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_only_the_first_rank_locks(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with lock.locked(str(tmp_path)):
        assert not (tmp_path / lock.NAME).exists()
    with lock.locked(str(tmp_path), each_host=True):
        assert (tmp_path / lock.NAME).exists()


# --- ranks --------------------------------------------------------------------------------------------


FAILING = """
import errno, os, sys
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from baichuan_sft.cli import run
from baichuan_sft.train.sft import main

save = TorchCheckpointEngine.save

def failing(self, state_dict, path):
    if os.environ["RANK"] == "1" and "/checkpoint-2/" in path:
        raise OSError(errno.ENOSPC, "No space left on device")
    if os.environ["RANK"] == "1" and "/checkpoint-6/" in path:
        raise TypeError("cannot be written")
    save(self, state_dict, path)

TorchCheckpointEngine.save = failing
sys.exit(run(main, [word for word in sys.argv[1:] if not word.startswith("--local_rank")]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_rank_that_cannot_write_hangs_nobody(tiny, tmp_path, stage):
    script, config = tmp_path / "failing.py", tmp_path / "zero.json"
    script.write_text(FAILING)
    settings = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto")
    zero = {"stage": stage, **({"stage3_gather_16bit_weights_on_model_save": True} if stage == 3 else {})}
    config.write_text(json.dumps({"zero_optimization": zero, **settings}))
    options = {"use_cpu": True, "deepspeed": config, "packing": False, "cache_dir": tmp_path / "cache"}
    done = deepspeed(script, *words(tiny, tmp_path / "out", **options), PYTHONPATH=str(ROOT), timeout=300)
    assert done.returncode != 0, done.stdout
    assert "checkpoint-2: not saved (1 of 3 in a row), no space: need " in done.stdout
    assert "checkpoint-4: " in done.stdout and "TypeError: cannot be written" in done.stdout
    assert names(tmp_path / "out")[-1] == "checkpoint-4"
    assert commit.newest_valid(tmp_path / "out")[0] == tmp_path / "out" / "checkpoint-4"
    writers = {
        entry["rank"] for entry in commit.read_manifest(tmp_path / "out" / "checkpoint-4")["files"].values()
    }
    assert writers == {0, 1}


OWN_DISK = """
mount --bind "$1" "$2"
shift 2
exec "$@"
"""


@pytest.mark.slow
@pytest.mark.parametrize("each_node", [False, True])
def test_hosts_with_a_disk_each(tiny, tmp_path, each_node):
    """Two hosts of one rank each, whose --output_dir is another directory on each of them."""
    if os.geteuid() or subprocess.run(["unshare", "-m", "true"]).returncode:
        pytest.skip("needs root, for a mount of each host's own")
    config, out = tmp_path / "zero.json", tmp_path / "out"
    settings = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto")
    config.write_text(json.dumps({"zero_optimization": {"stage": 2}, **settings}))
    options = {"use_cpu": True, "deepspeed": config, "packing": False, "save_on_each_node": each_node}
    train = ["train", *words(tiny, out, max_steps=2, cache_dir=tmp_path / "cache", **options)]
    program = "import sys; from baichuan_sft.cli import main; sys.exit(main())"
    out.mkdir()
    disks, hosts, port = [tmp_path / "a", tmp_path / "b"], [], str(free_port())
    for rank, disk in enumerate(disks):
        disk.mkdir()
        own = ["unshare", "-m", "bash", "-ec", OWN_DISK, "bash", str(disk), str(out)]
        world = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
        env = {**environment(), **world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [*own, sys.executable, "-c", program, *train]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        hosts.append(subprocess.Popen(command, cwd=ROOT, env=env, **pipes))
    said = [host.communicate(timeout=300)[0] for host in hosts]
    codes = [host.returncode for host in hosts]
    if not each_node:
        assert codes == [2, 2], said
        assert all("does not see what host" in text and "--save_on_each_node True" in text for text in said)
        return
    assert codes == [0, 0], said
    for rank, disk in enumerate(disks):
        assert commit.newest_valid(disk) == (disk / "checkpoint-2", [])
        files = commit.read_manifest(disk / "checkpoint-2")["files"]
        assert f"global_step2/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" in files
        assert {entry["rank"] for entry in files.values()} == {rank}
    assert commit.problems(disks[0]) == [] and not (disks[1] / "model.safetensors").exists()
