"""The terminal chat: what is shown, what is remembered, and that nothing typed ends it by accident."""

import io
import json
import re
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from fixtures import ROOT, SMALL_VOCABULARY, tiny_config

from baichuan_sft.checkpoint import load_tokenizer
from baichuan_sft.infer.chat import CHARACTERS_PER_TOKEN
from baichuan_sft.infer.commands import SETTINGS
from baichuan_sft.infer.terminal import COMMANDS, Conversation, converse
from baichuan_sft.model.modeling_baichuan import BaichuanForCausalLM


@pytest.fixture(autouse=True)
def ctrl_c_interrupts():
    """A shell that starts the tests in the background has SIGINT ignored, and Python then leaves it so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Scripted:
    """Answers with the given states of a growing text; an exception among them is raised, a signal sent."""

    config = SimpleNamespace(context_length=64)
    generation_config = SimpleNamespace(temperature=0.3, top_k=5)

    def __init__(self, *answers):
        self.answers, self.asked, self.options, self.closed = list(answers), [], [], 0

    def chat(self, tokenizer, messages, stream, **options):
        assert stream
        self.options.append(options)
        self.asked.append([(m["role"], m["content"]) for m in messages])
        return self.states(self.answers.pop(0))

    def states(self, answer):
        try:
            for state in answer:
                if isinstance(state, signal.Signals):
                    signal.raise_signal(state)
                elif isinstance(state, Exception):
                    raise state
                else:
                    yield state
        finally:
            self.closed += 1


@pytest.fixture
def talk(monkeypatch, capsys):
    def talk(typed, *answers, **settings):
        """(the model, what it was asked with, stdout, stderr) after the lines ``typed``."""
        chat = Conversation(Scripted(*answers), tokenizer=None, **settings)
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        assert converse(chat) == 0
        return chat, *capsys.readouterr()

    return talk


def test_growing_text_is_printed_once_and_remembered(talk):
    chat, out, err = talk("问\n再问\n", ["答", "答案"], ["好"], interactive=False)
    assert (out, err) == ("答案\n好\n", "")
    assert chat.model.asked[1] == [("user", "问"), ("assistant", "答案"), ("user", "再问")]


def test_prompts_and_speed_are_for_a_person(talk):
    _, out, err = talk("问\n", ["答", "答案"], interactive=True)
    assert out == "user> assistant> 答案\nuser> \n"
    assert err.startswith("2 tokens, ")
    assert "tokens/s" in err


def test_a_half_character_is_held_back(talk, monkeypatch):
    printed = []
    monkeypatch.setattr("baichuan_sft.infer.talk.write", lambda text: printed.append(text) or len(text))
    talk("问\n", ["a", "a\ufffd", "a\ufffd\ufffd", "a好", "a好b", "a好b\ufffd"])
    # The last one is the answer's own: nothing follows that could complete it.
    assert printed == ["a", "", "", "好", "b", "", "\ufffd\n"]


def test_an_answer_cannot_drive_the_terminal(talk):
    text = "a\x1b[2J\x07\r\u202eb\x9b\n\tc　👨\u200d👩"
    _, out, _ = talk("问\n", [text])
    assert out == "a\\x1b[2J\\x07\\r\\u202eb\\x9b\n\tc　👨\u200d👩\n"


def test_without_stream_an_answer_is_printed_whole(talk, monkeypatch):
    printed = []
    monkeypatch.setattr("baichuan_sft.infer.talk.write", lambda text: printed.append(text) or len(text))
    talk("问\n/stream on\n问\n", ["a", "ab"], ["a", "ab"], stream=False)
    assert printed == ["ab\n", "a", "b", "\n"]


def test_ctrl_c_stops_the_answer_and_keeps_what_it_had(talk):
    chat, out, err = talk("问\n再问\n", ["a", "ab\ufffd", signal.SIGINT, "never"], ["c"], interactive=True)
    assert "assistant> ab\nuser> assistant> c\n" in out
    assert chat.model.asked[1] == [("user", "问"), ("assistant", "ab"), ("user", "再问")]
    assert "stopped, 2 tokens" in err
    assert chat.model.closed == 2


def test_ctrl_c_before_the_first_token_leaves_no_turn(talk):
    chat, _, _ = talk("问\n再问\n", [signal.SIGINT, "never"], ["c"])
    assert chat.model.asked[1] == [("user", "再问")]


def typing(monkeypatch, *events):
    """A person at the keyboard: lines, and exceptions for what the keys raise."""
    left = list(events)

    def typed(prompt):
        event = left.pop(0)
        if isinstance(event, str):
            return event
        raise event

    monkeypatch.setattr("builtins.input", typed)


def test_ctrl_d_at_the_prompt_ends_it_and_ctrl_c_does_not(monkeypatch, capsys):
    typing(monkeypatch, KeyboardInterrupt(), KeyboardInterrupt(), "问", EOFError())
    chat = Conversation(Scripted(["a"]), None, interactive=True)
    assert converse(chat) == 0
    assert [m["content"] for m in chat.messages] == ["问", "a"]
    out, err = capsys.readouterr()
    assert out == "\n\nassistant> a\n\n"
    assert err.count("/exit or Ctrl-D ends the conversation") == 2


def test_ctrl_c_ends_a_pipe(monkeypatch):
    typing(monkeypatch, KeyboardInterrupt())
    assert converse(Conversation(Scripted(), None)) == 0


def test_a_terminal_that_has_gone_is_an_end_of_input(monkeypatch, capsys):
    typing(monkeypatch, "问", OSError(5, "Input/output error"))
    assert converse(Conversation(Scripted(["a"]), None)) == 0
    assert capsys.readouterr().err == "error: cannot read any further: [Errno 5] Input/output error\n"


@pytest.mark.parametrize(
    "error, line",
    [
        (ValueError("too long\nby far"), "error: too long\n"),
        (RuntimeError("out of memory"), "error: out of memory\n"),
        (IndexError(), "error: IndexError\n"),
    ],
)
def test_an_error_is_one_line_and_no_turn(talk, error, line):
    chat, out, err = talk("问\n再问\n", ["half", error], ["c"])
    assert (out, err) == ("half\nc\n", line)
    assert chat.model.asked[1] == [("user", "再问")]


@pytest.mark.parametrize("word", ["/exit", "exit", "quit", " exit "])
def test_exit(talk, word):
    chat, out, err = talk(f"{word}\n问\n")
    assert (chat.model.asked, out, err) == ([], "", "")


@pytest.mark.parametrize("word", ["/clear", "clear"])
def test_clear(talk, word):
    chat, _, _ = talk(f"问\n{word}\n问\n", ["a"], ["b"], system="s")
    assert chat.model.asked[1] == [("system", "s"), ("user", "问")]


def test_stream_switches(talk):
    chat, _, err = talk("stream\n/stream\n/stream off\n/stream on\n/stream maybe\n/stream off\n")
    assert err == "stream off\nstream on\nstream off\nstream on\n" + (
        "error: /stream maybe: it is on or off.\nstream off\n"
    )
    assert chat.stream is False


def test_system_message(talk):
    chat, _, err = talk("/system 你是 导游\n问\n/system\n问\n", ["a"], ["b"], system="before")
    assert chat.model.asked[0] == [("system", "你是 导游"), ("user", "问")]
    assert chat.model.asked[1] == [("user", "问"), ("assistant", "a"), ("user", "问")]
    assert err == "system message set\nno system message\n"


def test_unknown_command_is_one_line_and_goes_nowhere(talk):
    chat, out, err = talk("/claer\n/clear now\n")
    assert (chat.model.asked, out) == ([], "")
    assert err == (
        f"error: unknown command '/claer', did you mean '/clear'? Known: {', '.join(sorted(COMMANDS))}.\n"
        "error: /clear takes nothing after it, got 'now'.\n"
    )


def test_help_names_every_command(talk):
    _, _, err = talk("/help\n")
    assert all(name in err and text in err for name, (_, _, text) in COMMANDS.items())


@pytest.mark.parametrize("name", ["chat.md", "chat_zh.md"])
def test_the_documentation_names_every_command_and_setting(name):
    named = re.findall(r"`([^` ]+)", (ROOT / "docs" / name).read_text(encoding="utf-8"))
    assert {word for word in named if re.fullmatch(r"/[a-z]+", word)} == set(COMMANDS)
    assert set(SETTINGS) <= set(named)


def test_a_block_is_one_message_whatever_it_holds(talk):
    chat, out, _ = talk('"""\n/exit\n\n clear\n"""\n', ["a"], interactive=True)
    assert chat.model.asked == [[("user", "/exit\n\n clear")]]
    assert out.startswith("user> ... ... ... ... assistant> a\n")


def test_a_pasted_text_is_one_message(monkeypatch):
    lines = iter(["/exit\nfirst\nsecond", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    chat = Conversation(Scripted(["a"]), None)
    assert converse(chat) == 0
    assert chat.model.asked == [[("user", "/exit\nfirst\nsecond")]]


def test_a_block_that_never_closes_is_not_sent(talk):
    chat, _, err = talk('"""\na\nb\n')
    assert chat.model.asked == []
    assert 'the input ended before the closing """, 2 lines are dropped' in err


def test_blank_lines_are_no_messages(talk):
    assert talk('\n  \n"""\n\n"""\n')[0].model.asked == []


def test_a_pasted_megabyte_and_a_lone_surrogate(monkeypatch, capsys):
    tokenizer = load_tokenizer(SMALL_VOCABULARY)
    model = BaichuanForCausalLM(tiny_config("baichuan2-7b")).eval()
    chat = Conversation(model, tokenizer, {"max_new_tokens": 8})
    length = model.config.context_length * CHARACTERS_PER_TOKEN
    lines = ["你好 " * 350_000, "a\ud800", "/system \ud800", "\x00\ufffd\x1b[2J", "你" * length]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    assert converse(chat) == 0
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("error")]
    assert errors == [
        "error: this text has 1,050,000 characters, the model's 128 tokens hold 4,096 at most; nothing was "
        "sent. Send a part of it.",
        "error: text has a lone surrogate U+D800 at character 1.",
        "error: text has a lone surrogate U+D800 at character 0.",
    ]
    assert len(chat.messages) == 4 and not chat.system
    assert out.count("\n") >= 2


def test_a_pasted_megabyte_is_not_even_encoded(talk):
    chat, _, err = talk("a" * (64 * CHARACTERS_PER_TOKEN + 1) + "\n" + "a" * 64 * CHARACTERS_PER_TOKEN, ["b"])
    assert len(chat.model.asked) == 1 and "2,049 characters" in err


# --- undo, retry, settings ----------------------------------------------------------------------------


def test_undo(talk):
    chat, _, err = talk("一\n二\n/undo\n三\n/undo\n/undo\n/undo\n", ["a"], ["b"], ["c"])
    assert chat.model.asked[2] == [("user", "一"), ("assistant", "a"), ("user", "三")]
    assert err == "undone: 二\nundone: 三\nundone: 一\nerror: /undo: nothing was said yet.\n"


def test_retry_asks_the_same_again(talk):
    chat, out, err = talk("/retry\n一\n二\n/retry\n", ["a"], ["b"], ["c"])
    assert chat.model.asked[1] == chat.model.asked[2] == [("user", "一"), ("assistant", "a"), ("user", "二")]
    assert [m["content"] for m in chat.messages] == ["一", "a", "二", "c"]
    assert (out, err) == ("a\nb\nc\n", "error: /retry: nothing was asked yet.\n")


@pytest.mark.parametrize("failure", [RuntimeError("out of memory"), signal.SIGINT])
def test_a_failed_retry_keeps_the_old_answer(talk, failure):
    chat, _, _ = talk("一\n/retry\n/retry\n", ["a"], [failure, "never"], ["b"], interactive=True)
    assert chat.model.asked[2] == [("user", "一")]
    assert [m["content"] for m in chat.messages] == ["一", "b"]


@pytest.mark.parametrize("failure", [RuntimeError("out of memory"), signal.SIGINT])
def test_retry_after_a_failure_asks_what_failed(talk, failure):
    chat, _, _ = talk("一\n二\n/retry\n", ["a"], [failure, "never"], ["b"], interactive=True)
    assert chat.model.asked[2] == [("user", "一"), ("assistant", "a"), ("user", "二")]
    assert [m["content"] for m in chat.messages] == ["一", "a", "二", "b"]


def test_settings_while_talking(talk):
    lines = [
        "问",
        "/set temperature 0.7",
        "/set max_new_tokens 8",
        "问",
        "/set greedy on",
        "问",
        "/set top_p 0.5",
        "问",
        "/set top_p",
        "/set max_new_tokens",
        "问",
    ]
    cache = object()  # stays whatever is set; without one the answers are streamed
    chat, _, err = talk("\n".join(lines), *[["a"]] * 5, options={"other": cache})
    assert [{k: v for k, v in options.items() if k != "other"} for options in chat.model.options] == [
        {},
        {"temperature": 0.7, "max_new_tokens": 8, "do_sample": True},
        {"max_new_tokens": 8, "do_sample": False},
        {"max_new_tokens": 8, "top_p": 0.5, "do_sample": True},
        {},
    ]
    assert all(options["other"] is cache for options in chat.model.options)
    assert err.splitlines()[0] == "temperature 0.7"
    assert err.splitlines()[-1] == "max_new_tokens as the model has it"


def test_settings_are_shown(talk):
    _, _, err = talk("/set top_k 7\n/set\n")
    shown = err.splitlines()[1:]
    assert [line.split()[0] for line in shown] == list(SETTINGS)
    assert "temperature        0.3 (the model)" in shown and "top_k              7" in shown


@pytest.mark.parametrize(
    "words, message",
    [
        ("temperature 0", "argument --temperature: '0' is not a finite number > 0"),
        ("temprature 1", "unknown setting 'temprature', did you mean 'temperature'"),
        ("top_k x y", "'x y' is not a whole number"),
        ("max_new_tokens 64", "leaves no room for a question in the model's 64 tokens"),
        ("greedy maybe", "/set greedy maybe: it is on or off"),
        ("seed -1", "'-1' is not a whole number from 0"),
        ("seed " + "9" * 400, "is not a whole number from 0"),
    ],
)
def test_wrong_settings_change_nothing(talk, words, message):
    chat, _, err = talk(f"/set top_p 0.5\n/set {words}\n")
    assert message in err.splitlines()[1]
    assert chat.options == {"top_p": 0.5, "do_sample": True} and chat.settings == {"top_p": "0.5"}


def test_a_seed_makes_the_next_answers_repeatable(monkeypatch, capsys):
    torch.manual_seed(0)
    model = BaichuanForCausalLM(tiny_config("baichuan2-7b")).eval()
    options = {"max_new_tokens": 8, "do_sample": True, "temperature": 2.0}
    chat = Conversation(model, load_tokenizer(SMALL_VOCABULARY), options)
    lines = ["/set temperature 2", "/set max_new_tokens 8"]
    lines += [word for seed in (1, 1, 2) for word in (f"/set seed {seed}", "你好", "/undo")]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    converse(chat)
    one, again, other = capsys.readouterr().out.splitlines()
    assert one == again != other


# --- files --------------------------------------------------------------------------------------------


def test_a_saved_conversation_is_training_data(talk, tmp_path):
    from baichuan_sft.datatools.command import main as data

    file = tmp_path / "说 过.json"
    lines = ["/save", "一\n", "二\n", f"/save {file}", "三\n", "/save\n"]
    _, _, err = talk("\n".join(lines), ["a\nb"], [""], ["c"], system="简短")
    turns = [("system", "简短"), ("human", "一"), ("gpt", "a\nb"), ("human", "三"), ("gpt", "c")]
    assert json.loads(file.read_text(encoding="utf-8")) == [
        {"conversations": [{"from": name, "value": text} for name, text in turns]}
    ]
    assert "error: /save FILE: say where." in err and "2 turns saved" in err
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert data(["check", str(file), "--output_dir", str(tmp_path / "report")]) == 0
    loaded, _, err = talk(f"四\n/load {file}\n五\n", ["d"], ["e"])
    assert loaded.model.asked[1] == [
        ("system", "简短"),
        *[({"human": "user", "gpt": "assistant"}[name], text) for name, text in turns[1:]],
        ("user", "五"),
    ]
    assert err == "2 turns loaded, system message: 简短; the last: 三\n"


def test_load_number_n_keeps_what_is_not_to_be_learnt(talk, tmp_path):
    context = [{"role": "user", "content": "s"}, {"role": "assistant", "content": "t", "train": False}]
    rest = [{"role": "user", "content": "w"}, {"role": "assistant", "content": "x"}]
    rows = [{"instruction": "q", "output": "r"}, {"messages": context + rest}]
    file = tmp_path / "many.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    talk(f"/load {file} 2\nu\n/save {tmp_path / 'out.json'}\n", ["v"])
    turns = json.loads((tmp_path / "out.json").read_text())[0]["conversations"]
    assert [turn["value"] for turn in turns] == list("stwxuv")
    assert [turn.get("train") for turn in turns] == [None, False, None, None, None, None]
    _, _, err = talk(f"/load {file}\n/load {file} 3\n/undo\n")
    assert f"error: {file}: has no conversation number 3." in err
    assert "undone: q" in err  # the wrong number changed nothing


def test_files_that_cannot_be(talk, tmp_path):
    taken, page, text = tmp_path / "taken.json", tmp_path / "page.json", tmp_path / "text.json"
    taken.write_text("mine")
    page.write_text("<html>")
    text.write_text('{"text": "a"}')
    (tmp_path / "odd.json").write_bytes(b'[{"conversations": "\xff\x00"}]')
    lines = [
        "/save x",
        "问",
        f"/save {taken}",
        f"/save {tmp_path}/no/x.json",
        f"/save {tmp_path}",
        "/save a\0b",
    ]
    lines += ["/load", f"/load {tmp_path}/none", f"/load {page}", f"/load {text}", f"/load {tmp_path}"]
    lines += [f"/load {tmp_path}/odd.json", "/load /dev/null", "/load a\0b"]
    lines += ["/save ~nobody-of-that-name/x", "/load ~nobody-of-that-name/x", "/load " + "a" * 5000]
    lines += [f"/load {taken} {'9' * count}" for count in (20, 5000)] + ["/retry"]
    chat, _, err = talk("\n".join(lines), ["a"], ["b"])
    assert len([line for line in err.splitlines() if line.startswith("error: ")]) == len(lines) - 2, err
    assert len(err.splitlines()) == len(lines) - 2
    assert taken.read_text() == "mine" and not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    assert [m["content"] for m in chat.messages] == ["问", "b"]


def test_edit(talk, monkeypatch, tmp_path):
    script = tmp_path / "editor.py"
    script.write_text("import sys; open(sys.argv[2], 'wb').write(sys.argv[1].encode('latin-1'))")
    for text in ("/exit\nb\n", "", "\xff"):
        monkeypatch.setenv("VISUAL", f"'{sys.executable}' '{script}' '{text}'")
        chat, out, err = talk("vim\n", ["c"])
        if text == "/exit\nb\n":
            assert chat.model.asked == [[("user", "/exit\nb")]] and out == "/exit\nb\nc\n"
        else:
            assert chat.model.asked == [] and ("error: /edit: " in err) == (text != "")
    for editor in ("no-such-editor", "false", "'"):
        monkeypatch.setenv("VISUAL", editor)
        chat, _, err = talk("/edit\n问\n", ["a"])
        assert err.startswith("error: /edit: ") and err.count("\n") == 1
        assert chat.model.asked == [[("user", "问")]]
