"""The quick lane for plain records agrees with the careful one on every record it takes."""

import json
from collections import Counter

import pytest
from fixtures import ROOT, SHARED
from hypothesis import given, settings
from hypothesis import strategies as st

from baichuan_sft.data.findings import RecordFault
from baichuan_sft.data.formats import FORMATS, parse
from baichuan_sft.data.plain import LANES, PlainReader
from baichuan_sft.data.reader import decode, read_raw


def careful(data, data_format, tally):
    """What the careful way makes of it; None where it refuses or has something to say."""
    try:
        messages, notes = parse(decode(data), data_format, tally=tally)
    except RecordFault:
        return None
    return None if notes else messages


def assert_agree(data, data_format=None):
    """Whether the quick lane took the record, once it has been shown that the careful one does, alike."""
    reader, tally = PlainReader(data_format), Counter()
    plain = reader.read(data)
    if plain is None:
        assert not reader.counts
        return False
    assert plain.messages() == careful(data, data_format, tally)
    assert reader.tally() == tally
    return True


def record(*turns, key="conversations", names=("from", "value"), **more):
    return json.dumps({key: [dict(zip(names, turn)) for turn in turns], **more}, ensure_ascii=False).encode()


PAIR = (("human", "a:b"), ("gpt", "c\nd"))


@pytest.mark.parametrize("data_format", [None, *FORMATS])
@pytest.mark.parametrize(
    "key, names", [("conversations", ("from", "value")), ("messages", ("role", "content"))]
)
def test_plain_records_are_taken(data_format, key, names):
    taken = data_format is None or LANES.get(data_format, ("",))[0] == key
    for turns in (PAIR, (("system", "s"), *PAIR), (("用户", "x"), ("助手", "y")), PAIR * 3):
        assert assert_agree(record(*turns, key=key, names=names), data_format) == taken
        assert assert_agree(record(*turns, key=key, names=names, id="1"), data_format) == taken


@pytest.mark.parametrize(
    "data",
    [
        record(*PAIR, id=["deep"]),
        record(*PAIR, system="s"),
        record(*PAIR, id="a:b"),  # a colon too many: perhaps of a key given twice
        record(*PAIR, ("human", "c")),
        record(*PAIR, ("gpt", "c")),
        record(("human", ""), ("gpt", "c")),
        record(("human", "<s>"), ("gpt", "c")),
        record(("human", "a\x00"), ("gpt", "c")),
        record(("Human", "a"), ("gpt", "c")),
        record(("human", "a", True), ("gpt", "c"), names=("from", "value", "train")),
        record(("human", 3), ("gpt", "c")),
        record((["human"], "a"), ("gpt", "c")),
        record(),
        b'{"conversations": [{"from": "human", "value": "a", "value": "b"}, {"from": "gpt", "value": "c"}]}',
        b'{"id": 1, "id": 2,"conversations": [{"from": "human", "value":"a"}, {"from":"gpt","value": "c"}]}',
        b'{"conversations": [{"from": "human", "value": "\\u003a"}, {"from": "gpt", "value": "c"}]}',
        b'{"conversations": [{"from": "human", "value": "\\ud83d"}, {"from": "gpt", "value": "c"}]}',
        b'{"conversations": ["from", "value"]}',
        b'["conversations"]',
        b'"conversations"',
        b"3",
        b"{",
        b"",
        {"conversations": []},
    ],
)
def test_everything_else_is_left_to_the_careful_way(data):
    assert not assert_agree(data)


roles = st.sampled_from(["human", "gpt", "user", "assistant", "system", "bot", "Human", "x", "用户"])
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.sampled_from(
    [":", '":', "\\", "\\u003a", "<s>"]
)
values = texts | st.none() | st.integers() | st.lists(texts, max_size=2)
turns = st.fixed_dictionaries(
    {"from": roles, "value": values}, optional={"train": st.booleans(), "x": values}
)
alternating = st.lists(st.tuples(texts, texts), min_size=1, max_size=3).map(
    lambda pairs: [{"from": r, "value": t} for pair in pairs for r, t in zip(("human", "gpt"), pair)]
)
records = st.fixed_dictionaries(
    {"conversations": alternating | st.lists(turns, max_size=4)},
    optional={"id": values, "text": texts, "messages": st.just([]), "system": texts},
)


@settings(max_examples=500)
@given(records, st.booleans(), st.sampled_from([None, (",", ":"), (" , ", " : ")]))
def test_both_ways_agree(raw, ascii_only, separators):
    assert_agree(json.dumps(raw, ensure_ascii=ascii_only, separators=separators).encode())


def test_nearly_all_real_records_are_plain():
    source = SHARED / "data" / "kdconv_belle.json"
    source = source if source.exists() else ROOT / "data" / "belle_chat.json"
    taken = [
        assert_agree(one.data) for one in read_raw(source, lambda finding, raw: pytest.fail(str(finding)))
    ]
    assert len(taken) > 50 and sum(taken) / len(taken) > 0.95
