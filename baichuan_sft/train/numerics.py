"""A number that must not be trained on stops all ranks at that update, or the update is left out.

Each rank looks at its own loss. Before the last backward of an update one all-reduce of two numbers tells
every rank whether any of them saw a fault, or got a signal; it is read instead of the loss, so no device
waits once more. The gradient's norm is the same on all ranks, and looked at before the optimizer takes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed
from transformers.trainer_callback import TrainerCallback

from baichuan_sft.errors import NumericalFault
from baichuan_sft.train import signals
from baichuan_sft.train.progress import say
from baichuan_sft.train.speed import Speed

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

CAUSES = "Likely causes: too high a learning rate, fp16 overflow (use bf16), or damaged weights."
NAMED_RECORDS = 50  # of a rank in a message
# Updates that may be left out: so many, and this share of all behind them. More is no spike.
SKIPS, SKIP_SHARE = 5, 0.05


def agree(*numbers: float | torch.Tensor, device: Any) -> list[float]:
    """The largest over all ranks of each number; every rank calls it, and learns the same."""
    word = torch.stack([torch.as_tensor(n, dtype=torch.float32).to(device).squeeze() for n in numbers])
    if distributed.is_initialized() and distributed.get_world_size() > 1:
        distributed.all_reduce(word, distributed.ReduceOp.MAX)
    return word.tolist()


class Numerics(_Base):
    """The loss of each micro-batch and the gradient norm of each update, looked at; part of SftTrainer."""

    speed: Speed
    _base_model: Callable[[], Any]
    sources: list[str]  # names of the data files, by number
    items_of_update: list[tuple[int, int]] = []
    bad = ""  # what is wrong with the update at hand, on this rank
    bad_items: list[tuple[int, int]] = []  # of the micro-batches it was in
    bad_loss = False  # of the micro-batch at hand
    spoilt = False  # the update at hand is left out
    skipped: list[int] = []  # updates left out
    stop_code = 0.0  # exit code of the signal that some rank got
    good_loss: torch.Tensor | None = None  # the last one that was trained on

    # --- loss -------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        facts = inputs.pop("facts")
        self.items_of_update = self.items_of_update + facts.items
        self.speed.add(facts.num_computed, facts.num_real, facts.num_targets, facts.squared_lengths)
        loss: Any = super().compute_loss(model, inputs, False, num_items_in_batch)
        value = loss.detach()
        wrong = ~value.isfinite() | ((value == 0) & (facts.num_targets > 0))
        last = self.accelerator.sync_gradients
        if last:  # of the update; what earlier micro-batches showed counts too
            own = wrong.float().clamp(min=float(bool(self.bad)))
            spike, self.stop_code = agree(own, float(signals.wanted()), device=loss.device)
        else:
            spike = wrong.item()
        self.bad_loss = bool(spike and wrong.item())
        if self.bad_loss:
            what = f"0 over {facts.num_targets} targets" if value == 0 else f"{value.item()}"
            self.bad, self.bad_items = f"the loss is {what}", self.bad_items + facts.items
        if last and spike:
            self._spike(self.state.global_step + 1)
        return loss

    def training_step(self, *args, **kwargs):
        """A loss that is not trained on counts as the one before; transformers adds up what this returns."""
        loss = super().training_step(*args, **kwargs)
        if self.bad_loss:  # still here, so it is left out
            return torch.zeros_like(loss) if self.good_loss is None else self.good_loss
        self.good_loss = loss
        return loss

    # --- gradient norm ----------------------------------------------------------------------------

    def _clip_grad_norm(self, model):
        if self.is_deepspeed_enabled:
            return super()._clip_grad_norm(model)
        return None  # _get_grad_norm clips, after a look at the norm: clipping by NaN would hide where it is

    def _get_grad_norm(self, model, grad_norm=None):
        if self.is_deepspeed_enabled:  # whose engine has stepped long ago, see `guard`
            return super()._get_grad_norm(model, grad_norm)
        self.accelerator.unscale_gradients()
        parameters = [p for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        scaler = self.accelerator.scaler
        if self.judge(norm, scaler.get_scale() if scaler is not None else None):
            # without gradients an optimizer touches neither weights nor state
            model.zero_grad(set_to_none=True)
        elif self.args.max_grad_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.args.max_grad_norm, norm)
        return norm

    def judge(self, norm: Any, loss_scale: float | None = None) -> bool:
        """Whether the update at hand is to be left out; all ranks call it once, with the same numbers.

        Args:
            norm: of the whole gradient before clipping, not scaled. loss_scale: of fp16, else None.
        Raises:
            NumericalFault: where ``on_spike`` says stop, or too many were left out.
        """
        if self.spoilt:
            return True
        args: Any = self.args
        norm, limit = float(norm), args.grad_norm_limit
        finite = math.isfinite(norm) and norm >= 0  # DeepSpeed says -1 for what is not finite
        if not finite and loss_scale is not None and loss_scale > 1:
            return False  # the scaler leaves such an update out by itself, and lowers its scale
        if not finite:
            self.bad = f"the gradient norm is {norm}"
            if loss_scale is not None:
                self.bad += f" at fp16's smallest loss scale, {loss_scale:g}"
        elif limit is not None and norm > limit:
            self.bad = f"the gradient norm is {norm:.4g}, above --grad_norm_limit {limit:g}"
        else:
            return False
        self.bad_items = self.items_of_update
        self._spike(self.state.global_step + 1)
        return True

    # --- what follows -----------------------------------------------------------------------------

    def _spike(self, step: int) -> None:
        """Stop all ranks, or mark the update as left out. Every rank calls it."""
        args: Any = self.args
        if args.on_spike == "skip":
            self.skipped = [*self.skipped, step]
            self.spoilt = True
            if self.bad:
                print(f"step {step}, {self._what()}; this update is left out", flush=True)
            if len(self.skipped) <= SKIPS + SKIP_SHARE * step:
                return
        parts = [self._what()] if self.bad else []
        if distributed.is_initialized():
            gathered: list[Any] = [None] * distributed.get_world_size()
            distributed.all_gather_object(gathered, parts)
            parts = [part for rank in gathered for part in rank]
        many = f"{self.skips()}, more than spikes; the last: " if self.skipped else ""
        fault = NumericalFault(
            f"{many}step {step}, {'; '.join(parts)}. Nothing was saved after the last checkpoint. {CAUSES}"
        )
        fault.everywhere = True  # type: ignore[attr-defined]
        raise fault

    def skips(self) -> str:
        steps = ", ".join(map(str, self.skipped))
        return f"skipped {len(self.skipped)} of {self.state.global_step} updates: steps {steps}"

    def say_skipped(self) -> None:
        if self.skipped:
            say(self.skips())

    def _what(self) -> str:
        items: dict[str, list[str]] = {}
        named = list(dict.fromkeys(self.bad_items))
        for source, item in named[:NAMED_RECORDS]:
            items.setdefault(self.sources[source], []).append(str(item))
        records = "; ".join(f"{path} item {', '.join(numbers)}" for path, numbers in items.items())
        if len(named) > NAMED_RECORDS:
            records += f" and {len(named) - NAMED_RECORDS} more"
        return f"rank {self.args.process_index}: {self.bad}; records (0-based) {records}{self._where()}"

    def _where(self) -> str:
        """The first weight or gradient that is not finite, of this rank's share under ZeRO."""
        parameters = list(self._base_model().named_parameters())
        for name, p in parameters:
            if not getattr(p, "ds_tensor", p).isfinite().all():
                return f"; weight {name} is not finite"
        for name, p in parameters:
            if p.grad is not None and not p.grad.isfinite().all():
                return f"; gradient of {name} is not finite"
        return ""

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        self.items_of_update, self.bad, self.bad_items, self.spoilt = [], "", [], False
        return super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs, *args, **kwargs):
        if self.skipped:
            logs["skipped_updates"] = len(self.skipped)
            if not math.isfinite(logs.get("grad_norm", 0.0)):
                del logs["grad_norm"]  # of an update left out; JSON has no word for it
        super().log(logs, *args, **kwargs)


class Guard(TrainerCallback):
    """Puts the trainer's judgement into DeepSpeed's engine, where there is one."""

    def __init__(self, trainer: Numerics) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        engine = getattr(self.trainer, "deepspeed", None)
        if engine is not None:
            guard(engine, self.trainer.judge)


def guard(engine: Any, judge: Callable[..., bool]) -> None:
    """Have DeepSpeed's optimizer ask ``judge`` between the gradient's norm and its step.

    DeepSpeed steps inside ``backward``. Where the answer is yes it takes the way of an fp16 overflow:
    gradients dropped, weights and states kept. Its flag is taken back after that, so the schedule goes on.
    """
    from deepspeed.runtime.utils import get_global_norm_of_tensors

    optimizer, step = engine.optimizer, engine.optimizer.step
    kind = "stage 3" if hasattr(optimizer, "_get_norm_groups") else "stage 0"
    kind = "stage 1 or 2" if hasattr(optimizer, "scaled_global_norm") else kind
    left_out = False

    def ask(norm):
        nonlocal left_out
        fp16 = getattr(optimizer, "dtype", None) == torch.float16 or engine.fp16_enabled()
        scale = float(optimizer.loss_scale) if fp16 else None
        left_out = judge(norm / (scale or 1.0), scale)
        return left_out

    if kind == "stage 3":
        groups = optimizer._get_norm_groups

        def norm_groups():
            found = groups()
            norms = torch.stack([torch.as_tensor(n, dtype=torch.float32) for n in found])
            norm = norms.norm() if (norms >= 0).all() else torch.tensor(math.nan)
            return [torch.full_like(n, math.nan) for n in map(torch.as_tensor, found)] if ask(norm) else found

        optimizer._get_norm_groups = norm_groups
    elif kind == "stage 1 or 2":
        global_norm = optimizer.scaled_global_norm
        if not engine.fp16_enabled():  # what is not finite comes here, and is not left out in silence
            optimizer.check_grad_overflow, optimizer.check_overflow = True, lambda **_: None

        def scaled_global_norm(*args, **kwargs):
            norm = global_norm(*args, **kwargs)
            return torch.full_like(torch.as_tensor(norm), math.nan) if ask(norm) else norm

        optimizer.scaled_global_norm = scaled_global_norm

    def total_norm():
        if hasattr(optimizer, "clear_hp_grads"):  # ZeRO-1 in bf16, with flat gradients of its own
            return get_global_norm_of_tensors(optimizer.get_grads_for_norm()[0], mpu=optimizer.mpu)
        grads = [p.grad for p in engine.module.parameters() if p.grad is not None]
        norms = [torch.linalg.vector_norm(grad, dtype=torch.float64) for grad in grads]
        return torch.linalg.vector_norm(torch.stack(norms))

    clip = engine.clip_fp32_gradients
    before_clipping: list[Any] = []

    def clip_fp32_gradients():
        before_clipping.append(total_norm())  # DeepSpeed tells it nobody
        clip()

    engine.clip_fp32_gradients = clip_fp32_gradients

    def guarded(*args, **kwargs):
        nonlocal left_out
        left_out = False
        if kind == "stage 0":
            engine._global_grad_norm = before_clipping.pop() if before_clipping else total_norm()
            if ask(engine._global_grad_norm):
                if hasattr(optimizer, "clear_hp_grads"):
                    optimizer.clear_hp_grads()
                return
        try:
            step(*args, **kwargs)
        except Exception as error:
            if "loss scale already at minimum" in str(error):
                judge(math.inf, 0.0)
            raise
        if left_out:
            optimizer.overflow = False
        elif getattr(optimizer, "overflow", False) and not engine.fp16_enabled():
            judge(math.nan)  # DeepSpeed has left it out without asking

    optimizer.step = guarded
