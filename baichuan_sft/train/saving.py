"""Saves that are checked and committed: over all ranks a checkpoint is whole, or it does not count.

write       every rank its own files; what the disk refuses is kept until all ranks can hear of it
check       names and shapes of the weights; after the first save also the logits
hash        every rank what it wrote, and fsync; in the background with --async_save
commit      hashes gathered, manifest and COMMIT by the rank that wrote the weights, then retention
"""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.trainer_callback import TrainerCallback

from baichuan_sft import commit
from baichuan_sft.checkpoint import is_adapter, verify
from baichuan_sft.errors import EnvironmentFault, UserError
from baichuan_sft.quantization import quantization_of
from baichuan_sft.train import space
from baichuan_sft.train.order import RowOrder
from baichuan_sft.train.progress import say
from baichuan_sft.train.record import RunRecord
from baichuan_sft.train.reload import compare_reloaded, probe
from baichuan_sft.train.space import DiskFault
from baichuan_sft.train.speed import Speed
from baichuan_sft.train.together import gather, require_one_directory, together
from baichuan_sft.train.workers import lost_worker
from baichuan_sft.train.writers import shielded

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

# Files that each rank writes for itself, DeepSpeed's among them; all others are the first rank's.
WRITER = re.compile(r"(?:rng|rng_state|(?<!mp_)rank)_(\d+)")


@dataclass
class Unfinished:
    """A checkpoint whose files are written, but that does not count yet."""

    directory: Path
    step: int
    entries: Future[commit.Entries]  # of this rank's files
    written: float  # seconds that training stood still for it


class Saving(_Base):
    """What a save consists of, and its checks; part of SftTrainer."""

    args: Any
    speed: Speed
    record: RunRecord
    check_reload: bool
    order: RowOrder
    best_saved: Callable[[], list[Path]]  # (best.py)
    keep: int | None = None  # --save_total_limit
    unfinished: Unfinished | None = None
    fault: Exception | None = None  # of this rank's writers, until all ranks can hear of it
    failed_saves = 0  # in a row
    committed_step = -1
    expected_bytes = 0.0  # of a checkpoint: by its shapes, then the last one's

    # --- a run's checkpoints ----------------------------------------------------------------------

    def prepare_saving(self) -> None:
        """Before the first step: is there one output directory, and room for what will be saved?"""
        args: Any = self.args
        # transformers would delete by file times, and knows of no COMMIT.
        self.keep, args.save_total_limit = args.save_total_limit, None
        require_one_directory(args.output_dir, args.save_on_each_node)
        if args.save_on_each_node and args.world_size > 1 and not args.deepspeed:
            raise UserError(
                "--save_on_each_node True: transformers writes weights on the first host alone, and without "
                "--deepspeed no other one could go on from there; take an --output_dir that all hosts share."
            )
        sizes = space.estimate(self.model, getattr(args.optim, "value", args.optim), bool(args.deepspeed))
        self.expected_bytes = sizes[0]
        updates = args.max_steps
        if updates < 0:
            updates = math.ceil(args.num_train_epochs * self.order.num_updates)
        there = len(commit.checkpoints(args.output_dir))
        together(self._leading, space.require_plan, args, updates, self.keep, sizes, there)
        self.add_callback(CommitSoon(self))

    def _leading(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call it on the rank that commits: the first, or each host's first where each has its own disk."""
        return function(*args) if self.args.should_save else None

    def _first(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call it on the first rank of all, which alone has the weights in the form of a result."""
        return function(*args) if self.args.process_index == 0 else None

    def _save_checkpoint(self, model, trial):
        step = self.state.global_step
        with self.speed.paused():
            self.finish_save()
            if step == self.committed_step:
                return  # asked for twice, as by a signal in the step that saves anyway
            directory = Path(self._get_output_dir(trial=trial), f"checkpoint-{step}")
            started = time.monotonic()
            try:
                together(self._leading, self._make_room, directory)
                with self._writers_watched():
                    self._attempt(super()._save_checkpoint, model, trial)
                together(self._raise_fault)
            except DiskFault as fault:
                self._count_failure(directory, fault)
                return
            pool = ThreadPoolExecutor(1, "hash")
            entries = pool.submit(self._hash, directory)
            pool.shutdown(wait=False)
            self.unfinished = Unfinished(directory, step, entries, time.monotonic() - started)
            if not self.args.async_save:
                self.finish_save()

    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        except BaseException as error:
            if getattr(error, "everywhere", False):  # all ranks are here, and what was good is kept
                self.finish_save()
            raise

    def _make_room(self, directory: Path) -> None:
        if directory.exists():  # of a run that was killed while it saved, or went another way from here
            commit.remove(directory)
        space.require_room(directory.parent, self.expected_bytes)
        directory.mkdir()
        commit.write_manifest(directory, {})  # until COMMIT nobody takes it for a download, which has none

    def _hash(self, directory: Path) -> commit.Entries:
        rank, names = self.args.process_index, commit.files_of(directory)
        writers = [WRITER.search(name) for name in names]
        mine = [
            name
            for name, match in zip(names, writers)
            if (int(match.group(1)) == rank if match else self.args.should_save)
        ]
        return commit.entries_of(directory, mine, rank)

    def _host(self) -> int:
        """First rank of those that write into the same directory as this one."""
        args = self.args
        return args.process_index - args.local_process_index if args.save_on_each_node else 0

    def hashed_everywhere(self) -> bool:
        done = self.unfinished is None or self.unfinished.entries.done()
        return min(gather(done))

    def finish_save(self) -> None:
        """Commit the checkpoint that is being hashed, if there is one; all ranks together.

        Raises:
            EnvironmentFault: that was the --max_failed_saves-th in a row that the disk did not take.
        """
        pending, self.unfinished = self.unfinished, None
        if pending is None:
            return
        started = time.monotonic()
        try:
            entries: commit.Entries = {}
            for host, part in together(lambda: (self._host(), pending.entries.result())):
                if host == self._host():
                    entries |= part
            together(self._leading, self._write_manifest, pending.directory, entries, pending.step)
            together(self._leading, commit.commit, pending.directory)
        except DiskFault as fault:
            self._count_failure(pending.directory, fault)
            return
        self.failed_saves, self.committed_step = 0, pending.step
        self.expected_bytes = sum(entry["size"] for entry in entries.values())
        waited = pending.written + time.monotonic() - started
        size = space.short(self.expected_bytes)
        say(f"{pending.directory.name}: {size} committed, training waited {waited:.2g} s")
        together(self._leading, self._retire, pending.directory)

    def _write_manifest(self, directory: Path, entries: commit.Entries, step: int) -> None:
        commit.write_manifest(directory, entries, step=step, world_size=self.args.world_size)

    def _retire(self, newest: Path) -> None:
        kept = [newest, *self.best_saved()[:1]]
        for path in commit.expired(newest.parent, self.keep, kept) if self.keep else []:
            try:
                commit.remove(path)
            except OSError as error:
                say(f"{path.name}: cannot be deleted ({error.strerror}), does not count any more")

    def _count_failure(self, directory: Path, fault: DiskFault) -> None:
        self._leading(self._discard, directory)
        self.failed_saves += 1
        limit = self.args.max_failed_saves
        text = str(fault)
        if "need " not in text:
            text += f": {space.room(directory.parent, self.expected_bytes)}"
        line = f"{directory.name}: not saved ({self.failed_saves} of {limit} in a row), {text}"
        if self.failed_saves >= limit:
            end = EnvironmentFault(f"{line}; checkpoints before it are whole. Free some, then --resume auto.")
            end.everywhere = True  # type: ignore[attr-defined]
            raise end
        say(f"{line}; training goes on, checkpoints before it are whole")

    def _discard(self, directory: Path) -> None:
        with contextlib.suppress(OSError):  # a read-only disk keeps it; without COMMIT it does not count
            commit.remove(directory)

    # --- writers ----------------------------------------------------------------------------------

    def _attempt(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a writer, unless one has failed; its error waits until no rank is inside a collective."""
        if self.fault is not None:
            return None
        try:
            return function(*args, **kwargs)
        except Exception as error:
            if getattr(error, "everywhere", False) or lost_worker(error):  # no writer's; this rank ends
                raise
            self.fault = error
            return None

    def _raise_fault(self) -> None:
        fault, self.fault = self.fault, None
        if fault is not None:
            raise fault

    def _save(self, output_dir=None, state_dict=None):
        if self.args.process_index == 0:
            self._attempt(super()._save, output_dir, state_dict)

    def _writers_watched(self):
        return shielded(getattr(self, "deepspeed", None), self._attempt, self.args.should_save)

    # --- weights ----------------------------------------------------------------------------------

    def save_model(self, output_dir=None, _internal_call=False):
        """The weights of a checkpoint; or a result, which is committed like one.

        Raises:
            EnvironmentFault: there is no room for the result.
        """
        output_dir = Path(output_dir or self.args.output_dir)
        if _internal_call:
            self._write_model(output_dir)
            return
        self.finish_save()
        try:
            together(self._first, commit.uncommit, output_dir)
            together(self._first, commit.write_manifest, output_dir, {})  # nor is half of it a download
            before = commit.stamps(output_dir)
            with self._writers_watched():
                self._write_model(output_dir)
            together(self._first, self._commit_result, output_dir, before)
        except DiskFault as fault:
            free = (
                ""
                if "need " in str(fault)
                else f": {space.room(output_dir, space.estimate(self.model, 'sgd', False)[1])}"
            )
            raise EnvironmentFault(
                f"{output_dir}: the result is not saved, {fault}{free}; checkpoints are whole. Free some, "
                "then --resume auto."
            ) from fault

    def _commit_result(self, directory: Path, before: dict[str, tuple[int, ...]]) -> None:
        own = {name for name, stamp in commit.stamps(directory).items() if before.get(name) != stamp}
        entries = commit.entries_of(directory, sorted(own - commit.OWN), self.args.process_index)
        self._write_manifest(directory, entries, self.state.global_step)
        commit.commit(directory)

    def _write_model(self, output_dir: Path) -> None:
        """Write, then check the files; after the first save also that they give the live model's logits."""
        super().save_model(str(output_dir), True)
        if self.args.should_save:
            self._attempt(self._complete, output_dir)
        together(self._raise_fault)
        if self.check_reload:
            model, base = self.model_wrapped, self._base_model()
            live = probe(model, base.config.vocab_size)  # ZeRO-3 gathers each layer over all ranks
            dtype = next(model.parameters()).dtype  # a base stored in fp32 may be trained in bf16
            together(self._first, compare_reloaded, output_dir, live, dtype, quantization_of(base))
            self.check_reload = False

    def _complete(self, output_dir: Path) -> None:
        output_dir.mkdir(exist_ok=True)
        self.record.write(output_dir)
        if self.args.process_index:
            return
        # A pickle, of what run.json says in text.
        Path(output_dir, "training_args.bin").unlink(missing_ok=True)
        if is_adapter(output_dir):
            self._base_model().generation_config.save_pretrained(output_dir)
        verify(output_dir)

    def _base_model(self):
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model


class CommitSoon(TrainerCallback):
    """Commits a checkpoint between two steps once all ranks have hashed it, and at the latest at the end."""

    def __init__(self, trainer: Saving) -> None:
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.unfinished is not None and self.trainer.hashed_everywhere():
            self.trainer.finish_save()

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer.finish_save()
