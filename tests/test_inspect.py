"""What a directory is: every kind by its own marks, what it lacks, and the command that uses it."""

import json
import shlex
import shutil
import struct

import bombs
import pytest
import torch
from fixtures import golden_source
from launching import run as start
from test_checkpoint import edit_json, save_adapter, save_base

from baichuan_sft import commit
from baichuan_sft.cli import dispatch, run
from baichuan_sft.errors import UserError
from baichuan_sft.export.kinds import Finding, inspect

MARK = {"adapter": "lora"}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A vendor's model, a base with a full vocabulary, and an adapter on that."""
    root = tmp_path_factory.mktemp("kept")
    golden_source(root / "vendor", "baichuan2-7b/a")
    save_adapter(root / "adapter", save_base(root / "base", "baichuan-13b"))
    return root


def test_a_suggested_command_is_safe_to_paste():
    """Names come from a directory that somebody else made."""
    found = Finding("x")
    found.command("chat", "B;$'\\151\\144';A", "MY MODEL", "FILE")
    assert shlex.split(found.use[0]) == ["baichuan-sft", "chat", "B;$'\\151\\144';A", "MY MODEL", "FILE"]
    assert found.use[0].endswith(" 'MY MODEL' FILE")


@pytest.fixture
def copy(kept, tmp_path):
    return lambda name: shutil.copytree(kept / name, tmp_path / name)


def test_a_vendors_model(copy):
    path = copy("vendor")
    found = inspect(path)
    assert found.kind == "model" and found.lacks == []
    facts = found.facts
    assert facts["variant"] == "baichuan2-7b's architecture, 2 x 64"
    assert facts["manifest"].startswith("none") and facts["vocabulary"] == 256 and facts["dtype"] == "float32"
    assert facts["parameters"] == "115,008" and facts["tokenizer"].startswith("unknown")
    assert found.use[0] == f"baichuan-sft chat {path}"
    assert found.use[1].startswith(f"baichuan-sft train --model_name_or_path {path} --data_path FILE")


def test_the_full_size_is_named(copy):
    path = copy("vendor")
    edit_json(path / "config.json", hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)
    edit_json(path / "config.json", num_attention_heads=32, vocab_size=125696)
    found = inspect(path)
    assert "does not fit its configuration" in found.lacks[0]  # the weights are tiny
    assert found.use == []


def test_an_adapter_and_its_base(copy):
    path, base = copy("adapter"), copy("base")
    edit_json(path / "adapter_config.json", base_model_name_or_path=str(base))
    found = inspect(path)
    assert found.kind == "adapter" and found.lacks == [] and found.facts["fits its base"]
    assert found.facts["base"] == str(base) and found.facts["rank"] == 4
    assert found.use == [f"baichuan-sft chat {path}", f"baichuan-sft merge {path} DIR"]
    for name in ("tokenizer.model", "model.safetensors"):
        (base / name).unlink()
        found = inspect(path)
        assert any(name in lack or "no weights" in lack for lack in found.lacks) and found.use == []
    edit_json(path / "adapter_config.json", base_model_name_or_path=str(copy("vendor")))
    found = inspect(path)  # D19: another width
    assert (
        not found.facts["fits its base"] and "tensors of another shape" in found.lacks[0] and found.use == []
    )
    edit_json(path / "adapter_config.json", base_model_name_or_path="/nowhere/Baichuan-13B-Base")
    assert "which is no directory here" in inspect(path).lacks[0]


def test_a_converted_model(copy, tmp_path, capsys):
    out = tmp_path / "out"
    assert dispatch(["convert", str(copy("vendor")), str(out)]) == 0
    found = inspect(out)
    assert found.kind == "converted model" and found.facts["manifest"] == "whole" and found.lacks == []
    with open(out / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"!")  # of 1.0 it is "?"
    found = inspect(out)
    assert found.facts["manifest"] == "broken" and "checksum differs" in found.lacks[0] and found.use == []


def test_a_merged_model(copy, tmp_path):
    path = copy("vendor")
    edit_json(path / "config.json", merged_from=MARK)
    assert inspect(path).kind == "model with an adapter merged in"
    dispatch(["convert", str(path), str(tmp_path / "out")])  # by which it does not become a base again
    assert json.loads((tmp_path / "out" / "config.json").read_text())["merged_from"] == MARK
    assert inspect(tmp_path / "out").kind == "model with an adapter merged in"


@pytest.mark.parametrize(
    "command",
    [
        ["train.py", "--local_rank=0", "--model_name_or_path", "b", "--output_dir", "a b"],
        ["baichuan-sft", "train", "--model_name_or_path", "b", "--resume", "auto", "--output_dir", "a b"],
        [
            "t.py",
            "--model_name_or_path",
            "b",
            "--resume=auto",
            "--output_dir",
            "a b",
            "--overwrite_output_dir",
        ],
    ],
)
def test_a_training_checkpoint(copy, tmp_path, command):
    path = copy("vendor").rename(tmp_path / "checkpoint-40")
    (path / "trainer_state.json").write_text("{}")
    (path / "run.json").write_text(json.dumps({"command": command, "world_size": 8}))
    commit.write_manifest(path, commit.entries_of(path, commit.files_of(path)), step=40)
    commit.commit(path)
    found = inspect(path)
    assert found.kind == "training checkpoint (trained model)"
    assert found.facts["step"] == 40 and found.facts["processes"] == 8
    resume = f"baichuan-sft train --model_name_or_path b --output_dir 'a b' --resume {path}"
    assert found.use[0] == resume and f"baichuan-sft chat {path}" in found.use
    found = inspect(tmp_path)
    assert found.kind == "training run without a result" and found.facts["newest whole"] == "checkpoint-40"
    (path / commit.COMMIT).unlink()
    found = inspect(tmp_path)
    assert found.facts["newest whole"] is None and "incomplete (no COMMIT)" in found.lacks[0]
    assert "incomplete (no COMMIT)" in inspect(path).lacks[0]


def test_raw_zero(copy, tmp_path):
    path = copy("vendor")
    (path / "model.safetensors").unlink()
    (path / "global_step7").mkdir()
    bomb = bombs.files(f"touch {tmp_path}/canary")["reduce"]
    for rank in range(2):
        (path / "global_step7" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").write_bytes(bomb)
    found = inspect(path)
    assert found.kind == "raw ZeRO shards" and found.facts["shards"] == 2
    assert "pickles of DeepSpeed's" in found.lacks[0] and "zero_to_fp32.py" in found.use[0]
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "settings, kind",
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "model quantised by bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, "model quantised by gptq"),
        ({"load_in_4bit": True}, "model quantised by the vendor's own code"),
    ],
)
def test_quantised(settings, kind, copy):
    path = copy("vendor")
    edit_json(path / "config.json", quantization_config=settings)
    found = inspect(path)
    assert found.kind == kind
    assert found.lacks and found.use == []  # of all three: the weights here are whole


def test_gguf(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 291, 25) + bytes(100))
    (tmp_path / "Modelfile").write_text("FROM ./model.gguf\n")
    found = inspect(tmp_path)
    assert found.kind == "gguf" and "GGUF 3, 291 tensors, 25 settings" in found.facts["model.gguf"]
    assert found.use[0].startswith("llama-cli --model") and "ollama create NAME" in found.use[1]
    assert inspect(tmp_path / "model.gguf").facts == found.facts
    (tmp_path / "model.gguf").write_text("<html>not found</html>")
    assert "is an HTML page" in inspect(tmp_path).lacks[0] and inspect(tmp_path).use == []


def test_llama_layout(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 64000})
    )
    found = inspect(tmp_path)  # anyone's
    assert found.kind == "model of type 'llama'" and "of type 'baichuan'" in found.lacks[0]
    commit.write_manifest(
        tmp_path, commit.entries_of(tmp_path, ["config.json"]), converted_to="llama", source="x"
    )
    commit.commit(tmp_path)
    found = inspect(tmp_path)
    assert found.kind == "Baichuan model in Llama's layout"
    assert "no weights in it" in found.lacks[0] and found.use == []
    (tmp_path / "model.safetensors").touch()
    entries = commit.entries_of(tmp_path, ["config.json", "model.safetensors"])
    commit.write_manifest(tmp_path, entries, converted_to="llama", source="x")
    commit.commit(tmp_path)
    found = inspect(tmp_path)
    assert found.lacks == [] and found.use == [f"vllm serve {tmp_path}"]


def test_tokenised_data(tmp_path):
    (tmp_path / "data-00000.arrow").write_bytes(b"x" * 10)
    (tmp_path / "survey.json").write_text("{}")
    found = inspect(tmp_path)
    assert found.kind == "tokenised data" and found.facts["bytes"] == "10"


@pytest.mark.parametrize("spoil", ["config.json", "adapter_config.json"])
def test_settings_that_are_no_json(spoil, tmp_path):
    (tmp_path / spoil).write_text("{")
    assert "not JSON" in inspect(tmp_path).lacks[0]


def test_nothing(tmp_path, capsys):
    assert run(dispatch, ["inspect", str(tmp_path)]) == 4
    assert "nothing" in capsys.readouterr().out
    (tmp_path / "a.txt").write_text("x")
    assert inspect(tmp_path / "a.txt").kind == "nothing"
    with pytest.raises(UserError, match="no such file or directory"):
        inspect(tmp_path / "missing")


def test_what_is_printed(copy, capsys):
    path = copy("vendor")
    edit_json(path / "config.json", vocab_size=300)
    assert run(dispatch, ["inspect", str(path), "--json"]) == 4
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "model" and "of another shape" in found["lacks"][0]
    assert run(dispatch, ["inspect", str(path)]) == 4
    assert "of another shape" in capsys.readouterr().out
    (path / "config.json").write_text('{"model_type": "x\\u001b[31m"}')
    run(dispatch, ["inspect", str(path)])
    assert "\x1b" not in capsys.readouterr().out


def test_weights_are_not_read_by_a_trusting_reader(copy, tmp_path):
    path = copy("vendor")
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(bombs.files(f"touch {tmp_path}/canary")["zip"])
    found = inspect(path)
    assert "asks for posix.system" in found.lacks[0] and not (tmp_path / "canary").exists()
    torch.save({"w": torch.ones(1)}, path / "pytorch_model.bin")
    assert "tensors missing" in inspect(path).lacks[0]


@pytest.mark.slow
def test_the_command(copy):
    done = start(["python", "-m", "baichuan_sft.cli", "inspect", copy("vendor")])
    assert done.returncode == 0 and "baichuan-sft chat" in done.stdout, done.stdout
