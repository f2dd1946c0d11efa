"""A model that answers requests in batches; what several begin with is read once.

    prompts     header shots... question 1        group: the header and the shots stand in the cache, once,
                header shots... question 2 ..     batch: the questions alone, padded on the right, where
                                                  causal attention hides it

B rows, T tokens of a padded row, P tokens of the shared beginning, N heads, H head width, V vocabulary.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from baichuan_sft.evaluate.beginnings import SharedBeginning, beginnings
from baichuan_sft.evaluate.generation import Row, decode
from baichuan_sft.evaluate.items import Request, Response
from baichuan_sft.model.chat_template_baichuan import ASSISTANT_TOKEN_ID, USER_TOKEN_ID

# Computed at once; of a 13B model in bf16 the keys and values are 6.3 GiB.
BATCH_TOKENS = 8192
# Keys that one layer puts together for a moment: as many times what is computed.
KEYS_PER_TOKEN = 16
# Held of all layers while generating, with the beginning in each row: as many times ``batch_tokens``.
HELD_PER_TOKEN = 2
# Positions whose logits exist at a time, 126 MiB at V = 125,696.
POSITIONS = 256


@dataclass(frozen=True)
class Encoded:
    """
    Attributes:
        answers: the ids of each choice, as they follow the prompt.
    """

    prompt: array
    answers: tuple[tuple[int, ...], ...] = ()

    @property
    def num_rows(self) -> int:
        """Rows that score it: choices that differ in their last token alone share one."""
        return len({answer[:-1] for answer in self.answers})

    @property
    def num_more(self) -> int:
        """Tokens that the longest row has behind the prompt; the last one is predicted, not read."""
        return max(len(answer) for answer in self.answers) - 1


class Scorer:
    """Answers requests. Nothing of the model, its gradients or its random state is changed.

    Args:
        model: of the family, in eval mode, or an adapter on one.
        chat: ask as a user in the family's chat format: role ids by number, so that no text can forge one.
        batch_tokens: computed at once, padding included; while generating, held in the cache without what
            rows share, and half of what is held with it.
        max_length: tokens of a prompt with its answer; None is the model's trained context.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        chat: bool = False,
        batch_tokens: int | None = None,
        max_length: int | None = None,
    ):
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.tokenizer, self.chat = tokenizer, chat
        self.batch_tokens = batch_tokens or BATCH_TOKENS
        self.max_length = max_length or self.model.config.context_length
        self._encoded: dict[Request, Encoded] = {}
        self._shared: dict[Request, int] = {}  # tokens that a planned request's whole group begins with
        self._read: tuple[array, DynamicCache] | None = None  # the last beginning

    # --- text to ids ----------------------------------------------------------------------------------

    def encode(self, request: Request) -> list[int]:
        """Ids of the prompt, to which nothing is added but the roles of a chat."""
        return self._encode([request])[0].prompt.tolist()

    def length(self, request: Request) -> int:
        """Tokens of the prompt and its longest choice, or the longest answer."""
        encoded = self._encode([request])[0]
        longest = encoded.num_more + 1 if request.choices else request.max_new_tokens
        return len(encoded.prompt) + longest

    def _encode(self, requests: Sequence[Request]) -> list[Encoded]:
        """All that is new in one call to SentencePiece, on all cores."""
        new = [request for request in dict.fromkeys(requests) if request not in self._encoded]
        parts = [self._texts(request) for request in new]
        ids = iter(self.tokenizer.encode_texts([text for texts in parts for text in texts]))
        for request, texts in zip(new, parts):
            prompt, *rest = [next(ids) for _ in texts]
            answers = tuple(self._answers(request, rest))
            assert all(answers), f"a choice without tokens among {request.choices}"
            roles = ([USER_TOKEN_ID], [ASSISTANT_TOKEN_ID]) if self.chat else ([], [])
            whole = roles[0] + prompt + roles[1] or [self.tokenizer.bos_token_id]  # something must come first
            self._encoded[request] = Encoded(array("i", whole), answers)
        return [self._encoded[request] for request in requests]

    def _texts(self, request: Request) -> list[str]:
        """The prompt's text, and those of which ``_answers`` takes the ids of the choices."""
        if self.chat:
            return [request.text, *(choice.strip() for choice in request.choices)]
        if request.by == "logit" or not request.choices:
            return [request.text, *request.choices]
        # As lm-eval: a space goes with the word after it, and ids are those of prompt and choice together.
        # The last line gives the same: no piece of the family's holds a newline and something else.
        text = request.text.rstrip() or request.text
        start = max(text.rfind("\n"), 0)
        return [text, text[start:], *(request.text[start:] + choice for choice in request.choices)]

    def _answers(self, request: Request, ids: list[list[int]]) -> Iterator[tuple[int, ...]]:
        if request.by == "logit":
            # As the vendor: of "A" by itself, without the "▁" that may come first.
            return (tuple(one[-1:]) for one in ids)
        if self.chat or not ids:
            return map(tuple, ids)
        line, *lines = ids
        return (tuple(one[len(line) :]) for one in lines)

    # --- batches --------------------------------------------------------------------------------------

    def plan(self, requests: Sequence[Request]) -> list[list[int]]:
        """Cut into batches, which follow from the requests alone; forgets what it knew of others.

        Returns:
            indices, each once: groups by what they begin with, in a group the longest first.
        """
        known = self._encode(requests)
        self._encoded = dict(zip(requests, known))
        self._shared, self._read = {}, None
        batches: list[list[int]] = []
        for generated in (False, True):
            order = [i for i, request in enumerate(requests) if (not request.choices) == generated]
            order.sort(key=lambda i: (known[i].prompt, i))
            for members, shared in beginnings([known[i].prompt for i in order]):
                group = [order[k] for k in members]
                self._shared |= {requests[i]: shared for i in group}
                sizes = {i: self._size(requests[i], known[i], shared) for i in group}
                group.sort(key=lambda i: (-sizes[i][1], i))
                batches += self._cut(group, sizes, shared, generated)
        return batches

    def _size(self, request: Request, encoded: Encoded, shared: int) -> tuple[int, int]:
        """Rows, and tokens of each behind what is shared: computed to score it, held to generate."""
        own = len(encoded.prompt) - shared
        if request.choices:
            return encoded.num_rows, own + encoded.num_more
        return request.samples, own + request.max_new_tokens

    def _most_rows(self, longest: int, shared: int, generated: bool) -> int:
        keys = (HELD_PER_TOKEN if generated else KEYS_PER_TOKEN) * self.batch_tokens // (shared + longest)
        return max(1, min(self.batch_tokens // longest, keys))

    def _cut(
        self, group: list[int], sizes: dict[int, tuple[int, int]], shared: int, generated: bool
    ) -> Iterator[list[int]]:
        batch: list[int] = []
        num_rows = 0
        for i in group:
            most = self._most_rows(sizes[batch[0] if batch else i][1], shared, generated)
            if batch and num_rows + sizes[i][0] > most:
                yield batch
                batch, num_rows = [], 0
            batch.append(i)
            num_rows += sizes[i][0]
        yield batch

    def run(self, requests: Sequence[Request]) -> list[Response]:
        """Answers of one batch of the plan; samples are drawn by torch's default generator."""
        with torch.no_grad():  # not inference mode: a model in training keeps what it gathers
            if requests[0].choices:
                return self._score(requests, self._encode(requests))
            return self._generate(requests, self._encode(requests))

    # --- passes ---------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.model.model.embed_tokens.weight.device

    def _beginning(
        self, requests: Sequence[Request], known: list[Encoded]
    ) -> tuple[int, DynamicCache | None]:
        """P and its keys and values, read anew where the last batch began otherwise."""
        shared = min(self._shared.get(request, 0) for request in requests)
        ids = known[0].prompt[:shared]
        if not shared or any(one.prompt[:shared] != ids for one in known):
            return 0, None
        if self._read is None or self._read[0] != ids:
            self._read = None  # before the next takes its memory
            cache = DynamicCache(config=self.model.config)
            self.model.model(torch.tensor([ids.tolist()], device=self.device), past_key_values=cache)
            self._read = ids, cache
        return shared, self._read[1]

    def _hidden(self, rows: list[list[int]], cache: SharedBeginning) -> torch.Tensor:
        """Hidden states ``(B, T, D)`` of rows behind a beginning; those of padding mean nothing."""
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        return self.model.model(ids.to(self.device), past_key_values=cache, use_cache=True).last_hidden_state

    def _score(self, requests: Sequence[Request], known: list[Encoded]) -> list[Response]:
        shared, beginning = self._beginning(requests, known)
        rows: dict[tuple[int, tuple[int, ...]], int] = {}  # request and all of a choice but its last token
        places: dict[tuple[int, int], int] = {}  # row and position that predicts
        wanted = []  # place, token, request, choice
        for i, one in enumerate(known):
            for j, answer in enumerate(one.answers):
                row = rows.setdefault((i, answer[:-1]), len(rows))
                for k, token in enumerate(answer):
                    at = row, len(one.prompt) - 1 + k - shared
                    wanted.append((places.setdefault(at, len(places)), token, i, j))
        texts = [known[i].prompt[shared:].tolist() + list(more) for i, more in rows]
        hidden = self._hidden(texts, SharedBeginning(beginning, keep=False))
        hidden = hidden[tuple(torch.tensor(list(places), device=hidden.device).T)]  # (places, D)
        place, token, of, choice = torch.tensor(wanted, device=hidden.device).T
        likelihood = torch.tensor([request.by == "loglikelihood" for request in requests], device=of.device)
        scores = [[0.0] * len(request.choices) for request in requests]
        for start in range(0, len(places), POSITIONS):
            logits = self.model.lm_head(hidden[start : start + POSITIONS]).float()  # (places, V)
            here = (place >= start) & (place < start + POSITIONS)
            values = logits[place[here] - start, token[here]]
            values = values - likelihood[of[here]] * logits.logsumexp(dim=-1)[place[here] - start]
            for i, j, value in zip(of[here].tolist(), choice[here].tolist(), values.tolist()):
                scores[i][j] += value
        return [
            Response(tuple(of), (), len(one.prompt) + sum(map(len, one.answers)), len(one.prompt))
            for of, one in zip(scores, known)
        ]

    def _generate(self, requests: Sequence[Request], known: list[Encoded]) -> list[Response]:
        shared, beginning = self._beginning(requests, known)
        cache = SharedBeginning(beginning, keep=True)
        hidden = self._hidden([one.prompt[shared:].tolist() for one in known], cache)
        last = torch.tensor([len(one.prompt) - shared - 1 for one in known], device=hidden.device)
        logits = self.model.lm_head(hidden[torch.arange(len(known), device=last.device), last])
        owner = [i for i, request in enumerate(requests) for _ in range(request.samples)]
        sampled = any(
            request.temperature > 0 for request in requests
        )  # greedy answers leave the generator be
        seeds = torch.randint(2**62, (len(owner),)).tolist() if sampled else [0] * len(owner)
        rows = [
            Row(requests[i], known[i].prompt, seed, self.tokenizer, self.chat)
            for i, seed in zip(owner, seeds)
        ]
        longest = max(self._size(*pair, shared)[1] for pair in zip(requests, known))
        size = self._most_rows(longest, shared, True)  # the samples of one request may be more
        for start in range(0, len(rows), size):
            of = owner[start : start + size]
            held = cache.left_padded(of, [len(known[i].prompt) - shared for i in of])
            decode(self.model, rows[start : start + size], held, logits[of])
        return [
            self._generated(one, [row for i, row in zip(owner, rows) if i == number])
            for number, one in enumerate(known)
        ]

    def _generated(self, one: Encoded, rows: list[Row]) -> Response:
        num_tokens = len(one.prompt) + sum(len(row.ids) for row in rows)
        return Response((), tuple(row.text() for row in rows), num_tokens, len(one.prompt))
