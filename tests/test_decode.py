"""Decoding with a static cache and compiled: the same tokens; the decode benchmark; memory by counting."""

import io
import re
import sys

import pytest
import torch
from fixtures import ARCHES, ROOT, SMALL_VOCABULARY, tiny_config
from transformers import CompileConfig, StaticCache

from baichuan_sft.checkpoint import load_model, load_tokenizer
from baichuan_sft.errors import EnvironmentFault, UserError
from baichuan_sft.infer import chat, terminal
from baichuan_sft.model.modeling_baichuan import BaichuanForCausalLM

sys.path.insert(0, str(ROOT))

from benchmarks import decode

HELLO = [{"role": "user", "content": "你好"}]
LENGTHS = (5, 17)  # prompts; with 40 new tokens the cache is used well past its first half
NEW = 40


def model_of(arch):
    torch.manual_seed(0)
    return BaichuanForCausalLM(tiny_config(arch)).eval().requires_grad_(False)


def greedy(model, length, **options):
    torch.manual_seed(length)
    prompt = torch.randint(300, 6000, (1, length))
    options = (
        dict(do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW, eos_token_id=2, pad_token_id=0)
        | options
    )
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    return out[0, length:].tolist()


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    path = tmp_path_factory.mktemp("nano")
    model_of("baichuan2-7b").save_pretrained(path)
    load_tokenizer(SMALL_VOCABULARY).save_pretrained(path)
    return path


# --- the same tokens --------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHES)
def test_a_static_cache_gives_the_tokens_of_a_growing_one(arch):
    model = model_of(arch)
    cache = StaticCache(config=model.config, max_cache_len=model.config.context_length)
    for length in LENGTHS:
        growing = greedy(model, length)
        assert len(growing) == NEW and len(set(growing)) > 1
        assert greedy(model, length, cache_implementation="static") == growing
        cache.reset()  # what an earlier conversation left must not be seen
        assert greedy(model, length, past_key_values=cache) == growing


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHES)
def test_the_compiled_step_is_one_graph_and_gives_the_same_tokens(arch):
    """What transformers runs on a GPU, with another backend: the graph is captured, no kernel is compiled."""
    torch._dynamo.reset()
    model, graphs = model_of(arch), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    config._compile_all_devices = True  # transformers leaves a CPU uncompiled otherwise
    cache = StaticCache(config=model.config, max_cache_len=model.config.context_length)
    for length in LENGTHS:
        cache.reset()
        compiled = greedy(model, length, past_key_values=cache, compile_config=config)
        assert compiled == greedy(model, length)
    assert len(graphs) == 1  # a second prompt, of another length, is not compiled anew


@pytest.mark.parametrize("arch", ["baichuan-13b", "baichuan2-13b"])
def test_alibi_is_one_row_while_decoding(arch, monkeypatch):
    """The bias of one new token is (1, N, 1, S): heads times keys, never queries times keys."""
    from baichuan_sft.model import modeling_baichuan as modeling

    shapes, original = [], modeling.attention_bias

    def seen(*args, **kwargs):
        bias = original(*args, **kwargs)
        shapes.append(tuple(bias.shape))
        return bias

    monkeypatch.setattr(modeling, "attention_bias", seen)
    model = model_of(arch)
    greedy(model, 9, max_new_tokens=4, min_new_tokens=4, cache_implementation="static")
    heads = model.config.num_attention_heads
    assert len(shapes) == 4
    assert all(shape[-3:] == (heads, 1, shapes[0][-1]) for shape in shapes[1:])


# --- chat -------------------------------------------------------------------------------------------


def test_a_conversation_with_a_static_cache_is_the_same(nano, monkeypatch, capsys):
    """The way that --compile takes, on a CPU, where nothing is compiled: each answer begins with a reset."""
    model, tokenizer = load_model(nano), load_tokenizer(nano)
    told = []
    for options in ({}, {"past_key_values": chat.static_cache(model)}):
        talk = terminal.Conversation(model, tokenizer, dict(do_sample=False, max_new_tokens=12) | options)
        monkeypatch.setattr(sys, "stdin", io.StringIO("你好\n再见\n你是谁\n"))
        assert terminal.converse(talk) == 0
        assert len(talk.messages) == 6
        told.append((talk.messages, capsys.readouterr().out))
    assert told[0] == told[1]


def test_ctrl_c_keeps_what_a_static_cache_had_generated(nano, monkeypatch, capsys):
    model = load_model(nano)
    options = dict(do_sample=False, max_new_tokens=12, past_key_values=chat.static_cache(model))
    talk = terminal.Conversation(model, load_tokenizer(nano), options)
    forward, calls = model.forward, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", interrupted)
        terminal.answer(talk, "你好")
    partial = talk.messages[-1]["content"]
    talk.messages.clear()
    terminal.answer(talk, "你好")  # the cache that was left in the middle is reset
    whole = talk.messages[-1]["content"]
    assert whole == model.chat(talk.tokenizer, HELLO, do_sample=False, max_new_tokens=12)
    assert partial and whole.startswith(partial) and len(partial) < len(whole)


def test_what_cannot_be_compiled_is_refused(nano):
    with pytest.raises(EnvironmentFault, match="--compile: transformers compiles on GPUs only"):
        terminal.main([str(nano), "--compile", "--device", "cpu"])
    with pytest.raises(UserError, match="--compile and --quantize nf4 are both given"):
        terminal.main([str(nano), "--compile", "--quantize", "nf4"])


def test_the_loaded_models_norms_are_kept(nano):
    model, _ = chat.load(chat.build_parser().parse_args([str(nano), "--device", "cpu"]))
    weight = model.lm_head.weight
    assert not any(p.requires_grad for p in model.parameters())
    assert model.lm_head.inverse_norms(weight) is model.lm_head.inverse_norms(weight)


# --- the benchmark ----------------------------------------------------------------------------------


def test_the_benchmark_runs_every_contestant(capsys, tmp_path):
    pytest.importorskip("bitsandbytes")
    rates = decode.main([*"--tokens 4 --context 8 --rounds 2 --plot".split(), str(tmp_path / "plot.png")])
    assert list(rates) == list(decode.CONTESTANTS)
    assert all(len(of) == 2 and min(of) > 0 for of in rates.values())
    out = capsys.readouterr().out
    for name in decode.CONTESTANTS:
        assert re.search(rf"^\| {name} \((rope|alibi)\) \| [\d.]+ \(", out, re.MULTILINE), name
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_contestants_decode_the_same_conversation():
    args = decode.arguments(
        "--tokens 6 --context 12 --contestants eager,static,eager-other,static-other".split()
    )
    decoders = decode.contestants(args)
    for decoder in decoders.values():
        assert decoder() > 0 and decoder() > 0  # the second turn with a cache that was used
        assert len(decoder.ids) == 6
    assert decoders["eager"].ids == decoders["static"].ids
    assert decoders["eager-other"].ids == decoders["static-other"].ids
    one, other = decoders["eager"].model, decoders["eager-other"].model
    assert one.lm_head.weight is other.lm_head.weight  # not copied
    assert (one.config.position_embedding, other.config.position_embedding) == ("rope", "alibi")
    ids = torch.arange(16)[None]
    assert not torch.allclose(one(ids).logits, other(ids).logits)


def test_rate_counts_the_steps_after_the_first_token():
    clock = decode.Clock(iter([0.0, 10.0, 10.5, 11.0]).__next__)
    for _ in range(4):
        clock.put(torch.zeros(1))
    assert clock.rate() == 2.0  # two tokens in a second; neither the prompt nor the first token


def test_bytes_read_per_token_by_hand():
    (eager, static) = decode.contestants(
        decode.arguments("--tokens 4 --context 8 --contestants eager,static".split())
    ).values()
    vocabulary, width, inner, layers = 512, 64, 128, 2
    body = layers * (4 * width * width + 3 * width * inner + 2 * width) + width
    weights = 4 * (body + vocabulary * width)  # fp32, without the embedding
    assert eager.bytes_per_token() == weights + 4 * 2 * layers * width * (8 + 4 / 2)
    assert static.bytes_per_token() == weights + 4 * 2 * layers * width * (8 + 4)


def test_memory_of_the_large_models_is_what_the_vendor_published():
    """GiB of weights; the vendor measured whole processes, so 13B in int8 is the one it exceeds by more."""
    gib = {
        model: {
            kind: decode.expected_bytes(decode.BaichuanConfig(**decode.MODELS[model]), kind) / 2**30
            for kind in of
        }
        for model, of in decode.PUBLISHED.items()
    }
    for model, of in decode.PUBLISHED.items():
        for kind, published in of.items():
            # 14 % less at most: the vendor's figures hold a context and, for 13B in int8, more than weights
            assert 0.86 * published < gib[model][kind] <= published, (model, kind)
    assert gib["7b"]["bf16"] == pytest.approx(13.98, abs=0.01)
