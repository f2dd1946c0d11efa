"""Answers written token by token, many at a time; each row ends by itself.

R rows, S keys of the longest row, N heads, V vocabulary. What rows share stands first, once; their own part
is padded on the left, so that the newest key is the last for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from baichuan_sft.errors import NumericalFault
from baichuan_sft.evaluate.beginnings import WrittenRows
from baichuan_sft.evaluate.items import Request
from baichuan_sft.model.attention_baichuan import alibi_slopes
from baichuan_sft.model.chat_template_baichuan import EOS_TOKEN_ID, USER_TOKEN_ID

# Ids of the prompt that are decoded with the answer: alone, its first piece would lose its space, and a
# program the first column of its indentation.
CONTEXT = 8


class Row:
    """One answer.

    Args:
        prompt: ids. seed: of its own generator, so that no other row moves its draws.
        chat: the answer is a text by itself, and ends where the user's turn would begin.
    """

    def __init__(self, request: Request, prompt: Sequence[int], seed: int, tokenizer: Any, chat: bool):
        self.request, self.tokenizer = request, tokenizer
        self.length = len(prompt)  # of the whole row
        self.context = [] if chat else list(prompt[-CONTEXT:])
        self.ends = {EOS_TOKEN_ID, USER_TOKEN_ID} if chat else {EOS_TOKEN_ID}
        self.generator = torch.Generator().manual_seed(seed)
        self.ids: list[int] = []
        self.done = request.max_new_tokens < 1
        # A piece is at least a byte: a stop string that ends here lies in so many ids.
        self.window = max((len(stop.encode()) for stop in request.stop), default=0)

    def take(self, logits: torch.Tensor, best: int) -> None:
        """The next token, from fp32 ``(V,)`` logits, of which ``best`` is the highest."""
        token = best
        if self.request.temperature > 0:
            shares = (logits / self.request.temperature).softmax(dim=-1).cpu()
            token = int(torch.multinomial(shares, 1, generator=self.generator))
        self.ids.append(token)
        self.length += 1
        self.done = token in self.ends or len(self.ids) >= self.request.max_new_tokens or self.stopped()

    def stopped(self) -> bool:
        if not self.request.stop:
            return False
        tail = self._decode((self.context + self.ids)[-self.window - CONTEXT :])
        return any(stop in tail for stop in self.request.stop) and self.text() != self._whole()

    def text(self) -> str:
        """Up to the first stop string."""
        text = self._whole()
        return text[: min((at for stop in self.request.stop if (at := text.find(stop)) >= 0), default=None)]

    def _whole(self) -> str:
        return self._decode(self.context + self.ids)[len(self._decode(self.context)) :]

    def _decode(self, ids: list[int]) -> str:
        # To the tokenizer the user id is a piece like others.
        ids = [i for i in ids if i not in self.ends]
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def decode(model: Any, rows: list[Row], cache: WrittenRows, logits: torch.Tensor) -> None:
    """Fill the rows to their ends.

    Args:
        cache: what they hold so far, their own part padded on the left.
        logits: ``(R, V)``, of what comes next.
    Raises:
        NumericalFault: they are NaN or infinite.
    """
    while rows:
        finite = logits.isfinite().all(dim=-1)
        best = logits.argmax(dim=-1).tolist()  # one exchange with a GPU for all
        for row, sound, *of in zip(rows, finite.tolist(), logits.float(), best):
            if not row.done:
                if not sound:
                    raise NumericalFault("the model's scores are NaN or infinite; try --dtype bf16, or fp32.")
                row.take(*of)
        stay = [i for i, row in enumerate(rows) if not row.done]
        if not stay:
            return
        if len(stay) < len(rows):
            rows = [rows[i] for i in stay]
            # the newest token is not read yet
            cache.keep_rows(stay, max(row.length for row in rows) - cache.shared - 1)
        lengths = torch.tensor([row.length for row in rows], device=logits.device)[:, None]
        hidden = model.model(
            torch.tensor([row.ids[-1:] for row in rows], device=logits.device),
            attention_mask=mask(model.config, lengths, cache.shared),
            position_ids=lengths - 1,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        logits = model.lm_head(hidden[:, -1])


def mask(config: Any, lengths: torch.Tensor, shared: int) -> torch.Tensor:
    """What rows of ``lengths (R, 1)`` see whose padding stands between what they share and their own part.

    ALiBi counts places, not positions: to a short row the shared ones are as much too far as it is short.

    Returns:
        0 and 1, ``(R, S)``; with ALiBi what is added to the scores, ``(R, N, 1, S)``.
    """
    longest = int(lengths.max())
    places = torch.arange(longest, device=lengths.device)
    padding = longest - lengths
    seen = (places < shared) | (places >= shared + padding)  # (R, S)
    if config.position_embedding != "alibi":
        return seen.long()
    slopes = alibi_slopes(config.num_attention_heads, lengths.device)[:, None]
    nearer = slopes * (padding * (places < shared))[:, None]  # (R, N, S)
    return nearer.masked_fill(~seen[:, None], torch.finfo(torch.float32).min)[:, :, None]
