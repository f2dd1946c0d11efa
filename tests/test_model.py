"""The model's parts against recorded numbers, and the invariants that a packed, padded, cached or
checkpointed run must share with the plain one.

fp32 tolerances: two orders of summation over the tiny models' widths differ by about 1e-6 in logits of
order 1; 2e-5 leaves room for both attention kernels and a few layers.
"""

import contextlib
import json
import math
import weakref

import pytest
import torch
from fixtures import ARCHES, GOLDEN, MODELS, SHARED, golden, golden_model, tiny_config
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import DynamicCache, StaticCache

from baichuan_sft.model import modeling_baichuan
from baichuan_sft.model.attention_baichuan import (
    alibi_slopes,
    attention_bias,
    rope_angles,
    segments_from_positions,
)
from baichuan_sft.model.configuration_baichuan import BaiChuanConfig, BaichuanConfig
from baichuan_sft.model.elementwise_baichuan import split_and_rotate
from baichuan_sft.model.head_baichuan import BaichuanHead, causal_lm_loss
from baichuan_sft.model.modeling_baichuan import BaichuanForCausalLM, BaichuanRMSNorm
from baichuan_sft.variants import VARIANTS

FP32 = 2e-5
GRAD = 1e-5
HALF_DTYPES = [torch.bfloat16, torch.float16]
SMALL = [f"{arch}/a" for arch in ARCHES]


@pytest.fixture(params=["eager", "sdpa"])
def attn(request):
    return request.param


def gap(ours, reference):
    return (ours.double() - reference.double()).abs().max().item()


def assert_no_worse_than(ours, reference, truth, slack):
    """``ours`` may miss fp64 ``truth`` by what ``reference`` misses it by, plus ``slack``."""
    budget = (reference.double() - truth).abs() + slack
    excess = ((ours.double() - truth).abs() - budget).max().item()
    assert excess <= 0, f"worse than the reference's own rounding by {excess:.3e} (slack {slack:.0e})"


def sample(model, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, model.config.vocab_size, shape, generator=generator)


def last_rounding(truth, dtype):
    """Half of the last place of the largest entry: what any result of this dtype may miss."""
    return truth.abs().max().item() * torch.finfo(dtype).eps


# --- parts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [8, 16, 128])
@pytest.mark.parametrize("version", ["b1", "b2"])
def test_rope_tables(head_dim, version):
    gold = load_file(GOLDEN / "misc" / "rope.safetensors")
    positions = gold["positions"].long()
    assert positions.max() == 4095  # which bf16 would round to 4096
    cos, sin = rope_angles(positions[None], head_dim)
    angles = positions.double()[:, None] / 10000.0 ** (torch.arange(0, head_dim, 2).double() / head_dim)
    for ours, name, exact in ((cos, "cos", angles.cos()), (sin, "sin", angles.sin())):
        reference = gold[f"{version}_{name}_{head_dim}"]
        # An fp32 angle of p has an error of p * 2**-24, so two fp32 tables differ by as much.
        slack = positions.max().item() * 2.0**-23
        ours = ours[0, :, 0, 0].repeat(1, 2)
        assert gap(ours, reference) <= slack
        assert_no_worse_than(ours, reference, torch.cat((exact, exact), dim=-1), slack)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES], ids=str)
@pytest.mark.parametrize("version", ["b1", "b2"])
def test_rotation_rounds_no_worse_than_the_vendor(dtype, version):
    gold = load_file(GOLDEN / "misc" / "rope.safetensors")
    cos, sin = rope_angles(gold["position_ids"].long(), gold["q"].shape[-1])
    qkv = torch.stack([gold[name].to(dtype).transpose(1, 2) for name in "qkk"], dim=2)  # (B, T, 3, N, H)
    *rotated, value = split_and_rotate(qkv, cos, sin)
    assert torch.equal(value, gold["k"].to(dtype))
    wide_cos, wide_sin = (x.double()[:, None, :, 0, 0].repeat(1, 1, 1, 2) for x in (cos, sin))
    for name, ours in zip("qk", rotated):
        x = gold[name].to(dtype)
        first, second = x.double().chunk(2, dim=-1)
        truth = x.double() * wide_cos + torch.cat((-second, first), dim=-1) * wide_sin
        assert ours.dtype == dtype
        reference = gold[f"{version}_{name}_{str(dtype).removeprefix('torch.')}"]
        assert_no_worse_than(ours, reference, truth, last_rounding(truth, dtype))


def test_alibi_slopes():
    gold = json.loads((GOLDEN / "misc" / "alibi_slopes.json").read_text())
    assert {"1", "32", "40", "64"} <= gold.keys()
    for num_heads, slopes in gold.items():
        assert gap(alibi_slopes(int(num_heads)), torch.tensor(slopes, dtype=torch.float64)) < 1e-7  # fp32


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES], ids=str)
def test_rms_norm(dtype):
    gold = load_file(GOLDEN / "misc" / "norm_head_loss.safetensors")
    norm = BaichuanRMSNorm(32, 1e-6)
    norm.weight.data.copy_(gold["w"])
    ours = norm.to(dtype)(gold["x"].to(dtype))
    x, w = gold["x"].to(dtype).double(), gold["w"].to(dtype).double()
    truth = w * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    reference = gold[f"rmsnorm_{str(dtype).removeprefix('torch.')}"]
    assert ours.dtype == reference.dtype == dtype
    assert_no_worse_than(ours, reference, truth, 1e-6 if dtype == torch.float32 else 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_norm_head(dtype, mode):
    gold = load_file(GOLDEN / "misc" / "norm_head_loss.safetensors")
    w, h = gold["normhead_w"].to(dtype), gold["normhead_h"].to(dtype)
    head = BaichuanHead(32, 24, normalize=True).train(mode == "train")
    head.weight.data = w.clone()
    truth = h.double() @ F.normalize(w.double(), dim=1).T
    reference = gold[f"normhead_{mode}_{str(dtype).removeprefix('torch.')}"]
    assert_no_worse_than(head(h), reference, truth, 2 * last_rounding(truth, dtype))
    assert torch.equal(head.weight, w)


def test_loss_and_z_loss_of_the_vendor():
    gold = load_file(GOLDEN / "misc" / "norm_head_loss.safetensors")
    logits = gold["loss_logits"]
    identity = torch.eye(logits.shape[-1])  # a head that hands its input on
    labels = gold["loss_labels"].long()
    assert (labels == -100).any()
    loss = causal_lm_loss(logits, identity, labels, inverse_norms=None)
    assert gap(loss, gold["loss_ce"]) < 1e-6
    total = causal_lm_loss(logits, identity, labels, inverse_norms=None, z_loss_weight=2e-4)
    assert gap(total, gold["loss_total_zw_2e-4"]) < 1e-6
    assert gap((total - loss) / 2e-4, gold["loss_max_z_mean"]) < 1e-2  # a difference of 1e-3 of fp32 losses


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES], ids=str)
def test_alibi_keeps_locality_at_long_range(dtype):
    """With equal scores the newest key weighs 1 - exp(-slope), also here; in the vendor's bf16 0.07."""
    config = tiny_config("baichuan-13b", hidden_size=40, num_attention_heads=40)
    position = torch.tensor([4095])
    hidden = torch.zeros(1, 1, 40, dtype=dtype)
    bias = attention_bias(config, hidden, None, None, position, 4096, dtype)
    assert bias.dtype == dtype
    exact = 1 - math.exp(-alibi_slopes(40)[0].item())
    weight = bias.float().softmax(dim=-1)[0, 0, 0, -1].item()
    assert abs(exact - 0.5687) < 1e-4 and abs(weight - exact) < 2e-3  # bf16 rounds the slope by 1 in 512
    query = torch.zeros(1, 40, 1, 8, dtype=dtype)
    key, value = torch.zeros(2, 1, 40, 4096, 8, dtype=dtype)
    value[..., -1, :] = 1
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    assert abs(out[0, 0, 0, 0].item() - exact) < 5e-3  # and the result once more


def test_segments_from_positions():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 0, 1, 2, 3], [1, 1, 1, 0, 1, 2, 3, 4, 5, 6]])
    expected = torch.tensor([[1, 1, 1, 2, 2, 3, 4, 4, 4, 4], [1, 2, 3, 4, 4, 4, 4, 4, 4, 4]])
    assert torch.equal(segments_from_positions(positions), expected)


# --- building and loading -------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHES)
def test_fresh_weights(arch):
    model = BaichuanForCausalLM(tiny_config(arch))
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        if "norm" in name:
            assert (parameter == 1).all(), name
        elif name == "lm_head.weight" and model.lm_head.normalize:
            bound = model.config.hidden_size**-0.5
            assert 0.99 * bound < parameter.abs().max() <= bound
        else:
            # 5 % covers the sampling error of 9216 normal numbers, the fewest here, six times over.
            assert abs(parameter.std() / 0.02 - 1) < 0.05, name
    assert not model.model.embed_tokens.weight[0].any()


@pytest.mark.parametrize("name", SMALL)
def test_loading_leaves_nothing_uninitialised(name):
    model = golden_model(name)
    with torch.device("meta"):
        assert {p.device.type for p in BaichuanForCausalLM(model.config).parameters()} == {"meta"}
    # Nothing derived is stored, so everything there is comes from the file.
    assert list(model.buffers()) == []
    stored = load_file(golden(name).path / "model.safetensors")
    loaded = model.state_dict()
    assert len(loaded) > 10 and loaded.keys() == {key for key in stored if "inv_freq" not in key}
    assert all(torch.equal(loaded[key], stored[key].float()) for key in loaded)


@pytest.mark.parametrize("name", SMALL)
def test_device_map_and_offload(name, tmp_path):
    gold, plain = golden(name), golden_model(name)
    assert type(plain.model.layers[0]).__name__ in plain._no_split_modules
    split = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.norm": "cpu"}
    split |= {"model.layers.1": "disk", "lm_head": "disk"}
    with torch.no_grad():
        expected = plain(gold["nopad/input_ids"], labels=gold["nopad/labels"])
        for device_map in ({"": "cpu"}, "auto", split):
            model = BaichuanForCausalLM.from_pretrained(
                gold.path, dtype=torch.float32, device_map=device_map, offload_folder=tmp_path
            )
            out = model(gold["nopad/input_ids"], labels=gold["nopad/labels"])
            assert gap(out.logits, expected.logits) < FP32 and gap(out.loss, expected.loss) < FP32
    assert model.lm_head.weight.is_meta and not model.model.norm.weight.is_meta


# --- configuration --------------------------------------------------------------------------------

_COMMON = dict(
    model_type="baichuan",
    hidden_act="silu",
    rms_norm_eps=1e-6,
    initializer_range=0.02,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    tie_word_embeddings=False,
    use_cache=True,
    torch_dtype="bfloat16",
    transformers_version="4.29.2",
)
VENDOR_FACTS = {
    "baichuan-7b": dict(
        vocab_size=64000,
        max_position_embeddings=4096,
        architectures=["BaiChuanForCausalLM"],
        auto_map={"AutoConfig": "configuration_baichuan.BaiChuanConfig"},
    ),
    "baichuan-13b": dict(vocab_size=64000, model_max_length=4096, gradient_checkpointing=[False]),
    "baichuan2-7b": dict(vocab_size=125696, max_position_embeddings=4096, model_max_length=4096),
    "baichuan2-13b": dict(vocab_size=125696, model_max_length=4096),
}
KINDS = {
    "baichuan-7b": ("rope", "plain"),
    "baichuan-13b": ("alibi", "plain"),
    "baichuan2-7b": ("rope", "norm"),
    "baichuan2-13b": ("alibi", "norm"),
}


@pytest.mark.parametrize("arch", ARCHES)
def test_vendor_config_loads_unchanged(arch, tmp_path):
    facts = {**_COMMON, **VARIANTS[arch].config, **VENDOR_FACTS[arch]}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    config = BaichuanConfig.from_pretrained(tmp_path)
    assert (config.position_embedding, config.lm_head) == KINDS[arch]
    assert config.context_length == 4096 and config.z_loss_weight == 0
    assert config.dtype == torch.bfloat16
    for name in ("max_position_embeddings", "model_max_length"):
        assert getattr(config, name, None) == facts.get(name)
    config.save_pretrained(tmp_path / "again")
    again = BaichuanConfig.from_pretrained(tmp_path / "again")
    assert again.to_dict() == config.to_dict()
    assert (
        json.loads((tmp_path / "again" / "config.json").read_text())["position_embedding"] == KINDS[arch][0]
    )


@pytest.mark.parametrize("arch", VARIANTS)
def test_variant_has_the_vendors_number_of_parameters(arch):
    variant = VARIANTS[arch]
    config = BaichuanConfig(**variant.config)
    assert (config.position_embedding, config.lm_head) == KINDS[arch]
    with torch.device("meta"):
        model = BaichuanForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == variant.num_parameters


@pytest.mark.parametrize("name, kind", [("Baichuan-13B-Chat", "plain"), ("Baichuan2-13B-Chat", "norm")])
def test_vendor_config_verbatim(name, kind):
    path = SHARED / "reference" / "vendor-configs" / name
    if not path.is_dir():
        pytest.skip(f"needs the vendor's files in {path}")
    config = BaichuanConfig.from_pretrained(path)
    assert (config.position_embedding, config.lm_head, config.hidden_size) == ("alibi", kind, 5120)


SHAPE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(vocab_size=None), "has no vocab_size"),
        (dict(vocab_size="64000"), "vocab_size is '64000'; it must be a positive integer"),
        (dict(vocab_size=151936), "vocab_size is 151936, Baichuan has 64000 and Baichuan2 125696"),
        (dict(max_position_embeddings=None), "neither max_position_embeddings .* nor model_max_length"),
        (dict(max_position_embeddings=None, position_embedding="rope"), "neither max_position_embeddings"),
        (dict(position_embedding="rotary"), "position_embedding is 'rotary'; .* 'rope' or 'alibi'"),
        (dict(lm_head="tied"), "lm_head is 'tied'; .* 'plain' or 'norm'"),
        (dict(hidden_act="gelu"), "hidden_act is 'gelu'"),
        (dict(tie_word_embeddings=True), "tie_word_embeddings is True"),
        (dict(num_attention_heads=5), "hidden_size 32 is not a multiple of num_attention_heads 5"),
        (dict(num_hidden_layers=0), "num_hidden_layers is 0"),
        (dict(pad_token_id=64000), "pad_token_id is 64000; it must be below vocab_size 64000"),
        (dict(rope_scaling={"type": "dynamic", "factor": 2.0}), "rope_scaling is .*'dynamic'"),
        (dict(rope_theta=1e6), "rope_theta is 1000000.0; a Baichuan model has 10000.0"),
        (dict(num_key_value_heads=2), "num_key_value_heads is 2; a Baichuan model has 4"),
    ],
)
def test_config_that_fits_no_model_names_the_fact(changes, message):
    with pytest.raises(ValueError, match=message):
        BaichuanConfig(**{**SHAPE, "vocab_size": 64000, "max_position_embeddings": 64, **changes})


def test_baichuan_7b_spells_the_names_differently():
    assert BaiChuanConfig is BaichuanConfig
    assert modeling_baichuan.BaiChuanForCausalLM is BaichuanForCausalLM
    assert modeling_baichuan.BaiChuanModel is modeling_baichuan.BaichuanModel


@pytest.mark.parametrize("arch", ARCHES)
def test_resized_vocabulary_keeps_the_head(arch, tmp_path):
    model = BaichuanForCausalLM(tiny_config(arch)).eval()
    ids, size = sample(model, 2, 9), model.config.vocab_size
    with torch.no_grad():
        before = model(ids).logits
    model.resize_token_embeddings(size + 3)
    assert type(model.lm_head) is BaichuanHead and model.lm_head.normalize == ("baichuan2" in arch)
    assert model.config.vocab_size == model.lm_head.out_features == size + 3
    with torch.no_grad():
        after = model(ids).logits
    assert after.shape[-1] == size + 3 and after.isfinite().all()
    assert gap(after[..., :size], before) < FP32
    labels = ids.clone()
    labels[:, -1] = size + 2
    model.train()(ids, labels=labels).loss.backward()
    assert model.lm_head.weight.grad[size + 2].any()
    model.save_pretrained(tmp_path)
    again = BaichuanForCausalLM.from_pretrained(tmp_path).eval()
    assert again.lm_head.normalize == model.lm_head.normalize
    with torch.no_grad():
        assert torch.equal(again(ids).logits, after)


# --- one row or many ------------------------------------------------------------------------------


def padded(rows, side):
    """ids and mask of rows of different lengths."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, place], mask[i, place] = row, 1
    return ids, mask


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", SMALL)
def test_padded_rows_equal_single_rows(name, attn, side):
    model = golden_model(name, attn)
    rows = [sample(model, length, seed=length) for length in (13, 5, 9)]
    ids, mask = padded(rows, side)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
        for i, row in enumerate(rows):
            assert gap(logits[i][mask[i] == 1], model(row[None]).logits[0]) < FP32


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", SMALL)
def test_ragged_generation_equals_one_by_one(name, attn, cache):
    model = golden_model(name, attn)
    settings = dict(do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0)
    rows = [sample(model, length, seed=length) for length in (9, 3, 6)]
    ids, mask = padded(rows, "left")
    options = {} if cache == "dynamic" else {"cache_implementation": "static"}
    together = model.generate(ids, attention_mask=mask, **settings, **options)[:, ids.shape[1] :]
    alone = [model.generate(row[None], **settings)[0, len(row) :] for row in rows]
    assert torch.equal(together, torch.stack(alone))
    assert len(set(together.flatten().tolist())) > 3  # not one token over and over


LENGTHS = (7, 1, 10, 4)


@pytest.mark.parametrize("by", ["mask", "positions", "both"])
@pytest.mark.parametrize("name", SMALL)
def test_packed_segments_equal_each_alone(name, attn, by):
    """Logits and gradients; two marks of a boundary, each enough alone."""
    model = golden_model(name, attn).train()
    model.config.z_loss_weight = 0.0
    segments = [sample(model, length, seed=length) for length in LENGTHS]
    num_targets = sum(length - 1 for length in LENGTHS)
    alone = []
    for ids in segments:
        alone.append(model(ids[None]).logits[0].detach())
        model(ids[None], labels=ids[None], num_items_in_batch=num_targets).loss.backward()
    expected = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad()

    row = torch.cat(segments)[None]
    labels = torch.cat([torch.cat((torch.tensor([-100]), ids[1:])) for ids in segments])[None]
    numbers = torch.cat([torch.full((length,), i + 1) for i, length in enumerate(LENGTHS)])[None]
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    marks = {}
    if by != "mask":
        marks["position_ids"] = positions
    if by != "positions":
        marks["attention_mask"] = numbers
    packed = model(row, **marks).logits[0]
    assert gap(packed, torch.cat(alone)) < FP32
    assert gap(model(row).logits[0], torch.cat(alone)) > 1e-2  # without marks the segments do mix
    model(row, labels=labels, num_items_in_batch=num_targets, **marks).loss.backward()
    assert expected
    for key, parameter in model.named_parameters():
        assert gap(parameter.grad, expected[key]) < GRAD, key


@pytest.mark.parametrize("name", SMALL)
def test_padding_after_packed_segments(name, attn):
    model = golden_model(name, attn)
    ids = sample(model, 1, 12)
    mask = torch.tensor([[1] * 5 + [2] * 4 + [0] * 3])
    with torch.no_grad():
        packed = model(ids, attention_mask=mask).logits
        assert gap(packed[0, :5], model(ids[:, :5]).logits[0]) < FP32
        assert gap(packed[0, 5:9], model(ids[:, 5:9]).logits[0]) < FP32


# --- masks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_masks_of_every_form_mean_the_same(name, attn):
    model = golden_model(name, attn)
    ids = sample(model, 2, 8)
    flat = torch.ones(2, 8, dtype=torch.long)
    flat[0, :3] = 0
    square = flat[:, None, :].expand(2, 8, 8)
    additive = torch.where(square[:, None] > 0, 0.0, torch.finfo(torch.float32).min)
    forms = [
        square,
        square[:, None],
        square[:, None].bool(),
        additive,
        additive.masked_fill(additive < 0, -math.inf),
    ]
    real = flat == 1
    with torch.no_grad():
        expected = model(ids, attention_mask=flat).logits[real]
        assert gap(model(ids).logits[real], expected) > 1e-2
        for form in forms:
            assert gap(model(ids, attention_mask=form).logits[real], expected) < FP32
        # What is between 0 and "not visible" is added, not dropped: a tenth of a logit less to key 0.
        soft = torch.zeros(1, 1, 8, 8)
        soft[..., 0] = -0.1
        assert 1e-4 < gap(model(ids, attention_mask=soft).logits, model(ids).logits) < 1.0
        soft[..., 0] = -40.0
        hard = torch.ones(1, 8, 8)
        hard[..., 1:, 0] = 0
        softly, hardly = model(ids, attention_mask=soft).logits, model(ids, attention_mask=hard).logits
        assert gap(softly, hardly) < FP32  # exp(-40) is below an fp32 place


@pytest.mark.parametrize("shape", [(2, 5), (2,)])
def test_mask_of_a_wrong_shape_is_an_error(shape):
    model = golden_model("baichuan-13b/a")
    with pytest.raises(ValueError, match=r"attention_mask has shape .* expected \(batch, 8\)"):
        model(sample(model, 2, 8), attention_mask=torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES], ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_rows_that_see_nothing_give_no_nan(name, attn, dtype):
    model = golden_model(name, attn).to(dtype).train()
    ids, mask = padded([sample(model, 9), sample(model, 4)], "left")
    mask[0] = 0  # a whole row of padding
    labels = ids.masked_fill(mask == 0, -100)
    out = model(ids, attention_mask=mask, labels=labels, skip_logits=False)
    assert out.loss > 0 and out.logits.isfinite().all()
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert any(p.grad.any() for p in model.parameters())


# --- cache ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", SMALL)
def test_prefill_in_chunks_equals_one_pass(name, attn, kind):
    model = golden_model(name, attn)
    ids, mask = padded([sample(model, 16), sample(model, 11, seed=1)], "left")
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    cache = DynamicCache() if kind == "dynamic" else StaticCache(model.config, max_cache_len=20)
    pieces = []
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, position_ids=positions).logits
        for start, end in ((0, 6), (6, 13), (13, 14), (14, 16)):
            pieces.append(
                model(
                    ids[:, start:end],
                    attention_mask=mask[:, :end],
                    position_ids=positions[:, start:end],
                    past_key_values=cache,
                    use_cache=True,
                ).logits
            )
    assert cache.get_seq_length() == 16
    assert gap(torch.cat(pieces, dim=1)[mask == 1], whole[mask == 1]) < FP32


@pytest.mark.parametrize("name", SMALL)
def test_generate_with_chunked_prefill(name):
    model = golden_model(name, "sdpa")
    settings = dict(do_sample=False, max_new_tokens=8, eos_token_id=None, pad_token_id=0)
    ids = sample(model, 1, 13)
    expected = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, prefill_chunk_size=5, **settings), expected)


@pytest.mark.parametrize("name", SMALL)
def test_given_cache_is_read_even_when_none_is_returned(name, attn):
    """A learnt prefix comes as past_key_values together with labels, which turn use_cache off."""
    model = golden_model(name, attn)
    model.config.z_loss_weight = 0.0  # it averages over the positions given
    ids = sample(model, 2, 10)
    labels = ids.clone()
    labels[:, :6] = -100  # token 5 is predicted inside the prefix
    with torch.no_grad():
        cache = model(ids[:, :5], use_cache=True).past_key_values
        out = model(ids[:, 5:], past_key_values=cache, labels=labels[:, 5:])
        whole = model(ids, labels=labels)
    assert out.past_key_values is None
    assert gap(out.logits, whole.logits[:, 5:]) < FP32
    assert gap(out.loss, whole.loss) < FP32


def test_cache_under_gradient_checkpointing_is_an_error():
    model = golden_model("baichuan-7b/a").train()
    checkpoint(model, use_reentrant=False)
    with pytest.raises(ValueError, match="past_key_values cannot be used with gradient checkpointing"):
        model(sample(model, 1, 4), past_key_values=DynamicCache())


@pytest.mark.parametrize("name", ["baichuan2-7b/a", "baichuan2-13b/a"])
def test_compiles_into_one_graph(name):
    model = golden_model(name, "sdpa")
    ids, mask = padded([sample(model, 7), sample(model, 4)], "left")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, use_cache=False).logits[mask == 1]
        ours = compiled(ids, attention_mask=mask, use_cache=False).logits[mask == 1]
    assert gap(ours, expected) < FP32


# --- what else comes out --------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_output_attentions_and_hidden_states(name, attn):
    model = golden_model(name, attn)
    ids, mask = padded([sample(model, 12), sample(model, 7)], "right")
    with torch.no_grad():
        plain = model(ids, attention_mask=mask)
        out = model(ids, attention_mask=mask, output_attentions=True, output_hidden_states=True)
        eager = golden_model(name)(ids, attention_mask=mask, output_attentions=True)
    assert plain.attentions is None and plain.hidden_states is None
    assert gap(out.logits[mask == 1], plain.logits[mask == 1]) < FP32
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    assert len(out.attentions) == layers and len(out.hidden_states) == layers + 1
    for weights, reference in zip(out.attentions, eager.attentions):
        assert weights.shape == (2, heads, 12, 12)
        assert gap(weights, reference) < FP32
        real = weights.transpose(1, 2)[mask == 1]  # (tokens, N, S)
        assert gap(real.sum(dim=-1), torch.ones(())) < 1e-6
        assert not weights[0].triu(1).any() and not weights[1, :, :7, 7:].any()
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)


def test_attention_weights_nobody_asked_for_are_let_go():
    model = BaichuanForCausalLM(tiny_config("baichuan-13b", num_hidden_layers=4))
    model.set_attn_implementation("eager")
    references, alive = [], []

    def record(module, inputs, output):
        references.append(weakref.ref(output[1]))
        alive.append(sum(reference() is not None for reference in references))

    for layer in model.model.layers:
        layer.register_forward_hook(record)
    with torch.no_grad():
        model(sample(model, 1, 8))
    assert len(alive) == 4 and max(alive) <= 2  # this layer's and the one before


@pytest.mark.parametrize("name", SMALL)
def test_inputs_embeds_equal_input_ids(name):
    model = golden_model(name)
    ids = sample(model, 2, 9)
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
        assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)
        for both in (dict(), dict(input_ids=ids, inputs_embeds=embeds)):
            with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
                model(**both)


def test_attention_is_chosen_by_name_later_too():
    model = golden_model("baichuan-13b/a", "sdpa")
    ids = sample(model, 1, 8)
    attended = []
    hook = model.model.layers[0].self_attn.register_forward_hook(lambda *args: attended.append(args[-1][1]))
    with torch.no_grad():
        by_sdpa = model(ids).logits
        model.set_attn_implementation("eager")
        assert gap(model(ids).logits, by_sdpa) < FP32
    hook.remove()
    assert attended[0] is None and attended[1] is not None  # only eager attention has weights
    with pytest.raises(ValueError, match=r"flash_attention_2|Flash Attention"):
        model.set_attn_implementation("flash_attention_2")


def test_unknown_argument_is_an_error():
    model = golden_model("baichuan-7b/a")
    with pytest.raises(TypeError, match="no argument attention_msk"):
        model(sample(model, 1, 4), attention_msk=torch.ones(1, 4))


def test_logits_to_keep():
    model = golden_model("baichuan2-7b/a")
    ids = sample(model, 2, 9)
    with torch.no_grad():
        whole = model(ids).logits
        assert gap(model(ids, logits_to_keep=2).logits, whole[:, -2:]) < FP32
        assert gap(model(ids, logits_to_keep=torch.tensor([0, 4])).logits, whole[:, [0, 4]]) < FP32


# --- training -------------------------------------------------------------------------------------


def checkpoint(model, **options):
    with contextlib.suppress(FutureWarning):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", SMALL)
def test_gradient_checkpointing_changes_nothing(name, attn, use_reentrant):
    model = golden_model(name, attn).train()
    ids, mask = padded([sample(model, 9), sample(model, 6)], "right")
    labels = ids.masked_fill(mask == 0, -100)

    def gradients():
        model.zero_grad()
        model(ids, attention_mask=mask, labels=labels).loss.backward()
        return {key: p.grad.clone() for key, p in model.named_parameters()}

    calls = []
    model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    expected = gradients()
    assert len(calls) == 1
    checkpoint(model, use_reentrant=use_reentrant)
    ours = gradients()
    assert len(calls) == 3  # once forward, once again in backward
    assert all(torch.equal(ours[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", SMALL)
def test_padding_token_never_learns(name):
    model = golden_model(name).train()
    ids = sample(model, 2, 9)
    ids[:, 3] = 0
    model(ids, labels=ids).loss.backward()
    grad = model.model.embed_tokens.weight.grad
    assert not grad[0].any() and grad[ids[0, 0]].any()


@pytest.mark.parametrize("name", [name for name in MODELS if "nopad/eval_logits_bf16" in golden(name).cases])
def test_bf16_is_as_near_to_fp32_as_the_vendor(name, attn):
    gold = golden(name)
    model = golden_model(name, attn).to(torch.bfloat16)
    with torch.no_grad():
        logits = model(gold["nopad/input_ids"]).logits
    assert logits.dtype == torch.bfloat16
    vendor = gap(gold["nopad/eval_logits_bf16"], gold["nopad/eval_logits"])
    assert abs(vendor - gold.info["nopad_bf16_vs_fp32_maxdiff"]) < 1e-6
    ours = gap(logits, gold["nopad/eval_logits"])
    # The largest of thousands of roundings is a matter of luck within one place of the largest logit.
    assert 0 < ours <= vendor + last_rounding(gold["nopad/eval_logits"], torch.bfloat16)
