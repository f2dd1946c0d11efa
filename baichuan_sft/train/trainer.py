"""HF Trainer, with the checks that a run cannot fail in silence.

The loss itself needs nothing here: the model divides by ``num_items_in_batch``, which Trainer counts over
all micro-batches of an update and all ranks.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback

from baichuan_sft.checkpoint import is_adapter, load_model, verify
from baichuan_sft.data.dataset import NO_ITEM
from baichuan_sft.data.packing import Collator
from baichuan_sft.data.template import IGNORE
from baichuan_sft.errors import CheckpointFault, NumericalFault
from baichuan_sft.train.record import RunRecord

CAUSES = "Likely causes: too high a learning rate, fp16 overflow (use bf16), or damaged weights."
# Of the largest logit: what another device and kernel round differently, TF32's 10 bits included.
RELOAD_TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 1e-1, torch.float16: 1e-1}
PROBE_TOKENS = 16


@dataclass(frozen=True)
class BatchFacts:
    """What a batch is told by, counted before it goes to a GPU: asking there would wait for the GPU."""

    items: list[int]
    num_computed: int
    num_real: int
    num_targets: int


class FactsCollator(Collator):
    """``Collator`` that adds ``facts``; ``SftTrainer.compute_loss`` takes them out again."""

    def __call__(self, segments):
        batch: dict[str, Any] = super().__call__(segments)
        batch["facts"] = BatchFacts(
            items=[segment["item"] for segment in segments if segment["item"] != NO_ITEM],
            num_computed=batch["input_ids"].numel(),
            num_real=int(batch["attention_mask"].sum()),
            num_targets=int((batch["labels"][:, 1:] != IGNORE).sum()),
        )
        return batch


class SftTrainer(Trainer):
    """Trainer that names a bad batch, verifies what it saved, and counts tokens.

    Args:
        record: written beside every save.
        check_reload: load the first save again, on the CPU, and compare its logits.
    """

    def __init__(self, *, record: RunRecord, check_reload: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.record = record
        self.check_reload = check_reload
        self.items_of_update: list[int] = []
        # computed, real, target tokens since the last log, this rank
        self.counts = torch.zeros(3, dtype=torch.float64)
        self.counted_since = time.monotonic()
        for callback in (ProgressCallback, PrinterCallback):
            self.remove_callback(callback)
        bar = sys.stderr.isatty() and not self.args.disable_tqdm
        self.add_callback(ProgressBar() if bar else LogLines())
        self.add_callback(record)
        self.add_callback(Stage0Norm(self))

    # --- one step ---------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        facts = inputs.pop("facts")
        self.items_of_update = self.items_of_update + facts.items
        self.counts += torch.tensor([facts.num_computed, facts.num_real, facts.num_targets])
        loss: Any = super().compute_loss(model, inputs, False, num_items_in_batch)
        value = loss.item()
        if not math.isfinite(value):
            self._stop(self.state.global_step + 1, f"the loss is {value}")
        if value == 0 and facts.num_targets:
            self._stop(self.state.global_step + 1, f"the loss is 0 over {facts.num_targets} targets")
        return loss

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, *args, **kwargs):
        norm = float(grad_norm) if grad_norm is not None else 0.0
        # DeepSpeed's fp16 scaler skips such a step by itself and lowers its scale.
        if not (math.isfinite(norm) and norm >= 0) and not self.args.fp16:
            self._stop(self.state.global_step, f"the gradient norm is {norm}")
        self.items_of_update = []
        return super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def _stop(self, step: int, what: str) -> None:
        raise NumericalFault(
            f"step {step}, rank {self.args.process_index}: {what}; records (0-based, "
            f"over all files) {', '.join(map(str, self.items_of_update))}. "
            f"Nothing was saved after the last checkpoint. {CAUSES}"
        )

    def log(self, logs, start_time=None):
        if "loss" in logs:
            logs |= self._speed()
        super().log(logs, start_time)

    def _speed(self) -> dict[str, float]:
        """Tokens per second over all ranks since the last log, and the padding share of what was computed."""
        counts = self.accelerator.reduce(self.counts.to(self.args.device), "sum").tolist()
        seconds = time.monotonic() - self.counted_since
        self.counts.zero_()
        self.counted_since = time.monotonic()
        return {
            "tokens_per_second": counts[1] / seconds,
            "targets_per_second": counts[2] / seconds,
            "padding_share": 1 - counts[1] / max(counts[0], 1),
        }

    # --- saving -----------------------------------------------------------------------------------

    def save_model(self, output_dir=None, _internal_call=False):
        """Save, then check the files; after the first save also that they give the live model's logits."""
        output_dir = output_dir or self.args.output_dir
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            # A pickle, of what run.json says in text.
            Path(output_dir, "training_args.bin").unlink(missing_ok=True)
            self.record.write(output_dir)
            if is_adapter(output_dir):
                self._base_model().generation_config.save_pretrained(output_dir)
            verify(output_dir)
        if self.check_reload:
            self._compare_reloaded(output_dir)
            self.check_reload = False
        self.accelerator.wait_for_everyone()

    def _base_model(self):
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    @torch.no_grad()
    def _compare_reloaded(self, path: str | Path) -> None:
        vocab_size = self._base_model().config.vocab_size
        probe = torch.arange(PROBE_TOKENS)[None] * (vocab_size // PROBE_TOKENS)
        # ZeRO-3 gathers each layer over all ranks, so all of them run the live model.
        model: Any = self.model_wrapped
        was_training = model.training
        model.eval()
        live = model(input_ids=probe.to(self.args.device)).logits
        tolerance = RELOAD_TOLERANCE[live.dtype]  # under autocast fp32 weights give half-precision logits
        live = live.float().cpu()
        model.train(was_training)
        if not self.args.should_save:
            return
        dtype = next(model.parameters()).dtype  # a base stored in fp32 may be trained in bf16
        with outside_zero3(), torch.random.fork_rng(devices=[]):
            saved = load_model(path, dtype=dtype)(input_ids=probe).logits.float()
        gap, scale = (live - saved).abs().max().item(), live.abs().max().item()
        tolerance *= max(scale, 1.0)
        if not gap <= tolerance:
            raise CheckpointFault(
                f"{path}: the reloaded model's logits differ from the live ones by {gap:.2g}, more than "
                f"{tolerance:.2g}; the saved weights are not the trained ones."
            )


class Stage0Norm(TrainerCallback):
    """At stage 0 in fp32 DeepSpeed clips by a gradient norm that it tells nobody: keep it where others do."""

    def __init__(self, trainer: SftTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        engine = getattr(self.trainer, "deepspeed", None)
        if engine is None:
            return
        clip = engine.clip_fp32_gradients

        def keep_norm_and_clip():
            grads = [p.grad for p in engine.module.parameters() if p.grad is not None]
            norms = [torch.linalg.vector_norm(grad, dtype=torch.float64) for grad in grads]
            engine._global_grad_norm = torch.linalg.vector_norm(torch.stack(norms))
            clip()

        engine.clip_fp32_gradients = keep_norm_and_clip


@contextlib.contextmanager
def outside_zero3() -> Iterator[None]:
    """Load a model as if DeepSpeed were not active: one rank alone may not partition weights."""
    from transformers.integrations import deepspeed as integration

    active = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = active


def describe(logs: dict[str, float]) -> dict[str, str]:
    """A log event in the few words that fit beside a progress bar."""
    return {
        "loss": f"{logs['loss']:.4f}",
        "grad": f"{logs.get('grad_norm', 0.0):.3f}",
        "lr": f"{logs['learning_rate']:.2e}",
        "tok/s": f"{logs['tokens_per_second']:,.0f}",
        "targets/s": f"{logs['targets_per_second']:,.0f}",
        "padding": f"{logs['padding_share']:.0%}",
    }


class ProgressBar(ProgressCallback):
    """One line on a terminal: steps, time left, loss, speed."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None and "loss" in (logs or {}):
            self.training_bar.set_postfix(describe(logs))


class LogLines(PrinterCallback):
    """One line per log event where there is no terminal, with the time left."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.started, self.first = time.monotonic(), state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or "loss" not in (logs or {}):
            return
        per_step = (time.monotonic() - self.started) / max(state.global_step - self.first, 1)
        left = per_step * (state.max_steps - state.global_step)
        words = " ".join(f"{name} {value}" for name, value in describe(logs).items())
        print(f"step {state.global_step}/{state.max_steps} {words} left {left:.0f} s", flush=True)
