"""Text of an answer as it grows: whole characters only, and cut where a stop string begins."""

from __future__ import annotations

import re
from typing import Any

from baichuan_sft.model.chat_baichuan import answer_text

BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")


class AnswerText:
    """Joined, what ``add`` returns is ``answer_text`` of all ids, up to the first stop string.

    Only the newest ids are decoded: those of the whole answer at each token would take time in the
    square of its length.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()):
        self.tokenizer, self.stop = tokenizer, stop
        self.ids: list[int] = []
        self.start = self.read = 0  # ids[start:read] is text already, and what the next ids stand after
        self.held = ""  # may be the beginning of a stop string

    def add(self, token_id: int | None, *, last: bool) -> tuple[str, bool]:
        """
        Args:
            token_id: None adds none.
            last: nothing will follow, so that nothing is held back.
        Returns:
            the text that is certain now, and whether a stop string ended it.
        """
        if token_id is not None:
            self.ids.append(token_id)
        text = self.held + self._grown(last)
        found = [at for at in (text.find(stop) for stop in self.stop) if at >= 0]
        if found:
            return text[: min(found)], True
        keep = 0 if last else _overlap(text, self.stop)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def _grown(self, last: bool) -> str:
        """New characters, without the half one at the end, for which U+FFFD stands until its last byte."""
        text = answer_text(self.tokenizer, self.ids[self.start :])
        if text.endswith("\ufffd") and not last:
            return ""
        known = answer_text(self.tokenizer, self.ids[self.start : self.read])
        self.start, self.read = self.read, len(self.ids)
        return text[len(known) :]


def _overlap(text: str, stops: tuple[str, ...]) -> int:
    """Length of the longest end of ``text`` with which a stop string begins."""
    longest = max(map(len, stops), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-size:]) for stop in stops):
            return size
    return 0


def token_bytes(tokenizer: Any, token_id: int) -> bytes:
    """UTF-8 of one piece, which may be part of a character."""
    piece = tokenizer.convert_ids_to_tokens(token_id)
    if byte := BYTE_PIECE.fullmatch(piece):
        return bytes([int(byte[1], 16)])
    return str(piece).replace("▁", " ").encode()
