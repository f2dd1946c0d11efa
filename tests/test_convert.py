"""A converted model is the source; one that is not what it claims is one clear line; nothing of it is run.

Which test has which row of the catalogue of bad checkpoints:

    D1 D2 D3 D24 D25 D26   test_resume.py, test_checkpointing.py, test_resume_ranks.py
    D4 D7 D8 D10 D11 D12   here, CATALOGUE; of loading: test_checkpoint.py
    D5 D6                  here, test_a_flipped_bit; of checkpoints: test_commit.py
    D9                     here, test_no_bomb_goes_off
    D13 D14 D15 D16        here, CATALOGUE
    D17                    here, test_code_in_the_source_is_left_alone
    D18                    here, CATALOGUE
    D19 D20 D21 D22        test_checkpoint.py, of adapters; test_inspect.py
    D23                    test_merge.py
    D27                    here, test_a_folded_head_is_seen
    D28                    here, CATALOGUE
"""

import copyreg
import io
import json
import os
import pickle
import shutil

import bombs
import pytest
import torch
from fixtures import ARCHES, SHARED, VOCABULARIES, golden_source, needs_shared
from launching import run
from safetensors.torch import load_file, save_file
from test_checkpoint import BLOCK, as_pickle, edit_json, run_python

from baichuan_sft import commit
from baichuan_sft.checkpoint import load_model, load_tokenizer
from baichuan_sft.cli import dispatch
from baichuan_sft.cli import run as guarded
from baichuan_sft.errors import CheckpointFault, EnvironmentFault, UserError
from baichuan_sft.export.source import fold_head, open_source
from baichuan_sft.export.writer import Writer

IDS = torch.arange(5, 45).view(2, 20)


def logits_of(path, **options):
    with torch.no_grad():
        return load_model(path, **options)(input_ids=IDS).logits


def convert(source, out, *words):
    assert dispatch(["convert", str(source), str(out), *map(str, words)]) == 0
    return out


@pytest.fixture(scope="module", params=ARCHES)
def vendor(request, tmp_path_factory):
    """A tiny model of the vendor's, of each architecture, and its logits."""
    path = golden_source(tmp_path_factory.mktemp("vendor") / request.param, f"{request.param}/a")
    return path, logits_of(path)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return golden_source(tmp_path_factory.mktemp("kept") / "source", "baichuan2-13b/a")


@pytest.fixture
def source(kept, tmp_path):
    """A Baichuan2-13B of the vendor's to be spoilt."""
    return shutil.copytree(kept, tmp_path / "source")


# --- what comes out -------------------------------------------------------------------------------


def test_same_logits(vendor, tmp_path, capsys):
    path, expected = vendor
    out = convert(path, tmp_path / "out")
    assert torch.equal(logits_of(out), expected)
    assert "nothing is lost" in capsys.readouterr().out
    assert commit.problems(out) == []
    config = json.loads((out / "config.json").read_text())
    assert "golden_arch" not in config and config["architectures"] == ["BaichuanForCausalLM"]
    assert json.loads((out / "generation_config.json").read_text())["repetition_penalty"] == 1.05
    tokenizer = load_tokenizer(out)
    assert tokenizer.chat_template == tokenizer.default_chat_template
    again = convert(out, tmp_path / "again")
    assert torch.equal(logits_of(again), expected)
    # fp32 as bf16: each weight to within 2**-8 of its size, as the report says
    narrow = convert(path, tmp_path / "narrow", "--dtype", "bf16")
    assert "rounded to bf16, each by up to 0.004" in capsys.readouterr().out
    assert {t.dtype for t in load_model(narrow).state_dict().values()} == {torch.bfloat16}


def test_folded_head(vendor, tmp_path, capsys):
    path, expected = vendor
    words = ["convert", str(path), str(tmp_path / "out"), "--to", "baichuan1"]
    if "baichuan2" not in path.name:
        assert guarded(dispatch, words) == 2
        assert "has a plain head already" in capsys.readouterr().err and not (tmp_path / "out").exists()
        return
    assert dispatch(words) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["lm_head"] == "plain" and "z_loss_weight" not in config
    norms = load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"].norm(dim=1)
    assert torch.allclose(norms, torch.ones(()), atol=1e-6)  # fp32: eps 1.2e-7, over 64 elements
    # The same products, divided before the sum instead of after it: fp32 rounding of 64 terms.
    assert torch.allclose(logits_of(tmp_path / "out"), expected, rtol=0, atol=2e-5)
    assert "lengths are lost" in capsys.readouterr().out


def test_head_is_folded_in_fp32():
    weight = torch.randn(70, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight[3] = 0
    exact = weight.double() / weight.double().norm(dim=1, keepdim=True).clamp_min(1e-12)
    # once rounded: half a bf16 step of a number below 1
    assert (fold_head(weight).double() - exact).abs().max() <= 2**-9
    assert (fold_head(weight, torch.float32).double() - exact).abs().max() <= 2**-23
    assert not fold_head(weight)[3].any()


def shards_of(path, suffix, save):
    """Its weights in two files and an index."""
    state = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    index = {}
    for number in (1, 2):
        name = f"{stem}-0000{number}-of-00002.{suffix}"
        names = sorted(state)[number - 1 :: 2]
        save({key: state[key] for key in names}, path / name)
        index |= dict.fromkeys(names, name)
    (path / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


CONTAINERS = {
    "bin": lambda path: as_pickle(path, load_file(path / "model.safetensors")),
    "bin before torch 1.6": lambda path: torch.save(
        load_file(path / "model.safetensors"),
        path / "pytorch_model.bin",
        _use_new_zipfile_serialization=(path / "model.safetensors").unlink(),
    ),
    "bin shards": lambda path: shards_of(path, "bin", torch.save),
    "pth shards": lambda path: shards_of(path, "pth", torch.save),
    "safetensors shards": lambda path: shards_of(path, "safetensors", save_file),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_any_container(container, source, tmp_path):
    expected = logits_of(source)
    CONTAINERS[container](source)
    if container == "pth shards":  # a third party's, named by the index alone
        (source / "pytorch_model.pth.index.json").rename(source / "pytorch_model.bin.index.json")
    out = convert(source, tmp_path / "out", "--max_shard_gib", 1e-4)
    shards = sorted(out.glob("model-*-of-*.safetensors"))
    assert len(shards) > 2 and not list(out.glob("*.bin")) and commit.problems(out) == []
    # a tensor larger than the limit has a file of its own
    assert all(path.stat().st_size < 1e-4 * 2**30 + 4096 or len(load_file(path)) == 1 for path in shards)
    assert torch.equal(logits_of(out), expected)


def test_odd_spellings(source, tmp_path):
    """What third parties' uploads say of themselves."""
    expected = logits_of(source)
    edit_json(
        source / "config.json",
        architectures=["BaiChuanForCausalLM"],
        auto_map={"AutoModelForCausalLM": "someone/else--modeling_baichuan.BaiChuanForCausalLM"},
        tokenizer_class="BaiChuanTokenizer",
        gradient_checkpointing=[False],
        torch_dtype="float32",
        _name_or_path="/home/someone",
    )
    settings = {"tokenizer_class": "BaiChuanTokenizer", "chat_template": "{{ cycler.__init__.__globals__ }}"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    out = convert(source, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_baichuan.BaichuanForCausalLM"
    assert not {"_name_or_path", "gradient_checkpointing"} & config.keys()
    assert "__globals__" not in "".join(file.read_text() for file in out.glob("*j*on*"))
    assert "__globals__" not in (out / "chat_template.jinja").read_text()
    assert torch.equal(logits_of(out), expected)


@pytest.mark.parametrize("name", ["Baichuan-13B-Chat", "Baichuan2-13B-Chat"])
@needs_shared
def test_settings_of_the_vendor_survive(name, source, tmp_path):
    vendor = SHARED / "reference" / "vendor-configs" / name
    shutil.copy(vendor / "generation_config.json", source)
    shutil.copy(vendor / "tokenizer_config.json", source)
    out = convert(source, tmp_path / "out")
    before, after = (json.loads((d / "generation_config.json").read_text()) for d in (vendor, out))
    assert after == before


@pytest.mark.slow
def test_loads_in_a_clean_process_without_the_package(source, tmp_path):
    out = convert(source, tmp_path / "out")
    torch.save(logits_of(source), tmp_path / "expected.pt")
    code = BLOCK.format(blocked=["baichuan_sft", "peft", "deepspeed", "google", "datasets", "accelerate"])
    code += (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig\n"
        "path, expected = sys.argv[1:]\n"
        "model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()\n"
        "with torch.no_grad():\n"
        "    logits = model(input_ids=torch.arange(5, 45).view(2, 20)).logits\n"
        "assert torch.equal(logits, torch.load(expected)), 'other logits'\n"
        "assert AutoTokenizer.from_pretrained(path, trust_remote_code=True).user_token_id == 195\n"
        "assert GenerationConfig.from_pretrained(path).repetition_penalty == 1.05\n"
    )
    run_python(code, tmp_path, out, tmp_path / "expected.pt", package=False)


# --- what does not go in --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def go_off(tmp_path_factory):
    """The bombs by name, and the file that any of them would make."""
    canary = tmp_path_factory.mktemp("canary") / "canary"
    return bombs.files(f"touch {canary}"), canary


BOMBS = sorted(bombs.files(""))


def test_there_are_enough_and_they_would_go_off(go_off):
    made, canary = go_off
    assert len(made) >= 30

    class Trusting(pickle.Unpickler):
        def persistent_load(self, pid):
            return pid

    copyreg.add_extension("posix", "system", bombs.EXTENSION)
    try:
        for name in bombs.raw(""):
            assert not canary.exists()
            result = Trusting(io.BytesIO(made[name])).load()
            if hasattr(result, "read"):
                result.read()  # popen: until it has run
            assert canary.exists(), name
            canary.unlink()
    finally:
        copyreg.remove_extension("posix", "system", bombs.EXTENSION)


@pytest.mark.parametrize("suffix", ["bin", "pth", "pt"])
def test_no_bomb_goes_off(suffix, go_off, source, tmp_path, capsys):
    made, canary = go_off
    (source / "model.safetensors").unlink()
    file = source / f"pytorch_model.{suffix}"
    if suffix != "bin":
        index = {"weight_map": {"lm_head.weight": file.name}}
        (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    named = 0
    copyreg.add_extension("posix", "system", bombs.EXTENSION)  # at its worst: the code is known
    try:
        for name in BOMBS:
            file.write_bytes(made[name])
            code = guarded(dispatch, ["convert", str(source), str(tmp_path / "out")])
            error = capsys.readouterr().err
            assert not canary.exists(), name
            assert code == 4 and file.name in error and "Traceback" not in error, (name, error)
            assert "weights_only" not in error, (name, error)  # torch advises to turn it off
            assert not (tmp_path / "out").exists()
            named += "it asks for" in error
    finally:
        copyreg.remove_extension("posix", "system", bombs.EXTENSION)
    assert named >= 20  # the others are refused by their form


def test_code_in_the_source_is_left_alone(go_off, source, tmp_path):
    made, canary = go_off
    for name in ("training_args.bin", "rng_state.pth", "optimizer.pt", "scheduler.pt"):
        (source / name).write_bytes(made["reduce"])
    (source / "modeling_baichuan.py").write_text(f"open({str(canary)!r}, 'w')\n")
    edit_json(source / "config.json", auto_map={"AutoModelForCausalLM": "modeling_baichuan.Other"})
    out = convert(source, tmp_path / "out")
    assert not canary.exists()
    assert "canary" not in (out / "modeling_baichuan.py").read_text()
    assert not list(out.glob("*.p[ty]*h")) and not list(out.glob("*.bin"))


def state(change):
    def spoil(path):
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})

    return spoil


def config(**changes):
    return lambda path: edit_json(path / "config.json", **changes)


def put(name, content):
    return lambda path: (path / name).write_bytes(content)


def shorten(path):
    os.truncate(path / "model.safetensors", 100_000)


def index(shard):
    def spoil(path):
        (path / "model.safetensors").unlink()
        weight_map = {"weight_map": {"lm_head.weight": shard}}
        (path / "model.safetensors.index.json").write_text(json.dumps(weight_map))

    return spoil


def poison(name, value):
    return state(lambda tensors: tensors[name].view(-1)[5:7].fill_(value))


def vocabulary(name):
    return lambda path: shutil.copy(VOCABULARIES[name], path / "tokenizer.model")


def drop_norm(tensors):
    del tensors["model.norm.weight"]


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 26529802240\n"
HTML = b"<!DOCTYPE html><html>401</html>"
GATE = "model.layers.1.mlp.gate_proj.weight"
# row and case -> (what is done, exit code, words)
CATALOGUE = {
    "D4 truncated": (shorten, 4, "model.safetensors: not a whole file"),
    "D7 pointer": (put("model.safetensors", LFS), 4, "is a Git LFS pointer; run `git lfs pull`"),
    "D7 pointer for the tokenizer": (put("tokenizer.model", LFS), 4, "tokenizer.model: is a Git LFS pointer"),
    "D8 page": (put("model.safetensors", HTML), 4, "is an HTML page"),
    "D10 shard missing": (index("model-1.safetensors"), 4, "model-1.safetensors: no such file"),
    "D10 shard outside": (index("../../etc/x"), 4, "names '../../etc/x', which is no file beside it"),
    "D10 shard below": (index("a/model.safetensors"), 4, "which is no file beside it"),
    "D10 shard of Windows": (index("..\\x"), 4, "which is no file beside it"),
    "D11 missing": (state(drop_norm), 4, "1 tensors missing, e.g. model.norm.weight"),
    "D11 more layers": (config(num_hidden_layers=3), 4, "7 tensors missing, e.g. model.layers.2."),
    "D12 fewer layers": (config(num_hidden_layers=1), 4, "7 tensors that do not belong, e.g. model.layers.1"),
    "D13 rows": (config(vocab_size=64000, lm_head="norm"), 4, "lm_head.weight (256, 64), expected (64000"),
    "D14 tokenizer is larger": (vocabulary("baichuan2_like"), 2, "has 256 rows, the tokenizer 6144 pieces"),
    "D15 no vocabulary": (put("tokenizer.model", b"{}"), 2, "its tokenizer cannot be used"),
    "D16 NaN": (poison(GATE, float("nan")), 4, f"{GATE} holds 2 of"),
    "D16 Inf": (poison("lm_head.weight", float("inf")), 4, "lm_head.weight holds 2 of"),
    "D16 integers": (
        state(lambda tensors: tensors.update({GATE: tensors[GATE].to(torch.int8)})),
        4,
        f"{GATE} is int8, expected one of bfloat16, float16, float32",
    ),
    "deep configuration": (put("config.json", b"[" * 100_000), 2, "config.json: not JSON"),
    "D18 code": (config(text_config={"trust_remote_code": True}), 2, "could make transformers run code"),
    "D28 packed, said": (config(quantization_config={"bits": 4}), 2, "quantised"),
    "D28 packed, unsaid": (
        state(lambda tensors: tensors.update({GATE.replace("weight", "scale"): torch.ones(3)})),
        2,
        "its weights are quantised",
    ),
    "another family": (config(model_type="llama"), 2, "not a Baichuan model"),
    "no tokenizer": (lambda path: (path / "tokenizer.model").unlink(), 2, "no tokenizer.model in it"),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), 4, "no weights in it"),
}


@pytest.mark.parametrize("case", CATALOGUE)
def test_catalogue(case, source, tmp_path, capsys):
    spoil, code, words = CATALOGUE[case]
    spoil(source)
    assert guarded(dispatch, ["convert", str(source), str(tmp_path / "out")]) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and words in lines[0] and str(source) in lines[0], lines
    assert not (tmp_path / "out").exists()


def test_two_names_of_one_weight(source, tmp_path):
    """A head tied to the embeddings, as torch.save leaves it: one storage."""
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    (source / "model.safetensors").unlink()
    torch.save(tensors, source / "pytorch_model.bin")
    assert guarded(dispatch, ["convert", str(source), str(tmp_path / "out")]) == 0
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["lm_head.weight"], tensors["model.embed_tokens.weight"])


@needs_shared
def test_tokenizer_of_the_other_generation(source):
    """D15: 64,000 pieces for 125,696 rows, the other way round than D14."""
    edit_json(source / "config.json", vocab_size=125696)
    wide = torch.zeros(125696, 64)
    state(lambda t: t.update({"lm_head.weight": wide + 0.1, "model.embed_tokens.weight": wide}))(source)
    vocabulary("baichuan1")(source)
    with pytest.raises(UserError, match="125696 rows, the tokenizer only 64000 pieces: weights of Baichuan2"):
        open_source(source)
    vocabulary("baichuan2")(source)
    assert open_source(source).notes == []  # the vendor's, known by its hash


def test_an_unknown_tokenizer_is_noted(source):
    """D15: of the right form, yet not the vendor's."""
    assert any("neither of the vendor's two" in note for note in open_source(source).notes)


def test_a_folded_head_is_seen(source, tmp_path, capsys):
    """D27: normalising twice changes no logit beyond rounding, but someone may want to know."""
    expected = logits_of(source)
    state(lambda t: t.update({"lm_head.weight": fold_head(t["lm_head.weight"])}))(source)
    out = convert(source, tmp_path / "out")
    assert "its rows have length 1 already" in capsys.readouterr().out
    assert torch.allclose(logits_of(out), expected, rtol=0, atol=2e-5)  # as in test_folded_head
    assert "length 1" not in "".join(open_source(convert(source, tmp_path / "b", "--to", "baichuan1")).notes)


def test_a_flipped_bit(source, tmp_path):
    """D5, D6: seen where there is a manifest; a file that never had one looks whole."""
    out = convert(source, tmp_path / "out")
    with open(out / "model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(CheckpointFault, match=r"model\.safetensors: checksum differs"):
        open_source(out)


def test_numbers_too_large_for_the_dtype(source, tmp_path):
    poison(GATE, 1e5)(source)
    with pytest.raises(CheckpointFault, match=f"{GATE} as float16 holds 2 of"):
        dispatch(["convert", str(source), str(tmp_path / "out"), "--dtype", "fp16"])
    assert not (tmp_path / "out").exists()


# --- where it goes --------------------------------------------------------------------------------


def test_a_directory_in_use_is_left_alone(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(UserError, match="is not an empty directory"):
        dispatch(["convert", str(source), str(tmp_path / "out")])
    assert (tmp_path / "out" / "mine").read_text() == "kept"
    with pytest.raises(UserError, match="is not an empty directory"):
        dispatch(["convert", str(source), str(source)])


def test_no_room(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(EnvironmentFault, match=r"0\.0 GiB are free there"):
        dispatch(["convert", str(source), str(tmp_path / "out")])


def test_half_of_it_never_loads(source, tmp_path):
    with pytest.raises(ZeroDivisionError), Writer(tmp_path / "out") as writer:
        writer.add("a", torch.ones(2))
        raise ZeroDivisionError
    assert not (tmp_path / "out").exists()
    writer = Writer(tmp_path / "killed", max_shard_gib=1e-9).__enter__()  # and then the process is gone
    for name in "abc":
        writer.add(name, torch.ones(2))
    assert len(list((tmp_path / "killed").glob("*.safetensors"))) == 2
    shutil.copy(source / "config.json", tmp_path / "killed")
    with pytest.raises(CheckpointFault, match=r"incomplete \(no COMMIT\)|no weights in it"):
        load_model(tmp_path / "killed")


def test_unknown_form(source, tmp_path):
    with pytest.raises(UserError, match="unknown form 'lama', did you mean 'llama'"):
        dispatch(["convert", str(source), str(tmp_path / "out"), "--to", "lama"])


@pytest.mark.slow
def test_the_command(source, tmp_path):
    """As a user types it."""
    done = run(["python", "-m", "baichuan_sft.cli", "convert", source, tmp_path / "out"])
    assert done.returncode == 0 and "nothing is lost" in done.stdout, done.stdout
    done = run(["python", "-m", "baichuan_sft.cli", "convert", "--help"])
    assert "baichuan-sft convert out out-llama --to llama" in done.stdout
