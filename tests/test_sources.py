"""Which files are asked for and how much of each; nothing is guessed."""

import os
import tracemalloc

import numpy as np
import pytest
from fixtures import ROOT

from baichuan_sft.data.duplicates import Duplicates
from baichuan_sft.data.sources import Source, mix, parse_sources
from baichuan_sft.errors import UserError

CHAT, LINES = ROOT / "data" / "belle_chat.json", ROOT / "data" / "belle_chat.jsonl"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.json", "b.jsonl", "c1.jsonl", "c2.jsonl", "d:0.5", "e#3"):
        (tmp_path / name).write_text("[]")
    return tmp_path


def summary(sources):
    return [(source.path, source.weight, source.samples, source.group) for source in sources]


def test_names_weights_counts_and_patterns(folder):
    assert summary(parse_sources("a.json")) == [("a.json", None, None, 0)]
    assert summary(parse_sources("a.json:0.7, b.jsonl:3e-1")) == [
        ("a.json", 0.7, None, 0),
        ("b.jsonl", 0.3, None, 1),
    ]
    assert summary(parse_sources("a.json#100,b.jsonl")) == [
        ("a.json", None, 100, 0),
        ("b.jsonl", None, None, 1),
    ]
    assert summary(parse_sources("c*.jsonl#9")) == [("c1.jsonl", None, 9, 0), ("c2.jsonl", None, 9, 0)]
    assert summary(parse_sources(["a.json", "b.jsonl"])) == [
        ("a.json", None, None, 0),
        ("b.jsonl", None, None, 1),
    ]
    assert [source.path for source in parse_sources("d:0.5,e#3")] == ["d:0.5", "e#3"]  # these files exist


@pytest.mark.parametrize(
    "spec, words",
    [
        ("", "no data file given"),
        (" , ", "no data file given"),
        ("x*.jsonl", r"no file matches x\*\.jsonl"),
        ("a.json,./a.json", r"\./a\.json is listed twice \(as a\.json\)"),
        ("c*.jsonl,c1.jsonl", "c1.jsonl is listed twice"),
        ("a.json:0", "weight 0, expected a number > 0"),
        ("a.json:-1", "weight -1, expected"),
        ("a.json:nan", "weight nan, expected"),
        ("a.json:inf", "weight inf, expected"),
        ("a.json:lots", "'lots' is not a weight, like 0.7"),
        ("a.json#0", "0 conversations asked for, expected 1 to 1,000,000,000"),
        ("a.json#1000000000000", "1,000,000,000,000 conversations asked for"),
        ("a.json:1e300,b.jsonl:1", "weight 1e.300, expected"),
        ("a.json#1.5", "'1.5' is not a count, like 1000"),
        ("a.json:0.5#10", "has a weight and a count, keep one"),
        ("a.json:0.5,b.jsonl", "a.json has a weight and b.jsonl has none"),
    ],
)
def test_what_makes_no_sense_is_named(folder, spec, words):
    with pytest.raises(UserError, match=words):
        parse_sources(spec)


def test_one_file_under_two_names(folder):
    os.symlink("a.json", "z.json")
    with pytest.raises(UserError, match=r"z\.json is listed twice \(as a\.json\)"):
        parse_sources("a.json,z.json")


def test_a_yaml_list(folder, tmp_path):
    entries = ["path: a.json, weight: 7, truncation: drop", "path: b.jsonl, weight: 3, data_format: alpaca"]
    text = "".join(f"- {{{entry}}}\n" for entry in entries)
    (folder / "mix.yaml").write_text(text)
    first, second = parse_sources("mix.yaml")
    assert (first.weight, first.truncation, first.data_format) == (7, "drop", None)
    assert (second.weight, second.truncation, second.data_format) == (3, None, "alpaca")
    assert [source.path for source in (first, second)] == [str(folder / "a.json"), str(folder / "b.jsonl")]


@pytest.mark.parametrize(
    "text, words",
    [
        ("a: 1", "expected a list of sources"),
        ("[]", "expected a list of sources"),
        ("- 3", 'source 0: expected "path"'),
        ("- path: a.json\n  wieght: 1", "unknown key 'wieght', did you mean 'weight'"),
        ("- path: a.json\n  weight: heavy", "weight is 'heavy', expected a number"),
        ("- path: a.json\n  samples: true", "samples is True, expected a number"),
        ("- path: a.json\n  truncation: cut", "unknown truncation 'cut'"),
        ("- path: a.json\n  data_format: bele", "unknown data_format 'bele', did you mean 'belle'"),
        ("- path: ../a.json", r"\.\./a\.json is outside"),
        ("- path: /etc/passwd", "/etc/passwd is outside"),
        ("- path: [", "not YAML"),
    ],
)
def test_a_wrong_yaml_list(folder, text, words):
    (folder / "mix.yaml").write_text(text)
    with pytest.raises(UserError, match=words):
        parse_sources("mix.yaml")


def test_outside_is_possible_when_it_is_meant(folder):
    (folder / "sub").mkdir()
    (folder / "sub" / "mix.yaml").write_text("- path: ../a.json\n")
    assert len(parse_sources("sub/mix.yaml", allow_outside=True)) == 1


def sources(*asked):
    return [Source(str(i), weight, samples, group=group) for i, (weight, samples, group) in enumerate(asked)]


def test_without_shares_everything_is_used():
    assert [rows.tolist() for rows in mix(sources((None, None, 0), (None, None, 1)), [2, 3], 0)] == [
        [0, 1],
        [0, 1, 2],
    ]


def test_weights_are_shares_and_nothing_is_repeated():
    first, second = mix(sources((0.7, None, 0), (0.3, None, 1)), [70, 60], 5)
    assert (len(first), len(second)) == (70, 30)
    assert len(set(second.tolist())) == 30 and (np.diff(second) > 0).all()
    assert [len(rows) for rows in mix(sources((7, None, 0), (3, None, 1)), [1000, 60], 5)] == [140, 60]
    assert [len(rows) for rows in mix(sources((1, None, 0), (1, None, 1)), [5, 0], 5)] == [0, 0]


def test_counts_draw_or_repeat():
    (rows,) = mix(sources((None, 25, 0)), [10], 1)
    counts = np.bincount(rows)
    assert len(rows) == 25 and set(counts.tolist()) == {2, 3} and (counts == 3).sum() == 5
    (few,) = mix(sources((None, 4, 0)), [10], 1)
    assert len(set(few.tolist())) == 4


def test_files_of_one_pattern_share_a_count():
    rows = mix(sources((None, 10, 0), (None, 10, 0), (None, None, 1)), [30, 30, 4], 3)
    assert len(rows[0]) + len(rows[1]) == 10 and len(rows[2]) == 4
    assert len(rows[0]) and rows[0].max() < 30 and rows[1].max() < 30


def test_the_draw_depends_on_the_seed_alone():
    one, same, other = (mix(sources((None, 50, 0)), [1000], seed)[0].tolist() for seed in (1, 1, 2))
    assert one == same != other
    assert (
        one == mix(sources((None, 50, 0), (None, 9, 1)), [1000, 10], 1)[0].tolist()
    )  # whatever else is mixed in


@pytest.mark.parametrize("part", [1, 3, 100])
def test_duplicates_name_the_first(part, monkeypatch):
    monkeypatch.setattr("baichuan_sft.data.duplicates.PART", part)
    seen = Duplicates()
    seen.add([5, 7, 5], [100, 101, 102])
    seen.add([9, 2**64 - 1, 7, 5], [103, 104, 105, 106])
    copies, firsts = seen.copies()
    assert copies.tolist() == [2, 5, 6] and firsts.tolist() == [0, 1, 0]
    assert [seen.label(int(copy)) for copy in copies] == [102, 105, 106]
    seen.add([2**64 - 1], [7])  # and it goes on after having been read
    found = seen.copies()
    assert found.copies.tolist() == [2, 5, 6, 7] and found.total == 4
    assert [found.is_copy(record) for record in range(8)] == [
        False,
        False,
        True,
        False,
        False,
        True,
        True,
        True,
    ]


def test_no_duplicates_among_none():
    copies, firsts = Duplicates().copies()
    assert len(copies) == len(firsts) == Duplicates().copies().total == 0


@pytest.mark.parametrize("part", [4, 64, 1 << 20])
def test_all_copies_are_counted_and_the_first_are_listed(part, monkeypatch):
    monkeypatch.setattr("baichuan_sft.data.duplicates.PART", part)
    monkeypatch.setattr("baichuan_sft.data.duplicates.MAX_COPIES", 10)
    hashes = np.random.default_rng(0).integers(0, 40, 300).tolist()
    seen = Duplicates()
    seen.add(hashes, [0] * 300)
    expected = [(i, hashes.index(one)) for i, one in enumerate(hashes) if hashes.index(one) != i]
    found = seen.copies()
    assert found.total == len(expected) > 200
    assert list(zip(found.copies, found.firsts)) == expected[:10]
    assert [i for i in range(300) if found.is_copy(i)] == [i for i, _ in expected]


def test_many_copies_take_little_memory():
    seen = Duplicates()
    for _ in range(30):
        seen.add([7] * 100_000, range(100_000))
    tracemalloc.start()
    assert seen.copies().total == 2_999_999
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 120 << 20  # all pairs alone, sorted, take 144
