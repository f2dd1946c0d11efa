"""Every backend against eager: packed, padded, ragged and over-long batches, forward and gradient."""

import sys
import types

import pytest
import torch
from fixtures import ARCHES, tiny_config
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from baichuan_sft.attention import BACKENDS, backends, choose, kernels
from baichuan_sft.attention.flex import BLOCK, flex_mask
from baichuan_sft.attention.layout import Layout, has_plain_runs
from baichuan_sft.errors import EnvironmentFault, UserError
from baichuan_sft.model.attention_baichuan import PREPARE, alibi_slopes
from baichuan_sft.model.modeling_baichuan import BaichuanForCausalLM

IGNORE = -100
T = 40
# fp32: two layers of sums of at most 200 terms of order 1, each rounded to 6e-8, in another order.
FORWARD, GRADIENT = 5e-6, 5e-6
# A score that holds slope * j, at most 0.5 * 200 here, is rounded to half of 7.6e-6, as is each sum in it.
AUGMENTED = 2e-5


def restarting(*starts, length=T):
    """Positions that begin again at each start: position_ids of a row packed there."""
    position_ids = torch.arange(length)
    for start in starts:
        position_ids[start:] = torch.arange(length - start)
    return position_ids


def packed():
    return {"position_ids": torch.stack([restarting(7, 20), restarting(33)])}


def padded_right():
    return {"attention_mask": (torch.arange(T) < torch.tensor([[T], [25]])).long()}


def padded_left():
    mask = (torch.arange(T) >= torch.tensor([[0], [15]])).long()
    return {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def gap():
    """No Layout says this: the last tokens see the first ones over five that nobody sees."""
    mask = torch.ones(2, T, dtype=torch.long)
    mask[1, 10:15] = 0
    return {"attention_mask": mask}


def numbered():
    """Segments told by the numbers of the mask, as transformers' padding-free collators do."""
    return {"attention_mask": torch.tensor([[1] * T, [1] * 10 + [2] * 15 + [3] * (T - 25)])}


def ragged():
    """Packed rows of unequal length, padded behind."""
    mask = (torch.arange(T) < torch.tensor([[T], [31]])).long()
    return {"attention_mask": mask, "position_ids": torch.stack([restarting(1, 2, 39), restarting(16)])}


def over_long():
    """Rows longer than the 128 positions that the configuration names."""
    return {"position_ids": torch.stack([restarting(150, length=200), restarting(length=200)])}


def plain():
    return {}


BATCHES = [packed, padded_right, padded_left, gap, numbered, ragged, over_long, plain]


def batch_of(kind) -> dict[str, torch.Tensor]:
    """Random ids; labels where a token is real and not the first that its predecessor may not see."""
    said = kind()
    length = said["position_ids"].shape[1] if "position_ids" in said else T
    ids = torch.randint(3, 512, (2, length), generator=torch.Generator().manual_seed(1))
    mask = said.get("attention_mask", torch.ones(2, length, dtype=torch.long))
    positions = said.get("position_ids", torch.arange(length).repeat(2, 1))
    labels = ids.masked_fill(mask == 0, IGNORE)
    starts = F.pad((mask.diff(dim=1) != 0) | (positions.diff(dim=1) <= 0), (1, 0), value=True)
    return {"input_ids": ids, "labels": labels.masked_fill(starts, IGNORE), **said}


def model_of(arch, **changes) -> BaichuanForCausalLM:
    torch.manual_seed(0)
    model = BaichuanForCausalLM(tiny_config(arch, **{"vocab_size": 512, **changes}))
    for name, weight in model.named_parameters():
        if "W_pack" in name:  # scores of order 1, or a wrong mask would change next to nothing
            torch.nn.init.normal_(weight, std=0.3)
    return model.eval()


def outcome(model, name, batch, *, gradients=True):
    """Final hidden states at the tokens that are learnt or predict, and all gradients, one vector."""
    model.config._attn_implementation = name
    model.zero_grad()
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with torch.set_grad_enabled(gradients):
        hidden = model.model(**inputs, use_cache=False).last_hidden_state
    real = inputs.get("attention_mask", torch.ones_like(batch["input_ids"])) > 0
    if not gradients:
        return hidden.detach()[real], None
    model.lm_head(hidden, batch["labels"]).backward()
    return hidden.detach()[real], torch.cat(
        [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    )


def assert_same(ours, theirs, forward=FORWARD, gradient=GRADIENT):
    for what, limit in ((0, forward), (1, gradient)):
        if ours[what] is not None:
            scale = theirs[what].abs().max()
            assert scale > 0
            gap = ((ours[what] - theirs[what]).abs().max() / scale).item()
            assert gap <= limit, f"{'gradient' if what else 'forward'} off by {gap:.1e}"


def stand_in_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    """What torch's documentation says of ``varlen_attn``, run by run."""
    assert window_size == (-1, 0) and cu_seq_q.dtype == torch.int32
    assert query.shape == key.shape == value.shape and query.is_contiguous()
    lengths = cu_seq_q.diff()
    assert cu_seq_q[0] == 0 and cu_seq_q[-1] == len(query) and max_q == max_k == lengths.max()
    out = []
    for q, k, v in zip(*(x.split(lengths.tolist()) for x in (query, key, value))):
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        out.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(0, 1))
    return torch.cat(out)


def stand_in_xformers(query, key, value, attn_bias, scale):
    starts = torch.tensor([0, *attn_bias]).cumsum(0).int()
    longest = max(attn_bias)
    return stand_in_varlen(
        query[0].contiguous(),
        key[0].contiguous(),
        value[0].contiguous(),
        starts,
        starts,
        longest,
        longest,
        scale=scale,
        window_size=(-1, 0),
    )[None]


@pytest.fixture
def stand_ins(monkeypatch):
    """The two kernels that no CPU has, replaced by what they compute: all around them is ours."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in_varlen)
    ops, bias = types.ModuleType("xformers.ops"), types.ModuleType("xformers.ops.fmha.attn_bias")
    ops.memory_efficient_attention = stand_in_xformers
    bias.BlockDiagonalCausalMask = types.SimpleNamespace(from_seqlens=lambda lengths: lengths)
    for name, module in {
        "xformers": types.ModuleType("xformers"),
        "xformers.ops": ops,
        "xformers.ops.fmha": types.ModuleType("xformers.ops.fmha"),
        "xformers.ops.fmha.attn_bias": bias,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("kind", BATCHES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "eager"])
@pytest.mark.parametrize("arch", ARCHES)
def test_equals_eager(arch, name, kind, stand_ins):
    model, batch = model_of(arch), batch_of(kind)
    gradients = name != "flex"  # torch has its backward on a GPU only
    limits = (AUGMENTED, AUGMENTED) if name in ("augmented", "varlen", "xformers") else ()
    assert_same(outcome(model, name, batch, gradients=gradients), outcome(model, "eager", batch), *limits)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", BATCHES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "eager"])
@pytest.mark.parametrize("arch", ARCHES)
def test_on_a_gpu_no_worse_than_eager_in_bf16(arch, name, kind):
    """Against fp32 eager a backend in bf16 may miss by twice what eager in bf16 misses by."""
    if reason := BACKENDS[name].why_not("cuda", torch.bfloat16):
        pytest.skip(reason)
    model = model_of(arch, hidden_size=256, intermediate_size=256, num_attention_heads=4).cuda()
    batch = {key: value.cuda() for key, value in batch_of(kind).items()}
    truth = outcome(model, "eager", batch)
    model.bfloat16()
    theirs, ours = outcome(model, "eager", batch), outcome(model, name, batch)
    for what in (0, 1):
        miss = [(x[what].float() - truth[what]).abs().max().item() for x in (ours, theirs)]
        assert miss[0] <= 2 * miss[1], (what, miss)


@pytest.mark.parametrize("kind", [packed, over_long, padded_left], ids=lambda kind: kind.__name__)
def test_runs_too_long_for_a_bias_carry_alibi_otherwise(kind, monkeypatch):
    model, batch = model_of("baichuan-13b"), batch_of(kind)
    theirs = outcome(model, "eager", batch)
    made = []
    monkeypatch.setattr(kernels, "LONGEST_BIAS", 8)
    monkeypatch.setattr(
        kernels, "augmentation", lambda *args, of=kernels.augmentation: made.append(of(*args)) or made[-1]
    )
    assert_same(outcome(model, "segments", batch), theirs, AUGMENTED, AUGMENTED)
    assert isinstance(made[0], kernels.Augmentation)


@pytest.mark.parametrize("arch", ARCHES)
def test_a_boundary_matters(arch):
    """The comparison above would see a backend that lets packed segments see each other."""
    model, batch = model_of(arch), batch_of(packed)
    right = outcome(model, "segments", batch)
    # RoPE sees only distances within a segment, so positions that count on change nothing but who sees whom
    batch["position_ids"] = torch.arange(T).repeat(2, 1)
    wrong = outcome(model, "segments", batch)
    assert (right[0] - wrong[0]).abs().max() / right[0].abs().max() > 1000 * FORWARD


def test_augmentation_is_alibi_in_bf16():
    """Three bf16 terms leave 2**-24 of a slope, and positions are exact: as good as fp32 slope * j."""
    config = tiny_config("baichuan-13b", num_attention_heads=40, hidden_size=40 * 8)
    slopes = alibi_slopes(40).double()
    hidden = torch.zeros(1, 1, 1, dtype=torch.bfloat16)
    of_query, of_key, _ = kernels.augmentation(config, hidden, [4096], None)
    assert of_query.dtype == of_key.dtype == torch.bfloat16
    added = of_query.double() @ of_key.double().T * config.head_dim**-0.5  # (N, T)
    truth = slopes[:, None] * torch.arange(4096)
    relative = ((added - truth).abs() / truth.clamp_min(1e-9)).max().item()
    assert relative <= 2.0**-23, relative


@pytest.mark.parametrize("num_tokens", [5, BLOCK, 3 * BLOCK, 1000])
def test_blocks_are_those_torch_would_find(num_tokens):
    from torch.nn.attention.flex_attention import create_block_mask

    generator = torch.Generator().manual_seed(num_tokens)
    runs = (torch.rand(2, num_tokens, generator=generator) < 0.01).long().cumsum(1) + 1
    ours = flex_mask(tiny_config("baichuan-7b"), runs, runs, None).blocks

    def same_run(b, h, q, k):
        return (runs[b, q] == runs[b, k]) & (k <= q)

    theirs = create_block_mask(same_run, 2, None, num_tokens, num_tokens, device="cpu", BLOCK_SIZE=BLOCK)
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    for which in ("kv", "full_kv"):
        counts = [getattr(mask, f"{which}_num_blocks") for mask in (ours, theirs)]
        if which == "full_kv" and num_tokens % BLOCK:
            continue  # torch calls the last block whole where tokens behind the end are left out
        assert torch.equal(*counts)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("name", ["segments", "augmented", "varlen", "xformers"])
@pytest.mark.parametrize("arch", ["baichuan-7b", "baichuan-13b"])
def test_nothing_is_t_by_t(arch, name, stand_ins):
    model = model_of(arch, vocab_size=8, intermediate_size=16)
    length, num_segments = 2048, 64
    position_ids = (torch.arange(length) % (length // num_segments))[None]
    with LargestTensor() as largest:
        outcome(
            model,
            name,
            {"input_ids": torch.zeros(1, length, dtype=torch.long), "position_ids": position_ids},
            gradients=False,
        )
    assert 0 < largest.elements < length * length / 4


@pytest.mark.parametrize(
    "row, plain",
    [
        ([1, 1, 1, 0, 0], True),
        ([0, 0, 1, 1, 1], True),
        ([1, 1, 2, 2, 3], True),
        ([1, 1, 0, 1, 1], False),
        ([1, 2, 2, 1, 0], False),
        ([2, 2, 1, 1, 0], False),  # plain, but told apart from the row above only by looking closer
    ],
)
def test_masks_with_gaps_get_the_dense_mask(row, plain):
    assert has_plain_runs(torch.tensor([row])) == plain
    config = tiny_config("baichuan-7b")
    made = PREPARE["segments"](
        config, torch.zeros(1, 5, 8), torch.tensor([row]), None, torch.arange(5), 5, torch.float32
    )
    assert isinstance(made, Layout) == plain


@pytest.mark.parametrize("name", ["segments", "augmented"])
@pytest.mark.parametrize("arch", ARCHES)
def test_generates_with_a_cache(arch, name):
    model, ids = model_of(arch), torch.tensor([[195, 11, 12, 196]])
    answers = []
    for attn in ("eager", name):
        model.config._attn_implementation = attn
        answers.append(model.generate(ids, max_new_tokens=8, do_sample=False))
    assert answers[0].shape[1] > 4 and torch.equal(*answers)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["sdpa", "segments", "augmented", "flex"])
@pytest.mark.parametrize("arch", ARCHES)
def test_generates_behind_padding_as_without(arch, name, cache):
    model = model_of(arch)
    prompts = torch.tensor([[195, 11, 12, 13, 14, 196], [0, 0, 195, 21, 22, 196]])
    options = dict(max_new_tokens=8, do_sample=False, cache_implementation=cache, disable_compile=True)
    model.config._attn_implementation = "eager"
    alone = model.generate(prompts[1:, 2:], max_new_tokens=8, do_sample=False)
    model.config._attn_implementation = name
    both = model.generate(prompts, attention_mask=(prompts != 0).long(), **options)
    assert alone.shape[1] > 4
    assert both[1, 6:].tolist()[: alone.shape[1] - 4] == alone[0, 4:].tolist()


@pytest.mark.parametrize(
    "position, device, dtype, broken, expected",
    [
        ("rope", "cpu", torch.float32, (), "segments"),
        ("alibi", "cpu", torch.bfloat16, (), "segments"),
        ("rope", "cuda", torch.bfloat16, (), "varlen"),
        ("rope", "cuda", torch.float32, ("varlen",), "flex"),
        ("alibi", "cuda", torch.bfloat16, (), "flex"),
        ("alibi", "cuda", torch.bfloat16, ("flex",), "varlen"),
        ("alibi", "cuda", torch.float16, ("flex", "varlen"), "xformers"),
        ("rope", "cuda", torch.float32, ("flex", "varlen", "xformers"), "segments"),
    ],
)
def test_auto_picks_and_says_why(monkeypatch, position, device, dtype, broken, expected):
    table = {
        name: backends.Backend(b.attend, b.make_extra, lambda *_, n=name: "broken" if n in broken else None)
        for name, b in BACKENDS.items()
    }
    monkeypatch.setattr(backends, "BACKENDS", table)
    name, reason = choose("auto", position, device, dtype)
    assert name == expected
    assert all(f"not {other}: broken" in reason for other in broken)


def test_a_backend_that_cannot_train_here_is_refused():
    with pytest.raises(EnvironmentFault, match="--attn flex: FlexAttention has no backward on a CPU"):
        choose("flex", "alibi", "cpu", torch.float32)
    with pytest.raises(EnvironmentFault, match=r"--attn varlen: .* not in fp32"):
        choose("varlen", "rope", "cuda", torch.float32)
    with pytest.raises(UserError, match="did you mean 'segments'"):
        choose("segment", "rope", "cpu", torch.float32)
    assert choose("sdpa", "rope", "cpu", torch.float32)[1] == "as asked for"
    assert "T x T mask" in choose("sdpa", "rope", "cuda", torch.bfloat16)[1]
