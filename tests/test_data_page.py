"""What ``data check`` shows, printed and as a page: every number adds up, and no text of the data acts."""

import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fixtures import SMALL_VOCABULARY

from baichuan_sft.data.check import SCRIPTS, Examined, Rules
from baichuan_sft.data.findings import Finding
from baichuan_sft.data.formats import Message
from baichuan_sft.data.report import DataReport, SourceReport
from baichuan_sft.data.sources import Source
from baichuan_sft.data.survey import Survey
from baichuan_sft.datatools import facts
from baichuan_sft.datatools.command import Check, main
from baichuan_sft.datatools.page import write_page
from baichuan_sft.datatools.page_style import CHINESE, COLOUR
from baichuan_sft.datatools.summary import show

TOKENIZER = ("--tokenizer", str(SMALL_VOCABULARY))
EVIL = '<script>alert(1)</script>"\x1b[31m\u202e<img src=x onerror=a>&amp;'
# What the page is made of: any other element came out of the data.
ELEMENTS = set(
    "html head meta title style body section h1 h2 h3 p a b i br small span div ul li dl dt dd code article "
    "table thead tbody tr th td".split()
)


class Page(HTMLParser):
    """Elements, attributes, and the text without its marks."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.attributes, self.words = Counter(), set(), []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.text = " ".join(self.words)

    def handle_starttag(self, tag, attributes):
        self.elements[tag] += 1
        self.attributes.update(name for name, _ in attributes)

    def handle_data(self, data):
        self.words.append(data)


def conversation(*texts, role="human", **keys):
    names = [role, "gpt"] * (len(texts) // 2)
    return {"conversations": [{"from": n, "value": t} for n, t in zip(names, texts, strict=True)], **keys}


@pytest.fixture
def check(tmp_path, monkeypatch, capsys):
    """Runs the command on files of these records; returns exit code, what it printed and its page."""
    monkeypatch.setenv("BAICHUAN_SFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.chdir(tmp_path)

    def check(records, *options):
        for name, lines in records.items():
            texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
            (tmp_path / name).write_text("\n".join(texts), encoding="utf-8")
        code = main(["check", "--output_dir", "out", *options, *records])
        return code, capsys.readouterr().out, Page(tmp_path / "out" / "report.html")

    return check


@pytest.fixture
def mixed():
    """12 records in two files: 2 faults, 2 copies, 8 different ones."""
    good = [conversation(f"问题{i}", f"回答{i}" * (i + 1)) for i in range(8)]
    return {
        "a.jsonl": [*good[:5], good[0], '{"broken": ', conversation("a", "")],
        "b.jsonl": [*good[5:], good[1]],
    }


def row(name, output):
    """The numbers of a file in the printed table."""
    line = next(line for line in output.splitlines() if line.startswith(f"{name} "))
    return [int(word.replace(",", "")) for word in line.removeprefix(name).split()[:4]]


def test_the_numbers_add_up(check, mixed):
    code, output, page = check(mixed)
    assert code == 2
    balance = "read 12 = used 10 + rejected 2"
    assert balance in output.splitlines() and balance in page.text
    assert row("a.jsonl", output) == [8, 2, 6, 12]
    assert row("b.jsonl", output) == [4, 0, 4, 8]
    assert row("2 files", output) == [12, 2, 10, 20]
    assert "belle 10; gpt 10, human 10" in output and "gpt 10, human 10" in page.text
    assert re.search(r"copies +2 of 10 \(20.0 %\) equal to an earlier one, kept", output)
    bars = re.findall(r"^ *[\d,]+(?:-[\d,]+)? +([\d,]+) [▏▎▍▌▋▊▉█]+$", output, re.MULTILINE)
    assert len(bars) > 1 and sum(map(int, bars)) == 10


def test_dropped_copies_are_in_the_sum(check, mixed):
    _, output, _ = check(mixed, "--on_error", "skip", "--dedup")
    assert "read 12 = used 8 + rejected 2 + duplicates dropped 2\n" in output
    assert "equal to an earlier one, left out" in output


def test_with_a_tokenizer_the_balance_is_that_of_training(check, mixed):
    skipped = ("--on_error", "skip", "--dedup")
    code, output, page = check(mixed, *skipped, *TOKENIZER, "--model_max_length", "10")
    assert code == 0
    tokens = re.search(
        r"tokens: rendered (\d+) = used (\d+) \+ lost to length (\d+) \+ not used (\d+)", output
    )
    rendered, *parts = map(int, tokens.groups())
    assert rendered == sum(parts) and tokens[0] in page.text and int(tokens[3]) > 0
    assert "read 12 = used 8 + rejected 2 + duplicates dropped 2" in output
    assert re.search(r"^─* *10 ─+ cut$", output, re.MULTILINE) and "length in tokens" in output
    assert re.search(r"cut +\d+ of 10 \(\d+\.\d %\) to 10 tokens \(cut_turns\)", output)
    assert "50 % up to" in output and "50 % up to" in page.text
    assert re.search(r"supervised 参与训练 [\d,]+ of [\d,]+", " ".join(page.text.split()))


def test_trained_tokens_are_marked(check):
    record = conversation("你好", "回答" + EVIL)
    _, output, page = check({"a.jsonl": [record]}, *TOKENIZER)
    assert "<user>你好<assistant>⟦回答<script>" in output
    assert re.search(r'<span class="trained">回答&lt;script&gt;alert', page.source)
    assert '<span class="seen">你好</span>' in page.source


def test_errors_stand_first_one_line_each_as_they_are(check, mixed):
    _, output, page = check(mixed)
    lines = Path("out/rejected.jsonl").read_text(encoding="utf-8").splitlines()
    reports = [json.loads(line) for line in lines]
    errors = [Finding(**{k: v for k, v in r.items() if k not in ("severity", "raw")}) for r in reports]
    assert len(errors) == 2
    assert output.splitlines()[:3] == [*map(str, errors), ""]
    assert all(error.place() in page.text for error in errors)
    assert "\x1b" not in output and "2 errors: --on_error skip leaves" in output
    assert output.splitlines()[-1] == "reports in out: report.html, data_report.jsonl, rejected.jsonl"


def test_other_findings_are_counted_with_an_example(check):
    records = [conversation("", "b"), conversation(" ", "c"), conversation("<s>", "d")]
    code, output, page = check({"a.jsonl": records})
    assert code == 0
    assert re.search(r"WARN +DATA031 +2 +empty user turn", output)
    assert re.search(r"NOTE +DATA032 +1 +text of a control token", output)
    assert output.count("a.jsonl:1:") == 2  # as an example, and as the first conversation
    assert "a.jsonl:2:" in page.text and "no errors" in page.text


def test_more_errors_than_are_listed(check):
    code, output, page = check({"a.jsonl": ["[]"] * 3 + ['{"x": 1}'] * 1002})
    lines = output.splitlines()
    assert code == 2 and sum(line.startswith("ERROR DATA0") for line in lines) == 1000
    assert lines[1000] == "... and 5 more errors in data_report.jsonl"
    assert re.search(r"ERROR +DATA011 +1,002", output)
    assert page.source.count("<code>DATA011</code>") == 1000 - page.source.count("<code>DATA010</code>")
    assert "... and 5 more" in page.text and "1,005" in page.text


@pytest.mark.parametrize(
    "records, used",
    [([conversation("a", "b")], 1), ([{"x": 1}], 0), ([], 0), (["[]"], 0), (["\n"], 0)],
    ids=["one", "only errors", "empty file", "empty list", "blank"],
)
def test_hardly_any_data(check, records, used):
    code, output, page = check({"a.jsonl": records})
    assert code == (0 if used else 2)
    balance = re.search(r"^read (\d) = used (\d) \+ rejected (\d)$", output, re.MULTILINE)
    read, kept, rejected = map(int, balance.groups())
    assert kept == used and read == used + rejected and balance[0] in page.text
    assert ("length in characters" in output) == bool(used)


def test_missing_file(check):
    code, output, page = check({"a.jsonl": [conversation("a", "b")]}, "gone.jsonl")
    assert code == 2 and output.startswith("ERROR DATA001 gone.jsonl: no such file\n")
    assert row("gone.jsonl", output) == [0, 0, 0, 0] and row("a.jsonl", output) == [1, 0, 1, 2]
    assert "ERROR DATA001 1" in " ".join(page.text.split())


def test_every_file_is_listed(check):
    names = [f"{i:02}.jsonl" for i in range(30)]
    _, output, page = check({name: [conversation(name, name)] for name in names})
    assert all(row(name, output) == [1, 0, 1, 2] for name in names)
    assert all(name in page.text for name in names)
    assert "00.jsonl, 01.jsonl, 02.jsonl ..." in page.text and row("30 files", output)[0] == 30


@pytest.mark.parametrize("tokenizer", [(), TOKENIZER], ids=["characters", "tokens"])
def test_text_of_the_data_does_nothing(check, tokenizer):
    name = EVIL.replace("/", "") + ".jsonl"
    records = [conversation(EVIL, EVIL * 9, **{EVIL: 1}), conversation("a", "b", role=EVIL), "{" + EVIL]
    _, output, page = check({name: records}, "--on_error", "skip", *tokenizer)
    assert set(page.elements) <= ELEMENTS, set(page.elements) - ELEMENTS
    assert page.attributes <= set("charset http-equiv content name lang class style title id href".split())
    for text in (output, page.source):
        assert not re.search("[\0-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)
    assert page.text.count("<script>") > 4 and "keys not read" in page.text


def test_the_page_loads_nothing(check, mixed):
    page = check(mixed)[2].source
    assert "default-src 'none'; style-src 'unsafe-inline'" in page
    assert not re.search(r"https?:|src=|url\(|@import|<script|<link", page)
    assert page.startswith("<!doctype html>") and 'charset="utf-8"' in page[:100]


def test_long_texts_are_shortened(check):
    _, output, page = check({"a.jsonl": [conversation("你" * 1000, "b")]})
    for text in (output, page.text):
        assert "你" * 300 + " ... 700 more" in text and "你" * 301 not in text


def test_long_conversations_are_shortened(check):
    _, output, page = check({"a.jsonl": [conversation(*[f"turn{i}" for i in range(1000)])]})
    assert "turn19\n...: 980 more turns\n" in output and "turn20" not in output
    assert "turn19" in page.text and "turn20" not in page.text and "980 more turns" in page.text


@pytest.mark.parametrize("name", ["x[/y].jsonl", "[bold]a.jsonl", ":smile:.jsonl"])
def test_file_names_are_no_markup(check, tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    records = [conversation("[/x]", "[red]b", role="human"), conversation("", "b")]
    code, output, _ = check({name: records})
    assert code == 0 and row(name, output) == [2, 0, 2, 4]
    assert f"{name}:2:" in output and "user: [/x]\nassistant: [red]b" in output


def test_only_what_is_shown_of_a_text_is_escaped(monkeypatch):
    seen = []
    monkeypatch.setattr(facts, "plain", lambda text: seen.append(text) or text)
    assert facts.shortened("\n" * 10**6).endswith(" ... 999,700 more") and seen == ["\n" * 300]


# --- built by hand: what the command would have to go wrong for ---------------------------------------


def built(tmp_path, **counts):
    survey = Survey(Counter(counts), Counter({8: 3}))
    first = [("a.jsonl:1", [Message("user", "a"), Message("assistant", "b")])]
    return Check(Rules(), [Source("a.jsonl")], tmp_path, [None], [survey], first)


def test_sums_that_do_not_hold_are_a_bug(tmp_path):
    with pytest.raises(AssertionError):
        show(built(tmp_path, read=5, rejected=1), dropped=0)
    with pytest.raises(AssertionError):
        write_page(built(tmp_path, read=5, rejected=1), tmp_path / "x.html")


def test_page_of_a_check_built_by_hand(tmp_path):
    write_page(built(tmp_path, read=4, rejected=1), tmp_path / "x.html", dropped=2)
    assert "read 4 = used 1 + rejected 1 + duplicates dropped 2" in Page(tmp_path / "x.html").text


@pytest.mark.parametrize("lengths", [[1], [1, 1, 3], [2, 3, 4, 5], [20, 10**6], range(1, 3000)], ids=str)
def test_histogram_covers_each_length_once(tmp_path, lengths):
    found = built(tmp_path)
    found.surveys[0].characters.clear()
    found.surveys[0].add(Examined(characters=list(lengths)))
    bars = facts.length_histogram(found)
    assert 0 < len(bars) <= facts.MAX_ROWS and all(first <= last for first, last, _ in bars)
    assert all(left[1] + 1 == right[0] for left, right in zip(bars, bars[1:]))
    for first, last, number in bars:
        assert number == sum(first <= length <= last for length in lengths)
    assert sum(number for _, _, number in bars) == len(lengths)


def test_all_that_is_drawn_has_a_colour_and_a_name():
    source = SourceReport("a", "", 21, 1, 2, 3, 3, 4, 5, 6, 0, 33, 10, 11, 12)
    report = DataReport([source], Counter(), 1, 1, 1, 1, [1] * 4, 512, "cut_turns", [])
    records, tokens = (facts.parts_of(line) for line in (report.balance(), report.token_balance()))
    assert list(records.values()) == [1, 2, 3, 4, 5, 6] and list(tokens.values()) == [10, 11, 12]
    drawn = {*records, *tokens, *SCRIPTS}
    assert drawn == COLOUR.keys() and drawn <= CHINESE.keys()
