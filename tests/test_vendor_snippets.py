"""What the READMEs of the four vendor repositories show, run on directories as the vendor made them."""

import json
import os
import subprocess
import sys

import pytest
import torch
from fixtures import ARCHES, SMALL_VOCABULARY, VOCABULARIES, tiny_config
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.generation.utils import GenerationConfig

from baichuan_sft import load_model, load_tokenizer
from baichuan_sft.model.chat_template_baichuan import read_messages
from baichuan_sft.model.modeling_baichuan import BaichuanForCausalLM
from baichuan_sft.model.tokenization_baichuan import BaichuanTokenizer

MESSAGES = [{"role": "user", "content": "解释一下“温故而知新”"}]
IDS = torch.arange(24)[None] * 50
NEW_TOKENS = 12
SAMPLING = dict(temperature=0.3, top_k=5, top_p=0.85, repetition_penalty=1.05, do_sample=True)
SPECIAL = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, user_token_id=195, assistant_token_id=196)
# Keys that this code writes and the vendor does not.
OURS = {"position_embedding", "lm_head", "z_loss_kind", "dtype"}


def spelling(arch):
    return "BaiChuan" if arch == "baichuan-7b" else "Baichuan"


def vendor_directory(path, arch):
    """Files of the vendor's names and keys; its code is there, as dead as the original, and says so."""
    name = spelling(arch)
    torch.manual_seed(sum(map(ord, arch)))
    vocabulary = VOCABULARIES["baichuan2_like" if "baichuan2" in arch else "baichuan1_like"]
    size = load_tokenizer(vocabulary).vocab_size
    model = BaichuanForCausalLM(
        tiny_config(arch, num_attention_heads=8, hidden_size=128, intermediate_size=192, vocab_size=size)
    )
    state = model.state_dict()
    if arch == "baichuan-7b":
        state |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.full((8,), 7.0) for i in range(2)}
    path.mkdir()
    torch.save(state, path / "pytorch_model.bin")
    config = {key: value for key, value in model.config.to_dict().items() if key not in OURS}
    config |= {"architectures": [f"{name}ForCausalLM"], "torch_dtype": "bfloat16"}
    config["auto_map"] = {
        "AutoConfig": f"configuration_baichuan.{name}Config",
        "AutoModelForCausalLM": f"modeling_baichuan.{name}ForCausalLM",
    }
    if "baichuan2" in arch:
        config["z_loss_weight"] = 0.0  # in so small a vocabulary nothing else tells the heads apart
    (path / "config.json").write_text(json.dumps(config))
    settings = {**SPECIAL, **SAMPLING, "max_new_tokens": NEW_TOKENS, "transformers_version": "4.29.2"}
    (path / "generation_config.json").write_text(json.dumps(settings))
    (path / "tokenizer.model").write_bytes(vocabulary.read_bytes())
    tokenizer = {
        "add_bos_token": False,
        "add_eos_token": False,
        "auto_map": {"AutoTokenizer": [f"tokenization_baichuan.{name}Tokenizer", None]},
        "tokenizer_class": f"{name}Tokenizer",
        "model_max_length": 4096,
    }
    tokenizer["pad_token"] = {"__type": "AddedToken", "content": "<unk>", "normalized": True}
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    for file in ("configuration", "modeling", "tokenization"):
        (path / f"{file}_baichuan.py").write_text("raise AssertionError('code of the directory was run')\n")
    return path


@pytest.fixture(scope="module")
def vendor(tmp_path_factory):
    """arch -> directory."""
    folder = tmp_path_factory.mktemp("vendor")
    return {arch: vendor_directory(folder / arch, arch) for arch in ARCHES}


@pytest.fixture(params=ARCHES)
def path(request, vendor):
    return str(vendor[request.param])


def load(path, **options):
    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, **options)


def logits_of(model):
    with torch.no_grad():
        return model(IDS.to(model.device)).logits


def test_chat(path):
    tokenizer = AutoTokenizer.from_pretrained(path, use_fast=False, trust_remote_code=True)
    model = load(path, device_map="auto", torch_dtype=torch.bfloat16)
    assert isinstance(model, BaichuanForCausalLM) and isinstance(tokenizer, BaichuanTokenizer)
    model.generation_config = GenerationConfig.from_pretrained(path)
    assert model.generation_config.user_token_id == 195
    torch.manual_seed(3)
    response = model.chat(tokenizer, MESSAGES)
    torch.manual_seed(3)
    states = list(model.chat(tokenizer, MESSAGES, stream=True))
    assert response == states[-1]
    # One state per token; without the file's settings there would be 20 tokens, or the config's 2048.
    assert 1 < len(states) <= NEW_TOKENS
    torch.manual_seed(3)
    again = model.chat(tokenizer, MESSAGES, **SAMPLING, max_new_tokens=NEW_TOKENS)
    assert again == response


def test_base_generate(path):
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    model = load(path, device_map="auto", torch_dtype=torch.float32)
    inputs = tokenizer("登鹳雀楼->王之涣\n夜雨寄北->", return_tensors="pt").to(model.device)
    pred = model.generate(**inputs, max_new_tokens=NEW_TOKENS, repetition_penalty=1.1, do_sample=False)
    expected = inputs["input_ids"]
    for _ in range(NEW_TOKENS):  # the same without a cache and without generate
        with torch.no_grad():
            scores = model(expected).logits[0, -1]
        said = expected[0].unique()
        scores[said] = torch.where(scores[said] < 0, scores[said] * 1.1, scores[said] / 1.1)
        expected = torch.cat([expected, scores.argmax().view(1, 1)], dim=1)
        if expected[0, -1] == model.config.eos_token_id:
            break
    assert torch.equal(pred, expected)
    text = tokenizer.decode(pred.cpu()[0], skip_special_tokens=True)
    assert text.startswith(tokenizer.decode(inputs["input_ids"][0]))


def test_fp32_on_a_cpu(path):
    model = load(path, torch_dtype=torch.float32)
    stored = torch.load(f"{path}/pytorch_model.bin", weights_only=True)
    for name, weight in model.state_dict().items():
        assert weight.dtype == torch.float32 and torch.equal(weight, stored[name]), name
    assert model.chat(AutoTokenizer.from_pretrained(path, trust_remote_code=True), MESSAGES)


BITS = {
    8: dict(load_in_8bit=True),
    4: dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
}


@pytest.mark.parametrize("bits", BITS)
def test_quantize_online(path, bits):
    pytest.importorskip("bitsandbytes")
    whole = load(path, torch_dtype=torch.float16)
    before = logits_of(whole)
    model = whole.quantize(bits)
    kinds = {
        type(module).__name__ for module in model.model.layers.modules() if hasattr(module, "in_features")
    }
    assert (
        kinds == {{8: "Linear8bitLt", 4: "Linear4bit"}[bits]}
        and type(model.lm_head).__name__ == "BaichuanHead"
    )
    config = BitsAndBytesConfig(
        **BITS[bits], bnb_4bit_compute_dtype=torch.float16, llm_int8_skip_modules=["lm_head"]
    )
    loaded = load(path, torch_dtype=torch.float16, quantization_config=config)
    assert torch.equal(logits_of(model).cpu(), logits_of(loaded).cpu())
    # 8 bits: half of 1/127 of the largest weight of a row, 4 bits: 0.16 of a block's; 14 products in a row.
    gap = (logits_of(model).cpu() - before).float().norm() / before.float().norm()
    assert 0 < gap < {8: 0.02, 4: 0.5}[bits]
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    assert model.chat(tokenizer, MESSAGES, do_sample=False)


@pytest.mark.parametrize("bits", BITS)
def test_a_quantised_model_moves_whole(vendor, bits):
    """Its scales lie beside the parameters, where torch does not look for them."""
    pytest.importorskip("bitsandbytes")
    model = load(vendor["baichuan2-7b"], torch_dtype=torch.float16).quantize(bits)
    expected = logits_of(model)

    def move(weight):  # as .cuda() does, but from the CPU to the CPU
        moved = weight.to("cpu")
        moved.data = moved.data.clone()
        return moved

    model._apply(move)
    for module in model.modules():
        if type(module).__name__ == "Linear8bitLt":
            assert module.state.CB.data_ptr() == module.weight.data_ptr()
            assert module.state.SCB.device == module.weight.device
    assert torch.equal(logits_of(model), expected)
    if torch.cuda.is_available():
        gap = (logits_of(model.cuda()).cpu() - expected).float().norm() / expected.float().norm()
        assert gap < 0.01  # fp16 sums in another order, which tip an activation's 8 bits here and there


@pytest.mark.parametrize("bits", [16, "8", None, 2])
def test_quantize_to_other_bits(vendor, bits):
    model = load(vendor["baichuan2-7b"])
    with pytest.raises(ValueError, match="a Baichuan model is quantised to 8 bits or to 4"):
        model.quantize(bits)
    assert torch.isfinite(logits_of(model)).all()  # as whole as before


def test_quantize_twice(vendor):
    pytest.importorskip("bitsandbytes")
    model = load(vendor["baichuan2-7b"]).quantize(4)
    expected = logits_of(model)
    for bits in BITS:
        with pytest.raises(ValueError, match="quantised already; load the whole one"):
            model.quantize(bits)
    assert torch.equal(logits_of(model), expected)


@pytest.mark.parametrize("bits", BITS)
def test_an_adapter_is_not_quantised(vendor, bits):
    """Its two factors are linears too, and PEFT would cast activations to their 8-bit integers."""
    pytest.importorskip("bitsandbytes")
    model = get_peft_model(load(vendor["baichuan2-7b"]), LoraConfig(target_modules=["W_pack"]))
    with pytest.raises(ValueError, match="quantise its base and load it on that"):
        model.quantize(bits)
    assert model.merge_and_unload().quantize(bits) is not None


@pytest.mark.parametrize("bits", BITS)
def test_load_in_bits(vendor, bits):
    """The spelling of the README, which transformers 5 itself no longer takes."""
    pytest.importorskip("bitsandbytes")
    path, words = vendor["baichuan2-13b"], {f"load_in_{bits}bit": True}
    model = load(path, device_map="auto", torch_dtype=torch.float16, **words)
    assert torch.equal(
        logits_of(model).cpu(), logits_of(load(path, torch_dtype=torch.float16).quantize(bits)).cpu()
    )
    with pytest.raises(ValueError, match="exclude each other"):
        load(path, **words, quantization_config=BitsAndBytesConfig(**BITS[bits]))


@pytest.mark.parametrize("arch", ["baichuan2-7b", "baichuan2-13b"])
def test_head_conversion(vendor, arch, tmp_path):
    """Rows of norm 1 stand in the file afterwards: a plain head gives the same, and so does NormHead."""
    source = vendor[arch]
    model = torch.load(source / "pytorch_model.bin", weights_only=True)
    model["lm_head.weight"] = torch.nn.functional.normalize(model["lm_head.weight"])
    config = json.loads((source / "config.json").read_text())
    expected = logits_of(load(source, torch_dtype=torch.float32))
    for head in ("plain", "norm"):
        target = tmp_path / head
        target.mkdir()
        torch.save(model, target / "pytorch_model.bin")
        (target / "config.json").write_text(json.dumps(config | {"lm_head": head}))
        for converted in (load(target, torch_dtype=torch.float32), load_model(target, dtype=torch.float32)):
            assert converted.lm_head.normalize is (head == "norm")
            # fp32: dividing before the product instead of after it moves the last bits of 24
            torch.testing.assert_close(logits_of(converted), expected, rtol=1e-5, atol=1e-5)


def test_adapter(path, tmp_path):
    torch.manual_seed(1)
    options = LoraConfig(task_type="CAUSAL_LM", target_modules=["W_pack"], r=4, init_lora_weights=False)
    tuned = get_peft_model(load(path, torch_dtype=torch.float32), options)
    tuned.save_pretrained(tmp_path)
    model = AutoPeftModelForCausalLM.from_pretrained(
        tmp_path, trust_remote_code=True, torch_dtype=torch.float32
    )
    assert torch.equal(logits_of(model.eval()), logits_of(tuned.eval()))
    assert not torch.allclose(logits_of(model), logits_of(load(path, torch_dtype=torch.float32)), atol=1e-3)
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    assert model.chat(tokenizer, MESSAGES, do_sample=False)


def test_role_human(path):
    """Baichuan-13B-Instruction's README writes it so; what only resembles a role is none."""
    model, tokenizer = load_model(path), load_tokenizer(path)
    named = [{"role": "Human", "content": MESSAGES[0]["content"]}]
    assert model.chat(tokenizer, named, do_sample=False) == model.chat(tokenizer, MESSAGES, do_sample=False)
    for role in ("Humans", "hUman", "Use", "USER", "", None):
        with pytest.raises(ValueError, match="message 0: unknown role"):
            read_messages([{"role": role, "content": "a"}])


ALONE = """
import sys
sys.modules.update(dict.fromkeys(["baichuan_sft", "peft", "deepspeed"]))
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.utils import GenerationConfig
path, messages = sys.argv[1], [{"role": "Human", "content": "你好"}]
tokenizer = AutoTokenizer.from_pretrained(path, use_fast=False, trust_remote_code=True)
for bits in (None, 8, 4):
    model = AutoModelForCausalLM.from_pretrained(path, torch_dtype=torch.float16, trust_remote_code=True)
    model.generation_config = GenerationConfig.from_pretrained(path)
    if bits:
        model = model.quantize(bits)
    options = dict(do_sample=False, max_new_tokens=8)
    answer = model.chat(tokenizer, messages, **options)
    *_, streamed = model.chat(tokenizer, messages, stream=True, **options)
    assert streamed == answer
    inputs = tokenizer("a->b\\nc->", return_tensors="pt")
    print(repr(answer), model.generate(**inputs, max_new_tokens=6, repetition_penalty=1.1).tolist())
assert not [name for name in sys.modules if name.startswith("baichuan_sft.")]
"""


@pytest.mark.slow
def test_a_saved_model_needs_no_package(tmp_path):
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = BaichuanForCausalLM(
        tiny_config("baichuan2-13b", num_attention_heads=8, hidden_size=128, intermediate_size=192)
    )
    model.save_pretrained(tmp_path / "model")
    tokenizer = load_tokenizer(SMALL_VOCABULARY)
    tokenizer.save_pretrained(tmp_path / "model")
    env = {**os.environ, "PYTHONPATH": "", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", ALONE, str(tmp_path / "model")]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    for bits, line in zip((None, 8, 4), lines, strict=True):
        model = load_model(tmp_path / "model", dtype=torch.float16)
        model = model.quantize(bits) if bits else model
        answer = model.chat(
            tokenizer, [{"role": "user", "content": "你好"}], do_sample=False, max_new_tokens=8
        )
        inputs = tokenizer("a->b\nc->", return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=6, repetition_penalty=1.1).tolist()
        assert line == f"{answer!r} {ids}"
