"""Norm, RoPE and SwiGLU product that keep little for backward and compute the rest again.

B rows, T tokens, N heads, H head width, D model width, F MLP width. Bytes kept per token, in bf16:

              here                     left to autograd
    norm      2 D, and one number      4 D, and one number
    RoPE      3 D: q, k, v             5 D: both before and after
    product   4 F: gate, up            6 F: silu(gate) too
"""

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, eps):
        wide = hidden.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)  # (B, T, 1)
        ctx.save_for_backward(hidden, weight, scale)
        return weight * (wide * scale).to(weight.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        hidden, weight, scale = ctx.saved_tensors
        normed = hidden.float() * scale
        d_weight = d_hidden = None
        if ctx.needs_input_grad[1]:
            d_weight = (grad * normed.to(weight.dtype)).flatten(0, -2).sum(0)
        if ctx.needs_input_grad[0]:
            grad = (grad * weight).float()
            along = (grad * normed).mean(-1, keepdim=True)
            d_hidden = ((grad - normed * along) * scale).to(hidden.dtype)
        return d_hidden, d_weight, None


def rms_norm(hidden, weight, eps):
    """``weight * hidden / rms(hidden)``, the statistics in fp32, in the weight's dtype."""
    return _RMSNorm.apply(hidden, weight, eps)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)


def swiglu(gate, up):
    """``silu(gate) * up``."""
    return _SwiGLU.apply(gate, up)


def _turn(x, cos, sin):
    """Dimension k pairs with k + H / 2, as in Llama; fp32 inside."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class _SplitAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, cos, sin):
        ctx.save_for_backward(cos, sin)
        turned = _turn(qkv[:, :, :2], cos, sin)
        # A view of qkv would keep queries and keys as they were before.
        return turned[:, :, 0], turned[:, :, 1], qkv[:, :, 2].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, d_query, d_key, d_value):
        cos, sin = ctx.saved_tensors
        turned = _turn(torch.stack((d_query, d_key), dim=2), cos, -sin)  # a rotation's transpose turns back
        return torch.cat((turned, d_value[:, :, None]), dim=2), None, None


def split_and_rotate(qkv, cos, sin):
    """``(B, T, 3, N, H)`` to rotated queries and keys, and values, ``(B, N, T, H)`` each.

    Args:
        cos, sin: fp32 ``(B or 1, T, 1, 1, H / 2)``, as ``rope_angles`` gives them.
    """
    return tuple(x.transpose(1, 2) for x in _SplitAndRotate.apply(qkv, cos, sin))
