"""Numbers that must not be trained on: who stops, what is named, what is left out without a trace."""

import json

import pytest
import torch
from fixtures import ROOT, SMALL_VOCABULARY, tiny_config
from launching import deepspeed, flags

from baichuan_sft import load_tokenizer
from baichuan_sft.errors import NumericalFault
from baichuan_sft.model.modeling_baichuan import BaichuanForCausalLM
from baichuan_sft.train.numerics import SKIPS, Numerics

DATA = ROOT / "data" / "belle_chat.json"
SCRIPT = ROOT / "tests" / "spike_runs.py"
# of ZeRO, each with another optimizer of DeepSpeed's inside; None: without DeepSpeed
STAGES = [None, 0, 1, 2, 3, "0 bf16", "1 bf16", "2 bf16", "3 bf16"]
UPDATES = 4


def zero(folder, stage, half):
    path = folder / f"zero{stage}{half}.json"
    auto = dict.fromkeys(["train_micro_batch_size_per_gpu", "gradient_clipping"], "auto")
    config = {**auto, "gradient_accumulation_steps": "auto", "bf16": {"enabled": "auto"}}
    config["zero_optimization"] = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
    path.write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Flags of a run of four updates, two micro-batches each."""
    folder = tmp_path_factory.mktemp("spikes")
    torch.manual_seed(0)
    BaichuanForCausalLM(tiny_config("baichuan2-13b")).save_pretrained(folder / "nano")
    load_tokenizer(SMALL_VOCABULARY).save_pretrained(folder / "nano")

    def of(name, stage=None, **options):
        values = dict(
            model_name_or_path=folder / "nano", data_path=DATA, output_dir=folder / name, max_steps=UPDATES
        )
        values |= dict(cache_dir=folder / "cache", model_max_length=128, packing=False, use_cpu=True)
        values |= dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-3)
        values |= dict(save_strategy="no", train_sampling_strategy="sequential", check_reload=False)
        if stage is not None:
            number, _, half = str(stage).partition(" ")
            values |= dict(deepspeed=zero(folder, int(number), half), bf16=bool(half))
        return flags(**{**values, **options})

    of.folder = folder
    return of


def results(folder, name, runs, processes):
    path = folder / f"{name}.json"
    path.write_text(json.dumps(runs))
    done = deepspeed(SCRIPT, path, processes=processes)
    assert done.returncode == 0, done.stdout
    return [
        json.loads((folder / f"{name}.json-{rank}").read_text()) for rank in range(processes)
    ], done.stdout


def stays(hashes, updates):
    """Where nothing changed from one update to the next is exactly where one was left out."""
    return [step + 2 for step, (a, b) in enumerate(zip(hashes, hashes[1:])) if a == b] == updates


def again(words, name):
    """The same run twice, and with two loader workers; LoRA, whose dropout draws numbers."""
    options = [{}, {}, {"dataloader_num_workers": 2}]
    lora = dict(use_lora=True, learning_rate=1e-2)
    return [dict(flags=words(f"{name}{i}", **lora, **more), spikes={}) for i, more in enumerate(options)]


@pytest.fixture(scope="module")
def runs(words):
    """In one process: per stage a NaN at update 2 and a steep gradient at 3, both left out; then stops."""
    plan = []
    for stage in STAGES:
        options = dict(on_spike="skip", grad_norm_limit=1e4)
        plan.append(dict(flags=words(f"skip{stage}", stage, **options), spikes={"2": "nan", "3": "steep"}))
        plan.append(dict(flags=words(f"norm{stage}", stage), spikes={"3": "no_gradient"}))
    plan.append(dict(flags=words("inf"), spikes={"2": "inf"}))
    plan.append(dict(flags=words("zero"), spikes={"2": "zero"}))
    many = words("many", max_steps=9, on_spike="skip")
    plan.append(dict(flags=many, spikes=dict.fromkeys("23456789", "nan")))
    plan += again(words, "one")
    (found,), said = results(words.folder, "runs", plan, processes=1)
    names = [f"{kind}{stage}" for stage in STAGES for kind in ("skip", "norm")] + ["inf", "zero", "many"]
    names += ["same0", "same1", "workers"]
    return dict(zip(names, found, strict=True)), said


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_an_update_that_is_left_out_leaves_no_trace(runs, stage):
    found = runs[0][f"skip{stage}"]
    assert found["error"] == "" and len(found["hashes"]) == UPDATES
    assert stays(found["hashes"], [2, 3])
    rows = [row for row in found["log"] if "loss" in row]
    assert [row.get("skipped_updates", 0) for row in rows] == [0, 1, 2, 2]
    assert all(abs(row["loss"]) < 20 for row in rows)  # NaN is left out of the mean
    assert rows[3]["learning_rate"] < rows[2]["learning_rate"] < rows[1]["learning_rate"]
    assert runs[1].count("skipped 2 of 4 updates: steps 2, 3") == len(STAGES)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_that_is_not_finite_stops_before_it_is_taken(runs, stage):
    found = runs[0][f"norm{stage}"]
    assert found["error"].startswith("NumericalFault: step 3, rank 0: the gradient norm is ")
    assert "records (0-based) " in found["error"] and " item 8, 9, 10, 11" in found["error"]
    assert len(found["hashes"]) == 2 and found["hashes"][0] != found["hashes"][1]


@pytest.mark.slow
def test_infinite_and_zero_losses_stop_with_the_micro_batches_named(runs):
    assert "step 2, rank 0: the loss is inf; records (0-based) " in runs[0]["inf"]["error"]
    assert "item 4, 5, 6, 7" in runs[0]["inf"]["error"]
    assert "step 2, rank 0: the loss is 0 over " in runs[0]["zero"]["error"]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bits(runs):
    first, second, workers = (runs[0][name]["hashes"] for name in ("same0", "same1", "workers"))
    assert first == second == workers and len(set(first)) == UPDATES


@pytest.mark.slow
def test_more_than_spikes_stop(runs):
    assert f"skipped {SKIPS + 1} of " in runs[0]["many"]["error"]
    assert "more than spikes; the last: step " in runs[0]["many"]["error"]


@pytest.mark.slow
def test_two_ranks_stop_and_skip_together(words):
    """The fault is on rank 1 alone."""
    plan = []
    for stage in STAGES:
        plan.append(dict(flags=words(f"two{stage}", stage), spikes={"2": "nan"}, rank=1))
        options = dict(on_spike="skip", grad_norm_limit=1e4)
        spikes = {"2": "nan", "3": "steep"}
        plan.append(dict(flags=words(f"twoskip{stage}", stage, **options), spikes=spikes, rank=1))
    ranks, _ = results(words.folder, "two", [*plan, *again(words, "twice")], processes=2)
    for rank in ranks:
        first, second, workers = (found["hashes"] for found in rank[-3:])
        assert first == second == workers and len(set(first)) == UPDATES
    for stopped, skipping in zip(plan[::2], plan[1::2]):
        first, second = (rank[plan.index(stopped)] for rank in ranks)
        assert first["error"] == second["error"] and "step 2, rank 1: the loss is nan; " in first["error"]
        assert "rank 0" not in first["error"] and len(first["hashes"]) == len(second["hashes"]) == 1
        for rank in ranks:
            found = rank[plan.index(skipping)]
            assert found["error"] == "" and stays(found["hashes"], [2, 3])


class Judged(Numerics):
    """What ``judge`` needs of a trainer."""

    def __init__(self, **args):
        import types

        self.args = types.SimpleNamespace(on_spike="stop", grad_norm_limit=None, process_index=0, **args)
        self.state = types.SimpleNamespace(global_step=6)
        self.sources, self.items_of_update = ["a.json"], [(0, item) for item in range(60)]
        self._base_model = lambda: torch.nn.Linear(1, 1)


def test_fp16_overflow_is_the_scalers_until_it_cannot_go_lower():
    assert not Judged().judge(float("inf"), 2.0**16)
    said = r"step 7, .* is inf at fp16's smallest loss scale, 1; records .* 49 and 10 more"
    with pytest.raises(NumericalFault, match=said):
        Judged().judge(float("inf"), 1.0)


def test_the_broken_weight_is_named():
    trainer, layer = Judged(), torch.nn.Linear(2, 2)
    torch.nn.init.constant_(layer.bias, float("nan"))
    trainer._base_model = lambda: layer
    with pytest.raises(NumericalFault, match="weight bias is not finite") as caught:
        trainer.judge(float("nan"))
    assert caught.value.everywhere and caught.value.exit_code == 6
