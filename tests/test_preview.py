"""What the preview prints: exactly the trained spans are marked, with colours and without."""

import json
import re

import pytest
from fixtures import ROOT, SMALL_VOCABULARY

from baichuan_sft.datatools.preview import preview
from baichuan_sft.errors import UserError

CHAT = ROOT / "data" / "belle_chat.json"
LINES = ROOT / "data" / "belle_chat.jsonl"


@pytest.fixture
def show(capsys, monkeypatch):
    monkeypatch.delenv("FORCE_COLOR", raising=False)

    def show(path, *options):
        assert preview([str(path), "--tokenizer", str(SMALL_VOCABULARY), *options]) == 0
        return capsys.readouterr().out

    return show


def write(path, *turns):
    record = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    path.write_text(json.dumps([record]))
    return path


def test_trained_spans_stand_in_brackets(show):
    assert show(LINES, "--num", "4") == "\n".join(
        [
            "legend: ⟦trained⟧ seen only <marker>",
            "",
            f"{LINES}:1 item 0  23 of 41 tokens trained",
            "<user>红绿灯的红灯亮了怎么办？<assistant>⟦红灯亮了要停下来，等绿灯亮了再走。</s>⟧",
            "",
            f"{LINES}:2 item 1  14 of 33 tokens trained",
            "你是一名导游，回答要简短。<user>去北京可以看什么？<assistant>⟦可以看故宫、长城和颐和园。</s>⟧",
            "",
            f"{LINES}:3 item 2  7 of 22 tokens trained",
            "请用英语回答。<user>猫用英语怎么说？<assistant>⟦It is cat.</s>⟧",
            "",
            f"{LINES}:4 item 3  15 of 40 tokens trained",
            "<user>大象会飞吗？<assistant>会，大象飞得很高。"
            "<user>真的吗？<assistant>⟦抱歉，我说错了，大象不会飞。</s>⟧",
            "",
            "4 conversations: 59 of 136 tokens trained",
            "",
        ]
    )


def test_end_of_turn_stands_before_the_next_marker(show, tmp_path):
    path = write(tmp_path / "x.json", ("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d"))
    assert "<user>a<assistant>⟦b</s>⟧<user>c<assistant>⟦d</s>⟧\n" in show(path)
    assert "<user>a<assistant>b<user>c<assistant>⟦d</s>⟧\n" in show(path, "--train_on", "last")


def test_colours(show, monkeypatch, tmp_path):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    output = show(write(tmp_path / "x.json", ("human", "ab"), ("gpt", "cd")))
    assert "⟦" not in output
    assert re.search(r"\x1b\[2mab\x1b\[0m.*<assistant>.*\x1b\[1;32mcd\x1b\[0m", output)


def test_text_cannot_drive_the_terminal(show, tmp_path):
    text = "[red]a\x1b[31m\u202e\x00\nb[/red]"
    line = show(write(tmp_path / "x.json", ("human", text), ("gpt", "<reserved_107>")))
    assert "<user>[red]a\\x1b[31m\\u202e\\x00\\nb[/red]<assistant>⟦<reserved_107></s>⟧" in line


def test_long_lines_are_not_wrapped_and_the_cut_is_said(show, tmp_path):
    path = write(tmp_path / "x.json", ("human", "你好，" * 100), ("gpt", "b" * 5))
    assert "你好，" * 100 in show(path)
    words = r"item 0  \d+ tokens, none trained: no target is left, training drops it"
    assert re.search(words, show(path, "--max_length", "9"))


def test_defaults_show_three(show):
    assert "3 conversations:" in show(CHAT)
    assert "70 conversations: 1292 of 2008 tokens trained" in show(CHAT, "--num", "99")


@pytest.mark.parametrize(
    "option, value", [("--nu", 1), ("--num", 0), ("--max_length", "x"), ("--train_on", "a")]
)
def test_wrong_options(show, option, value):
    with pytest.raises(UserError, match=option):
        show(CHAT, option, str(value))


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit, match="0"):
        preview(["--help"])
    assert "baichuan-sft preview data/belle_chat.json --model_name_or_path" in capsys.readouterr().out


def test_wrong_record_is_named(show, tmp_path):
    with pytest.raises(UserError, match=r"ERROR DATA020 .*x\.json:1:20 item 0: no assistant turn"):
        show(write(tmp_path / "x.json", ("human", "a")))
