"""A committed directory is whole or its fault is named; a run's newest whole checkpoint is never lost."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baichuan_sft import commit

FILES = {
    "model.safetensors": b"weights" * 900,
    "optimizer.safetensors": b"moments" * 900,
    "global_step4/zero_pp_rank_0_mp_rank_00_optim_states.pt": b"shard" * 1200,
    "trainer_state.json": b"{}" * 200,
    "empty.json": b"",
}


def save(directory: Path, files=FILES, step=4) -> Path:
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    commit.write_manifest(directory, commit.entries_of(directory, commit.files_of(directory)), step=step)
    commit.commit(directory)
    return directory


@pytest.fixture
def whole(tmp_path):
    return save(tmp_path / "checkpoint-4")


def test_what_was_committed_is_whole(whole):
    assert commit.problems(whole) == []
    assert commit.problems(whole, hashes=False) == []
    assert commit.problems(whole, ["model.safetensors"]) == []
    manifest = json.loads((whole / "manifest.json").read_text())
    assert (manifest["format"], manifest["step"]) == (1, 4)
    assert set(manifest["files"]) == set(FILES)
    assert (whole / "COMMIT").read_text().strip() == commit.sha256_of(whole / "manifest.json")
    assert {path.name for path in whole.iterdir()} == {name.split("/")[0] for name in FILES} | {
        "manifest.json",
        "COMMIT",
    }


# --- damage -------------------------------------------------------------------------------------------


def cut(path):
    os.truncate(path, path.stat().st_size - 96)


def lengthen(path):
    with open(path, "ab") as file:
        file.write(b"\0" * 5000)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def zero_the_tail(path):
    content = path.read_bytes()
    path.write_bytes(content[:-64] + bytes(64))


def lfs(path):
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n")


def html(path):
    path.write_bytes(b"\n<!DOCTYPE html><html><body>404</body></html>")


DAMAGE = {
    Path.unlink: "missing",
    cut: "96 bytes short",
    lengthen: "5,000 bytes too long",
    flip: "checksum differs",
    zero_the_tail: "checksum differs",
    lfs: "is a Git LFS pointer; run `git lfs pull`",
    html: "is an HTML page",
}


@pytest.mark.parametrize("name", [name for name in FILES if FILES[name]])
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda function: function.__name__)
def test_damage_to_any_file_is_named(whole, name, damage):
    damage(whole / name)
    (problem,) = commit.problems(whole)
    assert problem.startswith(f"{name}: {DAMAGE[damage]}")
    # and only where this file is asked for
    assert commit.problems(whole, [name]) == [problem]
    assert commit.problems(whole, ["empty.json"]) == []


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("name", ["manifest.json", "COMMIT"])
@pytest.mark.parametrize("damage", [Path.unlink, flip, empty, lfs], ids=lambda function: function.__name__)
def test_damage_to_the_manifest_is_named(whole, name, damage):
    damage(whole / name)
    (problem,) = commit.problems(whole)
    no_commit = name == "COMMIT" and damage is Path.unlink
    assert problem.startswith("incomplete (no COMMIT)" if no_commit else "manifest.json: ")


def test_files_that_changed_places_are_told(whole):
    one, other = whole / "model.safetensors", whole / "optimizer.safetensors"
    one.rename(whole / "aside")
    other.rename(one)
    (whole / "aside").rename(other)
    assert commit.problems(whole) == [
        "model.safetensors: holds what belongs in optimizer.safetensors",
        "optimizer.safetensors: holds what belongs in model.safetensors",
    ]


def test_weights_of_somebody_else_are_told(whole):
    for name in ("pytorch_model.bin", "model.safetensors.index.json", "global_step4/other_optim_states.pt"):
        (whole / name).write_bytes(b"foreign")
        assert commit.problems(whole) == [f"{name}: not in the manifest"]
        assert commit.problems(whole, [name]) == [f"{name}: not in the manifest"]
        (whole / name).unlink()
    (whole / "notes.txt").write_text("no loader reads this")
    (whole / "universal").mkdir()
    (whole / "universal" / "fp32.pt").write_bytes(b"made later, in a directory of its own")
    assert commit.problems(whole) == []


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/../../b", "..\\b", "", "a\0b"])
def test_names_that_lead_out_of_the_directory_are_refused(whole, name):
    manifest = json.loads((whole / "manifest.json").read_text())
    manifest["files"][name] = manifest["files"].pop("empty.json")
    seal(whole, json.dumps(manifest))
    assert commit.problems(whole) == [f"manifest.json: {name!r} leads out of the directory"]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("{", "not JSON"),
        ("\udcff", "not JSON"),
        ("[]", "not of format 1"),
        ('{"format": 2, "files": {}}', "not of format 1"),
        ('{"format": 1}', "has no files"),
        ('{"format": 1, "files": {"a": {"size": "3", "sha256": ""}}}', "entry 'a' has no size and sha256"),
        ('{"format": 1, "files": {"a": null}}', "entry 'a' has no size and sha256"),
    ],
)
def test_a_manifest_that_is_none_is_told(whole, text, expected):
    seal(whole, text)
    assert commit.problems(whole) == [f"manifest.json: {expected}"]


def seal(directory, text):
    (directory / "manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    commit.commit(directory)


# --- choice and retention -----------------------------------------------------------------------------


def run_of(tmp_path, *steps) -> list[Path]:
    return [save(tmp_path / f"checkpoint-{step}", {"model.safetensors": b"x" * step}, step) for step in steps]


def test_the_newest_whole_checkpoint_is_chosen_by_step(tmp_path):
    paths = run_of(tmp_path, 2, 4, 10, 6)
    for path, seconds in zip(paths, (9e8, 8e8, 1e8, 7e8)):
        os.utime(path, (seconds, seconds))
    for name in ("checkpoint-x", "checkpoint-012", "checkpoint--1", "tmp-checkpoint-30"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-40").write_text("a file")
    assert [path.name for path in commit.checkpoints(tmp_path)] == [f"checkpoint-{n}" for n in (10, 6, 4, 2)]
    assert commit.newest_valid(tmp_path) == (tmp_path / "checkpoint-10", [])
    (tmp_path / "checkpoint-10" / "COMMIT").unlink()
    flip(tmp_path / "checkpoint-6" / "model.safetensors")
    assert commit.newest_valid(tmp_path) == (
        tmp_path / "checkpoint-4",
        [
            "checkpoint-10: incomplete (no COMMIT), using checkpoint-4",
            "checkpoint-6: model.safetensors: checksum differs, using checkpoint-4",
        ],
    )


def test_no_whole_checkpoint(tmp_path):
    assert commit.newest_valid(tmp_path / "absent") == (None, [])
    (tmp_path / "checkpoint-3").mkdir()
    chosen, lines = commit.newest_valid(tmp_path)
    assert chosen is None and lines == ["checkpoint-3: incomplete (no COMMIT), and no older one is whole"]


DAY = 86400


@settings(max_examples=60)
@given(
    keep=st.integers(1, 4),
    saves=st.lists(
        st.tuples(st.integers(1, 9), st.sampled_from(["whole", "whole", "killed"]), st.integers(-DAY, DAY)),
        min_size=1,
        max_size=8,
    ),
    best=st.integers(0, 7),
)
def test_retention_keeps_the_newest_and_the_best(tmp_path_factory, keep, saves, best):
    """Whatever the clock says: it jumps by up to a day between saves."""
    root, step, committed, chosen = tmp_path_factory.mktemp("run"), 0, [], None
    for number, (stride, fate, clock) in enumerate(saves):
        step += stride
        path = save(root / f"checkpoint-{step}", {"model.safetensors": b"x" * step}, step)
        os.utime(path, (1.7e9 + clock, 1.7e9 + clock))
        if fate == "killed":
            (path / "COMMIT").unlink()
            continue
        committed.append(step)
        if number == best:
            chosen = path
        for old in commit.expired(root, keep, [path, chosen]):
            commit.remove(old)
        left = [int(entry.name[11:]) for entry in commit.checkpoints(root) if not commit.problems(entry)]
        assert left[0] == step and commit.newest_valid(root)[0] == path
        assert chosen is None or not commit.problems(chosen)
        assert len(left) <= max(keep, 2 if chosen else 1)
        # no more than needed went: the newest, and the best among or besides them
        wanted = set(sorted(committed)[-keep:])
        if chosen:
            protected = {step, int(chosen.name[11:])}
            rest = [entry for entry in sorted(committed, reverse=True) if entry not in protected]
            wanted = protected | set(rest[: max(0, keep - len(protected))])
        assert set(left) == wanted
        killed = {path.name for path in commit.checkpoints(root)} - {f"checkpoint-{step}" for step in left}
        assert all(commit.problems(root / name) == ["incomplete (no COMMIT)"] for name in killed)
    shutil.rmtree(root)


def test_the_newest_whole_one_stays_though_a_newer_lost_a_file(tmp_path):
    run_of(tmp_path, 2, 4, 6)
    (tmp_path / "checkpoint-6" / "model.safetensors").unlink()
    gone = [path.name for path in commit.expired(tmp_path, 1)]
    assert "checkpoint-4" not in gone and gone == ["checkpoint-2", "checkpoint-6"]


# --- kill and power cut -------------------------------------------------------------------------------


class Stop(BaseException):
    """The machine stops here."""


class Disk:
    """Counts the calls that change a directory, stops before the k-th, and knows what is not yet durable."""

    def __init__(self, monkeypatch, stop_at):
        self.calls, self.dirty = 0, set()
        for name in ("fsync", "replace", "unlink", "rmdir"):
            monkeypatch.setattr(os, name, self.counted(getattr(os, name), name))
        write = Path.write_bytes
        monkeypatch.setattr(
            Path,
            "write_bytes",
            lambda path, content: (self.step(), self.dirty.add(str(path)), write(path, content))[2],
        )
        opened = open
        monkeypatch.setattr(
            commit, "open", lambda *args, **kw: self.opened(opened, *args, **kw), raising=False
        )
        self.stop_at = stop_at

    def step(self):
        self.calls += 1
        if self.calls == self.stop_at:
            raise Stop

    def counted(self, function, name):
        def call(*args, **kwargs):
            self.step()
            if name == "fsync":
                self.dirty.discard(os.readlink(f"/proc/self/fd/{args[0]}"))
            if name == "replace" and str(args[0]) in self.dirty:
                self.dirty.add(str(args[1]))
            return function(*args, **kwargs)

        return call

    def opened(self, function, path, mode="r", **kwargs):
        if "w" in mode:
            self.step()
            self.dirty.add(str(path))
        return function(path, mode, **kwargs)

    def cut_power(self):
        """What was written and not synced is zeros, as after a power cut."""
        for name in self.dirty:
            if Path(name).is_file():
                size = Path(name).stat().st_size
                Path(name).write_bytes(bytes(size))


def replayed(tmp_path, monkeypatch, stop_at, power_cut):
    """Save checkpoint-4 beside checkpoint-2, retire that one, stop before a call; what is chosen after it."""
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    run_of(tmp_path / "run", 2)
    with monkeypatch.context() as patch:
        disk = Disk(patch, stop_at)
        try:
            new = save(tmp_path / "run" / "checkpoint-4")
            for path in commit.expired(tmp_path / "run", 1, [new]):
                commit.remove(path)
        except Stop:
            pass
    if power_cut:
        disk.cut_power()
    return disk.calls, commit.newest_valid(tmp_path / "run")[0]


@pytest.mark.parametrize("power_cut", [False, True])
def test_wherever_a_save_stops_the_last_or_the_one_before_is_whole(tmp_path, monkeypatch, power_cut):
    calls = replayed(tmp_path, monkeypatch, 0, power_cut)[0]
    assert calls > 20  # writes, fsyncs, renames and unlinks were all counted
    chosen = []
    for stop_at in range(1, calls + 1):
        _, path = replayed(tmp_path, monkeypatch, stop_at, power_cut)
        assert path is not None and path.name in ("checkpoint-2", "checkpoint-4"), stop_at
        chosen.append(path.name)
    assert chosen == sorted(chosen) and set(chosen) == {"checkpoint-2", "checkpoint-4"}


def test_without_fsync_the_power_cut_would_be_seen(tmp_path, monkeypatch):
    """The model of the test above is one that can fail."""
    monkeypatch.setattr(commit, "sync", lambda path: None)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    calls = replayed(tmp_path, monkeypatch, 0, False)[0]
    lost = [stop for stop in range(1, calls + 1) if replayed(tmp_path, monkeypatch, stop, True)[1] is None]
    assert lost


def test_a_directory_that_cannot_be_synced_is_no_failure(tmp_path, monkeypatch):
    def refuse(descriptor):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    commit.sync(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Invalid argument"):
        commit.sync(tmp_path / "file")
