"""A 7B model as plain Llama, for every engine that knows no Baichuan: what the two have in common.

    Baichuan                          Llama
    self_attn.W_pack  (3*D, D)        q_proj, k_proj, v_proj: its rows in three
    NormHead                          lm_head with every row divided by its length
    tokenizer.model                   tokenizer.json (fast_tokenizer.py)
    a LoRA of W_pack: A, B (3*D, r)   the same A three times, B's rows in three

RoPE pairs the halves of a head as Llama does. 13B models have ALiBi, for which Llama has no place.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baichuan_sft import commit
from baichuan_sft.errors import EnvironmentFault, UserError, first_line
from baichuan_sft.export.adapter import PREFIX, Adapter, open_adapter, scaling
from baichuan_sft.export.source import Source, cast, dtype_of, fold_head
from baichuan_sft.export.writer import GIB, Writer, finish, new_directory

if TYPE_CHECKING:
    import torch

    from baichuan_sft.model.configuration_baichuan import BaichuanConfig

HEAD, PACKED = "lm_head.weight", "self_attn.W_pack"
PARTS = ("q_proj", "k_proj", "v_proj")
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what its --max-lora-rank takes
# Engines encode the rendered prompt as one text in which control tokens count. A zero-width space after "<"
# keeps them text where a message holds their names.
PLAIN = """\
{%- macro plain(text) -%}
  {{- text | replace('<reserved_', '<ZWSreserved_') | replace('<s>', '<ZWSs>') | replace('</s>', '<ZWS/s>')
    | replace('<unk>', '<ZWSunk>') -}}
{%- endmacro -%}
""".replace("ZWS", "\\u200b")
TEXT_ONLY = """
  {%- if message['content'] is not string -%}
    {{- raise_exception('content must be a string') -}}
  {%- endif -%}"""


def write(source: Source, out: Path, args: Any) -> list[str]:
    """
    Raises:
        UserError: a 13B model.
    """
    import torch

    require_rope(source)
    config, settings, tokenizer = llama_config(source.config), settings_of(source), fast_tokenizer(source)
    wanted, dtypes, stored = dtype_of(args.dtype), set(), set()
    with Writer(out, max_shard_gib=args.max_shard_gib, expected_bytes=source.num_bytes(wanted)) as writer:
        for name in source.names():
            whole = source.tensor(name)
            stored.add(whole.dtype)
            for new, tensor in as_llama(name, whole, source.config, wanted):
                tensor = cast(f"{source.path}: {name}", tensor, wanted)
                dtypes.add(tensor.dtype)
                writer.add(new, tensor)
    config.dtype = max(dtypes, key=lambda dtype: dtype.itemsize)
    finish(out, config, tokenizer, settings, converted_to="llama", source=str(source.path))
    finest = torch.finfo(config.dtype).eps / 2
    report = ["W_pack: its rows as q_proj, k_proj, v_proj, bit for bit"]
    if any(torch.finfo(dtype).eps < torch.finfo(config.dtype).eps for dtype in stored):
        report = [f"weights: rounded to {args.dtype}, each by up to {finest:.1g} of its size"]
    if source.config.lm_head == "norm":
        report.append(folded(finest))
    return [
        *report,
        "chat template: this package's ids; names of control tokens in a message get a zero-width space",
        "raw text: <s>, </s>, <unk>, <reserved_N> in it are control tokens unless split_special_tokens=True",
        f"use it:  vllm serve {out}",
        f"         AutoModelForCausalLM.from_pretrained({str(out)!r}), without trust_remote_code",
    ]


def folded(finest: float) -> str:
    return (
        f"{HEAD}: rows divided by their lengths, each value rounded by up to {finest:.1g} of its size; the "
        "lengths are lost, so train the source and not this"
    )


def require_rope(source: Source) -> None:
    """
    Raises:
        UserError: the model has ALiBi.
    """
    if source.config.position_embedding != "rope":
        raise UserError(
            f"{source.path}: a 13B model: its positions are ALiBi, Llama's are RoPE, so no weights make it "
            "one. Serve it with `baichuan-sft serve`, or as GGUF: `baichuan-sft convert SRC DST --to gguf`."
        )


def as_llama(
    name: str, tensor: torch.Tensor, config: BaichuanConfig, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Llama's names and tensors for one of Baichuan's."""
    if PACKED in name:
        for part, rows in zip(PARTS, tensor.chunk(3)):
            yield name.replace(PACKED, f"self_attn.{part}"), rows.clone()  # of a shared one all would be kept
    elif name == HEAD and config.lm_head == "norm":
        yield name, fold_head(tensor, dtype)
    else:
        yield name, tensor


def llama_config(config: BaichuanConfig) -> Any:
    from transformers import LlamaConfig

    same: tuple[str, ...] = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    )
    same += (
        "hidden_act",
        "initializer_range",
        "rms_norm_eps",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
    )
    llama = LlamaConfig(
        **{name: getattr(config, name) for name in same},
        num_key_value_heads=config.num_attention_heads,
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=False,
    )
    llama.architectures = ["LlamaForCausalLM"]
    return llama


def settings_of(source: Source) -> dict[str, Any]:
    """Generation settings that every engine knows, without the family's role ids."""
    settings = {name: value for name, value in source.settings.items() if not name.endswith("_token_id")}
    if source.settings.get("eos_token_id") is not None:
        settings["eos_token_id"] = source.settings["eos_token_id"]
    return settings


def fast_tokenizer(source: Source) -> Any:
    """transformers' fast tokenizer over the same vocabulary, with a chat template of the same ids."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast as Fast

    from baichuan_sft.export.fast_tokenizer import tokenizer_json

    slow = source.tokenizer
    # By the name that engines on transformers 4 know too; transformers 5 would write another.
    return type("PreTrainedTokenizerFast", (Fast,), {})(
        tokenizer_object=Tokenizer.from_str(json.dumps(tokenizer_json(slow))),
        chat_template=chat_template(slow),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=source.config.context_length,
    )


def chat_template(slow: Any) -> str:
    """The slow tokenizer's template; each text after a control token gets Baichuan-1's ``▁`` without it."""
    template = slow.default_chat_template
    content = "message['content']"
    for prefix in ("' ' + ", "'' + "):
        template = template.replace(f"{prefix}{content}", content)
    template = template.replace("{{- message['content'] -}}", "{{- plain(message['content']) -}}")
    begin = "{%- for message in messages -%}"
    assert (template.count("plain("), template.count(begin)) == (2, 1), template
    return PLAIN + template.replace(begin, begin + TEXT_ONLY)


# --- adapters -----------------------------------------------------------------------------------------------


def write_adapter(path: Path, out: Path, args: Any) -> list[str]:
    """A LoRA adapter of a 7B model as one of that model's Llama form.

    Raises:
        UserError: of a 13B model, a kind that is not converted, or larger than ``--max_shard_gib``.
        EnvironmentFault: the disk does not take it; nothing is left.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    adapter = open_adapter(path)
    require_rope(adapter.base)
    dtype, base = dtype_of(args.dtype), f"{str(adapter.base.path).rstrip('/')}-llama"
    tensors, config, rounded = {}, adapter_config(adapter, base), set()
    for name in adapter.names():
        tensor = one_scale(adapter, name, config)
        for new, part in adapter_as_llama(name, tensor, adapter.base.config, dtype):
            tensors[new] = cast(f"{path}: {name}", part, dtype).contiguous()
        rounded |= {dtype} - {None, tensor.dtype, torch.float32}
    if (size := sum(tensor.nbytes for tensor in tensors.values())) > args.max_shard_gib * GIB:
        raise UserError(
            f"--max_shard_gib {args.max_shard_gib:g}: an adapter is one file, here of {size / GIB:.2g} GiB; "
            "give as much."
        )
    new_directory(out, size)
    try:
        out.mkdir(parents=True, exist_ok=True)
        commit.write_manifest(out, {})  # until COMMIT it does not count
        save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
        shutil.copymode(out / commit.MANIFEST, out / "adapter_model.safetensors")
        text = json.dumps(config, indent=2, ensure_ascii=False)
        commit.write_synced(out / "adapter_config.json", text + "\n")
        entries = commit.entries_of(out, commit.files_of(out))
        commit.write_manifest(out, entries, converted_to="llama", source=str(path))
        commit.commit(out)
    except BaseException as error:
        shutil.rmtree(out, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise EnvironmentFault(f"{out}: cannot be written ({first_line(error)}).") from None
        raise
    lost = [f"rounded to {args.dtype}"] if rounded else []
    if HEAD in adapter.saved and adapter.base.config.lm_head == "norm":
        lost.append(folded(torch.finfo(tensors[PREFIX + HEAD].dtype).eps / 2))
    return [
        "W_pack: its A is shared by q_proj, k_proj and v_proj, its B's rows are theirs",
        *(lost or ["nothing is lost"]),
        *use(adapter, out, base, config["r"]),
    ]


def use(adapter: Adapter, out: Path, base: str, rank: int) -> list[str]:
    """The commands that use a converted adapter."""
    limit = next((known for known in VLLM_RANKS if known >= rank), None)
    kinds = {"DoRA": adapter.config.get("use_dora"), "modules_to_save": adapter.saved}
    kinds[f"rank {rank}"] = limit is None
    refused = " or ".join(name for name, there in kinds.items() if there)
    if refused:
        return [
            f"use it:    PEFT, over {base}; vLLM takes no {refused}: merge first, then convert:",
            f"           baichuan-sft merge {adapter.path} MERGED; "
            "baichuan-sft convert MERGED MERGED-llama --to llama",
        ]
    return [
        f"its base:  baichuan-sft convert {adapter.base.path} {base} --to llama",
        f"use it:    vllm serve {base} --enable-lora --max-lora-rank {limit} --lora-modules tuned={out}",
    ]


def adapter_as_llama(
    name: str, tensor: torch.Tensor, config: BaichuanConfig, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Llama's names and tensors for one of a Baichuan adapter's."""
    if PACKED in name and name.endswith(".lora_A.weight"):
        for part in PARTS:
            yield name.replace(PACKED, f"self_attn.{part}"), tensor.clone()
    else:  # rows of B, of DoRA's magnitudes and of whole weights are those of the linear
        for new, rows in as_llama(name.removeprefix(PREFIX), tensor, config, dtype):
            yield PREFIX + new, rows


def one_scale(adapter: Adapter, name: str, config: dict[str, Any]) -> torch.Tensor:
    """A tensor of the adapter for the one rank and scale of ``config``; vLLM reads no patterns.

    Zeros fill A ``(r, in)`` and B ``(out, r)`` up to its rank; what its scale lacks is put into B, in fp32
    where B would have to be rounded.
    """
    from torch.nn.functional import pad

    tensor, (module, _, kind) = adapter.part(name), name.removeprefix(PREFIX).partition(".lora_")
    if kind == "A.weight":
        return pad(tensor, (0, 0, 0, config["r"] - tensor.shape[0]))
    if kind == "B.weight":
        factor = adapter.scaling(module) / scaling(config, config["r"], config["lora_alpha"])
        wide = tensor if factor == 1 else tensor.float() * factor
        return pad(wide, (0, config["r"] - tensor.shape[1]))
    return tensor


def adapter_config(adapter: Adapter, base: str) -> dict[str, Any]:
    """adapter_config.json with each adapted linear by its full name where they are not all of a kind."""
    modules = as_parts(adapter.modules)
    kinds = sorted({name.rpartition(".")[2] for name in modules})
    everywhere = len(modules) == len(kinds) * adapter.base.config.num_hidden_layers
    whole = adapter.config.get("modules_to_save")
    return {
        **adapter.config,
        "base_model_name_or_path": base,
        "target_modules": kinds if everywhere else sorted(modules),
        "modules_to_save": whole and as_parts(whole),
        "r": max((adapter.scale(module)[0] for module in adapter.modules), default=1),
        "lora_alpha": adapter.config["lora_alpha"] or 1,  # of 0 no other scale could be made
        "rank_pattern": {},
        "alpha_pattern": {},
        **dict.fromkeys(("layers_to_transform", "layers_pattern", "exclude_modules")),
    }


def as_parts(names: Iterable[str]) -> list[str]:
    """Names of linears, W_pack's three times."""
    return [
        name.replace("W_pack", part) for name in names for part in (PARTS if "W_pack" in name else PARTS[:1])
    ]
