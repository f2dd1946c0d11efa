"""HF Trainer, with the checks that a run cannot fail in silence.

The loss itself needs nothing here: the model divides by ``num_items_in_batch``, which Trainer counts over
all micro-batches of an update and all ranks.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import EvalLoopOutput

from baichuan_sft.data.packing import NO_ITEM, Collator, PackedDataset
from baichuan_sft.data.streaming import StreamingRows
from baichuan_sft.data.template import IGNORE
from baichuan_sft.errors import NumericalFault
from baichuan_sft.model.head_baichuan import LOGITS_PER_CHUNK, BaichuanHead
from baichuan_sft.train.benchmarks import Benchmarking, Tasks
from baichuan_sft.train.best import Best, EarlyStopping
from baichuan_sft.train.numerics import CAUSES, Guard, Numerics
from baichuan_sft.train.order import RowOrder, SetEpoch
from baichuan_sft.train.progress import LogLines, ProgressBar
from baichuan_sft.train.record import RunRecord
from baichuan_sft.train.saving import Saving
from baichuan_sft.train.signals import ignore_in_worker
from baichuan_sft.train.speed import Speed
from baichuan_sft.train.state import State
from baichuan_sft.train.stopping import Stopping


@dataclass(frozen=True)
class BatchFacts:
    """What a batch is told by, counted before it goes to a GPU: asking there would wait for the GPU."""

    items: list[tuple[int, int]]  # number of the file, and of the record in it
    num_computed: int
    num_real: int
    num_targets: int
    squared_lengths: int  # summed over conversations: what attention's work grows with


class FactsCollator(Collator):
    """``Collator`` that adds ``facts``; ``SftTrainer.compute_loss`` takes them out again."""

    def __call__(self, rows):
        batch: dict[str, Any] = super().__call__(rows)
        segments = [segment for row in rows for segment in row if segment["item"] != NO_ITEM]
        lengths = [len(segment["input_ids"]) for segment in segments]
        batch["facts"] = BatchFacts(
            items=[(int(segment["source"]), int(segment["item"])) for segment in segments],
            num_computed=batch["input_ids"].numel(),
            num_real=sum(lengths),
            num_targets=int((batch["labels"][:, 1:] != IGNORE).sum()),
            squared_lengths=sum(length**2 for length in lengths),
        )
        return batch


class SftTrainer(Numerics, Stopping, Benchmarking, Best, Saving, State, Trainer):
    """Trainer that names a bad batch, verifies what it saved, and counts tokens.

    Args:
        train_dataset, eval_dataset: rows; which of them a batch takes is decided by ``RowOrder``.
        record: written beside every save.
        check_reload: load the first save again, on the CPU, and compare its logits.
        sources: names of the data files, by number.
        rows_per_batch: rows of a micro-batch in training, and in evaluation.
        rows_per_update: over all ranks and micro-batches.
        tasks: benchmarks to score on the way, in batches of ``batch_tokens``.
    """

    def __init__(
        self,
        *,
        record: RunRecord,
        check_reload: bool,
        sources: list[str],
        rows_per_batch: tuple[int, int],
        rows_per_update: int,
        eval_collator: FactsCollator,
        tasks: Tasks,
        batch_tokens: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.rows_per_batch, self.eval_collator = rows_per_batch, eval_collator
        self.record, self.tasks, self.batch_tokens = record, tasks, batch_tokens
        self.sources = sources
        self.check_reload = check_reload
        self.speed = Speed(self.model, self.args)
        dataset = kwargs["train_dataset"]
        if not isinstance(dataset, StreamingRows):
            self.order = self._order(dataset, self.rows_per_batch[0], rows_per_update=rows_per_update)
            self.add_callback(SetEpoch(self.order))
        for callback in (ProgressCallback, PrinterCallback):
            self.remove_callback(callback)
        bar = sys.stderr.isatty() and not self.args.disable_tqdm
        self.add_callback(ProgressBar() if bar else LogLines())
        self.add_callback(record)
        self.add_callback(Guard(self))
        if self.args.early_stopping_patience is not None:
            self.add_callback(EarlyStopping())

    # --- rows -------------------------------------------------------------------------------------

    def _order(self, dataset: PackedDataset, batch_size: int, **options: Any) -> RowOrder:
        args = self.args
        options = {
            "accumulation": args.gradient_accumulation_steps,
            "strategy": args.train_sampling_strategy,
            "seed": args.seed if args.data_seed is None else args.data_seed,
            **options,
        }
        ranks = {"world_size": args.world_size, "rank": args.process_index}
        return RowOrder(dataset.lengths, batch_size=batch_size, **ranks, **options)

    def _loader(self, dataset: Any, order: RowOrder, collate: Any) -> DataLoader:
        """Not prepared by accelerate, which would deal batches to ranks once more and repeat rows."""
        args = self.args
        return DataLoader(
            dataset,
            batch_sampler=order,
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and not args.use_cpu,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            worker_init_fn=ignore_in_worker,
            # Of its own: the workers' seeds would be drawn from the numbers that dropout uses.
            generator=torch.Generator().manual_seed(order.seed),
        )

    def get_train_dataloader(self):
        if isinstance(self.train_dataset, StreamingRows):
            size = self.rows_per_batch[0]
            # Of its own, as below: each resumed loader would draw a number that dropout uses.
            own = torch.Generator().manual_seed(self.args.seed)
            pin = self.args.dataloader_pin_memory and not self.args.use_cpu
            return DataLoader(
                self.train_dataset, size, collate_fn=self.data_collator, generator=own, pin_memory=pin
            )
        return self._loader(self.train_dataset, self.order, self.data_collator)

    def get_eval_dataloader(self, eval_dataset=None):
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        options = {"accumulation": 1, "strategy": "group_by_length"}  # the order changes nothing
        order = self._order(dataset, self.rows_per_batch[1], **options)
        return self._loader(dataset, order, self.eval_collator)

    def log(self, logs, start_time=None):
        if "loss" in logs:
            logs |= self.speed.read(self.accelerator)
        # transformers counts a packed row as so many as were laid end to end in it
        logs.pop("train_samples_per_second", None)
        super().log(logs, start_time)

    # --- evaluation -------------------------------------------------------------------------------

    def evaluate(self, *args, **kwargs):
        with self.speed.paused():
            return super().evaluate(*args, **kwargs)

    @torch.no_grad()
    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):
        """The cross-entropy of all targets of all ranks over their number: no mean of batch means.

        All ranks take as many batches, which ZeRO-3's gathering of each layer needs. Perplexity is its
        exponential. The z-loss, which training may add, is left out. Token accuracy is the share of targets
        that the largest logit names.
        """
        model, config = self.model_wrapped, self._base_model().config
        was_training, z_loss_weight = model.training, config.z_loss_weight
        sums = torch.zeros(3, dtype=torch.float64)  # loss, targets, of them right
        model.eval()
        config.z_loss_weight = 0.0
        right, counter = [], None
        try:
            counter = self._base_model().lm_head.register_forward_pre_hook(
                lambda head, inputs: right.append(count_right(head, *inputs[:2]))
            )
            for batch in dataloader:
                self.leave_evaluation()
                facts = batch.pop("facts")
                with self.compute_loss_context_manager():
                    inputs = self._prepare_inputs(batch)
                    loss = model(**inputs, num_items_in_batch=1, skip_logits=True).loss
                sums += torch.tensor([loss.item(), facts.num_targets, right.pop().item()])
        finally:
            if counter is not None:
                counter.remove()
            model.train(was_training)
            config.z_loss_weight = z_loss_weight
        total, num_targets, num_right = self.accelerator.reduce(sums.to(self.args.device), "sum").tolist()
        if not math.isfinite(total):
            raise NumericalFault(f"step {self.state.global_step}: the evaluation loss is {total}. {CAUSES}")
        mean = total / max(num_targets, 1)
        metrics: dict[str, float] = {
            f"{metric_key_prefix}_loss": mean,
            f"{metric_key_prefix}_perplexity": math.exp(min(mean, 700)),  # e^710 is more than a float
            f"{metric_key_prefix}_token_accuracy": num_right / max(num_targets, 1),
            f"{metric_key_prefix}_targets": num_targets,
        }
        num_samples = len(dataloader.dataset.segments)
        nothing: Any = None
        return EvalLoopOutput(nothing, nothing, metrics, num_samples)


def count_right(head: BaichuanHead, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Targets that the largest logit names; called where the head's weight is whole, also under ZeRO-3.

    Args:
        hidden: ``(B, T, D)``. labels: ``(B, T)`` token ids or IGNORE; position t is told at t - 1.
    """
    targets = labels[:, 1:].to(hidden.device)
    hidden, targets = hidden[:, :-1][targets != IGNORE], targets[targets != IGNORE]
    size = max(1, LOGITS_PER_CHUNK // head.out_features)
    told = [head.forward(hidden[i : i + size]).argmax(-1) for i in range(0, len(targets), size)]
    return (torch.cat([targets[:0], *told]) == targets).sum()
