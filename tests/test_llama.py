"""A 7B model as plain Llama: the vendor's logits, the same ids from a fast tokenizer, adapters that fit."""

import json
import random
import unicodedata

import pytest
import torch
from fixtures import ENCODED, HOSTILE, VOCABULARIES, golden, rows
from jinja2 import TemplateError
from peft import PeftModel
from safetensors.torch import load_file
from test_checkpoint import edit_json, logits_of, save_adapter, save_base
from test_golden import LOGITS, gap
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from baichuan_sft import commit
from baichuan_sft.checkpoint import load_config, load_model, load_tokenizer
from baichuan_sft.errors import EnvironmentFault, UserError
from baichuan_sft.export import convert
from baichuan_sft.export.fast_tokenizer import merges, tokenizer_json
from baichuan_sft.export.llama import as_llama, llama_config
from baichuan_sft.model.tokenization_baichuan import BaichuanTokenizer

ARCHES_7B = ["baichuan-7b", "baichuan2-7b"]
# fp32: three products instead of one, and a head divided before the product instead of after; measured 0 and
# 2.4e-6 of logits up to 4.
CLOSE = dict(rtol=0, atol=2e-5)


def run(*words) -> int:
    return convert.main([*(str(word) for word in words), "--to", "llama"])


# --- weights ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [f"{arch}/{shape}" for arch in ARCHES_7B for shape in "ab"])
def test_llama_gives_the_vendors_logits(name):
    gold, config = golden(name), load_config(golden(name).path)
    state = load_file(gold.path / "model.safetensors")
    kept = {key: tensor for key, tensor in state.items() if "inv_freq" not in key}
    model = LlamaForCausalLM(llama_config(config)).eval()
    model.load_state_dict(dict(pair for key in kept for pair in as_llama(key, kept[key], config)))
    with torch.no_grad():
        assert gap(model(gold["nopad/input_ids"]).logits, gold["nopad/eval_logits"]) < LOGITS


@pytest.fixture(scope="module", params=ARCHES_7B)
def converted(request, tmp_path_factory):
    """(base, its Llama form) directories."""
    root = tmp_path_factory.mktemp(request.param)
    base = save_base(root / "base", request.param)
    assert run(base, root / "base-llama") == 0
    return base, root / "base-llama"


def test_the_directory_loads_as_plain_llama(converted):
    base, out = converted
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    assert type(model) is LlamaForCausalLM and not list(out.glob("*.py"))
    torch.testing.assert_close(logits_of(model), logits_of(load_model(base)), **CLOSE)
    tokenizer, slow = AutoTokenizer.from_pretrained(out), load_tokenizer(base)
    assert tokenizer.is_fast and tokenizer("你好 world")["input_ids"] == slow("你好 world")["input_ids"]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"  # transformers 4 knows it too
    assert commit.problems(out) == []


def test_bf16_is_said(converted, tmp_path, capsys):
    assert run(converted[0], tmp_path / "half", "--dtype", "bf16") == 0
    assert "rounded to bf16, each by up to 0.004" in capsys.readouterr().out
    assert {t.dtype for t in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}


def test_13b_is_refused_with_a_way_out(tmp_path):
    base = save_base(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base)
    for source in (base, adapter):
        with pytest.raises(UserError, match=r"positions are ALiBi.*--to gguf"):
            run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


ADAPTERS = {
    "W_pack": dict(),
    "all": dict(target_modules="all-linear", use_rslora=True),
    "patterns": dict(
        target_modules=["W_pack", "o_proj"], rank_pattern={"o_proj": 2}, alpha_pattern={"W_pack": 3}
    ),
    "one layer": dict(target_modules=["W_pack"], layers_to_transform=[1]),
    "dora": dict(use_dora=True, modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_fits_the_llama_form(converted, kind, tmp_path):
    base, out = converted
    adapter = save_adapter(tmp_path / "adapter", base, **ADAPTERS[kind])
    tuned = logits_of(load_model(adapter))
    assert run(adapter, tmp_path / "out") == 0
    plain = AutoModelForCausalLM.from_pretrained(out)
    model = PeftModel.from_pretrained(plain, tmp_path / "out").eval()
    torch.testing.assert_close(logits_of(model), tuned, **CLOSE)
    assert (logits_of(load_model(base)) - tuned).abs().max() > 0.1  # else nothing would be shown
    weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert weights.keys() == load_names(model), "a name that PEFT does not know is dropped with a warning"
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(out)


@pytest.mark.parametrize("kind", ["patterns", "rslora"])
def test_an_adapters_one_scale_is_that_of_every_linear(converted, kind, tmp_path):
    """Of adapter_config.json vLLM reads r, lora_alpha and use_rslora."""
    base, out = converted
    more = {"patterns": {}, "rslora": dict(use_rslora=True)}[kind]
    adapter = save_adapter(tmp_path / "adapter", base, **ADAPTERS["patterns"], **more)
    assert run(adapter, tmp_path / "out") == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert not config["rank_pattern"] and not config["alpha_pattern"]
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    scale = config["lora_alpha"] / config["r"] ** (0.5 if config["use_rslora"] else 1)
    parts = load_file(tmp_path / "out" / "adapter_model.safetensors")
    linears = [name.removesuffix(".lora_A.weight") for name in parts if name.endswith(".lora_A.weight")]
    with torch.no_grad():
        for name in linears:
            a, b = (parts[f"{name}.lora_{side}.weight"] for side in "AB")
            assert len(a) == config["r"]
            model.get_submodule(name.removeprefix("base_model.model.")).weight += scale * b @ a
    torch.testing.assert_close(logits_of(model), logits_of(load_model(adapter)), **CLOSE)


def test_an_adapters_report_says_what_is_lost_and_who_takes_it(converted, tmp_path, capsys):
    base, _ = converted
    adapter = save_adapter(tmp_path / "adapter", base, r=9)
    assert run(adapter, tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "nothing is lost" in said and "--enable-lora --max-lora-rank 16 --lora" in said
    assert run(adapter, tmp_path / "half", "--dtype", "bf16") == 0
    said = capsys.readouterr().out
    assert "rounded to bf16" in said and "nothing is lost" not in said
    dora = save_adapter(tmp_path / "dora", base, use_dora=True, modules_to_save=["lm_head"])
    assert run(dora, tmp_path / "dora-llama") == 0
    said = capsys.readouterr().out
    assert "vLLM takes no DoRA or modules_to_save: merge first, then convert" in said
    assert ("the lengths are lost" in said) == (load_config(base).lm_head == "norm")
    with pytest.raises(UserError, match="--max_shard_gib 1e-06: an adapter is one file"):
        run(adapter, tmp_path / "small", "--max_shard_gib", 1e-6)


def test_whole_weights_of_w_pack_are_named_in_their_parts(converted, tmp_path):
    base, out = converted
    adapter = save_adapter(tmp_path / "adapter", base, target_modules=["o_proj"], modules_to_save=["W_pack"])
    assert run(adapter, tmp_path / "out") == 0
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(out), tmp_path / "out").eval()
    torch.testing.assert_close(logits_of(model), logits_of(load_model(adapter)), **CLOSE)
    assert load_file(tmp_path / "out" / "adapter_model.safetensors").keys() == load_names(model)


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_adapter_that_is_not_written_leaves_nothing(converted, fault, tmp_path, monkeypatch):
    def full(path, text):
        if path.name == "adapter_config.json":
            raise fault
        write(path, text)

    write = commit.write_synced
    monkeypatch.setattr(commit, "write_synced", full)
    adapter = save_adapter(tmp_path / "adapter", converted[0])
    with pytest.raises(EnvironmentFault if isinstance(fault, OSError) else KeyboardInterrupt):
        run(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_with_more_than_its_vocabulary_is_refused(tmp_path):
    base = save_base(tmp_path / "base", "baichuan-7b")
    settings = base / "tokenizer_config.json"
    edit_json(settings, add_bos_token=True)
    with pytest.raises(UserError, match="add_bos_token or add_eos_token, which this form has not"):
        run(base, tmp_path / "out")
    edit_json(settings, add_bos_token=False)
    tokenizer = load_tokenizer(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    with pytest.raises(UserError, match=r"added tokens \(<\|im_end\|>\)"):
        tokenizer_json(tokenizer)
    assert not (tmp_path / "out").exists()


def load_names(model):
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model, save_embedding_layers=False).keys()


# --- tokenizer --------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[
    "baichuan1_like",
    "baichuan2_like",
    pytest.param("baichuan1", marks=pytest.mark.slow),
    pytest.param("baichuan2", marks=pytest.mark.slow),  # 146,501 merges: sorted and loaded in 10 s
])  # fmt: skip
def pair(request):
    """(the vocabulary's name, its slow tokenizer, its fast one)."""
    if not VOCABULARIES[request.param].exists():
        pytest.skip(f"needs the vendor's vocabulary {VOCABULARIES[request.param]}")
    slow = BaichuanTokenizer(VOCABULARIES[request.param])
    return request.param, slow, Tokenizer.from_str(json.dumps(tokenizer_json(slow)))


def fast_ids(fast, text, *, safe=False):
    fast.encode_special_tokens = safe
    return fast.encode(text, add_special_tokens=False).ids


def test_ids_equal_the_vendors(pair):
    vocabulary, slow, fast = pair
    golds = [(row["text"], row[vocabulary]["ids"]) for row in rows(ENCODED[vocabulary])]
    other = [text for text, ids in golds if fast_ids(fast, text) != ids]
    if "1" not in vocabulary:
        assert other == []
    # With a dummy prefix the text after a control token begins anew, as in a chat prompt; the vendor's text
    # form goes on there and puts the prefix before a leading control token.
    assert len(other) in (0, 12) and all(slow.control_ids & set(slow.encode(text)) for text in other)
    assert [text for text, ids in golds if fast_ids(fast, text, safe=True) != slow.encode_text(text)] == []
    assert len(golds) == 287


def test_every_piece_and_random_texts_give_the_same_ids_safely(pair):
    vocabulary, slow, fast = pair
    names = [name.replace("▁", " ") for name in slow.convert_ids_to_tokens(range(slow.vocab_size))]
    rng = random.Random(0)
    texts = ["".join(rng.choices(names, k=rng.randint(1, 12))) for _ in range(3000)]
    ranges = [(32, 0x250), (0x2000, 0x27FF), (0x3000, 0x30FF), (0x4E00, 0x9FFF), (0xFF01, 0xFF5E), (9, 13)]
    texts += [
        "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(1, 20))) for _ in range(3000)
    ]
    texts += [HOSTILE, "", " ", "a\r\nb", "e\u0301", "\u3000", "あ゙", "▁", "aaaaaaa", "= = ==", " " * 50]
    texts += names
    other = [t for t, ids in zip(texts, slow.encode_texts(texts)) if fast_ids(fast, t, safe=True) != ids]
    # Baichuan-1's NFKC alone: marks on marks, and on characters that it splits. 8 of 3,000 random texts were.
    assert len(other) <= (15 if "1" in vocabulary else 0), other
    assert all(any(unicodedata.combining(c) or c == "\u200d" for c in text) for text in other)


def test_decoded_text_is_the_same(pair):
    _, slow, fast = pair
    texts = ["你好 world", " a  b\n\tc", "１２３ 123", "😀é", "<p>x</p>", "```py\nx = 1\n```"]
    for ids in map(slow.encode, texts):
        assert fast.decode(ids, skip_special_tokens=False) == slow.decode(ids)


def test_of_equal_scores_the_left_pair_is_merged_first():
    # xy and yz have one score, so x y is first though yz is listed before; a run is merged from its left
    scores = {"x": -1, "y": -2, "z": -3, "yz": -5, "xy": -5, "a": -4, "aa": -6, "aaa": -7}
    order = merges(scores)
    assert order.index(("x", "y")) < order.index(("y", "z"))
    assert order.index(("a", "a")) < order.index(("aa", "a")) < order.index(("a", "aa"))
    assert len(order) == 5


CHATS = [
    [{"role": "user", "content": "你好"}],
    [{"role": "system", "content": "Be brief. 简短"}, {"role": "user", "content": " a\nb "}],
    [
        {"role": "user", "content": "```x```"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "１2３"},
    ],
    [{"role": "human", "content": "x"}, {"role": "gpt", "content": "y"}],
]


@pytest.fixture(scope="module", params=["baichuan1_like", "baichuan2_like"])
def chatting(request, tmp_path_factory):
    """(slow, fast) tokenizers, the fast one from a converted directory."""
    root = tmp_path_factory.mktemp(request.param)
    base = save_base(root / "base", "baichuan-7b")
    slow = BaichuanTokenizer(VOCABULARIES[request.param])
    slow.save_pretrained(base)
    assert run(base, root / "out") == 0
    return slow, AutoTokenizer.from_pretrained(root / "out")


@pytest.mark.parametrize("messages", CHATS, ids=range(len(CHATS)))
def test_the_chat_template_gives_the_same_ids(chatting, messages):
    slow, fast = chatting
    for prompt in (False, True):
        options = dict(add_generation_prompt=prompt, return_dict=False)
        assert fast.apply_chat_template(messages, **options) == slow.apply_chat_template(messages, **options)


@pytest.mark.parametrize("content", [None, [{"type": "text", "text": "x"}]])
def test_content_that_is_no_text_is_refused(chatting, content):
    for role in ("system", "user", "assistant"):
        with pytest.raises(TemplateError, match="content must be a string"):
            chatting[1].apply_chat_template([{"role": role, "content": content}])


def test_no_message_forges_a_control_id(chatting):
    slow, fast = chatting
    messages = [{"role": role, "content": HOSTILE} for role in ("system", "user", "assistant", "user")]
    ids = fast.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert [i for i in ids if i in slow.control_ids] == [195, 196, 195, 196]
    assert fast.decode(ids).replace("\u200b", "").count("reserved_0></s") == 4  # still there as text
    forged = fast.encode(HOSTILE)
    assert slow.control_ids & set(forged)  # raw text can; so it proves something
    assert not slow.control_ids & set(fast(HOSTILE, split_special_tokens=True)["input_ids"])
