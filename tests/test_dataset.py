"""Files to segments: the balance of records and tokens, all findings at once, the cache, what is chosen."""

import errno
import json
import multiprocessing
import os
import time
from dataclasses import replace

import numpy as np
import pytest
from fixtures import ROOT, SHARED, SMALL_VOCABULARY, needs_shared
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from baichuan_sft.data import cache, prepare
from baichuan_sft.data.check import Rules
from baichuan_sft.data.dataset import build_dataset
from baichuan_sft.data.findings import DataFault
from baichuan_sft.data.formats import parse
from baichuan_sft.data.length import TRUNCATION, fit
from baichuan_sft.data.reader import decode, read_raw
from baichuan_sft.data.report import SourceReport
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
    def build(paths, *, cache_dir=tmp_path / "cache", **options):
        names = [name for name in options if name in Rules.__dataclass_fields__]
        rules = Rules(**{name: options.pop(name) for name in names})
        return build_dataset(paths, tokenizer, rules, cache_dir=cache_dir, **options)

    return build


def write(path, records):
    path.write_text(json.dumps(records, ensure_ascii=False))
    return path


def pair(question, answer):
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def rows(dataset, name):
    return [np.asarray(dataset[i][name]).tolist() for i in range(len(dataset))]


def conversations_of(path):
    records = read_raw(path, lambda finding, raw: pytest.fail(str(finding)))
    return [parse(decode(record.data))[0] for record in records]


# --- content and balance --------------------------------------------------------------------------


def test_columns_and_content(build, tokenizer):
    data = build(CHAT.as_posix())
    expected = render_batch(conversations_of(CHAT), tokenizer)
    assert data.train[0]["input_ids"].dtype == data.train[0]["labels"].dtype == np.int32
    assert rows(data.train, "input_ids") == [segment.input_ids.tolist() for segment in expected]
    assert rows(data.train, "labels") == [segment.labels.tolist() for segment in expected]
    assert data.train.lengths.tolist() == [len(segment.input_ids) for segment in expected]
    assert rows(data.train, "item") == list(range(70)) and data.dev is None
    assert data.report.total("read") == data.report.total("used") == 70
    assert data.report.tokens == data.train.lengths.sum()


@pytest.mark.parametrize("path", [CHAT, LINES])
def test_targets_are_the_trained_texts(build, tokenizer, path):
    data = build([path])
    num_targets = 0
    for labels, messages in zip(rows(data.train, "labels"), conversations_of(path)):
        targets = [label for label in labels[1:] if label != IGNORE]
        num_targets += len(targets)
        texts = [message.text for message in messages if message.role == "assistant" and message.train]
        ends = [i for i, target in enumerate(targets) if target == tokenizer.eos_token_id]
        starts = [0, *(end + 1 for end in ends)]
        assert [tokenizer.sp_model.decode(targets[i:j]) for i, j in zip(starts, ends)] == texts
        assert starts[-1] == len(targets)
    assert data.report.supervised_tokens == data.train.targets.sum() == num_targets > 0


@pytest.mark.parametrize("truncation", ["cut_turns", "cut_left", "drop"])
@pytest.mark.parametrize("max_length", [2, 6, 7, 12, 20, 33, 64])
def test_balance_holds_at_every_cut(build, tokenizer, max_length, truncation):
    whole = render_batch(conversations_of(CHAT), tokenizer)
    pieces = [fit(segment, max_length, truncation) for segment in whole]
    kept = [piece for one in pieces for piece in one]
    if not kept:
        words = "without a target 70|too long 70|leaves no target in any"
        with pytest.raises(UserError, match=f"nothing is left of 70 records: .*({words})"):
            build([CHAT], max_length=max_length, truncation=truncation)
        return
    data = build([CHAT], max_length=max_length, truncation=truncation)
    (source,) = data.report.sources
    assert rows(data.train, "input_ids") == [piece.input_ids.tolist() for piece in kept]
    assert source.used + source.no_target + source.too_long == 70 == source.read
    assert (source.too_long > 0) == (truncation == "drop" and source.used < 70)
    assert source.tokens_rendered == sum(len(segment.input_ids) for segment in whole)
    assert source.tokens_used == data.train.lengths.sum() == data.report.tokens
    assert data.report.counts["cut"] == sum(
        bool(one) and len(one[0].input_ids) < len(segment.input_ids) for one, segment in zip(pieces, whole)
    )


def test_error_is_a_finding_with_its_place(build, tmp_path):
    path = write(tmp_path / "x.json", [pair("a", "b"), pair("，，，，", "b")])
    with pytest.raises(
        DataFault, match=r"ERROR DATA024 .*x\.json:1:\d+ item 1: 8 tokens, the prompt alone 6"
    ):
        build([path], max_length=7, truncation="error")
    report = build([path], max_length=7, truncation="error", on_error="skip").report
    assert report.balance() == "read 2 = used 1 + rejected 1"


@pytest.mark.parametrize(
    "truncation, rest", [("cut_turns", ": no supervised token would remain"), ("drop", "")]
)
def test_what_is_dropped_for_its_length_is_named(build, tmp_path, truncation, rest):
    path = write(tmp_path / "x.json", [pair("a", "b"), pair("，，，，，，", "b")])
    data = build([path], max_length=7, truncation=truncation, report_dir=tmp_path / "out")
    (line,) = (tmp_path / "out" / "data_report.jsonl").read_text().splitlines()
    finding = json.loads(line)
    assert (finding["severity"], finding["code"], finding["item"]) == ("WARN", "DATA036", 1)
    assert finding["text"] == f"prompt alone is 8 tokens > model_max_length 7{rest}"
    assert data.report.counts["code:DATA036"] == 1


def test_nothing_left_names_the_way_out(build, tmp_path):
    path = write(tmp_path / "x.json", [pair("，，，，", "b"), pair("，，", "b")])
    words = r"max_length 3 .* the shortest prompt is 4 tokens\. Pass a --model_max_length of at least 6"
    with pytest.raises(UserError, match=words):
        build([path], max_length=3)
    assert build([path], max_length=6).report.total("used") == 1


def test_the_report_refuses_wrong_sums():
    numbers = dict.fromkeys(SourceReport.__dataclass_fields__, 0) | {"path": "x", "sha256": "0"}
    SourceReport(**numbers)
    for wrong in ({"read": 2, "used": 1}, {"tokens_rendered": 5, "tokens_used": 4}):
        with pytest.raises(AssertionError):
            SourceReport(**numbers | wrong)


def test_the_report_says_what_was_normalised(build, tmp_path):
    record = pair("", "b </s>")
    record["conversations"].append({"from": "human", "value": "c"})
    report = build([write(tmp_path / "x.json", [record, pair("a", "b"), pair("a", "b")])]).report
    lines = str(report).splitlines()
    assert lines[0] == "read 3 = used 3 + rejected 0"
    assert lines[1].startswith("tokens: rendered ") and "supervised" in lines[1]
    assert lines[2:] == [
        "1 exact duplicates are kept; --dedup True drops them",
        "note DATA030: trailing user turn dropped: 1",
        "warn DATA031: empty user turn: 1",
        "note DATA032: text of a control token, encoded as plain text: 1",
    ]
    assert report.counts["role:human"] == 4 and report.counts["format:belle"] == 3


def test_documents_are_split_and_every_token_is_learnt(build, tokenizer, tmp_path):
    path = tmp_path / "x.jsonl"
    texts = ["一二三四五六七八九十" * 3, "短"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = build([path], max_length=8)
    ids = np.concatenate([data.train[i]["input_ids"] for i in range(len(data.train))]).tolist()
    assert ids == [token for text in texts for token in [*tokenizer.encode_text(text), 2]]
    assert data.train.targets.sum() == len(ids) - len(data.train)  # all but the first of each piece
    assert rows(data.train, "item") == [0] * (len(data.train) - 1) + [1]
    assert data.report.balance() == "read 2 = used 2 + rejected 0" and data.report.total("tokens_lost") == 0


def test_plain_text_by_line_and_by_file(build, tokenizer, tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("第一行\n\n[第二行\n")
    lines = build([path], data_format="text")
    assert len(lines.train) == 2 and lines.report.counts["format:text"] == 2
    (whole,) = rows(build([path], data_format="document").train, "input_ids")
    assert whole == [*tokenizer.encode_text("第一行\n\n[第二行\n"), 2]
    with pytest.raises(DataFault, match=r"DATA005|DATA006|DATA009"):
        build([path])


def test_train_on_last(build, tmp_path):
    every, last = build([CHAT]).report, build([CHAT], train_on="last").report
    assert 0 < last.supervised_tokens < every.supervised_tokens and last.tokens == every.tokens
    record = pair("a", "b")
    record["conversations"] += pair("c", "d")["conversations"]
    record["conversations"][-1]["train"] = False
    with pytest.raises(DataFault, match=r'DATA021 .* item 0 turn 3: no trained turn: "train" is false'):
        build([write(tmp_path / "x.json", [record])], train_on="last")


@st.composite
def files(draw):
    """Records, good and bad, of every kind that is counted."""
    texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
    good = st.builds(pair, texts, texts.filter(str.strip))
    bad = st.sampled_from([None, 3, {}, pair("a", ""), pair("a", None), {"conversations": []}])
    return draw(st.lists(good | bad, min_size=1, max_size=8))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    records=files(),
    max_length=st.integers(4, 30),
    truncation=st.sampled_from(list(TRUNCATION)),
    dedup=st.booleans(),
)
def test_nothing_is_lost_whatever_is_read(build, tmp_path, records, max_length, truncation, dedup):
    path = write(tmp_path / "x.json", records)
    options = dict(max_length=max_length, truncation=truncation, dedup=dedup, on_error="skip")
    try:
        data = build([path], report_dir=tmp_path / "reports", **options)
    except UserError as error:
        assert f"nothing is left of {len(records)} records" in str(error)
        return
    (source,) = data.report.sources  # its sums are asserted when it is made
    assert source.read == len(records) and source.used == len(set(rows(data.train, "item")))
    rejected = tmp_path / "reports" / "rejected.jsonl"
    text = rejected.read_text() if rejected.exists() else ""
    lines = [json.loads(line) for line in text.split("\n")[:-1]]  # splitlines would cut at U+0085, too
    assert len(lines) == source.rejected
    assert all(json.loads(line["raw"]) == records[line["item"]] for line in lines)


# --- findings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad, shown", [(2, 2), (25, 20), (1200, 20)])
def test_all_findings_come_at_once(build, tmp_path, bad, shown):
    path = write(tmp_path / "x.json", [pair("a", "b")] + [pair("a", None)] * bad)
    with pytest.raises(DataFault) as caught:
        build([path], report_dir=tmp_path / "out")
    first, *lines = str(caught.value).split("\n")
    assert first.startswith(
        f"{bad:,} faults in the data (--on_error skip leaves such records out; all are in "
    )
    assert lines[0].endswith('item 1 turn 1: "value" is null, expected text')
    assert lines[0].startswith(f"  ERROR DATA016 {path}:1:")
    assert len([line for line in lines if "item" in line]) == shown
    assert lines[shown:] == ([f"  ... and {bad - 20:,} more"] if bad > 20 else [])
    assert len(caught.value.findings) == min(bad, 1000)
    written = [json.loads(line) for line in (tmp_path / "out" / "data_report.jsonl").read_text().splitlines()]
    assert [entry["item"] for entry in written] == list(range(1, bad + 1))
    assert {(entry["severity"], entry["code"], entry["turn"]) for entry in written} == {
        ("ERROR", "DATA016", 1)
    }


def test_one_finding_is_one_line(build, tmp_path):
    path = write(tmp_path / "x.json", [pair("a", None)])
    words = r'^ERROR DATA016 .*x\.json:1:\d+ item 0 turn 1: "value" is null, .*; --on_error skip leaves it'
    with pytest.raises(DataFault, match=words):
        build([path])


def test_findings_of_all_files_in_order(build, tmp_path):
    paths = [tmp_path, write(tmp_path / "x.json", [None]), write(tmp_path / "y.json", [])]
    words = r"(?s)3 faults.*DATA001.*is a directory.*x\.json:1:2 item 0.*y\.json.*no items"
    with pytest.raises(DataFault, match=words):
        build(paths)


def test_skip_keeps_the_bytes_and_trains_on_the_rest(build, tmp_path):
    path = tmp_path / "x.jsonl"
    lines = [
        json.dumps(pair("a", "b")).encode(),
        b'{"conversations": \xff}',
        b"[",
        json.dumps(pair("c", "d")).encode(),
    ]
    path.write_bytes(b"\n".join(lines))
    for _ in range(2):  # from the file, and from the cache
        data = build([path], on_error="skip", report_dir=tmp_path / "out")
        assert rows(data.train, "item") == [0, 3]
        assert data.report.balance() == "read 4 = used 2 + rejected 2"
        rejected = [
            json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
        ]
        assert [(entry["item"], entry["line"]) for entry in rejected] == [(1, 2), (2, 3)]
        assert "raw_base64" in rejected[0] and rejected[1]["raw"] == "["
    with pytest.raises(DataFault, match="2 faults"):  # what was skipped is not forgotten
        build([path])


@pytest.mark.parametrize("num_workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_findings_do_not_depend_on_the_workers(build, tmp_path, num_workers):
    path = tmp_path / "x.jsonl"
    good, bad = json.dumps(pair("a", "b" * 40)), json.dumps(pair("a", None))
    path.write_text(
        "".join((bad if i % 700 == 5 else "{" if i % 900 == 7 else good) + "\n" for i in range(4000))
    )
    with pytest.raises(DataFault) as caught:
        build([path], num_workers=num_workers, cache_dir=tmp_path / f"cache{num_workers}")
    items = sorted([*range(5, 4000, 700), *range(7, 4000, 900)])
    assert [(finding.item, finding.line) for finding in caught.value.findings] == [(i, i + 1) for i in items]
    report = build([path], num_workers=num_workers, on_error="skip").report
    assert report.balance() == f"read 4,000 = used {4000 - len(items):,} + rejected {len(items)}"


def test_wrong_settings(build, tmp_path):
    for options, words in [
        ({"max_length": 1}, "max_length is 1; at least 2"),
        ({"train_on": "lst"}, "unknown train_on 'lst', did you mean 'last'"),
        ({"data_format": "bele"}, "unknown data format 'bele', did you mean 'belle'"),
        ({"truncation": "cut"}, "unknown truncation 'cut'"),
        ({"on_error": "skp"}, "unknown on_error 'skp', did you mean 'skip'"),
        ({"cache_dir": CHAT}, "cache directory .*belle_chat.json: (File exists|Not a directory)"),
    ]:
        with pytest.raises(UserError, match=words):
            build([CHAT], **options)


@needs_shared
def test_control_token_texts_give_no_control_ids(build, tokenizer):
    for name in ["47_special_user_reserved107", "48_special_user_eos", "49_special_in_gpt"]:
        data = build([SHARED / "badinput" / f"{name}.json"])
        assert data.report.counts["code:DATA032"] == 1
        for ids in rows(data.train, "input_ids"):
            assert [token for token in ids if token in tokenizer.control_ids] == [195, 196, 2]


# --- choosing -------------------------------------------------------------------------------------


def test_files_follow_each_other(build):
    data = build(f"{LINES}, {CHAT}")
    first, second = build([LINES]).train, build([CHAT]).train
    assert rows(data.train, "input_ids") == [*rows(first, "input_ids"), *rows(second, "input_ids")]
    assert data.train.sources.tolist() == [0] * 6 + [1] * 70 and data.report.total("read") == 76


def test_weights_and_counts(build):
    data = build(f"{LINES}:1,{CHAT}:2")
    assert np.bincount(data.train.sources).tolist() == [6, 12]
    assert data.report.balance() == "read 76 = used 18 + not drawn 58"
    data = build(f"{LINES}#15,{CHAT}#10")
    assert np.bincount(data.train.sources).tolist() == [15, 10]
    assert data.report.balance() == "read 76 = used 16 + not drawn 60; 9 repeated"
    again = build(f"{LINES}#15,{CHAT}#10")
    assert again.train.index.tolist() == data.train.index.tolist()
    assert build(f"{LINES}#15,{CHAT}#10", seed=1).train.index.tolist() != data.train.index.tolist()


def test_a_truncation_for_one_source(build, tmp_path):
    for name in ("one", "two"):
        write(tmp_path / f"{name}.json", [pair("a", "b" * 30), pair("a", name)])
    listed = tmp_path / "mix.yaml"
    listed.write_text("- path: one.json\n  truncation: drop\n- path: two.json\n")
    data = build(str(listed), max_length=8)
    assert [(source.used, source.too_long) for source in data.report.sources] == [(1, 1), (2, 0)]


def test_dedup_keeps_the_first_of_all_files(build, tmp_path):
    one = write(tmp_path / "one.json", [pair("a", "b"), pair("c", "d"), pair("a", "b")])
    two = write(tmp_path / "two.json", [pair("c", "d"), pair("e", "f")])
    kept = build([one, two])
    assert len(kept.train) == 5 and kept.report.total("duplicates") == 2
    data = build([one, two], dedup=True)
    assert list(zip(data.train.sources.tolist(), data.train.items.tolist())) == [(0, 0), (0, 1), (1, 1)]
    assert data.report.balance() == "read 5 = used 3 + duplicates dropped 2"


def test_held_out_records_are_a_share_and_never_trained_on(build, tmp_path):
    records = [pair(f"问{i % 40}", f"答{i % 40}") for i in range(100)]  # most have a copy
    path = write(tmp_path / "x.json", records)
    data = build([path], dev_ratio=0.25)
    seen, held_out = set(data.train.hashes.tolist()), set(data.dev.hashes.tolist())
    assert len(held_out) == 10 and len(seen) == 30 and not seen & held_out
    assert len(data.train) + len(data.dev) == 100 and "held out" in data.report.balance()
    assert build([path], dev_ratio=0.25, seed=1).dev.items.tolist() != data.dev.items.tolist()
    assert len(build([path], dev_ratio=0.0001).dev) >= 1
    with pytest.raises(UserError, match=r"dev_ratio is 1\.5"):
        build([write(tmp_path / "y.json", [pair("a", "b")])], dev_ratio=1.5)


# --- cache ----------------------------------------------------------------------------------------


def test_second_call_does_not_tokenise(build, tokenizer, monkeypatch):
    first = build([CHAT])

    def fail(texts, num_threads=-1):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(tokenizer, "encode_texts", fail)
    started = time.monotonic()
    second = build([CHAT])
    assert time.monotonic() - started < 10
    assert str(second.report) == str(first.report)
    assert rows(second.train, "labels") == rows(first.train, "labels")
    with pytest.raises(AssertionError, match="tokenised again"):
        build([CHAT], max_length=500)


def test_cache_follows_the_content_not_the_name(build, tokenizer, tmp_path, monkeypatch):
    path = write(tmp_path / "x.json", [pair("a", "b")])
    before = rows(build([path]).train, "input_ids")
    moved = write(tmp_path / "y.json", [pair("a", "b")])
    path.write_text(path.read_text().replace('"b"', '"c"'))
    after = rows(build([path]).train, "input_ids")
    assert len(before[0]) == len(after[0]) and before != after
    monkeypatch.setattr(tokenizer, "encode_texts", None)
    assert rows(build([moved]).train, "input_ids") == before


def test_cache_follows_the_vocabulary(build, tokenizer, tmp_path, monkeypatch):
    build([CHAT])
    other = tmp_path / "tokenizer.model"
    other.write_bytes(SMALL_VOCABULARY.read_bytes() + b"\x00")
    monkeypatch.setattr(tokenizer, "vocab_file", str(other))
    build([CHAT])
    assert len(list((tmp_path / "cache").glob("*/survey.json"))) == 2


def test_large_data_is_split_into_shards(build, tmp_path, monkeypatch):
    whole = rows(build([CHAT]).train, "labels")
    monkeypatch.setattr("baichuan_sft.data.tokens.SHARD_TOKENS", 100)
    monkeypatch.setattr("baichuan_sft.data.check.BLOCK_RECORDS", 7)
    data = build([CHAT], cache_dir=tmp_path / "other")
    assert len(list((tmp_path / "other").glob("*/data-*.arrow"))) > 3
    assert rows(data.train, "labels") == whole


def test_leftovers_of_a_killed_build_do_no_harm(build, tmp_path):
    build([CHAT])
    (entry,) = (tmp_path / "cache").glob("*/survey.json")
    entry.parent.rename(entry.parent.with_suffix(".x.tmp"))
    assert build([CHAT]).report.total("used") == 70
    assert not list((tmp_path / "cache").glob("*.tmp"))


def prepared(root):
    return [entry for entry in root.iterdir() if entry.is_dir() and entry.name != "files"]


def test_a_file_that_changes_while_it_is_read_is_refused_by_name(build, tmp_path, monkeypatch):
    path = write(tmp_path / "x.json", [pair("a", "b")])
    survey = prepare.survey_file

    def meanwhile(*args, tokenizer=None, **options):
        if tokenizer is not None:
            write(path, [pair("a", "c")])  # of the same size
        return survey(*args, tokenizer=tokenizer, **options)

    monkeypatch.setattr(prepare, "survey_file", meanwhile)
    with pytest.raises(DataFault, match=r"ERROR DATA090 .*x\.json: changed after it was checked \(mtime_ns"):
        build([path])
    assert prepared(tmp_path / "cache") == []


def test_a_change_that_keeps_size_and_time_is_seen_too(tmp_path):
    path, root = write(tmp_path / "x.json", [1]), cache.cache_root(tmp_path / "cache")
    state = cache.identity(str(path), root)
    with path.open("r+") as file:
        file.write("[2]")
    os.utime(path, ns=(state.mtime_ns, state.mtime_ns))
    with pytest.raises(DataFault, match=r"changed after it was checked \(sha256\)"):
        cache.require_unchanged(state)
    path.unlink()
    with pytest.raises(DataFault, match="No such file"):
        cache.require_unchanged(state)


def test_a_large_old_file_is_hashed_once(tmp_path, monkeypatch):
    path, root = write(tmp_path / "x.json", [1]), cache.cache_root(tmp_path / "cache")
    cache.identity(str(path), root)  # too new to be remembered: it could change within one tick of the clock
    long_ago = time.time() - 100
    os.utime(path, (long_ago, long_ago))
    state = cache.identity(str(path), root)
    monkeypatch.setattr(cache, "_sha256", lambda path: pytest.fail("read again"))
    assert cache.identity(str(path), root) == state


def test_a_checked_file_is_pinned(tmp_path):
    path, root = write(tmp_path / "x.json", [1]), cache.cache_root(tmp_path / "cache")
    cache.pin(cache.identity(str(path), root), root)
    write(path, [2])
    for _ in range(2):
        words = r"DATA090 .*x\.json: changed after it was checked \(2.*run `baichuan-sft data check"
        with pytest.raises(DataFault, match=words):
            cache.identity(str(path), root)
    cache.unpin(str(path), root)
    assert cache.identity(str(path), root).size == 3


def test_two_processes_at_once_build_once(build, tokenizer, tmp_path, monkeypatch):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    encode_texts = tokenizer.encode_texts

    def slow(texts, num_threads=-1):
        (tmp_path / f"tokenised-{os.getpid()}").touch()
        time.sleep(0.3)  # long enough that the other process comes while this one builds
        return encode_texts(texts, num_threads)

    def work(wait):
        barrier.wait()
        data = build([CHAT], wait=wait)
        results.put((rows(data.train, "input_ids"), str(data.report)))

    monkeypatch.setattr(tokenizer, "encode_texts", slow)
    for waits in ((False, False), (False, True)):
        processes = [context.Process(target=work, args=(wait,)) for wait in waits]
        for process in processes:
            process.start()
        one, two = results.get(timeout=30), results.get(timeout=30)
        for process in processes:
            process.join()
        assert one == two and len(one[0]) == 70
    assert len(list(tmp_path.glob("tokenised-*"))) == 1


def test_full_disk_is_named_and_leaves_nothing(build, tmp_path, monkeypatch):
    def full(self, segments):
        (self.directory / "half").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("baichuan_sft.data.prepare.ShardWriter.write", full)
    with pytest.raises(EnvironmentFault, match="No space left on device; set BAICHUAN_SFT_CACHE"):
        build([CHAT])
    assert prepared(tmp_path / "cache") == []


def test_two_mixes_with_a_file_in_common_do_not_disturb_each_other(tokenizer, tmp_path):
    """Started together, both prepare the shared file: one does, the other takes what it left."""
    shared = tmp_path / "shared.jsonl"
    shared.write_text("".join(json.dumps(pair(f"问{i}", "答" * 9)) + "\n" for i in range(3000)))
    mixes = [[shared], [shared, CHAT], [LINES, shared], [CHAT, shared, LINES]]
    context = multiprocessing.get_context("fork")
    results, barrier = context.Queue(), context.Barrier(len(mixes))

    def work(paths):
        barrier.wait()
        data = build_dataset(paths, tokenizer, Rules(), cache_dir=tmp_path / "cache")
        results.put(np.bincount(data.train.sources)[paths.index(shared)])

    processes = [context.Process(target=work, args=(paths,)) for paths in mixes]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in mixes] == [3000] * len(mixes)
    for process in processes:
        process.join()
    assert len(prepared(tmp_path / "cache")) == 3


def test_two_files_of_one_content(build, tmp_path):
    for name in ("a", "b"):
        write(tmp_path / f"{name}.json", [pair("a", "b")])
    data = build([tmp_path / "a.json", tmp_path / "b.json"])
    assert data.train.sources.tolist() == [0, 1] and data.report.total("duplicates") == 1


def test_the_suffix_that_decides_the_layout_is_in_the_key(build, tmp_path):
    for name in ("x.jsonl", "x.txt"):
        (tmp_path / name).write_text('{"text": "甲"}\n{"text": "乙"}\n')
    ids = [
        rows(build([tmp_path / name], data_format="text").train, "input_ids") for name in ("x.jsonl", "x.txt")
    ]
    assert len(ids[0][0]) < len(ids[1][0])  # of one the braces are text


def test_damaged_shards_are_refused(build, tmp_path):
    build([CHAT])
    (shard,) = (tmp_path / "cache").glob("*/data-00000.arrow")
    shard.unlink()
    with pytest.raises(EnvironmentFault, match="damaged data in the cache; delete this directory"):
        build([CHAT])


def test_who_waits_does_not_wait_for_ever(build, monkeypatch):
    monkeypatch.setattr(prepare, "PATIENCE", 0.5)
    assert len(build([CHAT], wait=True).train) == 70  # nobody was at work, so it did the work


def test_a_cache_that_can_only_be_read_is_enough(build, tmp_path, monkeypatch):
    build([CHAT])

    def refuse(*args, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(cache.os, "replace", refuse)
    monkeypatch.setattr(prepare, "FileLock", refuse)
    assert len(build([CHAT]).train) == 70


def test_what_counts_as_a_duplicate(build, tmp_path):
    untrained = pair("a", "b")
    untrained["conversations"] += pair("c", "d")["conversations"]
    trained = json.loads(json.dumps(untrained))
    untrained["conversations"][1]["train"] = False
    records = [pair("a\x1eb", "c"), pair("a", "b\x1ec"), trained, untrained]
    assert build([write(tmp_path / "x.json", records)]).report.total("duplicates") == 0


def test_reports_are_complete_where_a_file_is_missing(build, tmp_path):
    paths = [write(tmp_path / "x.json", [None]), tmp_path / "none.json"]
    with pytest.raises(DataFault, match=r"(?s)2 faults.*x\.json:1.*none\.json: no such file"):
        build(paths, report_dir=tmp_path / "out")
    written = [json.loads(line) for line in (tmp_path / "out" / "data_report.jsonl").read_text().splitlines()]
    assert [entry["code"] for entry in written] == ["DATA010", "DATA001"]
    with pytest.raises(DataFault, match="DATA001"):  # a wrong name is no record to leave out
        build(paths, on_error="skip")


def test_an_empty_file_can_be_skipped(build, tmp_path):
    empty = tmp_path / "empty.json"
    empty.touch()
    assert len(build([empty, CHAT], on_error="skip", report_dir=tmp_path / "out").train) == 70
    assert "DATA004" in (tmp_path / "out" / "data_report.jsonl").read_text()
    with pytest.raises(UserError, match="none of the files can be read"):
        build([empty], on_error="skip")


def test_a_report_never_replaces_what_is_read(build, tmp_path):
    path = tmp_path / "out" / "rejected.jsonl"
    path.parent.mkdir()
    write(path, [pair("a", "b")])
    with pytest.raises(
        UserError, match=r"rejected\.jsonl is where the report goes; pass another --output_dir"
    ):
        build([path], report_dir=tmp_path / "out")
    assert path.exists()


def test_a_share_of_nothing_is_named(build, tmp_path):
    path = write(tmp_path / "x.json", [pair("，" * 99, "b")])
    for share in (":1", "#5"):
        with pytest.raises(UserError, match=r"x\.json: none of its records can be used, so it has no share"):
            build(f"{CHAT}{share},{path}{share}", max_length=64)


def test_rules_decide_the_key(build, tmp_path):
    rules = Rules(max_length=64)
    for other in (rules, replace(rules, truncation="drop"), replace(rules, merge_consecutive=True)):
        build(
            [CHAT],
            **{name: getattr(other, name) for name in ("max_length", "truncation", "merge_consecutive")},
        )
    assert len(prepared(tmp_path / "cache")) == 3
