"""The chunked loss against torch's cross_entropy in fp64, and that all logits never exist at once."""

import pytest
import torch
from fixtures import ARCHES, tiny_config
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from baichuan_sft.model import head_baichuan
from baichuan_sft.model.head_baichuan import (
    IGNORE,
    Z_LOSS_KINDS,
    BaichuanHead,
    causal_lm_loss,
    inverse_row_norms,
)
from baichuan_sft.model.modeling_baichuan import BaichuanForCausalLM

B, T, D, V = 3, 11, 16, 50
# fp32: sums of 50 to 500 terms of order 1, each rounded to 6e-8.
FP32 = 2e-6
# bf16 has 8 bits; gradients go through two matrix products, each rounded once per element.
BF16 = 2 * 2.0**-8


def sample(dtype=torch.float32, seed=0):
    """hidden, weight, labels with some ignored, the first row's last and one whole row."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(B, T, D, generator=generator).to(dtype)
    weight = (torch.randn(V, D, generator=generator) * 0.3).to(dtype)
    labels = torch.randint(0, V, (B, T), generator=generator)
    labels[0, -1] = labels[1, 3:7] = labels[2] = IGNORE
    return hidden, weight, labels


def chunked_loss(hidden, weight, labels, *, normalize, **options):
    norms = inverse_row_norms(weight.detach()) if normalize else None
    return causal_lm_loss(hidden, weight, labels, inverse_norms=norms, **options)


def plain_loss(hidden, weight, labels, normalize, num_items, z_loss_weight, z_loss_kind="max"):
    """The documented formula with whole logits, in the inputs' dtype up to the logits."""
    weight = F.normalize(weight, dim=1) if normalize else weight
    logits = F.linear(hidden, weight)[:, :-1].flatten(0, 1)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    targets = labels[:, 1:].flatten()
    ce = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    top = (logits.max(dim=1).values if z_loss_kind == "max" else logits.logsumexp(dim=1)).square()
    if num_items is None:
        return ce / (targets != IGNORE).sum() + z_loss_weight * top.mean()
    return (ce + z_loss_weight * top[targets != IGNORE].sum()) / num_items


def value_and_gradients(loss_of, hidden, weight, scale=1.0):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = loss_of(hidden, weight)
    (loss * scale).backward()
    return loss.detach(), hidden.grad, weight.grad


def assert_close(ours, truth, relative):
    """Within ``relative`` of the largest entry of fp64 ``truth``."""
    assert truth.abs().max() > 0
    excess = (ours.double() - truth).abs().max() / truth.abs().max()
    assert excess <= relative, f"off by {excess:.2e} of the largest entry, allowed {relative:.0e}"


@pytest.fixture(params=[1, 4 * V, 2**26], ids=["row_by_row", "4_rows", "all_rows"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(head_baichuan, "LOGITS_PER_CHUNK", request.param)


@pytest.mark.parametrize("num_items", [None, 40, torch.tensor(40)], ids=["own_count", "given", "tensor"])
@pytest.mark.parametrize("z_loss_kind", [None, *Z_LOSS_KINDS])
@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normhead"])
@pytest.mark.parametrize(
    "dtype, relative", [(torch.float32, FP32), (torch.bfloat16, BF16)], ids=["fp32", "bf16"]
)
def test_loss_and_gradients(dtype, relative, normalize, z_loss_kind, num_items, chunk):
    hidden, weight, labels = sample(dtype)
    z_loss_weight, z_loss_kind = 0.05 if z_loss_kind else 0.0, z_loss_kind or "max"

    def ours(hidden, weight):
        return chunked_loss(
            hidden,
            weight,
            labels,
            normalize=normalize,
            num_items_in_batch=num_items,
            z_loss_weight=z_loss_weight,
            z_loss_kind=z_loss_kind,
        )

    def truth(hidden, weight):
        return plain_loss(hidden, weight, labels, normalize, num_items, z_loss_weight, z_loss_kind)

    got = value_and_gradients(ours, hidden, weight, scale=3.0)
    expected = value_and_gradients(truth, hidden.double(), weight.double(), scale=3.0)
    assert got[0].dtype == torch.float32
    assert [grad.dtype for grad in got[1:]] == [dtype, dtype]
    for value, reference in zip(got, expected):
        assert_close(value, reference, relative)
    with torch.no_grad():
        assert torch.equal(ours(hidden, weight), got[0])


@pytest.mark.parametrize("kind", Z_LOSS_KINDS)
def test_z_loss_counts_for_something(kind):
    hidden, weight, labels = sample()
    without = chunked_loss(hidden, weight, labels, normalize=True)
    assert (
        chunked_loss(hidden, weight, labels, normalize=True, z_loss_weight=0.05, z_loss_kind=kind)
        > without + 1e-3
    )


@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normhead"])
def test_fp16_gradients_survive_division_by_many_targets(normalize):
    """Of 2**17 targets one's gradient is below fp16's least number; the loss scale must reach it first."""
    hidden, weight, labels = sample(torch.float16)
    num_items, scale = 2**17, 2.0**16

    def ours(hidden, weight):
        return chunked_loss(hidden, weight, labels, normalize=normalize, num_items_in_batch=num_items)

    def truth(hidden, weight):
        return plain_loss(hidden, weight, labels, normalize, num_items, 0.0)

    got = value_and_gradients(ours, hidden, weight, scale)
    expected = value_and_gradients(truth, hidden.double(), weight.double(), scale)
    for value, reference in zip(got, expected):
        assert_close(value, reference, 2 * 2.0**-11)  # fp16 has 11 bits, as for bf16 above


@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normhead"])
def test_frozen_weight_and_frozen_hidden(normalize, chunk):
    hidden, weight, labels = sample()
    _, d_hidden, d_weight = value_and_gradients(
        lambda h, w: chunked_loss(h, w, labels, normalize=normalize), hidden, weight
    )
    h = hidden.clone().requires_grad_()
    chunked_loss(h, weight, labels, normalize=normalize).backward()
    assert torch.equal(h.grad, d_hidden)
    w = weight.clone().requires_grad_()
    chunked_loss(hidden, w, labels, normalize=normalize).backward()
    assert torch.equal(w.grad, d_weight)


@pytest.mark.parametrize("num_items", [None, 0, 7])
def test_no_target_is_zero_with_zero_gradients(num_items):
    hidden, weight, labels = sample()
    loss, d_hidden, d_weight = value_and_gradients(
        lambda h, w: chunked_loss(
            h, w, torch.full_like(labels, IGNORE), normalize=True, num_items_in_batch=num_items
        ),
        hidden,
        weight,
    )
    assert loss == 0 and not d_hidden.any() and not d_weight.any()


@pytest.mark.parametrize("bad", [V, -1])
def test_label_that_is_no_token_is_an_error(bad):
    hidden, weight, labels = sample()
    labels[0, 2] = bad
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        chunked_loss(hidden, weight, labels, normalize=False)


def test_second_backward():
    hidden, weight, labels = sample()
    hidden.requires_grad_()
    loss = chunked_loss(hidden, weight, labels, normalize=True)
    loss.backward(retain_graph=True)
    once = hidden.grad.clone()
    loss.backward()
    assert torch.equal(hidden.grad, 2 * once)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_row_of_zeros_in_normhead():
    """A vocabulary row without a direction has logit 0; its gradient is huge, and finite."""
    hidden, weight, labels = sample()
    weight[5] = 0
    loss, d_hidden, d_weight = value_and_gradients(
        lambda h, w: chunked_loss(h, w, labels, normalize=True), hidden, weight
    )
    assert loss.isfinite() and d_hidden.isfinite().all() and d_weight.isfinite().all()
    assert not F.linear(hidden, weight)[..., 5].any()


@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normhead"])
def test_autocast_computes_in_bf16_and_keeps_fp32_gradients(normalize):
    hidden, weight, labels = sample()
    head = BaichuanHead(D, V, normalize)
    head.weight.data.copy_(weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert head(hidden).dtype == torch.bfloat16
        loss = head(hidden, labels)
    loss.backward()
    assert loss.dtype == torch.float32 and head.weight.grad.dtype == torch.float32
    truth = value_and_gradients(
        lambda h, w: plain_loss(h, w, labels, normalize, None, 0.0), hidden.double(), weight.double()
    )
    assert_close(loss, truth[0], BF16)
    assert_close(head.weight.grad, truth[2], 2 * BF16)  # the inputs are rounded as well


def test_normhead_logits_do_not_depend_on_row_lengths_and_leave_the_weight_alone():
    hidden, weight, _ = sample()
    head = BaichuanHead(D, V, normalize=True)
    head.weight.data.copy_(weight)
    logits = head.train()(hidden)
    assert torch.equal(head.eval()(hidden), logits)
    assert torch.equal(head.weight, weight)
    head.weight.data.mul_(torch.linspace(0.1, 9, V)[:, None])
    assert_close(head(hidden), logits.double(), FP32)


def test_norms_of_a_frozen_head_are_kept_until_it_changes(monkeypatch):
    hidden, weight, labels = sample()
    head = BaichuanHead(D, V, normalize=True)
    head.weight.data.copy_(weight)
    calls = []
    monkeypatch.setattr(
        head_baichuan, "inverse_row_norms", lambda weight: calls.append(0) or inverse_row_norms(weight)
    )
    head(hidden), head(hidden)
    assert len(calls) == 2  # it may be trained between two calls
    head.weight.requires_grad_(False)
    logits, loss = head(hidden), head(hidden, labels)
    assert len(calls) == 3
    with torch.no_grad():
        head.weight.mul_(torch.linspace(0.1, 9, V)[:, None])
    assert_close(head(hidden), logits.double(), FP32)
    assert_close(head(hidden, labels), loss.double(), FP32)
    assert len(calls) == 4
    head.load_state_dict({"weight": weight.roll(1, dims=0)})
    assert_close(head(hidden), logits.roll(1, dims=-1).double(), FP32)
    head.bfloat16()
    assert head(hidden.bfloat16()).dtype == torch.bfloat16
    assert len(calls) == 6
    head.eval()
    compiled = torch.compile(head, backend="eager", fullgraph=True)
    assert torch.equal(compiled(hidden.bfloat16()), head(hidden.bfloat16()))
    assert len(calls) == 6


def test_a_compiled_head_that_is_trained_takes_no_kept_norms():
    hidden, weight, _ = sample()
    head = BaichuanHead(D, V, normalize=True).train()
    head.weight.data.copy_(weight)
    head.weight.requires_grad_(False)
    head(hidden)
    with torch.no_grad():
        head.weight.mul_(torch.linspace(0.1, 9, V)[:, None])
    truth = BaichuanHead(D, V, normalize=True)
    truth.weight.data.copy_(head.weight)
    compiled = torch.compile(head, backend="eager", fullgraph=True)
    assert_close(compiled(hidden), truth(hidden).double(), FP32)
    head.weight.requires_grad_()
    assert_close(compiled(hidden), truth(hidden).double(), FP32)


def test_norms_kept_in_inference_mode_serve_training():
    hidden, _, _ = sample()
    head = BaichuanHead(D, V, normalize=True)
    head.weight.requires_grad_(False)
    with torch.inference_mode():
        head(hidden)
    hidden.requires_grad_()
    head(hidden).sum().backward()
    assert hidden.grad is not None


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any operation's result had."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("arch", ARCHES)
def test_training_never_holds_all_logits(arch, monkeypatch):
    model = BaichuanForCausalLM(tiny_config(arch)).train()
    ids = torch.randint(3, 6144, (16, 32))
    all_logits = ids.numel() * model.config.vocab_size
    weight_size = model.lm_head.weight.numel()
    monkeypatch.setattr(head_baichuan, "LOGITS_PER_CHUNK", weight_size)
    with LargestTensor() as training:
        model(ids, labels=ids).loss.backward()
    assert weight_size <= training.numel < all_logits / 8
    with LargestTensor() as evaluation, torch.no_grad():
        out = model.eval()(ids, labels=ids)
    assert out.logits is not None and evaluation.numel >= all_logits
    with LargestTensor() as skipping, torch.no_grad():
        assert model(ids, labels=ids, skip_logits=True).logits is None
    assert skipping.numel < all_logits / 8
