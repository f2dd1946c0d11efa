"""``baichuan-sft web``: the page's logic in Streamlit's own test harness, and the page in a browser."""

import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from fixtures import ROOT, SMALL_VOCABULARY, tiny_config
from launching import environment, free_port

from baichuan_sft.checkpoint import load_model, load_tokenizer
from baichuan_sft.datatools.command import main as data
from baichuan_sft.errors import EnvironmentFault, UserError
from baichuan_sft.infer import web
from baichuan_sft.infer.web_chat import MAX_KEPT, Conversation, Turn, as_markdown, from_belle, take, to_belle
from baichuan_sft.infer.web_text import LANGUAGES, TEXTS, words
from baichuan_sft.model.modeling_baichuan import BaichuanForCausalLM

HELLO = [{"role": "user", "content": "你好"}]
GREEDY = {"do_sample": False, "max_new_tokens": 8, "repetition_penalty": 1.05}
EVIL = "![x](https://example.com/?secret) <img src=x onerror=alert(1)> \u202eabc"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base of long context, another one, and an adapter on the first that changes every logit."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(["base", "other"]):
        torch.manual_seed(seed)
        model = BaichuanForCausalLM(tiny_config("baichuan2-7b", max_position_embeddings=4096)).eval()
        model.save_pretrained(folder / name)
        load_tokenizer(SMALL_VOCABULARY).save_pretrained(folder / name)
        (folder / name / "generation_config.json").write_text(json.dumps(GREEDY))
    base = load_model(folder / "base")
    config = LoraConfig(r=4, target_modules=["W_pack"], base_model_name_or_path=str(folder / "base"))
    model = get_peft_model(base, config)
    for parameter, weight in model.named_parameters():
        if "lora_B" in parameter:
            torch.nn.init.normal_(weight, std=0.5)
    model.save_pretrained(folder / "adapter")
    settings = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(folder / "base")
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    return folder


# --- the page, without a browser ------------------------------------------------------------------------


@pytest.fixture
def page(models, monkeypatch):
    """Open the page on the given arguments, as a new session."""
    testing = pytest.importorskip("streamlit.testing.v1")

    def start(*words, **query):
        monkeypatch.setattr(sys, "argv", ["page", *map(str, words)])
        app = testing.AppTest.from_file(str(web.PAGE), default_timeout=60)
        app.query_params.update(query)
        app.run()
        assert not app.exception
        return app

    return start


def say(app, text):
    app.chat_input[0].set_value(text).run()
    assert not app.exception
    return app


def answers(app):
    return [m.markdown[0].value for m in app.chat_message if m.name == "assistant" and m.markdown]


def button(app, name):
    return next(b for b in app.button if b.label == TEXTS[name][0])


def test_an_answer_is_what_the_model_says(models, page):
    app = say(page(models / "base"), "你好")
    model, tokenizer = load_model(models / "base"), load_tokenizer(models / "base")
    first = model.chat(tokenizer, HELLO, **GREEDY)
    turns = app.session_state.conversation.turns
    assert turns[0].answers[0] == first and answers(app) == [as_markdown(first)]
    assert re.match(r"\d tokens · ", turns[0].notes[0])
    history = [*HELLO, {"role": "assistant", "content": first}, {"role": "user", "content": "再见"}]
    assert say(app, "再见").session_state.conversation.turns[1].answers[0] == model.chat(
        tokenizer, history, **GREEDY
    )


def test_system_message_retry_and_clear(models, page):
    app = page(models / "base")
    app.text_area(key="system").set_value("只说英文。").run()
    say(app, "你好")
    model, tokenizer = load_model(models / "base"), load_tokenizer(models / "base")
    expected = model.chat(tokenizer, [{"role": "system", "content": "只说英文。"}, *HELLO], **GREEDY)
    turns = app.session_state.conversation.turns
    assert turns[0].answers[0] == expected != model.chat(tokenizer, HELLO, **GREEDY)
    button(app, "retry").click().run()
    assert len(turns) == 1 and turns[0].answers[0] == expected
    button(app, "clear").click().run()
    assert app.session_state.conversation.turns == [] and not app.chat_message
    assert app.session_state.conversation.system == "只说英文。"


def test_settings_reach_the_model(models, page):
    app = page(models / "base")
    assert not app.toggle(key="sample").value and not [w for w in app.slider if w.key == "temperature"]
    app.number_input(key="max_new_tokens").set_value(5).run()
    app.toggle(key="sample").set_value(True).run()
    app.slider(key="temperature").set_value(2.0).run()
    app.number_input(key="top_k").set_value(0).run()
    said = []
    for seed in (1, 1, 2):
        app.number_input(key="seed").set_value(seed).run()
        button(app, "clear").click().run()
        said.append(say(app, "你好").session_state.conversation.turns[0].answers[0])
    assert said[0] == said[1] != said[2]
    options = dict(do_sample=True, max_new_tokens=5, temperature=2.0, top_k=0, repetition_penalty=1.05)
    torch.manual_seed(2)
    assert said[2] == load_model(models / "base").chat(load_tokenizer(models / "base"), HELLO, **options)
    assert app.number_input(key="max_new_tokens").max == 4095


def test_adapter_on_and_off(models, page):
    app = page(models / "adapter")
    app.number_input(key="max_new_tokens").set_value(8).run()
    app.toggle(key="sample").set_value(False).run()
    app.slider(key="repetition_penalty").set_value(1.05).run()
    assert list(say(app, "你好").session_state.conversation.turns[0].answers) == [0]
    app.toggle(key="compare").set_value(True).run()
    button(app, "retry").click().run()
    tokenizer = load_tokenizer(models / "base")
    expected = [load_model(models / n).chat(tokenizer, HELLO, **GREEDY) for n in ("adapter", "base")]
    found = app.session_state.conversation.turns[0].answers
    assert [found[0], found[1]] == expected and expected[0] != expected[1]
    assert app.subheader[0].value == "adapter ↔ base (no adapter)"


def test_two_models_side_by_side_each_with_its_own_history(models, page):
    app = say(say(page(models / "base", "--compare", models / "other"), "你好"), "再见")
    tokenizer = load_tokenizer(models / "base")
    for side, name in enumerate(["base", "other"]):
        model = load_model(models / name)
        turns = app.session_state.conversation.turns
        first = model.chat(tokenizer, HELLO, **GREEDY)
        history = [*HELLO, {"role": "assistant", "content": first}, {"role": "user", "content": "再见"}]
        assert [turn.answers[side] for turn in turns] == [first, model.chat(tokenizer, history, **GREEDY)]
    assert len({turns[0].answers[0], turns[0].answers[1]}) == 2


def test_languages(models, page):
    app = page(models / "base", lang="zh")
    assert app.chat_input[0].placeholder == TEXTS["ask"][1]
    app.button_group(key="language").set_value("en").run()
    assert app.chat_input[0].placeholder == TEXTS["ask"][0] and app.query_params["lang"] == "en"
    assert page(models / "base", lang="<script>").session_state.language == "en"
    assert all(set(words(name)) == set(TEXTS) for name in LANGUAGES)
    source = web.PAGE.read_text()
    unused = [name for name in TEXTS if not re.search(f"[\"']{name}[\"']", source)]
    assert unused == []
    for both in TEXTS.values():  # both take the same values
        assert len({tuple(sorted(re.findall(r"{\w+", text))) for text in both}) == 1


def test_a_reload_finds_the_conversation_and_tabs_do_not_share_it(models, page):
    app = say(page(models / "base"), "你好")
    again = page(models / "base", c=app.query_params["c"])
    assert answers(again) == answers(app)
    button(again, "clear").click().run()
    assert len(app.run().session_state.conversation.turns) == 1
    assert page(models / "base", c="unknown").session_state.conversation.turns == []


def test_only_so_many_conversations_are_kept():
    name, conversation = take(None)
    conversation.turns.append(Turn("a", {0: "b"}))
    assert take(name)[1].turns == conversation.turns
    for _ in range(MAX_KEPT):
        take(None)
    assert take(name)[1].turns == []


def test_a_tab_waits_for_the_other(models, page):
    app = page(models / "base")
    with web.LOCK:
        thread = threading.Thread(target=say, args=(app, "你好"))
        thread.start()
        thread.join(1)
        assert thread.is_alive()  # not answered while the lock is held
    thread.join(60)
    assert not thread.is_alive() and len(answers(app)) == 1


def test_a_failing_answer_is_one_line(models, page, monkeypatch):
    app = page(models / "base")

    def fail(*args):
        raise RuntimeError("CUDA out of memory\nmore")

    monkeypatch.setattr("baichuan_sft.infer.chat.states", fail)
    assert [error.value for error in say(app, "你好").error] == ["No answer: CUDA out of memory"]
    monkeypatch.undo()
    sys.argv = ["page", str(models / "base")]
    button(app, "retry").click().run()
    assert not app.error and len(answers(app)) == 1


def test_a_conversation_that_does_not_fit_says_so(models, page):
    app = say(page(models / "base"), "一" * 5000)
    assert "the model saw the last 4088 or fewer" in app.session_state.conversation.turns[0].notes[0]


# --- files ----------------------------------------------------------------------------------------------


def upload(app, content, name="a.json"):
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    app.file_uploader[0].set_value((name, content, "application/json")).run()
    assert not app.exception
    return app


def test_saved_conversations_are_training_data(tmp_path, capsys):
    turns = [Turn("你好", {0: "你好！", 1: "嗨"}), Turn("stopped at once", {}), Turn("</s>", {0: "b"})]
    turns[2].train = False
    conversation = Conversation("简短回答。", turns)
    for side, first in enumerate(["你好！", "嗨"]):
        path = tmp_path / f"{side}.json"
        path.write_text(to_belle(conversation, side), encoding="utf-8")
        assert data(["check", str(path), "--output_dir", str(tmp_path / "check")]) == 0
        loaded, count = from_belle(path.read_bytes(), "x")
        assert (count, loaded.system) == (1, "简短回答。")
        assert [(t.question, t.answers[0], t.train) for t in loaded.turns] == [
            ("你好", first, True),
            ("</s>", "b", False),
        ]
    assert to_belle(Conversation("a", [Turn("b")]), 0) == ""


def test_upload_shows_continues_and_chooses(models, page):
    records = json.loads((ROOT / "data" / "belle_chat.json").read_text(encoding="utf-8"))
    app = upload(page(models / "base"), records)
    turns = app.session_state.conversation.turns
    assert turns[0].question == records[0]["conversations"][0]["value"]
    app.number_input(key="item").set_value(5).run()
    assert turns[0].answers[0] == records[4]["conversations"][1]["value"] == answers(app)[0]
    upload(app, [{"system": "s", "conversations": records[1]["conversations"]}], "b.json")
    assert app.text_area(key="system").value == "s" and not [n for n in app.number_input if n.key == "item"]
    assert len(say(app, "再见").session_state.conversation.turns) == 2


@pytest.mark.parametrize(
    "content, message",
    [
        (b"<html>", "DATA|web page|HTML|not"),
        (b"", "empty"),
        (b"[" * 100_000, "nesting"),
        (b"\xff\xfe\x00", "UTF"),
        ([{"conversations": [{"from": "root", "value": "a"}]}], "unknown role"),
        ([{"conversations": [{"from": "human", "value": "\ud800"}]}], "surrogate"),
        ([{"text": "a"}], "without turns"),
        ([{"conversations": [{"from": "human", "value": "a" * (2 << 20)}]}], "larger than 1 MiB"),
        ([], "no|empty|holds"),
    ],
)
def test_a_bad_file_is_one_clear_line(content, message):
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    with pytest.raises(UserError, match=message) as caught:
        from_belle(content, "a.json")
    assert str(caught.value).startswith("a.json") and "\n" not in str(caught.value)
    assert "tmp" not in str(caught.value)


def test_a_bad_upload_leaves_the_conversation(models, page):
    app = upload(say(page(models / "base"), "你好"), [{"conversations": [{"from": EVIL, "value": "a"}]}])
    assert len(app.error) == 1 and app.error[0].value.startswith("Not loaded. a.json:1:")
    assert "![" not in app.error[0].value
    assert len(answers(app)) == 1


# --- what is shown --------------------------------------------------------------------------------------


def test_markdown_keeps_lines_and_loads_nothing():
    assert as_markdown("a\nb\n\n```c\nd\n```\ne") == "a  \nb  \n\n```c\nd\n```\ne"
    assert as_markdown("let x = vec![1, 2];") == "let x = vec![1, 2];"
    for image in ("![a](http://b)", "![a][b]\n\n[b]: http://c", "![b]\n\n[b]: http://c", "![![a](b)](c)"):
        assert "![" not in as_markdown(image)
    assert as_markdown("a\u202eb\x1b[0m\u2066") == "a\\u202eb\\x1b[0m\\u2066"


def test_html_stays_off():
    sources = [path.read_text() for path in web.PAGE.parent.glob("web*.py")]
    assert len(sources) == 4 and not any("unsafe_allow_html" in s or "st.html" in s for s in sources)


# --- the command ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        (["--host", "0.0.0.0"], r"--host 0.0.0.0: the page has no password.*ssh -N -L 8501:127.0.0.1:8501"),
        (["--host", "example.com", "--port", "9000"], "ssh -N -L 9000:127.0.0.1:9000"),
        (["--host", "::"], "the page has no password"),
        (["--port", "0"], "'0' is not a port from 1 to 65535"),
        (["--prot", "1"], "unknown flag --prot, did you mean '--port'"),
    ],
)
def test_wrong_options(models, options, message):
    with pytest.raises(UserError, match=message):
        web.main([str(models / "base"), *options])


def test_what_is_missing_is_said_before_anything_is_served(models, tmp_path, monkeypatch):
    import socket

    port = str(free_port())
    with pytest.raises(UserError, match="no such directory"):
        web.main([str(tmp_path / "absent"), "--port", port])
    with pytest.raises(UserError, match="no such directory"):
        web.main([str(models / "base"), "--compare", str(tmp_path / "absent"), "--port", port])
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="already in use"):
        web.main([str(models / "base"), "--port", str(taken.getsockname()[1])])
    monkeypatch.setitem(sys.modules, "streamlit", None)
    with pytest.raises(EnvironmentFault, match=r"pip install 'baichuan-sft\[web\]'"):
        web.main([str(models / "base"), "--port", port])


# --- in a browser ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(models):
    """The port of a page that compares the adapter and its base; answers are long enough to be stopped."""
    pytest.importorskip("streamlit")
    settings = {**GREEDY, "max_new_tokens": 4000}
    (models / "adapter" / "generation_config.json").write_text(json.dumps(settings))
    port = free_port()
    command = [sys.executable, "-m", "baichuan_sft.cli", "web", models / "adapter", "--port", port]
    process = subprocess.Popen(
        [str(word) for word in command],
        cwd=ROOT,
        env={**environment(), "STREAMLIT_SERVER_ADDRESS": "0.0.0.0"},  # the command's own holds
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        lines = iter(process.stdout.readline, "")
        seen = []
        for line in lines:
            seen.append(line)
            if "URL:" in line:
                break
        assert process.poll() is None, "".join(seen)
        threading.Thread(target=process.stdout.read, daemon=True).start()
        yield port
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)


@pytest.fixture
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    chromium = shutil.which("chromium") or "/usr/bin/chromium"
    if not os.path.exists(chromium):
        pytest.skip(f"needs {chromium}")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=flags)
        yield browser
        browser.close()


def opened(browser, port, locale="en-US"):
    tab = browser.new_context(locale=locale, viewport={"width": 1280, "height": 900}).new_page()
    tab.set_default_timeout(60_000)
    tab.hosts = set()
    tab.on("request", lambda request: tab.hosts.add(request.url.split("/")[2]))
    tab.goto(f"http://127.0.0.1:{port}/")
    field(tab).wait_for()
    return tab


def field(tab):
    return tab.get_by_test_id("stChatInputTextArea")


def settle(tab):
    """Wait until the page is drawn: what is typed into a field that is drawn anew is lost."""
    tab.locator("[data-test-script-state=notRunning]").wait_for()


def write(tab, text):
    settle(tab)
    field(tab).fill(text)
    field(tab).press("Enter")


def shown(tab):
    """Text of the chat messages."""
    return tab.get_by_test_id("stChatMessage").all_inner_texts()


def wait_for(tab, condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, shown(tab)
        time.sleep(0.1)


@pytest.mark.slow
def test_type_stream_stop_reload_clear(server, browser):
    tab = opened(browser, server)
    write(tab, EVIL)
    stop = tab.get_by_role("button", name="Stop")
    stop.wait_for()
    wait_for(tab, lambda: len(shown(tab)) == 2 and "▌" in shown(tab)[1])
    early = shown(tab)[1].split("▌")[0]
    wait_for(tab, lambda: len(shown(tab)[1]) > len(early) + 5)  # it grows while it is generated
    assert field(tab).is_disabled()
    stop.click()
    tab.get_by_role("button", name="Answer again").wait_for()
    question, answer = shown(tab)
    assert "stopped" in answer and "▌" not in answer and len(answer) > len(early)
    time.sleep(0.5)
    assert shown(tab) == [question, answer]  # and no longer grows
    assert "![x](https://example.com/?secret) <img src=x onerror=alert(1)> \\u202eabc" in question

    tab.reload()
    field(tab).wait_for()
    wait_for(tab, lambda: shown(tab) == [question, answer])
    tab.get_by_role("button", name="New conversation").click()
    wait_for(tab, lambda: shown(tab) == [])
    assert tab.hosts == {f"127.0.0.1:{server}"}  # nothing is fetched from elsewhere


@pytest.mark.slow
def test_compare_languages_and_a_file(server, browser, tmp_path):
    tab = opened(browser, server, "zh-CN")
    assert field(tab).get_attribute("placeholder") == TEXTS["ask"][1]
    tab.get_by_text("与 base").click()
    tab.get_by_role("heading", name="adapter ↔ base").wait_for()
    settle(tab)
    limit = tab.get_by_label(TEXTS["max_new_tokens"][1])
    limit.fill("6")
    limit.press("Enter")
    write(tab, "你好")
    wait_for(tab, lambda: len(re.findall(r"6 个词元", "".join(shown(tab)))) == 2)
    assert len(shown(tab)) == 3
    tab.get_by_text(TEXTS["file"][1], exact=True).click()
    path = tmp_path / "said.json"
    with tab.expect_download() as download:
        tab.get_by_text("保存 base").click()
    download.value.save_as(path)
    assert data(["check", str(path), "--output_dir", str(tmp_path / "check")]) == 0
    (said,) = json.loads(path.read_text(encoding="utf-8"))
    assert said["conversations"][0] == {"from": "human", "value": "你好"}

    said["conversations"][1]["value"] = EVIL
    path.write_text(json.dumps([said]), encoding="utf-8")
    tab.locator("input[type=file]").set_input_files(path)
    wait_for(tab, lambda: "onerror=alert(1)" in "".join(shown(tab)))
    assert tab.get_by_test_id("stChatMessage").locator("img").count() == 0
    tab.get_by_text("English", exact=True).click()
    wait_for(tab, lambda: field(tab).get_attribute("placeholder") == TEXTS["ask"][0])
    assert tab.hosts == {f"127.0.0.1:{server}"}


@pytest.mark.slow
def test_a_closed_tab_leaves_the_model_to_the_next(server, browser):
    tab = opened(browser, server)
    write(tab, "你好")
    wait_for(tab, lambda: "▌" in "".join(shown(tab)))
    tab.context.close()
    other = opened(browser, server)
    write(other, "再见")
    # 4,000 tokens of the first take 13 s, at 300 a second
    wait_for(other, lambda: "▌" in "".join(shown(other)), 8)


@pytest.mark.slow
def test_other_sites_are_refused(server):
    def handshake(**headers):
        connection = http.client.HTTPConnection("127.0.0.1", server, timeout=10)
        upgrade = {
            "Upgrade": "websocket",
            "Connection": "Upgrade",
            "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
            "Sec-WebSocket-Version": "13",
        }
        connection.request("GET", "/_stcore/stream", headers={**upgrade, **headers})
        return connection.getresponse().status

    own = f"127.0.0.1:{server}"
    assert handshake(Host=own, Origin=f"http://{own}") == 101
    assert handshake(Host=own, Origin="https://example.com") == 403
    assert handshake(Host=f"example.com:{server}", Origin=f"http://example.com:{server}") == 403


def test_screenshots_are_small():
    for name in ("web_zh.png", "web_compare.png"):
        assert 10_000 < Path(ROOT, "docs", "images", name).stat().st_size < 150_000
