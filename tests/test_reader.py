"""Files to raw records: what is read, what is refused, where, and with which words."""

import bz2
import gzip
import json
import os
import re
import tracemalloc

import numpy as np
import pytest
from fixtures import ROOT, SHARED, needs_shared
from hypothesis import given, settings
from hypothesis import strategies as st

from baichuan_sft.data import files, sniff
from baichuan_sft.data.files import ReadOptions, expand, open_bytes, require_file
from baichuan_sft.data.findings import DataFault, RecordFault
from baichuan_sft.data.reader import decode, locate, read_raw
from baichuan_sft.errors import UserError

BADINPUT = SHARED / "badinput"
CHAT = {"conversations": [{"from": "human", "value": "你好"}, {"from": "gpt", "value": "好😀\u2028"}]}
GOOD = json.dumps({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]})
# file: (values that come out, words of the one finding); what is not listed is read as a whole.
CATALOGUE = {
    "01_bom.json": (3, "NOTE DATA003 .*:1:1: byte order mark removed"),
    "02_utf16.json": (0, "DATA002 .*looks like UTF-16 LE .*--encoding utf-16 or .*iconv -f utf-16 -t utf-8"),
    "03_gb18030.json": (
        0,
        "DATA002 .*:1:61: not UTF-8: byte C4 at byte 60; .*GB18030 - pass --encoding gb18030 or .*iconv",
    ),
    "07_trailing_comma.json": (3, r"DATA006 .*:1:325: trailing comma before \]$"),
    "08_truncated.json": (2, "DATA007 .*:1:299 item 2: the text ends inside a string - truncated download"),
    "09_truncated_last_line.jsonl": (2, "DATA006 .*:3:91 item 2: the text ends inside a string"),
    "10_empty_file.json": (0, r"DATA004 .*file is empty \(0 bytes\)"),
    "11_empty_array.json": (0, "DATA004 .*no items"),
    "12_object_toplevel.json": (
        0,
        r"DATA009 .*:1:1: expected a list .* got an object with keys \[data\].* jq -c '\.data\[\]'",
    ),
    "55_invalid_utf8.json": (3, "DATA002 .*:1:381 item 3: not UTF-8: byte FF at byte 458"),
    "57_raw_ctrl_in_string.json": (3, r"DATA006 .*:1:380 item 3: raw control .*: TAB, write \\t"),
    "58_nan_literal.json": (3, "DATA006 .*:1:331 item 3: NaN is not JSON"),
    "60_single_quotes.json": (0, "DATA006 .*:1:3 item 0: JSON needs double quotes .* Python repr"),
    "61_comments.json": (0, "DATA006 .*:1:1: comments are not JSON"),
    "62_deep_nesting.json": (0, "DATA006 .*:1:66 item 0: nesting deeper than 64"),
    "63_huge_int.json": (3, "DATA006 .*:1:331 item 3: number with 5000 digits"),
    "65_gzbomb.json.gz": (0, "DATA007 .*unpacks to more than 200 times its size; stopped after 168"),
    "66_csv.json": (0, "DATA005 .*:1:1: looks like CSV"),
    "67_parquet_magic.json": (0, "DATA007 .*truncated parquet"),
}


def read(path, **options):
    """The values of a file, the places of their records, and all findings as text."""
    values, places, findings = [], [], []
    for record in read_raw(path, lambda finding, raw: findings.append(str(finding)), **options):
        try:
            values.append(decode(record.data))
            places.append((record.item, record.line, record.column))
        except RecordFault as fault:
            findings.append(str(locate(record, fault, str(path))))
    assert all(finding.isprintable() for finding in findings)
    return values, places, findings


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@needs_shared
def test_catalogue_file_is_read_or_named():
    for path in sorted(BADINPUT.iterdir()):
        values, _, findings = read(path)
        num, words = CATALOGUE.get(path.name, (None, None))
        if words is None:
            assert values and not findings, path.name
        else:
            assert len(values) == num and len(findings) == 1, (path.name, findings)
            assert re.search(words, findings[0]), findings[0]


@needs_shared
def test_gzip_bomb_takes_little_memory():
    tracemalloc.start()
    read(BADINPUT / "65_gzbomb.json.gz")
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    "content, num, words",
    [
        (f"[{GOOD}, {GOOD}] x", 2, "DATA006 .*item 2: text after the end of the list.*; the 1 byte behind"),
        (f"[{GOOD} {GOOD}]", 1, f"after item 0; the {len(GOOD) + 1} bytes behind it are not read"),
        (f"[{GOOD},]", 1, rf"DATA006 .*:1:{len(GOOD) + 3}: trailing comma before \]$"),
        (f"[{GOOD},\n]\n[{GOOD}]", 1, r":3:1 item 1: text after the end of the list.*; the \d+ bytes behind"),
        (f"[{GOOD},", 1, rf"DATA007 .*:1:{len(GOOD) + 3}: the text ends without the \] of the list"),
        (f"[{GOOD}", 1, rf"DATA007 .*:1:{len(GOOD) + 2}: the text ends without the \]"),
        ('["a", "b', 1, "DATA007 .*:1:7 item 1: the text ends inside a string"),
        (f"[{GOOD}}}", 1, "expected , or ] after item 0"),
        (f"[,{GOOD}]", 0, "DATA006 .*:1:2 item 0: expected an item or ]"),
        (f"[{GOOD},,{GOOD}]", 1, "item 1: expected an item"),
        (f'["a,[", nul, {GOOD}]', 1, "DATA006 .*:1:9 item 1: malformed JSON: expecting value"),
        (f'[{GOOD}" , {GOOD}]', 1, "expected , or ] after item 0"),
        ("[", 0, "the text ends without the ]"),
        ('["abc', 0, "DATA007 .*:1:2 item 0: the text ends inside a string"),
        ('[{"a": 1, "b', 0, "DATA007 .*:1:11 item 0: the text ends inside a string"),
        ('[{"a": [1,]}]', 0, r":1:11 item 0: trailing comma before \]; the 1 byte behind it is not read"),
        ('[{"a": [1,]}, {}, {}]', 0, r"item 0: trailing comma before \]; the 9 bytes behind it are not read"),
        ('[{"a" 1}, {}]', 0, "item 0: malformed JSON: expecting ':'"),
        ("[\x00]", 0, "DATA006 .*:1:2 item 0: malformed JSON: expecting value"),
        ("[" + "[" * 64 + "]" * 64 + "]", 1, None),
        ("[" + "[" * 65 + "]" * 65 + "]", 0, ":1:66 item 0: nesting deeper than 64"),
        (" \n\t ", 0, "DATA004 .*nothing but white space"),
        (f"{GOOD} x\n{GOOD}", 1, "DATA006 .*:1:.* item 0: text after the record"),
        (f"{GOOD}\n{{'from': 1}}\n\n{GOOD}", 2, ":2:2 item 1: JSON needs double quotes"),
        (f'{{"a": \n{GOOD}', 1, ":1:6 item 0: the text ends inside a record"),
        (f"x\n{GOOD}\n{GOOD}", 2, ":1:1 item 0: malformed JSON"),
        (f'["id": 1}}\n{GOOD}\n{GOOD}', 2, ":1:6 item 0: malformed JSON"),
        (f"\n\n  {GOOD}\nnull\n{GOOD}", 3, None),
        (f'{GOOD}\n{{"a": -Infinity}}\n', 1, ":2:7 item 1: -Infinity is not JSON"),
        (f'{GOOD}\n{{"a": "9e999", "b": -9e999}}\n', 1, ":2:21 item 1: number -9e999 is out of range"),
        (f"{GOOD}\n{'[' * 3000}", 1, ":2:65 item 1: nesting deeper than 64"),
        (f"{GOOD}\n{'[' * 70}{']' * 70}", 1, ":2:65 item 1: nesting deeper than 64"),
        (f"{GOOD}\n\ufeff{GOOD}", 1, ":2:1 item 1: a byte order mark inside the file"),
        ('{\n "a": 1}\n{\n "a": 2}', 0, "DATA009 .*:3:1: several objects over many lines.*jq -c"),
        ('{\n "a": 1,\n "b" 2}', 0, "DATA006 .*:3:6: malformed JSON"),
        ('{"data": [{}]}', 0, "DATA009 .*got an object with keys .data.; take the list out"),
        ('{"a": [1,]}', 0, r":1:10 item 0: trailing comma before \]"),
        (b"\x00" * 100, 0, "DATA005 .*bytes of zero"),
        (b'{"a": "\xff"}', 0, "DATA002 .*:1:8 item 0: not UTF-8: byte FF at byte 7"),
        ('{"a": 1}'.encode("utf-16-le"), 0, "DATA002 .*UTF-16; pass --encoding utf-16-le"),
        ("<!DOCTYPE html>\n<html>", 0, "DATA005 .*looks like an HTML"),
        (b"PK\x03\x04abc", 0, "DATA005 .*a zip file; unpack it first: unzip"),
        ("version https://git-lfs.github.com/spec/v1\n", 0, "DATA005 .*git lfs pull"),
        ("hello", 0, 'neither JSON nor JSON Lines.* starts with "hello"'),
    ],
)
def test_malformed_text_is_placed(tmp_path, content, num, words):
    values, _, findings = read(write(tmp_path / "x.json", content))
    assert len(values) == num and len(findings) == (words is not None), findings
    assert words is None or re.search(words, findings[0]), findings[0]


def test_a_command_names_the_file_as_it_is_called_when_it_is_shown(tmp_path):
    found = []
    list(read_raw(write(tmp_path / "a b.json", '{"data": [{}]}'), lambda finding, raw: found.append(finding)))
    assert "{path}" in found[0].text and "a b" not in found[0].text
    assert found[0].of("new; rm x").words.endswith("jq -c '.data[]' 'new; rm x' > 'new; rm x'.jsonl")
    # A key of that name would put the file's name, with its quotes, between the quotes of the program.
    (finding,) = read(write(tmp_path / "$(x).json", '{\n"{path}": [{}]}'))[2]
    assert finding.count("$(x)") == 2 and "jq" not in finding


def test_an_item_is_read_once_however_many_blocks_it_has(tmp_path):
    record = {"conversations": [{"from": "human", "value": "长" * (6 << 20)}]}
    path = write(tmp_path / "x.json", json.dumps([record], ensure_ascii=False))
    tracemalloc.start()
    items = list(read_raw(path, pytest.fail))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    size = path.stat().st_size
    assert [len(item.data) for item in items] == [size - 2]
    # The blocks and the item joined; then orjson reserves twelve times what it reads.
    assert peak < 15 * size


def test_a_key_given_twice_is_looked_for_without_writing_the_value_again():
    data = json.dumps({"a": ["x:" * (4 << 20)], ":": ["::", {"b:": ":"}]}).encode()
    tracemalloc.start()
    decode(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 14 * len(data)
    for text in ('{"a": "x:", "a": 1}', '{"a:": 1, "a:": ":"}', '[{"b": ["::"], "b": [":", ":"]}]'):
        with pytest.raises(RecordFault, match="is given twice"):
            decode(text.encode())


def test_a_first_line_broken_in_two_is_no_object_over_many_lines(tmp_path):
    values, _, findings = read(write(tmp_path / "x", f'{{"a": [1,\n2]}}\n{GOOD}\n{GOOD}\n{GOOD}'))
    assert len(values) == 3 and ":1:10 item 0: the text ends" in findings[0] and ":2:2 item 1" in findings[1]


def test_one_broken_line_in_another_encoding(tmp_path):
    line = json.dumps(CHAT, ensure_ascii=False)
    path = write(tmp_path / "x.jsonl", f"{line}\n".encode() + f"{line}\n".encode("gb18030") + line.encode())
    values, places, (finding,) = read(path)
    assert values == [CHAT, CHAT] and places == [(0, 1, 1), (2, 3, 1)]
    start = len(f"{line}\n".encode()) + line.index("你")
    assert f":2:{line.index('你') + 1} item 1: not UTF-8: byte C4 at byte {start}" in finding


@pytest.mark.parametrize(
    "content, column",
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', 24),
        ('{"中": "a:b", "\\u4e2d" : 2}', 14),
        ('{"a": "\\u003a", "a": "x"}', 17),
        ('[{"a": 1}, {"\\"": 1, "\\"": 2}]', 22),
        ('{"a": "\\ud83d", "a": 1}', 17),
    ],
)
def test_a_key_given_twice_is_found(content, column):
    with pytest.raises(RecordFault, match="is given twice") as caught:
        decode(content.encode())
    assert caught.value.code == "DATA023" and caught.value.offset == column - 1


JSON = st.recursive(
    st.none() | st.integers(-9, 10**18) | st.text(st.sampled_from('a":\\中,{[')),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text('a":', max_size=2), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=200)
@given(value=JSON, spaced=st.sampled_from([(", ", ": "), (",", ":"), (" ,", " :\n")]))
def test_decode_is_json_loads(value, spaced):
    for ascii_only in (True, False):
        text = json.dumps(value, separators=spaced, ensure_ascii=ascii_only)
        assert decode(text.encode()) == value


def test_a_lone_surrogate_is_left_for_the_text_rules():
    assert decode(b'{"a": "x\\ud83d", "b": 12345678901234567890123}')["a"] == "x\ud83d"


def test_a_fault_is_located_by_its_path(tmp_path):
    text = json.dumps([CHAT, CHAT], ensure_ascii=False, indent=1)
    record = list(read_raw(write(tmp_path / "x.json", text), pytest.fail))[1]
    for at, needle in [
        (("conversations", 1, "value"), '"好'),
        (("conversations", 0), '{\n    "from": "human'),
        (("conversations", 0, "none"), '{\n    "from": "human'),
        (("conversations", 7), '[\n   {\n    "from": "human'),
        ((), '{\n  "conv'),
    ]:
        offset = text.rindex(needle)
        finding = locate(record, RecordFault("DATA016", "w", turn=1, at=at), "p")
        line, column = text.count("\n", 0, offset) + 1, offset - text.rfind("\n", 0, offset)
        assert (finding.line, finding.column, finding.item, finding.turn) == (line, column, 1, 1)


LAYOUTS = {
    "array": json.dumps([CHAT, CHAT, None, 'a,[\\\\"]', CHAT, 3], ensure_ascii=False),
    "pretty": " \n" + json.dumps([CHAT, [CHAT], CHAT], ensure_ascii=False, indent=2) + "\n",
    "escaped": json.dumps([{"a": 'x\\" : [{" \\\\'}, {"b": "\\"}, ["\\\\\\"]]),
    "lines": "\ufeff" + "\r\n\n ".join([json.dumps(CHAT, ensure_ascii=False)] * 3),
    "broken array": f'[{GOOD}, {{"a": "\t"}}, {GOOD}]',
    "broken lines": f"{GOOD}\n{GOOD[:-3]}\n{GOOD} 好 x\n{GOOD}",
    "cut": json.dumps([CHAT, CHAT], ensure_ascii=False)[:-9],
    "deep": f"[{GOOD}, {'[' * 100}, 1]",
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_block_size_changes_nothing(tmp_path, monkeypatch, name):
    path = write(tmp_path / "x", LAYOUTS[name])
    expected = read(path)
    assert expected[0]
    for size in (1, 2, 3, 7, 64):
        monkeypatch.setattr(sniff, "BLOCK", size)
        assert read(path) == expected


def test_a_record_has_the_same_place_however_it_is_reached(tmp_path):
    text = LAYOUTS["pretty"]
    _, places, _ = read(write(tmp_path / "x", text))
    starts = [text.index('{\n    "conv'), text.index("[\n    {"), text.rindex('{\n    "conv')]
    lines = text.split("\n")
    assert [lines[line - 1][column - 1 :] for _, line, column in places] == ["{", "[", "{"]
    assert len(starts) == len(places)


def mutated(text, edits):
    data = bytearray(text.encode())
    for position, kind, byte in edits:
        position %= len(data) + 1
        if kind == "cut":
            del data[position : position + byte % 7]
        elif kind == "insert":
            data.insert(position, byte)
        elif position < len(data):
            data[position] = byte
    return bytes(data)


BYTES = st.integers(0, 255) | st.sampled_from(list(b'"\\[]{},:\n \xff'))
EDITS = st.tuples(st.integers(0, 10**6), st.sampled_from(["flip", "cut", "insert"]), BYTES)


@settings(max_examples=300)
@given(edits=st.lists(EDITS, min_size=1, max_size=4), indent=st.sampled_from([None, 1]))
def test_a_damaged_array_never_raises(tmp_path_factory, edits, indent):
    text = json.dumps([CHAT] * 4, ensure_ascii=False, indent=indent)
    data = mutated(text, edits)
    path = write(tmp_path_factory.getbasetemp() / "array.json", data)
    values, _, findings = read(path)
    try:
        assert values == json.loads(data.decode()) or findings
    except (ValueError, RecursionError):
        assert findings


@settings(max_examples=300)
@given(edits=st.lists(EDITS, min_size=1, max_size=3))
def test_a_damaged_line_costs_no_other_line(tmp_path_factory, edits):
    text = "".join(json.dumps(dict(CHAT, id=n), ensure_ascii=False) + "\n" for n in range(9))
    data = mutated(text, edits)
    values, _, _ = read(write(tmp_path_factory.getbasetemp() / "lines.jsonl", data))
    whole = [line for line in text.encode().split(b"\n") if line and line in data.split(b"\n")]
    assert len(whole) >= 3
    assert [json.loads(line) for line in whole if json.loads(line) not in values] == []


@pytest.mark.parametrize("start, end", [("", ""), ("[", "]")])
def test_a_record_that_is_too_long_takes_no_memory(tmp_path, start, end):
    options = ReadOptions(max_line=1 << 20)
    long = '{"a": "' + "x" * (80 << 20) + '"}'
    parts = ["[" + GOOD, long, GOOD + "]"] if start else [GOOD, long, GOOD]
    path = write(tmp_path / "x", (",\n" if start else "\n").join(parts))
    tracemalloc.start()
    values, _, (finding,) = read(path, options=options)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(values) == (1 if start else 2)  # nothing behind it in an array shows where items start
    assert re.search(r"DATA008 .*:2:1 item 1: (line|item) longer than 1 MiB", finding)
    assert peak < 40 << 20  # orjson reserves twelve times what it reads


def test_a_missing_bracket_is_named_before_the_limit_is(tmp_path):
    path = write(tmp_path / "x.json", f'[{{"a": 1, {", ".join([GOOD] * 200)}]')
    _, _, (finding,) = read(path, options=ReadOptions(max_line=2000))
    assert ":1:11 item 0: malformed JSON: expecting property name" in finding


def test_line_ends_and_separators(tmp_path):
    raw = {"a": "x\u2028y\x85z"}
    text = json.dumps(raw, ensure_ascii=False) + "\r\n\r\n\n" + GOOD + "\n  " + GOOD + "\r\n"
    values, places, findings = read(write(tmp_path / "x.jsonl", text))
    assert values[0] == raw and not findings
    assert places == [(0, 1, 1), (1, 4, 1), (2, 5, 3)]


def test_plain_text(tmp_path):
    path = write(tmp_path / "x.txt", "\ufeff 一行 \r\n\n\t\n二\u2028行".encode() + b"\n\xff\nlast")
    values, places, findings = read(path, layout="lines")
    assert values == [{"text": " 一行 "}, {"text": "二\u2028行"}, {"text": "last"}]
    assert places == [(0, 1, 1), (1, 4, 1), (3, 6, 1)]
    assert "DATA003" in findings[0] and ":5:1 item 2: not UTF-8: byte FF at byte" in findings[1]
    path = write(tmp_path / "y.txt", "一\n二\n")
    assert read(path, layout="document")[0] == [{"text": "一\n二\n"}]
    (finding,) = read(path, layout="document", options=ReadOptions(max_line=7))[2]
    assert "DATA008" in finding and "document longer than 7 bytes" in finding
    for layout in ("lines", "document"):
        assert "DATA004" in read(write(tmp_path / "z", "\n \n"), layout=layout)[2][0]
    with pytest.raises(UserError, match="did you mean 'lines'"):
        list(read_raw(path, print, layout="line"))


@pytest.mark.parametrize("layout", ["lines", "document"])
def test_plain_text_may_begin_like_an_archive(tmp_path, layout):
    path = tmp_path / "x.txt"
    for start in ("BZh", "PAR1", "PK", "7z", "version https://git-lfs"):
        values, _, findings = read(write(path, f"{start} 是开头"), layout=layout)
        assert values == [{"text": f"{start} 是开头"}] and not findings
    for content, words in [
        (bz2.compress(b"abc"), "DATA005 .*bzip2 file; unpack it first: bunzip2 -k .*x.txt"),
        (b"PAR1\0\0abc", "DATA005 .*parquet"),
        (b"PK\x03\x04\0\0", "DATA005 .*zip file"),
        ("文".encode("utf-16"), "DATA002 .*UTF-16"),
        (bytes(9), "DATA005 .*bytes of zero"),
        ("中文文本".encode("gb18030"), "DATA002 .*GB18030"),
    ]:
        values, _, (finding,) = read(write(path, content), layout=layout)
        assert values == [] and re.search(words, finding)
    assert read(write(path, gzip.compress(b"BZh")), layout=layout)[0] == [{"text": "BZh"}]


@pytest.mark.parametrize("encoding", ["gb18030", "utf-16", "utf-16-be", "big5", "utf-8-sig"])
def test_other_encodings(tmp_path, encoding):
    text = json.dumps([{"a": "中文"}] * 3, ensure_ascii=False)
    path = write(tmp_path / "x.json", text.encode(encoding))
    values, places, _ = read(path, options=ReadOptions(encoding=encoding))
    assert values == json.loads(text) and places[1] == (1, 1, 15)


def test_a_byte_that_is_not_in_the_encoding(tmp_path, monkeypatch):
    path = write(tmp_path / "x.jsonl", '{"a": "中"}\n'.encode("gb18030") + b'{"a": "\xff\xff"}\n')
    for size in (1, 2, 1 << 20):
        monkeypatch.setattr(sniff, "BLOCK", size)
        values, _, findings = read(path, options=ReadOptions(encoding="gb18030"))
        assert values == [{"a": "中"}] and "DATA002" in findings[-1] and "at byte 19" in findings[-1]
    with pytest.raises(UserError, match="unknown encoding 'utf9'"):
        ReadOptions(encoding="utf9")


def zstd(data):
    import pyarrow

    return pyarrow.Codec("zstd").compress(data, asbytes=True)


@pytest.mark.parametrize("pack", [gzip.compress, zstd])
def test_archives(tmp_path, pack):
    text = "".join(json.dumps(dict(CHAT, id=n), ensure_ascii=False) + "\n" for n in range(4000)).encode()
    packed = pack(text)
    path = write(tmp_path / "packed_under_any_name.json", packed + pack(text))
    values, places, findings = read(path)
    assert not findings and len(values) == 8000 and places[-1] == (7999, 8000, 1)
    for damaged in (packed[: len(packed) * 2 // 3], packed[:-2], packed + b"\x01\x02\x03\x04"):
        values, _, findings = read(write(path, damaged))
        assert "DATA007" in findings[-1] and "damaged or cut off" in findings[-1]
        assert [value["id"] for value in values] == list(range(len(values))) and len(values) > 1000
    (finding,) = read(write(path, pack(f"[{GOOD}, nul, {GOOD}]".encode())))[2]
    assert finding.endswith("; nothing behind this item is read")
    _, _, findings = read(write(path, packed), options=ReadOptions(max_unpacked=100_000))
    assert "unpacks to more than 100000 bytes; stopped after" in findings[-1]


def rows():
    answer = {"from": "gpt", "value": "b", "train": True}
    return [{"conversations": [{"from": "human", "value": f"{n}"}, answer]} for n in range(300)]


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "x.bin"
    parquet.write_table(pyarrow.Table.from_pylist(rows()), path)
    values, places, findings = read(path)
    assert values == rows() and places[299] == (299, None, None) and not findings
    data = path.read_bytes()
    for damaged in (data[:-8], data[:100], data[:4] + bytes(300) + data[304:]):
        values, _, findings = read(write(path, damaged))
        assert values == [] and "DATA007" in findings[0]
    parquet.write_table(pyarrow.Table.from_pylist(rows()).slice(0, 0), path)
    assert "DATA004" in read(path)[2][0]


def test_parquet_of_one_row_group_takes_little_memory(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = np.random.default_rng(0).integers(0, 256, (1000, 64 << 10), np.uint8)
    table = pyarrow.table({"text": pyarrow.array(map(bytes, texts), pyarrow.binary())})
    parquet.write_table(table, tmp_path / "x", use_dictionary=False, write_batch_size=8)
    del table
    before = pyarrow.total_allocated_bytes()
    held = [pyarrow.total_allocated_bytes() - before for _ in read_raw(tmp_path / "x", pytest.fail)]
    assert len(held) == 1000 and max(held) < 40 << 20  # of 64 MiB; a batch of rows has 16


def test_datasets_directory(tmp_path):
    from datasets import Dataset, DatasetDict

    dataset = Dataset.from_list(rows())
    dataset.save_to_disk(tmp_path / "one")
    require_file(tmp_path / "one")
    assert read(tmp_path / "one")[0] == rows()
    DatasetDict(train=dataset, test=dataset).save_to_disk(tmp_path / "splits")
    assert "holds the splits [test, train]; pass one of them" in read(tmp_path / "splits")[2][0]
    (tmp_path / "one" / "state.json").write_text("{")
    assert "DATA007" in read(tmp_path / "one")[2][0]


def test_paths_that_are_no_data_files(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for path, words in [
        (tmp_path, "is a directory; pass a file or a glob"),
        (tmp_path / "none", "no such file"),
        (tmp_path / "dangling", "no such file"),
        (tmp_path / "fifo", "not a regular file but a named pipe"),
        ("/dev/zero", "not a regular file but a device"),
        (tmp_path / "loop", "a symbolic link that leads back to itself"),
        (tmp_path / ("x" * 300), "cannot be read: File name too long"),
    ]:
        with pytest.raises(DataFault, match=words) as caught:
            require_file(path)
        assert [finding.code for finding in caught.value.findings] == ["DATA001"]
        assert read(path)[2] == [str(caught.value.findings[0])]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_named_with_the_user(tmp_path):
    path = write(tmp_path / "x", "[]")
    path.chmod(0)
    assert f"cannot be read by uid {os.geteuid()}: Permission denied" in read(path)[2][0]


def test_names_and_patterns(tmp_path):
    for name in ("b.json", "a.json", "[x].json"):
        write(tmp_path / name, GOOD)
    assert expand(f"{tmp_path}/*.json") == [f"{tmp_path}/{name}" for name in ("[x].json", "a.json", "b.json")]
    assert expand(f"{tmp_path}/[x].json") == [f"{tmp_path}/[x].json"]
    assert expand(f"{tmp_path}/none.json") == [f"{tmp_path}/none.json"]
    with pytest.raises(UserError, match=r"no file matches .*\*\.jsonl"):
        expand(f"{tmp_path}/*.jsonl")


def test_a_failing_disk_is_tried_again_and_named(tmp_path, monkeypatch):
    path = write(tmp_path / "x.jsonl", f"{GOOD}\n" * 3)
    pread, failures = os.pread, []

    def failing(fd, size, offset):
        if offset and len(failures) < limit:
            failures.append(offset)
            raise OSError(5, "Input/output error")
        return pread(fd, min(size, len(GOOD) + 1), offset)

    monkeypatch.setattr(files, "PAUSE", 0)
    monkeypatch.setattr(files.os, "pread", failing)
    limit = 3
    assert len(read(path)[0]) == 3
    limit = 99
    values, _, findings = read(path)
    assert len(values) == 1
    assert f"cannot be read at byte {len(GOOD) + 1}: Input/output error, after 3 retries" in findings[0]


def test_bytes_are_unpacked_for_who_wants_them(tmp_path):
    with open_bytes(write(tmp_path / "x", gzip.compress(b"abc")), ReadOptions()) as source:
        assert source.read(2) + source.read(2) + source.read(2) == b"abc"


def test_an_error_of_the_caller_goes_through(tmp_path):
    def stop(finding, raw):
        raise DataFault("enough", [finding])

    with pytest.raises(DataFault, match="enough"):
        list(read_raw(write(tmp_path / "x", "[x]"), stop))


@pytest.mark.parametrize("name, num", [("belle_chat.json", 70), ("belle_chat.jsonl", 6)])
def test_shipped_samples_are_clean(name, num):
    values, _, findings = read(ROOT / "data" / name)
    assert findings == [] and len(values) == num
