"""Files to segments: the balance of records and tokens, all findings at once, the cache."""

import errno
import json
import multiprocessing
import os
import time

import pytest
from fixtures import ROOT, SHARED, SMALL_VOCABULARY, needs_shared

from baichuan_sft.data.dataset import DataReport, build_dataset
from baichuan_sft.data.formats import parse
from baichuan_sft.data.reader import read_records
from baichuan_sft.data.template import IGNORE, render_batch
from baichuan_sft.errors import EnvironmentFault, UserError
from baichuan_sft.model.tokenization_baichuan import BaichuanTokenizer

CHAT = ROOT / "data" / "belle_chat.json"
LINES = ROOT / "data" / "belle_chat.jsonl"


@pytest.fixture(scope="module")
def tokenizer():
    return BaichuanTokenizer(vocab_file=str(SMALL_VOCABULARY))


@pytest.fixture
def build(tokenizer, tmp_path):
    def build(paths, **settings):
        settings = {"max_length": 512, "cache_dir": tmp_path / "cache"} | settings
        return build_dataset(paths, tokenizer, **settings)

    return build


def write(path, records):
    path.write_text(json.dumps(records))
    return path


def pair(question, answer):
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def conversations_of(path):
    return [parse(record.raw)[0] for record in read_records(path)]


def test_columns_and_content(build, tokenizer):
    dataset, report = build(CHAT.as_posix())
    expected = render_batch(conversations_of(CHAT), tokenizer)
    assert dataset.column_names == ["input_ids", "labels", "length", "item"]
    assert str(dataset.features["input_ids"].feature.dtype) == "int32"
    assert dataset["input_ids"][:] == [segment.input_ids for segment in expected]
    assert dataset["labels"][:] == [segment.labels for segment in expected]
    assert dataset["length"][:] == [len(segment.input_ids) for segment in expected]
    assert report.read == report.used == 70 and report.tokens == sum(dataset["length"])


@pytest.mark.parametrize("path", [CHAT, LINES])
def test_targets_are_the_trained_texts(build, tokenizer, path):
    dataset, report = build([path])
    num_targets = 0
    for labels, messages in zip(dataset["labels"], conversations_of(path)):
        targets = [label for label in labels[1:] if label != IGNORE]
        num_targets += len(targets)
        texts = [message.text for message in messages if message.role == "assistant" and message.train]
        ends = [i for i, target in enumerate(targets) if target == tokenizer.eos_token_id]
        starts = [0, *(end + 1 for end in ends)]
        assert [tokenizer.sp_model.decode(targets[i:j]) for i, j in zip(starts, ends)] == texts
        assert starts[-1] == len(targets)
    assert report.supervised_tokens == num_targets > 0


@pytest.mark.parametrize("max_length", [2, 6, 7, 12, 20, 33, 64])
def test_balance_holds_at_every_cut(build, tokenizer, max_length):
    whole = render_batch(conversations_of(CHAT), tokenizer)
    kept = [segment for segment in whole if any(label != IGNORE for label in segment.labels[1:max_length])]
    if not kept:
        with pytest.raises(UserError, match=f"max_length {max_length} cuts every one"):
            build([CHAT], max_length=max_length)
        return
    dataset, report = build([CHAT], max_length=max_length)
    assert dataset["input_ids"][:] == [segment.input_ids[:max_length] for segment in kept]
    assert (report.used, report.dropped_no_target) == (len(kept), len(whole) - len(kept))
    assert report.truncated == sum(len(segment.input_ids) > max_length for segment in kept)
    assert report.tokens + report.tokens_lost == sum(len(segment.input_ids) for segment in whole)
    assert report.tokens == sum(dataset["length"])


def test_cut_is_on_the_right_and_drops_what_has_no_target(build, tmp_path):
    # ids     195  a  196  b  2          195  a  a  a  a  196  b  2
    # at 4    195  a  196  b             195  a  a  a                 no target left: dropped
    path = write(tmp_path / "x.json", [pair("a", "b"), pair("，，，，", "b"), pair("a", "c")])
    dataset, report = build([path], max_length=4)
    assert dataset["item"][:] == [0, 2]
    assert [len(ids) for ids in dataset["input_ids"]] == [4, 4]
    assert [label != IGNORE for label in dataset["labels"][0]] == [False, False, False, True]
    assert report.to_dict() == {
        "read": 3,
        "used": 2,
        "dropped_no_target": 1,
        "truncated": 2,
        "trailing_user_turns_dropped": 0,
        "empty_user_turns": 0,
        "tokens": 8,
        "supervised_tokens": 2,
        "tokens_lost": 10,
        "max_length": 4,
    }
    assert str(report).startswith("read 3 = used 2 + dropped 1 without a target; 2 cut to 4 tokens")


def test_nothing_left_names_the_way_out(build, tmp_path):
    path = write(tmp_path / "x.json", [pair("，，，，", "b"), pair("，，", "b")])
    words = r"max_length 3 .* the shortest prompt is 4 tokens\. Pass a max_length above 4"
    with pytest.raises(UserError, match=words):
        build([path], max_length=3)
    assert build([path], max_length=5)[1].used == 1


def test_report_refuses_a_wrong_balance():
    numbers = dict.fromkeys(DataReport.__dataclass_fields__, 0)
    with pytest.raises(AssertionError):
        DataReport(**numbers | {"read": 2, "used": 1})


def test_trailing_and_empty_user_turns_are_counted(build, tmp_path):
    record = pair("", "b")
    record["conversations"].append({"from": "human", "value": "c"})
    report = build([write(tmp_path / "x.json", [record, pair("a", "b")])])[1]
    assert (report.trailing_user_turns_dropped, report.empty_user_turns) == (1, 1)


def test_files_follow_each_other(build):
    dataset, report = build(f"{LINES}, {CHAT}")
    first, second = build([LINES])[0], build([CHAT])[0]
    assert dataset["input_ids"][:] == [*first["input_ids"], *second["input_ids"]]
    assert dataset["item"][:] == list(range(76)) and report.read == 76


@pytest.mark.parametrize("bad, shown", [(2, 2), (25, 20), (1200, 20)])
def test_all_findings_come_at_once(build, tmp_path, bad, shown):
    path = write(tmp_path / "x.json", [pair("a", "b")] + [pair("a", None)] * bad)
    with pytest.raises(UserError) as caught:
        build([path])
    first, *lines = str(caught.value).split("\n")
    total = "at least 1000" if bad > 1000 else str(bad)
    assert first == f"{total} faults in the data, nothing was trained:"
    assert lines[0] == f'  {path}:1 item 1 turn 1: "value" is null, expected text'
    assert len([line for line in lines if "item" in line]) == shown
    assert lines[shown:] == ([f"  ... and {min(bad, 1000) - 20} more"] if bad > 20 else [])


def test_findings_of_all_files_in_order(build, tmp_path):
    paths = [tmp_path / "none.json", write(tmp_path / "x.json", [None]), write(tmp_path / "y.json", [])]
    words = r"(?s)3 faults.*none\.json: no such file.*x\.json:1 item 0.*y\.json: no items"
    with pytest.raises(UserError, match=words):
        build(paths)


def test_wrong_settings(build, tmp_path):
    for settings, words in [
        ({"max_length": 1}, "max_length is 1; at least 2"),
        ({"train_on": "lst"}, "unknown train_on 'lst', did you mean 'last'"),
        ({"data_format": "bele"}, "unknown data format 'bele', did you mean 'belle'"),
        ({"cache_dir": CHAT}, "cache directory .*belle_chat.json: File exists"),
    ]:
        with pytest.raises(UserError, match=words):
            build([CHAT], **settings)
    with pytest.raises(UserError, match="no data file given"):
        build(" , ")


def test_train_on_last(build, tmp_path):
    every, last = build([CHAT])[1], build([CHAT], train_on="last")[1]
    assert 0 < last.supervised_tokens < every.supervised_tokens and last.tokens == every.tokens
    record = pair("a", "b")
    record["conversations"] += pair("c", "d")["conversations"]
    record["conversations"][-1]["train"] = False
    with pytest.raises(UserError, match='item 0 turn 3: "train" is false on the last assistant turn'):
        build([write(tmp_path / "x.json", [record])], train_on="last")


@needs_shared
def test_long_catalogue_files(build):
    prompt = build([SHARED / "badinput" / "50_too_long_prompt.json"])[1]
    assert (prompt.used, prompt.dropped_no_target, prompt.truncated) == (3, 1, 0)
    answer = build([SHARED / "badinput" / "51_too_long_answer.json"])[1]
    assert (answer.used, answer.dropped_no_target, answer.truncated) == (4, 0, 1)


@needs_shared
def test_control_token_texts_give_no_control_ids(build, tokenizer):
    for name in ["47_special_user_reserved107", "48_special_user_eos", "49_special_in_gpt"]:
        for ids in build([SHARED / "badinput" / f"{name}.json"])[0]["input_ids"]:
            assert [token for token in ids if token in tokenizer.control_ids] == [195, 196, 2]


def test_second_call_does_not_tokenise(build, tokenizer, monkeypatch):
    first = build([CHAT])

    def fail(texts):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(tokenizer, "encode_texts", fail)
    started = time.monotonic()
    second = build([CHAT])
    assert time.monotonic() - started < 1
    assert second[1] == first[1] and second[0].to_dict() == first[0].to_dict()
    with pytest.raises(AssertionError, match="tokenised again"):
        build([CHAT], max_length=500)


def test_cache_follows_the_content_not_the_name(build, tokenizer, tmp_path, monkeypatch):
    path = write(tmp_path / "x.json", [pair("a", "b")])
    before = build([path])[0]["input_ids"][0]
    moved = write(tmp_path / "y.json", [pair("a", "b")])
    path.write_text(path.read_text().replace('"b"', '"c"'))
    after = build([path])[0]["input_ids"][0]
    assert len(before) == len(after) and before != after
    monkeypatch.setattr(tokenizer, "encode_texts", None)
    assert build([moved])[0]["input_ids"][0] == before


def test_cache_follows_the_vocabulary(build, tokenizer, tmp_path, monkeypatch):
    build([CHAT])
    other = tmp_path / "tokenizer.model"
    other.write_bytes(SMALL_VOCABULARY.read_bytes() + b"\x00")
    monkeypatch.setattr(tokenizer, "vocab_file", str(other))
    build([CHAT])
    assert len(list((tmp_path / "cache").glob("*/report.json"))) == 2


def test_leftovers_of_a_killed_build_do_no_harm(build, tmp_path):
    build([CHAT])
    (entry,) = (tmp_path / "cache").glob("*/report.json")
    entry.parent.rename(entry.parent.with_suffix(".tmp"))
    assert build([CHAT])[1].used == 70
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_failed_build_leaves_nothing(build, tmp_path):
    path = write(tmp_path / "x.json", [pair("，，，，", "b")])
    with pytest.raises(UserError, match="nothing is left"):
        build([path], max_length=3)
    assert [entry for entry in (tmp_path / "cache").iterdir() if entry.suffix != ".lock"] == []


def test_two_processes_at_once_build_once(build, tokenizer, tmp_path, monkeypatch):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    encode_texts = tokenizer.encode_texts

    def slow(texts):
        (tmp_path / f"tokenised-{os.getpid()}").touch()
        time.sleep(0.3)  # long enough that the other process comes while this one builds
        return encode_texts(texts)

    def work():
        barrier.wait()
        dataset, report = build([CHAT])
        results.put((dataset.to_dict(), report))

    monkeypatch.setattr(tokenizer, "encode_texts", slow)
    processes = [context.Process(target=work) for _ in range(2)]
    for process in processes:
        process.start()
    one, two = results.get(timeout=30), results.get(timeout=30)
    for process in processes:
        process.join()
    assert one == two and len(one[0]["item"]) == 70
    assert len(list(tmp_path.glob("tokenised-*"))) == 1


def test_full_disk_is_named_and_leaves_nothing(build, tmp_path, monkeypatch):
    def full(path, batches):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("baichuan_sft.data.dataset.write_arrow", full)
    with pytest.raises(EnvironmentFault, match="No space left on device; set BAICHUAN_SFT_CACHE"):
        build([CHAT])
    assert [entry for entry in (tmp_path / "cache").iterdir() if entry.suffix != ".lock"] == []
