"""Figures, intervals and verdicts against what others, or plain counting, say."""

import math
import random
import sys
from itertools import combinations, product

import numpy as np
import pytest

from baichuan_sft.errors import EnvironmentFault, UserError
from baichuan_sft.evaluate import scores
from baichuan_sft.evaluate.benchmarks import BENCHMARKS
from baichuan_sft.evaluate.items import Item, Outcome

MMLU, FLORES = BENCHMARKS["mmlu"], BENCHMARKS["flores-en"]


def outcomes(values):
    return [Outcome("", float(value)) for value in values]


def items(count, subject="law"):
    return [Item(f"{subject}/{i}", "", "A") for i in range(count)]


def translated(texts):
    return [Outcome(text, None) for text in texts]


def test_accuracy_by_item_and_by_subject():
    asked = [*items(8), *items(2, "logic")]
    found = scores.summary(MMLU, asked, outcomes([1, 1, 1, 1, 1, 1, 0, 0, 0, 0]))
    assert (found.metric, found.value, found.num_items) == ("accuracy", 60.0, 10)
    assert found.per_subject == {"law": {"value": 75.0, "items": 8}, "logic": {"value": 0.0, "items": 2}}
    assert found.more == {"subject mean": 37.5}


def test_nothing_asked_is_an_error():
    with pytest.raises(UserError, match="mmlu: no item was asked"):
        scores.summary(MMLU, [], [])
    with pytest.raises(UserError, match="nothing to compare"):
        scores.paired(MMLU, [], [], [])


@pytest.mark.parametrize("count", [1, 7, 164, 11582])
def test_wilson_bounds_are_the_shares_that_just_explain_the_sample(count):
    """A share p is inside as long as the sample lies within 1.96 standard deviations of it."""
    for right in {0, 1, count // 3, count - 1, count}:
        share = right / count
        for bound in scores.wilson(share, count):
            assert 0 <= bound <= 1
            away = 1.96 * math.sqrt(bound * (1 - bound) / count)
            # 1e-4: 1.96 is rounded; 1e-7: the root of a double's last digit, at bounds that should be 0 or 1
            assert abs(share - bound) == pytest.approx(away, rel=1e-4, abs=1e-7)


def test_wilson_of_published_cases():
    """Newcombe 1998, Statistics in Medicine 17:857, table I, method 3."""
    for right, count, bounds in (
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (1, 29, (0.0061, 0.1718)),
    ):
        assert tuple(round(bound, 4) for bound in scores.wilson(right / count, count)) == bounds


def test_pass_at_k_is_the_share_of_draws_with_a_pass():
    for samples, passed, k in product((1, 4, 6), range(7), (1, 2, 4, 6)):
        if passed <= samples and k <= samples:
            draws = list(combinations([True] * passed + [False] * (samples - passed), k))
            assert scores.pass_at(k, samples, passed) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_10_of_20_samples():
    counts = [0, 1, 5, 20]
    made = [Outcome("", c / 20, {"passed": [True] * c + [False] * (20 - c)}) for c in counts]
    found = scores.summary(BENCHMARKS["humaneval"], items(4, "HumanEval"), made)
    assert found.metric == "pass@1" and found.value == pytest.approx(100 * sum(counts) / 80)
    assert found.more == {"pass@10": pytest.approx(25 * sum(scores.pass_at(10, 20, c) for c in counts))}
    assert scores.summary(BENCHMARKS["mbpp"], items(1), [Outcome("", 1.0, {"passed": [True]})]).more == {}


TEXTS = {
    "en": ("The cat sat on the mat, didn't it?", "The dog sat on a mat.", "Prices rose 3.5% in 2021."),
    "zh": ("他补充道：“我们现在有4个月大的老鼠。”", "价格上涨了3.5%。", "今天天气很好。"),
    "ja": ("彼は東京都に住んでいます。", "今日は天気がとても良いです。", "価格は3.5%上がりました。"),
}
FIGURES = {"en": "13a", "zh": "zh", "ja": "ja-mecab"}


@pytest.mark.parametrize("language", TEXTS)
def test_bleu_is_sacrebleus(language):
    bleu_of = pytest.importorskip("sacrebleu.metrics.bleu").BLEU
    if language == "ja":
        pytest.importorskip("MeCab")
    draw = random.Random(0)
    references = [text for text in TEXTS[language] for _ in range(4)]
    texts = ["".join(c for c in text if draw.random() > 0.1) for text in references]
    counts = scores.bleu_counts(texts, references, language)
    expected = bleu_of(tokenize=FIGURES[language]).corpus_score(texts, [references]).score
    assert 5 < expected < 95
    # the same sums, so equal to the last digits of a double
    assert scores.bleu(counts.sum(0)) == pytest.approx(expected, rel=1e-12)
    other = bleu_of(tokenize="13a").corpus_score(texts, [references]).score
    assert language == "en" or abs(other - expected) > 1  # so the tokenizer was not ignored


def test_summary_of_a_translation():
    pytest.importorskip("sacrebleu")
    asked = [Item(f"flores-en/{i}", "", f"sentence number {i} stands here in full") for i in range(60)]
    draw = random.Random(1)
    texts = [" ".join(w for w in item.answer.split() if draw.random() > 0.2) for item in asked]
    found = scores.summary(FLORES, asked, translated(texts))
    assert found.metric == "BLEU" and found.low < found.value < found.high
    assert found == scores.summary(FLORES, asked, translated(texts))  # the draws are seeded
    perfect = scores.summary(FLORES, asked, translated(item.answer for item in asked))
    # exp(log(...)) of a perfect match
    assert (perfect.low, perfect.high) == (pytest.approx(100), pytest.approx(100))
    assert scores.summary(FLORES, asked, translated([""] * 60)).value == 0


def test_translations_need_sacrebleu(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.bleu", None)
    with pytest.raises(EnvironmentFault, match=r"pip install 'baichuan-sft\[eval\]'"):
        scores.summary(FLORES, items(1), translated(["a"]))
    assert scores.summary(MMLU, items(1), outcomes([1])).value == 100


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (3, 9), (8, 1), (20, 20), (6, 0)])
def test_mcnemar_counts_coin_tosses(wins, losses):
    changed = wins + losses
    lean = abs(wins - losses)
    heads = [math.comb(changed, i) for i in range(changed + 1)]
    expected = sum(n for i, n in enumerate(heads) if abs(2 * i - changed) >= lean) / 2**changed
    assert scores.mcnemar(wins, losses) == pytest.approx(expected)


def test_verdicts_on_right_and_wrong():
    before = [0] * 10 + [1] * 90
    better, worse = [1] * 10 + [1] * 90, [0] * 10 + [0] * 10 + [1] * 80

    def verdict(old, new):
        found = scores.paired(MMLU, items(len(old)), outcomes(old), outcomes(new))
        return found.verdict, found.difference, found.wins, found.losses

    assert verdict(before, better) == ("gained", 10.0, 10, 0)
    assert verdict(before, worse) == ("lost", -10.0, 0, 10)
    assert verdict(before, before) == ("within noise", 0.0, 0, 0)
    # ten points more, but half of the items changed sides
    assert verdict([0] * 30 + [1] * 20, [1] * 30 + [0] * 20)[0] == "within noise"


def test_verdicts_on_translations():
    pytest.importorskip("sacrebleu")
    asked = [
        Item(f"flores-en/{i}", "", f"word{i} then some more words follow it here {i}") for i in range(40)
    ]
    good = [item.answer for item in asked]
    bad = [" ".join(text.split()[:5]) for text in good]
    gained = scores.paired(FLORES, asked, translated(bad), translated(good))
    lost = scores.paired(FLORES, asked, translated(good), translated(bad))
    assert (gained.verdict, gained.wins, gained.losses) == ("gained", 40, 0)
    assert (lost.verdict, lost.wins, lost.losses) == ("lost", 0, 40)
    assert lost.difference == -gained.difference and lost.p == gained.p < 0.01
    same = scores.paired(FLORES, asked, translated(bad), translated(bad))
    assert same == scores.Paired("within noise", 0.0, 1.0, 0, 0)
    one = scores.paired(FLORES, asked, translated(bad), translated([*bad[:-1], good[-1]]))
    assert (one.verdict, one.wins) == ("within noise", 1)


def test_false_verdicts_are_as_rare_as_said():
    """Two runs of one model differ by chance alone: at most about one in twenty is called gained or lost."""
    draw = np.random.default_rng(0)
    called = 0
    for _ in range(400):
        before, after = draw.random((2, 80)) < 0.6
        called += scores.paired(MMLU, items(80), outcomes(before), outcomes(after)).verdict != "within noise"
    # the exact test is below its 5 %; 400 * 0.05 = 20, plus two standard deviations of 4.4
    assert 0 < called <= 29
