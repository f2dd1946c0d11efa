"""The family's benchmarks while training: a small seeded part of each, with the weights at hand.

All ranks ask the same batches, so that ZeRO-3 gathers each layer on all of them; rank 0 writes.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from transformers.trainer_callback import TrainerCallback

from baichuan_sft import commit
from baichuan_sft.errors import UserError
from baichuan_sft.train.answers import answer, aside
from baichuan_sft.train.args import Settings as Run
from baichuan_sft.train.progress import say
from baichuan_sft.train.together import gather

if TYPE_CHECKING:
    from transformers import Trainer as _Base

    from baichuan_sft.evaluate.benchmarks import Benchmark
    from baichuan_sft.evaluate.items import Loaded
else:
    _Base = object

STYLE = "baichuan"
Tasks = list[tuple["Benchmark", "Loaded"]]


def check_tasks(values: dict[str, Any], parser: argparse.ArgumentParser) -> None:
    """
    Raises:
        UserError: an unknown benchmark, no directory of their files, or flags that say only how to ask.
    """
    from baichuan_sft.evaluate.benchmarks import select

    if values["eval_tasks"] is None:
        for name in ("eval_data_dir", "eval_items", "eval_tasks_steps"):
            if values[name] != parser.get_default(name):
                raise UserError(f"--{name} {values[name]} needs --eval_tasks.")
        return
    select(values["eval_tasks"])
    if values["eval_data_dir"] is None:
        raise UserError("--eval_tasks needs --eval_data_dir: where do the benchmark authors' files lie?")
    if not os.path.isdir(values["eval_data_dir"]):
        raise UserError(f"--eval_data_dir {values['eval_data_dir']}: no such directory.")


def load_tasks(run: Run) -> Tasks:
    """The benchmarks asked for, a seeded part of each; every rank calls it, before the model is loaded.

    Raises:
        UserError: files that cannot be read, or that are others on another rank; a benchmark asked for by
            name that is not there. What a domain names and is not there is said and left out.
        EnvironmentFault: generated programs would run, and no sandbox can be made.
    """
    from baichuan_sft.evaluate import data, runner
    from baichuan_sft.evaluate.benchmarks import BENCHMARKS, select
    from baichuan_sft.evaluate.items import Settings

    training = run.training
    settings = Settings(seed=training["seed"])
    named = {word.strip() for word in training["eval_tasks"].split(",")}
    tasks: Tasks = []
    for name in select(training["eval_tasks"]):
        try:
            loaded = data.load(name, training["eval_data_dir"], settings)
        except data.Absent as absent:
            if name in named:
                raise
            say(f"{absent} Left out.")
            continue
        runner.check_sandbox(BENCHMARKS[name], settings)
        tasks.append((BENCHMARKS[name], data.draw(loaded, training["eval_items"], training["seed"])))
    if not tasks:
        raise UserError(f"--eval_tasks {training['eval_tasks']}: none of them lies in --eval_data_dir.")
    everyone = gather({benchmark.name: dict(loaded.files) for benchmark, loaded in tasks})
    for rank, files in enumerate(everyone):
        if other := [name for name in {**files, **everyone[0]} if files.get(name) != everyone[0].get(name)]:
            raise UserError(
                f"--eval_data_dir {training['eval_data_dir']}: {other[0]} on rank {rank} is not that of "
                "rank 0; give all hosts the same files."
            )
    return tasks


class Benchmarking(_Base):
    """Scores before the first update, every so many, and of the result; part of SftTrainer.

    Logged as ``eval_cmmlu``, with the ends of its interval ``eval_cmmlu_low`` and ``eval_cmmlu_high``.
    """

    args: Any
    record: Any
    batch_tokens: int  # of a micro-batch of evaluation
    tasks: Tasks = []
    scored_step = -1  # of the weights scored last
    leave_evaluation: Callable[[], None]
    _stops: Callable[[], bool]

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        step, every = self.state.global_step, self.args.eval_tasks_steps
        # The last update's weights are scored with the result, which may be other ones.
        if every and step % every == 0 and step < self.state.max_steps and not self._stops():
            due = self.control.should_log  # which any log event takes back
            self.score(leave=self.leave_evaluation)  # before the save, whose report tells it
            self.control.should_log = due
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def score(self, leave: Callable[[], None] | None = None) -> None:
        """Ask all tasks of the weights at hand, unless these were asked; every rank calls it.

        Args:
            leave: called before each batch; may raise.
        """
        from baichuan_sft.evaluate import runner
        from baichuan_sft.evaluate.items import Settings
        from baichuan_sft.evaluate.scorer import Scorer

        best = self.record.facts.get("best")
        step = self.state.global_step if best is None else commit.step_of(best["checkpoint"])
        if not self.tasks or step == self.scored_step:
            return
        self.scored_step = step
        logs: dict[str, float] = {}
        rows = self.record.facts.setdefault("benchmarks", [])
        with aside(self) as model:
            scorer = Scorer(model, self.processing_class, batch_tokens=self.batch_tokens)
            for benchmark, loaded in self.tasks:
                settings = Settings(seed=self.args.seed)
                entry = runner.run(
                    benchmark,
                    STYLE,
                    loaded,
                    scorer,
                    settings,
                    None,
                    facts={},
                    progress=None if leave is None else lambda done, total: leave(),
                )
                names = ("benchmark", "metric", "value", "low", "high", "items", "skipped", "seconds")
                rows.append({"step": step, **{name: entry[name] for name in names}})
                ends = {"": "value", "_low": "low", "_high": "high"}
                logs |= {f"eval_{benchmark.name}{end}": entry[name] for end, name in ends.items()}
        self.log(logs)


class Beforehand(TrainerCallback):
    """Scores and held-out answers before the first update; a resumed run has them from the run before."""

    def __init__(self, trainer: Any, questions: list[dict[str, Any]]) -> None:
        self.trainer, self.questions = trainer, questions

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step:
            return
        self.trainer.score(leave=self.trainer.leave_evaluation)
        if self.questions:
            answer(self.trainer, self.questions, "before")
