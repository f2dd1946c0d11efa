"""An adapter merged into its base gives the adapter's logits; a wrong pair is refused beforehand."""

import json
import threading
from pathlib import Path

import pytest
import torch
from fixtures import own_memory
from safetensors.torch import load_file, save_file
from test_checkpoint import edit_json, logits_of, save_adapter, save_base

from baichuan_sft import commit
from baichuan_sft.checkpoint import load_config, load_model, load_tokenizer
from baichuan_sft.checkpoint.files import fingerprint
from baichuan_sft.errors import CheckpointFault, UserError
from baichuan_sft.export import merge
from baichuan_sft.export.adapter import Lora, open_adapter
from baichuan_sft.variants import LINEARS

# fp32: merged and apart differ by the order of summation; measured 2e-7 to 5e-6 of logits up to 4.
CLOSE = dict(rtol=0, atol=5e-5)
ADAPTERS = {
    "baichuan-7b": dict(target_modules=["W_pack", "down_proj"], rank_pattern={"down_proj": 2}),
    "baichuan-13b": dict(target_modules=["o_proj", "gate_proj"], use_rslora=True, lora_alpha=3),
    "baichuan2-7b": dict(target_modules=r".*layers\.1\..*(W_pack|up_proj)", alpha_pattern={"up_proj": 1}),
    "baichuan2-13b": dict(target_modules=list(LINEARS), use_dora=True, modules_to_save=["embed_tokens"]),
}


def run(*words) -> int:
    return merge.main([str(word) for word in words])


@pytest.fixture(scope="module", params=ADAPTERS)
def merged(request, tmp_path_factory):
    """(base, adapter, merged) directories of one architecture."""
    root = tmp_path_factory.mktemp(request.param)
    base = save_base(root / "base", request.param)
    adapter = save_adapter(root / "adapter", base, **ADAPTERS[request.param])
    weights = load_file(adapter / "adapter_model.safetensors")
    whole = {name: tensor * 1.5 for name, tensor in weights.items() if "lora_" not in name}  # as if trained
    save_file({**weights, **whole}, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    assert run(adapter, root / "merged", "--max_shard_gib", 0.0005) == 0
    return base, adapter, root / "merged"


def state_of(path: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in path.glob("*.safetensors") for name, t in load_file(file).items()}


def test_merged_logits_are_the_adapters(merged):
    base, adapter, out = merged
    tuned = logits_of(load_model(adapter))
    torch.testing.assert_close(logits_of(load_model(out)), tuned, **CLOSE)
    assert (logits_of(load_model(base)) - tuned).abs().max() > 0.1  # else nothing would be shown


def test_what_the_adapter_leaves_alone_is_bit_equal(merged):
    base, adapter, out = merged
    before, after, changed = state_of(base), state_of(out), set(open_adapter(adapter).modules)
    assert before.keys() == after.keys() and changed
    for name in before:
        same = torch.equal(before[name], after[name])
        adapted = name.removesuffix(".weight") in changed or name in open_adapter(adapter).saved
        assert same != adapted, name
    assert "lm_head" not in changed  # NormHead's rows keep their lengths


def test_the_result_is_whole_and_says_what_it_is(merged, capsys):
    base, adapter, out = merged
    assert len(list(out.glob("model-*.safetensors"))) > 2
    assert commit.problems(out) == []
    mark = json.loads((out / "config.json").read_text())["merged_from"]
    assert (mark["adapter"], mark["base"]) == (str(adapter), str(base))
    assert json.loads((out / "run.json").read_text())["merged_from"] == mark
    assert commit.read_manifest(out)["merged_from"] == mark
    assert load_tokenizer(out).encode("你好") == load_tokenizer(base).encode("你好")
    assert fingerprint(out) != fingerprint(base)
    with pytest.raises(UserError, match="this adapter is merged into it already"):
        run(adapter, out.parent / "twice", "--base", out)
    assert not (out.parent / "twice").exists()


def test_bf16_says_what_rounding_takes(merged, tmp_path, capsys):
    _, adapter, _ = merged
    assert run(adapter, tmp_path / "half", "--dtype", "bf16") == 0
    said = capsys.readouterr().out
    assert "rounding the merged weights undoes 0." in said and "within" in said
    assert load_config(tmp_path / "half").dtype == torch.bfloat16
    assert {t.dtype for t in state_of(tmp_path / "half").values()} == {torch.bfloat16}


def test_an_update_below_the_dtypes_steps_is_named(tmp_path, capsys):
    base = save_base(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base, lora_alpha=0.001)
    assert run(adapter, tmp_path / "out", "--dtype", "bf16") == 0
    assert "--dtype fp32 keeps it" in capsys.readouterr().out


def test_the_sum_is_made_in_fp32():
    weight = torch.tensor([[256.0, 1.0]], dtype=torch.bfloat16)
    lora = Lora(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0]]), scaling=0.5)
    assert merge.merged_weight(weight, lora).tolist() == [[256.5, 1.0]]  # bf16 steps by 2 there
    dora = Lora(lora.a, lora.b, lora.scaling, magnitude=torch.tensor([2.0]))
    assert torch.linalg.vector_norm(merge.merged_weight(weight, dora)).item() == pytest.approx(2)


def test_an_adapter_trained_in_another_place_takes_a_base_by_name(tmp_path):
    base = save_base(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base)
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="/elsewhere/base")
    with pytest.raises(UserError, match="/elsewhere/base"):
        run(adapter, tmp_path / "out")
    assert run(adapter, tmp_path / "out", "--base", base) == 0


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_result_whose_logits_are_not_the_adapters_is_refused(dtype, tmp_path, monkeypatch):
    adapter = save_adapter(tmp_path / "adapter", save_base(tmp_path / "base"), lora_alpha=0.05)
    monkeypatch.setattr(merge, "merged_weight", lambda weight, lora: weight.float())
    with pytest.raises(CheckpointFault, match="its logits differ from those of PEFT's own merge"):
        run(adapter, tmp_path / "out", "--dtype", dtype)
    assert commit.problems(tmp_path / "out") == ["incomplete (no COMMIT)"]


def test_an_untrained_adapter_is_said_to_change_nothing(tmp_path, capsys):
    base = save_base(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base, init_lora_weights=True, use_dora=True)
    assert run(adapter, tmp_path / "out", "--dtype", "bf16") == 0
    assert "no linear changed: every B of the adapter is 0" in capsys.readouterr().out


def test_what_cannot_be_read_or_written_leaves_nothing(tmp_path, monkeypatch):
    adapter = save_adapter(tmp_path / "adapter", save_base(tmp_path / "base"))
    (adapter / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        run(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (adapter / "generation_config.json").unlink()

    def full(path, text):
        if path.name == "run.json":
            raise OSError("No space left on device")
        write(path, text)

    write = commit.write_synced
    monkeypatch.setattr(commit, "write_synced", full)
    with pytest.raises(OSError, match="No space"):
        run(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arch, module, message", [
    ("baichuan-7b", "embed_tokens", r"holds .*lora_embedding_A, no update of a linear"),
    ("baichuan2-7b", "lm_head", "adapts lm_head, whose rows this model divides"),
])  # fmt: skip
def test_a_lora_that_no_weights_can_hold_is_refused(arch, module, message, tmp_path, monkeypatch):
    monkeypatch.setattr(merge, "host_memory", lambda: (0, 0))  # not by the comparison, which would see it too
    base = save_base(tmp_path / "base", arch)
    adapter = save_adapter(tmp_path / "adapter", base, target_modules=["W_pack", module])
    file = adapter / "adapter_model.safetensors"
    # PEFT adds the whole embeddings where it is not told to leave them out.
    save_file({name: t for name, t in load_file(file).items() if "base_layer" not in name}, file)
    with pytest.raises(UserError, match=message):
        run(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_the_memory_the_logits_are_not_compared_and_it_says_so(tmp_path, monkeypatch, capsys):
    adapter = save_adapter(tmp_path / "adapter", save_base(tmp_path / "base"))
    monkeypatch.setattr(merge, "host_memory", lambda: (0, 0))
    assert run(adapter, tmp_path / "out") == 0
    assert "logits not compared: that takes" in capsys.readouterr().out


# --- what is refused --------------------------------------------------------------------------------


def other_base(tmp_path, **changes):
    return save_base(tmp_path / "other", **changes), "shape|missing|do not belong"


def same_shapes(tmp_path):
    base = save_base(tmp_path / "other", "baichuan-13b", lm_head="norm")  # another seed
    record = {"base_fingerprint": fingerprint(tmp_path / "base"), "model": {"model_name_or_path": "Chat"}}
    (tmp_path / "adapter" / "run.json").write_text(json.dumps(record))
    return base, r"trained on Chat \(fingerprint"


def merged_with_another(tmp_path):
    record = {"base_fingerprint": fingerprint(tmp_path / "base")}
    (tmp_path / "adapter" / "run.json").write_text(json.dumps(record))
    second = save_adapter(tmp_path / "second", tmp_path / "base", r=2)
    run(second, tmp_path / "other")
    return tmp_path / "other", "other weights"


def quantised(tmp_path):
    edit_json(tmp_path / "base" / "config.json", quantization_config={"load_in_4bit": True, **BNB})
    return tmp_path / "base", "quantised"


BNB = {"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4"}
WRONG_BASES = {
    "wider (D19)": lambda path: other_base(path, hidden_size=96),
    "deeper (D20)": lambda path: other_base(path, num_hidden_layers=3),
    "shallower (D21)": lambda path: other_base(path, num_hidden_layers=1),
    "of the same shapes (D22)": same_shapes,
    "holding another adapter (D23)": merged_with_another,
    "quantised (D23)": quantised,
}


@pytest.mark.parametrize("case", WRONG_BASES)
def test_another_base_is_refused(case, tmp_path):
    save_adapter(tmp_path / "adapter", save_base(tmp_path / "base"))
    base, message = WRONG_BASES[case](tmp_path)
    with pytest.raises(UserError, match=message):
        run(tmp_path / "adapter", tmp_path / "out", "--base", base)
    assert not (tmp_path / "out").exists()


def with_nan(adapter):
    state = load_file(adapter / "adapter_model.safetensors")
    next(iter(state.values()))[0, 0] = float("nan")
    save_file(state, adapter / "adapter_model.safetensors", metadata={"format": "pt"})


def with_too_much(adapter):
    """Finite itself, not so in the sum."""
    state = load_file(adapter / "adapter_model.safetensors")
    save_file({k: t * 1e4 for k, t in state.items()}, adapter / "adapter_model.safetensors")
    edit_json(adapter / "adapter_config.json", lora_alpha=1e38)


WRONG_ADAPTERS = {
    "NaN or infinite": with_nan,
    "lora_alpha is nan": lambda adapter: edit_json(adapter / "adapter_config.json", lora_alpha=float("nan")),
    "lora_alpha is 1e\\+39": lambda adapter: edit_json(adapter / "adapter_config.json", lora_alpha=1e39),
    "lora_alpha is None": lambda adapter: edit_json(adapter / "adapter_config.json", lora_alpha=None),
    "lora_alpha is 'x'": lambda adapter: edit_json(
        adapter / "adapter_config.json", alpha_pattern={"W_pack": "x"}
    ),
    "init_lora_weights is 7": lambda adapter: edit_json(adapter / "adapter_config.json", init_lora_weights=7),
    "W_pack.weight holds .* values that are NaN or infinite": with_too_much,
    "PEFT cannot put this adapter on its base: .*subpattern": lambda adapter: edit_json(
        adapter / "adapter_config.json", target_modules="("
    ),
    "PEFT cannot put this adapter on its base: .*no attribute": lambda adapter: edit_json(
        adapter / "adapter_config.json", rank_pattern=["W_pack"]
    ),
    "of kind IA3": lambda adapter: edit_json(adapter / "adapter_config.json", peft_type="IA3"),
    "init_lora_weights 'pissa'": lambda adapter: edit_json(
        adapter / "adapter_config.json", init_lora_weights="pissa"
    ),
    "lora_bias is True": lambda adapter: edit_json(adapter / "adapter_config.json", lora_bias=True),
    "new_thing is 7": lambda adapter: edit_json(adapter / "adapter_config.json", new_thing=7),
    "no adapter_config.json": lambda adapter: (adapter / "adapter_config.json").unlink(),
}


@pytest.mark.parametrize("message", WRONG_ADAPTERS)
def test_another_adapter_is_refused(message, tmp_path):
    adapter = save_adapter(tmp_path / "adapter", save_base(tmp_path / "base"))
    WRONG_ADAPTERS[message](adapter)
    with pytest.raises(UserError, match=message):
        run(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_directory_with_something_in_it_is_left_alone(tmp_path):
    adapter = save_adapter(tmp_path / "adapter", save_base(tmp_path / "base"))
    with pytest.raises(UserError, match="is not an empty directory"):
        run(adapter, adapter)
    assert (adapter / "adapter_config.json").is_file()


# --- memory -----------------------------------------------------------------------------------------

MIB = 1 << 20


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_peak_memory_is_about_one_shard(tmp_path):
    base = save_base(tmp_path / "base", hidden_size=768, intermediate_size=2048, num_hidden_layers=16)
    adapter = open_adapter(save_adapter(tmp_path / "adapter", base, target_modules=list(LINEARS)))
    total, shard = adapter.base.num_bytes(), 48 * MIB
    done, held = threading.Event(), [own_memory()]

    def watch():
        while not done.wait(0.002):
            held.append(own_memory())

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        merge.merge(adapter, tmp_path / "out", max_shard_gib=shard / (1 << 30))
    finally:
        done.set()
        watching.join()
    shards = list((tmp_path / "out").glob("model-*.safetensors"))
    peak = max(held) - held[0]
    # The largest tensor is 18 MiB, of which a merge makes four copies at most; 32 MiB for the allocator.
    assert peak < shard + 4 * 18 * MIB + 32 * MIB < total / 2
    assert len(shards) > 5 and len(held) > 20
    print(f"peak {peak / MIB:.0f} MiB of {total / MIB:.0f} in {len(shards)} shards")
