"""Training over several hosts, each with its own network and sshd: equal to one host, never left hanging."""

import contextlib
import re
import signal
import subprocess
import sys
import time

import pytest
from fixtures import ROOT
from hosts import hosts, needs_hosts, wait_for
from launching import BIN, flags, log_of, make_nano, run

pytestmark = [pytest.mark.slow, pytest.mark.alone, needs_hosts]

LAUNCH = [sys.executable, "-m", "baichuan_sft.cli", "launch"]
KILLED, FROZEN = 10, 30  # seconds, the limits this project sets itself
RANK = r"-u \S*fine-tune\.py --local_rank|baichuan_sft\.cli train"  # no launcher
# Not sshd's session, which waits until TCP gives up.
OURS = r"fine-tune\.py|baichuan_sft|deepspeed|pdsh|watch\.py"


@pytest.fixture(scope="module")
def cluster():
    with hosts(3) as found:
        yield found


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_nano(tmp_path_factory.mktemp("nano") / "base", "--hidden_size", "64")


@pytest.fixture(scope="module")
def train_flags(base, tmp_path_factory):
    """A run of 8 updates, the same rows in each whatever the number of ranks: 6 of 64 tokens."""
    cache = tmp_path_factory.mktemp("cache")

    def words(out, ranks, **more):
        return flags(
            **dict(
                model_name_or_path=base,
                data_path=ROOT / "data" / "belle_chat.json",
                output_dir=out,
                cache_dir=cache,
                max_steps=8,
                per_device_train_batch_size=1,
                gradient_accumulation_steps=6 // ranks,
                model_max_length=64,
                learning_rate=1e-3,
                save_strategy="steps",
                save_steps=2,
                check_reload=False,
                use_cpu=True,
                deepspeed="zero2",
            )
            | more
        )

    return words


def losses(out):
    return [row["loss"] for row in log_of(out)]


@pytest.fixture(scope="module")
def on_one_host(train_flags, tmp_path_factory):
    """Losses of two, and of three, processes of one host."""

    def train(ranks):
        out = tmp_path_factory.mktemp(f"local{ranks}") / "out"
        done = run([*LAUNCH, "--num_processes", ranks, "train", *train_flags(out, ranks)])
        assert done.returncode == 0, done.stdout
        return losses(out)

    return {ranks: train(ranks) for ranks in (2, 3)}


def start(cluster, hostfile, out, words, *options):
    """The launcher on the first host; what it says goes to a file."""
    log = (out.parent / f"{out.name}.log").open("w")
    command = [*LAUNCH, "--hostfile", hostfile, *options, "train", *words]
    return cluster.popen(1, command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)


def said(out):
    return (out.parent / f"{out.name}.log").read_text(errors="replace")


def wait_for_update(process, out, number, seconds=240):
    def there():
        assert process.poll() is None, said(out)
        log = out / "trainer_log.jsonl"
        return log.exists() and log.read_text().count("\n") >= number

    wait_for(f"update {number}", there, seconds)


def left(cluster, i):
    return [line for line in cluster.processes(i) if re.search(OURS, line)]


def assert_nothing_left(cluster):
    """No process, no listener but sshd, no shared memory."""
    for i in cluster.machines:
        wait_for(f"end of all on h{i}", lambda i=i: not left(cluster, i), 10)
        ports = cluster.run(i, ["ss", "-Hltn", "sport != :22"]).stdout
        assert not ports.strip(), ports
        assert cluster.run(i, ["ls", "-A", "/dev/shm"]).stdout.strip() == ""


# --- equal to one host ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["ssh", "pdsh"])
def test_two_hosts_equal_one(cluster, train_flags, on_one_host, tmp_path, mode):
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("h1 slots=1\nh2 slots=1\n")
    out = tmp_path / "out"
    process = start(cluster, hostfile, out, train_flags(out, 2), "--mode", mode)
    assert process.wait(timeout=300) == 0, said(out)
    assert losses(out) == on_one_host[2]  # gloo adds two numbers in no other order over a network
    assert "2 hosts x 1 = 2" in said(out)
    assert_nothing_left(cluster)


def test_three_hosts_by_the_vendors_command(cluster, train_flags, on_one_host, tmp_path):
    """`deepspeed --hostfile=... fine-tune/fine-tune.py`, by pdsh."""
    hostfile = cluster.hostfile(tmp_path / "hostfile")
    out = tmp_path / "out"
    command = [BIN / "deepspeed", f"--hostfile={hostfile}", "--launcher", "pdsh", "fine-tune/fine-tune.py"]
    done = cluster.run(1, [*command, *train_flags(out, 3)], cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stdout
    # three addends may come in another order
    assert losses(out) == pytest.approx(on_one_host[3], rel=1e-6)
    assert_nothing_left(cluster)


# --- faults -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("names", "lost"), [("h1 h2 h3", 3), ("h2 h3", 2)])
def test_a_killed_host_is_left_out_and_the_run_goes_on(
    cluster, train_flags, on_one_host, tmp_path, names, lost
):
    """The last host, and the one that leads: another one does then, and takes over the lock."""
    out, hostfile = tmp_path / "out", tmp_path / "hostfile"
    ranks = len(names.split())
    hostfile.write_text("".join(f"{name} slots=1\n" for name in names.split()))
    process = start(cluster, hostfile, out, train_flags(out, ranks), "--max_restarts", 1)
    wait_for_update(process, out, 3)
    cluster.stop_sshd(lost)  # the host is not to come back
    cluster.kill(lost, RANK)
    try:
        assert process.wait(timeout=300) == 0, said(out)
    finally:
        cluster.start_sshd(lost)
    assert f"without h{lost}" in said(out)
    by_step = {row["step"]: row["loss"] for row in log_of(out)}
    # the same rows in each update; sums of fewer ranks' parts
    assert list(by_step.values()) == pytest.approx(on_one_host[ranks], rel=1e-5)
    assert_nothing_left(cluster)


@pytest.mark.parametrize(
    ("fault", "limit"), [("kill a rank", KILLED), ("freeze a rank", FROZEN), ("cut the link", FROZEN)]
)
def test_a_fault_ends_the_run_everywhere(cluster, train_flags, tmp_path, fault, limit):
    out = tmp_path / "out"
    hostfile = cluster.hostfile(tmp_path / "hostfile")
    process = start(cluster, hostfile, out, train_flags(out, 3, max_steps=100_000, save_steps=50_000))
    wait_for_update(process, out, 3)
    if fault == "kill a rank":
        cluster.kill(2, RANK)
    elif fault == "freeze a rank":
        cluster.freeze(2, RANK)
    else:
        cluster.cut(2)
    began = time.monotonic()
    try:
        code = process.wait(timeout=limit + 60)
        took = time.monotonic() - began
        wait_for("end on h2", lambda: not left(cluster, 2), limit)
    finally:
        cluster.mend(2)
    assert code not in (0, None) and took <= limit, f"{took:.1f} s: {said(out)}"
    assert "h2" in said(out) and "rank 1" in said(out)
    assert_nothing_left(cluster)


def test_a_fault_under_the_vendors_command(cluster, train_flags, tmp_path):
    """No launcher of ours: the ranks watch each other."""
    out = tmp_path / "out"
    hostfile = cluster.hostfile(tmp_path / "hostfile")
    command = [BIN / "deepspeed", f"--hostfile={hostfile}", "--launcher", "pdsh", "fine-tune/fine-tune.py"]
    words = train_flags(out, 3, max_steps=100_000, save_steps=50_000)
    log = (tmp_path / "out.log").open("w")
    process = cluster.popen(1, [*command, *words], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    wait_for_update(process, out, 3)
    cluster.freeze(2, RANK)
    began = time.monotonic()
    try:
        assert process.wait(timeout=90) != 0
    finally:
        for i in cluster.machines:  # nothing of a failure meets the next test
            with contextlib.suppress(AssertionError):  # there is nothing
                cluster.kill(i, OURS)
    assert time.monotonic() - began <= FROZEN, said(out)
    assert "h2" in said(out)
    assert_nothing_left(cluster)


def test_other_data_on_one_host_is_refused(cluster, train_flags, tmp_path):
    out, data = tmp_path / "out", tmp_path / "data.json"
    text = (ROOT / "data" / "belle_chat.json").read_text()
    data.write_text(text)
    cluster.replace(2, data, text.replace("百川小助手", "百川小助理"))
    process = start(
        cluster, cluster.hostfile(tmp_path / "hostfile"), out, train_flags(out, 3, data_path=data)
    )
    assert process.wait(timeout=120) == 3, said(out)
    assert re.search(r"h2: file .*data.json is .* on h1", said(out)) and not out.exists()
    assert_nothing_left(cluster)


def test_ctrl_c_saves_on_all_hosts(cluster, train_flags, tmp_path):
    out = tmp_path / "out"
    hostfile = cluster.hostfile(tmp_path / "hostfile")
    process = start(cluster, hostfile, out, train_flags(out, 3, max_steps=100_000, save_steps=50_000))
    wait_for_update(process, out, 3)
    cluster.send(process, signal.SIGINT)
    assert process.wait(timeout=120) == 130, said(out)
    (saved,) = out.glob("checkpoint-*/COMMIT")
    assert saved.parent.name in said(out)
    assert_nothing_left(cluster)
