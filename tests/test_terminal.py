"""The terminal chat: what is shown, what is remembered, and that nothing typed ends it by accident."""

import io
import signal
import sys

import pytest
from fixtures import SMALL_VOCABULARY, tiny_config

from baichuan_sft.checkpoint import load_tokenizer
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

    def __init__(self, *answers):
        self.answers, self.asked, self.closed = list(answers), [], 0

    def chat(self, tokenizer, messages, stream, **options):
        assert stream
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
    monkeypatch.setattr("baichuan_sft.infer.terminal.write", lambda text: printed.append(text) or len(text))
    talk("问\n", ["a", "a\ufffd", "a\ufffd\ufffd", "a好", "a好b", "a好b\ufffd"])
    # The last one is the answer's own: nothing follows that could complete it.
    assert printed == ["a", "", "", "好", "b", "", "\ufffd\n"]


def test_an_answer_cannot_drive_the_terminal(talk):
    text = "a\x1b[2J\x07\r\u202eb\x9b\n\tc　👨\u200d👩"
    _, out, _ = talk("问\n", [text])
    assert out == "a\\x1b[2J\\x07\\r\\u202eb\\x9b\n\tc　👨\u200d👩\n"


def test_without_stream_an_answer_is_printed_whole(talk, monkeypatch):
    printed = []
    monkeypatch.setattr("baichuan_sft.infer.terminal.write", lambda text: printed.append(text) or len(text))
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


@pytest.mark.parametrize("end", [KeyboardInterrupt, EOFError])
def test_ctrl_c_and_ctrl_d_at_the_prompt_end_it(end, monkeypatch, capsys):
    def interrupted(prompt):
        raise end

    monkeypatch.setattr("builtins.input", interrupted)
    assert converse(Conversation(Scripted(), None, interactive=True)) == 0
    assert capsys.readouterr().out == "\n"


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
        "error: unknown command '/claer', did you mean '/clear'? Known: "
        "/clear, /exit, /help, /stream, /system.\nerror: /clear takes nothing after it, got 'now'.\n"
    )


def test_help_names_every_command(talk):
    _, _, err = talk("/help\n")
    assert all(name in err and text in err for name, (_, _, text) in COMMANDS.items())


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
    chat = Conversation(
        BaichuanForCausalLM(tiny_config("baichuan2-7b")).eval(), tokenizer, {"max_new_tokens": 8}
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO("你好 " * 350_000 + "\na\ud800\n你好\n"))
    assert converse(chat) == 0
    out, err = capsys.readouterr()
    assert "error: text has a lone surrogate U+D800 at character 1" in err
    assert len(chat.messages) == 4
    assert out.count("\n") >= 3
