"""Flags and configuration that cannot be meant: one line with value, rule and way out, and the exit code.

The rows are those of the list of bad input for the command line (B1 to B35); each has a case here, or names
the test that has it.
"""

import re
import shlex
import socket
import time

import pytest
import torch
from fixtures import ROOT, SMALL_VOCABULARY, tiny_config
from launching import flags

from baichuan_sft import BaichuanConfig, BaichuanForCausalLM, cli, load_tokenizer
from baichuan_sft.errors import UserError
from baichuan_sft.train import checks
from baichuan_sft.train.parse import parse
from baichuan_sft.train.sft import main

DATA = ROOT / "data" / "belle_chat.json"
LAUNCHED = {
    "WORLD_SIZE": "1",
    "RANK": "0",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories of a RoPE and of an ALiBi model."""
    root = tmp_path_factory.mktemp("models")
    for name in ("baichuan2-7b", "baichuan2-13b"):
        torch.manual_seed(0)
        BaichuanForCausalLM(tiny_config(name)).save_pretrained(root / name)
        load_tokenizer(SMALL_VOCABULARY).save_pretrained(root / name)
    return root


@pytest.fixture
def base(models, tmp_path):
    return dict(
        model_name_or_path=models / "baichuan2-7b",
        data_path=DATA,
        output_dir=tmp_path / "out",
        cache_dir=tmp_path / "cache",
    )


@pytest.fixture
def fails(base, capsys, monkeypatch):
    """The one line and the exit code of a training command, as a user sees them; no model was loaded."""
    monkeypatch.setattr("baichuan_sft.checkpoint.load_model", lambda *a, **k: pytest.fail("loaded a model"))

    def call(*words, **options):
        values = {name: value for name, value in (base | options).items() if value is not None}
        code = cli.run(main, [*flags(**values), *words])
        said = capsys.readouterr().err
        (line,) = [line for line in said.splitlines() if line.startswith("error")]
        assert "Traceback" not in said
        return code, line

    return call


CASES = [
    ("B1", "--learning_rate nan", 2, "--learning_rate is nan; it must be a finite number > 0"),
    ("B2", "--learning_rate -1", 2, "--learning_rate is -1; it must be"),
    ("B2", "--learning_rate inf", 2, "--learning_rate is inf; it must be"),
    ("B3", "--learning_rate 2e-5,", 2, "argument --learning_rate: invalid float value: '2e-5,'"),
    ("B3", "--learning_rate 2e5", 2, "200000, far above .* pass --max_learning_rate 200000 too"),
    ("B4", "--per_device_train_batch_size 0", 2, "--per_device_train_batch_size is 0; it must be .* >= 1"),
    ("B5", "--gradient_accumulation_steps 0", 2, "--gradient_accumulation_steps is 0; it must be .* >= 1"),
    ("B6", "--num_train_epochs -3", 2, "--num_train_epochs is -3"),
    ("B6", "--max_steps -5", 2, "--max_steps is -5; it must be >= 1, or -1"),
    ("B7", "--max_steps 1250 --warmup_steps 1000000000", 2, "--warmup_steps 1e.09 >= 1250, all updates"),
    ("B7", "--num_train_epochs 2 --warmup_steps 10", 2, r"--warmup_steps 10 >= \d+, all updates"),
    ("B7", "--lr_scheduler_type constant --warmup_steps 5", 2, "would do nothing .* constant_with_warmup"),
    ("B9", "--save_steps 0", 2, "--save_steps is 0; it must be a finite number > 0"),
    ("B10", "--seed -1", 2, "--seed is -1"),
    ("B10", "--seed 4294967296", 2, "--seed is 4.29497e.09; it must be"),
    ("B10", "--weight_decay -1", 2, "--weight_decay is -1"),
    ("B10", "--max_grad_norm inf", 2, "--max_grad_norm is inf"),
    ("B10", "--max_grad_norm nan", 2, "--max_grad_norm is nan"),
    ("B12", "--bf16 True --fp16 True", 2, "--bf16 and --fp16 are both True"),
    ("B13", "--lr_scheduler_type cosin", 2, "unknown --lr_scheduler_type 'cosin', did you mean 'cosine'"),
    ("B13", "--optim adamx", 2, "adamx"),
    ("B14", "--learning_rat 1e-5", 2, "unknown flag --learning_rat, did you mean '--learning_rate'"),
    ("B15", "--seed 1 --seed 2", 2, "--seed is given twice, with '1' and '2'"),
    ("B17", "--packing on", 2, "argument --packing: 'on' is neither True nor False"),
    ("B17", "--use_lora maybe", 2, "argument --use_lora: 'maybe' is neither"),
    ("B18", "--output_dir README.md", 2, "--output_dir README.md is a file; name a directory"),
    ("B18", "--output_dir README.md/out", 2, "README.md/out: nothing can be written there: Not a directory"),
    ("B18", "--output_dir /proc/self/task", 2, "/proc/self/task: nothing can be written there"),
    ("B22", "--model_max_length 0", 2, "--model_max_length is 0; it must be"),
    ("B22", "--model_max_length -1", 2, "--model_max_length is -1; it must be"),
    ("B22", "--model_max_length 1000000000", 2, "--model_max_length 1000000000 is beyond the 128 tokens"),
    ("B26", "--use_lora True --lora_rank 0", 2, "--lora_rank is 0; it must be .* >= 1"),
    ("B26", "--use_lora True --lora_alpha nan", 2, "--lora_alpha is nan"),
    ("B26", "--use_lora True --lora_dropout 1.5", 2, "--lora_dropout is 1.5; it must be .* < 1"),
    ("B27", "--load_best_model_at_end True", 2, "_end True needs evaluations: --dev_ratio or --eval_data"),
    ("B33", "--deepspeed no.json", 2, "--deepspeed no.json: no such file"),
    # not in the list
    ("pair", "--lora_rank 8", 2, "--lora_rank is given without --use_lora True"),
    ("pair", "--use_dora True", 2, "--use_dora is given without --use_lora True"),
    ("pair", "--lora_preset vendor", 2, "--lora_preset is given without --use_lora True"),
    ("pair", "--eval_strategy epoch", 2, "--eval_strategy epoch needs --dev_ratio or --eval_data_path"),
    ("pair", "--eval_on_start True", 2, "--eval_on_start True needs --dev_ratio or --eval_data_path"),
    ("pair", "--per_device_eval_batch_size 2", 2, "--per_device_eval_batch_size 2 needs --dev_ratio"),
    ("pair", "--dev_ratio 0.1 --eval_steps 5", 2, "--eval_steps 5 needs --eval_strategy steps"),
    ("pair", "--dev_ratio 0.1 --eval_strategy no", 2, "the held-out data would never be used"),
    (
        "pair",
        "--dev_ratio 0.1 --eval_data_path README.md",
        2,
        "--dev_ratio and --eval_data_path are both given",
    ),
    ("pair", "--packing_tokens 511", 2, "--packing_tokens is 511; it must be >= --model_max_length, 512"),
    ("pair", "--packing False --packing_tokens 512", 2, "--packing_tokens is given with --packing False"),
    ("pair", "--freeze x --use_lora True", 2, "LoRA freezes all weights"),
    ("value", "--dev_ratio 1", 2, "--dev_ratio is 1; it must be a finite number >= 0 and < 1"),
    ("value", "--eval_data_path no.json", 2, "--eval_data_path no.json: no such file"),
    ("value", "--dataloader_drop_last True", 2, "an epoch's last update takes what is left"),
    ("value", "--train_sampling_strategy batch_rebalance", 2, "invalid choice: 'batch_rebalance'"),
    ("value", "--label_smoothing_factor 0.1", 2, "the head computes the loss itself"),
    ("value", "--save_total_limit 0", 2, "--save_total_limit is 0"),
    ("value", "--config no.yaml", 2, "--config no.yaml: no such file"),
    ("value", "--resume_from_checkpoint True", 2, "no .*checkpoint.* in .*out"),
    ("value", "--train_on first", 2, "invalid choice: 'first'"),
]


@pytest.mark.parametrize("words, code, message", [pytest.param(*case, id=row) for row, *case in CASES])
def test_refused_in_one_line(fails, words, code, message):
    options = {name: None for name in ("output_dir",) if f"--{name}" in words}
    length = {} if "model_max_length" in words or "packing_tokens" in words else {"model_max_length": 48}
    given, line = fails(*words.split(), **options, **length)
    assert given == code, line
    assert re.search(message, line), line


# Rows of the list whose test stands elsewhere: file::function.
ELSEWHERE = {
    "B8": "test_flags::test_what_a_cpu_cannot_honour_is_said_or_refused",
    "B11": "test_flags::test_b11_precision_follows_the_gpu_unless_given",
    "B16": "test_flags::test_b16_a_fault_in_a_config_file_has_a_place",
    "B19": "test_resume::test_another_run_is_refused_with_what_differs",
    "B20": "test_saving::test_a_second_run_is_refused_at_once_and_the_first_unharmed",
    "B21": "test_flags::test_b21_a_hub_id_is_refused_at_once_and_without_a_network",
    "B23": "test_training::test_a_missing_lora_target_is_refused_even_where_another_matches",
    "B24": "test_training::test_bad_input_is_one_line_and_exit_code_2",
    "B25": "test_training::test_a_missing_lora_target_is_refused_even_where_another_matches",
    "B27": "test_quantization::test_what_cannot_work_is_refused_before_anything_is_read",
    "B28": "test_zero_config::test_b28_json_faults_have_a_place_and_their_line",
    "B29": "test_zero_config::test_b29_both_given_and_different_is_one_table",
    "B30": "test_zero_config::test_b30_the_file_as_it_was_used_lies_beside_the_result",
    "B31": "test_zero_config::test_b31_the_batch_is_a_product",
    "B32": "test_zero_config::test_each_wrong_key_is_one_line",
    "B33": "test_zero_config::test_each_wrong_key_is_one_line",
    "B34": "test_zero_config::test_each_wrong_key_is_one_line",
    "B35": "test_flags::test_b35_the_environment_of_a_launch",
}


def test_every_row_of_the_list_has_a_test():
    assert {row for row, *_ in CASES if row[0] == "B"} | ELSEWHERE.keys() == {f"B{i}" for i in range(1, 36)}
    for place in ELSEWHERE.values():
        file, _, function = place.partition("::")
        source = (ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8")
        assert not function or f"\ndef {function}(" in source, place


# --- what is meant, and what is said ----------------------------------------------------------------


def words_of(base, *words):
    return [*flags(**base), *words]


def test_what_looks_like_a_slip_can_be_meant(base):
    settings = parse(words_of(base, *"--learning_rate 0.5 --max_learning_rate 1".split()))
    assert settings.training["learning_rate"] == 0.5
    assert parse(words_of(base, "--max_steps", "-1")).training["max_steps"] == -1
    settings = parse(words_of(base, "--max_grad_norm", "0"))
    assert "max_grad_norm 0: gradients are not clipped" in settings.notices
    settings = parse(words_of(base, *"--max_steps 10 --warmup_steps 9".split()))
    assert settings.training["warmup_steps"] == 9


@pytest.mark.parametrize(
    "word, value", [("yes", True), ("T", True), ("1", True), ("No", False), ("f", False)]
)
def test_b17_the_booleans_of_the_help(base, word, value):
    assert parse(words_of(base, "--packing", word)).data.packing is value


def test_b22_alibi_warns_beyond_its_training(models, base, capsys):
    config = BaichuanConfig.from_pretrained(models / "baichuan2-13b")
    assert checks.check_length(config, config.model_max_length) is None
    assert "ALiBi goes on from there, untrained" in checks.check_length(config, config.model_max_length + 1)


def test_b21_a_hub_id_is_refused_at_once_and_without_a_network(fails, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *a: pytest.fail("asked a network"))
    begin = time.monotonic()
    code, line = fails(model_name_or_path="baichuan-inc/Baichuan2-7B-Base")
    assert time.monotonic() - begin < 10  # at once, on a busy machine too
    assert code == 2 and "baichuan-inc/Baichuan2-7B-Base: no such directory" in line


def test_an_output_directory_is_needed(fails):
    assert fails(output_dir=None) == (2, "error: --output_dir is missing: where shall the result go?")


def test_a_result_never_overwrites_a_model_that_was_not_trained_here(fails, models, tmp_path):
    base, link = models / "baichuan2-7b", tmp_path / "link"
    link.symlink_to(base)
    before = (base / "model.safetensors").read_bytes()
    for out in (base, link):
        code, line = fails(output_dir=out)
        assert code == 2 and "overwrite the base" in line
    for name in ("model-00001-of-00002.safetensors", "pytorch_model.bin"):
        other = tmp_path / name[:5]
        other.mkdir()
        (other / name).write_bytes(b"weights")
        code, line = fails(output_dir=other)
        assert code == 2 and f"holds a model of another origin ({name}, no run.json)" in line
    (other / "manifest.json").write_text("{}")  # as a run leaves it that is killed while it saves its result
    checks.require_no_model_lost(str(base), str(other))
    assert (base / "model.safetensors").read_bytes() == before


def test_the_demos_flags_are_accepted(base, tmp_path, monkeypatch):
    """`make demo` itself takes minutes; no check of flags may refuse what it asks for."""
    monkeypatch.chdir(ROOT)
    script = (ROOT / "scripts" / "demo.sh").read_text().replace("\\\n", " ")
    commands = [line.split("fine-tune.py")[1] for line in script.splitlines() if "fine-tune.py" in line]
    assert len(commands) == 2
    for command in commands:
        words = shlex.split(command)
        for flag in ("model_name_or_path", "output_dir"):
            words[words.index(f"--{flag}") + 1] = str(base[flag])
        parse([*words, "--use_cpu", "True"])


def test_a_mistyped_model_leaves_no_output_directory(fails, tmp_path):
    assert fails(model_name_or_path=tmp_path / "modle")[0] == 2 and not (tmp_path / "out").exists()


def test_missing_paths_name_where_was_looked(fails):
    assert re.search(r"--data_path no\.json: no such file in .*\w", fails(data_path="no.json")[1])


# --- the machine ------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a GPU")
def test_what_a_cpu_cannot_honour_is_said_or_refused(base, fails):
    settings = parse(words_of(base, *"--tf32 True --warmup_ratio 0.1 --logging_dir x".split()))
    assert settings.training["tf32"] is None
    assert settings.training["warmup_steps"] == 0.1
    assert [notice.split(" ")[0] for notice in settings.notices] == [
        "--warmup_ratio",
        "--logging_dir",
        "--tf32",
        "learning_rate",
    ]
    code, line = fails("--fp16", "True")
    assert code == 3 and "CPU trains in bfloat16 or fp32 only" in line


def test_b11_precision_follows_the_gpu_unless_given(base, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    settings = parse(words_of(base))
    assert settings.training["bf16"] is True and any("bf16 True" in line for line in settings.notices)
    assert parse(words_of(base, "--bf16", "False")).training["bf16"] is False
    assert parse(words_of(base, "--fp16", "True")).training["bf16"] is False
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 0))
    assert parse(words_of(base)).training["bf16"] is False
    with pytest.raises(UserError, match=r"a GPU \(7\.0\) has no bfloat16; use --fp16 True") as refused:
        parse(words_of(base, "--bf16", "True"))
    assert refused.value.exit_code == 3


@pytest.mark.parametrize(
    "change, message",
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE in the environment is 'abc', no whole number"),
        ({"MASTER_PORT": "29500x"}, "MASTER_PORT in the environment is '29500x'"),
        ({"LOCAL_RANK": None}, "RANK is in the environment, LOCAL_RANK not; start through"),
        ({"LOCAL_RANK": None, "MASTER_PORT": None}, "LOCAL_RANK, MASTER_PORT not"),
        (
            {"RANK": None, "LOCAL_RANK": None, "WORLD_SIZE": "4"},
            "WORLD_SIZE is in the environment, RANK, LOCAL",
        ),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK 2 is not below WORLD_SIZE 2"),
        (
            {"CUDA_VISIBLE_DEVICES": ""},
            "CUDA_VISIBLE_DEVICES is '', of which 0 are there; the host has 4 GPUs",
        ),
        ({"CUDA_VISIBLE_DEVICES": "7"}, "CUDA_VISIBLE_DEVICES is '7', of which 0 are there"),
        ({"LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": None}, "LOCAL_RANK is 0, and torch sees 0 of 4 GPUs"),
    ],
)
def test_b35_the_environment_of_a_launch(fails, monkeypatch, change, message):
    monkeypatch.setattr(checks, "gpus_of_host", lambda: 4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for name, value in (LAUNCHED | change).items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    code, line = fails()
    assert code == 3 and message in line, line


def test_b35_what_launchers_set_on_a_host_without_a_gpu_is_no_fault(base, monkeypatch):
    monkeypatch.setattr(checks, "gpus_of_host", lambda: 0)
    for name, value in (LAUNCHED | {"CUDA_VISIBLE_DEVICES": "0,1"}).items():
        monkeypatch.setenv(name, value)
    assert parse(words_of(base))


# --- config files -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "seed: 1\nlearning_rat: 1e-5",
            "run.yaml:2:1: unknown key 'learning_rat', did you mean '--learning_rate'",
        ),
        (
            "seed: 1\nload_in_4bit: true",
            "run.yaml:2:1: unknown key 'load_in_4bit'; here it is --use_lora True",
        ),
        ("seed: 1\nlora_rank: 2\nseed: 2", "run.yaml:3:1: seed is given twice, first at .*run.yaml:1:1"),
        ("warmup_ratio: 0\nwarmup_steps: 1", "run.yaml:2:1: warmup_steps is given twice, first at .*:1:1"),
        ("seed: 1\n\tlora_rank: 2", r"run.yaml:2:1: not YAML: .*'\\t'.* Indent with blanks, not tabs"),
        ("a: [1", "run.yaml:1:6: not YAML"),
        ('{"seed": 1,\n "seed": 2}', "run.yaml:2:2: seed is given twice"),
        ("- 1", "run.yaml: expected flags as keys, got a list"),
        ("seed", "run.yaml: expected flags as keys, got a text"),
        ("", "run.yaml: expected flags as keys, got an empty file"),
        ("lora_rank: {a: 1}", "run.yaml:1:1: lora_rank is a dict; expected one value"),
        ("config: x.yaml", "run.yaml:1:1: a config file cannot name another one"),
        (
            "seed: 1\nlearning_rate: 1e-5x",
            "run.yaml:2:1: argument --learning_rate: invalid float value: '1e-5x'",
        ),
        ("seed: 1\n\nlearning_rate: -1", "run.yaml:3:1: --learning_rate is -1; it must be"),
        ("packing: on", "run.yaml:1:1: argument --packing: 'on' is neither True nor False"),
        ("bf16: true\nfp16: true", "run.yaml:1:1: --bf16 and --fp16 are both True"),
    ],
)
def test_b16_a_fault_in_a_config_file_has_a_place(fails, tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    code, line = fails("--config", str(path))
    assert code == 2 and re.search(message, line), line


def test_b16_values_are_read_as_on_the_command_line(base, tmp_path):
    """YAML 1.1 has 1e-5 for a text, 010 for 8, 1:30 for 90 and 1_000 for 1000."""
    path = tmp_path / "run.yaml"
    path.write_text("learning_rate: 1e-5\nseed: 010\nuse_lora: 1\nlora_alpha:\nweight_decay: 1.e-3\n")
    settings = parse(words_of(base, "--config", str(path), "--weight_decay", "0.5"))
    assert settings.training["learning_rate"] == 1e-5
    assert settings.training["seed"] == 10
    assert settings.lora.use_lora and settings.lora.lora_alpha == 32
    assert settings.training["weight_decay"] == 0.5  # flags win
    path.write_text("seed: 1:30\n")
    with pytest.raises(UserError, match="invalid int value: '1:30'"):
        parse(words_of(base, "--config", str(path)))


def test_a_fault_of_a_flag_that_wins_is_not_the_files(base, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("learning_rate: 1e-5\n")
    with pytest.raises(UserError, match=r"^--learning_rate is -1"):
        parse(words_of(base, "--config", str(path), "--learning_rate", "-1"))
