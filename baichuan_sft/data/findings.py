"""What can be found in data: a table of codes, and findings that say file, line, column, item and turn."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass, replace
from typing import Any

from baichuan_sft.errors import UserError

# ERROR: the record or file cannot be used. WARN: used, but look at it. NOTE: normalised, nothing to do.
CODES: dict[str, tuple[str, str]] = {
    "DATA001": ("ERROR", "no readable regular file"),
    "DATA002": ("ERROR", "not UTF-8"),
    "DATA003": ("NOTE", "normalised: byte order mark removed"),
    "DATA004": ("ERROR", "file without records"),
    "DATA005": ("ERROR", "another kind of file"),
    "DATA006": ("ERROR", "malformed JSON"),
    "DATA007": ("ERROR", "truncated or unpacks to too much"),
    "DATA008": ("ERROR", "line too long"),
    "DATA009": ("ERROR", "no list of records"),
    "DATA010": ("ERROR", "record is not an object"),
    "DATA011": ("ERROR", "record has the keys of no format"),
    "DATA012": ("ERROR", "turns are not a list, or there are none"),
    "DATA013": ("ERROR", "turn is not an object"),
    "DATA014": ("ERROR", "key is missing"),
    "DATA015": ("ERROR", "unknown role"),
    "DATA016": ("ERROR", "value is not text"),
    "DATA017": ("ERROR", "text cannot be encoded as UTF-8"),
    "DATA018": ("ERROR", "assistant text is empty"),
    "DATA019": ("ERROR", "turns in a wrong order"),
    "DATA020": ("ERROR", "nothing to supervise"),
    "DATA021": ("ERROR", '"train" is wrong'),
    "DATA022": ("ERROR", "tool calls are not supported"),
    "DATA023": ("ERROR", "key given twice"),
    "DATA024": ("ERROR", "longer than max_length"),
    "DATA030": ("NOTE", "trailing user turn dropped"),
    "DATA031": ("WARN", "empty user turn"),
    "DATA032": ("NOTE", "text of a control token, encoded as plain text"),
    "DATA033": ("WARN", "control characters in a text"),
    "DATA034": ("WARN", "exact duplicate"),
    "DATA035": ("NOTE", "turns of one role joined"),
    "DATA036": ("WARN", "dropped for its length"),
    "DATA090": ("ERROR", "file changed after it was checked"),
}


class RecordFault(UserError):
    """What is wrong with, or worth saying of, one record: raised in the first case, returned in the second.

    Args:
        code: a key of ``CODES``.
        text: what is there, the rule, and the way out; no place in it.
        turn: 0-based turn it is about.
        at: keys and indices that lead from the record to the value: ``("conversations", 2, "value")``.
        offset: 0-based character within the record's JSON text, where ``at`` cannot say it.
    """

    def __init__(
        self,
        code: str,
        text: str,
        *,
        turn: int | None = None,
        at: tuple[str | int, ...] = (),
        offset: int | None = None,
    ) -> None:
        assert code in CODES
        super().__init__(text if turn is None else f"turn {turn}: {text}")
        self.code, self.text, self.turn, self.at, self.offset = code, text, turn, at, offset


@dataclass(frozen=True)
class Finding:
    """One finding and its place; line and column count from 1 in characters, item and turn from 0."""

    code: str
    path: str
    text: str
    line: int | None = None
    column: int | None = None
    item: int | None = None
    turn: int | None = None

    @property
    def severity(self) -> str:
        return CODES[self.code][0]

    @property
    def words(self) -> str:
        """``text`` with the file's name, quoted for a shell, where a command in it names the file."""
        return self.text.replace("{path}", shlex.quote(self.path))

    def place(self) -> str:
        """``train/a.jsonl:1204:17 item 1203 turn 2``, as far as it is known."""
        numbers = [str(number) for number in (self.line, self.column) if number is not None]
        words = [
            f"{name} {value}"
            for name, value in (("item", self.item), ("turn", self.turn))
            if value is not None
        ]
        # A name may hold what moves a terminal's cursor.
        path = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in self.path)
        return " ".join([":".join([path, *numbers]), *words])

    def __str__(self) -> str:
        return f"{self.severity} {self.code} {self.place()}: {self.words}"

    def to_dict(self) -> dict[str, Any]:
        """For data_report.jsonl; what is unknown is left out."""
        known = {name: value for name, value in asdict(self).items() if value is not None}
        return {"severity": self.severity, **known, "text": self.words}

    def of(self, path: str) -> Finding:
        """The same finding in a file of another name with the same content."""
        return replace(self, path=path)


class DataFault(UserError):
    """A whole file cannot be used, or all findings of a check at once.

    Args:
        findings: in the order of the files and their items.
    """

    def __init__(self, message: str, findings: list[Finding]) -> None:
        super().__init__(message)
        self.findings = findings
