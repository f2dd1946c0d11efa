"""Continuous batching: requests join and leave a running batch between two tokens.

One thread owns the model. Each model name, the base's and the adapters', has a batch of its own, because
all rows of a forward pass go through one adapter; the batches take turns, a token each.

    tick       1   2   3   4   5
    request a  p   d   d   d           p reads the prompt alone, d decodes with the others
    request b          p   d   d       rows are padded on the left, so the newest key is the last for all

B rows, S keys (of the longest row), N heads, H head width, V vocabulary.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F
from transformers import DynamicCache, GenerationConfig
from transformers.utils import logging

from baichuan_sft.errors import first_line
from baichuan_sft.infer.server_jobs import Job, Penalties, Piece, Token, choose, logits_processors
from baichuan_sft.infer.server_text import AnswerText, token_bytes
from baichuan_sft.infer.server_types import Refusal

logger = logging.get_logger(__name__)


@dataclass
class Row:
    """One choice that is being generated."""

    job: Job
    index: int
    processors: Any
    generator: torch.Generator
    text: AnswerText
    tokens: torch.Tensor  # (prompt + max_new_tokens,), filled up to ``length``
    length: int
    done: bool = False


@dataclass
class Batch:
    rows: list[Row] = field(default_factory=list)
    cache: Any = None


class Engine(threading.Thread):
    """Generates for every served name until ``close``; nothing of a request is kept after it.

    Args:
        model: a Baichuan model in eval mode, with adapters on it or not.
        adapters: served name to PEFT's name; None is the base.
        settings: served name to its own generation settings.
        max_batch: rows decoded together, of all names; max_queue: prompts that may wait.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        adapters: dict[str, str | None],
        settings: dict[str, GenerationConfig],
        *,
        max_batch: int = 8,
        max_queue: int = 64,
    ):
        super().__init__(name="engine", daemon=True)
        self.peft = model
        self.model = model.get_base_model() if hasattr(model, "peft_config") else model
        self.tokenizer, self.adapters, self.settings = tokenizer, adapters, settings
        self.max_batch, self.max_queue = max_batch, max_queue
        self.context_length: int = self.model.config.context_length
        self.counts: Counter[str] = Counter()
        self.batches = {name: Batch() for name in adapters}
        self._waiting: deque[Job] = deque()
        self._news = threading.Condition()
        self._closed = False
        self._active: str | None = None

    # --- from other threads -------------------------------------------------------------------------

    def submit(self, jobs: list[Job]) -> None:
        """
        Raises:
            Refusal: 429, the queue has no room for all of them, and none is taken; 503, after ``close``.
        """
        with self._news:
            if self._closed:
                raise _shutting_down()
            if self.num_waiting + len(jobs) > self.max_queue:
                message = f"{self.max_queue} prompts wait already, try again later"
                raise Refusal(429, "queue_full", message, retry_after="1")
            self._waiting.extend(jobs)
            self._news.notify()

    def close(self) -> None:
        """End every request, and the thread."""
        with self._news:
            self._closed = True
            self._news.notify()
        if self.is_alive():
            self.join()

    @property
    def num_waiting(self) -> int:
        """Those whose client has gone keep no place."""
        with self._news:
            return sum(not job.cancelled for job in self._waiting)

    @property
    def num_running(self) -> int:
        return sum(len(batch.rows) for batch in self.batches.values())

    # --- the thread ---------------------------------------------------------------------------------

    def run(self) -> None:
        with torch.inference_mode():
            while self._wait_for_work():
                self._guarded(self._admit)
                for name in self.batches:
                    self._guarded(self._step, name)
        for job in [*self._waiting, *{id(row.job): row.job for row in self._rows()}.values()]:
            job.deliver(_shutting_down())

    def _rows(self) -> list[Row]:
        return [row for batch in self.batches.values() for row in batch.rows]

    def _wait_for_work(self) -> bool:
        with self._news:
            while not (self._closed or self._waiting or self.num_running):
                self._news.wait()
            return not self._closed

    def _guarded(self, work: Callable[..., None], *words: str) -> None:
        """No request may end the thread that serves the others: its own jobs get the error."""
        try:
            work(*words)
        except Exception as error:
            logger.error(f"generation failed: {type(error).__name__}: {first_line(error)}")
            jobs = [self._admitting]
            if words:
                jobs = list({id(row.job): row.job for row in self.batches[words[0]].rows}.values())
                self.batches[words[0]] = Batch()
            for job in jobs:
                self._fail(job)

    def _fail(self, job: Job) -> None:
        self.counts["failed"] += 1
        job.deliver(Refusal(500, "generation_failed", "generation failed, the server's log says why"))

    def _use(self, name: str) -> None:
        """Switch to the weights of one served name."""
        if name == self._active or self.peft is self.model:
            return
        adapter = self.adapters[name]
        if adapter is None:
            self.peft.base_model.disable_adapter_layers()
        else:
            self.peft.base_model.enable_adapter_layers()
            self.peft.set_adapter(adapter, inference_mode=True)
        self._active = name

    def _admit(self) -> None:
        """Read the prompt of at most one waiting job, so that running answers pause for one prompt only."""
        with self._news:
            stay = deque(job for job in self._waiting if not job.cancelled)
            self.counts["cancelled"] += len(self._waiting) - len(stay)
            self._waiting = stay
            if not self._waiting or self.num_running + self._waiting[0].n > self.max_batch:
                return
            job = self._admitting = self._waiting.popleft()
        self._use(job.model)
        prompt = torch.tensor([job.ids], device=self.model.device)
        out = self.model(prompt, use_cache=True, logits_to_keep=1)
        self.counts["prompt_tokens"] += len(job.ids)
        cache = out.past_key_values
        cache.batch_repeat_interleave(job.n)
        rows = [self._row(job, i, prompt[0]) for i in range(job.n)]
        self._take_tokens(rows, out.logits[:, -1].expand(job.n, -1))
        batch = self.batches[job.model]
        batch.cache = cache if batch.cache is None else _joined(batch.cache, cache)
        batch.rows += rows
        self._drop_finished(batch)

    def _row(self, job: Job, i: int, prompt: torch.Tensor) -> Row:
        generator = torch.Generator(self.model.device)
        if job.seed is None:
            generator.seed()
        else:
            generator.manual_seed((job.seed + i) % 2**63)
        processors = logits_processors(self.model, job.config, len(job.ids))
        if job.frequency_penalty or job.presence_penalty:
            processors.insert(0, Penalties(len(job.ids), job.frequency_penalty, job.presence_penalty))
        tokens = F.pad(prompt, (0, job.config.max_new_tokens))
        text = AnswerText(self.tokenizer, job.stop)
        return Row(job, job.first_index + i, processors, generator, text, tokens, len(job.ids))

    def _step(self, name: str) -> None:
        """One more token for every row of one name."""
        batch = self.batches[name]
        self._drop_finished(batch)
        if not batch.rows:
            return
        self._use(name)
        device = self.model.device
        last = torch.stack([row.tokens[row.length - 1] for row in batch.rows])[:, None]  # (B, 1)
        lengths = torch.tensor([row.length for row in batch.rows], device=device)[:, None]
        num_keys, shortest = (pick(row.length for row in batch.rows) for pick in (max, min))
        mask = None
        if shortest < num_keys:
            mask = (torch.arange(num_keys, device=device) >= num_keys - lengths).long()  # (B, S)
        out = self.model(
            last, attention_mask=mask, position_ids=lengths - 1, past_key_values=batch.cache, use_cache=True
        )
        self._take_tokens(batch.rows, out.logits[:, -1])
        self._drop_finished(batch)

    def _take_tokens(self, rows: list[Row], logits: torch.Tensor) -> None:
        """Choose the next token of each row from ``(B, V)`` logits, deliver it; a failure is its job's."""
        logits = logits.float()
        ids = torch.stack([self._chosen(row, logits[i]) for i, row in enumerate(rows)]).tolist()
        for i, (row, token_id) in enumerate(zip(rows, ids)):
            if row.done:  # another choice of its job has failed
                continue
            if token_id < 0:
                self._fail(row.job)
                for other in rows:
                    other.done |= other.job is row.job
                continue
            row.tokens[row.length] = token_id
            row.length += 1
            self.counts["generated_tokens"] += 1
            token = None
            if row.job.top_logprobs is not None:
                token = self._scored(logits[i], token_id, row.job.top_logprobs)
            ended = token_id in row.job.config.eos_token_id
            full = row.length - len(row.job.ids) >= row.job.config.max_new_tokens
            text, stopped = row.text.add(None if ended else token_id, last=ended or full)
            finish = "stop" if ended or stopped else "length" if full else None
            row.done = finish is not None
            row.job.deliver(Piece(row.index, text, None if ended else token, finish))

    def _chosen(self, row: Row, logits: torch.Tensor) -> torch.Tensor:
        """The next token id, -1 where there is none."""
        try:
            return choose(row.job.config, row.processors, row.generator, row.tokens[: row.length], logits)
        except Exception as error:
            logger.error(f"sampling failed: {type(error).__name__}: {first_line(error)}")
            return torch.tensor(-1, device=logits.device)

    def _scored(self, logits: torch.Tensor, token_id: int, num_top: int) -> Token:
        logprobs = logits.log_softmax(dim=-1)
        top = logprobs.topk(num_top)
        pairs = zip(top.indices.tolist(), top.values.tolist())
        rivals = tuple((token_bytes(self.tokenizer, i), value) for i, value in pairs)
        return Token(token_bytes(self.tokenizer, token_id), logprobs[token_id].item(), rivals)

    def _drop_finished(self, batch: Batch) -> None:
        """Remove rows that are done or that nobody waits for, and the padding that they needed."""
        stay = [i for i, row in enumerate(batch.rows) if not (row.done or row.job.cancelled)]
        if len(stay) == len(batch.rows):
            return
        self.counts["cancelled"] += sum(row.job.cancelled and not row.done for row in batch.rows)
        batch.rows = [batch.rows[i] for i in stay]
        if not stay:
            batch.cache = None
            return
        index = torch.tensor(stay, device=self.model.device)
        num_keys = max(row.length for row in batch.rows) - 1  # the newest token is not read yet
        batch.cache = DynamicCache(
            [
                (layer.keys[index, :, -num_keys:], layer.values[index, :, -num_keys:])
                for layer in batch.cache.layers
            ]
        )


def _joined(first: Any, second: Any) -> Any:
    """Two caches as one of all rows, keys ``(B, N, S, H)`` padded on the left to the longer S."""
    num_keys = max(first.get_seq_length(), second.get_seq_length())

    def rows(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.cat([F.pad(x, (0, 0, num_keys - x.shape[2], 0)) for x in (a, b)])

    pairs = zip(first.layers, second.layers)
    return DynamicCache([(rows(a.keys, b.keys), rows(a.values, b.values)) for a, b in pairs])


def _shutting_down() -> Refusal:
    return Refusal(503, "shutting_down", "the server is shutting down")
