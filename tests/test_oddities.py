"""Machines that are not as one expects them: training goes on, or says in one line what it lacks."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from fixtures import ROOT
from launching import environment, error_lines, flags, log_of, make_nano

pytestmark = pytest.mark.slow

needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None, reason="mounts file systems: needs root and unshare"
)


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    return make_nano(tmp_path_factory.mktemp("nano") / "base", "--hidden_size", "64")


@pytest.fixture
def short():
    """A directory with a short name, as TMPDIR has."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        yield Path(directory)


def command(nano, out, **more) -> list[str]:
    """A short run with two saves."""
    options = dict(
        model_name_or_path=nano,
        data_path=ROOT / "data" / "belle_chat.json",
        output_dir=out,
        cache_dir=Path(out).parent / "cache",
        max_steps=4,
        per_device_train_batch_size=2,
        save_strategy="steps",
        save_steps=2,
        use_cpu=True,
    )
    words = flags(**options | more)
    return [sys.executable, ROOT / "fine-tune" / "fine-tune.py", *words]


def train(words, *, prefix=(), remove=(), **env) -> subprocess.CompletedProcess:
    settings = {name: value for name, value in environment().items() if name not in remove} | env
    return subprocess.run(
        [str(word) for word in [*prefix, *words]],
        env=settings,
        cwd=ROOT,
        timeout=300,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )


def test_all_oddities_at_once(nano, tmp_path):
    """No HOME, a home that cannot be made, locale C, few open files, no asserts, a path that shells hate."""
    odd = tmp_path / "a path 带空格 'and' \"quotes\" $HOME #1"
    odd.mkdir()
    base = shutil.copytree(nano, odd / "模型")
    # 128 open files, as in some containers
    few_files = ("bash", "-c", 'ulimit -n 128; exec "$@"', "bash")
    done = train(
        command(base, odd / "结果"),
        prefix=few_files,
        remove=("HOME", "LANG", "LC_ALL", "PYTHONIOENCODING", "BAICHUAN_SFT_CACHE"),
        LC_ALL="C",
        PYTHONOPTIMIZE="1",
        HF_HOME="/proc/nowhere",
    )
    assert done.returncode == 0, done.stdout
    assert [row["step"] for row in log_of(odd / "结果")] == [1, 2, 3, 4]
    assert (odd / "结果" / "checkpoint-4" / "COMMIT").exists()


@needs_root
def test_full_temporary_directory_and_small_shared_memory(nano, short, tmp_path):
    """A container's /dev/shm of 64 MB, and no room in TMPDIR, with two loader workers."""
    script = 'mount -t tmpfs -o size=64m none /dev/shm && mount -t tmpfs -o size=4k none "$0" && exec "$@"'
    inside = ("unshare", "--mount", "bash", "-c", script, short)
    done = train(command(nano, tmp_path / "out", dataloader_num_workers=2), prefix=inside, TMPDIR=str(short))
    assert done.returncode == 0, done.stdout
    assert len(log_of(tmp_path / "out")) == 4


def test_temporary_directory_too_long_for_the_workers_sockets(nano, short, tmp_path):
    """Batches would be dropped in the worker, and the run would wait for ever."""
    longest = short / ("x" * (75 - len(f"{short}/")))
    too_long = Path(f"{longest}x")
    for directory in (longest, too_long):
        directory.mkdir()
    words = command(nano, tmp_path / "out", dataloader_num_workers=2)
    done = train(words, TMPDIR=str(too_long))
    (line,) = error_lines(done.stdout)
    assert done.returncode == 3 and str(too_long) in line and "TMPDIR=/tmp" in line
    assert train(words, TMPDIR=str(longest)).returncode == 0


@needs_root
def test_read_only_output_is_one_line(nano, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    script = 'mount -t tmpfs -o ro none "$0" && exec "$@"'
    done = train(command(nano, out), prefix=("unshare", "--mount", "bash", "-c", script, out))
    assert done.returncode in (2, 3), done.stdout
    (line,) = error_lines(done.stdout)
    assert str(out) in line and "ead-only" in line


def test_a_killed_loader_worker_is_named(nano, tmp_path):
    """As the kernel does when memory is out."""
    records = json.loads((ROOT / "data" / "belle_chat.json").read_text())
    data = tmp_path / "long.json"  # one killed after its last batch of an epoch would not be missed
    data.write_text(json.dumps(records * 50))
    options = dict(dataloader_num_workers=2, packing=False, max_steps=100_000, save_steps=90_000)
    words = command(nano, tmp_path / "out", data_path=data, **options)
    log = (tmp_path / "log").open("w+")
    run = subprocess.Popen(
        [str(word) for word in words], env=environment(), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
    )
    try:
        progress = tmp_path / "out" / "trainer_log.jsonl"
        deadline = time.monotonic() + 240
        while not (progress.exists() and progress.read_text().count("\n") > 2):
            assert run.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.1)
        children = psutil.Process(run.pid).children()
        next(child for child in children if child.name() == "pt_data_worker").kill()
        assert run.wait(timeout=30) == 3  # the loader looks every 5 s where it missed the signal
    finally:
        run.kill()
    (line,) = error_lines((tmp_path / "log").read_text())
    assert "worker" in line and "memory" in line


def test_a_clock_that_jumps_changes_nothing(nano, tmp_path, monkeypatch):
    """Checkpoints are ordered by their step: an hour back or forth between them leaves the newest."""
    out = tmp_path / "out"
    done = train(command(nano, out, save_steps=1, save_total_limit=2))
    assert done.returncode == 0, done.stdout
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    os.utime(out / "checkpoint-4", (0, 0))
    from baichuan_sft.commit import newest_valid

    newest, broken = newest_valid(out)
    assert newest == out / "checkpoint-4" and broken == []
    assert json.loads((newest / "manifest.json").read_text())["step"] == 4
