"""``baichuan-sft quantize``: the linears of a model in 8 or 4 bits on disk, and what that costs."""

from __future__ import annotations

import math
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baichuan_sft.arguments import DTYPES, Parser, at_least_1
from baichuan_sft.checkpoint import (
    check_vocabulary,
    expected_shapes,
    load_config,
    load_model,
    load_tokenizer,
)
from baichuan_sft.checkpoint.files import is_adapter, read_json, weight_files
from baichuan_sft.checkpoint.quantised import check_rows
from baichuan_sft.data.arguments import add_options
from baichuan_sft.errors import CheckpointFault, NumericalFault, UserError
from baichuan_sft.export.writer import GIB, Writer, finish, new_directory
from baichuan_sft.quantization import (
    QUANTIZATIONS,
    device,
    require_bitsandbytes,
    stored_quantization,
    weight_bytes,
)
from baichuan_sft.variants import architecture

EXAMPLE = """baichuan-sft quantize Baichuan2-13B-Chat chat-nf4 --to nf4 --file data/belle_chat.json --num 100
  baichuan-sft quantize out out-int8 --to int8 --dtype bf16"""
Scores = tuple[float, float, float]  # C-Eval, MMLU, CMMLU; five-shot, percent


@dataclass(frozen=True)
class Published:
    """What the vendor measured of one model, whole and quantised, by the name here that is closest."""

    model: str
    whole: Scores
    quantised: dict[str, tuple[str, Scores]]  # name in QUANTIZATIONS -> what the vendor's was, its scores
    source: str


PUBLISHED = {
    "baichuan-13b": Published(
        "Baichuan-13B-Base",
        (52.4, 51.6, 55.3),
        {
            "int8": ("its own int8, a scale per row", (51.2, 49.9, 54.5)),
            "nf4": ("its own int4, a scale per row", (47.6, 46.0, 51.0)),
        },
        "baichuan-inc/Baichuan-13B README",
    ),
    "baichuan2-7b": Published(
        "Baichuan2-7B-Chat",
        (54.35, 52.93, 54.99),
        {"nf4": ("NF4", (53.04, 51.72, 52.84))},
        "baichuan-inc/Baichuan2 README",
    ),
    "baichuan2-13b": Published(
        "Baichuan2-13B-Chat",
        (56.74, 57.32, 59.68),
        {"nf4": ("NF4", (56.05, 56.24, 58.82))},
        "baichuan-inc/Baichuan2 README",
    ),
}


@dataclass(frozen=True)
class Measured:
    """One row of the table: bytes in memory and in the weight files; perplexity where a file was given."""

    name: str
    memory: int
    disk: int
    perplexity: float | None


def build_parser() -> Parser:
    parser = Parser(
        prog="baichuan-sft quantize",
        description="Write a model with its linear layers in 8 or 4 bits (bitsandbytes), load it again, and "
        "say what was gained and lost.",
        example=EXAMPLE,
    )
    parser.add_argument("source", metavar="DIR", help="directory of a model with whole weights")
    parser.add_argument("out", metavar="OUT", help="a directory that does not exist yet")
    parser.add_argument("--to", required=True, choices=QUANTIZATIONS, help="8 bits, or 4")
    parser.add_argument("--file", metavar="FILE", help="data to measure perplexity on, before and after")
    parser.add_argument(
        "--num", type=at_least_1, metavar="N", help="so many conversations of it, the first (all)"
    )
    add_options(parser, ["data_format"])
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="of what stays whole (auto: as stored)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (cuda where there is one)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit code 0.

    Raises:
        UserError: no whole model there, or nothing can be written. CheckpointFault: damaged weights, or what
            was written does not give the same logits when it is loaded. EnvironmentFault: no such device.
        NumericalFault: the loss or the logits are no numbers.
    """
    from rich.console import Console
    from transformers.utils.logging import disable_progress_bar

    args = build_parser().parse_args(argv)
    if not sys.stderr.isatty():
        disable_progress_bar()
    before, after = quantize(args)
    console = Console(highlight=False)
    console.print(table(before, after, args.to))
    name = architecture(load_config(args.out))
    console.print(published(name, args.to), "", sep="\n")
    console.print(f"{args.out}: loaded again with equal logits. Use it:", soft_wrap=True)
    console.print(f"  baichuan-sft chat {args.out}", soft_wrap=True, markup=False)
    return 0


def quantize(args: Any) -> tuple[Measured, Measured]:
    """Write ``args.out`` and measure both; ``main`` has the errors."""
    import torch

    source, out = Path(args.source), Path(args.out)
    config = check_source(source, args.to)
    new_directory(out)
    if args.file is None and (given := [name for name in ("num", "data_format") if getattr(args, name)]):
        raise UserError(f"--{given[0]} is given without --file, and would do nothing.")
    tokenizer = load_tokenizer(source)
    tokenizer.chat_template = tokenizer.default_chat_template  # the directory's would be Jinja from somewhere
    check_vocabulary(source, config, tokenizer)
    segments = read_segments(args, config, tokenizer) if args.file else []
    options: dict[str, Any] = dict(dtype=DTYPES[args.dtype], device=device(args.device))
    loss_before = None
    if segments:
        loss_before = perplexity(load_model(source, **options), segments, str(source))

    model = load_model(source, quantize=args.to, **options, check_files=not segments)
    whole_bytes = model.dtype.itemsize * sum(math.prod(shape) for shape in expected_shapes(config).values())
    tensors = model.state_dict()  # before the first forward, at which bitsandbytes may repack, with a loss
    expected = probe(model)
    if not torch.isfinite(expected).all():
        raise NumericalFault(f"{source}: its logits are not finite; try --dtype bf16, or fp32.")
    write(model, tensors, tokenizer, source, out, args.to)
    del model, tensors
    try:
        model = load_model(out, device=options["device"])
        if not torch.equal(probe(model), expected):
            raise CheckpointFault(f"{out}: gives other logits than what was written, and was removed.")
        loss_after = perplexity(model, segments, str(out)) if segments else None
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    return (
        Measured(str(source), whole_bytes, size(source), loss_before),
        Measured(str(out), weight_bytes(model), size(out), loss_after),
    )


def check_source(source: Path, to: str) -> Any:
    """Its configuration.

    Raises:
        UserError: an adapter, quantised already, or of a shape that 4 bits do not fit. EnvironmentFault: no
            bitsandbytes.
    """
    if is_adapter(source):
        raise UserError(
            f"{source}: an adapter, not a whole model; merge it first: baichuan-sft merge {source} MERGED"
        )
    config = load_config(source)
    if (stored := stored_quantization(config)) is not None:
        raise UserError(
            f"{source}: is quantised already ({stored}), a second time would round twice; give the 16-bit "
            "model that it was made from."
        )
    require_bitsandbytes(f"--to {to}")
    check_rows(source, config, to)
    return config


def write(model: Any, tensors: dict[str, Any], tokenizer: Any, source: Path, out: Path, to: str) -> None:
    """The directory: weights, the code that loads them elsewhere, tokenizer, settings, manifest."""
    settings = source / "generation_config.json"
    with Writer(out, expected_bytes=weight_bytes(model)) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor.cpu().clone())  # bitsandbytes' layers share their code, files cannot
    facts = {"quantized": {"to": to, "from": str(source)}}
    finish(out, model.config, tokenizer, read_json(settings) if settings.is_file() else {}, **facts)


def size(directory: Path) -> int:
    return sum(file.stat().st_size for file in weight_files(directory))


def probe(model: Any) -> Any:
    """Logits of a fixed row of 32 tokens, on the CPU."""
    import torch

    ids = torch.arange(1, 33, device=model.device)[None] * (model.config.vocab_size // 33)
    with torch.no_grad():
        return model(ids).logits.cpu()


# --- perplexity -------------------------------------------------------------------------------------


def read_segments(args: Any, config: Any, tokenizer: Any) -> list[tuple[Any, Any]]:
    """Ids and labels of the first ``args.num`` conversations, none longer than the model's context.

    Raises:
        UserError: the file cannot be read, or has nothing to predict.
    """
    from baichuan_sft.data.check import Rules
    from baichuan_sft.data.dataset import build_dataset

    rules = Rules(max_length=config.context_length, data_format=args.data_format)
    data = build_dataset(args.file, tokenizer, rules)
    print(f"data: {data.report}")
    count = min(args.num or len(data.train), len(data.train))
    return [(one["input_ids"], one["labels"]) for one in map(data.train.__getitem__, range(count))]


def perplexity(model: Any, segments: list[tuple[Any, Any]], name: str) -> float:
    """exp of the mean cross-entropy over all targets of all segments, each target counted alike; no z-loss.

    Raises:
        NumericalFault: it is no number.
    """
    import torch
    from rich.console import Console
    from rich.progress import track

    total, count = 0.0, 0
    console = Console(stderr=True)
    shown = track(segments, name, console=console, disable=not console.is_terminal, transient=True)
    for ids, labels in shown:
        batch = torch.tensor(ids, dtype=torch.long, device=model.device)[None]
        targets = torch.tensor(labels, dtype=torch.long, device=model.device)[None]
        with torch.no_grad():
            hidden = model.model(input_ids=batch, use_cache=False).last_hidden_state
            total += model.lm_head(hidden, targets, 1).item()  # divided by 1: the sum
        count += int((targets[:, 1:] >= 0).sum())
    if not math.isfinite(total):
        raise NumericalFault(f"{name}: its loss is {total}; try --dtype bf16, or fp32.")
    return math.exp(min(total / count, 700))  # e^710 is more than a float


# --- what is printed --------------------------------------------------------------------------------


def table(before: Measured, after: Measured, to: str) -> Any:
    from rich.table import Table

    result = Table("", "memory, GiB", "on disk, GiB", "perplexity")
    for name, row in (("before", before), (to, after)):
        loss = "-" if row.perplexity is None else f"{row.perplexity:.4f}"
        result.add_row(name, f"{row.memory / GIB:.4g}", f"{row.disk / GIB:.4g}", loss)
    if before.perplexity is not None and after.perplexity is not None:
        change = f"{after.perplexity / before.perplexity - 1:+.2%}"
        shares = (f"{after.memory / before.memory - 1:+.1%}", f"{after.disk / before.disk - 1:+.1%}")
        result.add_row("change", *shares, change)
    return result


def published(name: str, to: str) -> Any:
    """What the vendor says that its own quantisation of such a model costs, or that it says nothing."""
    from rich.table import Table

    known = PUBLISHED.get(name)
    if known is None or to not in known.quantised:
        return f"The vendor published no scores of {to} for {name}."
    how, scores = known.quantised[to]
    result = Table("five-shot, %", "C-Eval", "MMLU", "CMMLU", title=f"published: {known.source}")
    result.add_row(known.model, *(f"{x:g}" for x in known.whole))
    result.add_row(how, *(f"{x:g}" for x in scores))
    result.add_row("change", *(f"{y - x:+.2f}" for x, y in zip(known.whole, scores)))
    return result
