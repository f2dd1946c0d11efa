"""A vendor's or third party's checkpoint in today's form, or with NormHead folded for Baichuan-1 engines."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baichuan_sft.checkpoint.files import MERGED
from baichuan_sft.errors import UserError
from baichuan_sft.export.source import Source, cast, dtype_of, fold_head
from baichuan_sft.export.writer import Writer, finish

if TYPE_CHECKING:
    from baichuan_sft.model.configuration_baichuan import BaichuanConfig

HEAD = "lm_head.weight"


def to_hf(source: Source, out: Path, args: Any) -> list[str]:
    """The same weights under the same names, as safetensors with everything that loads them."""
    rounded = _write(source, out, args, clean_config(source.config))
    whole = [] if source.packed else ["nothing is lost: every weight has the value of the source's"]
    return [*(rounded or whole), *_use(out)]


def to_baichuan1(source: Source, out: Path, args: Any) -> list[str]:
    """NormHead's rows divided by their lengths, and a plain head: what engines for Baichuan-1 compute.

    Raises:
        UserError: the model has a plain head already.
    """
    if source.config.lm_head != "norm":
        raise UserError(f"{source.path}: has a plain head already, as Baichuan-1; --to hf keeps it.")
    config = clean_config(source.config, lm_head="plain")
    rounded = _write(source, out, args, config, fold=True)
    written = dtype_of(args.dtype) or source.part(HEAD)[:1].dtype
    folded = (
        f"{HEAD}: rows divided by their lengths, each value rounded by up to {rounding(written)}; the "
        "lengths are lost, so train the source and not this"
    )
    return [*rounded, folded, *_use(out)]


def rounding(dtype: Any) -> str:
    """The largest error of a value written in a dtype, in words."""
    import torch

    limits = torch.finfo(dtype)
    small = f", below {limits.tiny:.0e} by up to {limits.tiny * limits.eps / 2:.0e}"
    return f"{limits.eps / 2:.1g} of its size{small if dtype == torch.float16 else ''}"


def clean_config(config: BaichuanConfig, **changes: Any) -> BaichuanConfig:
    """A configuration of the family's and our own settings alone, without what else config.json may hold."""
    from baichuan_sft.model.configuration_baichuan import BaichuanConfig

    known = {*inspect.signature(BaichuanConfig.__init__).parameters, MERGED}
    kept = {name: value for name, value in config.to_dict().items() if name in known}
    if changes.get("lm_head") == "plain":
        kept.pop("z_loss_weight", None)  # its presence marks a Baichuan2 model
    return BaichuanConfig(**{**kept, **changes})


def _write(source: Source, out: Path, args: Any, config: BaichuanConfig, *, fold: bool = False) -> list[str]:
    """Every tensor in the dtype asked for, and all the rest; returns a line where that rounds any."""
    import torch

    wanted, stored = dtype_of(args.dtype), set()
    with Writer(out, max_shard_gib=args.max_shard_gib, expected_bytes=source.num_bytes(wanted)) as writer:
        for name in source.names():
            tensor = source.tensor(name)
            stored.add(tensor.dtype)
            if fold and name == HEAD:
                tensor = fold_head(tensor, wanted)
            writer.add(name, cast(f"{source.path}: {name}", tensor, wanted))
    # Loaded as stored; of several dtypes the one that loses nothing.
    config.dtype = wanted or (stored.pop() if len(stored) == 1 else torch.float32)
    finish(out, config, source.tokenizer, source.settings, converted_to=args.to, source=source.path.name)
    narrowed = stored - {wanted, None} if wanted not in (None, torch.float32) else set()
    if not narrowed:
        return []
    names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in narrowed))
    return [f"weights: {names} rounded to {args.dtype}, each by up to {rounding(wanted)}"]


def _use(out: Path) -> list[str]:
    return [
        f"use it:  baichuan-sft chat {out}",
        f"train:   baichuan-sft train --model_name_or_path {out} --data_path FILE --output_dir DIR",
        f"without this package:  AutoModelForCausalLM.from_pretrained({str(out)!r}, trust_remote_code=True)",
    ]
