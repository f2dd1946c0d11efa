"""Norm, RoPE and SwiGLU product against torch's own gradients of the formulas, and what they keep."""

import pytest
import torch
from torch.nn import functional as F

from baichuan_sft.model.attention_baichuan import rope_angles
from baichuan_sft.model.elementwise_baichuan import rms_norm, split_and_rotate, swiglu

B, T, N, H, D = 2, 7, 3, 8, 24


def plain_norm(hidden, weight):
    wide = hidden.float() if hidden.dtype != torch.float64 else hidden
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
    return (weight * normed.to(weight.dtype),)


def plain_product(gate, up):
    return (F.silu(gate) * up,)


def plain_rotation(qkv):
    wide = qkv.float() if qkv.dtype != torch.float64 else qkv
    cos, sin = (x.to(wide.dtype)[:, :, 0].repeat(1, 1, 1, 2) for x in rope_angles(positions(), H))

    def turn(x):
        first, second = x.chunk(2, dim=-1)
        return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(qkv.dtype)

    parts = turn(wide[:, :, 0]), turn(wide[:, :, 1]), qkv[:, :, 2]
    return tuple(x.transpose(1, 2) for x in parts)


def positions():
    return torch.stack([torch.arange(T), torch.arange(T) + 300])


CASES = {
    "norm": (lambda h, w: (rms_norm(h, w, 1e-6),), plain_norm, [(B, T, D), (D,)]),
    "product": (lambda g, u: (swiglu(g, u),), plain_product, [(B, T, D), (B, T, D)]),
    "rotation": (
        lambda x: split_and_rotate(x, *rope_angles(positions(), H)),
        plain_rotation,
        [(B, T, 3, N, H)],
    ),
}
# Two roundings of the largest term: one of what is kept, one of the result.
ROUNDING = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def inputs(shapes, dtype):
    generator = torch.Generator().manual_seed(0)
    return [(3 * torch.randn(shape, generator=generator)).to(dtype).requires_grad_() for shape in shapes]


def values_and_gradients(function, arguments):
    out = function(*arguments)
    weights = [torch.linspace(-1, 1, x.numel()).reshape(x.shape).to(x.dtype) for x in out]
    return [*out, *torch.autograd.grad(out, arguments, weights)]


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_formula(name, dtype):
    ours, plain, shapes = CASES[name]
    arguments = inputs(shapes, dtype)
    got = values_and_gradients(ours, arguments)
    truth = values_and_gradients(plain, [x.detach().double().requires_grad_() for x in arguments])
    for value, exact in zip(got, truth):
        assert value.dtype == dtype and value.shape == exact.shape
        assert (value.double() - exact).abs().max() <= ROUNDING[dtype] * exact.abs().max()


@pytest.mark.parametrize("name", CASES)
def test_forward_is_bit_for_bit_the_formula(name):
    ours, plain, shapes = CASES[name]
    arguments = inputs(shapes, torch.bfloat16)
    for value, reference in zip(ours(*arguments), plain(*arguments)):
        assert torch.equal(value, reference)


@pytest.mark.parametrize("name", CASES)
def test_frozen_inputs_get_no_gradient(name):
    ours, _, shapes = CASES[name]
    arguments = inputs(shapes, torch.float32)
    alone = [x.detach() for x in arguments]
    alone[0] = arguments[0]
    out = ours(*alone)
    (gradient,) = torch.autograd.grad(out, alone[0], [torch.ones_like(x) for x in out])
    everything = torch.autograd.grad(ours(*arguments), arguments[0], [torch.ones_like(x) for x in out])
    assert torch.equal(gradient, everything[0])


@pytest.mark.parametrize(
    "name, most",
    [("norm", 2 * D + 4 + 2 * D / (B * T)), ("product", 2 * 2 * D), ("rotation", 2 * 4 * H / 2)],
)
def test_what_is_kept_for_backward(name, most):
    """Bytes per token in bf16: the norm's weight is shared by all, and a rotation keeps cos and sin alone."""
    ours, _, shapes = CASES[name]
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ours(*inputs(shapes, torch.bfloat16))
    assert 0 < sum(saved.values()) <= B * T * most
