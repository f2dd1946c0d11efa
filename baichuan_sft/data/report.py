"""What became of every record and every token; both sums hold exactly, or it is a bug."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from baichuan_sft.data.check import Rules
from baichuan_sft.data.findings import CODES, Finding
from baichuan_sft.data.survey import Survey
from baichuan_sft.data.tokens import TokenDataset


@dataclass(frozen=True)
class SourceReport:
    """One file: ``read = used + rejected + dropped`` and ``rendered = used + lost + not used`` tokens.

    Attributes:
        used: records that are trained on or held out, repeats counted once.
        rejected: records with a fault.
        duplicates: records equal to an earlier one; ``duplicates_dropped`` of them are left out.
        no_target: records in which no target was left at max_length; ``too_long``: dropped for their length.
        not_drawn: records that the share of this file in the mix left out.
        repeats: how often records are used again.
        tokens_lost: cut off, or of records without a target.
        tokens_not_used: of dropped duplicates and of what was not drawn.
    """

    path: str
    sha256: str
    read: int
    used: int
    rejected: int
    duplicates: int
    duplicates_dropped: int
    no_target: int
    too_long: int
    not_drawn: int
    repeats: int
    tokens_rendered: int
    tokens_used: int
    tokens_lost: int
    tokens_not_used: int

    def __post_init__(self) -> None:
        dropped = self.duplicates_dropped + self.no_target + self.too_long + self.not_drawn
        assert self.read == self.used + self.rejected + dropped, self
        assert self.tokens_rendered == self.tokens_used + self.tokens_lost + self.tokens_not_used, self


@dataclass(frozen=True)
class DataReport:
    """The sources, and what was counted over all of them.

    Attributes:
        counts: see ``check.Examined``.
        lengths: 50th, 90th and 99th percentile and the greatest, in tokens, of the training segments.
        truncation: the policies of the sources.
        errors: the first thousand findings of that severity.
    """

    sources: Sequence[SourceReport]
    counts: Counter[str]
    segments: int
    tokens: int
    supervised_tokens: int
    held_out: int
    lengths: Sequence[int]
    max_length: int
    truncation: str
    errors: Sequence[Finding]

    @classmethod
    def of(
        cls,
        sources: Sequence[SourceReport],
        survey: Survey,
        train: TokenDataset,
        dev: TokenDataset | None,
        rules: Sequence[Rules],
    ) -> DataReport:
        import numpy as np

        at = np.percentile(train.lengths, [50, 90, 99, 100]) if len(train) else [0] * 4
        return cls(
            sources,
            survey.counts,
            len(train),
            int(train.lengths.sum()),
            int(train.targets.sum()),
            len(dev.records()) if dev is not None else 0,
            [int(length) for length in at],
            rules[0].max_length,
            "/".join(dict.fromkeys(one.truncation for one in rules)),
            survey.errors,
        )

    def total(self, name: str) -> int:
        """The sum of a field over all sources."""
        return sum(getattr(source, name) for source in self.sources)

    def __str__(self) -> str:
        return "\n".join([self.balance(), self.token_balance(), *self.remarks()])

    def balance(self) -> str:
        """``read 10,000 = used 9,993 + rejected 5 + duplicates dropped 2``."""
        words = {
            "rejected": "rejected",
            "duplicates_dropped": "duplicates dropped",
            "no_target": "without a target",
            "too_long": "too long",
            "not_drawn": "not drawn",
        }
        parts = [f"{text} {self.total(name):,}" for name, text in words.items() if self.total(name)]
        parts = parts or ["rejected 0"]
        text = f"read {self.total('read'):,} = used {self.total('used'):,} + {' + '.join(parts)}"
        more = [f"{self.total('repeats'):,} repeated"] * bool(self.total("repeats"))
        more += [f"{self.held_out:,} held out"] * bool(self.held_out)
        return f"{text}{'; ' if more else ''}{', '.join(more)}"

    def token_balance(self) -> str:
        share = 100 * self.supervised_tokens / max(self.tokens, 1)
        unused = self.total("tokens_not_used")
        parts = [f"used {self.total('tokens_used'):,}", f"lost to length {self.total('tokens_lost'):,}"]
        parts += [f"not used {unused:,}"] * bool(unused)
        return (
            f"tokens: rendered {self.total('tokens_rendered'):,} = {' + '.join(parts)}; "
            f"trained on {self.tokens:,}, supervised {self.supervised_tokens:,} ({share:.1f} %)"
        )

    def remarks(self) -> list[str]:
        """Whatever else is worth a line: cuts, notes and warnings, by code."""
        lines = []
        if self.counts["cut"]:
            lines.append(
                f"{self.counts['cut']:,} of {self.total('read'):,} cut to {self.max_length} tokens "
                f"({self.truncation})"
            )
        if self.total("duplicates") > self.total("duplicates_dropped"):
            lines.append(f"{self.total('duplicates'):,} exact duplicates are kept; --dedup True drops them")
        for code, (severity, text) in CODES.items():
            number = self.counts[f"code:{code}"]
            if number and severity != "ERROR":
                lines.append(f"{severity.lower()} {code}: {text}: {number:,}")
        return lines

    def to_dict(self) -> dict[str, Any]:
        totals = {name: self.total(name) for name in ("read", "used", "rejected", "tokens_rendered")}
        return {
            **totals,
            "tokens": self.tokens,
            "supervised_tokens": self.supervised_tokens,
            "segments": self.segments,
            "held_out": self.held_out,
            "sources": [asdict(source) for source in self.sources],
            "counts": dict(sorted(self.counts.items())),
        }
