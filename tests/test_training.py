"""The training command: what it leaves, what it refuses, and that no option is accepted and ignored."""

import json
import math
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures import ROOT, SMALL_VOCABULARY, cross_entropy, tiny_config
from launching import deepspeed, error_lines, flags, log_of, run

from baichuan_sft import BaichuanForCausalLM, load_model, load_tokenizer
from baichuan_sft.checkpoint import verify
from baichuan_sft.data.formats import Message
from baichuan_sft.data.template import render
from baichuan_sft.errors import CheckpointFault, NumericalFault, UserError
from baichuan_sft.train.order import RowOrder
from baichuan_sft.train.parse import parse
from baichuan_sft.train.sft import main, training_arguments, use_one_device
from baichuan_sft.train.trainer import SftTrainer

DATA = ROOT / "data" / "belle_chat.json"


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    directory = tmp_path_factory.mktemp("nano")
    torch.manual_seed(0)
    BaichuanForCausalLM(tiny_config("baichuan2-13b")).save_pretrained(directory)
    load_tokenizer(SMALL_VOCABULARY).save_pretrained(directory)
    return directory


@pytest.fixture
def train(nano, tmp_path):
    """Train in this process; returns the output directory."""

    def call(*words, **options):
        values: dict = {
            "model_name_or_path": nano,
            "data_path": DATA,
            "output_dir": tmp_path / "out",
            "cache_dir": tmp_path / "cache",
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "save_strategy": "no",
            "seed": 5,
        }
        values = {name: value for name, value in (values | options).items() if value is not None}
        assert main([*flags(**values), *words]) == 0
        return values["output_dir"]

    return call


# --- what a run leaves ------------------------------------------------------------------------------


def test_full_result_is_complete(train, nano):
    out = train()
    names = {path.name for path in out.iterdir()}
    assert names >= {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "modeling_baichuan.py",
        "run.json",
        "trainer_log.jsonl",
        "loss.png",
    }
    verify(out)
    record = json.loads((out / "run.json").read_text())
    # a build may name its CUDA in one of the two and not in the other
    assert record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert set(record["data_sha256"]) == {str(DATA)}
    assert record["data"]["report"]["used"] == 70
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 195]
    before, after = load_model(nano), load_model(out)
    changed = [n for n, p in after.named_parameters() if not torch.equal(p, before.get_parameter(n))]
    assert len(changed) == len(list(after.named_parameters()))  # the norms and the head too


def test_lora_result_is_an_adapter_on_its_base(train, nano, capsys):
    out = train(use_lora=True)
    said = capsys.readouterr().out
    assert "trained parameters: " in said and "relative change of W_pack" in said
    assert f"baichuan-sft chat {out}" in said.strip().splitlines()[-1]
    verify(out)
    adapter = json.loads((out / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], adapter["lora_dropout"]) == (16, 32, 0.05)
    assert adapter["target_modules"] == ["W_pack"]
    model = load_model(out)
    probe = torch.arange(12)[None]
    with torch.no_grad():
        tuned = model(probe).logits
        with model.disable_adapter():
            assert torch.allclose(model(probe).logits, load_model(nano)(probe).logits, atol=1e-6)
    assert (tuned - load_model(nano)(probe).logits).abs().max() > 1e-4


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"lora_preset": "vendor"}, {"r": 1, "lora_alpha": 32, "lora_dropout": 0.1}),
        ({"lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0}, {"r": 4, "lora_alpha": 8, "lora_dropout": 0}),
        ({"lora_target": "W_pack,o_proj"}, {"target_modules": ["W_pack", "o_proj"]}),
        (
            {"lora_target": "all-linear"},
            {"target_modules": ["W_pack", "down_proj", "gate_proj", "o_proj", "up_proj"]},
        ),
        ({"use_rslora": True}, {"use_rslora": True}),
        ({"use_dora": True}, {"use_dora": True}),
        ({"init_lora_weights": "gaussian"}, {"init_lora_weights": "gaussian"}),
    ],
)
def test_lora_options_reach_the_adapter(train, options, expected):
    config = json.loads((train(use_lora=True, **options) / "adapter_config.json").read_text())
    config["target_modules"].sort()
    assert {name: config[name] for name in expected} == expected


def test_lora_in_bf16_on_a_base_stored_in_fp32(train):
    out = train(use_lora=True, bf16=True)  # its first save passes the reload check
    assert load_model(out).dtype == torch.float32


def test_full_training_in_bf16_without_deepspeed(train, nano):
    out = train(bf16=True)  # fp32 weights under autocast: half-precision logits
    assert load_model(out).dtype == load_model(nano).dtype == torch.float32


@pytest.mark.parametrize("packing", [True, False])
def test_an_epoch_sees_each_record_once(train, monkeypatch, packing):
    seen = []
    compute_loss = SftTrainer.compute_loss

    def keep_items(self, model, inputs, *args, **kwargs):
        seen.extend(inputs["facts"].items)
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(SftTrainer, "compute_loss", keep_items)
    options = dict(max_steps=-1, num_train_epochs=1, per_device_train_batch_size=3, packing_tokens=512)
    rows = log_of(train(packing=packing, **(options if packing else dict(options, packing_tokens=None))))
    assert sorted(seen) == [(0, item) for item in range(70)]
    assert len(rows) == (2 if packing else 24)


def test_greedy_settings_of_the_base_do_not_lose_the_run(train, nano, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(nano, base)
    settings = {"do_sample": False, "temperature": 0.3, "max_new_tokens": 64}
    (base / "generation_config.json").write_text(json.dumps(settings))
    assert (
        json.loads((train(model_name_or_path=base) / "generation_config.json").read_text())["max_new_tokens"]
        == 64
    )


def test_freeze_keeps_what_matches(train, nano):
    out = train(freeze="model.embed_tokens,model.layers.0.*")
    before, after = load_model(nano), load_model(out)
    same = {n for n, p in after.named_parameters() if torch.equal(p, before.get_parameter(n))}
    assert same == {n for n in same if n.startswith(("model.embed_tokens", "model.layers.0."))}
    assert "model.embed_tokens.weight" in same and "model.layers.0.mlp.up_proj.weight" in same


def test_neftune_and_train_on_change_the_run(train, tmp_path):
    plain = train()
    noisy = train(neftune_noise_alpha=20, output_dir=tmp_path / "noisy")
    last = train(train_on="last", output_dir=tmp_path / "last")
    assert log_of(plain)[0]["loss"] != log_of(noisy)[0]["loss"]
    targets = [json.loads((out / "run.json").read_text())["data"]["report"] for out in (plain, last)]
    assert targets[0]["supervised_tokens"] > targets[1]["supervised_tokens"] > 0


def test_log_has_speed_and_padding(train):
    row = log_of(train(packing_tokens=512))[0]
    assert row["tokens_per_second"] > row["targets_per_second"] > 0
    assert 0 < row["padding_share"] < 1
    assert 0.1 < row["peak_gib"] < 64  # of this process, with torch and transformers in it
    assert "mfu" not in row  # nobody said what this CPU could do


def test_mfu_is_of_the_stated_peak(train, nano, capsys, tmp_path):
    """A run of one update: its tokens per second times the FLOPs of one, against 10^10 FLOP/s."""
    options = dict(packing=False, per_device_train_batch_size=70, max_steps=1, attn="sdpa")
    (row,) = log_of(train(peak_tflops=0.01, **options))
    record = json.loads((tmp_path / "out" / "run.json").read_text())["data"]["report"]
    tokenizer, squares = load_tokenizer(SMALL_VOCABULARY), 0
    for one in json.loads(DATA.read_text()):
        roles = {"human": "user", "gpt": "assistant"}
        turns = [Message(roles[turn["from"]], turn["value"]) for turn in one["conversations"]]
        squares += len(render(turns, tokenizer).input_ids) ** 2
    # two layers of width 48 and MLP width 96, vocabulary 6144: 3 passes, 2 FLOPs per weight
    layers = 2 * (4 * 48 * 48 + 3 * 48 * 96)
    head = 6144 * 48 * record["supervised_tokens"] / record["tokens"]
    each = 6 * (layers + head) + 6 * 2 * 48 * squares / record["tokens"]
    assert row["mfu"] == pytest.approx(row["tokens_per_second"] * each / 1e10, rel=1e-6)
    assert f" mfu {row['mfu']:.1%} GiB " in capsys.readouterr().out


def test_packing_says_what_it_does_and_warns_where_one_update_takes_all(train, capsys, monkeypatch):
    train(packing_tokens=600, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    said = capsys.readouterr().out
    assert "packing: 70 conversations in 4 rows of 600 tokens, 83.7 % useful" in said
    assert "% useful; 2 rows per update, 2 updates per epoch" in said and "one update per epoch" not in said
    with monkeypatch.context() as patch:  # the same again comes from the cache
        patch.setattr("baichuan_sft.data.packing.plan", lambda *a, **k: pytest.fail("planned again"))
        train(packing_tokens=600, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    assert "packing: 70 conversations in 4 rows of 600 tokens, 83.7 % useful" in capsys.readouterr().out
    train(packing_tokens=600, per_device_train_batch_size=8)
    assert "all 70 conversations are in one update per epoch, which has room for 8" in capsys.readouterr().out
    train(packing=False)
    assert "packing:" not in capsys.readouterr().out


@pytest.mark.parametrize("words, strategy", [("", "random"), ("--packing False", "group_by_length")])
def test_the_order_of_rows_follows_packing(words, strategy):
    settings = parse([*REQUIRED, *words.split()])
    assert settings.training["train_sampling_strategy"] == strategy


@pytest.mark.parametrize(
    "words, training, evaluation",
    [
        ("", (4096, 1), (4096, 1)),
        ("--per_device_train_batch_size 2 --per_device_eval_batch_size 6", (1024, 1), (1024, 3)),
        ("--per_device_train_batch_size 2 --per_device_eval_batch_size 1", (1024, 1), (512, 1)),
        ("--packing_tokens 512", (512, 8), (512, 8)),
        ("--attn sdpa", (512, 8), (512, 8)),  # its mask grows with the square of a row
        ("--packing False", (None, 8), (None, 8)),
    ],
)
def test_a_packed_micro_batch_is_one_row(words, training, evaluation):
    settings = parse([*REQUIRED, "--dev_ratio", "0.1", *words.split()])
    assert settings.row_shape() == training
    assert settings.row_shape(evaluate=True) == evaluation


class SameUpdates(RowOrder):
    """Single conversations as rows, those of each packed update together."""

    def __init__(self, packed: RowOrder, rows):
        self.__dict__.update(packed.__dict__)
        self.rows = rows

    def updates(self):
        return [np.concatenate([self.rows[row] for row in rows]) for rows in super().updates()]


@pytest.mark.parametrize("lora", [False, True])
def test_packed_and_padded_training_agree(train, monkeypatch, tmp_path, lora):
    """Twelve updates over three epochs on the same conversations each, batches of unequal size."""
    options = dict(max_steps=12, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    options |= dict(use_lora=True, lora_dropout=0) if lora else {}
    orders = []
    make_order = SftTrainer._order

    def keep_order(self, dataset, *args, **kwargs):
        orders.append((make_order(self, dataset, *args, **kwargs), dataset.rows))
        return orders[-1][0]

    monkeypatch.setattr(SftTrainer, "_order", keep_order)
    packed = log_of(train(model_max_length=128, packing_tokens=144, **options))
    ((order, rows),) = orders
    assert order.num_updates == 4 and len(rows) % order.rows_per_update  # the last one has fewer
    monkeypatch.setattr(SftTrainer, "_order", lambda self, *args, **kwargs: SameUpdates(order, rows))
    padded = log_of(train(model_max_length=128, packing=False, output_dir=tmp_path / "padded", **options))
    assert len(packed) == len(padded) == 12
    assert packed[0]["padding_share"] < 0.05 < padded[0]["padding_share"]
    for a, b in zip(packed, padded):
        # fp32 in another order: 1e-6 was measured
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
    assert packed[-1]["loss"] < packed[0]["loss"]


def test_loss_is_the_mean_over_all_targets_of_the_update(train, nano):
    """Against plain cross-entropy over the records of the update, counted by hand."""
    out = train(
        max_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        train_sampling_strategy="sequential",
        packing=False,
    )
    total, count = cross_entropy(load_model(nano), json.loads(DATA.read_text())[:6])
    # fp32 sums in another order
    assert log_of(out)[0]["loss"] == pytest.approx(total / count, abs=1e-5)


def test_resume_goes_on_where_it_stopped(train, tmp_path):
    straight = log_of(train(max_steps=4, save_strategy="steps", save_steps=2))
    (tmp_path / "out" / "checkpoint-4").rename(tmp_path / "elsewhere")
    resumed = log_of(train(max_steps=4, resume_from_checkpoint=True))
    assert [row["step"] for row in resumed] == [1, 2, 3, 4, 3, 4]
    assert [row["loss"] for row in resumed[-2:]] == [row["loss"] for row in straight[-2:]]


def test_config_file_and_flags_win_over_it(train, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("use_lora: true\nlora_rank: 3\nlearning_rate: 1e-5\nwarmup_ratio: 0.0\n")
    adapter = json.loads((train("--config", str(config)) / "adapter_config.json").read_text())
    assert adapter["r"] == 3
    assert log_of(tmp_path / "out")[0]["learning_rate"] == 1e-3  # the flag of the fixture


# --- a number that must not be trained on -----------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"quantize": "nf4"}, "--quantize was None, is nf4"),
        ({"lora_rank": 8}, "--lora_rank was 16, is 8"),
        ({"attn": "sdpa"}, "--packing_tokens 2048 --per_device_train_batch_size 1"),
    ],
)
def test_a_resumed_run_trains_the_same_adapters_on_the_same_rows(train, tmp_path, change, message):
    if "quantize" in change:
        pytest.importorskip("bitsandbytes")
    options = dict(use_lora=True, max_steps=2, save_strategy="steps", save_steps=1)
    train(**options)
    with pytest.raises(UserError, match=message):
        train(**options, resume_from_checkpoint=tmp_path / "out" / "checkpoint-1", **change)


def test_a_loss_that_is_not_finite_stops_with_the_records_named(train, tmp_path):
    broken = tmp_path / "broken"
    torch.manual_seed(0)
    model = BaichuanForCausalLM(tiny_config("baichuan2-7b", max_position_embeddings=512))
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    model.save_pretrained(broken)
    load_tokenizer(SMALL_VOCABULARY).save_pretrained(broken)
    with pytest.raises(NumericalFault, match=r"step 1, rank 0: the loss is nan; records .* 0, 1, 2, 3; w"):
        train(model_name_or_path=broken, train_sampling_strategy="sequential", packing=False)


def test_a_loss_of_zero_over_targets_stops(train, monkeypatch):
    monkeypatch.setattr("baichuan_sft.model.modeling_baichuan.BaichuanHead.forward", _zero_loss)
    with pytest.raises(NumericalFault, match=r"the loss is 0 over \d+ targets"):
        train()


def _zero_loss(self, hidden, labels=None, *args):
    return hidden.sum() * 0


def test_a_model_is_not_written_beside_an_adapter(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    words = [*REQUIRED[: REQUIRED.index("--output_dir")], "--output_dir", str(tmp_path)]
    with pytest.raises(UserError, match="an adapter lies there"):
        parse(words)
    assert parse([*words, "--use_lora", "True"]).lora.use_lora


def test_a_gradient_norm_that_is_not_finite_stops(train, monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda grads: torch.tensor(math.inf))
    with pytest.raises(NumericalFault, match="step 1, rank 0: the gradient norm is inf"):
        train()


def test_a_save_that_is_not_the_model_is_an_error(train, monkeypatch):
    """What a partial ZeRO-3 gather leaves: right names and shapes, wrong numbers."""
    from transformers import Trainer

    def save_other_weights(self, output_dir=None, _internal_call=False):
        kept = self.model.model.norm.weight.detach().clone()
        self.model.model.norm.weight.data.mul_(2)
        original(self, output_dir, _internal_call)
        self.model.model.norm.weight.data.copy_(kept)

    original = Trainer.save_model
    monkeypatch.setattr(Trainer, "save_model", save_other_weights)
    with pytest.raises(CheckpointFault, match="differ from the live ones"):
        train()


# --- refusals ---------------------------------------------------------------------------------------

OUT = Path(tempfile.gettempdir()) / "baichuan-sft-refused"
REQUIRED = flags(model_name_or_path=ROOT / "tests/golden/baichuan-7b/a", data_path=DATA, output_dir=OUT)


def test_one_process_uses_one_of_many_gpus_and_says_so():
    settings = parse([*REQUIRED, "--use_cpu", "True"])
    args = training_arguments(settings)
    args._n_gpu = 4
    notices = []
    assert use_one_device(args, notices).n_gpu == 1
    assert "1 of 4 GPUs is used" in notices[0]


@pytest.mark.parametrize(
    "target, message",
    [
        ("W_pakc", "--lora_target W_pakc: no such module, did you mean 'W_pack'"),
        ("q_proj,W_pack", "--lora_target q_proj: no such module.* Targets: W_pack, o_proj"),
        ("lm_head", "the head computes the loss itself"),
    ],
)
def test_a_missing_lora_target_is_refused_even_where_another_matches(train, target, message):
    with pytest.raises(UserError, match=message):
        train(use_lora=True, lora_target=target)


def test_a_freeze_pattern_that_matches_nothing_is_refused(train):
    with pytest.raises(UserError, match=r"--freeze model\.layer\.0: no parameter of that name"):
        train(freeze="model.layer.0")


# --- real processes ---------------------------------------------------------------------------------

VENDOR_COMMAND = """
    --report_to none --data_path data/belle_chat.json --model_max_length 512
    --num_train_epochs 1 --per_device_train_batch_size 16 --gradient_accumulation_steps 1
    --save_strategy epoch --learning_rate 2e-5 --lr_scheduler_type constant --adam_beta1 0.9
    --adam_beta2 0.98 --adam_epsilon 1e-8 --max_grad_norm 1.0 --weight_decay 1e-4
    --warmup_ratio 0.0 --logging_steps 1 --gradient_checkpointing True
    --deepspeed ds_config.json --bf16 False --tf32 True
""".split()


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_the_vendors_command_from_inside_fine_tune(nano, tmp_path, lora):
    """Baichuan2's README, but for paths, epochs and precision; data_path and deepspeed lie in the root."""
    words = [*VENDOR_COMMAND, *flags(model_name_or_path=nano, output_dir=tmp_path / "output")]
    words += ["--use_lora", "True", "--packing", "False"] if lora else []
    done = deepspeed("fine-tune.py", *words, cwd=ROOT / "fine-tune", BAICHUAN_SFT_CACHE=str(tmp_path))
    assert done.returncode == 0, done.stdout[-4000:]
    assert "--tf32 True is left out" in done.stdout and "--warmup_ratio" in done.stdout
    if lora:
        assert len(log_of(tmp_path / "output")) == 3  # 70 records in batches of 2 x 16
    else:
        assert len(log_of(tmp_path / "output")) == 1
        assert "all 70 conversations are in one update per epoch" in done.stdout
    verify(tmp_path / "output")
    (checkpoint,) = (tmp_path / "output").glob("checkpoint-*")
    verify(checkpoint)
    assert (checkpoint / "run.json").is_file()


@pytest.mark.slow
def test_bad_input_is_one_line_and_exit_code_2(nano, tmp_path):
    other = tmp_path / "llama"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "bad.json").write_text('[{"id": 1, "conversations": [{"from": "human", "value": "a"},}]')
    (tmp_path / "role.json").write_text(
        '[{"conversations": [{"from": "humna", "value": "a"}, {"from": "gpt", "value": "b"}]}]'
    )
    cases = {
        "no such file": {"data_path": "nowhere.json"},
        "bad.json:1:62 item 0: trailing comma": {"data_path": tmp_path / "bad.json"},
        'did you mean "human"': {"data_path": tmp_path / "role.json"},
        "not a Baichuan model": {"model_name_or_path": other},
        "unknown flag --lerning_rate": {"lerning_rate": 1},
    }
    for message, options in cases.items():
        values = {"model_name_or_path": nano, "data_path": DATA, "output_dir": tmp_path / "out", **options}
        done = run([sys.executable, ROOT / "fine-tune" / "fine-tune.py", *flags(**values)])
        assert done.returncode == 2, done.stdout
        (line,) = error_lines(done.stdout)
        assert message in line, line


@pytest.mark.slow
def test_a_fault_in_the_data_ends_all_processes_with_its_one_line(nano, tmp_path):
    record = '{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}'
    bad = tmp_path / "bad.jsonl"
    # long enough that one process still reads while the other has failed
    bad.write_text("\n".join([record] * 50_000 + [record.replace("human", "humna")]))
    done = deepspeed(
        ROOT / "fine-tune" / "fine-tune.py",
        *flags(
            model_name_or_path=nano,
            data_path=bad,
            output_dir=tmp_path / "out",
            deepspeed=ROOT / "ds_config.json",
            cache_dir=tmp_path / "cache",
        ),
    )
    assert done.returncode in (2, 5), done.stdout  # 5: DeepSpeed saw the other rank's end first
    assert len(error_lines(done.stdout)) == 1
    assert "bad.jsonl:50001" in done.stdout and 'did you mean "human"' in done.stdout
