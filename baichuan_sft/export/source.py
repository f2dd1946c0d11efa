"""A model directory as what is converted: checked before anything is written, read one tensor at a time.

Nothing that lies in it is run: weights are read as safetensors or by torch's tensors-only unpickler,
settings as JSON; its own code, templates and other pickles are left alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baichuan_sft import checkpoint, commit
from baichuan_sft.arguments import DTYPES
from baichuan_sft.checkpoint.files import (
    Shapes,
    check_against_manifest,
    is_adapter,
    opened,
    read_json,
    shape_of,
    weight_files,
)
from baichuan_sft.errors import CheckpointFault, UserError
from baichuan_sft.export.vendor_packing import packed_weights, unpack
from baichuan_sft.model.configuration_baichuan import MAX_ADDED_TOKENS
from baichuan_sft.model.head_baichuan import NORM_EPS

if TYPE_CHECKING:
    import torch

    from baichuan_sft.model.configuration_baichuan import BaichuanConfig
    from baichuan_sft.model.tokenization_baichuan import BaichuanTokenizer

# sha256 of the vendor's tokenizer.model -> whose it is
VOCABULARIES = {
    "4be54af290d93c113bcbf421115ae9eed9d6340408f564898f1e966dc738ef01": "Baichuan",
    "79452955be6b419a65984273a9f08af86042e1c2a75ee3ba989cbf620a133cc2": "Baichuan2",
}
# Baichuan-7B's files hold RoPE frequencies that follow from the config.
DERIVED = "rotary_emb.inv_freq"
NORM = "model.norm.weight"  # which nothing quantises
VENDORS = "by the vendor's own code"
ROWS = 8192  # of a head, as fp32 at a time
# A head is taken for normalised where this many rows at each end have length 1, up to the bf16 rounding of
# a norm and of a row's elements (2**-8 each). A trained head's lengths differ by far more.
UNIT_ROWS, UNIT_SLACK = 256, 2.0**-7


@dataclass
class Source:
    """A whole model directory, its weights read when asked for.

    Attributes:
        settings: of generation_config.json; empty where there is none.
        notes: what was found odd and does no harm, a line each.
        packed: weights that the vendor's code quantised, each with the two entries that it is made of.
    """

    path: Path
    config: BaichuanConfig
    tokenizer: BaichuanTokenizer
    settings: dict[str, Any]
    shapes: Shapes
    notes: list[str]
    check: bool
    _files: dict[str, Path]
    packed: dict[str, tuple[str, str]] = field(default_factory=dict)
    _open: tuple[Path | None, Mapping[str, Any]] = field(default=(None, {}), repr=False)

    @property
    def tokenizer_model(self) -> bytes:
        return (self.path / "tokenizer.model").read_bytes()

    def names(self) -> list[str]:
        """Of all tensors, in the order in which they lie in the files."""
        return list(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def num_bytes(self, dtype: torch.dtype | None = None) -> int:
        """Of all tensors, in a dtype or as stored."""
        if dtype is None and self.packed:
            dtype = self._stored(NORM)[:].dtype
        if dtype is None:
            return sum(file.stat().st_size for file in set(self._files.values()))
        return dtype.itemsize * sum(math.prod(shape) for shape in self.shapes.values())

    def part(self, name: str) -> Any:
        """A tensor that is not read yet: ``[:10]`` reads ten rows. Maps one file at a time.

        A packed one is read whole, in the dtype of those that are not.
        """
        if name not in self.packed:
            return self._stored(name)
        tensor = unpack(name, {entry: self._stored(entry)[:] for entry in self.packed[name]})
        if tuple(tensor.shape) != self.shapes[name]:
            raise CheckpointFault(
                f"{self.path}: {name} is {tuple(tensor.shape)} unpacked, expected {self.shapes[name]}."
            )
        return tensor.to(self._stored(NORM)[:].dtype)

    def _stored(self, name: str) -> Any:
        file = self._files[name]
        if self._open[0] != file:
            self._open = (None, {})  # lets go of the file before
            self._open = (file, opened(file))
        return self._open[1][name]

    def tensor(self, name: str) -> torch.Tensor:
        """
        Raises:
            CheckpointFault: it holds NaN or Inf.
        """
        tensor = self.part(name)[:]
        if tensor.dtype not in {dtype_of(name) for name in DTYPES if name != "auto"}:
            raise CheckpointFault(
                f"{self._files[name]}: {name} is {str(tensor.dtype).removeprefix('torch.')}, expected one of "
                f"{', '.join([*DTYPES.values()][1:])}; take the model that it was made from."
            )
        if self.check:
            check_finite(f"{self._files[name]}: {name}", tensor)
        return tensor


def open_source(path: str | Path, *, check: bool = True, dequantize: bool = False) -> Source:
    """A model directory, its names, shapes, vocabulary and manifest checked; nothing large is read.

    Args:
        check: also compare with a manifest, and look for NaN in every tensor that is read.
        dequantize: take a model that the vendor's own code quantised, and no other.
    Raises:
        UserError: no model of the family, a quantised one, or one with another's tokenizer.
        CheckpointFault: files that are missing, damaged, something else, or hold more than tensors.
    """
    path = Path(path)
    if is_adapter(path):
        raise UserError(
            f"{path}: an adapter, not a whole model; `baichuan-sft merge` makes one of it and its base."
        )
    if (path / "config.json").is_file():
        refuse_quantised(path, {} if dequantize else read_json(path / "config.json"))
    config = checkpoint.load_config(path, vendor_packed=dequantize)
    if check:
        check_against_manifest(path)
    files, shapes, notes = {}, {}, []
    for file in weight_files(path):
        for name, part in opened(file).items():
            files[name], shapes[name] = file, shape_of(part)
    if derived := [name for name in files if DERIVED in name]:
        notes.append(f"{len(derived)} tensors {DERIVED} are left out: they follow from the configuration")
        files = {name: file for name, file in files.items() if DERIVED not in name}
        shapes = {name: shapes[name] for name in files}
    expected, packed = checkpoint.expected_shapes(config), packed_weights(shapes)
    if scales := [name for name in shapes if name.endswith((".SCB", ".absmax"))]:
        raise UserError(quantised(path, f"{scales[0]} in its weights"))
    if packed and not dequantize:
        raise UserError(quantised(path, VENDORS))
    if dequantize and not packed:
        raise UserError(f"{path}: nothing in it is packed as the vendor's code does; leave --dequantize out.")
    if packed:
        notes.append(f"{len(packed)} quantised weights are unpacked: what was rounded stays rounded")
        files |= {weight: files[entries[0]] for weight, entries in packed.items() if entries[0] in files}
        inner = {entry for entries in packed.values() for entry in entries}
        shapes = {name: shape for name, shape in shapes.items() if name not in inner}
        shapes |= {name: expected.get(name, ()) for name in packed}
    checkpoint.compare_shapes(path, shapes, expected)
    tokenizer = _tokenizer(path, config, notes)
    settings = path / "generation_config.json"
    source = Source(
        path=path,
        config=config,
        tokenizer=tokenizer,
        settings=read_json(settings) if settings.is_file() else {},
        shapes=shapes,
        notes=notes,
        check=check,
        packed=packed,
        _files=files,
    )
    if config.lm_head == "norm" and is_normalised(source.part("lm_head.weight")):
        notes.append(
            "lm_head.weight: its rows have length 1 already (folded before, or saved by the vendor's code "
            "after an evaluation); logits are the same, their lengths in training are lost"
        )
    return source


def refuse_quantised(path: Path, raw: dict[str, Any]) -> None:
    """
    Raises:
        UserError: config.json says that the weights are quantised.
    """
    settings = raw.get("quantization_config")
    if settings:
        method = settings.get("quant_method") if isinstance(settings, dict) else None
        raise UserError(quantised(path, method or VENDORS))


def quantised(path: Path, how: str) -> str:
    unpacks = ", or unpack what is left of it: baichuan-sft convert SRC DST --dequantize"
    return (
        f"{path}: its weights are quantised ({how}), which loses what a conversion would need; give the "
        f"16-bit model that it was made from{unpacks if how == VENDORS else ''}."
    )


def _tokenizer(path: Path, config: BaichuanConfig, notes: list[str]) -> BaichuanTokenizer:
    file = path / "tokenizer.model"
    if file.is_file() and (instead := commit.masquerade(file)):
        raise CheckpointFault(f"{file}: {instead}.")
    tokenizer = checkpoint.load_tokenizer(path)
    checkpoint.check_vocabulary(path, config, tokenizer)
    if config.vocab_size - len(tokenizer) > MAX_ADDED_TOKENS:
        raise UserError(
            f"{path}: the embedding has {config.vocab_size} rows, the tokenizer only {len(tokenizer)} "
            "pieces: weights of Baichuan2 with Baichuan's tokenizer; copy tokenizer.model from their model."
        )
    if hashlib.sha256(file.read_bytes()).hexdigest() not in VOCABULARIES:
        notes.append("tokenizer.model is neither of the vendor's two; its role ids are in place")
    # The one in the directory would be Jinja from somewhere.
    tokenizer.chat_template = tokenizer.default_chat_template
    return tokenizer


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """
    Raises:
        CheckpointFault: the tensor holds NaN or Inf.
    """
    import torch

    odd = sum(int((~torch.isfinite(part)).sum()) for part in tensor.flatten().split(1 << 24))
    if odd:
        raise CheckpointFault(
            f"{name} holds {odd:,} of {tensor.numel():,} values that are NaN or infinite; copy it again, or "
            "take an earlier checkpoint."
        )


def dtype_of(name: str) -> torch.dtype | None:
    """A dtype by its name in DTYPES; None as stored."""
    import torch

    return None if name == "auto" else getattr(torch, DTYPES[name])


def cast(name: str, tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """The tensor in another dtype, None in its own.

    Raises:
        CheckpointFault: values that the dtype cannot hold (fp16 ends at 65,504).
    """
    if dtype in (None, tensor.dtype):
        return tensor
    tensor = tensor.to(dtype)
    check_finite(f"{name} as {str(dtype).removeprefix('torch.')}", tensor)
    return tensor


def is_normalised(head: Any) -> bool:
    """Whether the first and last rows of a head ``(V, D)`` all have length 1."""
    import torch

    ends = torch.cat([head[:UNIT_ROWS], head[-UNIT_ROWS:]]).float()
    return bool(((torch.linalg.vector_norm(ends, dim=1) - 1).abs() < UNIT_SLACK).all())


def fold_head(weight: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """NormHead's weight ``(V, D)``, every row divided by its length: a plain head then gives its logits.

    Lengths and quotients are fp32; the result is of ``dtype``, None: the weight's.
    Source: baichuan-inc/Baichuan2 README, its conversion to a Baichuan-1 model.
    """
    import torch

    folded = torch.empty_like(weight, dtype=dtype)
    for low in range(0, weight.shape[0], ROWS):
        rows = weight[low : low + ROWS].float()
        folded[low : low + ROWS] = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(
            NORM_EPS
        )
    return folded
