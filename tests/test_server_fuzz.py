"""Ten thousand odd requests (BAICHUAN_SFT_SOAK=1: a hundred thousand): no 5xx, no restart, flat memory."""

import asyncio
import json
import os
import random
import time

import pytest
from fixtures import HOSTILE, own_memory
from serving import QUESTION, engine_of, make_models, wait_for

from baichuan_sft.infer.server_app import build_app
from baichuan_sft.infer.server_gate import Limits

schemathesis = pytest.importorskip("schemathesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402

SCALE = 10 if os.environ.get("BAICHUAN_SFT_SOAK") else 1
FROM_SCHEMA, MUTATED = 250 * SCALE, 9_000 * SCALE  # the first for each of two endpoints, valid and not
PATHS = ["/v1/chat/completions", "/v1/completions"]
ODD = [
    None, True, False, 0, 1, -1, 8, 9, 0.5, -0.0, 1e-39, 1e-300, 1e308, 10**30, 2**63, -(2**63),
    "", "x", "base", "poems",
    "\0", HOSTILE, "\U0010ffff", "\u202e", "x" * 5000, [], {}, [[]], [None], {"": ""}, {"__proto__": 1},
    "NaN", [{"type": "text", "text": "x"}], [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}],
    {"role": "user", "content": "x"}, {"include_usage": True}, ["a", "b"],
]  # fmt: skip
FIELDS = """
model messages prompt stream stream_options max_tokens max_completion_tokens temperature top_p top_k
seed n stop user logprobs top_logprobs frequency_penalty presence_penalty repetition_penalty
response_format echo role content tools""".split()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(loop, app, engine) on a context of 32 tokens, so that no answer is long."""
    engine = engine_of(
        make_models(tmp_path_factory.mktemp("fuzzed"), max_position_embeddings=32), "--max_queue", "2"
    )
    app = build_app(engine, Limits(frozenset({"127.0.0.1"})))
    loop = asyncio.new_event_loop()
    running = app.router.lifespan_context(app)
    loop.run_until_complete(running.__aenter__())
    yield loop, app, engine
    loop.run_until_complete(running.__aexit__(None, None, None))
    assert not engine.is_alive()
    loop.close()


async def call(app, path, body, headers=(), leaves=False, method="POST"):
    """Status and content; ``leaves``: the client is gone once its request is sent."""
    messages, answer = [{"type": "http.request", "body": body}], {"status": None, "body": b""}
    done = asyncio.Event()

    async def receive():
        if messages:
            return messages.pop()
        if not leaves:
            await done.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        answer["status"] = message.get("status", answer["status"])
        answer["body"] += message.get("body", b"")
        await asyncio.sleep(0)  # as a socket may: who has gone is seen before the first event is made

    fixed = {"host": "127.0.0.1", "content-type": "application/json", **dict(headers)}
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
        "method": method, "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
        "scheme": "http",
        "headers": [(name.encode(), value.encode("latin-1", "replace")) for name, value in fixed.items()],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
    }  # fmt: skip
    await app(scope, receive, send)
    done.set()
    return answer["status"], answer["body"]


def check(status, content, *, leaves=False):
    """An answer in the schema it should have; one that nobody waits for may be cut."""
    assert status is not None and status < 500, (status, content[:300])
    if leaves:
        return
    if status >= 400:
        assert json.loads(content)["error"].keys() == {"message", "type", "param", "code"}
    elif content.startswith(b"data:"):
        assert content.endswith(b"data: [DONE]\n\n") and b'"error"' not in content
    else:
        assert json.loads(content)["choices"]


def test_a_client_that_goes_before_the_first_event_ends_its_answer(server, monkeypatch):
    loop, app, engine = server
    step = type(engine)._step

    def slow(self, name):
        time.sleep(0.05)
        step(self, name)

    monkeypatch.setattr(type(engine), "_step", slow)
    before, generated = engine.counts["cancelled"], engine.counts["generated_tokens"]
    body = {"model": "base", "prompt": "a", "max_tokens": 25, "temperature": 2, "stream": True}
    status, content = loop.run_until_complete(
        call(app, "/v1/completions", json.dumps(body).encode(), leaves=True)
    )
    assert (status, content) == (200, b"")
    wait_for(lambda: engine.counts["cancelled"] == before + 1, 20)
    assert engine.counts["generated_tokens"] < generated + 25


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
def test_requests_made_from_the_openapi_file(server, path, mode):
    loop, app, engine = server
    schema = schemathesis.openapi.from_dict(app.openapi())
    seen = []

    @settings(
        max_examples=FROM_SCHEMA, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(schema[path]["POST"].as_strategy(generation_mode=schemathesis.GenerationMode[mode]))
    def one(case):
        body = case.body
        if isinstance(body, dict) and isinstance(body.get("model"), str) and len(seen) % 8:
            body = {**body, "model": "base"}  # the schema knows no names
        try:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
        except (TypeError, ValueError):
            content = repr(body).encode()
        status, answer = loop.run_until_complete(call(app, path, content))
        seen.append(status)
        check(status, answer)

    one()
    assert len(seen) >= FROM_SCHEMA // 2 and set(seen) & {400, 404}, len(seen)
    assert engine.is_alive() and engine.counts["failed"] == 0


def request(rng):
    """One request, from a good one by random harm: its path, body, headers, and whether its client leaves."""
    path = rng.choice(PATHS)
    good = {"messages": QUESTION} if "chat" in path else {"prompt": "你好"}
    body = {"model": rng.choice(["base", "poems", "law"]), "max_tokens": rng.choice([1, 2, 5]), **good}
    for _ in range(rng.choice([0, 0, 0, 1, 1, 2, 4])):
        body = target = json.loads(json.dumps(body))  # nothing is shared with ODD or QUESTION
        while rng.random() < 0.4:  # go deeper
            inside = [
                v
                for v in (target.values() if isinstance(target, dict) else target)
                if isinstance(v, dict | list)
            ]
            if not inside:
                break
            target = rng.choice(inside)
        if isinstance(target, dict):
            target[rng.choice(FIELDS)] = rng.choice(ODD)
        else:
            target.insert(rng.randint(0, len(target)), rng.choice(ODD))
    content = bytearray(json.dumps(body, ensure_ascii=rng.random() < 0.5).encode())
    harm = rng.random()
    if harm < 0.1:
        del content[rng.randrange(len(content)) :]
    elif harm < 0.2:
        content[rng.randrange(len(content))] = rng.randrange(256)
    headers = {}
    if rng.random() < 0.05:
        name = rng.choice(
            ["host", "origin", "content-type", "content-length", "content-encoding", "authorization", "x"]
        )
        headers[name] = rng.choice(
            ["", "evil.example", "-1", "9" * 40, "null", "[::1", "gzip", "é", "x" * 20_000]
        )
    return path, bytes(content), headers, rng.random() < 0.1


def test_requests_that_were_harmed(server):
    loop, app, engine = server
    rng, statuses, sizes = random.Random(0), {}, []
    thread = engine.ident

    async def group(size):
        requests = [request(rng) for _ in range(size)]
        answers = await asyncio.gather(*(call(app, *one) for one in requests))
        for (_, _, _, leaves), (status, content) in zip(requests, answers):
            check(status, content, leaves=leaves)
            statuses[status] = statuses.get(status, 0) + 1

    for i in range(MUTATED // 20):
        loop.run_until_complete(group(20))
        if i in (MUTATED // 100, MUTATED // 20 - 1):  # a fifth is enough for every pool to be warm
            sizes.append(own_memory())
    assert sum(statuses.values()) == MUTATED and {200, 400, 403, 404, 415, 429, 431} <= statuses.keys(), (
        statuses
    )
    assert engine.ident == thread and engine.is_alive() and engine.counts["failed"] == 0
    assert sizes[1] < 1.05 * sizes[0], sizes  # an allocator keeps some of what it was given
    assert engine.num_waiting == 0
