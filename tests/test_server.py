"""``baichuan-sft serve``: OpenAI's client against it, and every kind of bad request, E1 to E17."""

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import openai
import pytest
import torch
from fixtures import HOSTILE, ROOT
from launching import environment
from serving import QUESTION, engine_of, make_models, raw, serving, wait_for
from transformers import set_seed

from baichuan_sft.errors import CheckpointFault, EnvironmentFault, UserError
from baichuan_sft.infer import server_gate
from baichuan_sft.infer.server import KEY_VARIABLE, main, read_token
from baichuan_sft.infer.server_jobs import Job, Penalties, Token, prepared
from baichuan_sft.infer.server_text import AnswerText
from baichuan_sft.infer.server_types import Refusal
from baichuan_sft.infer.server_wire import Offsets, text_logprobs

CONTEXT = 1024
TOKEN = "canary-0123456789abcdef"
LONG = 1  # a seed whose answer at temperature 2 has no end within 1,000 tokens
HTTP = httpx.Client(verify=False, trust_env=False, timeout=60)
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("served"), max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def engine(folder):
    return engine_of(folder)


@pytest.fixture(scope="module")
def address(engine):
    with serving(engine) as address:
        yield address


@pytest.fixture(scope="module")
def url(address):
    return f"http://{address[0]}:{address[1]}"


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def chatted(folder, name, messages=QUESTION, seed=0, **options):
    """What ``model.chat`` answers, on a model of its own."""
    from baichuan_sft.checkpoint import load_model, load_tokenizer

    model = load_model(folder / name)
    set_seed(seed)
    return model.chat(load_tokenizer(folder / "base"), messages, **options)


def ask(client, model="base", messages=QUESTION, **options):
    return client.chat.completions.create(model=model, messages=messages, **options)


def joined(stream):
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


# --- answers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["base", "poems", "law"])
def test_the_same_prompt_gives_the_same_bytes(folder, client, name):
    want = chatted(folder, name, max_new_tokens=24)
    assert ask(client, name, max_tokens=24).choices[0].message.content == want
    assert joined(ask(client, name, max_tokens=24, stream=True)) == want
    want = chatted(folder, name, seed=11, max_new_tokens=24, do_sample=True, temperature=1.5)
    sampled = {"max_completion_tokens": 24, "temperature": 1.5, "seed": 11}
    assert ask(client, name, **sampled).choices[0].message.content == want
    assert joined(ask(client, name, **sampled, stream=True)) == want


def test_adapters_differ_and_each_keeps_its_own_settings(client):
    answers = {name: ask(client, name) for name in ("base", "poems", "law")}
    texts = {answer.choices[0].message.content for answer in answers.values()}
    assert len(texts) == 3
    # The adapters' generation_config.json says 12, the base's nothing.
    assert answers["poems"].usage.completion_tokens == 12 < answers["base"].usage.completion_tokens
    assert [model.id for model in client.models.list()] == ["base", "poems", "law"]


def test_completions_continue_a_text(folder, client, engine):
    prompts = ["床前明月光", "a b c"]
    answer = client.completions.create(model="base", prompt=prompts, n=2, max_tokens=8, seed=3, logprobs=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([engine.tokenizer.encode_text(prompt)])
        out = engine_generate(folder, ids, max_new_tokens=8, do_sample=False)
        want = engine.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert answer.choices[2 * i].text == answer.choices[2 * i + 1].text == want
    assert answer.usage.prompt_tokens == sum(map(len, engine.tokenizer.encode_texts(prompts)))
    logprobs = answer.choices[0].logprobs
    assert len(logprobs.tokens) == 8 and all(len(top) <= 2 for top in logprobs.top_logprobs)
    stream = client.completions.create(model="base", prompt=prompts[0], max_tokens=8, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == answer.choices[0].text


def engine_generate(folder, ids, **options):
    from baichuan_sft.checkpoint import load_model

    return load_model(folder / "base").generate(ids, attention_mask=torch.ones_like(ids), **options)


def test_a_seed_repeats_and_choices_differ(client):
    options = {"temperature": 2.0, "max_tokens": 12, "n": 8}
    first, again, other = (ask(client, seed=seed, **options) for seed in (5, 5, 6))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) == 8
    assert texts != [choice.message.content for choice in other.choices]
    assert first.usage.completion_tokens == 8 * 12
    alone = ask(client, seed=5 + 3, temperature=2.0, max_tokens=12)
    assert alone.choices[0].message.content == texts[3]


def test_stop_ends_an_answer_before_it_and_is_never_shown(client):
    whole = ask(client, max_tokens=24).choices[0].message.content
    for stop in (whole[8:11], whole[4:9]):
        want = whole[: whole.index(stop)]
        answer = ask(client, max_tokens=24, stop=[stop, "never seen"])
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (want, "stop")
        assert answer.usage.completion_tokens < 24
        assert joined(ask(client, max_tokens=24, stop=stop, stream=True)) == want
    assert ask(client, max_tokens=24).choices[0].finish_reason == "length"


def test_logprobs_are_those_of_the_model(folder, engine, client):
    answer = ask(client, max_tokens=4, logprobs=True, top_logprobs=3, temperature=0)
    content = answer.choices[0].logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in content).decode() == answer.choices[0].message.content
    for entry in content:  # greedy: the first of the rivals
        assert entry.logprob == entry.top_logprobs[0].logprob and len(entry.top_logprobs) == 3
    prompt = engine.tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)["input_ids"]
    from baichuan_sft.checkpoint import load_model

    with torch.no_grad():
        logits = load_model(folder / "base")(torch.tensor([prompt])).logits[0, -1]
    want = logits.log_softmax(-1).max().item()
    assert content[0].logprob == pytest.approx(want, abs=1e-5)  # fp32, another order of sums
    chunks = [c for c in ask(client, max_tokens=4, logprobs=True, stream=True) if c.choices[0].logprobs]
    assert [c.choices[0].logprobs.content[0].token for c in chunks] == [entry.token for entry in content]


def test_bytes_of_half_a_character_are_told_apart(engine, client):
    smile = "😀".encode()
    rivals = ((b"\xf0", -0.1), (b"\x9f", -5.0), (b"a", -6.0))
    tokens = [*(Token(bytes([byte]), -1.0, rivals) for byte in smile), Token(b"x", -1.0, ())] * 2
    shown = text_logprobs(tokens, Offsets())
    assert shown["top_logprobs"][0] == {r"bytes:\xf0": -0.1, r"bytes:\x9f": -5.0, "a": -6.0}
    assert shown["tokens"][:5] == [r"bytes:\xf0", r"bytes:\x9f", r"bytes:\x98", r"bytes:\x80", "x"]
    assert shown["text_offset"] == [0, 0, 0, 0, 1, 2, 2, 2, 2, 3]
    options = {"model": "base", "prompt": "😀", "max_tokens": 24, "logprobs": 1, "temperature": 2, "seed": 1}
    whole = client.completions.create(**options).choices[0].logprobs.text_offset
    chunks = [chunk.choices[0].logprobs for chunk in client.completions.create(**options, stream=True)]
    assert [at for one in chunks for at in one.text_offset] == whole


def test_a_stream_ends_with_its_usage(client):
    chunks = list(ask(client, max_tokens=6, stream=True, stream_options={"include_usage": True}, n=2))
    usage = ask(client, max_tokens=6, n=2).usage
    assert chunks[-1].usage == usage and chunks[-1].choices == [] and usage.completion_tokens == 12
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert [c.choices[0].finish_reason for c in chunks[:-1]].count("length") == 2


def test_penalties_count_what_was_answered(client):
    ids = torch.tensor([[4, 4, 1, 2, 1, 1]])  # of which two are the prompt's
    scores = Penalties(2, frequency=0.5, presence=0.25)(ids, torch.zeros(1, 5))
    assert scores.tolist() == [[0, -1.75, -0.75, 0, 0]]
    plain = ask(client, max_tokens=24).choices[0].message.content
    for options in ({"frequency_penalty": -2.0}, {"presence_penalty": -2.0}):  # repeats itself
        assert ask(client, max_tokens=24, **options).choices[0].message.content != plain
    penalised = ask(client, max_tokens=24, seed=1, extra_body={"repetition_penalty": 0.5, "top_k": 3})
    assert penalised.choices[0].message.content != plain


def test_system_and_parts_reach_the_prompt(folder, client):
    system = [{"role": "system", "content": "Answer briefly."}, *QUESTION]
    want = chatted(folder, "base", system, max_new_tokens=12)
    assert ask(client, messages=system, max_tokens=12).choices[0].message.content == want
    parts = [{"type": "text", "text": text} for text in ("你好, ", "tell me more")]
    split = ask(client, messages=[{"role": "user", "content": parts}], max_tokens=12)
    assert split.choices[0].message.content == ask(client, max_tokens=12).choices[0].message.content


def test_text_grows_to_what_the_tokenizer_makes_of_all_ids(small):
    """Random ids, bytes of broken characters among them: the worst that a model can say."""
    from baichuan_sft.model.chat_baichuan import answer_text

    torch.manual_seed(0)
    for _ in range(100):
        ids = torch.randint(0, small.vocab_size, (40,)).tolist()
        ids[10:20] = torch.randint(3, 300, (10,)).tolist()
        text = AnswerText(small)
        grown = "".join(text.add(i, last=n == len(ids) - 1)[0] for n, i in enumerate(ids))
        assert grown == answer_text(small, ids)


# --- continuous batching ----------------------------------------------------------------------------


def ticked(engine, prompts, joins, model="base", **changes):
    """Texts of prompts that join at given ticks, and the most rows that one step had; no thread."""
    texts, most = [""] * len(prompts), 0

    def job(i):
        def deliver(piece):
            texts[i] += piece.text

        ids = engine.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompts[i]}], add_generation_prompt=True
        )["input_ids"]
        config = prepared(
            engine.model, engine.settings[model], max_new_tokens=16 + i, eos_token_id=[2, 195], **changes
        )
        return Job(model, ids, config, deliver)

    with torch.inference_mode():
        for tick in range(60):
            engine.submit([job(i) for i, when in enumerate(joins) if when == tick])
            engine._admit()
            most = max(most, engine.num_running)
            engine._step(model)
    assert engine.num_running == 0 and engine.num_waiting == 0
    return texts, most


@pytest.mark.parametrize("arch", ["baichuan2-7b", "baichuan-13b"])
@pytest.mark.parametrize("changes", [{"do_sample": False}, {"do_sample": False, "repetition_penalty": 1.1}])
def test_a_batch_that_others_join_gives_the_text_of_each_alone(tmp_path, arch, changes):
    from test_chat_command import SMALL_VOCABULARY

    from baichuan_sft.checkpoint import load_tokenizer
    from baichuan_sft.infer.server_engine import Engine

    model = model_of(arch)
    engine = Engine(
        model, load_tokenizer(SMALL_VOCABULARY), {"base": None}, {"base": model.generation_config}
    )
    prompts = ["你好", "a much longer question " * 3, "x", "床前明月光，疑是地上霜"]
    texts, most = ticked(engine, prompts, [0, 2, 2, 9], **changes)
    for i, prompt in enumerate(prompts):
        messages = [{"role": "user", "content": prompt}]
        assert texts[i] == model.chat(engine.tokenizer, messages, max_new_tokens=16 + i, **changes)
    assert most >= 3


def model_of(arch):
    from fixtures import tiny_config

    from baichuan_sft.model.modeling_baichuan import BaichuanForCausalLM

    torch.manual_seed(4)
    return BaichuanForCausalLM(tiny_config(arch)).requires_grad_(False).eval()


def test_requests_of_all_names_at_once_give_what_each_gives_alone(client):
    wanted = {
        (name, i): ask(client, name, [{"role": "user", "content": "x" * i}], max_tokens=20).choices[0]
        for name in ("base", "poems", "law")
        for i in (1, 30, 7)
    }
    found = {}

    def one(key):
        found[key] = ask(client, key[0], [{"role": "user", "content": "x" * key[1]}], max_tokens=20).choices[
            0
        ]

    threads = [threading.Thread(target=one, args=(key,)) for key in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {k: c.message.content for k, c in found.items()} == {
        k: c.message.content for k, c in wanted.items()
    }


def test_a_cancelled_row_leaves_before_the_next_token(folder):
    engine, seen = engine_of(folder), []
    config = prepared(engine.model, engine.settings["base"], max_new_tokens=50, eos_token_id=[2])
    job = Job("base", [195, 300, 196], config, seen.append, n=2)
    with torch.inference_mode():
        engine.submit([job])
        engine._admit()
        engine._step("base")
        job.cancelled = True
        engine._step("base")
    assert len(seen) == 4 and engine.num_running == 0 and engine.batches["base"].cache is None


def test_a_failing_step_fails_its_own_requests_only(engine, client, monkeypatch, capfd):
    def broken(*args, **kwargs):
        raise RuntimeError("CUDA out of memory, says this test")

    with monkeypatch.context() as patch:
        patch.setattr(type(engine), "_take_tokens", broken)
        with pytest.raises(openai.InternalServerError, match="log says why") as error:
            ask(client, max_tokens=4)
        assert error.value.body["type"] == "server_error"
        events = HTTP.post(f"{client.base_url}chat/completions", json=body(stream=True)).text
        assert "generation_failed" in events and "[DONE]" not in events
    assert ask(client, max_tokens=4).usage.completion_tokens == 4


@pytest.mark.parametrize("harm", [lambda ids, scores: scores * float("nan"), lambda ids, scores: 1 / 0])
@pytest.mark.parametrize("do_sample", [False, True])
def test_a_row_without_a_next_token_fails_alone(folder, harm, do_sample):
    engine, seen = engine_of(folder), {0: [], 1: []}
    config = prepared(
        engine.model, engine.settings["base"], max_new_tokens=9, eos_token_id=[2], do_sample=do_sample
    )
    with torch.inference_mode():
        for i in seen:
            engine.submit([Job("base", [195, 300, 196], config, seen[i].append, n=2)])
            engine._admit()
        engine.batches["base"].rows[0].processors = harm
        for _ in range(10):
            engine._guarded(engine._step, "base")
    assert [type(piece) for piece in seen[0]].count(Refusal) == 1 and isinstance(seen[0][-1], Refusal)
    assert [piece.finish for piece in seen[1]].count("length") == 2 and len(seen[1]) == 2 * 9
    assert engine.counts["failed"] == 1 and engine.counts["cancelled"] == 0 and engine.num_running == 0


# --- what is refused: E1 to E11 ---------------------------------------------------------------------


def body(**changes):
    return {"model": "base", "messages": QUESTION, "max_tokens": 2, **changes}


def post(url, content, *, path=CHAT, **headers):
    content = content if isinstance(content, bytes | str) else json.dumps(content)
    headers = {"content-type": "application/json", **headers}
    return HTTP.post(url + path, content=content, headers=headers)


def refused(answer, status, param=None, code=None):
    """The answer is OpenAI's error object with this status; returns its message."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["message"]
    assert param is None or error["param"] == param, error
    assert code is None or error["code"] == code, error
    return error["message"]


@pytest.mark.parametrize("content", [b"", b"{", b"hello", b'{"model": "\xe9"}', b'{"a": NaN}', b'"\\ud800"'])
def test_e1_no_json(url, content):
    refused(post(url, content), 400, code="invalid_json")


@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/json; charset=latin-1", "application/x-ndjson"]
)
def test_e2_another_content_type(url, kind):
    headers = {} if kind is None else {"content-type": kind}
    refused(HTTP.post(url + CHAT, content=json.dumps(body()), headers=headers), 415)
    assert post(url, body(), **{"content-type": "application/json; charset=UTF-8"}).status_code == 200
    refused(post(url, body(), **{"content-encoding": "gzip"}), 415)


@pytest.mark.parametrize("content", [None, [], "text", 3])
def test_e3_no_object(url, content):
    assert "NoneType" not in refused(post(url, json.dumps(content)), 400)


@pytest.mark.parametrize("messages", [[], None, "hello", {}])
def test_e4_no_messages(url, messages):
    refused(post(url, body(messages=messages)), 400, "messages")
    refused(post(url, {"model": "base"}), 400, "messages")


@pytest.mark.parametrize(
    "content, param",
    [
        (None, "messages[0].content"),
        (5, "messages[0].content"),
        (["text"], "messages[0].content[0]"),
        ([{"type": "text"}], "messages[0].content[0].text"),
        ([{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/"}}], "messages[0].content[0].type"),
    ],
)
def test_e5_content_that_is_no_text(url, content, param):
    refused(post(url, body(messages=[{"role": "user", "content": content}])), 400, param)


def test_e5_an_image_is_never_fetched(url):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.3)
        image = {
            "type": "image_url",
            "image_url": {"url": f"http://127.0.0.1:{listener.getsockname()[1]}/x.png"},
        }
        refused(post(url, body(messages=[{"role": "user", "content": [image]}])), 400)
        with pytest.raises(TimeoutError):
            listener.accept()


TURN = {role: {"role": role, "content": "x"} for role in ("user", "assistant", "system", "root")}


@pytest.mark.parametrize(
    "messages, param",
    [
        ([TURN["root"]], "messages[0].role"),
        ([TURN["user"], TURN["assistant"], {"content": "x"}], "messages[2].role"),
        ([TURN["user"], TURN["assistant"]], "messages[1].role"),
        ([TURN["user"], TURN["assistant"], TURN["system"], TURN["user"]], "messages[2].role"),
        ([TURN["system"]], "messages[0].role"),
    ],
)
def test_e6_roles(url, messages, param):
    refused(post(url, body(messages=messages)), 400, param)


@pytest.mark.parametrize(
    "name, good, bad",
    [
        ("temperature", [0, 1e-38, 2, 2.0, None], [-0.001, 2.001, "hot", True, [1]]),
        ("top_p", [0.001, 1], [0, 1.001, 7, "1"]),
        ("top_k", [0, 1_000_000], [-1, 1_000_001, 1.5]),
        ("repetition_penalty", [0.1, 10], [0.09, 10.01]),
        ("frequency_penalty", [-2, 2], [-2.001, 2.001]),
        ("presence_penalty", [-2, 2], [-2.001, 2.001]),
        ("max_tokens", [1, 900], [0, -1, CONTEXT, 10**9, 10**30, 2.5, "3"]),
        ("n", [1, 8], [0, 9, 10**9, True]),
        ("seed", [-(2**63), 2**63 - 1], [-(2**63) - 1, 2**63, 1.5]),
        ("stop", ["x", ["x"] * 4, [], "x" * 256], ["", ["x"] * 5, "x" * 257, [""], 5]),
        ("top_logprobs", [0, 20], [-1, 21]),
        ("user", ["x" * 256], ["x" * 257, 5]),
        ("stream", [False, None], ["false", 0, 1, "true"]),  # E8
        ("logprobs", [True], ["yes", 1]),
        ("response_format", [{"type": "text"}], [{"type": "json_object"}]),
        ("tools", [], [[], None]),
        ("unknown", [], [1]),
    ],
)
def test_e7_e8_values_at_their_limits(url, name, good, bad):
    extra = {"logprobs": True} if name == "top_logprobs" else {}
    extra |= {} if name == "max_tokens" else {"max_tokens": 1}
    for value in good:
        changes = {**extra, name: value, **({"stop": "e"} if name == "max_tokens" else {})}
        assert post(url, body(**changes)).status_code == 200, (name, value)
    for value in bad:
        answer = post(url, body(**{**extra, name: value}))
        refused(answer, 400)
        assert answer.json()["error"]["param"].startswith(name), (name, value)


def test_e7_fields_that_contradict_each_other(url):
    refused(post(url, body(max_completion_tokens=3)), 400, "max_completion_tokens")
    refused(post(url, body(top_logprobs=3)), 400, "top_logprobs")
    refused(post(url, body(stream_options={"include_usage": True})), 400, "stream_options")
    refused(post(url, body(model="gpt-4")), 404, "model", "model_not_found")
    prompts = {"model": "base", "max_tokens": 1, "prompt": ["x"] * 4}
    assert post(url, {**prompts, "n": 2}, path="/v1/completions").status_code == 200
    refused(post(url, {**prompts, "n": 3}, path="/v1/completions"), 400, "n")
    refused(post(url, {**prompts, "prompt": ""}, path="/v1/completions"), 400, "prompt")
    refused(post(url, {**prompts, "prompt": [195, 196]}, path="/v1/completions"), 400)
    refused(HTTP.get(url + CHAT), 405)
    refused(HTTP.get(url + "/v2"), 404)


def test_e9_nesting(url):
    def nested(depth):
        return b'{"model": ' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"

    limit = server_gate.MAX_NESTING
    refused(post(url, nested(limit)), 400, code="invalid_value")
    for depth in (limit + 1, 2000, 100_000):
        refused(post(url, nested(depth)), 400, code="nesting")


def test_e9_number_of_values(url):
    limit = server_gate.MAX_VALUES  # "messages" is one
    assert len(refused(post(url, {"messages": [0] * (limit - 1)}), 400, code="invalid_value")) < 200
    for number in (limit, 300_000):
        refused(post(url, {"messages": [0] * number}), 400, code="too_many_values")
    refused(post(url, {str(i): 0 for i in range(limit + 1)}), 400, code="too_many_values")


def test_e10_size_in_bytes_and_in_tokens(url, engine):
    limit = 2**20
    text = json.dumps(body())
    filled = text + " " * (limit - len(text))
    assert post(url, filled).status_code == 200
    refused(post(url, filled + " "), 413)
    refused(post(url, json.dumps(body(messages=[{"role": "user", "content": "x" * 16 * 2**20}]))), 413)
    tokens = len(engine.tokenizer.encode_text("月光" * 100)) // 100
    room = CONTEXT - 2 - 2  # two control ids, and the answer's
    assert tokens == 1 or room % tokens == 0
    fits = {"role": "user", "content": "月光" * (room // tokens)}
    answer = post(url, body(messages=[fits], stop="e"))
    assert answer.json()["usage"]["prompt_tokens"] == CONTEXT - 2
    refused(post(url, body(messages=[fits], max_tokens=3)), 400, "max_tokens", "context_length_exceeded")
    longer = {"role": "user", "content": "月光" * (room // tokens + 2)}
    refused(post(url, body(messages=[longer], max_tokens=1)), 400, "messages", "context_length_exceeded")


def head(*lines, path=CHAT, method="POST"):
    first = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json"]
    return "\r\n".join([*first, *lines, "", ""]).encode("latin-1")


def status(answer):
    assert answer.startswith(b"HTTP/1.1 "), answer
    _, _, content = answer.partition(b"\r\n\r\n")
    assert json.loads(content)["error"].keys() == {"message", "type", "param", "code"}
    return int(answer[9:12])


def test_e11_lengths_that_are_none(address):
    assert status(raw(address, head("Content-Length: -1"))) == 400
    assert status(raw(address, head(f"Content-Length: {10**30}", "Connection: close"))) in (400, 413)
    assert status(raw(address, head("Content-Length: 2000000") + b"x" * 2_000_000)) == 413
    assert status(raw(address, b"\x16\x03\x01 no HTTP at all\r\n\r\n")) == 400


def test_e11_an_endless_body(address, monkeypatch):
    monkeypatch.setattr(server_gate, "MAX_DISCARDED", 2**22)
    chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
    endless = (chunk for _ in range(10_000))  # 640 MiB, of which the server takes five
    answer = raw(address, head("Transfer-Encoding: chunked"), more=endless)
    assert not answer or status(answer) == 413  # bytes on their way may cost the answer, never the server
    assert sum(1 for _ in endless) > 5000


def test_e11_large_headers(url, address):
    def with_header(size):
        return HTTP.get(url + "/health", headers={"x": "a" * size})

    request = httpx.Request("GET", url + "/health", headers=HTTP.headers)
    used = (
        sum(len(name) + len(value) + 4 for name, value in request.headers.raw) + len("x") + 4 + len("/health")
    )
    spare = server_gate.MAX_HEADER_BYTES - used
    assert with_header(spare).status_code == 200
    refused(with_header(spare + 1), 431)
    assert status(raw(address, head("X: " + "a" * 2**20))) == 431


def test_e11_slow_heads_and_bodies(address, monkeypatch):
    monkeypatch.setattr(server_gate, "READ_SECONDS", 1.0)
    assert raw(address, b"") == b""  # the server closes what says nothing
    assert raw(address, b"POST / HTTP/1.1\r\nHost: 127") == b""
    assert status(raw(address, head("Content-Length: 10") + b"{")) == 408
    for method in ("GET", "PUT", "DELETE"):
        assert status(raw(address, head("Content-Length: 10", path="/health", method=method) + b"{")) == 408


# --- who may ask, and how many: E12 to E17 ----------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_e12_a_client_that_goes_ends_its_answer(engine, url, monkeypatch, stream):
    step = type(engine)._step

    def slow(self, name):
        time.sleep(0.02)
        step(self, name)

    monkeypatch.setattr(type(engine), "_step", slow)
    before, cancelled = engine.counts["generated_tokens"], engine.counts["cancelled"]
    wanted = body(max_tokens=1000, stream=stream, temperature=2, seed=LONG)  # 60 s, were it to run on
    host, port = url[7:].split(":")
    content = json.dumps(wanted).encode()
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head(f"Content-Length: {len(content)}") + content)
        wait_for(lambda: engine.counts["generated_tokens"] > before + 3)
    wait_for(lambda: engine.num_running == 0)
    assert engine.counts["cancelled"] == cancelled + 1
    assert engine.counts["generated_tokens"] < before + 1000


def test_e13_a_full_queue_says_so(folder):
    engine = engine_of(folder, "--max_batch", "2", "--max_queue", "10")
    engine.start = lambda: None  # nothing leaves the queue
    with serving(engine) as (host, port):
        url, answers = f"http://{host}:{port}", []
        threads = [
            threading.Thread(target=lambda: answers.append(post(url, body())), daemon=True)
            for _ in range(100)
        ]
        for thread in threads:
            thread.start()
        wait_for(lambda: len(answers) == 90)
        assert engine.num_waiting == 10
        for answer in answers:
            refused(answer, 429, code="queue_full")
            assert answer.headers["retry-after"].isdigit()
        del engine.start
        engine.start()
        for thread in threads:
            thread.join()
        assert sorted(answer.status_code for answer in answers) == [200] * 10 + [429] * 90
        refused(post(url, body(n=3)), 400, "n")


def test_e13_the_queue_takes_all_jobs_of_a_request_or_none(folder):
    engine = engine_of(folder, "--max_queue", "3")
    job = Job("base", [1], None, print)
    engine.submit([job, job])
    with pytest.raises(Refusal, match="3 prompts wait"):
        engine.submit([job, job])
    assert engine.num_waiting == 2
    job.cancelled = True  # its client has gone, and keeps no place
    engine.submit([Job("base", [1], None, print)] * 3)
    assert engine.num_waiting == 3


def test_a_server_that_ends_says_so_to_all_who_wait(folder, monkeypatch, capfd):
    engine, answers = engine_of(folder), []
    step = type(engine)._step
    monkeypatch.setattr(type(engine), "_step", lambda self, name: (time.sleep(0.02), step(self, name)))

    def one(url, stream):
        wanted = body(max_tokens=900, stream=stream, temperature=2, seed=LONG)  # 18 s, were it to end
        answers.append(post(url, wanted))

    with serving(engine) as (host, port):
        threads = [
            threading.Thread(target=one, args=(f"http://{host}:{port}", i % 2 == 1)) for i in range(20)
        ]
        for thread in threads:
            thread.start()
        wait_for(
            lambda: (engine.num_running, engine.num_waiting) == (engine.max_batch, 20 - engine.max_batch)
        )
    for thread in threads:
        thread.join()
    assert sorted(answer.status_code for answer in answers) == [200] * 10 + [503] * 10
    for answer in answers:
        last = answer.text.strip().rpartition("data: ")[2]
        assert json.loads(last)["error"]["code"] == "shutting_down", answer.text
    assert "Traceback" not in (log := "".join(capfd.readouterr())), log
    with pytest.raises(Refusal) as refusal:
        engine.submit([])
    assert refusal.value.status == 503


def test_e14_a_token_is_asked_for(folder):
    with serving(engine_of(folder), token=TOKEN) as (host, port):
        url = f"http://{host}:{port}"
        for given in (
            None,
            "Bearer",
            f"Bearer {TOKEN}x",
            f"Bearer {TOKEN[:-1]}",
            f"Basic {TOKEN}",
            "Bearer é",
        ):
            headers = {} if given is None else {"authorization": given.encode()}
            for answer in (post(url, body(), **headers), HTTP.get(url + "/v1/models", headers=headers)):
                assert TOKEN not in refused(answer, 401, code="invalid_api_key")
                assert answer.headers["www-authenticate"] == "Bearer"
        refused(HTTP.get(url + "/metrics"), 401)
        refused(HTTP.get(url + "/nowhere"), 401)
        assert HTTP.get(url + "/health").status_code == 200
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=TOKEN)
        assert ask(client, max_tokens=2).usage.completion_tokens == 2
        refused(post(url, "x" * 2**21), 401)  # before anything is read


def test_e14_other_machines_only_with_a_token(folder, monkeypatch, tmp_path):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        with pytest.raises(UserError, match=f"--host {host} lets other machines in"):
            main([str(folder / "base"), "--host", host])
    file = tmp_path / "key"
    for short in ("short", "", "with space 0123456789", "é" * 20):
        file.write_text(short)
        with pytest.raises(UserError) as error:
            read_token(str(file))
        assert not short or short not in str(error.value)
    file.write_text(TOKEN + "\n")
    monkeypatch.setenv(KEY_VARIABLE, "another-0123456789")
    assert read_token(str(file)) == TOKEN and read_token(None) == "another-0123456789"
    with pytest.raises(UserError, match="No such file"):
        read_token(str(tmp_path / "absent"))


def test_e15_control_token_text_stays_text(client, engine):
    ids = engine.tokenizer.encode_text(HOSTILE)
    assert not engine.tokenizer.control_ids & set(ids)
    answer = ask(client, messages=[{"role": "user", "content": HOSTILE}], max_tokens=1)
    assert answer.usage.prompt_tokens == len(ids) + 2
    answer = client.completions.create(model="base", prompt=HOSTILE, max_tokens=1)
    assert answer.usage.prompt_tokens == len(ids)


def test_e17_names_and_pages(engine, folder):
    with serving(engine_of(folder), origins=frozenset({"https://good.example"})) as (host, port):
        url = f"http://{host}:{port}"
        for name in (
            "evil.example",
            "127.0.0.1.evil.example",
            "localhost.evil.example",
            f"evil.example:{port}",
            "",
        ):
            refused(HTTP.get(url + "/v1/models", headers={"host": name}), 403, code="host_not_allowed")
        for name in ("LOCALHOST", f"localhost:{port}", "127.0.0.1"):
            assert HTTP.get(url + "/v1/models", headers={"host": name}).status_code == 200
        for origin in ("https://evil.example", "null", url, "https://good.example.evil.example"):
            refused(post(url, body(), origin=origin), 403, code="origin_not_allowed")
        answer = post(url, body(), origin="https://good.example")
        assert answer.headers["access-control-allow-origin"] == "https://good.example"
        asked = {"method": "POST", "headers": "authorization,content-type,x-stainless-lang"}
        preflight = {f"access-control-request-{name}": value for name, value in asked.items()}
        for origin, want in (("https://good.example", 200), ("https://evil.example", 400)):
            answer = HTTP.options(url + CHAT, headers={"origin": origin, **preflight})
            assert answer.status_code == want, answer.text


def test_numeric_hosts_are_fine_where_every_address_is_listened_on():
    limits = server_gate.Limits(frozenset({"localhost", "*"}))
    for name in ("192.0.2.7:8000", "[2001:db8::1]:8000", "localhost"):
        assert server_gate._allowed(name, limits.hosts)
    assert not server_gate._allowed("evil.example", limits.hosts)
    assert not server_gate._allowed("192.0.2.7", frozenset({"localhost"}))


def test_metrics_are_prometheus_text(url, client):
    ask(client, max_tokens=2)
    text = HTTP.get(url + "/metrics").text
    line = re.compile(r'(# TYPE [a-z_]+ (counter|gauge))|([a-z_]+(\{code="\d+"\})? \d+)')
    assert all(line.fullmatch(row) for row in text.splitlines()), text
    assert "baichuan_sft_waiting 0" in text and 'requests_total{code="200"}' in text


# --- the command ------------------------------------------------------------------------------------


def test_the_command_refuses_what_it_cannot_serve(folder, tmp_path):
    from peft import PromptTuningConfig, get_peft_model

    from baichuan_sft.checkpoint import load_model
    from baichuan_sft.infer.server_model import put_adapter

    base = str(folder / "base")
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(EnvironmentFault, match="in use"):
        main([base, "--port", str(taken.getsockname()[1])])
    for words, text in (
        (["--adapter", "poems"], "expected NAME=DIR"),
        (["--adapter", f"base={folder / 'poems'}"], "already taken"),
        (["--adapter", f"x={base}"], "no adapter_config.json"),
        (["--port", "70000"], "a port from 0 to 65535"),
        (["--max_queue", "7"], "--max_queue 8 or more"),
    ):
        with pytest.raises(UserError, match=text):
            main([base, "--port", "0", *words])
    with pytest.raises(UserError, match="both named base; pass --name for the adapter"):
        main([str(folder / "poems"), "--port", "0", "--name", "base"])
    other = make_models(tmp_path)
    with pytest.raises(UserError, match="belongs on"):
        main([base, "--port", "0", "--adapter", f"x={other / 'poems'}"])
    prompted = get_peft_model(
        load_model(other / "base"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    )
    prompted.save_pretrained(other / "prompted")
    with pytest.raises(UserError, match="PROMPT_TUNING adapter adds a prompt"):
        put_adapter(load_model(other / "base"), str(other / "prompted"), "adapter0", None)
    (other / "law" / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointFault):
        engine_of(other)


@pytest.mark.slow
def test_a_real_process_serves_and_ends(folder, tmp_path):
    key = tmp_path / "key"
    key.write_text(TOKEN)
    command = [sys.executable, "-m", "baichuan_sft.cli", "serve", str(folder / "poems"), "--port", "0"]
    command += ["--api_key_file", str(key)]
    with open(tmp_path / "log", "w+") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=log, stderr=log)
        try:
            seen = lambda: (tmp_path / "log").read_text()  # noqa: E731
            wait_for(lambda: "serving" in seen() or process.poll() is not None, seconds=300)
            address = re.search(r"http://127\.0\.0\.1:\d+/v1", seen())
            assert address, seen()
            client = openai.OpenAI(base_url=address[0], api_key=TOKEN)
            wait_for(lambda: _answers(address[0]))
            secret = "a secret\r\n\x1b[31mquestion"
            for name in ("base", "poems"):
                answer = ask(client, name, [{"role": "user", "content": secret}], max_tokens=4)
                assert answer.usage.completion_tokens == 4
            stream = ask(client, "base", max_tokens=1000, stream=True)  # still running when the signal comes
            next(iter(stream))
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=120) in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
        finally:
            process.kill()
            process.wait()
    # E16: neither what was asked nor the token is in what the server says.
    assert "secret" not in seen() and TOKEN not in seen() and "Traceback" not in seen(), seen()


def _answers(url):
    try:
        return HTTP.get(url.removesuffix("/v1") + "/health").status_code == 200
    except httpx.TransportError:
        return False
