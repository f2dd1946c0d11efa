"""The catalogue of odd files: each gets its class, place and words, through the command that a user runs."""

import json
import re

import pytest
from fixtures import SHARED, SMALL_VOCABULARY, needs_shared

from baichuan_sft.cli import dispatch, run

BADINPUT = SHARED / "badinput"
# F file refused, R record rejected, N normalised and counted, W accepted with a warning, O accepted
# name: (class, good records, code, "line:column item turn", words)
CATALOGUE = {
    "00_good.json": ("O", 3),
    "01_bom.json": ("N", 3, "DATA003", "1:1", "byte order mark removed"),
    "02_utf16.json": ("F", 0, "DATA002", "", r"looks like UTF-16 LE .*FF FE.*iconv -f utf-16 -t utf-8"),
    "03_gb18030.json": (
        "F",
        0,
        "DATA002",
        "1:61",
        "byte C4 at byte 60; bytes decode as GB18030 - pass --encoding",
    ),
    "04_jsonl.jsonl": ("O", 3),
    "05_jsonl_named_json.json": ("O", 3),
    "07_trailing_comma.json": ("F", 3, "DATA006", "1:325: ", r"trailing comma before \]"),
    "08_truncated.json": ("F", 2, "DATA007", "1:299 item 2", "ends inside a string - truncated download"),
    "09_truncated_last_line.jsonl": ("R", 2, "DATA006", "3:91 item 2", "ends inside a string"),
    "10_empty_file.json": ("F", 0, "DATA004", "", r"file is empty \(0 bytes\)"),
    "11_empty_array.json": ("F", 0, "DATA004", "1:2", "no items"),
    "12_object_toplevel.json": (
        "F",
        0,
        "DATA009",
        "1:1",
        r"got an object with keys \[data\]; .*jq -c '\.data\[\]'",
    ),
    "14_null_item.json": ("R", 3, "DATA010", "41:2 item 3", "expected an object, got null"),
    "15_item_is_list.json": ("R", 3, "DATA010", "41:2 item 3", "expected an object, got a list"),
    "16_missing_conversations.json": (
        "R",
        3,
        "DATA011",
        "41:2 item 3",
        r'no key "conversations"; keys: \[id\]',
    ),
    "17_conversations_null.json": ("R", 3, "DATA012", "43:20 item 3", '"conversations" is null'),
    "18_conversations_empty.json": ("R", 3, "DATA012", "43:20 item 3", "conversation has no turns"),
    "19_conversations_string.json": ("R", 3, "DATA012", "43:20 item 3", "must be a list, got a string"),
    "21_turn_not_dict.json": ("R", 3, "DATA013", "44:4 item 3 turn 0", "expected an object {from, value}"),
    "22_missing_from.json": ("R", 3, "DATA014", "44:4 item 3 turn 0", 'no key "from"'),
    "23_missing_value.json": ("R", 3, "DATA014", "44:4 item 3 turn 0", 'no key "value"'),
    "24_value_null.json": ("R", 3, "DATA016", "46:14 item 3 turn 0", '"value" is null, expected text'),
    "25_value_int.json": (
        "R",
        3,
        "DATA016",
        "46:14 item 3 turn 0",
        r'"value" is a number \(42\), expected text',
    ),
    "27_value_multimodal.json": (
        "R",
        3,
        "DATA016",
        "46:14 item 3 turn 0",
        r"text-only \(1 text part, 1 image_url",
    ),
    "28_value_empty_human.json": ("W", 4, "DATA031", "46:14 item 3 turn 0", "empty user turn"),
    "29_value_empty_gpt.json": ("R", 3, "DATA018", "50:14 item 3 turn 1", "assistant text is empty"),
    "31_role_assistant.json": ("O", 4),
    "32_role_bot.json": ("O", 4),
    "33_role_Human_caps.json": ("O", 4),  # counted by name: test_role_names_are_counted_as_written
    "34_role_typo.json": (
        "R",
        3,
        "DATA015",
        "45:13 item 3 turn 0",
        'unknown role "humna" - did you mean "human"',
    ),
    "35_role_chinese.json": ("O", 4),
    "37_system_first.json": ("O", 4),
    "38_system_middle.json": ("R", 3, "DATA019", "52:4 item 3 turn 2", "system turn after the conversation"),
    "39_two_humans.json": ("R", 3, "DATA019", "48:4 item 3 turn 1", r"two user turns in a row \(turns 0-1\)"),
    "40_two_gpts.json": (
        "R",
        3,
        "DATA019",
        "52:4 item 3 turn 2",
        r"two assistant turns in a row \(turns 1-2\)",
    ),
    "42_ends_with_human.json": ("N", 4, "DATA030", "52:4 item 3 turn 2", "trailing user turn dropped"),
    "43_only_human.json": ("R", 3, "DATA020", "43:20 item 3", "no assistant turn - nothing to supervise"),
    "44_only_gpt.json": ("R", 3, "DATA020", "43:20 item 3", "no user turn"),
    "45_openai_messages.json": ("O", 1),
    "47_special_user_reserved107.json": ("N", 4, "DATA032", "46:14 item 3 turn 0", "<reserved_107>"),
    "48_special_user_eos.json": ("N", 4, "DATA032", "46:14 item 3 turn 0", "</s>"),
    "49_special_in_gpt.json": ("N", 4, "DATA032", "50:14 item 3 turn 1", "<reserved_106> <reserved_107>"),
    "50_too_long_prompt.json": ("O", 4),  # a matter of length: test_too_long_*
    "51_too_long_answer.json": ("O", 4),
    "52_dup_items.json": ("W", 5, "DATA034", "", "exact duplicate of item 0"),
    "54_lone_surrogate.json": ("R", 3, "DATA017", "1:376 item 3 turn 0", r"lone surrogate U\+D83D"),
    "55_invalid_utf8.json": ("F", 3, "DATA002", "1:381 item 3", "byte FF at byte 458"),
    "56_nul_and_ctrl.json": (
        "W",
        4,
        "DATA033",
        "46:14 item 3 turn 0",
        r"control characters U\+0000 U\+001B U\+202E",
    ),
    "57_raw_ctrl_in_string.json": ("F", 3, "DATA006", "1:380 item 3", r"TAB, write \\t"),
    "58_nan_literal.json": ("F", 3, "DATA006", "1:331 item 3", "NaN is not JSON"),
    "60_single_quotes.json": ("F", 0, "DATA006", "1:3", "double quotes - this looks like a Python repr"),
    "61_comments.json": ("F", 0, "DATA006", "1:1", "comments are not JSON"),
    "62_deep_nesting.json": ("F", 0, "DATA006", "1:", "nesting deeper than 64"),
    "63_huge_int.json": ("R", 3, "DATA006", "1:331 item 3", "number with 5000 digits"),
    "64_gz.json.gz": ("O", 3),
    "65_gzbomb.json.gz": ("F", 0, "DATA007", "", r"unpacks to more than 200 times its size; stopped"),
    "66_csv.json": ("F", 0, "DATA005", "1:1", "looks like CSV"),
    "67_parquet_magic.json": ("F", 0, "DATA007", "", "truncated parquet"),
    "68_crlf.jsonl": ("O", 3),
    "70_first_item_bad.json": ("R", 3, "DATA011", "2:2 item 0", 'no key "conversations"'),
    "71_extra_fields.json": ("O", 4),  # the keys are listed once: test_unknown_keys_are_listed
    "73_role_key_mixed.json": ("O", 4),
    "74_html_latex.json": ("O", 4),
    "75_value_trailing_newline.json": ("O", 4),
    "76_bool_from.json": ("R", 3, "DATA016", "44:13 item 3 turn 0", '"from" is a boolean'),
}
SEVERITY = {"F": "ERROR", "R": "ERROR", "N": "NOTE", "W": "WARN"}


@pytest.fixture
def check(tmp_path, monkeypatch, capsys):
    """Exit code, printed text and findings of ``baichuan-sft data check`` on a catalogue file."""
    monkeypatch.setenv("BAICHUAN_SFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(BADINPUT)

    def check(*words):
        out = tmp_path / "out"
        code = run(dispatch, ["data", "check", *map(str, words), "--output_dir", str(out)])
        report = out / "data_report.jsonl"
        lines = report.read_text().splitlines() if report.exists() else []
        return code, capsys.readouterr(), [json.loads(line) for line in lines]

    return check


@needs_shared
@pytest.mark.parametrize("name", CATALOGUE)
def test_every_file_gets_its_class_its_place_and_its_words(check, name, tmp_path):
    kind, good, *expected = CATALOGUE[name]
    code, printed, findings = check(name)
    if name != "52_dup_items.json":  # the good records of the other files are copies of each other, too
        findings = [finding for finding in findings if finding["code"] != "DATA034"]
    assert code == (2 if kind in "FR" else 0) and "Traceback" not in printed.out + printed.err
    assert all(line.isprintable() for line in printed.out.splitlines() if "DATA" in line)
    if not expected:
        assert findings == []
    for finding in findings:
        data_code, place, words = expected
        assert (finding["severity"], finding["code"]) == (SEVERITY[kind], data_code)
        assert re.search(words, finding["text"])
        whole = f"{SEVERITY[kind]} {data_code} {name}{':' if place else ''}{place}"
        if kind in "FR":
            (line,) = [line for line in printed.out.splitlines() if line.startswith("ERROR DATA")]
            assert line.startswith(whole) and line.endswith(finding["text"])
    assert len(findings) == (4 if name == "52_dup_items.json" else bool(expected))
    read = re.search(r"read ([\d,]+) = used ([\d,]+) \+ rejected ([\d,]+)", printed.out)
    assert read and int(read[2]) == good and int(read[1]) == good + int(read[3])


@needs_shared
@pytest.mark.parametrize(
    "name", [name for name, (kind, good, *_) in CATALOGUE.items() if kind in "FR" and good]
)
def test_skip_loses_no_good_record_and_no_byte(check, name, tmp_path):
    code, _, findings = check(name, "--on-error", "skip", "--fix", tmp_path / "fixed.jsonl")
    fixed = [json.loads(line) for line in (tmp_path / "fixed.jsonl").read_text().splitlines()]
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert code == 0 and len(fixed) == CATALOGUE[name][1]
    assert all({"from", "value"} == set(turn) for record in fixed for turn in record["conversations"])
    assert len(rejected) == 1 == len([finding for finding in findings if finding["severity"] == "ERROR"])
    is_of_record = name != "07_trailing_comma.json"  # where nothing but a comma is wrong
    assert ("raw" in rejected[0]) + ("raw_base64" in rejected[0]) == is_of_record == ("item" in rejected[0])
    assert (
        run(dispatch, ["data", "check", str(tmp_path / "fixed.jsonl"), "--output_dir", str(tmp_path / "o2")])
        == 0
    )


@needs_shared
def test_the_catalogue_is_complete():
    assert {path.name for path in BADINPUT.iterdir()} == set(CATALOGUE)


@needs_shared
def test_a_directory_is_no_file(check):
    code, printed, _ = check(BADINPUT)
    assert code == 2 and re.search(
        r"ERROR DATA001 .*badinput: is a directory; pass a file or a glob", printed.out
    )


@needs_shared
def test_all_files_at_once_are_all_listed(check):
    """One call over the whole folder, and every faulty file is named in the order of the files."""
    code, printed, _ = check("*.*")
    named = [
        line.split()[2].split(":")[0] for line in printed.out.splitlines() if line.startswith("ERROR DATA")
    ]
    assert code == 2 and list(dict.fromkeys(named)) == [
        name for name, (kind, *_) in sorted(CATALOGUE.items()) if kind in "FR"
    ]


@needs_shared
def test_role_names_are_counted_as_written(check):
    _, printed, _ = check("33_role_Human_caps.json", "35_role_chinese.json")
    for name in ("Human", "用户", "助手", "human", "gpt"):
        assert name in printed.out


@needs_shared
def test_unknown_keys_are_listed(check):
    raw = json.loads((BADINPUT / "71_extra_fields.json").read_text())[3]
    _, printed, _ = check("71_extra_fields.json")
    unknown = set(raw) - {"id", "conversations", "system", "source", "lang", "tools"}
    assert unknown and all(key in printed.out for key in unknown)


@needs_shared
@pytest.mark.parametrize(
    "name, words",
    [
        ("50_too_long_prompt.json", r"read 4 = used 3 .*without a target 1"),
        ("51_too_long_answer.json", r"1 of 4 \(25\.0 %\) to 512 tokens \(cut_turns\)"),
    ],
)
def test_too_long_is_counted(check, name, words):
    code, printed, _ = check(name, "--tokenizer", SMALL_VOCABULARY)
    assert code == 0 and re.search(words, printed.out)
