"""``baichuan-sft chat`` on models from disk: adapters, options, and what it refuses."""

import io
import json
import subprocess
import sys

import pytest
import torch
from fixtures import ROOT, SMALL_VOCABULARY, tiny_config

from baichuan_sft.checkpoint import load_model, load_tokenizer
from baichuan_sft.errors import EnvironmentFault, UserError
from baichuan_sft.infer.terminal import main
from baichuan_sft.model.modeling_baichuan import BaichuanForCausalLM

HELLO = [{"role": "user", "content": "你好"}]
GREEDY = {"do_sample": False, "max_new_tokens": 8}


def nano(path, seed=0, **config):
    torch.manual_seed(seed)
    model = BaichuanForCausalLM(tiny_config("baichuan2-7b", **config)).eval()
    model.save_pretrained(path)
    load_tokenizer(SMALL_VOCABULARY).save_pretrained(path)
    return model


def add_adapter(base, path, **settings):
    """An adapter that changes every logit, saved the way training saves it."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(base, LoraConfig(r=4, target_modules=["W_pack"], base_model_name_or_path=None))
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    model.save_pretrained(path)
    (path / "generation_config.json").write_text(json.dumps({**GREEDY, **settings}))
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    add_adapter(nano(folder / "base"), folder / "adapter", max_new_tokens=5)
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(folder / "base")
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_chat_reaches_the_base_with_the_adapter_active(models):
    tokenizer = load_tokenizer(models / "adapter")
    model, base = load_model(models / "adapter"), load_model(models / "base")
    answer = model.chat(tokenizer, HELLO)
    merged = load_model(models / "adapter").merge_and_unload()
    assert answer == merged.chat(tokenizer, HELLO, **GREEDY | {"max_new_tokens": 5})
    assert answer != base.chat(tokenizer, HELLO, **GREEDY | {"max_new_tokens": 5})
    assert list(model.chat(tokenizer, HELLO, stream=True))[-1] == answer


def test_the_adapters_generation_settings_are_used(models):
    model = load_model(models / "adapter")
    assert model.generation_config.max_new_tokens == 5
    assert len(list(model.chat(load_tokenizer(models / "adapter"), HELLO, stream=True))) <= 5


def test_main_answers_as_the_model_does(models, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("你好\n"))
    assert main([str(models / "adapter"), "--max_new_tokens", "6", "--greedy", "--no_stream"]) == 0
    out, err = capsys.readouterr()
    answer = load_model(models / "adapter").chat(
        load_tokenizer(models / "adapter"), HELLO, do_sample=False, max_new_tokens=6
    )
    assert out == answer + "\n"
    size = f"{load_model(models / 'base').num_parameters():,}"
    assert f"baichuan2-7b shape, {size} parameters, float32 on cpu, adapter W_pack r=4\n" in err


def test_sampling_is_repeatable(models, monkeypatch, capsys):
    answers = []
    for seed in ("1", "1", "2"):
        monkeypatch.setattr(sys, "stdin", io.StringIO("你好\n"))
        options = ["--temperature", "2", "--top_k", "0", "--max_new_tokens", "8", "--seed", seed]
        assert main([str(models / "base"), *options, "--dtype", "bf16"]) == 0
        out, err = capsys.readouterr()
        assert "bfloat16 on cpu" in err
        answers.append(out)
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--temperature", "0"], "'0' is not a finite number > 0"),
        (["--top_p", "1.5"], "'1.5' is not a number > 0 and <= 1"),
        (["--top_k", "x"], "'x' is not a whole number of at least 0"),
        (["--repetition_penalty", "nan"], "'nan' is not a finite number > 0"),
        (["--max_new_tokens", "0"], "'0' is not a whole number of at least 1"),
        (["--max_new_tokens", "128"], "leaves no room for a question in the model's 128 tokens"),
        (["--greedy", "--top_p", "0.5"], "--greedy and --top_p are both given"),
        (["--temprature", "1"], "unknown flag --temprature, did you mean '--temperature'"),
        (["another"], "unknown argument another"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_wrong_options(models, options, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        main([str(models / "base"), *options])


def test_no_model_and_no_device(models, tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        main([str(tmp_path / "absent")])
    with pytest.raises(UserError, match="arguments are required: DIR"):
        main([])
    with pytest.raises(EnvironmentFault, match="--device quantum: "):
        main([str(models / "base"), "--device", "quantum"])


def test_tokenizer_of_another_generation(tmp_path):
    nano(tmp_path, vocab_size=6000)
    with pytest.raises(UserError, match="embedding has 6000 rows, the tokenizer 6144 pieces"):
        main([str(tmp_path)])


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "baichuan-sft chat out/checkpoint-100 --greedy" in capsys.readouterr().out


def test_options_are_settings_that_set_adds_to(models, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("/set top_k 7\n/set\n/set max_new_tokens 128\n"))
    assert main([str(models / "base"), "--top_p", "0.5", "--max_new_tokens", "4"]) == 0
    err = capsys.readouterr().err
    for line in ("max_new_tokens     4", "top_p              0.5", "top_k              7"):
        assert f"\n{line}\n" in err
    assert "error: --max_new_tokens 128 leaves no room" in err


def test_a_closed_input_is_an_empty_one(models, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert main([str(models / "base")]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_a_pipe_carries_the_answers_alone(models):
    command = [sys.executable, "-m", "baichuan_sft.cli", "chat", str(models / "base"), "--greedy"]
    typed = "你好\n/nothing\nstream\n".encode() + b"\xff\xfe\x00\n" + "再见".encode()
    done = subprocess.run(
        [*command, "--max_new_tokens", "4"], input=typed, capture_output=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0, done.stderr.decode()
    assert b"user>" not in done.stdout
    assert done.stdout.count(b"\n") >= 3
    lines = done.stderr.decode().splitlines()
    assert lines[-2].startswith("error: unknown command '/nothing'")
    assert lines[-1] == "stream off"
    assert "\x1b" not in done.stderr.decode()
