"""int8 and NF4 bases, LoRA on them, and 8-bit optimizers: bitsandbytes on a CPU."""

import json
import sys

import pytest
import torch
from fixtures import ARCHES, ROOT, SMALL_VOCABULARY, tiny_config
from launching import deepspeed, flags, log_of
from safetensors.torch import load_file
from transformers.trainer_optimizer import _BITSANDBYTES_OPTIMIZERS
from transformers.training_args import OptimizerNames

from baichuan_sft import quantization
from baichuan_sft.checkpoint import load_model, load_tokenizer, verify
from baichuan_sft.errors import CheckpointFault, EnvironmentFault, UserError
from baichuan_sft.infer import chat
from baichuan_sft.model.modeling_baichuan import BaichuanForCausalLM
from baichuan_sft.quantization import QUANTIZATIONS, num_elements, weight_bytes
from baichuan_sft.train.adapters import relative_change
from baichuan_sft.train.checks import is_bitsandbytes
from baichuan_sft.train.parse import parse
from baichuan_sft.train.sft import main
from baichuan_sft.variants import LINEARS

sys.path.insert(0, str(ROOT))

from benchmarks.decode import expected_bytes

pytest.importorskip("bitsandbytes")

# Largest error of a weight, of the largest in its block (NF4's widest gap is 0.3, so half of it, and its
# scale has 8 bits) or row (int8: half of 1/127, and fp16's 11 bits).
ROUNDING = {"nf4": 0.16, "int8": 0.0045}
DATA = ROOT / "data" / "belle_chat.json"
STEPS = 12


def save(path, arch="baichuan2-7b", **changes):
    torch.manual_seed(0)
    if "7b" in arch:  # conversations of up to 512 tokens, the default
        changes = {"max_position_embeddings": 512, **changes}
    BaichuanForCausalLM(
        tiny_config(arch, num_attention_heads=8, hidden_size=128, intermediate_size=192, **changes)
    ).save_pretrained(path)
    load_tokenizer(SMALL_VOCABULARY).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    return save(tmp_path_factory.mktemp("nano"))


def dequantized(module):
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(module).float()


# --- loading ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QUANTIZATIONS)
@pytest.mark.parametrize("arch", ARCHES)
def test_the_decoders_linears_are_quantised_and_nothing_else(arch, name, tmp_path):
    save(tmp_path, arch)
    whole = load_model(tmp_path, dtype=torch.bfloat16)
    model = load_model(tmp_path, dtype=torch.bfloat16, quantize=name)
    quantised = 0
    for path, module in whole.named_modules():
        other = model.get_submodule(path)
        if path.rpartition(".")[2] in LINEARS:
            quantised += 1
            assert other.weight.dtype in (torch.int8, torch.uint8)
            assert num_elements(other.weight) == module.weight.numel()
            before, after = module.weight.float(), dequantized(other)
            width = 64 if name == "nf4" else before.shape[1]
            error = (before - after).reshape(-1, width).abs().amax(1) / before.reshape(-1, width).abs().amax(
                1
            )
            assert 0 < error.max() < ROUNDING[name], path
        elif hasattr(module, "weight"):
            assert torch.equal(module.weight, other.weight) and type(module) is type(other), path
    assert quantised == len(LINEARS) * 2
    ids = torch.arange(24)[None] * 50
    with torch.no_grad():
        gap = (model(ids).logits - whole(ids).logits).norm() / whole(ids).logits.norm()
    # Several products in a row in each of two layers, partly averaged out; bf16's 8 bits on top.
    assert 0 < gap < 3 * (ROUNDING[name] + 2**-8)


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_bytes_are_bits_per_weight(nano, name):
    """int8: a byte and 4 per row. NF4: half a byte, 1/64 for its scale, and the scales' own."""
    model = load_model(nano, dtype=torch.bfloat16, quantize=name)
    assert weight_bytes(model) == expected_bytes(model.config, name)
    whole = load_model(nano, dtype=torch.bfloat16)
    assert weight_bytes(whole) == expected_bytes(model.config, "bf16") == 2 * whole.num_parameters()
    linear, numel = model.model.layers[0].self_attn.W_pack, 3 * 128 * 128
    tables = 4 * (16 + 256 + 1)
    by_hand = {"int8": numel + 4 * 3 * 128, "nf4": numel // 2 + numel // 64 + 4 * 3 + tables}  # 768 blocks
    assert weight_bytes(linear) == by_hand[name]
    model(torch.arange(8)[None])  # int8's scales move at the first forward
    assert weight_bytes(linear) == by_hand[name]


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_a_quantised_model_chats(nano, name, capsys):
    model, tokenizer = chat.load(
        chat.build_parser().parse_args([str(nano), "--quantize", name, "--device", "cpu", "--dtype", "bf16"])
    )
    size = f"{load_model(nano).num_parameters():,}"
    assert f"{size} parameters, bfloat16 on cpu, linear layers in {name}" in chat.describe(model)
    answer = model.chat(tokenizer, [{"role": "user", "content": "你好"}], do_sample=False, max_new_tokens=6)
    assert answer


def test_a_damaged_file_is_still_found(nano, tmp_path):
    config = json.loads((nano / "config.json").read_text())
    for file in nano.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(CheckpointFault, match="tensors missing"):
        load_model(tmp_path, quantize="nf4")


def test_without_bitsandbytes(nano, monkeypatch, tmp_path):
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        EnvironmentFault, match=r"quantisation nf4 needs bitsandbytes: pip install 'baichuan-sft\[gpu\]'"
    ):
        load_model(nano, quantize="nf4")
    for words in (["--use_lora", "True", "--quantize", "nf4"], ["--optim", "paged_adamw_8bit"]):
        with pytest.raises(EnvironmentFault, match=f"{words[-2]} {words[-1]} needs bitsandbytes"):
            parse([*required(nano, tmp_path), *words])


def test_an_unknown_name(nano):
    with pytest.raises(UserError, match="unknown quantisation 'nf5', did you mean 'nf4'"):
        load_model(nano, quantize="nf5")


# --- what is refused --------------------------------------------------------------------------------


def required(nano, out):
    return flags(model_name_or_path=nano, data_path=DATA, output_dir=out)


def zero(path, stage, **changes):
    config = json.loads((ROOT / "ds_config.json").read_text())
    of_stage = config["zero_optimization"] if stage == 3 else {"stage": stage}
    path.write_text(
        json.dumps({**config, "zero_optimization": of_stage | changes.pop("zero", {}), **changes})
    )
    return path


QLORA = dict(use_lora=True, quantize="nf4")
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
OWN = {"type": "AdamW", "params": {}}


@pytest.mark.parametrize(
    "options, config, message",
    [
        (dict(quantize="nf4"), None, "--quantize nf4 needs --use_lora True"),
        (QLORA | dict(quantize="fp4"), None, "invalid choice: 'fp4'"),
        (
            QLORA | dict(init_lora_weights="pissa"),
            None,
            "--init_lora_weights pissa takes the base's weights apart",
        ),
        (QLORA, (3, {}), "--quantize nf4 is not possible with ZeRO-3 .*Use ZeRO-2"),
        (
            dict(optim="adamw_8bit"),
            (2, dict(zero=OFFLOAD)),
            "adamw_8bit is not possible with offload_optimizer",
        ),
        (
            dict(optim="adamw_8bit"),
            (2, dict(optimizer=OWN)),
            r"(?s)optimizer.type +\"AdamW\" +--optim adamw_8bit +neither",
        ),
        (dict(load_in_4bit=True), None, "here it is --use_lora True --quantize nf4"),
        (dict(use_qlora=True), None, "here it is --use_lora True --quantize nf4"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_read(nano, tmp_path, options, config, message):
    if config:
        options = options | {"deepspeed": zero(tmp_path / "ds.json", config[0], **config[1])}
    with pytest.raises(UserError, match=message):
        parse([*required(nano, tmp_path / "out"), *flags(**options)])


def test_a_config_file_names_the_flag_too(nano, tmp_path):
    (tmp_path / "run.yaml").write_text("load_in_8bit: true\n")
    with pytest.raises(UserError, match="load_in_8bit'; here it is --use_lora True --quantize int8"):
        parse([*required(nano, tmp_path), "--config", str(tmp_path / "run.yaml")])


def test_the_optimizers_of_bitsandbytes_are_known():
    known = {str(name.value) for name in OptimizerNames}
    assert {name for name in known if is_bitsandbytes(name)} == {
        str(o.value) for o in _BITSANDBYTES_OPTIMIZERS
    }


# --- training ---------------------------------------------------------------------------------------


def options_of(nano, root, name, **options):
    common = dict(
        model_name_or_path=nano,
        data_path=DATA,
        output_dir=root / name,
        cache_dir=root / "cache",
        max_steps=STEPS,
        learning_rate=5e-3,
        save_strategy="no",
        seed=3,
        per_device_train_batch_size=8,
        packing=False,
        train_sampling_strategy="sequential",
    )
    return common | options


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_adapters_learn_on_a_quantised_base(nano, tmp_path, name, capsys):
    """The reload check of the first save, which loads the base quantised again, is passed on the way."""
    options = options_of(nano, tmp_path, "out", use_lora=True, quantize=name, lora_target="all-linear")
    assert main(flags(**options)) == 0
    said = capsys.readouterr().out
    out = tmp_path / "out"
    losses = [row["loss"] for row in log_of(out)]
    assert sum(losses[-3:]) / 3 < sum(losses[:3]) / 3 - 0.1, losses
    verify(out)
    assert json.loads((out / "run.json").read_text())["lora"]["quantize"] == name
    adapter = json.loads((out / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(nano)
    assert {weight.dtype for weight in load_file(out / "adapter_model.safetensors").values()} == {
        torch.float32
    }
    total = sum(p.numel() for p in load_model(out).parameters())
    assert f" of {total:,} (" in said  # two weights of a byte counted as two
    assert f"base: {name}, " in said
    # The adapter on the whole base: close to what was trained, and the change is measured alike.
    whole, quantised = load_model(out), load_model(out, quantize=name)
    ids = torch.arange(24)[None] * 50
    with torch.no_grad():
        gap = (whole(ids).logits - quantised(ids).logits).norm() / whole(ids).logits.norm()
    assert 0 < gap < 3 * ROUNDING[name]
    for module, size in relative_change(whole).items():
        # norms of the base: rounding is uncorrelated with it, so its square adds
        assert relative_change(quantised)[module] == pytest.approx(size, rel=ROUNDING[name] ** 2 + 1e-3)


@pytest.mark.parametrize(
    "variant", [dict(use_dora=True), dict(use_rslora=True, init_lora_weights="gaussian")]
)
def test_variants_of_lora_on_a_quantised_base(nano, tmp_path, variant):
    options = options_of(nano, tmp_path, "out", use_lora=True, quantize="nf4", max_steps=2, **variant)
    assert main(flags(**options)) == 0
    verify(tmp_path / "out")


@pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "paged_adamw_8bit"])
def test_eight_bit_adam_follows_adam(nano, tmp_path, optim, capsys):
    for name, changes in (("whole", {}), ("eight", {"optim": optim})):
        assert main(flags(**options_of(nano, tmp_path, name, learning_rate=1e-3, **changes))) == 0
    assert f"optimizer: {optim}" in capsys.readouterr().out
    assert json.loads((tmp_path / "eight" / "run.json").read_text())["training"]["optim"] == optim
    whole, eight = ([row["loss"] for row in log_of(tmp_path / name)] for name in ("whole", "eight"))
    assert whole != eight
    for a, b in zip(whole, eight, strict=True):
        assert abs(a - b) < 0.02 * a  # states of 8 bits, each off by up to 1 % of its block's largest
    assert eight[-1] < eight[0] - 1


@pytest.fixture(scope="module")
def runs(nano, tmp_path_factory):
    """name -> log: QLoRA and 8-bit AdamW under ZeRO, in one and two processes; two launches in all."""
    root = tmp_path_factory.mktemp("runs")
    qlora = dict(use_lora=True, lora_dropout=0.0, lora_target="all-linear")
    for processes in (1, 2):
        half = dict(per_device_train_batch_size=8 // processes)
        named = {
            f"{kind} zero{stage}": half
            | qlora
            | dict(quantize=kind, deepspeed=zero(root / f"{stage}.json", stage))
            for kind, stage in (("nf4", 0), ("nf4", 2), ("int8", 2))
        }
        named |= {
            f"adam8 zero{stage}": half
            | dict(optim="adamw_bnb_8bit", learning_rate=1e-3, deepspeed=zero(root / f"{stage}.json", stage))
            for stage in (2, 3)
        }
        argvs = [flags(**options_of(nano, root, f"{processes} {name}", **of)) for name, of in named.items()]
        (root / f"runs{processes}.json").write_text(json.dumps(argvs))
        done = deepspeed(ROOT / "tests" / "many_runs.py", root / f"runs{processes}.json", processes=processes)
        assert done.returncode == 0, done.stdout[-4000:]
    return {path.name: log_of(path) for path in root.iterdir() if (path / "run.json").exists()}


@pytest.mark.slow
@pytest.mark.parametrize("kind, stage", [("nf4", 0), ("nf4", 2), ("int8", 2)])
def test_qlora_under_zero_agrees_for_one_and_two_processes(runs, kind, stage):
    one, two = runs[f"1 {kind} zero{stage}"], runs[f"2 {kind} zero{stage}"]
    assert len(one) == len(two) == STEPS
    # NF4 rounds weights only: fp32 sums in another order. int8 rounds activations too, which a last bit tips.
    tolerance = 1e-4 if kind == "nf4" else 2e-3
    for a, b in zip(one, two):
        assert abs(a["loss"] - b["loss"]) < tolerance * a["loss"], (a, b)
    assert two[-1]["loss"] < two[0]["loss"] - 0.1
    assert runs["1 nf4 zero2"][0]["loss"] != runs["1 int8 zero2"][0]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_eight_bit_adam_under_zero(runs, stage):
    """Each process rounds blocks of its own part, so that the counts of processes agree as 8 bits do."""
    one, two = runs[f"1 adam8 zero{stage}"], runs[f"2 adam8 zero{stage}"]
    assert len(one) == len(two) == STEPS
    for a, b in zip(one, two):
        assert abs(a["loss"] - b["loss"]) < 0.02 * a["loss"], (a, b)
    assert two[-1]["loss"] < two[0]["loss"] - 1
