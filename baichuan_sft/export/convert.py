"""``baichuan-sft convert``: a checkpoint checked and written in another form."""

from __future__ import annotations

import importlib
from pathlib import Path

from baichuan_sft.arguments import Parser, number
from baichuan_sft.checkpoint.files import is_adapter
from baichuan_sft.errors import UserError, pick
from baichuan_sft.export.gguf import TYPES
from baichuan_sft.export.source import DTYPES, open_source
from baichuan_sft.export.writer import new_directory

# name -> ("module:function(source, out, args) -> lines of the report", what it is for). A module may also
# have write_adapter(path, out, args), for a LoRA adapter instead of a model.
EXPORTERS = {
    "hf": ("baichuan_sft.export.modernise:to_hf", "today's files: safetensors, tokenizer, template, code"),
    "baichuan1": (
        "baichuan_sft.export.modernise:to_baichuan1",
        "Baichuan2 with a plain head: NormHead folded",
    ),
    "llama": ("baichuan_sft.export.llama:write", "7B as LlamaForCausalLM, for every server; adapters too"),
    "gguf": ("baichuan_sft.export.gguf:write", "one file for llama.cpp and Ollama"),
}
EXAMPLE = """baichuan-sft convert Baichuan2-7B-Chat Baichuan2-7B-Chat-new
  baichuan-sft convert Baichuan2-13B-Chat plain-head --to baichuan1 --dtype bf16
  baichuan-sft convert out out-llama --to llama
  baichuan-sft convert out out-gguf --to gguf"""


def build_parser() -> Parser:
    parser = Parser(
        prog="baichuan-sft convert",
        description="Check a model of the family and write it in another form; nothing in SRC is run.",
        example=EXAMPLE,
    )
    targets = "; ".join(f"{name}: {text}" for name, (_, text) in EXPORTERS.items())
    at_least = number(float, "a number > 0", lambda x: x > 0)
    parser.add_argument("src", metavar="SRC", help="model directory, the vendor's or anyone's; or an adapter")
    parser.add_argument("dst", metavar="DST", type=Path, help="directory to write, not there yet or empty")
    parser.add_argument("--to", default="hf", metavar="FORM", help=f"{targets} (default: hf)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights (auto: as stored)")
    parser.add_argument("--gguf_type", choices=TYPES, help="of the weights with --to gguf (default: f16)")
    parser.add_argument(
        "--dequantize",
        action="store_true",
        help="SRC is quantised by the vendor's own code: unpack its weights",
    )
    parser.add_argument(
        "--max_shard_gib",
        type=at_least,
        default=5.0,
        metavar="X",
        help="largest file of weights (default: 5)",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Write SRC in another form and say what changed.

    Raises:
        UserError: no such form, SRC is no model for it, DST is not empty.
        CheckpointFault: SRC is damaged, or holds more than tensors. EnvironmentFault: no room.
    """
    args = build_parser().parse_args(argv)
    module, _, function = pick("form", args.to, EXPORTERS)[0].partition(":")
    if args.gguf_type and args.to != "gguf":
        raise UserError(f"--gguf_type {args.gguf_type} goes with --to gguf; leave it out of --to {args.to}.")
    exporter = importlib.import_module(module)
    new_directory(args.dst)
    if is_adapter(args.src):
        if args.dequantize:
            raise UserError(f"{args.src}: an adapter, which is never quantised; leave --dequantize out.")
        if not hasattr(exporter, "write_adapter"):
            raise UserError(
                f"{args.src}: an adapter, which has no form {args.to!r} of its own; `baichuan-sft merge` "
                "makes a whole model of it and its base."
            )
        report = exporter.write_adapter(Path(args.src), args.dst, args)
    else:
        source = open_source(args.src, dequantize=args.dequantize)
        report = [*source.notes, *getattr(exporter, function)(source, args.dst, args)]
    print("\n".join([f"{args.src} -> {args.dst} ({args.to})", *(f"  {line}" for line in report)]))
    return 0
