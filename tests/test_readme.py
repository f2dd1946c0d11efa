"""The READMEs and docs/ keep their word: both languages say the same, what they name exists, commands run."""

import argparse
import ast
import contextlib
import dataclasses
import json
import re
import signal
import subprocess
import sys
import time
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from fixtures import ROOT
from launching import environment, free_port, make_nano, run

from baichuan_sft.checkpoint import load_model, verify
from baichuan_sft.cli import dispatch
from baichuan_sft.data.arguments import DataArguments
from baichuan_sft.data.findings import CODES, Finding
from baichuan_sft.data.formats import FORMATS
from baichuan_sft.data.formats import parse as parse_record
from baichuan_sft.data.length import TRUNCATION, fit
from baichuan_sft.data.report import DataReport, SourceReport
from baichuan_sft.data.sources import Source
from baichuan_sft.data.survey import DOCUMENT
from baichuan_sft.data.template import IGNORE, TRAIN_ON, Rendered
from baichuan_sft.data.turns import ROLE_ALIASES
from baichuan_sft.datatools.command import _parser as data_parser
from baichuan_sft.datatools.preview import _parser as preview_parser
from baichuan_sft.doctor.command import parser as doctor_parser
from baichuan_sft.errors import UserError
from baichuan_sft.evaluate.command import build_parser as eval_parser
from baichuan_sft.export.convert import build_parser as convert_parser
from baichuan_sft.export.merge import build_parser as merge_parser
from baichuan_sft.export.quantize import build_parser as quantize_parser
from baichuan_sft.infer.chat import build_parser as chat_parser
from baichuan_sft.infer.commands import COMMANDS as CHAT_COMMANDS
from baichuan_sft.infer.server import build_parser as serve_parser
from baichuan_sft.infer.web import build_parser as web_parser
from baichuan_sft.launch.command import build_parser as launch_parser
from baichuan_sft.model.configuration_baichuan import BaichuanConfig
from baichuan_sft.plan.command import build_parser as plan_parser
from baichuan_sft.train import args as tables
from baichuan_sft.train.flags import RENAMED
from baichuan_sft.train.parse import build_parser as train_parser
from baichuan_sft.variants import VARIANTS

READMES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README_zh.md")}
DOCS = {name: (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("data.md", "data_zh.md")}
CHECKOUT = ("data", "ds_config.json", "fine-tune")  # what the commands name

# command -> what it answers under which path, once it listens
SERVERS = {
    "baichuan-sft serve Baichuan2-7B-Base --adapter lora=output-lora": ("v1/models", '"lora"'),
    "baichuan-sft web output --compare output-lora": ("", "<title>"),
}
NOT_RUN = {
    "make demo": "installs, and trains for minutes",
    "pip install torch==2.13.0": "installs",
    "pip install -e .": "installs",
    "hf download baichuan-inc/Baichuan2-7B-Base --local-dir Baichuan2-7B-Base": "a nano model stands in",
    "deepspeed --hostfile=hostfile fine-tune/fine-tune.py --config run.yaml": "needs several hosts",
    "baichuan-sft doctor --hostfile hostfile --model_name_or_path Baichuan2-7B-Base --data_path "
    "data/belle_chat.json": "needs several hosts; test_doctor.py",
    "baichuan-sft launch --hostfile hostfile --max_restarts 3 train --config run.yaml": "several hosts",
    **SERVERS,
    "baichuan-sft data check train.jsonl": "a file with faults; see test_the_check_shows_these_faults",
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
    checkpoint-*/ manifest.json COMMIT""".split()
)
ONLY_OF_FAULTY_DATA = {"data_report.jsonl", "rejected.jsonl"}
NOT_IN_THE_REPOSITORY = ONLY_OF_FAULTY_DATA | set(
    """.venv run.yaml zero.json pytorch_model*.bin .bin model.chat model.layers.0.*
    ~/.cache/baichuan_sft </s>
    .gz .zst .txt a.json#1000,b.jsonl 'chat/*.jsonl'""".split()
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


def known_flags():
    (commands,) = [a for a in data_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    others = (preview_parser(), chat_parser(), plan_parser(), doctor_parser(), launch_parser())
    others += (
        serve_parser(),
        web_parser(),
        convert_parser(),
        merge_parser(),
        quantize_parser(),
        eval_parser(),
    )
    parsers = (train_parser(), *others, *commands.choices.values())
    known = {word for parser in parsers for action in parser._actions for word in action.option_strings}
    return known | {f"--{name}" for name in RENAMED}


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
    known = known_flags() | OTHER_PROGRAMS_FLAGS
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))
    assert len(named) > 30
    assert named <= known


def test_defaults_are_the_parsers(text):
    defaults = {
        word.removeprefix("--"): action.default
        for action in train_parser()._actions
        for word in action.option_strings
    }
    presets = ("lora_rank", "lora_alpha", "lora_dropout")
    defaults |= dict(zip(presets, tables.LORA_PRESETS["default"], strict=True))
    defaults["learning_rate"] = tables.LEARNING_RATES["full"]
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
    assert named == {0, 130} | {kind.exit_code for kind in (UserError, *UserError.__subclasses__())}


def test_files_exist(text):
    named = set(re.findall(r"\]\(([^)#]+)", text)) | set(re.findall(r"`([^`\s]+)`", text))
    paths = {word for word in named if re.search(r"^[^/-].*/|\.\w+$|\*$", word)}
    assert len(paths) > 20
    missing = {path for path in paths if not (ROOT / path).exists()}
    assert missing <= WRITTEN_BY_A_RUN | NOT_IN_THE_REPOSITORY
    layout = [line.split()[0] for line in blocks(text, "text")[-1].splitlines()]
    assert len(layout) == 27 and all((ROOT / path).exists() for path in layout)
    chat = {word for word in named if re.fullmatch(r"/[a-z]+", word)}
    assert chat == set(CHAT_COMMANDS)


def test_the_sample_record_is_one(text):
    (sample,) = blocks(text, "json")
    messages, notes = parse_record(json.loads(sample))
    assert [message.role for message in messages] == ["system", *["user", "assistant"] * 2] and not notes


# --- docs/ ------------------------------------------------------------------------------------------


@pytest.fixture(params=DOCS)
def guide(request):
    return DOCS[request.param]


def column(text, head):
    """The first cells, as code, of the table that begins with this row."""
    table = re.search(rf"^\| {re.escape(head)} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert table, head
    return [re.findall("`([^`]+)`", row.split("|")[1]) for row in table[1].splitlines()]


def test_both_guides_hold_the_same_code_and_figures():
    english, chinese = DOCS.values()
    blocks_of = [re.findall(r"^```(.*?)^```$", text, re.MULTILINE | re.DOTALL) for text in (english, chinese)]
    assert len(blocks_of[0]) > 5 and blocks_of[0] == blocks_of[1]
    for pattern in (r"^#+ ", r"^\| ", r"^- ", r"`--\w+`"):
        one, other = (len(re.findall(pattern, text, re.MULTILINE)) for text in (english, chinese))
        assert one > 10 and abs(one - other) <= (2 if pattern == r"`--\w+`" else 0), pattern
    # Figures of bare digits; words of thousands and millions differ between the languages.
    cells = [re.findall(r"(?<=\| )[\d.,]+(?= \|)", text) for text in (english, chinese)]
    assert len(cells[0]) > 30 and cells[0] == cells[1]


def test_guides_list_every_finding(guide):
    table = rows(guide, r"DATA\d+")
    assert {code: cells[0] for code, cells in table.items()} == {code: of[0] for code, of in CODES.items()}
    assert all(len(cells) == 3 and all(cells) for cells in table.values())
    assert set(re.findall(r"DATA\d+", guide)) == set(CODES)
    if guide is DOCS["data.md"]:
        assert {code: cells[1] for code, cells in table.items()} == {
            code: of[1] for code, of in CODES.items()
        }


def test_guides_list_formats_roles_policies_and_fields(guide):
    english = guide is DOCS["data.md"]
    assert [name for name, *_ in column(guide, "format" if english else "格式")] == [*FORMATS, DOCUMENT]
    roles = column(guide, "written" if english else "写作")
    assert sorted(role for group in roles for role in group) == sorted(ROLE_ALIASES)
    assert all(len({ROLE_ALIASES[role] for role in group}) == 1 for group in roles)
    assert [name for (name,) in column(guide, "policy" if english else "方式")] == list(TRUNCATION)
    fields = [name for (name,) in column(guide, "field" if english else "字段")]
    assert sorted(fields) == sorted({field.name for field in dataclasses.fields(Source)} - {"group"})
    for name in [*Finding("DATA001", "x", "y", 1, 1, 1, 1).to_dict(), "raw", "raw_base64"]:
        assert f"`{name}`" in guide, name
    assert all(name in rows(guide, r"--\w+")["--train_on"][1] for name in TRAIN_ON)


def test_guides_list_every_data_flag_with_its_default(guide):
    table = rows(guide, r"--\w+")
    assert list(table) == [f"--{field.name}" for field in dataclasses.fields(DataArguments)]
    for field in dataclasses.fields(DataArguments):
        said = table[f"--{field.name}"][0]
        if field.default is dataclasses.MISSING:
            assert said in ("required", "必须")
        else:
            assert said == str(field.default) or (field.default is None and said in ("none", "无")), (
                field.name
            )
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", guide)) <= known_flags()


def test_guides_name_every_word_of_the_balance(guide):
    one = dict.fromkeys([field.name for field in dataclasses.fields(SourceReport)], 0)
    one |= {"path": "x", "sha256": "", "read": 5, "rejected": 1, "duplicates_dropped": 1, "no_target": 1}
    one |= {"too_long": 1, "not_drawn": 1, "repeats": 1, "tokens_rendered": 1, "tokens_not_used": 1}
    report = object.__new__(DataReport)
    for name, value in {"sources": [SourceReport(**one)], "held_out": 1}.items():
        object.__setattr__(report, name, value)
    for name in ("tokens", "supervised_tokens"):
        object.__setattr__(report, name, 1)
    words = re.findall(r"(?:^|[=+,;:] )(?:\d+ )?([a-z][a-z ]*?)(?= [\d(]|,|$|:)", report.balance())
    words += re.findall(r"(?:[=+,;:] )([a-z][a-z ]*?)(?= \d)", report.token_balance())
    assert len(set(words)) >= 12
    named = re.findall(r"^\| ([a-z ]+) \|", guide, re.MULTILINE)
    assert set(words) - {"read"} <= set(named)


@pytest.mark.parametrize("policy", ["cut_turns", "cut_left"])
def test_the_example_of_cutting_is_true(guide, policy):
    (block,) = [block for block in blocks(guide, "text") if "cut_left" in block]
    whole, *cut = re.findall(r"ids +([\d ]+)\n.*labels +([\d. ]+)$", block, re.MULTILINE)
    numbers = [
        [[IGNORE if word == "." else int(word) for word in row.split()] for row in pair]
        for pair in (whole, *cut)
    ]
    ids, labels = (np.array(row, np.int32) for row in numbers[0])
    turns = [i for i, token in enumerate(ids) if token in (195, 196)]
    (kept,) = fit(Rendered(ids, labels, turns), 7, policy)
    shown = numbers[1 + ["cut_turns", "cut_left"].index(policy)]
    assert [kept.input_ids.tolist(), kept.labels.tolist()] == shown


@pytest.mark.parametrize("name", DOCS)
def test_links_of_the_guides_lead_somewhere(name):
    texts = {f"docs/{one}": text for one, text in DOCS.items()} | READMES
    anchors = {
        path: {
            re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-")
            for head in re.findall("^#+ (.*)$", text, re.M)
        }
        for path, text in texts.items()
    }
    links = [(f"docs/{name}", link) for link in re.findall(r"\]\(([^)]+)\)", DOCS[name])]
    links += [
        (readme, link) for readme, text in READMES.items() for link in re.findall(r"\]\((docs/[^)]+)\)", text)
    ]
    assert len(links) > 12
    for source, link in links:
        path, _, anchor = link.partition("#")
        target = (ROOT / source).parent / path if path else ROOT / source
        assert target.exists(), link
        if anchor:
            assert anchor in anchors[str(target.resolve().relative_to(ROOT.resolve()))], link


FAULTY = """{"id": "a", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
{"id": "b", "conversations": [{"from": "humna", "value": "c"}, {"from": "gpt", "value": "d"}]}
{"id": "c", "conversations": [{"from": "human", "value": "1+1=?"}, {"from": "gpt", "value": null}]}
{"id": "d", "conversations": [{"from": "human", "value": "e"}, {"from": "gpt", "value": "f"}]}
"""


def test_the_check_shows_these_faults(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BAICHUAN_SFT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "train.jsonl").write_text(FAULTY, encoding="utf-8")
    assert dispatch(["data", "check", "train.jsonl"]) == 2
    output = capsys.readouterr().out
    (shown,) = [block for block in blocks(text, "text") if block.startswith("ERROR")]
    lines = [line.removesuffix("...").strip() for line in shown.splitlines()]
    assert len(lines) > 5 and all(line in output for line in lines)


# --- what they tell to do ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory that looks like a checkout beside which a model was downloaded."""
    place = tmp_path_factory.mktemp("readme")
    for name in CHECKOUT:
        (place / name).symlink_to(ROOT / name)
    model = make_nano(place / "Baichuan2-7B-Base", "--hidden_size", 64, "--intermediate_size", 128)
    base = load_model(model, dtype=torch.bfloat16)  # as the vendor's are stored
    base.generation_config.max_new_tokens = 16  # what knows nothing does not know where to stop either
    base.save_pretrained(model)
    for file in model.glob("*_baichuan.py"):  # as downloaded, the vendor's, which fails today
        file.write_text("raise RuntimeError('code of the model directory was run')\n")
    (place / "run.yaml").write_text(substituted(blocks(READMES["README.md"], "yaml")[0]))
    (place / "question").write_text("你是谁？\n")
    (place / "bin").mkdir()  # found last, where the package is not installed
    (place / "bin" / "baichuan-sft").write_text(
        f'#!/bin/sh\nexec "{sys.executable}" -m baichuan_sft.cli "$@"\n'
    )
    (place / "bin" / "baichuan-sft").chmod(0o755)
    return place


def settings(place):
    """The environment of commands there."""
    return environment() | {
        "PATH": f"{environment()['PATH']}:{place / 'bin'}",
        "PYTHONPATH": str(ROOT),
        "BAICHUAN_SFT_CACHE": str(place / "cache"),
        "HF_MODULES_CACHE": str(place / "modules"),
    }


def do(place, *command):
    """Output of a command in ``place``, which must succeed."""
    done = run(command, cwd=place, **settings(place))
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
    assert len(outputs) == 10
    assert "--warmup_ratio is called --warmup_steps today" in "".join(outputs.values())
    for name in ("output", "output-lora", "output-one", "merged", "merged-nf4", "modern"):
        verify(place / name)
    assert outputs["baichuan-sft inspect merged-gguf"].count("llama.cpp")
    assert json.loads((place / "output-lora" / "adapter_config.json").read_text())["r"] == 32
    assert json.loads((place / "output" / "run.json").read_text())["world_size"] == 2
    left = [path for name in ("output", "output-lora") for path in (place / name).iterdir()]
    for name in WRITTEN_BY_A_RUN:
        assert any(path.match(name) for path in left), name
    (shown,) = [one.strip() for one in blocks(READMES["README.md"], "text") if one.startswith("<user>")]
    assert any(shown in output for output in outputs.values())
    (prepared,) = [output for command, output in outputs.items() if " data prepare " in command]
    assert "prepared: " in prepared
    assert prepared.startswith(blocks(DOCS["data.md"], "text")[0].rstrip())


@pytest.mark.slow
@pytest.mark.parametrize("command", SERVERS)
def test_servers_answer_until_they_are_stopped(command, outputs, place):
    port, (path, expected) = free_port(), SERVERS[command]
    words = [*command.split(), "--port", str(port)]
    with (place / "server.log").open("w+") as log:
        server = subprocess.Popen(words, cwd=place, env=settings(place), stdout=log, stderr=subprocess.STDOUT)
        try:
            deadline, answer = time.monotonic() + 240, ""
            while expected not in answer:
                assert server.poll() is None and time.monotonic() < deadline, (
                    place / "server.log"
                ).read_text()
                time.sleep(0.2)
                with contextlib.suppress(OSError):
                    answer = urlopen(f"http://127.0.0.1:{port}/{path}", timeout=10).read().decode()
            server.terminate()
            assert server.wait(timeout=30) in (0, -signal.SIGTERM)  # which a shell calls 143
        finally:
            server.kill()


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
