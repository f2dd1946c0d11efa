"""Training runs whose loss or gradient is spoilt at chosen updates; leaves hashes of weights and states.

python spike_runs.py runs.json: a list of {"flags": [...], "spikes": {"update": kind}, "rank": r}, see KINDS.
Every process of a launch calls it, and writes runs.json with its rank behind the name.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from transformers import Trainer
from transformers.trainer_callback import TrainerCallback


def scaled_gradient(loss, factor):
    loss = loss.clone()
    loss.register_hook(lambda gradient: gradient * factor)
    return loss


# What is done to a micro-batch's loss.
KINDS = {
    "nan": lambda loss: loss * float("nan"),
    "inf": lambda loss: loss * float("inf"),
    "zero": lambda loss: loss * 0,
    "steep": lambda loss: scaled_gradient(loss, 1e6),
    "no_gradient": lambda loss: scaled_gradient(loss, float("inf")),
}


def tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            yield from tensors(value[key])
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)


def sha256(trainer) -> str:
    """Of what the optimizer changes on this rank: weights, fp32 masters, moments, its step counter."""
    state = hashlib.sha256()
    weights = [getattr(p, "ds_tensor", p).detach() for p in trainer.model.parameters()]
    optimizer = trainer.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    groups = [p for group in optimizer.param_groups for p in group["params"]]
    for tensor in [*weights, *tensors([optimizer.state[p] for p in groups if p in optimizer.state]), *groups]:
        state.update(tensor.detach().float().contiguous().numpy().tobytes())
    return state.hexdigest()


class Hashes(TrainerCallback):
    def __init__(self, trainer, into):
        self.trainer, self.into = trainer, into

    def on_step_end(self, args, state, control, **kwargs):
        self.into.append(sha256(self.trainer))


def run(flags, spikes, rank) -> dict:
    """One run: hashes after each update, the log's rows, and the error it ended with."""
    from baichuan_sft.train import sft
    from baichuan_sft.train.trainer import SftTrainer

    hashes: list = []
    trainers: list = []
    plain, build = Trainer.compute_loss, SftTrainer.__init__

    def compute_loss(self, *args, **kwargs):
        loss = plain(self, *args, **kwargs)
        kind = spikes.get(str(self.state.global_step + 1)) if self.args.process_index == rank else None
        return KINDS[kind](loss) if kind else loss

    def init(self, *args, **kwargs):
        build(self, *args, **kwargs)
        trainers.append(self)
        self.add_callback(Hashes(self, hashes))

    Trainer.compute_loss, SftTrainer.__init__, error = compute_loss, init, ""
    try:
        sft.main(flags)
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
    finally:
        Trainer.compute_loss, SftTrainer.__init__ = plain, build
    return {"hashes": hashes, "log": trainers[0].state.log_history if trainers else [], "error": error}


def main(path: str) -> None:
    import deepspeed
    from accelerate.state import AcceleratorState, GradientState

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")  # once for all runs
    results = []
    for entry in json.loads(Path(path).read_text()):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        results.append(run(entry["flags"], entry["spikes"], entry.get("rank", 0)))
    Path(f"{path}-{os.environ.get('RANK', '0')}").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(next(word for word in sys.argv[1:] if word.endswith(".json")))
