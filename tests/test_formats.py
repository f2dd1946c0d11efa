"""Records and files: what is accepted, what is refused, and with which words."""

import json
import re

import pytest
from fixtures import ROOT, SHARED, needs_shared

from baichuan_sft.data.formats import DROPPED_TRAILING_USER, EMPTY_USER_TURN, FORMATS, Message, escaped, parse
from baichuan_sft.data.reader import read_records
from baichuan_sft.errors import UserError

BADINPUT = SHARED / "badinput"
# file: (good records, words of the one finding); None: accepted as a whole.
CATALOGUE = {
    "00_good.json": (3, None),
    "01_bom.json": (3, None),
    "02_utf16.json": (0, "looks like UTF-16 LE .* iconv -f utf-16 -t utf-8"),
    "03_gb18030.json": (0, r":1:61: not UTF-8, byte C4 at byte 60; the bytes decode as GB18030"),
    "04_jsonl.jsonl": (3, None),
    "05_jsonl_named_json.json": (3, None),
    "07_trailing_comma.json": (3, r":1:325: trailing comma before \]"),
    "08_truncated.json": (2, ":1:299: the text ends inside a string - truncated download"),
    "09_truncated_last_line.jsonl": (2, ":3:91: the text ends inside a string"),
    "10_empty_file.json": (0, r"file is empty \(0 bytes\)"),
    "11_empty_array.json": (0, "no items"),
    "12_object_toplevel.json": (0, r":1:1: expected a list of records .* got one object with keys \[data\]"),
    "14_null_item.json": (3, ":41 item 3: expected an object, got null"),
    "15_item_is_list.json": (3, ":41 item 3: expected an object, got a list"),
    "16_missing_conversations.json": (3, r':41 item 3: no key "conversations"; keys: \[id\]'),
    "17_conversations_null.json": (3, '"conversations" is null'),
    "18_conversations_empty.json": (3, "conversation has no turns"),
    "19_conversations_string.json": (3, '"conversations" must be a list, got a string'),
    "21_turn_not_dict.json": (3, "item 3 turn 0: expected an object {from, value}, got a string"),
    "22_missing_from.json": (3, 'item 3 turn 0: no key "from"'),
    "23_missing_value.json": (3, 'item 3 turn 0: no key "value"'),
    "24_value_null.json": (3, 'item 3 turn 0: "value" is null, expected text'),
    "25_value_int.json": (3, r'item 3 turn 0: "value" is a number \(42\), expected text'),
    "27_value_multimodal.json": (3, 'content parts .*1 "text" part, 1 "image_url" part.* text-only'),
    "28_value_empty_human.json": (4, None),
    "29_value_empty_gpt.json": (3, "item 3 turn 1: assistant text is empty"),
    "31_role_assistant.json": (4, None),
    "32_role_bot.json": (4, None),
    "33_role_Human_caps.json": (4, None),
    "34_role_typo.json": (3, "item 3 turn 0: unknown role \"humna\", did you mean 'human'?"),
    "35_role_chinese.json": (4, None),
    "37_system_first.json": (4, None),
    "38_system_middle.json": (3, "item 3 turn 2: system turn after the conversation started"),
    "39_two_humans.json": (3, r"item 3 turn 1: two user turns in a row \(turns 0-1\)"),
    "40_two_gpts.json": (3, r"item 3 turn 2: two assistant turns in a row \(turns 1-2\)"),
    "42_ends_with_human.json": (4, None),
    "43_only_human.json": (3, "item 3: no assistant turn - nothing to supervise"),
    "44_only_gpt.json": (3, "item 3: no user turn"),
    "45_openai_messages.json": (0, r'no key "conversations"; keys: \[messages\]'),
    "47_special_user_reserved107.json": (4, None),
    "48_special_user_eos.json": (4, None),
    "49_special_in_gpt.json": (4, None),
    "50_too_long_prompt.json": (4, None),  # its length is the dataset's matter
    "51_too_long_answer.json": (4, None),
    "52_dup_items.json": (5, None),
    "54_lone_surrogate.json": (3, r'item 3 turn 0: "value" has a lone surrogate U\+D83D'),
    "55_invalid_utf8.json": (0, ":1:381: not UTF-8, byte FF at byte 458"),
    "56_nul_and_ctrl.json": (4, None),
    "57_raw_ctrl_in_string.json": (3, r":1:380: raw control character inside a string: TAB, write \\t"),
    "58_nan_literal.json": (3, ":1:331: NaN is not JSON"),
    "60_single_quotes.json": (0, ":1:3: JSON needs double quotes - this looks like a Python repr"),
    "61_comments.json": (0, ":1:1: comments are not JSON"),
    "62_deep_nesting.json": (0, "nested too deeply"),
    "63_huge_int.json": (3, "a number of more than 4300 digits"),
    "64_gz.json.gz": (0, "looks like a gzip file; unpack it first"),
    "65_gzbomb.json.gz": (0, "looks like a gzip file; unpack it first"),
    "66_csv.json": (0, ":1:1: neither JSON nor JSON Lines"),
    "67_parquet_magic.json": (0, "looks like a parquet file"),
    "68_crlf.jsonl": (3, None),
    "70_first_item_bad.json": (3, ':2 item 0: no key "conversations"'),
    "71_extra_fields.json": (4, None),
    "73_role_key_mixed.json": (4, None),
    "74_html_latex.json": (4, None),
    "75_value_trailing_newline.json": (4, None),
    "76_bool_from.json": (3, 'item 3 turn 0: "from" is a boolean'),
}


def turns(*pairs, **fields):
    return {"conversations": [{"from": role, "value": text} for role, text in pairs], **fields}


def read(path):
    """The conversations of a file and all findings."""
    conversations, findings = [], []
    for record in read_records(path, on_error=findings.append):
        try:
            conversations.append(parse(record.raw)[0])
        except UserError as error:
            findings.append(record.locate(error))
    return conversations, [str(finding) for finding in findings]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@needs_shared
@pytest.mark.parametrize("name", CATALOGUE)
def test_catalogue_file_is_accepted_or_named(name):
    good, words = CATALOGUE[name]
    conversations, findings = read(BADINPUT / name)
    assert len(conversations) == good
    assert len(findings) == (words is not None)
    if words is not None:
        assert re.search(words, findings[0])
        assert findings[0].startswith(str(BADINPUT / name)) and findings[0].isprintable()


@needs_shared
def test_catalogue_is_complete():
    assert {path.name for path in BADINPUT.iterdir()} == set(CATALOGUE)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_refuses_what_is_not_an_object(name):
    kinds = {"null": None, "a list": [], "a string": "x", "a number": 3, "a boolean": True}
    for kind, raw in kinds.items():
        with pytest.raises(UserError, match=f"expected an object, got {kind}"):
            FORMATS[name](raw)


def test_unknown_format_is_suggested():
    with pytest.raises(UserError, match="unknown data format 'shargpt', did you mean 'sharegpt'"):
        parse(turns(("human", "a"), ("gpt", "b")), "shargpt")


@pytest.mark.parametrize("user", ["human", "user", "用户", "Human", "USER"])
@pytest.mark.parametrize("assistant", ["gpt", "assistant", "bot", "助手", "GPT"])
def test_role_aliases(user, assistant):
    messages, notes = parse(turns(("system", "s"), (user, "a"), (assistant, "b")))
    assert messages == [Message("system", "s"), Message("user", "a"), Message("assistant", "b")]
    assert notes == []


@pytest.mark.parametrize(
    "text", [" a\n", "{x} %s {{ y }}", "<b>$\\frac{1}{2}$</b>", "</s><reserved_107>", "\u2028\x00"]
)
def test_text_is_left_as_it_is(text):
    messages, _ = parse(turns(("human", text), ("gpt", text)))
    assert [message.text for message in messages] == [text, text]


def test_train_is_read_per_turn():
    raw = turns(("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d"))
    raw["conversations"][1]["train"] = False
    raw["conversations"][3]["train"] = True
    assert [message.train for message in parse(raw)[0]] == [True, False, True, True]


@pytest.mark.parametrize(
    "turn, train, words",
    [
        (1, "no", 'turn 1: "train" is a string, expected true or false'),
        (1, 0, r'turn 1: "train" is a number \(0\), expected true or false'),
        (0, True, 'turn 0: "train": true on a user turn'),
        (1, False, 'every assistant turn has "train": false - nothing to supervise'),
    ],
)
def test_wrong_train(turn, train, words):
    raw = turns(("human", "a"), ("gpt", "b"))
    raw["conversations"][turn]["train"] = train
    with pytest.raises(UserError, match=words):
        parse(raw)


def test_trailing_user_turn_is_dropped_and_noted():
    messages, notes = parse(turns(("human", ""), ("gpt", "b"), ("human", "c")))
    assert messages == [Message("user", ""), Message("assistant", "b")]
    assert notes == [EMPTY_USER_TURN, DROPPED_TRAILING_USER]


def test_system_and_tools_beside_the_turns():
    pair = (("human", "a"), ("gpt", "b"))
    assert parse(turns(*pair, system="s"))[0][0] == Message("system", "s")
    assert len(parse(turns(*pair, system="", tools="[]"))[0]) == 2
    for fields, words in [
        ({"system": 3}, 'key "system": "system" is a number'),
        ({"tools": [{"name": "f"}]}, '"tools" is not empty'),
    ]:
        with pytest.raises(UserError, match=words):
            parse(turns(*pair, **fields))
    with pytest.raises(UserError, match='turn 0: a system turn, and "system" stands beside the turns'):
        parse(turns(("system", "t"), *pair, system="s"))


def test_two_names_for_one_field_are_refused():
    raw = turns(("human", "a"), ("gpt", "b"))
    raw["conversations"][1]["role"] = "user"
    with pytest.raises(UserError, match='turn 1: has both "from" and "role", keep one'):
        parse(raw)


def test_assistant_cannot_start():
    with pytest.raises(UserError, match="turn 1: the conversation starts with the assistant"):
        parse(turns(("system", "s"), ("gpt", "a"), ("human", "b"), ("gpt", "c")))


def test_terminal_controls_are_escaped_in_messages():
    with pytest.raises(UserError, match="unknown role") as caught:
        parse(turns(("\x1b[31mhuman\u202e" + "x" * 200, "a"), ("gpt", "b")))
    assert str(caught.value).isprintable() and "\\x1b[31mhuman\\u202e" in str(caught.value)
    assert [escaped(char) for char in "a中 \n\u3000\ud83d"] == ["a", "中", " ", "\\n", "\\u3000", "\\ud83d"]


GOOD = json.dumps(turns(("human", "a"), ("gpt", "b")))


@pytest.mark.parametrize(
    "content, good, words",
    [
        (f"[{GOOD}, {GOOD}] x", 2, "1:.* text after the end of the list"),
        (f"[{GOOD} {GOOD}]", 1, "1:.* expected , or ] after item 0"),
        (f"[{GOOD},", 1, "the text ends inside a record"),
        (f"[{GOOD}", 1, "expected , or ] after item 0"),
        ("[", 0, "the text ends inside a record"),
        (" \n\t ", 0, "nothing but white space"),
        (f"{GOOD} x\n{GOOD}", 1, ":1:.* text after the record"),
        (f"{GOOD}\n{{'from': 1}}\n\n{GOOD}", 2, ":2:2: JSON needs double quotes"),
        (f'{{"a": \n{GOOD}', 1, ":1:.* the text ends inside a record"),
        (f"{GOOD}\nnull\n{GOOD}", 2, ":2 item 1: expected an object, got null"),
        (f'{GOOD}\n{{"a": -Infinity}}\n', 1, ":2:7: -Infinity is not JSON"),
        ('{\n "a": 1}\n{\n "a": 2}', 0, ":2:9: several objects over many lines each"),
        ('{"a": [1,]}', 0, r":1:10: trailing comma before \]"),
        ("[\x00]", 0, ":1:2: malformed JSON: expecting value"),
        (b"\x00" * 100, 0, ":1:1: neither JSON nor JSON Lines"),
        (b'{"a": "\xff"}', 0, ":1:8: not UTF-8, byte FF at byte 7; repair"),
    ],
)
def test_malformed_text_is_placed(tmp_path, content, good, words):
    conversations, findings = read(write(tmp_path / "x.json", content))
    assert len(conversations) == good and len(findings) == 1
    assert re.search(words, findings[0])


def test_paths_that_are_no_data_files(tmp_path):
    for path, words in [(tmp_path, "is a directory"), (tmp_path / "none", "no such file")]:
        with pytest.raises(UserError, match=words):
            list(read_records(path))
    with pytest.raises(UserError, match="/dev/null is not a regular file"):
        list(read_records("/dev/null"))


def test_line_separators_inside_text_do_not_end_a_line(tmp_path):
    raw = turns(("human", "a\u2028b\x85c"), ("gpt", "d"))
    path = write(tmp_path / "x.jsonl", json.dumps(raw, ensure_ascii=False) + "\r\n\r\n" + GOOD)
    records = list(read_records(path))
    assert [(record.line, record.item) for record in records] == [(1, 0), (3, 1)]
    assert records[0].raw == raw


def test_first_error_is_raised_by_default(tmp_path):
    with pytest.raises(UserError, match=r"x\.jsonl:2:1: malformed JSON"):
        list(read_records(write(tmp_path / "x.jsonl", f"{GOOD}\nx\n{GOOD}")))


@pytest.mark.parametrize("name, num", [("belle_chat.json", 70), ("belle_chat.jsonl", 6)])
def test_shipped_samples_are_clean(name, num):
    conversations, findings = read(ROOT / "data" / name)
    assert findings == [] and len(conversations) == num


def test_shipped_questions_have_one_answer():
    answers = {}
    conversations, _ = read(ROOT / "data" / "belle_chat.json")
    for messages in conversations:
        for question, answer in zip(messages[::2], messages[1::2]):
            assert answers.setdefault(question.text, answer.text) == answer.text
    assert len(answers) == 62
