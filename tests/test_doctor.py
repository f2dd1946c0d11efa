"""The doctor: every check on answers written by hand, then this machine, then hosts with seeded faults."""

import copy
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
from fixtures import ROOT
from hosts import hosts, needs_hosts, wait_for
from launching import free_port, run

from baichuan_sft.doctor import command, report, sessions
from baichuan_sft.doctor.checks import CHECKS, judge
from baichuan_sft.doctor.facts import BLOCK, WHOLE, fingerprint
from baichuan_sft.doctor.rounds import World
from baichuan_sft.errors import UserError
from baichuan_sft.hosts import Host

GPU = {"name": "NVIDIA A100", "used_mib": "4", "capability": "8.0", "driver": "550.54"}
GPU |= {"mig": "Disabled", "ecc_errors": "0"}


def healthy(name: str, number: int) -> dict:
    """What a host says that is like the others."""
    address = f"192.0.2.{number}"
    others = {f"h{i}": [f"192.0.2.{i}"] for i in (1, 2, 3)}
    files = {"digest": "aaaa", "files": {"x.json": "3 bytes, sha256 aaaa"}, "path": "/data/x"}
    interfaces = {"eth1": address}
    return {
        "ssh": {"local": False},
        "python": {"executable": "/venv/bin/python", "workdir": "/work"},
        "identity": f"boot{number} net:[1]",
        "versions": {"python": "3.11.7", "baichuan-sft": "0.1.0", "torch": "2.13.0+cu130", "nccl": "2.28.1"},
        **{fact: copy.deepcopy(files) for fact in ("code", "model", "data", "config")},
        "devices": {"gpus": [dict(GPU), dict(GPU)], "fault": "", "cores": 64, "infiniband": [], "busy": []},
        "disk": {"path": "/out", "free": 2**40, "refused": "", "kind": "nfs4"},
        "shm": {"bytes": 2**35},
        "limits": {"nofile": 65536, "memlock": None},
        "names": {"hostname": name, "own": [address], "resolved": others, "interfaces": interfaces},
        "caches": {"TORCH_EXTENSIONS_DIR": ["/home/u/.cache", "ext4"]},
        "locks": [],
        "leftovers": [],
        "clock": {"skew": 0.01 * number},
        "ports": {
            "listen": {"port": 29500 if number == 1 else 43210 + number},
            "reached": {
                other: {"own": address, "seconds": 0.001}
                for other in (("h1", "h2", "h3") if number == 1 else ("h1", "192.0.2.1"))
            },
            "seen": True,
        },
        "rendezvous": {**NO_IB, "came": "done", "bytes_per_second": 45e9, "transport": "IB"},
    }


def world_of(*changes) -> World:
    """Three healthy hosts, and what each function of ``changes`` makes of their answers."""
    three = [Host(f"h{i}", 2, line=i) for i in (1, 2, 3)]
    answers = {host.name: healthy(host.name, i) for i, host in enumerate(three, 1)}
    ask = {"model": "m", "data": "d", "config": "c", "output": "/out", "port": 29500, "needed": 2**38}
    ask["traffic"] = {"LoRA": 1e8, "ZeRO-1/2": 3e10, "ZeRO-3": 4.5e10}
    for change in changes:
        change(answers)
    return World(three, ask, answers)


def put(path: str, value):
    """A change: ``put("h2 shm bytes", 0)``."""

    def change(answers):
        *before, last = path.split()
        for key in before:
            answers = answers[int(key)] if isinstance(answers, list) else answers[key]
        answers[int(last) if isinstance(answers, list) else last] = value

    return change


def h2(path: str, value):
    return put(f"h2 {path}", value)


def say(*lines):
    """A change: h2 was not reached, and ssh printed this."""
    return lambda answers: answers.update(h2={"ssh": {"local": False, "said": list(lines)}})


def ssh_fails(text, found, repair):
    return "ssh", "fail", found, repair, say("Welcome!", text)


TO_H2 = "ssh: connect to host h2 port 22:"
OTHER = {"digest": "bbbb", "files": {"x.json": "3 bytes, sha256 bbbb"}, "path": "/data/x"}
DEAD = {"fault": "no answer in 5 s (a firewall drops it, or no route)"}
CUT = {"h1": DEAD, "192.0.2.1": DEAD}
NO_IB = {"phase": "done", "backend": "nccl", "wrong": "", "transport": "Socket", "bytes_per_second": 1.1e9}
LATE = {"phase": "failed", "came": "import", "fault": "DistStoreError: 2/3 clients joined"}
GONE = {"phase": "failed", "came": "no answer", "fault": "ImportError: libcudart.so.13"}

# check, mark, what must be said of h2, how it is repaired, and what is wrong there
SEEDED = [
    ssh_fails(f"{TO_H2} Connection refused", "nobody listens on port 22", "start sshd"),
    ssh_fails("Host key verification failed.", "not in known_hosts", "ssh-keyscan h2"),
    ssh_fails("@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @", "key has changed", "ssh-keygen -R h2"),
    ssh_fails("root@h2: Permission denied (publickey).", "key is not accepted", "ssh-copy-id h2"),
    ssh_fails(f"{TO_H2} Connection timed out", "no answer in 10 s", "ping h2"),
    ssh_fails("no answer in 12 s", "no answer in 10 s", "ping h2"),
    ssh_fails(f"{TO_H2} No route to host", "no way there", "ip route get h2"),
    ssh_fails("ssh: Could not resolve hostname h2: Name or service", "name is not known", "getent hosts h2"),
    ssh_fails("sh: 1: cd: can't cd to /work", "no directory .* there", "workdir="),
    ssh_fails("/venv/bin/python: No module named baichuan_sft", "package is not there", "pip install"),
    ssh_fails("sh: 1: exec: /venv/bin/python: not found", "no Python .* there", "python="),
    ssh_fails("kex_exchange_identification: something new", "something new", "ssh h2 true"),
    ("same_machine", "fail", "same machine as hostfile:1 h1", "delete", h2("identity", "boot1 net:[1]")),
    ("versions", "fail", "torch 2.12.0", "ssh h2 .*install torch==2.13.0", h2("versions torch", "2.12.0")),
    ("versions", "fail", "nccl 2.27", "nvidia-nccl==2.28.1", h2("versions nccl", "2.27")),
    ("versions", "fail", "python 3.10.1", "python= on hostfile:2 h2", h2("versions python", "3.10.1")),
    ("code", "fail", "x.json: 3 bytes, sha256 bbbb", "rsync -a h1:/data/x/ /data/x/", h2("code", OTHER)),
    ("model", "fail", "x.json", "ssh h2 'rsync", h2("model", OTHER)),
    ("model", "fail", "no such directory", "ls -ld", h2("model", {"error": "m: no such directory"})),
    ("data", "fail", "x.json", "ssh h2 'rsync -a", h2("data", OTHER)),
    ("deepspeed", "fail", "x.json", "rsync", h2("config", OTHER)),
    ("devices", "fail", "1 GPUs", "slots=1 on hostfile:2", h2("devices gpus", [GPU])),
    ("devices", "fail", "no GPU", "delete hostfile:2", h2("devices gpus", [])),
    ("devices", "fail", "has failed", "nvidia-smi", h2("devices fault", "NVIDIA-SMI has failed")),
    ("devices", "fail", "memory errors", "-d ECC", h2("devices gpus 1", {**GPU, "ecc_errors": "3"})),
    (
        "devices",
        "fail",
        "in use .70000 MiB, process 4711",
        "ssh h2 'kill 4711'",
        h2("devices gpus 0", {**GPU, "used_mib": "70000"}),
        h2("devices busy", [{"pid": "4711"}]),
    ),
    ("devices", "warn", "MIG is on", "-mig 0", h2("devices gpus 0", {**GPU, "mig": "Enabled"})),
    ("driver", "warn", "535.1", "driver 550.54 on h2", h2("devices gpus 0", {**GPU, "driver": "535.1"})),
    ("precision", "warn", "no bf16", "--fp16 True", h2("devices gpus 0", {**GPU, "capability": "7.0"})),
    ("precision", "warn", "H100", "sets the pace", h2("devices gpus 0", {**GPU, "name": "NVIDIA H100"})),
    ("disk", "fail", "1.0 GiB free in /out", "--save_total_limit", h2("disk free", 2**30)),
    ("output", "fail", "/out: Permission denied", "ls -ld /out", h2("disk refused", "Permission denied")),
    ("output", "warn", "not the directory of h1", "all hosts mount", h2("ports seen", False)),
    ("shm", "fail", "64 MiB", "remount,size=16g", h2("shm bytes", 64 << 20)),
    ("shm", "warn", "512 MiB", "remount,size=16g", h2("shm bytes", 512 << 20)),
    ("limits", "warn", "256 open files", "nofile 65536", h2("limits nofile", 256)),
    (
        "limits",
        "warn",
        "memlock 64 KiB with InfiniBand .mlx5_0",
        "memlock unlimited",
        h2("devices infiniband", ["mlx5_0"]),
        h2("limits memlock", 65536),
    ),
    ("clock", "warn", "190.0 s behind h1", "set-ntp", h2("clock skew", -190.0)),
    ("caches", "warn", "/n/c, on nfs4", "export", h2("caches TORCH_EXTENSIONS_DIR", ["/n/c", "nfs4"])),
    ("locks", "warn", "/c/op/lock", "rm /c/op/lock", h2("locks", [{"path": "/c/op/lock", "stale": True}])),
    ("leftovers", "warn", "99", "kill 99", h2("leftovers", [{"pid": 99, "command": "python fine-tune.py"}])),
    ("names", "warn", "h2 is 127.0.1.1 to itself", "sed -i .*192.0.2.2 h2", h2("names own", ["127.0.1.1"])),
    ("names", "fail", "does not know h3", "192.0.2.3 h3.* >> /etc/hosts", h2("names resolved h3", [])),
    ("names", "fail", "h1 is 198.51.100.7", "192.0.2.1 h1", h2("names resolved h1", ["198.51.100.7"])),
    ("port", "fail", "no more", "free it", h2("ports listen", {"fault": "port 0: no more"})),
    ("port", "fail", "h2 -> h1:29500: no answer", "ssh h1 'iptables .*192.0.2.2", h2("ports reached", CUT)),
    ("port", "fail", "h1 -> h2:43212: no answer", "ssh h2 'iptables", put("h1 ports reached h2", DEAD)),
    ("port", "warn", "h1 at 192.0.2.1, not by its name", "192.0.2.1 h1", h2("ports reached h1", DEAD)),
    ("rendezvous", "fail", "libcudart", "ssh h2 .*import torch", h2("rendezvous", GONE)),
    ("rendezvous", "fail", "waited for h3", "see h3", h2("rendezvous", LATE), put("h3 rendezvous", GONE)),
    ("rendezvous", "fail", "after 'import'", "GLOO_SOCKET_IFNAME.* eth1", h2("rendezvous", LATE)),
    ("rendezvous", "fail", "7 of 9", "leave a host out", h2("rendezvous wrong", "7 of 9 sums are wrong")),
    ("bandwidth", "warn", "1.1 GB/s by socket; .*ZeRO-3 41", "choose LoRA", h2("rendezvous", NO_IB)),
    (
        "bandwidth",
        "warn",
        "1.1 GB/s by socket, InfiniBand device mlx5_0 present but not used",
        "NCCL_IB_HCA=mlx5_0",
        h2("rendezvous", NO_IB),
        h2("devices infiniband", ["mlx5_0"]),
    ),
]


def test_healthy_hosts_pass_every_check():
    table = judge(world_of(), list(CHECKS))
    assert set(table) == set(CHECKS)
    assert {cell.mark for cells in table.values() for cell in cells.values()} == {"pass"}


@pytest.mark.parametrize("row", SEEDED, ids=lambda row: f"{row[0]}: {row[2]}")
def test_a_fault_is_named_with_its_repair(row):
    check, mark, found, repair, *changes = row
    cell = judge(world_of(*changes), list(CHECKS))[check]["h2"]
    assert cell.mark == mark
    assert re.search(found, cell.found), cell
    assert re.search(repair, cell.repair), cell
    assert cell.expected and "\n" not in report.line(check, ["h2"], cell)


def test_every_check_has_a_seeded_fault():
    assert {check for check, *_ in SEEDED} == set(CHECKS)


def test_a_fault_on_one_host_leaves_the_others_alone():
    for change in (put("h2 versions torch", "2.12.0"), put("h2 data", OTHER), put("h2 shm bytes", 1)):
        table = judge(world_of(change), list(CHECKS))
        marked = [(name, host) for name in table for host, cell in table[name].items() if cell.mark != "pass"]
        assert len(marked) == 1 and marked[0][1] == "h2"


def test_a_port_that_is_held_is_said_once():
    held = put("h1 ports listen", {"fault": "port 29500 is held by process 4711 (python train.py)"})
    cells = judge(world_of(held), ["port"])["port"]
    assert cells["h1"].mark == "fail" and "4711" in cells["h1"].found
    assert "--master_port 29501" in cells["h1"].repair
    assert [cells[name].mark for name in ("h2", "h3")] == ["skip", "skip"]


def test_of_two_hosts_the_first_is_right_and_of_three_the_majority():
    world = world_of(put("h1 data", OTHER))
    assert judge(world, ["data"])["data"]["h1"].mark == "fail"
    two = World(world.hosts[:2], world.ask, {name: world.answers[name] for name in ("h1", "h2")})
    cells = judge(two, ["data"])["data"]
    assert (cells["h1"].mark, cells["h2"].mark) == ("pass", "fail")


def test_room_on_disks_of_their_own_is_shared_among_the_hosts():
    free = [put(f"h{i} disk free", 2**37) for i in (1, 2, 3)]  # half of what is needed
    apart = [put(f"h{i} ports seen", False) for i in (2, 3)]
    assert [cell.mark for cell in judge(world_of(*free), ["disk"])["disk"].values()] == ["fail"] * 3
    marks = [cell.mark for cell in judge(world_of(*free, *apart), ["disk"])["disk"].values()]
    assert marks == ["fail", "pass", "pass"]  # the first writes what belongs to no rank alone


def test_fingerprint_sees_head_tail_and_size_of_a_large_file(tmp_path):
    path = tmp_path / "weights"
    with path.open("wb") as file:
        file.truncate(WHOLE + 5 * BLOCK)
    before = fingerprint(path)
    for place in (0, path.stat().st_size - 1):
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"\1")
        assert fingerprint(path) != before
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"\0")
        assert fingerprint(path) == before
    with path.open("ab") as file:
        file.write(b"\0")
    assert fingerprint(path) != before


def test_room_grows_with_the_checkpoints_kept_and_is_small_for_adapters():
    shape = command.shape_of("baichuan2-7b")
    full = command.room(shape, "full", 1)
    assert 200e9 < full < 300e9  # 7.5e9 parameters, 16 bytes each, two checkpoints and the result
    assert command.room(shape, "full", 3) > 1.8 * full
    assert command.room(shape, "lora", 1) < full / 100


@pytest.mark.parametrize(
    ("stage", "lora", "mark"), [(0, False, "warn"), (2, False, "pass"), (3, False, "warn"), (3, True, "pass")]
)
def test_speed_is_judged_for_the_way_that_was_chosen(stage, lora, mark):
    """4 GB/s: 7.5 s of sending under ZeRO-2, 11 s under ZeRO-3; with no stage named both count."""
    speed = [put(f"h{i} rendezvous bytes_per_second", 4e9) for i in (1, 2, 3)]
    world = world_of(*speed, put("h2 config stage", stage))
    world.ask["lora"] = lora
    assert judge(world, ["bandwidth"])["bandwidth"]["h2"].mark == mark


def test_many_hosts_share_a_column(capsys):
    names = [f"h{i}" for i in range(1, 65)]
    world = world_of()
    answers = {name: healthy("h2", 2) | {"identity": name} for name in names}
    answers["h40"]["data"] = OTHER
    many = World([Host(name, 2, line=i) for i, name in enumerate(names, 1)], world.ask, answers)
    table = judge(many, ["ssh", "data"])
    assert list(report.columns(table, names)) == ["h40", "other 63"]
    report.show(table, names)
    printed = capsys.readouterr().out
    assert "h40, data files: x.json" in printed and max(map(len, printed.split("✗ ")[0].splitlines())) <= 120


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--skip", "datas"], "unknown check 'datas', did you mean 'data'"),
        (["--hostfile", "nowhere"], "no such file"),
        (["--master_port", "0"], "not a port from 1 to 65534"),
        (["--hostfle", "x"], "did you mean '--hostfile'"),
    ],
)
def test_wrong_words_are_refused(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        command.main(words)


def doctor(*words):
    return run([sys.executable, "-m", "baichuan_sft.cli", "doctor", *words])


def test_a_probe_that_ends_at_once_says_so_at_once(monkeypatch):
    """Whichever of its readers runs first: each is given the time to end before the next one starts."""
    start = threading.Thread.start

    def start_and_wait(thread):
        start(thread)
        thread.join(0.3)

    monkeypatch.setattr(threading.Thread, "start", start_and_wait)
    monkeypatch.setattr(sessions, "probe_words", lambda host: ["sh", "-c", "echo no way there >&2"])
    host = Host("h9", 1, 1)
    with sessions.sessions([host], lambda host: {}) as opened:
        assert opened["h9"].next(time.monotonic() + 30) is None
        assert opened["h9"].ended and list(opened["h9"].said) == ["no way there"]


@pytest.mark.slow
def test_this_machine(tmp_path):
    """For real, with all rounds; the port is held at first."""
    port = free_port()
    files = ["--data_path", "data/belle_chat.json", "--output_dir", tmp_path / "new"]
    files += ["--deepspeed", "ds_config.json"]
    with socket.create_server(("", port)):
        done = doctor(*files, "--master_port", port)
    assert done.returncode == 3
    assert f"port {port} is held by process {os.getpid()}" in done.stdout
    assert "not tried" in done.stdout and list(tmp_path.iterdir()) == []
    done = doctor(*files, "--master_port", port, "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["hosts"], found["healthy"]) == (0, ["localhost"], True), done.stdout
    assert found["checks"]["rendezvous"]["localhost"]["mark"] == "pass"
    assert list(tmp_path.iterdir()) == []


# --- hosts --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Data, a model's small files, and an output directory that all hosts see."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "train.json").write_text((ROOT / "data" / "belle_chat.json").read_text())
    (folder / "model").mkdir()
    facts = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 6144}
    (folder / "model" / "config.json").write_text(json.dumps({**facts, "num_attention_heads": 2}))
    (folder / "model" / "tokenizer_config.json").write_text("{}")
    (folder / "out").mkdir()
    return folder


@pytest.fixture
def cluster():
    with hosts(3) as made:
        yield made


def ask(cluster, hostfile, files, *words):
    """Exit code and cells of `doctor` on h1, as JSON."""
    named = ["--model_name_or_path", files / "model", "--data_path", files / "train.json"]
    named += ["--output_dir", files / "out", "--deepspeed", ROOT / "ds_config.json"]
    line = [sys.executable, "-m", "baichuan_sft.cli", "doctor", "--hostfile", hostfile, *named, *words]
    done = cluster.run(1, [*line, "--json"], cwd=ROOT, timeout=120)
    for i in cluster.machines:
        wait_for(f"end on h{i}", lambda i=i: not [line for line in cluster.processes(i) if "doctor" in line])
    assert not list((files / "out").iterdir())
    assert done.stdout.startswith("{"), done.stdout
    return done.returncode, json.loads(done.stdout)["checks"]


def marks(cells):
    return {name: [cell["mark"] for cell in by_host.values()] for name, by_host in cells.items()}


@needs_hosts
@pytest.mark.slow
def test_three_healthy_hosts(cluster, files, tmp_path):
    code, cells = ask(cluster, cluster.hostfile(tmp_path / "hostfile"), files)
    assert set(cells) == set(CHECKS)
    bad = [name for name, found in marks(cells).items() if "fail" in found]
    assert (code, bad) == (0, []), cells
    assert marks(cells)["rendezvous"] == ["pass"] * 3 and "3 ranks" in cells["rendezvous"]["h2"]["found"]
    assert "B/s by socket" in cells["bandwidth"]["h1"]["found"]
    assert cells["output"]["h3"]["found"].startswith("shared")


@needs_hosts
@pytest.mark.slow
def test_a_doctor_that_is_killed_leaves_nothing(cluster, files, tmp_path):
    words = ["doctor", "--hostfile", cluster.hostfile(tmp_path / "hostfile"), "--output_dir", files / "out"]
    for round_of in ("listen", "rendezvous"):
        process = cluster.popen(1, [sys.executable, "-m", "baichuan_sft.cli", *words], cwd=ROOT)
        seen = {"listen": lambda: any((files / "out").iterdir()), "rendezvous": lambda: listens(cluster)}
        wait_for(round_of, seen[round_of], 60)
        cluster.send(process, signal.SIGKILL)
        process.wait(10)
        for i in cluster.machines:
            wait_for(f"end on h{i}", lambda i=i: cluster.processes(i) == [])
        assert not list((files / "out").iterdir())


def listens(cluster) -> bool:
    """Whether the processes of the dry rendezvous have met at h1's port."""
    return "29500" in cluster.run(1, ["ss", "-Htn", "state", "established", "sport", "=", ":29500"]).stdout


@needs_hosts
@pytest.mark.slow
def test_hosts_that_differ(cluster, files, tmp_path):
    """Another package, data, tokenizer, code; a small /dev/shm, an own disk, names gone wrong, a lock."""
    import peft

    folder = next(Path(peft.__file__).parents[1].glob("peft-*.dist-info")) / "METADATA"
    cluster.replace(2, folder, re.sub(r"(?m)^Version: .*", "Version: 0.1.2", folder.read_text()))
    cluster.replace(2, files / "train.json", (files / "train.json").read_text() + " ")
    cluster.replace(3, files / "model" / "tokenizer_config.json", '{"a": 1}')
    variants = ROOT / "baichuan_sft" / "variants.py"
    cluster.replace(3, variants, variants.read_text() + "# edited\n")
    cluster.private(3, files / "out")
    cluster.run(3, ["mount", "-o", "remount,size=64m", "/dev/shm"])
    cluster.etc_hosts(3).write_text("127.0.1.1 h3\n10.77.0.1 h1\n10.77.0.2 h2\n")
    cluster.etc_hosts(2).write_text("10.77.0.1 h1\n10.77.0.2 h2\n10.77.0.9 h3\n")
    lock = cluster.machines[2].home / ".cache" / "torch_extensions" / "py311_cpu" / "op" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    process = cluster.popen(3, [sys.executable, "-c", "import time; time.sleep(100)", "baichuan-sft train"])
    hostfile = cluster.hostfile(tmp_path / "hostfile", slots=2)
    code, cells = ask(cluster, hostfile, files, "--skip", "rendezvous,bandwidth")
    process.kill()
    assert code == 3
    said = {f"{name} {host}": cell["found"] for name in cells for host, cell in cells[name].items()}
    bad = {f"{name} {host}" for name in cells for host, cell in cells[name].items() if cell["repair"]}
    assert "peft 0.1.2" in said["versions h2"] and "train.json" in said["data h2"]
    assert "tokenizer_config.json" in said["model h3"] and "variants.py" in said["code h3"]
    assert "64 MiB" in said["shm h3"] and "127.0.1.1" in said["names h3"] and "10.77.0.9" in said["names h2"]
    assert str(lock) in said["locks h2"] and "baichuan-sft train" in said["leftovers h3"]
    expected = "versions h2,data h2,model h3,code h3,output h3,shm h3,names h2,names h3,locks h2,leftovers h3"
    assert bad == set(expected.split(","))


@needs_hosts
@pytest.mark.slow
def test_hosts_that_are_not_reached(cluster, files, tmp_path):
    """No sshd, a cut cable, an unknown name, a wrong port, a host twice, an unknown key: one line each."""
    cluster.stop_sshd(2)
    cluster.cut(3)
    known = cluster.machines[1].home / ".ssh" / "known_hosts"
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("h1 slots=1\nh2 slots=1\nh3 slots=1\nnowhere slots=1\n10.77.0.1 slots=1\n")
    code, cells = ask(cluster, hostfile, files, "--skip", "rendezvous,bandwidth,names")
    assert code == 3
    ssh = cells["ssh"]
    assert [one["mark"] for one in ssh.values()] == ["pass", "fail", "fail", "fail", "pass"]
    assert "nobody listens on port 22" in ssh["h2"]["found"]
    assert re.search("no answer in 10 s|no way there", ssh["h3"]["found"])
    assert "not known" in ssh["nowhere"]["found"]
    assert "same machine as hostfile:1 h1" in cells["same_machine"]["10.77.0.1"]["found"]
    assert cells["data"]["h1"]["mark"] == "pass" and cells["data"]["h2"]["mark"] == "skip"

    cluster.start_sshd(2)
    cluster.mend(3)
    known.write_text("")
    hostfile.write_text("h1 slots=1\nh2 slots=1\nh3 slots=1 port=2222\n")
    code, cells = ask(cluster, hostfile, files, "--skip", "rendezvous,bandwidth")
    assert (code, marks(cells)["ssh"]) == (3, ["pass", "fail", "fail"])
    assert "not in known_hosts" in cells["ssh"]["h2"]["found"]
    assert "port 2222" in cells["ssh"]["h3"]["found"] and "refused" not in cells["ssh"]["h3"]["repair"]


@needs_hosts
@pytest.mark.slow
def test_ports_and_a_host_that_cannot_start(cluster, files, tmp_path):
    hostfile = cluster.hostfile(tmp_path / "hostfile")
    cluster.firewall(1, 29500)
    code, cells = ask(cluster, hostfile, files, "--skip", "bandwidth")
    assert (code, marks(cells)["port"]) == (3, ["pass", "fail", "fail"]), cells["port"]
    assert "h2 -> h1:29500: no answer in 5 s" in cells["port"]["h2"]["found"]
    assert set(marks(cells)["rendezvous"]) == {"skip"}
    for rule in ("100 sport 29600 lookup main", "200 to 10.77.0.3 dport 1024-65534 blackhole"):
        cluster.run(1, ["ip", "rule", "add", "ipproto", "tcp", "priority", *rule.split()])
    code, cells = ask(cluster, hostfile, files, "--skip", "rendezvous,bandwidth", "--master_port", "29600")
    assert (code, marks(cells)["port"]) == (3, ["pass", "pass", "fail"])
    assert "h1 -> h3:" in cells["port"]["h3"]["found"] and "ssh h3" in cells["port"]["h3"]["repair"]

    cluster.run(1, ["ip", "rule", "del", "priority", "200"])
    import torch

    cluster.replace(3, Path(torch.__file__), "raise ImportError('libcudart is not there')")
    code, cells = ask(cluster, hostfile, files, "--master_port", "29600")
    assert (code, marks(cells)["rendezvous"]) == (3, ["fail"] * 3)
    assert "libcudart" in cells["rendezvous"]["h3"]["found"]
    assert cells["rendezvous"]["h1"]["found"] == "waited for h3"
