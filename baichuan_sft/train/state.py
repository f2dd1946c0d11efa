"""Optimizer, learning rate schedule and random numbers, to and from a checkpoint, without pickle."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from baichuan_sft.data.streaming import StreamingRows
from baichuan_sft.errors import CheckpointFault
from baichuan_sft.train import universal
from baichuan_sft.train.inputs import stream_file
from baichuan_sft.train.progress import say

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


class State(_Base):
    """What a resumed run goes on from, besides the weights; part of SftTrainer.

    DeepSpeed keeps its optimizer in files of its own, which are pickles: they are read only after the
    manifest has shown that nobody has changed them.
    """

    optimizer: Any
    lr_scheduler: Any
    model_wrapped: Any
    deepspeed: Any

    def _save_optimizer_and_scheduler(self, output_dir):
        if self.is_deepspeed_enabled:
            # LoRA's frozen base lies in --model_name_or_path, and is not saved again each time.
            part = {"exclude_frozen_parameters": True} if hasattr(self.model, "peft_config") else {}
            self.model_wrapped.save_checkpoint(output_dir, **part)
        elif self.args.should_save:
            write_tree(self.optimizer.state_dict(), Path(output_dir, "optimizer"))
        if self.args.should_save and not self._deepspeed_schedules():
            write_tree(self.lr_scheduler.state_dict(), Path(output_dir, "scheduler"))

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None:
            return
        if self.is_deepspeed_enabled:  # which has loaded it with the weights
            self._part_adam_steps()
        else:
            self.optimizer.load_state_dict(read_tree(Path(checkpoint, "optimizer")))
        if not self._deepspeed_schedules():
            load_schedule(self.lr_scheduler, read_tree(Path(checkpoint, "scheduler")))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            universal.clear(str(self.args.output_dir))

    def _run_epoch(self, *args, **kwargs):
        # A run that was killed after its last update has only its result to save; transformers would take
        # one update more. Nor does a resumed run go on that had ended early.
        if self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def _deepspeed_schedules(self) -> bool:
        """DeepSpeed's file has a scheduler of its own, saved with the optimizer."""
        from accelerate.utils import DeepSpeedSchedulerWrapper

        return isinstance(self.lr_scheduler, DeepSpeedSchedulerWrapper)

    def _part_adam_steps(self) -> None:
        """Give every group a count of steps of its own.

        ZeRO-3's universal checkpoint gives all groups one and the same tensor, which each of them would
        count up: Adam's bias correction was off by up to 5e-4 in the loss (DeepSpeed 0.19.8).
        """
        optimizer: Any = self.deepspeed.optimizer
        for state in getattr(getattr(optimizer, "optimizer", optimizer), "state", {}).values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()

    def _save_scaler(self, output_dir):
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and self.args.should_save:
            write_tree(scaler.state_dict(), Path(output_dir, "scaler"))

    def _load_scaler(self, checkpoint):
        scaler = getattr(self.accelerator, "scaler", None)
        if checkpoint is not None and scaler is not None:
            scaler.load_state_dict(read_tree(Path(checkpoint, "scaler")))

    def _save_rng_state(self, output_dir):
        """What each rank has for itself: its random numbers and, in a stream, how far it has read."""
        args = self.args
        Path(output_dir).mkdir(parents=True, exist_ok=True)  # where rank 0 is not there yet
        state = {"world_size": args.world_size, **random_state()}
        _rng_file(output_dir, args.process_index).write_text(json.dumps(state))
        if isinstance(self.train_dataset, StreamingRows):
            file = stream_file(output_dir, args.process_index)
            file.write_text(json.dumps(self.train_dataset.state_dict()))

    def _load_rng_state(self, checkpoint):
        if checkpoint is None:
            return
        args = self.args
        file = _rng_file(checkpoint, args.process_index)
        state = json.loads(file.read_text()) if file.exists() else {}
        if state.get("world_size") == args.world_size:
            set_random_state(state)
            return
        # The same on all ranks, as at the beginning of a run, but not what the beginning drew.
        torch.manual_seed(args.seed + self.state.global_step)
        say("resume: with another number of ranks, dropout draws other numbers than it would have")


def _rng_file(checkpoint: str | Path, rank: int) -> Path:
    return Path(checkpoint) / f"rng_state_{rank}.json"


def random_state() -> dict[str, Any]:
    """Where Python's, NumPy's and torch's generators of this process stand, for JSON."""
    numpy: Any = np.random.get_state(legacy=False)
    state = {
        "python": random.getstate(),
        "numpy": numpy | {"state": {"key": numpy["state"]["key"].tolist(), "pos": numpy["state"]["pos"]}},
        "torch": torch.random.get_rng_state().numpy().tobytes().hex(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().numpy().tobytes().hex()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Undo what was drawn since ``random_state``."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(state["numpy"])
    torch.random.set_rng_state(_bytes(state["torch"]))
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(_bytes(state["cuda"]))


def _bytes(digits: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(digits), dtype=torch.uint8)


def load_schedule(scheduler: Any, state: dict[str, Any]) -> None:
    """Go on at the saved update, of the schedule that the arguments say.

    A schedule's state has the peak rate in it, and the optimizer's the current one: a rate that was allowed
    to change would be accepted and ignored. Where nothing changed these are the same bits.
    """
    peak = getattr(scheduler, "base_lrs", [])
    scheduler.load_state_dict(state)
    if not hasattr(scheduler, "lr_lambdas"):
        return
    scheduler.base_lrs = peak
    rates = [rate * factor(scheduler.last_epoch) for rate, factor in zip(peak, scheduler.lr_lambdas)]
    scheduler._last_lr = rates
    for group, rate, first in zip(scheduler.optimizer.param_groups, rates, peak):
        group["lr"], group["initial_lr"] = rate, first


# --- trees of plain values and tensors --------------------------------------------------------------


def write_tree(tree: Any, path: Path) -> None:
    """``path``.json, with the tensors of the tree in ``path``.safetensors.

    A tensor that stands in two places is written once, and read as one again.
    """
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(_encode(tree, tensors, {}))
    if tensors:
        save_file(tensors, path.with_suffix(".safetensors"))
    path.with_suffix(".json").write_text(text)


def read_tree(path: Path) -> Any:
    """What ``write_tree`` wrote, with the tensors on the CPU.

    Raises:
        CheckpointFault: it is not there.
    """
    from safetensors.torch import load_file

    file = path.with_suffix(".json")
    if not file.exists():
        raise CheckpointFault(f"{file}: not there, so the run cannot go on from {path.parent}.")
    stored = path.with_suffix(".safetensors")
    return _decode(json.loads(file.read_text()), load_file(stored) if stored.exists() else {})


def _encode(value: Any, tensors: dict[str, torch.Tensor], names: dict[Any, str]) -> Any:
    """JSON has no tuples, and no keys but strings: containers say what they are."""
    if isinstance(value, torch.Tensor):
        value = value.detach().contiguous()
        known = (value.data_ptr(), value.dtype, tuple(value.shape))
        if known not in names:
            names[known] = str(len(tensors))
            tensors[names[known]] = value
        return {"tensor": names[known]}
    if isinstance(value, dict):
        return {"dict": [[key, _encode(item, tensors, names)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_encode(item, tensors, names) for item in value]}
    assert value is None or isinstance(value, bool | int | float | str), f"{type(value)} needs a pickle"
    return value


def _decode(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _decode(item, tensors) for key, item in content}
    items = [_decode(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items
