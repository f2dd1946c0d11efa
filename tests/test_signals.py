"""Signals, and ranks that die, in real runs: what is saved, who ends when, and with which exit code."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fixtures import ROOT, SMALL_VOCABULARY, tiny_config
from launching import BIN, environment, flags, free_port

from baichuan_sft import load_tokenizer
from baichuan_sft.commit import checkpoints, problems
from baichuan_sft.errors import EnvironmentFault
from baichuan_sft.model.modeling_baichuan import BaichuanForCausalLM
from baichuan_sft.train.workers import lost_worker, naming_lost_workers

pytestmark = pytest.mark.slow

FINE_TUNE = ROOT / "fine-tune" / "fine-tune.py"
START_SECONDS = 400  # of imports, on a machine that has other things to do


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nano")
    torch.manual_seed(0)
    BaichuanForCausalLM(tiny_config("baichuan2-13b")).save_pretrained(folder)
    load_tokenizer(SMALL_VOCABULARY).save_pretrained(folder)
    return folder


class Run:
    """A run that would go on for an hour, started as a user starts it."""

    def __init__(self, nano, folder, launcher=(), **options):
        data = ROOT / "data" / "belle_chat.json"
        values = dict(model_name_or_path=nano, data_path=data, output_dir=folder / "out", use_cpu=True)
        values |= dict(cache_dir=folder / "cache", model_max_length=128, per_device_train_batch_size=1)
        values |= dict(max_steps=100_000, save_strategy="no", check_reload=False) | options
        self.status, self.out, self.log = folder / "status", folder / "out", folder / "log"
        self.status.mkdir()
        words = [*(launcher or [sys.executable]), FINE_TUNE, *flags(**values)]
        self.process = subprocess.Popen(
            [str(word) for word in words],
            env={**environment(), "BAICHUAN_SFT_STATUS": str(self.status)},
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def facts(self, rank=0):
        path = self.status / f"rank-{rank}.json"
        return json.loads(path.read_text()) if path.exists() else {"phase": "", "step": 0}

    def until(self, ready):
        end = time.monotonic() + START_SECONDS
        while not ready(self.facts()):
            assert self.process.poll() is None and time.monotonic() < end, self.text()
            time.sleep(0.01)
        return self

    def send(self, signum, rank=0):
        self.sent = time.monotonic()
        os.kill(self.facts(rank)["pid"], signum)

    def ends(self, within):
        code = self.process.wait(START_SECONDS)
        assert time.monotonic() - self.sent < within, self.text()
        return code

    def text(self):
        return self.log.read_text()


@pytest.fixture
def start(nano, tmp_path):
    runs = []

    def call(*launcher, **options):
        runs.append(Run(nano, tmp_path, launcher, **options))
        return runs[-1]

    yield call
    left = []
    for run in runs:
        left += session(run.process.pid)
        for pid in session(run.process.pid):
            os.kill(pid, signal.SIGKILL)
        run.process.wait()
    assert left == [], "processes outlived their run"


def session(leader):
    """Processes of a session that are no zombies."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{entry}/stat") as stat:
                fields = stat.read().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if fields[3] == str(leader) and fields[0] != "Z":
            found.append(int(entry))
    return found


def deepspeed():
    return [BIN / "deepspeed", "--hostfile=", "--num_gpus", "2", "--master_port", free_port()]


def torchrun():
    return [BIN / "torchrun", "--nproc_per_node", "2", "--master_port", free_port()]


def saved(run):
    """Steps of the checkpoints, each of them whole."""
    found = checkpoints(run.out)
    assert [problems(path) for path in found] == [[]] * len(found)
    return [int(path.name.partition("-")[2]) for path in found]


@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGINT", 130)])
def test_the_first_signal_saves_and_ends(start, name, code):
    run = start().until(lambda facts: facts["step"] >= 2)
    run.send(signal.Signals[name])
    assert run.ends(within=60) == code, run.text()
    (step,) = saved(run)
    assert f"{name}: saving checkpoint-{step}, then exit {code}\n" in run.text()
    assert f"{name}: checkpoint-{step} is saved; --resume auto goes on from there\n" in run.text()
    assert "Traceback" not in run.text() and not (run.out / "model.safetensors").exists()
    assert run.facts()["error"]["exit_code"] == code


def test_a_signal_saves_where_nobody_reads_any_more(start):
    """As after Ctrl-C in ``train | tee log``, which ends tee too."""
    deaf = 'exec "$@" > >(head -n 1 > /dev/null) 2>&1'
    run = start("bash", "-c", deaf, "bash", sys.executable).until(lambda facts: facts["step"] >= 2)
    run.send(signal.SIGINT)
    assert run.ends(within=60) == 130
    assert len(saved(run)) == 1


def test_the_second_signal_ends_at_once(start):
    run = start(gradient_accumulation_steps=5000).until(lambda facts: facts["phase"] == "train")
    time.sleep(2)
    run.send(signal.SIGINT)
    time.sleep(1.5)  # longer than what counts as the same Ctrl-C
    assert run.process.poll() is None
    run.send(signal.SIGINT)
    assert run.ends(within=10) == 130
    assert "SIGINT again: ends at once, the last whole checkpoint stays" in run.text() and saved(run) == []


def test_a_signal_before_the_first_update_has_nothing_to_save(start):
    run = start().until(lambda facts: facts["phase"] in ("data", "model"))
    run.send(signal.SIGTERM)
    assert run.ends(within=30) == 143
    assert "SIGTERM: ended before the first update, there is nothing to save" in run.text()
    assert "Traceback" not in run.text()


def test_a_signal_during_an_evaluation_leaves_it(start):
    options = dict(eval_strategy="steps", eval_steps=1, dev_ratio=0.5, per_device_eval_batch_size=1)
    run = start(**options).until(lambda facts: facts["step"] >= 2)
    run.send(signal.SIGTERM)
    assert run.ends(within=60) == 143
    assert len(saved(run)) == 1


@pytest.mark.parametrize("launcher", [deepspeed, torchrun])
def test_a_signal_to_one_rank_stops_both(start, launcher):
    options = dict(deepspeed=ROOT / "recipes" / "zero2.json") if launcher is deepspeed else {}
    run = start(*launcher(), **options).until(lambda facts: facts["step"] >= 2)
    run.send(signal.SIGTERM, rank=1)
    assert run.ends(within=60) != 0
    (step,) = saved(run)
    assert f"SIGTERM: saving checkpoint-{step}, then exit 143\n" in run.text()
    assert [run.facts(rank)["error"]["exit_code"] for rank in (0, 1)] == [143, 143]
    assert 'Traceback (most recent call last):\n  File "' + str(FINE_TUNE) not in run.text()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_other_and_the_launcher(start, rank):
    """Under the plain `deepspeed`: 10 s until the other rank is gone."""
    run = start(*deepspeed()).until(lambda facts: facts["step"] >= 2)
    other = run.facts(1 - rank)["pid"]
    run.send(signal.SIGKILL, rank=rank)
    while os.path.exists(f"/proc/{other}"):
        assert time.monotonic() - run.sent < 10, run.text()
        time.sleep(0.1)
    assert run.ends(within=START_SECONDS) != 0
    assert run.text().count(f"rank {rank}: its process is gone, last step ") == 1
    assert "Traceback" not in run.text()


LEAVES_A_WORKER = """
import torch
from baichuan_sft.train.signals import handled, ignore_in_worker

loader = torch.utils.data.DataLoader(range(10_000), num_workers=2, worker_init_fn=ignore_in_worker)
with handled():
    rows = iter(loader)
    next(rows)
    raise ValueError("the error that ended it")
"""


def test_an_error_does_not_wait_for_loader_workers():
    """They ignore SIGTERM, with which Python would end them before it waits for them."""
    command = [sys.executable, "-c", LEAVES_A_WORKER]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment(), cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("ValueError: the error that ended it")


def test_a_worker_killed_with_a_batch_in_its_hands_is_known_from_the_broken_socket(monkeypatch):
    loader = torch.utils.data.DataLoader(list(torch.eye(64)), num_workers=1, multiprocessing_context="fork")
    rows = iter(loader)
    (worker,) = rows._workers
    next(rows)
    while rows._data_queue.empty():
        time.sleep(0.01)
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would be first to tell
    monkeypatch.setattr(worker, "is_alive", lambda: True)  # as it is for a moment
    worker.kill()
    worker.join()
    with pytest.raises((OSError, EOFError)) as caught:
        for _ in range(3):
            next(rows)
    signal.signal(signal.SIGCHLD, before)
    assert "DataLoader worker" not in str(caught.value)
    assert lost_worker(caught.value) == "a DataLoader worker"
    named = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
    assert lost_worker(named) == "DataLoader worker (pid 7)"
    assert lost_worker(OSError("no such disk")) is None


CUT_OFF = """
import sys
from baichuan_sft.train.signals import ignore_in_worker

ignore_in_worker(0)
for error in (ConnectionResetError("cut off"), EOFError("cut off"), ValueError("its own")):
    try:
        raise error
    except Exception:
        sys.excepthook(*sys.exc_info())  # as the thread does that hands batches over
"""


def test_a_worker_that_its_rank_cut_off_says_nothing():
    words = [sys.executable, "-c", CUT_OFF]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=environment(), cwd=ROOT)
    assert "ValueError: its own" in done.stderr and "cut off" not in done.stderr


class Reset(ConnectionResetError):
    """A broken socket, while whose error is read the signal of the worker's end arrives."""

    def __str__(self):
        os.kill(os.getpid(), signal.SIGCHLD)
        return "reset by peer"


@pytest.mark.parametrize("late", [False, True], ids=["at once", "while the first error is read"])
def test_a_worker_that_is_told_twice_is_one_error(monkeypatch, late):
    """First by its broken socket, then by torch's handler, which raises wherever the process is."""

    def torchs(signum, frame):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    def _try_get_data():
        raise Reset if late else ConnectionResetError("reset by peer")

    set_handler = signal.signal

    def interrupted(signum, handler):  # looks for signals that have arrived before it changes anything
        if not late:
            os.kill(os.getpid(), signal.SIGCHLD)
        return set_handler(signum, handler)

    before = signal.signal(signal.SIGCHLD, torchs)
    monkeypatch.setattr(signal, "signal", interrupted)
    try:
        with pytest.raises(EnvironmentFault, match=r"DataLoader worker( \(pid 7\))? was killed"):
            naming_lost_workers(_try_get_data)
    finally:
        set_handler(signal.SIGCHLD, before)


def test_another_error_is_told_as_it_is_in_any_thread():
    def train():
        raise RuntimeError("CUDA out of memory")

    before = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(RuntimeError, match="out of memory"):
        naming_lost_workers(train)
    assert signal.getsignal(signal.SIGCHLD) == before
    with ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match="out of memory"):
        pool.submit(naming_lost_workers, train).result()
