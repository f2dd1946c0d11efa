"""Saves that are checked: the files, and after the first one the logits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from baichuan_sft.checkpoint import is_adapter, load_model, verify
from baichuan_sft.errors import CheckpointFault
from baichuan_sft.quantization import quantization_of
from baichuan_sft.train.processes import outside_zero3
from baichuan_sft.train.record import RunRecord
from baichuan_sft.train.speed import Speed

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

# Of the largest logit: what another device and kernel round differently, TF32's 10 bits included.
RELOAD_TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 1e-1, torch.float16: 1e-1}
PROBE_TOKENS = 16


class Saving(_Base):
    """What a save consists of, and its checks; part of SftTrainer."""

    speed: Speed
    record: RunRecord
    check_reload: bool

    def _save_checkpoint(self, *args, **kwargs):
        with self.speed.paused():
            return super()._save_checkpoint(*args, **kwargs)

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
            reloaded = load_model(path, dtype=dtype, quantize=quantization_of(self._base_model()))
            saved = reloaded(input_ids=probe).logits.float()
        gap, scale = (live - saved).abs().max().item(), live.abs().max().item()
        tolerance *= max(scale, 1.0)
        if not gap <= tolerance:
            raise CheckpointFault(
                f"{path}: the reloaded model's logits differ from the live ones by {gap:.2g}, more than "
                f"{tolerance:.2g}; the saved weights are not the trained ones."
            )
