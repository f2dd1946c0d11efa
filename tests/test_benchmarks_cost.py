"""The benchmarks of traffic, scaling and the loss measure what they say."""

import json
import sys

import pytest
from fixtures import ROOT
from launching import run

sys.path.insert(0, str(ROOT / "benchmarks"))

import comm
import scaling
import torch
from loss import CONTESTANTS, errors


def figures(script, directory, *words):
    """What a benchmark writes with --json; its table must end the output and its plot be a PNG."""
    path, picture = directory / "figures.json", directory / "plot.png"
    command = [sys.executable, ROOT / "benchmarks" / script, *words, "--json", path, "--plot", picture]
    done = run(command, timeout=900)
    assert done.returncode == 0, done.stdout
    lines = done.stdout.rstrip().splitlines()
    assert all(line.startswith("| ") and line.endswith("|") for line in lines[-2:-1]), done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    return json.loads(path.read_text())


# --- traffic --------------------------------------------------------------------------------------


def test_ring_formulas_by_hand():
    facts = {"trained": 100, "gathered": 1900}
    # stage:          DDP, 0, 1, 2, 3; two micro-steps, four processes: three quarters of the payload
    expected = [150, 150, 150, 225, 0.75 * 2 * (1900 + 100)]
    assert [comm.formula(stage, facts, 4, 2) for stage in (None, 0, 1, 2, 3)] == expected


@pytest.mark.parametrize(
    "operation, kind",
    [
        ("allreduce_", "allreduce"),
        ("all_reduce_coalesced_", "allreduce"),
        ("_reduce_scatter_base_", "reduce_scatter"),
        ("reduce_scatter_tensor_coalesced_", "reduce_scatter"),
        ("_allgather_base_", "allgather"),
        ("all_gather_into_tensor_out", "allgather"),
        ("reduce_", "reduce"),
        ("broadcast_", "broadcast"),
    ],
)
def test_each_operation_has_its_kind(operation, kind):
    assert comm.kind_of(operation) == kind


def test_an_unforeseen_operation_is_an_error():
    with pytest.raises(ValueError, match="no ring formula for alltoall_"):
        comm.kind_of("alltoall_")


@pytest.mark.slow
def test_traffic_of_real_training_follows_the_formula(tmp_path):
    runs = "lora-0,full-2,full-2-owners"
    rows = figures("comm.py", tmp_path, "--processes", "2", "--runs", runs, "--hidden", "64")
    assert [row["run"] for row in rows] == runs.split(",")
    for row in rows:
        # every rank, every counted update alike; 5 %: DeepSpeed's padding, and the counts of targets
        assert row["steady"]
        expected = 1.5 if row["run"] == "full-2" else 1.0  # DeepSpeed's own way all-reduces
        assert row["ratio"] == pytest.approx(expected, rel=0.05)
    lora, full, _ = rows
    assert lora["kinds"]["allreduce float32"] == [lora["trained"], 1]  # the adapters, once, and nothing else
    # embedding and head alone: a count that missed parameters would fit the formula too
    assert full["trained"] > 2 * 4 * 64 * 6000
    assert lora["trained"] < full["trained"] / 20


# --- scaling --------------------------------------------------------------------------------------


def test_exponents():
    xs = [1, 2, 4, 8]
    assert scaling.exponent(xs, [3 * x**2 for x in xs]) == pytest.approx(2)
    assert scaling.exponent(xs, [5.0] * 4) == pytest.approx(0, abs=1e-9)


def test_packed_rows_hold_many_conversations():
    packed = scaling.positions(4096, packed=True)[0]
    starts = (packed == 0).nonzero().flatten()
    assert len(packed) == 4096 and 4096 / 600 <= len(starts) <= 4096 / 400 + 1
    assert (scaling.positions(4096, packed=False)[0] == torch.arange(4096)).all()


def test_saved_bytes_count_each_storage_once():
    weight = torch.nn.Parameter(torch.randn(8, 8))
    x = torch.randn(4, 8)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = weight

        def forward(self, x):
            hidden = x @ self.weight  # keeps x; the weight is no activation
            squares = hidden * hidden  # keeps hidden, twice
            result = type("Output", (), {})()
            result.loss = (squares * hidden.view(4, 8)).sum()  # keeps squares, and hidden again
            return result

    assert scaling.step(Model(), {"x": x}) == 3 * 4 * 8 * 4


@pytest.mark.slow
def test_scaling_curves(tmp_path):
    contestants = "segments, packed;sdpa, packed"
    words = ["--quick", "--sweeps", "sequence length,layers", "--contestants", contestants]
    curves = figures("scaling.py", tmp_path, *words)
    of = {(one["sweep"], one["contestant"], one["position"]): one for one in curves}
    assert len(of) == 2 * 2 * 2
    for one in curves:
        assert all(seconds > 0 for seconds in one["cpu_seconds"])
        assert all(later > earlier for earlier, later in zip(one["saved_mib"], one["saved_mib"][1:]))
    for position in ("rope", "alibi"):
        ours, dense = (of["sequence length", f"{name}, packed", position] for name in ("segments", "sdpa"))
        # a T x T mask is kept: 2048**2 floats are 16 MiB, four heads' ALiBi four times that
        mask_mib = 16 if position == "rope" else 64
        assert dense["saved_mib"][-1] - ours["saved_mib"][-1] > mask_mib / 2
        # without one all that is kept is per token; counted, so the slack is for runs of unequal length
        assert ours["last"]["saved_mib"] < 1.02 < 1.04 < dense["last"]["saved_mib"]
        layers = of["layers", "segments, packed", position]["saved_mib"]
        assert layers[1] / layers[0] < 2  # the head's part does not double


# --- loss -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["full", "chunked"])
def test_losses_agree_with_fp64(name):
    # fp32 rounds at 6e-8; sums over 4,096 logits and 384 rows may lose a few times that
    assert max(errors(CONTESTANTS[name], "cpu", torch.float32).values()) < 1e-6


def test_a_wrong_loss_would_be_seen():
    def wrong(head, hidden, labels):
        return head(hidden, labels) * 1.00001

    assert min(errors(wrong, "cpu", torch.float32).values()) > 5e-6


@pytest.mark.slow
def test_peak_of_the_loss(tmp_path):
    results = figures("loss.py", tmp_path, "--rows", "256", "--hidden", "8", "--supervised", "0.25")
    full, chunked = results["full"], results["chunked"]
    assert full["loss"] == pytest.approx(chunked["loss"], rel=1e-6)
    logits = 256 * 125_696 * 4
    # logits, their shifted copy and its log-softmax live together; the weight is small here
    assert 2.9 * logits < full["peak"] < 3.2 * logits
    # a quarter of the rows are targets, give or take 0.05: their logits, at most one copy, and d weight
    assert 0.2 * logits < chunked["peak"] < 0.7 * logits
    # resident memory is the other way to measure; libraries that the step is first to use belong to it too
    assert 0.95 * full["peak"] < full["resident"] < full["peak"] + 200 * 2**20
