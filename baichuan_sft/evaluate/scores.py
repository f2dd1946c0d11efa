"""What a set of outcomes is worth: one figure with its interval, and whether training changed it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from baichuan_sft.errors import EnvironmentFault, UserError
from baichuan_sft.evaluate.items import Item, Outcome

if TYPE_CHECKING:
    from baichuan_sft.evaluate.benchmarks import Benchmark

Z = 1.959963984540054  # of 95 %, two-sided
ALPHA = 0.05
RESAMPLES = 1000  # of Koehn 2004, and sacrebleu's own
METRICS = {"choice": "accuracy", "code": "pass@1", "translation": "BLEU"}
TOKENIZERS = {"zh": "zh", "ja": "ja-mecab"}  # of a target language; 13a else, as in sacrebleu


@dataclass(frozen=True)
class Summary:
    """
    Attributes:
        metric: "accuracy", "exact match", "pass@1" or "BLEU".
        value: in percent, or BLEU points; the mean over items.
        low, high: of 95 %: Wilson's interval; for BLEU that of a bootstrap over sentences.
        more: "pass@10" ..., and "subject mean", where every subject weighs the same.
        per_subject: name -> {"value", "items"}.
    """

    metric: str
    value: float
    low: float
    high: float
    num_items: int
    more: dict[str, float] = field(default_factory=dict)
    per_subject: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Paired:
    """
    Attributes:
        verdict: "gained" or "lost" where p < 0.05, else "within noise".
        difference: after minus before, in points of the metric.
        p: two-sided, of the same items before and after.
        wins, losses: items that became better, and worse.
    """

    verdict: str
    difference: float
    p: float
    wins: int
    losses: int


def wilson(share: float, count: int) -> tuple[float, float]:
    """95 % interval of a share of ``count`` items. Source: Wilson 1927, doi:10.2307/2276774."""
    spread = Z * Z / count
    middle = (share + spread / 2) / (1 + spread)
    half = Z * math.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def pass_at(k: int, samples: int, passed: int) -> float:
    """Chance that one of k drawn samples passes: 1 - C(n-c, k) / C(n, k). Source: arXiv:2107.03374."""
    assert 0 < k <= samples and 0 <= passed <= samples
    return 1 - math.comb(samples - passed, k) / math.comb(samples, k)


def summary(benchmark: Benchmark, items: Sequence[Item], outcomes: Sequence[Outcome]) -> Summary:
    """
    Raises:
        UserError: no item was asked.
        EnvironmentFault: sacrebleu, or its Japanese tokenizer, is not installed.
    """
    assert len(items) == len(outcomes)
    if not items:
        raise UserError(f"{benchmark.name}: no item was asked; see its skipped items, or raise --limit.")
    groups: dict[str, list[int]] = {}
    for place, item in enumerate(items):
        groups.setdefault(item.id.rpartition("/")[0], []).append(place)
    more = {}
    if benchmark.kind == "translation":
        language = benchmark.name.rpartition("-")[2]
        counts = bleu_counts([o.prediction for o in outcomes], [i.answer for i in items], language)
        value, drawn = bleu(counts.sum(0)), [bleu(counts[rows].sum(0)) for rows in resamples(len(items))]
        low, high = min(value, np.quantile(drawn, 0.025)), max(value, np.quantile(drawn, 0.975))
        values = {name: bleu(counts[places].sum(0)) for name, places in groups.items()}
    else:
        scores = np.array([_score(outcome) for outcome in outcomes])
        value = 100 * scores.mean()
        low, high = (100 * bound for bound in wilson(scores.mean(), len(items)))
        values = {name: 100 * scores[places].mean() for name, places in groups.items()}
    if benchmark.kind == "code":
        more = _passes([outcome.detail for outcome in outcomes])
    if len(values) > 1:
        more["subject mean"] = float(np.mean(list(values.values())))
    per_subject = {
        name: {"value": float(values[name]), "items": len(places)} for name, places in groups.items()
    }
    metric = METRICS.get(benchmark.kind, "exact match")
    return Summary(metric, float(value), float(low), float(high), len(items), more, per_subject)


def paired(
    benchmark: Benchmark, items: Sequence[Item], before: Sequence[Outcome], after: Sequence[Outcome]
) -> Paired:
    """Did the same items turn out better or worse?

    Right or wrong: McNemar's exact test, on the items that changed. BLEU: paired bootstrap over sentences
    (Koehn 2004, W04-3250); a draw without a difference speaks for neither side, so equal texts give p = 1.
    """
    assert len(items) == len(before) == len(after)
    if not items:
        raise UserError(f"{benchmark.name}: no item was asked of both models, nothing to compare.")
    if benchmark.kind == "translation":
        language = benchmark.name.rpartition("-")[2]
        references = [item.answer for item in items]
        old, new = (
            bleu_counts([o.prediction for o in side], references, language) for side in (before, after)
        )
        difference = bleu(new.sum(0)) - bleu(old.sum(0))
        drawn = np.array([bleu(new[r].sum(0)) - bleu(old[r].sum(0)) for r in resamples(len(items))])
        # + 1: the sample itself is one of the draws, so p is never 0
        p = min(1.0, 2 * (1 + min((drawn <= 0).sum(), (drawn >= 0).sum())) / (1 + len(drawn)))
        change = np.array([bleu(b) - bleu(a) for a, b in zip(old, new)])
    else:
        change = np.array([_score(b) - _score(a) for a, b in zip(before, after)])
        difference = 100 * change.mean()
        p = mcnemar(int((change > 0).sum()), int((change < 0).sum()))
    verdict = "within noise" if p >= ALPHA or difference == 0 else "gained" if difference > 0 else "lost"
    return Paired(verdict, float(difference), float(p), int((change > 0).sum()), int((change < 0).sum()))


def mcnemar(wins: int, losses: int) -> float:
    """Two-sided p of a fair coin falling as unevenly as this. Source: McNemar 1947, in its exact form."""
    changed = wins + losses
    tail = sum(math.comb(changed, i) for i in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**changed)


def resamples(count: int) -> np.ndarray:
    """Rows of places drawn with replacement, the same for every task and run."""  # (RESAMPLES, count)
    return np.random.default_rng(12345).integers(count, size=(RESAMPLES, count))


def bleu_counts(texts: Sequence[str], references: Sequence[str], language: str) -> np.ndarray:
    """What BLEU adds up, per sentence: matches and totals of 1- to 4-grams, lengths."""  # (N, 10)
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError:
        raise EnvironmentFault(
            "BLEU needs sacrebleu, which is not installed: pip install 'baichuan-sft[eval]'."
        ) from None
    try:
        metric = BLEU(tokenize=TOKENIZERS.get(language, "13a"))
    except (ImportError, RuntimeError):
        raise EnvironmentFault(
            "BLEU of Japanese needs mecab, which is not installed: pip install 'baichuan-sft[eval]'."
        ) from None
    rows = [metric.corpus_score([text], [[reference]]) for text, reference in zip(texts, references)]
    return np.array([[*row.counts, *row.totals, row.sys_len, row.ref_len] for row in rows], dtype=np.int64)


def bleu(counts: np.ndarray) -> float:
    """BLEU of summed counts, as sacrebleu has it for a corpus."""
    from sacrebleu.metrics.bleu import BLEU

    *grams, length, reference = (int(count) for count in counts)
    return BLEU.compute_bleu(grams[:4], grams[4:], length, reference, smooth_method="exp").score


def _score(outcome: Outcome) -> float:
    assert outcome.score is not None, outcome
    return outcome.score


def _passes(details: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """pass@k in percent for every k of the literature that there are samples for."""
    least = min(len(detail["passed"]) for detail in details)
    return {
        f"pass@{k}": 100 * float(np.mean([pass_at(k, len(d["passed"]), sum(d["passed"])) for d in details]))
        for k in (10, 100)
        if k <= least
    }
