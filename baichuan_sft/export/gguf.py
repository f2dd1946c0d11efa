"""`convert --to gguf`: one file for llama.cpp and what is built on it, and an Ollama Modelfile beside it.

llama.cpp (src/models/baichuan.cpp) knows the family by its number of layers and nothing else: 32 have
RoPE, 40 have ALiBi, any other number has no positions at all. A model of fewer layers is therefore filled
up with layers of zeros, which add nothing to the residual stream.
"""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baichuan_sft.errors import EnvironmentFault, UserError, first_line
from baichuan_sft.export.gguf_text import chat_template, modelfile, vocabulary
from baichuan_sft.export.source import ROWS, Source, fold_head
from baichuan_sft.export.writer import GIB, new_directory

if TYPE_CHECKING:
    import numpy as np
    import torch

MAX_SHARD_GIB = 5.0  # the default, which alone can be told from a wish
TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
LAYERS = {"rope": 32, "alibi": 40}
ALIBI_MAX_BIAS = 8.0  # slopes 2**(-8 i / n), those of the family
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
OF_LAYER = {
    "input_layernorm": ["attn_norm"],
    "self_attn.W_pack": ["attn_q", "attn_k", "attn_v"],
    "self_attn.o_proj": ["attn_output"],
    "post_attention_layernorm": ["ffn_norm"],
    "mlp.gate_proj": ["ffn_gate"],
    "mlp.up_proj": ["ffn_up"],
    "mlp.down_proj": ["ffn_down"],
}


@dataclass(frozen=True)
class Part:
    """One tensor of the file: R rows of one of the model, from row ``third * R`` on; or zeros."""

    name: str
    shape: tuple[int, ...]
    origin: str | None
    third: int = 0


@dataclass
class Rounding:
    """What the type of the file does to the weights, summed over them."""

    weights: int = 0
    changed: int = 0
    error: float = 0.0  # sum of squares
    power: float = 0.0

    def line(self, kind: str) -> str:
        if not self.changed:
            return f"nothing is lost: all {self.weights:,} weights are held exactly as {kind}"
        share, relative = self.changed / self.weights, math.sqrt(self.error / self.power)
        return (
            f"lost by {kind}: {share:.1%} of {self.weights:,} weights are rounded, by {relative:.1e} of "
            "their size (root mean square)"
        )


def write(source: Source, out: Path, args: argparse.Namespace) -> list[str]:
    """Write ``out/model-TYPE.gguf`` and ``out/Modelfile``; returns the lines of the report.

    Raises:
        UserError: a type that cannot hold the weights, more layers than llama.cpp knows, or settings that
            are no numbers.
        EnvironmentFault: the gguf library is not there, or the disk does not take the file.
    """
    gguf = _library()
    if args.dtype != "auto" or args.max_shard_gib != MAX_SHARD_GIB:
        raise UserError("--dtype and --max_shard_gib: --to gguf writes one file; its type is --gguf_type.")
    kind, config = args.gguf_type or "f16", source.config
    file_type = gguf.LlamaFileType[TYPES[kind]]
    if out.suffix == ".gguf":
        raise UserError(f"{out}: the directory to write to, not the file; e.g. {out.with_suffix('')}.")
    layers = LAYERS[config.position_embedding]
    if config.num_hidden_layers > layers:
        raise UserError(
            f"{source.path}: has {config.num_hidden_layers} layers; llama.cpp knows this family's models of "
            f"{layers} ({config.position_embedding}) and no others. Use it with `baichuan-sft serve`."
        )
    pieces, special = vocabulary(source), special_ids(source)
    description = modelfile(source, pieces, f"model-{kind}.gguf")
    plan = [(part, _type_of(part, kind, gguf)) for part in parts(source, layers)]
    sizes = [_size(part.shape, qtype, gguf) for part, qtype in plan]
    new_directory(out, sum(sizes))
    path = out / f"model-{kind}.gguf"
    partial = path.with_suffix(".partial")  # nothing loads it under this name
    rounding = Rounding()
    try:
        out.mkdir(parents=True, exist_ok=True)
        writer = gguf.GGUFWriter(partial, "baichuan")
        try:
            _describe(writer, source, layers, file_type, gguf)
            _add_vocabulary(writer, source, pieces, special)
            for (part, qtype), size in zip(plan, sizes):
                writer.add_tensor_info(part.name, part.shape, None, size, raw_dtype=qtype)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            read = lru_cache(maxsize=1)(source.tensor)  # W_pack is asked for three times in a row
            for part, qtype in plan:
                writer.write_tensor_data(
                    _encode(_values(source, part, read), part.name, qtype, rounding, gguf)
                )
        finally:
            writer.close()
        partial.rename(path)
        (out / "Modelfile").write_text(description, encoding="utf-8")
    except BaseException as error:
        shutil.rmtree(out, ignore_errors=True)
        if isinstance(error, OSError):
            raise EnvironmentFault(f"{out}: cannot be written ({first_line(error)}).") from None
        raise
    return [*_changes(source, layers, pieces), rounding.line(kind), *_uses(path, sum(sizes))]


def parts(source: Source, layers: int) -> Iterator[Part]:
    """The tensors of the file in their order."""
    for name, target in WHOLE.items():
        yield Part(f"{target}.weight", source.shape(f"{name}.weight"), f"{name}.weight")
    for layer in range(layers):
        for name, targets in OF_LAYER.items():
            rows, *rest = source.shape(f"model.layers.0.{name}.weight")
            origin = (
                f"model.layers.{layer}.{name}.weight" if layer < source.config.num_hidden_layers else None
            )
            for third, target in enumerate(targets):
                yield Part(f"blk.{layer}.{target}.weight", (rows // len(targets), *rest), origin, third)


def halves_to_pairs(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of q or k as llama.cpp rotates them: (0, 1), (2, 3) instead of (0, d/2), (1, d/2 + 1).

        rows of one head, d = 6    0 1 2 3 4 5
        become                     0 3 1 4 2 5

    Scores are sums over a head's rows, so q and k moved alike give the same.
    """
    half = weight.shape[0] // num_heads // 2
    return weight.unflatten(0, (num_heads, 2, half)).transpose(1, 2).flatten(0, 2)


def _values(source: Source, part: Part, read: Any) -> torch.Tensor:
    import torch

    if part.origin is None:
        return torch.zeros(part.shape)
    rows = part.shape[0]
    weight = read(part.origin)[part.third * rows : (part.third + 1) * rows]
    rotated = source.config.position_embedding == "rope" and part.name.endswith(
        ("attn_q.weight", "attn_k.weight")
    )
    if rotated:
        weight = halves_to_pairs(weight, source.config.num_attention_heads)
    if part.name == "output.weight" and source.config.lm_head == "norm":
        # fp32: folded in bf16 the rows would be rounded once more before the file's type rounds them
        weight = fold_head(weight.float())
    return weight


def _encode(weight: torch.Tensor, name: str, qtype: Any, rounding: Rounding, gguf: Any) -> np.ndarray:
    """The bytes of one tensor, a block of rows at a time; what they lose is added to ``rounding``."""
    import numpy as np

    blocks = []
    for rows in weight.split(ROWS):
        exact = rows.float().numpy()
        with np.errstate(over="ignore"):  # said below
            block = gguf.quants.quantize(exact, qtype)
            difference = gguf.quants.dequantize(block, qtype) - exact
        if not np.isfinite(difference).all():
            raise UserError(
                f"{name}: a weight of {np.abs(exact).max():.4g} is too large for {qtype.name.lower()}; take "
                "--gguf_type bf16."
            )
        rounding.weights += exact.size
        rounding.changed += int(np.count_nonzero(difference))
        rounding.error += float(np.square(difference, dtype=np.float64).sum())
        rounding.power += float(np.square(exact, dtype=np.float64).sum())
        blocks.append(block)
    return np.concatenate(blocks)


def _library() -> Any:
    try:
        import gguf
        import gguf.quants
    except ImportError:
        raise EnvironmentFault(
            "--to gguf needs the gguf library; pip install 'baichuan-sft[export]'."
        ) from None
    return gguf


def _type_of(part: Part, kind: str, gguf: Any) -> Any:
    """Norms stay f32, as llama.cpp wants them; rows that are no multiple of q8_0's 32 become f16."""
    types = gguf.GGMLQuantizationType
    if len(part.shape) == 1:
        return types.F32
    qtype = types[kind.upper()]
    return types.F16 if part.shape[-1] % gguf.GGML_QUANT_SIZES[qtype][0] else qtype


def _size(shape: tuple[int, ...], qtype: Any, gguf: Any) -> int:
    per_block, block_bytes = gguf.GGML_QUANT_SIZES[qtype]
    return math.prod(shape) // per_block * block_bytes


def _describe(writer: Any, source: Source, layers: int, file_type: Any, gguf: Any) -> None:
    config = source.config
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(source.path.resolve().name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)  # asked for with ALiBi too, where nothing is rotated
    writer.add_vocab_size(config.vocab_size)
    if config.position_embedding == "rope":
        writer.add_rope_freq_base(10000.0)
    else:
        writer.add_max_alibi_bias(ALIBI_MAX_BIAS)


def special_ids(source: Source) -> dict[str, int]:
    """bos, eos and pad -> id, of those that the model has; of several the first, a file holds one.

    Raises:
        UserError: an id that the vocabulary does not have.
    """
    found = {}
    for name in ("bos", "eos", "pad"):
        given = getattr(source.config, f"{name}_token_id")
        token_id = next(iter(given), None) if isinstance(given, list) else given
        if token_id is None:
            continue
        if type(token_id) is not int or not 0 <= token_id < source.config.vocab_size:
            raise UserError(
                f"{source.path / 'config.json'}: {name}_token_id is {given!r}, expected one from 0 to "
                f"{source.config.vocab_size - 1}; correct it."
            )
        found[name] = token_id
    return found


def _add_vocabulary(writer: Any, source: Source, pieces: Any, special: dict[str, int]) -> None:
    writer.add_tokenizer_model("llama")  # SentencePiece BPE
    writer.add_tokenizer_pre("default")
    writer.add_token_list(pieces.texts)
    writer.add_token_scores(pieces.scores)
    writer.add_token_types(pieces.types)
    writer.add_unk_token_id(0)
    for name, token_id in special.items():
        getattr(writer, f"add_{name}_token_id")(token_id)
    writer.add_add_bos_token(False)  # the defaults of SentencePiece vocabularies are others
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(chat_template(source.tokenizer, pieces))


def _changes(source: Source, layers: int, pieces: Any) -> list[str]:
    config, num_pieces, lines = source.config, len(source.tokenizer.sp_model), []
    if config.lm_head == "norm":
        lines.append("NormHead is folded: every row of the head has length 1, further training would differ")
    if (added := layers - config.num_hidden_layers) > 0:
        lines.append(
            f"{added} layers of zeros are added to the {config.num_hidden_layers}, which change nothing: "
            f"llama.cpp knows {config.position_embedding} models of this family by their {layers} layers"
        )
    eos = config.eos_token_id
    if isinstance(eos, list) and len(eos) > 1:
        lines.append(f"eos_token_id {eos}: the file holds one, the first; give the others as stops")
    tokens = {text: i for text, i in source.tokenizer.get_added_vocab().items() if i >= num_pieces}
    kept = [repr(text) for text, i in tokens.items() if pieces.texts[i] == text]
    lost = [repr(text) for text, i in tokens.items() if pieces.texts[i] != text]
    if kept:
        lines.append(
            f"added tokens {', '.join(kept)}: no text encodes to them, and llama.cpp prints them "
            "with --special only"
        )
    if lost:
        lines.append(f"added tokens {', '.join(lost)} are lost: any message could hold them")
    if pieces.normalised:
        lines.append(
            "llama.cpp's tokenizer does not normalise: full-width letters and brackets become bytes. The "
            "chat template rewrites the common ones; write raw prompts half-width, with a space in front"
        )
    return lines


def _uses(path: Path, size: int) -> list[str]:
    return [
        f"{path}: {size / GIB:.2f} GiB; use it with: llama-server -m {path} --jinja",
        f"{path.parent / 'Modelfile'}: for `ollama create NAME -f Modelfile`, which was not run here",
    ]
