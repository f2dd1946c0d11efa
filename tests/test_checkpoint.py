"""A saved model loads everywhere and equal; one that is not what it claims is one clear line."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fixtures import ARCHES, ROOT, SMALL_VOCABULARY, tiny_config
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from baichuan_sft.checkpoint import load_config, load_model, load_tokenizer, verify
from baichuan_sft.errors import CheckpointFault, UserError
from baichuan_sft.model.modeling_baichuan import BaichuanForCausalLM

ISLAND = {path.name for path in (ROOT / "baichuan_sft" / "model").glob("*_baichuan.py")}
TOKENIZER_FILES = {"tokenization_baichuan.py", "sentencepiece_baichuan.py"}  # go with the tokenizer
IDS = torch.arange(5, 29).view(2, 12)


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def save_base(path: Path, arch: str = "baichuan2-13b", **changes) -> Path:
    torch.manual_seed(sum(map(ord, arch)))
    BaichuanForCausalLM(tiny_config(arch, **changes)).save_pretrained(path)
    load_tokenizer(SMALL_VOCABULARY).save_pretrained(path)
    return path


def save_adapter(path: Path, base: Path, **options) -> Path:
    settings = {"target_modules": ["W_pack"], "r": 4, "init_lora_weights": False, **options}
    torch.manual_seed(1)
    get_peft_model(load_model(base), LoraConfig(task_type="CAUSAL_LM", **settings)).save_pretrained(path)
    return path


def as_pickle(path: Path, content) -> None:
    """Replace the weights by a ``pytorch_model.bin``."""
    (path / "model.safetensors").unlink(missing_ok=True)
    torch.save(content, path / "pytorch_model.bin")


def edit_json(path: Path, **changes) -> None:
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.fixture
def base(tmp_path):
    return save_base(tmp_path / "base")


# --- what loads -----------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHES)
def test_round_trip(arch, tmp_path):
    base = save_base(tmp_path / "base", arch)
    assert {path.name for path in base.glob("*.py")} == ISLAND
    model = load_model(base)
    assert not model.training and model.config._attn_implementation == "sdpa"
    stored = load_file(base / "model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in model.state_dict().items())
    verify(base)
    by_name = AutoModelForCausalLM.from_pretrained(base)
    assert type(by_name) is BaichuanForCausalLM  # the installed package, not the copy
    assert torch.equal(logits_of(by_name), logits_of(model))
    trusting = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=True)  # versions differ in which
    assert torch.equal(logits_of(trusting), logits_of(model))
    model.save_pretrained(tmp_path / "again")
    assert {path.name for path in (tmp_path / "again").glob("*.py")} == ISLAND - TOKENIZER_FILES
    assert torch.equal(logits_of(load_model(tmp_path / "again")), logits_of(model))
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=True)
    assert tokenizer.encode("你好 world") == load_tokenizer(base).encode("你好 world")


def test_dtype_attention_and_device_are_as_asked(base):
    model = load_model(base, dtype=torch.bfloat16, attn="eager", device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"
    model.save_pretrained(base)
    assert load_model(base).dtype == torch.bfloat16  # "auto" is the file's


def test_pickled_and_sharded_weights_load(base, tmp_path):
    model = load_model(base)
    expected = logits_of(model)
    model.save_pretrained(tmp_path / "shards", max_shard_size="300KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    assert torch.equal(logits_of(load_model(tmp_path / "shards")), expected)
    verify(tmp_path / "shards")

    state = model.state_dict()
    as_pickle(base, state)
    assert torch.equal(logits_of(load_model(base)), expected)
    names = sorted(state)
    half = {name: state[name].clone() for name in names[::2]}
    torch.save(half, base / "pytorch_model-1.bin")
    torch.save({name: state[name].clone() for name in names[1::2]}, base / "pytorch_model-2.bin")
    weight_map = {name: f"pytorch_model-{1 if name in half else 2}.bin" for name in names}
    (base / "pytorch_model.bin").unlink()
    (base / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert torch.equal(logits_of(load_model(base)), expected)


def test_safetensors_are_preferred(base):
    torch.save({"nothing": torch.ones(1)}, base / "pytorch_model.bin")
    load_model(base)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_rope_tables_of_baichuan_7b_are_tolerated(suffix, tmp_path):
    base = save_base(tmp_path, "baichuan-7b")
    state = load_file(base / "model.safetensors")
    expected = logits_of(load_model(base))
    state |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.full((4,), 7.0) for i in range(2)}
    if suffix == "bin":
        as_pickle(base, state)
    else:
        save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(logits_of(load_model(base)), expected)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(target_modules="all-linear"),
        dict(target_modules=r".*layers\.1\..*(W_pack|o_proj)", rank_pattern={"o_proj": 2}),
        dict(use_dora=True, use_rslora=True),
        dict(modules_to_save=["embed_tokens"]),
        dict(init_lora_weights="pissa"),
    ],
    ids=lambda options: "-".join(options) or "W_pack",
)
def test_adapter(options, base, tmp_path):
    plain = logits_of(load_model(base))
    adapter = save_adapter(tmp_path / "adapter", base, **options)
    verify(adapter)
    tuned = logits_of(load_model(adapter))
    auto = AutoPeftModelForCausalLM.from_pretrained(adapter, trust_remote_code=True)
    assert torch.equal(logits_of(auto.eval()), tuned)
    if options.get("init_lora_weights") != "pissa":  # which begins at the base
        assert not torch.allclose(tuned, plain, atol=1e-4)
    assert load_tokenizer(adapter).encode("你好") == load_tokenizer(base).encode("你好")


# --- what does not --------------------------------------------------------------------------------


def drop_tensor(base):
    state = load_file(base / "model.safetensors")
    del state["model.layers.0.self_attn.W_pack.weight"]
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})


def add_tensor(base):
    state = load_file(base / "model.safetensors")
    save_file(
        {**state, "model.extra.weight": torch.ones(2)}, base / "model.safetensors", metadata={"format": "pt"}
    )


def truncate(base):
    whole = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def pickle_without_a_tensor(base):
    state = load_file(base / "model.safetensors")
    as_pickle(base, {name: tensor for name, tensor in state.items() if name != "model.norm.weight"})


def pickle_of_another_shape(base):
    as_pickle(base, {**load_file(base / "model.safetensors"), "lm_head.weight": torch.ones(2, 3)})


def lose_a_shard(base):
    load_model(base).save_pretrained(base, max_shard_size="300KB")
    (base / "model.safetensors").unlink()
    next(base.glob("model-00002-*")).unlink()


def only_config(base):
    (base / "model.safetensors").unlink()


def garbage(base):
    only_config(base)
    (base / "pytorch_model.bin").write_bytes(b"<html>not found</html>")


def lfs_pointer(base):
    (base / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    )


def shard_elsewhere(base):
    only_config(base)
    index = {"weight_map": {"lm_head.weight": "../../etc/x.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


def config(**changes):
    return lambda base: edit_json(base / "config.json", **changes)


def break_config(base):
    (base / "config.json").write_text("{")


FAULTS = [
    (drop_tensor, CheckpointFault, "1 tensors missing, e.g. model.layers.0.self_attn.W_pack.weight"),
    (add_tensor, CheckpointFault, "1 tensors that do not belong, e.g. model.extra.weight"),
    (config(hidden_size=96), CheckpointFault, r"e.g. lm_head.weight \(6144, 48\), expected \(6144, 96\)"),
    (config(num_hidden_layers=3), CheckpointFault, "7 tensors missing, e.g. model.layers.2"),
    (truncate, CheckpointFault, "model.safetensors: not a whole file .*; copy it again"),
    (pickle_without_a_tensor, CheckpointFault, "1 tensors missing, e.g. model.norm.weight"),
    (pickle_of_another_shape, CheckpointFault, r"lm_head.weight \(2, 3\), expected \(6144, 48\)"),
    (lose_a_shard, CheckpointFault, "model-00002-of-.*: no such file, but it is part of the model"),
    (only_config, CheckpointFault, "no weights in it; expected one of model.safetensors"),
    (garbage, CheckpointFault, "pytorch_model.bin: is an HTML page, not weights"),
    (lfs_pointer, CheckpointFault, "model.safetensors: is a Git LFS pointer; run `git lfs pull`"),
    (shard_elsewhere, CheckpointFault, "names '../../etc/x.safetensors', which is no file beside it"),
    (config(_attn_implementation_internal="x/y"), UserError, "_attn_implementation_internal could make"),
    (
        config(text_config={"trust_remote_code": True}),
        UserError,
        "text_config could make transformers run code",
    ),
    (config(quantization_config={"bits": 4}), UserError, "vendor's own code quantised"),
    (config(model_type="llama"), UserError, "not a Baichuan model: .*'llama', expected 'baichuan'"),
    (
        config(vocab_size=151936, lm_head=None, z_loss_weight=None),
        UserError,
        "vocab_size is 151936, Baichuan has 64000",
    ),
    (config(model_max_length=None), UserError, "neither max_position_embeddings .* nor model_max_length"),
    (config(num_attention_heads="6"), UserError, "num_attention_heads is '6'; it must be a positive"),
    (config(dtype="float13"), UserError, "float13"),
    (break_config, UserError, "config.json: not JSON"),
    (lambda base: (base / "config.json").unlink(), UserError, "not a model: there is no config.json in it"),
]


@pytest.mark.parametrize("damage, kind, message", FAULTS, ids=[message[:40] for _, _, message in FAULTS])
def test_damaged_model_is_one_clear_line(damage, kind, message, base):
    damage(base)
    with pytest.raises(kind, match=message) as caught:
        load_model(base)
    assert str(caught.value).startswith(str(base)) and "\n" not in str(caught.value)


def test_directory_that_is_not_there(tmp_path):
    for load in (load_model, load_config):
        with pytest.raises(UserError, match="nowhere: no such directory"):
            load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no tokenizer\.model in it; copy the one of the base"):
        load_tokenizer(tmp_path)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("how", ["torch.save", "pickle"])
def test_code_in_a_pickle_is_not_run(how, base, tmp_path):
    proof = tmp_path / "executed"
    if how == "pickle":
        as_pickle(base, {})
        (base / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(proof)))
    else:
        as_pickle(base, {**load_file(base / "model.safetensors"), "x": Payload(proof)})
    with pytest.raises(
        CheckpointFault, match=r"nothing of it was run. Get these weights as safetensors"
    ) as caught:
        load_model(base)
    assert not proof.exists() and "weights_only" not in str(caught.value)
    # The payload is a real one.
    if how == "pickle":
        pickle.loads((base / "pytorch_model.bin").read_bytes())
    else:
        torch.load(base / "pytorch_model.bin", weights_only=False)
    assert proof.exists()


@pytest.mark.parametrize(
    "other, message",
    [
        (dict(hidden_size=96), "tensors of another shape, e.g. base_model.model.model.layers.0"),
        (dict(num_hidden_layers=3), "2 tensors missing, e.g. base_model.model.model.layers.2"),
        (dict(num_hidden_layers=1), "2 tensors that do not belong, e.g. base_model.model.model.layers.1"),
    ],
    ids=["wider", "deeper", "shallower"],
)
def test_adapter_of_another_base(other, message, base, tmp_path):
    adapter = save_adapter(tmp_path / "adapter", base)
    foreign = save_base(tmp_path / "foreign", **other)
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(foreign))
    with pytest.raises(UserError, match=message) as caught:
        load_model(adapter)
    assert caught.value.exit_code == 2
    assert f"Its base is {foreign}; if it was trained on another model, set" in str(caught.value)


def test_adapter_faults(base, tmp_path):
    adapter = save_adapter(tmp_path / "adapter", base)
    edit_json(adapter / "adapter_config.json", target_modules=["q_proj"])
    with pytest.raises(UserError, match=r"PEFT cannot put this adapter on its base: Target modules .*q_proj"):
        load_model(adapter)
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="/nowhere")
    with pytest.raises(UserError, match=r"base model in '/nowhere', .*set base_model_name_or_path"):
        load_model(adapter)
    (adapter / "adapter_config.json").write_text("[]")
    with pytest.raises(UserError, match=r"adapter_config.json: expected an object, got list"):
        load_model(adapter)


# --- elsewhere: other processes -------------------------------------------------------------------


def run_python(code: str, cwd: Path, *arguments, package: bool) -> None:
    """Run ``code``; it says what is wrong by failing."""
    env = {**os.environ, "HF_HOME": str(cwd / "hf"), "HF_MODULES_CACHE": str(cwd / "modules")}
    env["PYTHONPATH"] = str(ROOT) if package else ""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


# Stands for a machine that has none of these packages.
BLOCK = """
import sys
sys.modules.update(dict.fromkeys({blocked!r}))
"""

USE = """
import torch
from transformers import AutoTokenizer
model = Auto.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
expected = torch.load(sys.argv[2])
with torch.no_grad():
    logits = model(input_ids=expected["ids"]).logits
assert torch.equal(logits, expected["logits"]), (logits - expected["logits"]).abs().max()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[3], trust_remote_code=True)
options = dict(max_new_tokens=6, do_sample=False)
answer = model.chat(tokenizer, [{"role": "user", "content": "你好"}], **options)
assert answer == expected["answer"], (answer, expected["answer"])
*_, streamed = model.chat(tokenizer, [{"role": "user", "content": "你好"}], stream=True, **options)
assert streamed == answer
model.save_pretrained(sys.argv[4])
assert not [name for name in sys.modules if name.startswith("baichuan_sft.")]
"""


def write_expected(path: Path, model, tokenizer) -> Path:
    options = dict(max_new_tokens=6, do_sample=False)
    answer = model.chat(tokenizer, [{"role": "user", "content": "你好"}], **options)
    torch.save({"ids": IDS, "logits": logits_of(model), "answer": answer}, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["baichuan-7b", "baichuan2-13b"])  # both positions, both heads
def test_loads_without_the_package(arch, tmp_path):
    base = save_base(tmp_path / "base", arch)
    expected = write_expected(tmp_path / "expected.pt", load_model(base), load_tokenizer(base))
    blocked = ["baichuan_sft", "peft", "deepspeed", "google", "datasets", "accelerate"]
    code = BLOCK.format(blocked=blocked) + "from transformers import AutoModelForCausalLM as Auto\n" + USE
    run_python(code, tmp_path, base, expected, base, tmp_path / "again", package=False)
    again = tmp_path / "again"  # saved where the package is not, and whole all the same
    assert {path.name for path in again.glob("*.py")} == ISLAND - TOKENIZER_FILES
    assert torch.equal(logits_of(load_model(again)), torch.load(expected)["logits"])


@pytest.mark.slow
def test_adapter_loads_without_the_package(base, tmp_path):
    adapter = save_adapter(tmp_path / "adapter", base)
    expected = write_expected(tmp_path / "expected.pt", load_model(adapter), load_tokenizer(base))
    code = BLOCK.format(blocked=["baichuan_sft", "deepspeed", "google"])
    code += "from peft import AutoPeftModelForCausalLM as Auto\n" + USE
    run_python(code, tmp_path, adapter, expected, base, tmp_path / "again", package=False)


KNOWN = """
config = AutoConfig.for_model("baichuan", vocab_size=64000, max_position_embeddings=64)
assert type(config).__module__ == "baichuan_sft.model.configuration_baichuan", type(config)
from transformers import AutoModelForCausalLM, AutoTokenizer
assert AutoModelForCausalLM._model_mapping[type(config)].__name__ == "BaichuanForCausalLM"
"""
BEFORE = "import sys, baichuan_sft\nassert not {'torch', 'transformers'} & set(sys.modules)\n"
LOOK = "import importlib.util\nassert importlib.util.find_spec('transformers')\n"
AUTO = "from transformers import AutoConfig\n"
IMPORT_ORDERS = {
    "package first": BEFORE + AUTO,
    "transformers first": AUTO + "import baichuan_sft\n",
    "a part of the package": "from baichuan_sft import BaichuanConfig\n" + AUTO,
    # Libraries ask this way whether transformers is installed.
    "looked for in between": BEFORE + LOOK + AUTO,
}


@pytest.mark.slow
@pytest.mark.parametrize("order", IMPORT_ORDERS.values(), ids=IMPORT_ORDERS)
def test_registered_whatever_the_import_order(order, tmp_path):
    run_python(order + KNOWN, tmp_path, package=True)


def test_import_is_light(tmp_path):
    code = (
        "import sys, baichuan_sft\n"
        "assert 'load_model' in baichuan_sft.__all__ and baichuan_sft.__version__\n"
        "assert not {'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules)\n"
        "try:\n    baichuan_sft.nothing\n"
        "except AttributeError as error:\n    assert 'nothing' in str(error)\n"
        "else:\n    raise SystemExit(1)\n"
    )
    run_python(code, tmp_path, package=True)
