"""A run that got a signal ends with the update at hand: saved, on all ranks, and with its exit code."""

from __future__ import annotations

from typing import TYPE_CHECKING

from baichuan_sft.train import peers, signals, status
from baichuan_sft.train.numerics import agree
from baichuan_sft.train.progress import say
from baichuan_sft.train.signals import Interrupted

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


class EvaluationLeft(Exception):
    """A signal came during an evaluation; all ranks leave it at the same batch."""


class Stopping(_Base):
    """The end of each update: the step is told, and a signal obeyed; part of SftTrainer."""

    stop_code: float  # exit code of the signal that some rank got; all ranks agree on it (numerics.py)
    committed_step: int  # of the last checkpoint that counts (saving.py)
    announced = False

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, model, trial, *args, **kwargs):
        step = self.state.global_step
        status.update(step=step)
        peers.tell(f"step {step}")
        if self._stops():
            self._announce()
            self.control.should_evaluate, self.control.should_save = False, step != self.committed_step
        elsewhere = self.control.should_save or self.control.should_evaluate
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        except EvaluationLeft:
            self._announce()
            self._save_checkpoint(model, trial)
        if elsewhere and not self.stop_code:  # a signal during a save need not wait for another update
            (self.stop_code,) = agree(float(signals.wanted()), device=self.args.device)
        self.control.should_training_stop |= self._stops()

    def _stops(self) -> bool:
        """A run that has all updates behind it ends with its result instead."""
        return bool(self.stop_code) and self.state.global_step < self.state.max_steps

    def _announce(self) -> None:
        if not self.announced and self.state.global_step != self.committed_step:
            name = signals.name_of(int(self.stop_code))
            say(f"{name}: saving checkpoint-{self.state.global_step}, then exit {self.stop_code:g}")
        self.announced = True

    def leave_evaluation(self) -> None:
        """Every rank calls it before each batch of an evaluation."""
        (self.stop_code,) = agree(float(signals.wanted()), device=self.args.device)
        if self.stop_code:
            raise EvaluationLeft

    def _save_checkpoint(self, model, trial):
        status.update(phase="save")
        super()._save_checkpoint(model, trial)
        status.update(phase="train")

    def train(self, *args, **kwargs):
        """Train; raises Interrupted where a signal ended it before the last update."""
        signals.train_begins()
        status.update(phase="train")
        try:
            result = super().train(*args, **kwargs)
        except EvaluationLeft:  # before the first update
            raise self._interrupted("there is nothing to save") from None
        if not self._stops():
            return result
        step = self.state.global_step
        saved = f"checkpoint-{step} is saved; --resume auto goes on from there"
        raise self._interrupted(saved if step == self.committed_step else f"checkpoint-{step} was not saved")

    def _interrupted(self, text: str) -> Interrupted:
        code = int(self.stop_code)
        error = Interrupted(f"{signals.name_of(code)}: {text}", code, everywhere=True)
        status.fail(error, code)  # now: the launcher may end this rank as soon as another has ended
        return error
