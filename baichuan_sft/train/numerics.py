"""A number that must not be trained on stops the run, and names the records that were in it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from baichuan_sft.errors import NumericalFault
from baichuan_sft.train.speed import Speed

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

CAUSES = "Likely causes: too high a learning rate, fp16 overflow (use bf16), or damaged weights."


class Numerics(_Base):
    """The loss of each micro-batch and the gradient norm of each update, looked at; part of SftTrainer."""

    speed: Speed
    sources: list[str]  # names of the data files, by number
    items_of_update: list[tuple[int, int]] = []

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        facts = inputs.pop("facts")
        self.items_of_update = self.items_of_update + facts.items
        self.speed.add(facts.num_computed, facts.num_real, facts.num_targets, facts.squared_lengths)
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
        items: dict[str, list[str]] = {}
        for source, item in dict.fromkeys(self.items_of_update):
            items.setdefault(self.sources[source], []).append(str(item))
        records = "; ".join(f"{path} item {', '.join(numbers)}" for path, numbers in items.items())
        raise NumericalFault(
            f"step {step}, rank {self.args.process_index}: {what}; records (0-based) {records}. "
            f"Nothing was saved after the last checkpoint. {CAUSES}"
        )
