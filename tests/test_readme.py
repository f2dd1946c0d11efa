"""The READMEs keep their word: both say the same, what they name exists, and their commands are run."""

import ast
import json
import re
import sys

import pytest
import torch
from fixtures import ROOT
from launching import environment, free_port, make_nano, run

from baichuan_sft.checkpoint import load_model, verify
from baichuan_sft.data.formats import parse as parse_record
from baichuan_sft.datatools.preview import _parser as preview_parser
from baichuan_sft.errors import UserError
from baichuan_sft.infer.chat import build_parser as chat_parser
from baichuan_sft.infer.terminal import COMMANDS as CHAT_COMMANDS
from baichuan_sft.model.configuration_baichuan import BaichuanConfig
from baichuan_sft.train import args as tables
from baichuan_sft.train.parse import build_parser as train_parser
from baichuan_sft.variants import VARIANTS

READMES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README_zh.md")}
CHECKOUT = ("data", "ds_config.json", "fine-tune")  # what the commands name

NOT_RUN = {
    "make demo": "installs, and trains for minutes",
    "pip install torch==2.13.0": "installs",
    "pip install -e .": "installs",
    "hf download baichuan-inc/Baichuan2-7B-Base --local-dir Baichuan2-7B-Base": "a nano model stands in",
    "deepspeed --hostfile=hostfile fine-tune/fine-tune.py --config run.yaml": "needs several hosts",
}
# The tests' machine has no eight GPUs, others may launch on it at the same time, and one epoch shows it all.
SUBSTITUTES = {
    "--num_train_epochs 4": "--num_train_epochs 1",
    "num_train_epochs: 3": "num_train_epochs: 1",
    "--hostfile=$hostfile": "--hostfile=$hostfile --num_gpus 2 --master_port {port}",
    "--num_gpus 8": "--num_gpus 1 --master_port {port}",
}
OTHER_PROGRAMS_FLAGS = {"--hostfile", "--num_gpus", "--local-dir"}
WRITTEN_BY_A_RUN = set(
    """config.json model.safetensors adapter_config.json adapter_model.safetensors generation_config.json
    tokenizer.model chat_template.jinja modeling_baichuan.py run.json trainer_log.jsonl loss.png
    checkpoint-*/""".split()
)
NOT_IN_THE_REPOSITORY = set(
    """.venv .deepspeed_env run.yaml pytorch_model*.bin .bin model.chat model.layers.0.*
    ~/.cache/baichuan_sft </s>""".split()
)


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(block):
    """One line per command, without comments."""
    lines = re.sub(r" *\\\n *", " ", block).splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def substituted(text):
    for old, new in SUBSTITUTES.items():
        text = text.replace(old, new.format(port=free_port()))
    return text


def rows(text, pattern):
    """Cells of the table rows whose first cell is code that matches."""
    found = re.findall(rf"^\| `({pattern})` \|(.*)\|$", text, re.MULTILINE)
    return {name: [cell.strip() for cell in rest.split("|")] for name, rest in found}


@pytest.fixture(params=READMES)
def text(request):
    return READMES[request.param]


# --- what stands in them ----------------------------------------------------------------------------


def test_both_languages_hold_the_same_code():
    english, chinese = READMES.values()
    for language in ("bash", "yaml", "json"):
        one, other = blocks(english, language), blocks(chinese, language)
        assert one and [commands(block) for block in one] == [commands(block) for block in other]
    one, other = blocks(english, "python"), blocks(chinese, "python")  # comments differ
    assert len(one) == 4
    assert [ast.dump(ast.parse(block)) for block in one] == [ast.dump(ast.parse(block)) for block in other]
    assert [len(re.findall(pattern, english, re.MULTILINE)) for pattern in (r"^## ", r"^\| ")] == [
        len(re.findall(pattern, chinese, re.MULTILINE)) for pattern in (r"^## ", r"^\| ")
    ]


def test_what_is_not_run_is_still_in_them(text):
    every = [command for block in blocks(text, "bash") for command in commands(block)]
    assert every and NOT_RUN.keys() <= set(every)
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"`?make (\w+)`?$|`make (\w+)`", text, re.MULTILINE)
    assert {"demo", "test"} <= {a or b for a, b in targets}
    assert all(f"\n{a or b}:" in makefile for a, b in targets)


def test_flags_exist(text):
    parsers = (train_parser(), preview_parser(), chat_parser())
    known = {word for parser in parsers for action in parser._actions for word in action.option_strings}
    known |= {f"--{name}" for name in tables.RENAMED} | OTHER_PROGRAMS_FLAGS
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))
    assert len(named) > 30
    assert named <= known


def test_defaults_are_the_parsers(text):
    defaults = {action.dest: action.default for action in train_parser()._actions}
    presets = ("lora_rank", "lora_alpha", "lora_dropout")
    defaults |= dict(zip(presets, tables.LORA_PRESETS["default"], strict=True))
    defaults["learning_rate"] = tables.LEARNING_RATES["full"]
    defaults["gradient_checkpointing"] = defaults["gradient_checkpointing"] or False
    table = rows(text, r"--\w+")
    assert len(table) > 12
    for flag, (said, _) in table.items():
        default = defaults[flag.removeprefix("--")]
        if isinstance(default, int | float) and not isinstance(default, bool):
            assert float(said) == default, flag
        else:
            assert said == str(default) or (default is None and said in ("none", "无")), flag
    others = re.findall(r"`--(lora_\w+)` (?:默认|is) ([\d.]*\d)", table["--lora_rank"][1])
    assert {name: float(said) for name, said in others} == {name: defaults[name] for name in presets[1:]}
    assert f"{tables.LEARNING_RATES['lora']:.0e}".replace("e-0", "e-") in table["--learning_rate"][1]
    assert defaults["lr_scheduler_type"] in table["--learning_rate"][1]


def test_models_and_exit_codes_are_the_codes(text):
    table = rows(text, r"baichuan2?-\w+")
    assert list(table) == list(VARIANTS)
    for name, (positions, head, _) in table.items():
        config = BaichuanConfig(**VARIANTS[name].config)
        assert positions.lower() == config.position_embedding
        assert (head == "NormHead") == (config.lm_head == "norm")
    (codes,) = re.findall(r"^(?:Exit codes: |退出码：)(.*?)\n\n", text, re.MULTILINE | re.DOTALL)
    named = {int(code) for code in re.findall(r"(?:^|[;；]\s*)(\d+) ", codes)}
    assert named == {0, 5, 130} | {kind.exit_code for kind in (UserError, *UserError.__subclasses__())}


def test_files_exist(text):
    named = set(re.findall(r"\]\(([^)]+)\)", text)) | set(re.findall(r"`([^`\s]+)`", text))
    paths = {word for word in named if re.search(r"^[^/-].*/|\.\w+$|\*$", word)}
    assert len(paths) > 20
    missing = {path for path in paths if not (ROOT / path).exists()}
    assert missing <= WRITTEN_BY_A_RUN | NOT_IN_THE_REPOSITORY
    layout = [line.split()[0] for line in blocks(text, "text")[-1].splitlines()]
    assert len(layout) == 12 and all((ROOT / path).exists() for path in layout)
    chat = {word for word in named if re.fullmatch(r"/[a-z]+", word)}
    assert chat == set(CHAT_COMMANDS)


def test_the_sample_record_is_one(text):
    (sample,) = blocks(text, "json")
    messages, notes = parse_record(json.loads(sample))
    assert [message.role for message in messages] == ["system", *["user", "assistant"] * 2] and not notes


# --- what they tell to do ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory that looks like a checkout beside which a model was downloaded."""
    place = tmp_path_factory.mktemp("readme")
    for name in CHECKOUT:
        (place / name).symlink_to(ROOT / name)
    model = make_nano(place / "Baichuan2-7B-Base", "--hidden_size", 64, "--intermediate_size", 96)
    base = load_model(model, dtype=torch.bfloat16)  # as the vendor's are stored
    base.generation_config.max_new_tokens = 16  # what knows nothing does not know where to stop either
    base.save_pretrained(model)
    for file in model.glob("*_baichuan.py"):  # as downloaded, the vendor's, which fails today
        file.write_text("raise RuntimeError('code of the model directory was run')\n")
    (place / "run.yaml").write_text(substituted(blocks(READMES["README.md"], "yaml")[0]))
    (place / "question").write_text("你是谁？\n")
    (place / "bin").mkdir()  # found last, where the package is not installed
    (place / "bin" / "baichuan-sft").write_text(f'exec "{sys.executable}" -m baichuan_sft.cli "$@"\n')
    (place / "bin" / "baichuan-sft").chmod(0o755)
    return place


def do(place, *command):
    """Output of a command in ``place``, which must succeed."""
    env = {
        "PATH": f"{environment()['PATH']}:{place / 'bin'}",
        "PYTHONPATH": str(ROOT),
        "BAICHUAN_SFT_CACHE": str(place / "cache"),
        "HF_MODULES_CACHE": str(place / "modules"),
    }
    done = run(command, cwd=place, **env)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def outputs(place):
    """command -> its output, of all bash blocks in order."""
    outputs = {}
    for block in blocks(READMES["README.md"], "bash"):
        lines = [line for line in commands(block) if line not in NOT_RUN]
        if lines:
            script = substituted("\n".join(["exec < question", *lines]))
            outputs[lines[-1]] = do(place, "bash", "-euo", "pipefail", "-c", script)
    return outputs


@pytest.mark.slow
def test_commands_run_and_leave_what_is_promised(outputs, place):
    assert len(outputs) == 5
    assert "--warmup_ratio is called --warmup_steps today" in "".join(outputs.values())
    for name in ("output", "output-lora", "output-one"):
        verify(place / name)
    assert json.loads((place / "output-lora" / "adapter_config.json").read_text())["r"] == 32
    assert json.loads((place / "output" / "run.json").read_text())["world_size"] == 2
    left = [path for name in ("output", "output-lora") for path in (place / name).iterdir()]
    for name in WRITTEN_BY_A_RUN:
        assert any(path.match(name) for path in left), name
    shown = blocks(READMES["README.md"], "text")[1].strip()
    assert shown.startswith("<user>") and any(shown in output for output in outputs.values())


@pytest.mark.slow
@pytest.mark.parametrize("way", range(3), ids=["package", "transformers", "peft"])
def test_snippets_load_the_result_and_chat(way, outputs, place, monkeypatch, capsys):
    *ways, chat = blocks(READMES["README_zh.md"], "python")
    snippet = f"{ways[way]}\n{chat}\nprint(); print('streamed', len(shown))"
    if way == 1:  # where this package is not
        without = "import sys\nsys.modules['baichuan_sft'] = None\n"
        output = do(place, sys.executable, "-c", without + snippet)
    else:
        monkeypatch.chdir(place)
        exec(snippet, {})
        output = capsys.readouterr().out
    assert re.search(r"^streamed \d+$", output, re.MULTILINE)
