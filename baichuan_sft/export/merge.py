"""``baichuan-sft merge``: a LoRA adapter put into its base, tensor by tensor."""

from __future__ import annotations

import gc
import json
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baichuan_sft import commit
from baichuan_sft.arguments import Parser, number
from baichuan_sft.checkpoint import load_model
from baichuan_sft.checkpoint.files import MERGED, is_adapter, opened, read_json, weight_files
from baichuan_sft.errors import CheckpointFault, UserError
from baichuan_sft.export.adapter import Adapter, Lora, digest, open_adapter
from baichuan_sft.export.modernise import clean_config
from baichuan_sft.export.source import DTYPES, cast, check_finite, dtype_of
from baichuan_sft.export.writer import Writer, finish
from baichuan_sft.machine import host_memory

if TYPE_CHECKING:
    import torch

EXAMPLE = """baichuan-sft merge out/lora out/merged
  baichuan-sft merge adapter merged --base /models/Baichuan2-7B-Base --dtype bf16"""
PROBE_TOKENS = 16
# Of the largest logit, computed in fp32. PEFT's merge, rounded as the files are, has the same sums in the
# same order; what differs is a few last bits.
TOLERANCE = 1e-4
# Where rounding undoes more of an update than this, a wider dtype is worth naming.
NOTABLE_LOSS = 0.1
NO_UPDATE = 1e-6  # of a weight's size: an untrained DoRA's rounding in fp32


def build_parser() -> Parser:
    parser = Parser(
        prog="baichuan-sft merge",
        description="Put a LoRA adapter into its base; the result is a whole model that needs neither.",
        example=EXAMPLE,
    )
    above_0 = number(float, "a number > 0", lambda x: x > 0)
    parser.add_argument("adapter", metavar="ADAPTER", help="directory of an adapter, or a checkpoint of one")
    parser.add_argument("out", metavar="OUT", type=Path, help="directory to write, not there yet or empty")
    parser.add_argument("--base", metavar="DIR", help="its base (default: where adapter_config.json says)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights (auto: the base's)")
    parser.add_argument(
        "--max_shard_gib", type=above_0, default=5.0, metavar="X", help="largest file of weights (default: 5)"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Write the merged model and say what was done to it.

    Raises:
        UserError: no adapter, not of this base, merged already, a quantised base, OUT is not empty.
        CheckpointFault: damaged files, or the result does not give the adapter's logits.
        EnvironmentFault: no room.
    """
    args = build_parser().parse_args(argv)
    if not is_adapter(args.adapter):
        raise UserError(
            f"{args.adapter}: no adapter, it has no adapter_config.json; name an adapter's directory."
        )
    adapter = open_adapter(args.adapter, args.base)
    report = [*adapter.base.notes, *merge(adapter, args.out, dtype_of(args.dtype), args.max_shard_gib)]
    report.append(compare_logits(adapter, args.out))
    print(
        "\n".join([f"{args.adapter} + {adapter.base.path} -> {args.out}", *(f"  {line}" for line in report)])
    )
    print(f"  use it:  baichuan-sft chat {args.out}")
    return 0


def merge(
    adapter: Adapter, out: Path, dtype: torch.dtype | None = None, max_shard_gib: float = 5.0
) -> list[str]:
    """Write base and adapter as one model, holding one shard and a few copies of one weight in memory.

    Args:
        dtype: of all weights; None: each as in the base.
    Returns:
        Lines of the report.
    Raises:
        UserError: it adapts a NormHead. CheckpointFault: NaN or Inf, before or after.
    """
    import torch

    base, modules, stored = adapter.base, set(adapter.modules), set()
    if "lm_head" in modules and base.config.lm_head == "norm":
        raise UserError(
            f"{adapter.path}: adapts lm_head, whose rows this model divides by their lengths: no weights are "
            "the two in one; use the adapter beside its base: baichuan-sft chat ADAPTER."
        )
    own = adapter.path / "generation_config.json"
    settings, config = read_json(own) if own.is_file() else base.settings, clean_config(base.config)
    mark = {"adapter": str(adapter.path), "base": str(base.path), "adapter_sha256": digest(adapter.path)}
    setattr(config, MERGED, mark)
    record = json.dumps({**adapter.run, MERGED: mark}, indent=1, ensure_ascii=False)
    sizes, lost = defaultdict(list), []
    with Writer(out, max_shard_gib=max_shard_gib, expected_bytes=base.num_bytes(dtype)) as writer:
        for name in base.names():
            module = name.removesuffix(".weight")
            weight = base.tensor(name)
            wanted = dtype or weight.dtype
            if name in adapter.saved:
                weight = adapter.replacement(name)
            if module in modules:
                exact = merged_weight(weight, adapter.lora(module))
                check_finite(f"{out}: {name}", exact)
                rounded = cast(f"{out}: {name}", exact, wanted)
                update = torch.linalg.vector_norm(exact - weight.float())
                norm = torch.linalg.vector_norm(weight, dtype=torch.float32)
                if update > NO_UPDATE * norm:
                    sizes[module.rpartition(".")[2]].append((update / norm).item())
                    miss = torch.linalg.vector_norm(exact - rounded.float())
                    lost.append((miss / update).item())
                weight = rounded
            weight = cast(f"{out}: {name}", weight, wanted)
            stored.add(weight.dtype)
            writer.add(name, weight)
        config.dtype = max(stored, key=lambda kind: kind.itemsize)
        commit.write_synced(out / "run.json", record + "\n")
    finish(out, config, base.tokenizer, settings, **{MERGED: mark})
    return [*lines(sizes, lost), *(f"{name}: the adapter's own" for name in adapter.saved), *notes(adapter)]


def merged_weight(weight: torch.Tensor, lora: Lora) -> torch.Tensor:
    """``W + scaling * B @ A`` in fp32 ``(out, in)``; with DoRA its rows then have the trained lengths.

    In PEFT's order of operations, so that both round alike.
    Source: Hu et al. 2021 (arXiv:2106.09685) sec. 4.1; Liu et al. 2024 (arXiv:2402.09353) eq. 5.
    """
    import torch

    whole = lora.b @ lora.a
    whole *= lora.scaling
    whole += weight.float()
    if lora.magnitude is not None:
        whole *= (lora.magnitude / torch.linalg.vector_norm(whole, dim=1))[:, None]
    return whole


def lines(sizes: dict[str, list[float]], lost: list[float]) -> list[str]:
    if not lost:
        return ["no linear changed: every B of the adapter is 0, as before training"]
    count, mean = len(lost), sum(lost) / len(lost)
    shares = ", ".join(f"{name} {sum(all_) / len(all_):.1e}" for name, all_ in sizes.items())
    report = [f"{count} linears changed, by a share of their size: {shares}"]
    loss = f"rounding the merged weights undoes {mean:.2%} of the change"
    more = "; --dtype fp32 keeps it" if mean > NOTABLE_LOSS else ""
    return [*report, loss + more if mean > 1e-5 else "nothing is lost but fp32 rounding"]


def notes(adapter: Adapter) -> list[str]:
    quantize = adapter.run.get("lora", {}).get("quantize")
    if quantize:
        return [
            f"it was trained on the base in {quantize}; merged into the whole weights its logits differ from "
            "those in training by what the quantisation did"
        ]
    return []


def compare_logits(adapter: Adapter, out: Path) -> str:
    """Logits of a few tokens by the merged files, the adapter and PEFT's own merge; skipped without memory.

    Raises:
        CheckpointFault: the files' are not those of PEFT's merge; they no longer count.
    """
    import torch
    from peft import PeftModel

    need = adapter.base.num_bytes(torch.float32) * 1.1
    if need > (free := host_memory()[1]):
        return (
            f"logits not compared: that takes {need / 2**30:.0f} GiB of memory, {free / 2**30:.0f} are free"
        )
    base = load_model(adapter.base.path, dtype=torch.float32, check_files=False)
    model = PeftModel.from_pretrained(base, adapter.path).eval()
    expected = probe(model)
    rounded = model.merge_and_unload()
    dtypes = {name: part[:1].dtype for file in weight_files(out) for name, part in opened(file).items()}
    for name, weight in rounded.state_dict().items():
        weight.copy_(weight.to(dtypes[name]))
    reference = probe(rounded)
    del base, model, rounded, weight
    gc.collect()  # they hold each other
    found = probe(load_model(out, dtype=torch.float32, check_files=False))
    fault, gap = ((other - found).abs().max().item() for other in (reference, expected))
    scale = expected.abs().max().item()
    tolerance = TOLERANCE * max(scale, 1.0)
    if not fault <= tolerance:
        commit.uncommit(out)
        raise CheckpointFault(
            f"{out}: its logits differ from those of PEFT's own merge by {fault:.2g}, more than "
            f"{tolerance:.2g}; delete it, and use the adapter beside its base."
        )
    return f"logits of {PROBE_TOKENS} tokens: the adapter's within {gap:.1e}, largest {scale:.1f} (fp32)"


def probe(model: Any) -> torch.Tensor:
    """Logits of tokens from all over the vocabulary."""
    import torch

    tokens = torch.arange(PROBE_TOKENS)[None] * (model.config.vocab_size // PROBE_TOKENS)
    with torch.inference_mode():
        return model(input_ids=tokens).logits
