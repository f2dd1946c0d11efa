"""Whatever `baichuan-sft eval` may be given: what is opened, what it is called, what tells it from others."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file
from test_checkpoint import save_adapter, save_base

from baichuan_sft.errors import CheckpointFault, UserError
from baichuan_sft.evaluate.items import Request
from baichuan_sft.evaluate.models import fingerprint, open_model
from baichuan_sft.evaluate.scorer import Scorer

ASKED = Request("the sea is", (" deep", " wide and deep", " 42"), by="loglikelihood")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A base, an adapter on it, and the adapter merged."""
    from baichuan_sft.export.merge import main as merge

    root = tmp_path_factory.mktemp("models")
    base = save_base(root / "base")
    adapter = save_adapter(root / "adapter", base)
    assert merge([str(adapter), str(root / "merged")]) == 0
    return {"base": base, "adapter": adapter, "merged": root / "merged"}


def scores(opened):
    return Scorer(opened.model, opened.tokenizer, chat=opened.chat).run([ASKED])[0].scores


def test_kinds_and_facts(places):
    found = {name: open_model(str(path), device="cpu") for name, path in places.items()}
    for name, opened in found.items():
        facts = opened.facts
        assert (facts["kind"], facts["path"], facts["chat"]) == (name, str(places[name]), False)
        assert (facts["variant"], facts["dtype"]) == ("baichuan2-13b, 2 x 48", "float32")
        assert (facts["quantization"], facts["revision"]) == (None, None)
        assert not opened.model.training and not any(w.requires_grad for w in opened.model.parameters())
        json.dumps(facts)
    assert len({opened.facts["fingerprint"] for opened in found.values()}) == 3
    whole = found["base"].facts["parameters"]
    assert whole == found["merged"].facts["parameters"] < found["adapter"].facts["parameters"]
    # The adapter counts, and merged it says the same but for the rounding of fp32 sums.
    assert scores(found["adapter"]) == pytest.approx(scores(found["merged"]), abs=1e-5)
    assert scores(found["adapter"]) != pytest.approx(scores(found["base"]), abs=1e-3)


@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_quantised_it_is_another_model(tmp_path, name):
    pytest.importorskip("bitsandbytes")
    base = save_base(tmp_path, hidden_size=64, num_attention_heads=8, intermediate_size=128)
    whole, packed = (open_model(str(base), device="cpu", quantize=q) for q in (None, name))
    assert packed.facts["quantization"] == name
    assert packed.facts["parameters"] == whole.facts["parameters"]
    assert packed.facts["fingerprint"] != whole.facts["fingerprint"]
    assert scores(packed) != scores(whole) and scores(packed) == pytest.approx(scores(whole), abs=1)


def test_dtype_is_a_fact_and_tells_apart(places):
    whole, half = (open_model(str(places["base"]), device="cpu", dtype=dtype) for dtype in ("auto", "bf16"))
    assert half.facts["dtype"] == "bfloat16" and half.facts["fingerprint"] != whole.facts["fingerprint"]


def test_the_fingerprint_changes_with_any_weight_and_not_with_the_place(places, tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for name, path in (("base", base), ("adapter", adapter)):
        shutil.copytree(places[name], path)
    settings = adapter / "adapter_config.json"
    settings.write_text(settings.read_text().replace(str(places["base"]), str(base)))
    known = [fingerprint(places[name], "float32") for name in ("base", "adapter")]
    assert [fingerprint(path, "float32") for path in (base, adapter)] == known
    for name in load_file(base / "model.safetensors"):
        weights = load_file(places["base"] / "model.safetensors")
        weights[name].view(-1)[-1] += 1e-3
        save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
        opened = [fingerprint(path, "float32") for path in (base, adapter)]
        assert not set(opened) & set(known)
    shutil.copyfile(places["base"] / "model.safetensors", base / "model.safetensors")
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "lora_alpha": 99}))
    assert fingerprint(adapter, "float32") != known[1]


def test_a_chat_model_and_a_checkpoint_say_what_they_are(places, tmp_path):
    path = tmp_path / "chat"
    shutil.copytree(places["base"], path)
    settings = {"user_token_id": 195, "assistant_token_id": 196, "eos_token_id": [2, 195], "pad_token_id": 0}
    (path / "generation_config.json").write_text(json.dumps(settings))
    opened = open_model(str(path), device="cpu")
    assert opened.chat and opened.facts["kind"] == "chat"
    assert Scorer(opened.model, opened.tokenizer, chat=opened.chat).encode(ASKED)[0] == 195
    (path / "trainer_state.json").write_text("{}")
    assert open_model(str(path), device="cpu").facts["kind"] == "checkpoint"


@pytest.fixture
def cached(places, tmp_path, monkeypatch):
    """A cache that holds one revision of a repository, as a download leaves it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    root, commit = tmp_path / "models--vendor--checkpoints", "0123456789" * 4
    shutil.copytree(places["base"], root / "snapshots" / commit)
    (root / "refs").mkdir()
    (root / "refs" / "train_00220B").write_text(commit)
    return "vendor/checkpoints"


def test_a_cached_revision_needs_no_network(places, cached):
    opened = open_model(cached, revision="train_00220B", device="cpu")
    assert (opened.facts["path"], opened.facts["revision"]) == (cached, "train_00220B")
    straight = open_model(str(places["base"]), device="cpu")
    assert opened.facts["fingerprint"] == straight.facts["fingerprint"]
    assert scores(opened) == scores(straight)


def test_what_cannot_be_opened_is_one_line(places, cached, tmp_path):
    base = str(places["base"])
    for arguments, error, text in (
        (
            (cached, "train_99999B"),
            UserError,
            "vendor/checkpoints at train_99999B: no such directory, and no",
        ),
        (("vendor/none", None), UserError, "vendor/none: no such directory, and no repository"),
        ((str(tmp_path / "a" / "b" / "none"), None), UserError, "none: no such directory"),
        ((base, "main"), UserError, f"{base} is a directory, which has none"),
    ):
        with pytest.raises(error, match=text) as caught:
            open_model(arguments[0], revision=arguments[1], device="cpu")
        assert "\n" not in str(caught.value)
    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(CheckpointFault, match=r"model\.safetensors"):
        open_model(str(broken), device="cpu")
