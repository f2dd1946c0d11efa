"""Evaluation on held-out data: the exact mean over all targets, when it happens, and what is held out."""

import json
import math
import shutil

import pytest
import torch
from fixtures import ROOT, SMALL_VOCABULARY, cross_entropy, tiny_config
from launching import flags, log_of

from baichuan_sft import BaichuanForCausalLM, load_model, load_tokenizer
from baichuan_sft.errors import NumericalFault
from baichuan_sft.train.record import plot_loss
from baichuan_sft.train.sft import main
from baichuan_sft.train.trainer import SftTrainer

DATA = ROOT / "data" / "belle_chat.json"
NUM_HELD_OUT = 7


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    directory = tmp_path_factory.mktemp("nano")
    torch.manual_seed(0)
    # the z-loss enters training and no evaluation
    BaichuanForCausalLM(
        tiny_config("baichuan2-7b", z_loss_weight=0.1, max_position_embeddings=512)
    ).save_pretrained(directory)
    load_tokenizer(SMALL_VOCABULARY).save_pretrained(directory)
    return directory


def held_out_records():
    return json.loads(DATA.read_text())[-NUM_HELD_OUT:]


@pytest.fixture
def train(nano, tmp_path):
    """Train in this process; returns the output directory."""
    held_out = tmp_path / "held_out.json"
    held_out.write_text(json.dumps(held_out_records()))

    def call(**options):
        values = {
            "model_name_or_path": nano,
            "data_path": DATA,
            "eval_data_path": held_out,
            "output_dir": tmp_path / "out",
            "cache_dir": tmp_path / "cache",
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-3,
            "save_strategy": "no",
            "seed": 5,
        }
        values = {name: value for name, value in (values | options).items() if value is not None}
        assert main(flags(**values)) == 0
        return tmp_path / "out"

    return call


def evaluations(directory):
    rows = [json.loads(line) for line in (directory / "trainer_log.jsonl").read_text().splitlines()]
    return [row for row in rows if "eval_loss" in row]


@pytest.mark.parametrize(
    "options",
    [
        {"packing_tokens": 512},
        {"packing": False, "per_device_eval_batch_size": 4},  # batches of 4 and 3
        {"use_lora": True, "lora_dropout": 0.5},  # which evaluation leaves out
    ],
)
def test_eval_loss_is_the_mean_over_all_targets(train, options):
    out = train(**options)
    row = evaluations(out)[-1]
    total, count = cross_entropy(load_model(out), held_out_records())
    assert row["step"] == 4 and row["eval_targets"] == count
    assert row["eval_loss"] == pytest.approx(total / count, abs=1e-5)  # fp32 sums in another order
    assert row["eval_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)


def test_when_it_evaluates(train, capsys):
    out = train(eval_strategy="steps", eval_steps=2, eval_on_start=True, max_steps=5)
    rows = evaluations(out)
    # after the last update too
    assert [row["step"] for row in rows] == [0, 2, 4, 5]
    assert rows[0]["eval_loss"] > rows[-1]["eval_loss"]
    assert f"step 2/5 eval_loss {rows[1]['eval_loss']:.4f} perplexity" in capsys.readouterr().out
    assert [row["step"] for row in log_of(out)] == [1, 2, 3, 4, 5]


def test_evaluation_changes_nothing_in_training(train, tmp_path):
    losses = [[row["loss"] for row in log_of(train(use_lora=True, eval_strategy="steps", eval_steps=1))]]
    losses.append([row["loss"] for row in log_of(train(use_lora=True, eval_data_path=None))])
    assert losses[0] == losses[1] and len(losses[0]) == 4  # dropout draws the same numbers


@pytest.mark.parametrize("packing", [True, False])
def test_what_is_held_out_is_not_trained_on(train, monkeypatch, packing):
    trained, evaluated = set(), set()

    def keep_items(self, model, inputs, *args, **kwargs):
        trained.update(inputs["facts"].items)
        return compute_loss(self, model, inputs, *args, **kwargs)

    def keep_evaluated(self, dataloader, *args, **kwargs):
        evaluated.update(item for batch in dataloader for item in batch["facts"].items)
        return evaluation_loop(self, dataloader, *args, **kwargs)

    compute_loss, evaluation_loop = SftTrainer.compute_loss, SftTrainer.evaluation_loop
    monkeypatch.setattr(SftTrainer, "compute_loss", keep_items)
    monkeypatch.setattr(SftTrainer, "evaluation_loop", keep_evaluated)
    train(dev_ratio=0.2, eval_data_path=None, max_steps=-1, num_train_epochs=1, packing=packing)
    assert len(evaluated) == 14 and len(trained) == 56
    assert trained | evaluated == {(0, item) for item in range(70)}


def test_a_share_that_holds_out_nothing_is_refused(train):
    train(dev_ratio=0.001, eval_data_path=None)  # at least one is held out


def test_an_evaluation_loss_that_is_not_finite_stops(train, nano, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(nano, broken)
    model = load_model(nano)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    model.save_pretrained(broken)
    with pytest.raises(NumericalFault, match="step 0: the evaluation loss is nan"):
        train(model_name_or_path=broken, eval_on_start=True)


def test_the_picture_shows_both_losses(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    kept = []
    monkeypatch.setattr(plt, "close", kept.append)
    history = [{"step": 1, "loss": 2.0, "grad_norm": 1.0}, {"step": 2, "loss": 1.0, "grad_norm": 1.0}]
    plot_loss([*history, {"step": 2, "eval_loss": 1.5}], tmp_path / "loss.png")
    assert [line.get_label() for line in kept[0].axes[0].lines] == ["loss", "held out"]
    assert (tmp_path / "loss.png").stat().st_size > 0
