"""Rows packed while files are read: one order for any number of ranks, nothing lost, exact resume."""

import json
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from fixtures import SMALL_VOCABULARY

from baichuan_sft.data.check import Rules
from baichuan_sft.data.files import ReadOptions
from baichuan_sft.data.findings import DataFault
from baichuan_sft.data.sources import Source
from baichuan_sft.data.streaming import StreamingRows
from baichuan_sft.errors import UserError
from baichuan_sft.model.tokenization_baichuan import BaichuanTokenizer

TOKENIZER = BaichuanTokenizer(vocab_file=str(SMALL_VOCABULARY))


@pytest.fixture
def sources(tmp_path):
    """Two files of 300 and 90 conversations of different lengths."""
    made = []
    for name, size in (("a", 300), ("b", 90)):
        path = tmp_path / f"{name}.jsonl"
        with path.open("w") as file:
            for i in range(size):
                pair = [
                    {"from": "human", "value": f"{name}{i}"},
                    {"from": "gpt", "value": "好" * (1 + i * 7 % 40)},
                ]
                file.write(json.dumps({"conversations": pair}) + "\n")
        made.append(Source(str(path)))
    return made


def stream(sources, **options):
    options = {"capacity": 64, "window": 40, "seed": 3} | options
    return StreamingRows(sources, TOKENIZER, Rules(max_length=64), **options)


def names(rows):
    return [[(segment["source"], segment["item"]) for segment in row] for row in rows]


def test_rows_fit_and_are_nearly_full(sources):
    rows = list(islice(stream(sources), 300))
    sizes = [sum(len(segment["input_ids"]) for segment in row) for row in rows]
    assert max(sizes) <= 64 and sum(sizes) / (64 * len(rows)) > 0.97
    for segment in rows[0]:
        assert segment["input_ids"].dtype == segment["labels"].dtype == np.int32


def test_every_record_of_a_source_comes_before_any_comes_again(sources):
    seen = Counter(item for row in islice(stream(sources[1:], window=30), 400) for _, item in names([row])[0])
    assert set(seen) == set(range(90)) and max(seen.values()) - min(seen.values()) <= 2


def test_weights_are_chances(tmp_path, sources):
    weighted = [Source(sources[0].path, weight=3.0, group=0), Source(sources[1].path, weight=1.0, group=1)]
    drawn = Counter(source for row in islice(stream(weighted), 400) for source, _ in names([row])[0])
    assert 2.4 < drawn[0] / drawn[1] < 3.7


def test_files_of_one_pattern_share_a_weight_and_without_weights_size_decides(sources):
    a, b = (source.path for source in sources)  # 300 and 90 records
    one = stream([Source(a, weight=1.0, group=0), Source(b, weight=1.0, group=0)]).chances
    none = stream([Source(a, group=0), Source(b, group=1)]).chances
    assert one == pytest.approx(none) and 0.7 < one[0] < 0.85


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_one_order_and_no_record(sources, world_size):
    def records(world_size, rank, number):
        rows = stream(sources[:1], world_size=world_size, rank=rank, capacity=None)
        drawn = [one for row in islice(rows, number) for one in names([row])[0]]
        return sorted(drawn)

    alone = records(1, 0, 240)
    together = sorted(
        one for rank in range(world_size) for one in records(world_size, rank, 240 // world_size)
    )
    # Each rank fills whole windows of 40: compare what all have surely seen.
    assert len(Counter(alone) & Counter(together)) > 200
    assert not Counter(records(world_size, 0, 80)) & Counter(records(world_size, 1, 80))


@pytest.mark.parametrize("capacity", [64, None])
@pytest.mark.parametrize("taken", [0, 1, 7, 23, 60])
def test_a_resumed_stream_goes_on_exactly(sources, capacity, taken):
    straight = names(islice(stream(sources, capacity=capacity), taken + 40))
    first = stream(sources, capacity=capacity)
    list(islice(first, taken))
    state = json.loads(json.dumps(first.state_dict()))
    resumed = stream(sources, capacity=capacity, state=state)
    assert names(islice(resumed, 40)) == straight[taken:]


def test_another_setting_does_not_resume(sources):
    state = stream(sources).state_dict()
    for other in ({"world_size": 2}, {"seed": 4}, {"capacity": 32}, {"window": 41}):
        with pytest.raises(
            UserError, match=f"the stream was saved with {next(iter(other))} .* resume with the same"
        ):
            stream(sources, state=state, **other)


@pytest.mark.parametrize("broken", ["{", json.dumps({"conversations": []})])
def test_a_faulty_record_stops_or_is_counted(tmp_path, broken):
    good = json.dumps({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]})
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join([good, broken, good]))
    with pytest.raises(DataFault, match=r"ERROR DATA0\d\d .*x\.jsonl:2"):
        list(islice(stream([Source(str(path))]), 1))
    skipping = stream([Source(str(path))], on_error="skip", window=4)
    rows = names(islice(skipping, 3))
    assert {item for row in rows for _, item in row} == {0, 2} and skipping.counts["rejected"] > 0


def test_a_source_without_a_record_is_refused(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("\n")
    with pytest.raises(UserError, match=r"x\.jsonl"):
        list(islice(stream([Source(str(path))], on_error="skip"), 1))
    bad = tmp_path / "y.jsonl"
    bad.write_text("{}\n")
    with pytest.raises(UserError, match=r"y\.jsonl.*no record can be used"):
        list(islice(stream([Source(str(bad))], on_error="skip"), 1))


def test_other_files_or_rules_do_not_resume(sources, tmp_path):
    state = stream(sources).state_dict()
    with pytest.raises(UserError, match="the stream was saved with rules"):
        StreamingRows(sources, TOKENIZER, Rules(max_length=32), capacity=64, window=40, seed=3, state=state)
    with open(sources[0].path, "a") as file:
        file.write("\n")
    with pytest.raises(UserError, match=r"the stream was saved with files .*a\.jsonl"):
        stream(sources, state=state)


def test_documents_stream_and_counts_do_not(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("一二三四五六")
    rules = Rules(max_length=64, data_format="document")
    rows = StreamingRows([Source(str(path))], TOKENIZER, rules, capacity=64, window=4)
    assert next(iter(rows))[0]["item"] == 0
    with pytest.raises(UserError, match=r"x\.txt#5: a stream is endless; give weights, not counts"):
        stream([Source(str(path), samples=5)])


def test_a_loader_with_workers_is_refused(sources):
    loader = torch.utils.data.DataLoader(stream(sources), batch_size=None, num_workers=1)
    with pytest.raises(UserError, match="--dataloader_num_workers 0"):
        next(iter(loader))


def test_what_is_left_out_of_a_stream_is_kept_and_counted(tmp_path):
    good = json.dumps({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]})
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join([good, "[", good.replace('"a"', json.dumps("长" * 99))]))
    skipping = stream([Source(str(path))], on_error="skip", window=4, report_dir=tmp_path / "out")
    list(islice(skipping, 3))
    skipping.log.__exit__()
    report = [json.loads(line) for line in (tmp_path / "out" / "data_report.jsonl").read_text().splitlines()]
    assert [(entry["code"], entry["item"]) for entry in report] == [("DATA006", 1), ("DATA036", 2)]
    (rejected,) = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    assert json.loads(rejected)["raw"] == "["
    assert "rejected" in skipping.balance() and skipping.counts["no_target"] > 0


def test_what_the_reader_finds_ahead_hides_nothing(tmp_path):
    """A mark at the start, and a line too long, are told while earlier items still wait for their turn."""
    good = json.dumps({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]})
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf{]\n" + "\n".join([good, "{", good + " " * 3000, good]).encode())
    rules = Rules(max_length=64, reading=ReadOptions(max_line=2000))
    options = dict(capacity=64, window=4, on_error="skip", report_dir=tmp_path / "out")
    skipping = StreamingRows([Source(str(path))], TOKENIZER, rules, **options)
    list(islice(skipping, 3))
    skipping.log.__exit__()
    report = [json.loads(line) for line in (tmp_path / "out" / "data_report.jsonl").read_text().splitlines()]
    found = sorted((entry["code"], entry.get("item")) for entry in report if entry["code"] != "DATA003")
    assert found == [("DATA006", 0), ("DATA006", 2), ("DATA008", 3)] and len(report) == 4
