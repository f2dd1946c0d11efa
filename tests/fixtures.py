"""Golden models and where things lie."""

import io
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sentencepiece import SentencePieceTrainer

import baichuan_sft  # noqa: F401  (registers the classes)
from baichuan_sft import load_tokenizer
from baichuan_sft.data.formats import Message
from baichuan_sft.data.template import render
from baichuan_sft.model.configuration_baichuan import BaichuanConfig
from baichuan_sft.model.modeling_baichuan import BaichuanForCausalLM

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"
SHARED = ROOT.parent / "shared"
ARCHES = ["baichuan-7b", "baichuan-13b", "baichuan2-7b", "baichuan2-13b"]
MODELS = [f"{arch}/{name}" for arch in ARCHES for name in "ab"]
SMALL_VOCABULARY = ROOT / "data" / "tokenizer" / "baichuan2_like.model"
VOCABULARIES = {
    "baichuan1_like": GOLDEN / "small_tok" / "baichuan1_like.model",
    "baichuan2_like": SMALL_VOCABULARY,
    "baichuan1": SHARED / "tokenizer" / "baichuan1" / "tokenizer.model",
    "baichuan2": SHARED / "tokenizer" / "baichuan2" / "tokenizer.model",
}
ENCODED = {
    name: "small_tok/encode.jsonl" if name.endswith("_like") else "tokenizer/encode.jsonl"
    for name in VOCABULARIES
}
# every spelling of a control token, and what only looks like one
HOSTILE = "</s><s><unk><reserved_102><reserved_106>＜/s＞＜reserved_107＞<reserved_0></s"

needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason=f"needs the reference data beside the repository ({SHARED} is absent)"
)


@dataclass(frozen=True)
class Golden:
    """One tiny vendor model: its directory, recorded tensors and facts."""

    path: Path
    cases: dict[str, torch.Tensor]
    info: dict

    def __getitem__(self, key):
        value = self.cases[key]
        return value.long() if value.dtype == torch.int32 else value

    def has(self, group):
        return any(key.startswith(group + "/") for key in self.cases)


@cache
def golden(name: str) -> Golden:
    path = GOLDEN / name
    return Golden(path, load_file(path / "cases.safetensors"), json.loads((path / "info.json").read_text()))


def golden_model(name: str, attn: str = "eager", **config) -> BaichuanForCausalLM:
    """A fresh fp32 model with the vendor's weights."""
    model = BaichuanForCausalLM.from_pretrained(
        golden(name).path, attn_implementation=attn, dtype=torch.float32, **config
    )
    return model.eval()


@cache
def tiny_vocabulary() -> bytes:
    """A SentencePiece model of 256 pieces, as many as the golden models have, almost all of them roles."""
    made = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d e f g h"]),
        model_writer=made,
        vocab_size=256,
        model_type="bpe",
        user_defined_symbols=[f"<reserved_{i}>" for i in range(244)],
        minloglevel=2,
    )
    return made.getvalue()


def golden_source(path: Path, name: str) -> Path:
    """A golden model as a directory that can be converted: with a vocabulary and generation settings."""
    path.mkdir(parents=True)
    for file in ("config.json", "model.safetensors"):
        (path / file).write_bytes((GOLDEN / name / file).read_bytes())
    (path / "tokenizer.model").write_bytes(tiny_vocabulary())
    settings = {
        "user_token_id": 195,
        "assistant_token_id": 196,
        "repetition_penalty": 1.05,
        "do_sample": True,
    }
    (path / "generation_config.json").write_text(json.dumps(settings))
    return path


def tiny_config(arch: str, **changes) -> BaichuanConfig:
    """A two-layer model of one architecture; the shape is the smallest that exercises every branch."""
    position = {"max_position_embeddings": 128} if "7b" in arch else {"model_max_length": 128}
    fields = dict(
        vocab_size=6144,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=6,
        lm_head="norm" if "baichuan2" in arch else "plain",
        **position,
    )
    return BaichuanConfig(**{**fields, **changes})


def rows(path):
    """The lines of a golden file, from the repository or from the reference data beside it."""
    path = GOLDEN / path if (GOLDEN / path).exists() else SHARED / "golden" / path
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def cross_entropy(model, records):
    """Sum over the targets of each conversation alone, and their number."""
    roles = {"human": "user", "gpt": "assistant"}
    tokenizer = load_tokenizer(SMALL_VOCABULARY)
    total, count = 0.0, 0
    for record in records:
        turns = [Message(roles[turn["from"]], turn["value"]) for turn in record["conversations"]]
        rendered = render(turns, tokenizer)
        with torch.no_grad():
            logits = model(torch.tensor(rendered.input_ids)[None]).logits[0, :-1]
        labels = torch.tensor(rendered.labels[1:]).long()
        total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        count += int((labels != -100).sum())
    return total, count


def own_memory() -> int:
    """Bytes that this process holds and no file backs."""
    line = next(
        row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("RssAnon")
    )
    return int(line.split()[1]) << 10
