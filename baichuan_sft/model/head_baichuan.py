"""The output head, plain or NormHead, and the loss that never holds all logits at once.

R rows (positions that enter the loss), D model width, V vocabulary, C rows of one chunk.
"""

import torch
from torch import nn
from torch.compiler import is_compiling
from torch.nn import functional as F

IGNORE = -100
Z_LOSS_KINDS = ("max", "logsumexp")  # what is squared: the vendor's largest logit, or the log-normaliser
# fp32 logits held at a time: 2**26 of them are 256 MiB, 533 rows at V = 125,696.
LOGITS_PER_CHUNK = 2**26
NORM_EPS = 1e-12


def inverse_row_norms(weight):
    """1 / max(L2 norm, 1e-12) of each vocabulary row, fp32 ``(V,)``."""
    return torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).clamp_min(NORM_EPS).reciprocal()


class BaichuanHead(nn.Linear):
    """Hidden states to logits, or, given labels, straight to the loss.

    With ``normalize`` it is Baichuan2's NormHead: every vocabulary row counts with L2 norm 1. The
    norm is applied to the logits, ``(h @ W.T) / ||W||``, so no normalised copy of W exists, and W
    itself is never written to: the vendor's in-place version breaks evaluation under ZeRO-3.

    The loss is computed inside ``forward`` because that is where ZeRO-3 gathers the weight.
    """

    def __init__(self, hidden_size, vocab_size, normalize=False, device=None, dtype=None):
        super().__init__(hidden_size, vocab_size, bias=False, device=device, dtype=dtype)
        self.normalize = normalize
        self._kept: tuple = None, None  # what the norms of a frozen weight belong to, and they

    def extra_repr(self):
        return f"{super().extra_repr()}, normalize={self.normalize}"

    def inverse_norms(self, weight):
        """``inverse_row_norms``, or None without NormHead.

        Those of a frozen weight are kept: for one generated token the norms would read as much as the
        product does. They are made anew where the weight was written to, though not through ``.data``. A
        compiled graph takes them unseen, in evaluation; ``generate`` reads the prompt uncompiled first.
        """
        if not self.normalize:
            return None
        if self.weight.requires_grad:
            return inverse_row_norms(weight)
        if is_compiling():
            kept = None if self.training else self._kept[1]
            return inverse_row_norms(weight) if kept is None else kept
        if self.weight.is_inference():  # whose writes nobody counts
            return inverse_row_norms(weight)
        belongs = self.weight.data_ptr(), self.weight._version, weight.dtype, weight.device
        if self._kept[0] != belongs:
            with torch.inference_mode(False):  # a backward pass may read them later
                self._kept = belongs, inverse_row_norms(weight)
        return self._kept[1]

    def forward(
        self, hidden, labels=None, num_items_in_batch=None, z_loss_weight=0.0, z_loss_kind=Z_LOSS_KINDS[0]
    ):
        """Logits ``(..., V)`` without labels, else the scalar fp32 loss; see ``causal_lm_loss``."""
        weight = self.weight
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        if labels is not None:
            return causal_lm_loss(
                hidden,
                weight,
                labels,
                inverse_norms=self.inverse_norms(weight.detach()),  # their gradient is in the loss's own
                num_items_in_batch=num_items_in_batch,
                z_loss_weight=z_loss_weight,
                z_loss_kind=z_loss_kind,
            )
        logits, inverse_norms = F.linear(hidden, weight), self.inverse_norms(weight)
        return logits if inverse_norms is None else logits * inverse_norms.to(logits.dtype)


def causal_lm_loss(
    hidden,
    weight,
    labels,
    *,
    inverse_norms,
    num_items_in_batch=None,
    z_loss_weight=0.0,
    z_loss_kind=Z_LOSS_KINDS[0],
):
    """Next-token cross-entropy plus z-loss, in chunks of rows.

    ``loss = sum(CE over targets) / N  +  z_loss_weight * sum(z ** 2) / M``, z a row's largest logit or the
    logarithm of its summed exponentials. Called on its own
    (``num_items_in_batch`` None) it is the vendor's: N is the number of targets here and the z-loss
    averages over all B * (T - 1) positions, padding included. In training N is the number of targets
    of the whole update over all micro-batches and ranks, and the z-loss runs over the same targets
    and N, because a mean over padding would depend on how the batch was cut.

    Args:
        hidden: ``(B, T, D)``. weight: ``(V, D)``.
        labels: ``(B, T)`` token ids or IGNORE; position t is predicted from position t - 1.
        inverse_norms: ``(V,)`` of NormHead's rows (``inverse_row_norms``), None for a plain head.
        num_items_in_batch: N, an int or a tensor; None counts here.
        z_loss_kind: one of ``Z_LOSS_KINDS``.
    Returns:
        fp32 scalar; 0, with zero gradients, where there is no target.
    Source: baichuan-inc/Baichuan2-7B-Base modeling_baichuan.py ``BaichuanForCausalLM.forward``.
    """
    hidden = hidden[:, :-1].flatten(0, 1)
    targets = labels[:, 1:].flatten().to(hidden.device)
    is_target = targets != IGNORE
    if num_items_in_batch is None:
        ce_divisor, z_divisor = is_target.sum().clamp_min(1), max(targets.numel(), 1)
    else:
        ce_divisor = z_divisor = torch.as_tensor(num_items_in_batch, device=hidden.device).clamp_min(1)
    if not z_loss_weight or num_items_in_batch is not None:
        rows = is_target.nonzero().squeeze(1)
        hidden, targets = hidden[rows], targets[rows]
    z_loss = (z_loss_kind, z_loss_weight * ce_divisor / z_divisor) if z_loss_weight else None
    needs_grad = torch.is_grad_enabled()
    return _ChunkedLossSum.apply(hidden, weight, targets, inverse_norms, z_loss, needs_grad) / ce_divisor


def _chunk_loss_and_grad(logits, targets, z_loss):
    """Loss sum of one chunk; ``logits`` (C, V) is overwritten by d loss / d logits.

    Raises:
        IndexError or RuntimeError: a target that is no token id.
    """
    is_target = (targets != IGNORE).unsqueeze(1)
    columns = targets.unsqueeze(1).masked_fill(~is_target, 0)
    kind, z_scale = z_loss or (None, 0.0)
    wanted, top = logits.gather(1, columns), logits.max(dim=1, keepdim=True)
    grad = logits.sub_(top.values).exp_()  # in place: torch.logsumexp would make a second (C, V)
    total = grad.sum(dim=1, keepdim=True)
    log_normalizer = top.values + total.log()
    loss = ((log_normalizer - wanted) * is_target).sum()
    share = is_target.to(grad.dtype)
    if kind == "logsumexp":
        loss = loss + log_normalizer.square().sum() * z_scale
        share = share + 2 * z_scale * log_normalizer
    grad.mul_(share / total).scatter_add_(1, columns, -is_target.to(grad.dtype))
    if kind == "max":
        loss = loss + top.values.square().sum() * z_scale
        grad.scatter_add_(1, top.indices, 2 * z_scale * top.values)
    return loss, grad


def _product(rows, columns):
    """fp32 ``rows @ columns``; a GPU need not round what it summed in fp32 to half precision first."""
    if rows.is_cuda and rows.dtype != torch.float32:
        return torch.mm(rows, columns, out_dtype=torch.float32)
    return (rows @ columns).float()


class _ChunkedLossSum(torch.autograd.Function):
    """Summed loss and both gradients in one pass over chunks of rows: logits are made once, never kept.

    The sum, not the mean: divided by thousands of targets the gradient of a logit is below what fp16
    can hold, and the loss scale that would lift it is known only in backward.

    For NormHead, with G the gradient with respect to the normalised rows w/||w||,
    ``dW = (G - w_hat (w_hat . G)) / ||w||``: done once at the end, in fp32.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, inverse_norms, z_loss, needs_grad):
        need_hidden = needs_grad and ctx.needs_input_grad[0]
        need_weight = needs_grad and ctx.needs_input_grad[1]
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        # fp32: thousands of chunks' bf16 sums would lose the small ones
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        size = max(1, LOGITS_PER_CHUNK // weight.shape[0])
        for start in range(0, hidden.shape[0], size):
            chunk = hidden[start : start + size]
            logits = _product(chunk, weight.T)  # (C, V)
            if inverse_norms is not None:
                logits *= inverse_norms
            part, grad = _chunk_loss_and_grad(logits, targets[start : start + size], z_loss)
            loss += part
            if d_weight is not None and weight.dtype == torch.float32:
                d_weight.addmm_(grad.T, chunk)  # without a second (V, D)
            elif d_weight is not None:
                for low in range(0, weight.shape[0], 16384):  # not a second (V, D)
                    columns = slice(low, low + 16384)
                    d_weight[columns] += _product(grad[:, columns].to(weight.dtype).T, chunk)
            if d_hidden is not None:
                grad = grad if inverse_norms is None else grad.mul_(inverse_norms)
                d_hidden[start : start + size] = grad.to(weight.dtype) @ weight
            del logits, grad  # before the next chunk's are there too
        if d_weight is not None and inverse_norms is not None:
            _through_normalization(d_weight, weight, inverse_norms)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):
        d_hidden, d_weight = ctx.saved_tensors
        if d_hidden is not None:
            d_hidden = (d_hidden.float() * grad_loss).to(d_hidden.dtype)
        if d_weight is not None:
            if d_weight.dtype == ctx.weight_dtype:
                d_weight.mul_(grad_loss)  # no second (V, D); another backward through it is an error
            else:
                out = torch.empty_like(d_weight, dtype=ctx.weight_dtype)
                d_weight = torch.mul(d_weight, grad_loss, out=out)
        return d_hidden, d_weight, None, None, None, None


def _through_normalization(grad, weight, inverse_norms):
    """Turn ``grad`` (V, D), the gradient of the normalised rows, into that of the raw rows, in place."""
    for start in range(0, weight.shape[0], 8192):
        rows = slice(start, start + 8192)
        scale = inverse_norms[rows].unsqueeze(1)
        unit = weight[rows].float() * scale
        # A row shorter than eps is divided by the constant eps: no projection there.
        along = (unit * grad[rows]).sum(dim=1, keepdim=True) * (scale < 1 / NORM_EPS)
        grad[rows] = (grad[rows] - unit * along) * scale
