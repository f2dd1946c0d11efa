"""The evaluation that counts: which checkpoint is the best, when none comes any more, and its weights back.

All of it is read from the log of evaluations that each checkpoint keeps, so a resumed run knows what the
run before it knew, wherever its directory lies now.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.trainer_callback import TrainerCallback

from baichuan_sft import commit
from baichuan_sft.checkpoint.files import is_adapter, opened, weight_files
from baichuan_sft.errors import UserError, pick
from baichuan_sft.train.progress import say
from baichuan_sft.train.together import place, together

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

METRICS = {"eval_loss": False, "eval_perplexity": False, "eval_token_accuracy": True}  # greater is better
WEIGHTS = re.compile(r"(adapter_)?model[^/]*\.(safetensors|json)")
PLATEAU = ("reduce_lr_on_plateau", "greedy")  # schedules that follow the metric too


def check_best(values: dict[str, Any]) -> None:
    """Bring the metric to one name and direction.

    Raises:
        UserError: nothing asks for a best one, nothing evaluates, or what is evaluated is not saved.
    """
    patience, load = values["early_stopping_patience"], values["load_best_model_at_end"]
    asked = "--load_best_model_at_end True" if load else f"--early_stopping_patience {patience}"
    schedule = getattr(values["lr_scheduler_type"], "value", values["lr_scheduler_type"])
    if not load and patience is None and schedule not in PLATEAU:
        for name in ("metric_for_best_model", "greater_is_better"):
            if values[name] is not None:
                way = "--load_best_model_at_end True or --early_stopping_patience N"
                raise UserError(f"--{name} {values[name]} needs {way}.")
        return
    if (load or patience is not None) and values["eval_strategy"] == "no":
        raise UserError(f"{asked} needs evaluations: --dev_ratio or --eval_data_path, with --eval_strategy.")
    name = values["metric_for_best_model"] or "eval_loss"
    name = name if name.startswith("eval_") else f"eval_{name}"
    greater = pick("--metric_for_best_model", name, METRICS)
    if values["greater_is_better"] not in (None, greater):
        better = "greater" if greater else "smaller"
        raise UserError(
            f"--greater_is_better {values['greater_is_better']}: of {name} a {better} value is better; leave "
            "the flag out."
        )
    values["metric_for_best_model"], values["greater_is_better"] = name, greater
    if load:
        _check_saves(values)


def _check_saves(values: dict[str, Any]) -> None:
    when, saved = values["eval_strategy"], values["save_strategy"]
    if saved != when:
        raise UserError(
            f"--load_best_model_at_end True: --eval_strategy {when} and --save_strategy {saved} differ, so "
            f"what is evaluated is not what is saved; --save_strategy {when}."
        )
    every, save_every = values["eval_steps"] or values["logging_steps"], values["save_steps"]
    if when == "steps" and every >= 1 and save_every >= 1 and save_every % every:
        raise UserError(
            f"--load_best_model_at_end True: --save_steps {save_every:g} is no multiple of --eval_steps "
            f"{every:g}, so a save would have no evaluation."
        )


def by_step(history: list[dict[str, Any]], metric: str) -> dict[int, float]:
    """The metric of each update that was evaluated, in order."""
    return {row["step"]: row[metric] for row in history if metric in row}


def ranked(found: dict[int, float], greater: bool) -> list[int]:
    """Updates, the best first and the earlier one of equals."""
    return sorted(found, key=lambda step: (-found[step] if greater else found[step], step))


def ended_early(history: list[dict[str, Any]], flags: dict[str, Any]) -> str | None:
    """Why a run with this log is over by ``--early_stopping_patience``; None: it is not."""
    patience, metric = flags["early_stopping_patience"], flags["metric_for_best_model"]
    found = by_step(history, metric)
    if patience is None or not found:
        return None
    best = ranked(found, flags["greater_is_better"])[0]
    since = list(found)[::-1].index(best)
    if since < patience:
        return None
    return f"{since} evaluations in a row were no better than {metric} {found[best]:.4f} of update {best}"


class EarlyStopping(TrainerCallback):
    """Ends training with the update at hand; or at once, where a resumed run had ended so."""

    def on_evaluate(self, args, state, control, **kwargs):
        why = ended_early(state.log_history, vars(args))
        if why is not None and state.global_step < state.max_steps:
            say(f"step {state.global_step}: training ends early, {why}")
            control.should_training_stop = True

    on_train_begin = on_evaluate


class Best(_Base):
    """The best checkpoint is kept, and its weights become the result; part of SftTrainer."""

    record: Any
    finish_save: Callable[[], None]
    _first: Callable[..., Any]
    _stops: Callable[[], bool]
    earlier: list[Path] = []  # where the run that this one goes on from has its checkpoints

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        if resume_from_checkpoint is not None:
            self.earlier = [Path(resume_from_checkpoint).parent]
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def best_saved(self) -> list[Path]:
        """Committed checkpoints that were evaluated, the best first; none where the last is the result."""
        if not self.args.load_best_model_at_end:
            return []
        places = dict.fromkeys([Path(str(self.args.output_dir)), *self.earlier])
        steps = ranked(self._evaluated(), bool(self.args.greater_is_better))
        paths = [place / f"checkpoint-{step}" for step in steps for place in places]
        return [path for path in paths if not commit.problems(path, ())]

    def _evaluated(self) -> dict[int, float]:
        return by_step(self.state.log_history, str(self.args.metric_for_best_model))

    def _finalize_training(self, *args, **kwargs):
        # A run that a signal has ended goes on from its last weights, and has no result yet.
        if self.args.load_best_model_at_end and not self._stops():
            self.finish_save()
            self._take_best()
        return super()._finalize_training(*args, **kwargs)

    def _load_best_model(self):
        """Nothing: ``_take_best`` has done it. transformers would have DeepSpeed read its optimizer again."""

    def _take_best(self) -> None:
        path = together(self._first, self._best_whole)[0]
        if path is None:
            say("warning: no evaluated checkpoint is there, so the last weights are the result")
            return
        step, metric, found = commit.step_of(path), str(self.args.metric_for_best_model), self._evaluated()
        top = ranked(found, bool(self.args.greater_is_better))[0]
        missed = "" if top == step else f"; update {top} had {found[top]:.4f}, and is not saved"
        say(f"best: {path.name}, {metric} {found[step]:.4f}, is the result{missed}")
        self.record.facts["best"] = {"checkpoint": path.name, metric: found[step]}
        if step != self.state.global_step:
            load_weights(self.accelerator.unwrap_model(self.model), path)

    def _best_whole(self) -> Path | None:
        for path in self.best_saved():
            listed = commit.read_manifest(path)["files"]  # the optimizer's are larger, and not needed
            bad = commit.problems(path, [name for name in listed if WEIGHTS.fullmatch(name)])
            if not bad:
                return path
            say(f"{path.name}: {commit.summary(bad)}, so another one is the best")
        return None


@torch.no_grad()
def load_weights(model: nn.Module, path: Path) -> None:
    """Trained weights of a checkpoint, in place, read by the first rank; every rank calls it.

    DeepSpeed's optimizer keeps its own copy of the weights as it was: nothing can be trained after this.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    first = place()[0] == 0
    if is_adapter(path):
        with _written(list(trained.values())):
            if first:
                _load_adapter(model, path)
        return
    files = weight_files(path) if first else []
    stored = {name: part for file in files for name, part in opened(file).items()}
    for name, parameter in trained.items():
        with _written([parameter]):
            if first:
                parameter.copy_(stored[name][:])


def _load_adapter(model: nn.Module, path: Path) -> None:
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    (file,) = weight_files(path)
    done: Any = set_peft_model_state_dict(model, load_file(file))
    assert not done.unexpected_keys and not [name for name in done.missing_keys if "lora_" in name], done


@contextlib.contextmanager
def _written(parameters: list[nn.Parameter]) -> Iterator[None]:
    """What the first rank writes into whole parameters inside, all ranks have after."""
    if any(hasattr(p, "ds_id") for p in parameters):
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
            yield
        return
    yield
    if place()[1] > 1:
        for parameter in parameters:
            torch.distributed.broadcast(parameter.data, 0)
