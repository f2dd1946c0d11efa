"""A server on a tiny model inside the test's own process, over real sockets."""

import contextlib
import json
import shutil
import socket
import threading
import time

import pytest
from safetensors.torch import load_file, save_file
from test_chat_command import add_adapter, nano

for name in ("fastapi", "openai", "uvicorn"):
    pytest.importorskip(name)

from baichuan_sft.infer.server import bind, build_parser  # noqa: E402
from baichuan_sft.infer.server_app import build_app  # noqa: E402
from baichuan_sft.infer.server_gate import Limits, Server  # noqa: E402
from baichuan_sft.infer.server_model import load_engine  # noqa: E402

HOSTS = frozenset({"127.0.0.1", "localhost"})
QUESTION = [{"role": "user", "content": "你好, tell me more"}]


def make_models(folder, **config):
    """``folder/base`` and two adapters on it, none of which agree."""
    base = nano(folder / "base", seed=3, **config)
    add_adapter(base, folder / "poems", max_new_tokens=12)
    shutil.copytree(folder / "poems", folder / "law")
    weights = load_file(folder / "law" / "adapter_model.safetensors")
    turned = {name: -weight if "lora_B" in name else weight for name, weight in weights.items()}
    save_file(turned, folder / "law" / "adapter_model.safetensors", metadata={"format": "pt"})
    for name in ("poems", "law"):
        file = folder / name / "adapter_config.json"
        settings = {**json.loads(file.read_text()), "base_model_name_or_path": str(folder / "base")}
        file.write_text(json.dumps(settings))
    return folder


def engine_of(folder, *words):
    adapters = [word for name in ("poems", "law") for word in ("--adapter", f"{name}={folder / name}")]
    return load_engine(build_parser().parse_args([str(folder / "base"), *adapters, *words]))


@contextlib.contextmanager
def serving(engine, **limits):
    """(host, port) of a server that ends with the block."""
    app = build_app(engine, Limits(**{"hosts": HOSTS, **limits}))
    listener = bind("127.0.0.1", 0)
    server = Server(app, engine.close)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    wait_for(lambda: server.started)
    try:
        yield listener.getsockname()
    finally:
        server.should_exit = True
        thread.join(timeout=60)
        assert not thread.is_alive()


def wait_for(condition, seconds=60):
    """Until it holds; the limit only ends a test that would never end."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def raw(address, data, *, more=()):
    """Bytes sent as they are; what came back until the server closed, or the answer was whole."""
    with socket.create_connection(address, timeout=60) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(data)
            for chunk in more:
                connection.sendall(chunk)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while received := connection.recv(65536):
                answer += received
    return answer
