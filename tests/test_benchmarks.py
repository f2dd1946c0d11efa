"""What the benchmarks compare is the same work, and what they count is right."""

import json
import math
import re
import sys

import pytest
import torch
from fixtures import ROOT, SMALL_VOCABULARY

sys.path.insert(0, str(ROOT))

from benchmarks import contest
from benchmarks.contestants import CONTESTANTS
from benchmarks.steps import setup
from benchmarks.train import arguments, count

CUTOFF = 64
TINY = "--layers 2 --width 32 --heads 4 --intermediate 64 --vocab 512 --update_tokens 128 --lr 0"
NAMES = list(CONTESTANTS)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twelve conversations of one to three rounds, none longer than the cut-off: nobody has to cut."""
    records = [
        {"id": str(i), "conversations": turns}
        for i in range(12)
        if (
            turns := [
                turn for _ in range(i % 3 + 1) for turn in pair("你好" * (i % 4 + 1), "再见" * (i % 5 + 1))
            ]
        )
    ]
    path = tmp_path_factory.mktemp("data") / "short.json"
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return path


def pair(question, answer):
    return {"from": "human", "value": question}, {"from": "assistant", "value": answer}


def words(data, *more):
    return [*f"--data {data} --tokenizer {SMALL_VOCABULARY} --plan mt{CUTOFF} {TINY}".split(), *more]


def epoch(contestant, num_targets):
    """Steps, with a learning rate of 0, until all targets were seen: loss sum, targets, real, computed."""
    loss = targets = real = computed = 0
    while targets < num_targets:
        work = contestant.step()
        loss += work.loss * work.targets
        targets, real, computed = targets + work.targets, real + work.real, computed + work.computed
    return loss, targets, real, computed


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("position", ["rope", "alibi"])
def test_all_contestants_train_the_same_targets_to_the_same_loss(data, position, mode):
    """An epoch's loss sum in fp32: sums of hundreds of terms near ln(512), each good to some 1e-6."""
    shared = setup(arguments(words(data, "--position", position, "--mode", mode)))
    num_real = int(shared.segments.lengths.sum())
    num_targets = int(shared.segments.targets.sum())
    assert len(shared.segments) == 12 and num_targets > 100
    names = [name for name in NAMES if name != "ours_compile" and (position == "rope" or "trl" not in name)]
    losses = {}
    for name in names:
        loss, targets, real, computed = epoch(CONTESTANTS[name](shared), num_targets)
        assert (targets, real) == (num_targets, num_real), name
        if name == "vendor":
            assert computed == 12 * CUTOFF
        assert real <= computed <= 12 * CUTOFF, name
        losses[name] = loss
    assert losses["ours"] == pytest.approx(num_targets * math.log(512), rel=0.2)  # as good as untrained
    assert losses == pytest.approx(dict.fromkeys(names, losses["vendor"]), rel=2e-6), losses


@pytest.mark.slow
def test_gradients_of_one_update_are_the_vendors(data):
    """All twelve conversations in one update: what is compared is the whole step's gradient."""
    shared = setup(arguments(words(data, "--update_tokens", str(12 * CUTOFF))))
    grads = {}
    for name in ("vendor", "ours"):
        contestant = CONTESTANTS[name](shared)
        contestant.backward(next(contestant.updates))
        grads[name] = {key: p.grad for key, p in contestant.model.named_parameters()}
    assert grads["ours"].keys() == grads["vendor"].keys()
    for key, grad in grads["vendor"].items():
        # fp32 sums in another order; relative to the largest entry of each tensor
        assert (grads["ours"][key] - grad).abs().max() <= 1e-5 * grad.abs().max(), key


@pytest.mark.slow
def test_flops_and_kept_bytes_follow_from_the_shape(data):
    """Linears of one step by hand: 6 per weight and token, and the head's on its targets only."""
    shared = setup(arguments(words(data, "--heads", "4")))
    work, flops, kept = count(CONTESTANTS["ours_rows"](shared))
    layers, width, inner, vocab = 2, 32, 64, 512
    linears = 6 * work.computed * layers * (4 * width**2 + 3 * width * inner)
    head = 6 * work.targets * width * vocab
    # what is left is attention: at most all T x T pairs, 2 + 5 products of 2 * width per pair and layer
    attention = flops - linears - head
    assert 0 < attention <= layers * 7 * 2 * width * work.computed * CUTOFF
    hidden_states = 4 * work.computed * width
    assert kept > 10 * layers * hidden_states


@pytest.mark.slow
def test_the_table_and_the_plot(data, tmp_path, capsys):
    from benchmarks.train import measure

    path = tmp_path / "plot.png"
    more = ["--rounds", "3", "--contestants", "vendor,llamafactory,ours", "--plot", str(path)]
    turns = measure(arguments(words(data, *more)))
    out = capsys.readouterr().out
    assert "llamafactory is left out: " in out
    assert {name: len(taken) for name, taken in turns.items()} == {"vendor": 3, "ours": 3}
    rows = re.findall(r"^\| (\w+) \| (\d\.\d{3}) \|", out, re.MULTILINE)
    assert [name for name, _ in rows] == ["vendor", "ours"]
    vendor, ours = (float(useful) for _, useful in rows)
    assert vendor < ours <= 1
    assert path.read_bytes().startswith(b"\x89PNG")


def test_contestants_take_turns_and_the_first_round_is_dropped():
    calls = []
    turns = contest.interleave({name: lambda name=name: calls.append(name) or len(calls) for name in "ab"}, 2)
    assert calls == list("ababab")
    assert [turn.result for turn in turns["a"]] == [3, 5]
    assert [turn.result for turn in turns["b"]] == [4, 6]


def test_cpu_seconds_are_not_wall_seconds():
    import time

    turn = contest.take_turn(lambda: time.sleep(0.2))
    assert turn.wall >= 0.2 > 2 * turn.cpu


def test_ratios_round_by_round():
    found = contest.spread(contest.ratios([2, 4, 9, 8, 10], [2, 2, 3, 2, 2]))
    assert (found.median, found.low, found.high, found.quartile) == (3, 1, 5, 2)
    assert str(found) == "3.00 (1.00 - 5.00)"
    assert contest.spread([1.0, 2.0]).quartile == 1.25


def test_a_table():
    assert contest.table(["a", "b"], [(1, "x")]) == "| a | b |\n| --- | --- |\n| 1 | x |"


def test_flops_of_a_cpus_attention_are_counted():
    """Two products of the forward, five of the backward, 2 * T * T * width each."""
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks.train import MORE_FLOPS

    query, key, value = torch.randn(3, 1, 2, 16, 8, requires_grad=True).unbind()
    with FlopCounterMode(display=False, custom_mapping=MORE_FLOPS) as counter:
        torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True).sum().backward()
    assert counter.get_total_flops() == 7 * 2 * 16 * 16 * 2 * 8
