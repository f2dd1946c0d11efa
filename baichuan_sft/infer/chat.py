"""What ``baichuan-sft chat`` is given and what it loads: options, model, tokenizer."""

from __future__ import annotations

import sys
from typing import Any

from baichuan_sft.arguments import Parser, at_least_1, number
from baichuan_sft.errors import EnvironmentFault, UserError, first_line

DTYPES = {"auto": "auto", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
EXAMPLE = """baichuan-sft chat out
  baichuan-sft chat out/checkpoint-100 --greedy --system 'Answer briefly.'
  baichuan-sft chat Baichuan2-7B-Chat --dtype bf16 --temperature 0.3 --top_p 0.85 < questions.txt"""


def build_parser() -> Parser:
    parser = Parser(
        prog="baichuan-sft chat",
        description="Talk to a model. Generation settings that are not given are the model's own.",
        example=EXAMPLE,
    )
    above_0 = number(float, "a finite number > 0", lambda x: x > 0)
    share = number(float, "a number > 0 and <= 1", lambda x: 0 < x <= 1)
    count = number(int, "a whole number of at least 0", lambda n: n >= 0)
    seed = number(int, "a whole number from 0 to 4294967295", lambda n: 0 <= n < 2**32)
    parser.add_argument("path", metavar="DIR", help="directory of a model, an adapter or a checkpoint")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights (auto: as stored)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (cuda where there is one)")
    parser.add_argument("--system", default="", metavar="TEXT", help="system message")
    parser.add_argument("--max_new_tokens", type=at_least_1, metavar="N", help="longest answer, tokens")
    parser.add_argument("--temperature", type=above_0, metavar="X", help="divides the logits")
    parser.add_argument("--top_p", type=share, metavar="X", help="sample from this share of probability")
    parser.add_argument("--top_k", type=count, metavar="N", help="sample from the N best tokens (0: all)")
    parser.add_argument("--repetition_penalty", type=above_0, metavar="X", help="1 is none")
    parser.add_argument("--greedy", action="store_true", help="always the best token, no sampling")
    parser.add_argument("--no_stream", action="store_true", help="print an answer when it is complete")
    parser.add_argument("--seed", type=seed, metavar="N", help="makes sampling repeatable")
    return parser


def generation_options(args: Any) -> dict[str, Any]:
    """What was given, by the names of ``GenerationConfig``; the model's own settings fill the rest.

    Raises:
        UserError: sampling settings together with ``--greedy``, which would ignore them.
    """
    given = {
        name: getattr(args, name)
        for name in ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty")
        if getattr(args, name) is not None
    }
    sampling = [name for name in ("temperature", "top_p", "top_k") if name in given]
    if args.greedy and sampling:
        raise UserError(f"--greedy and --{sampling[0]} are both given; greedy decoding does not sample.")
    if args.greedy:
        return {**given, "do_sample": False}
    return {**given, "do_sample": True} if sampling else given


def load(args: Any) -> tuple[Any, Any]:
    """Model and tokenizer of ``args.path`` as the options say, with the random state set.

    Raises:
        UserError: no Baichuan model there, or a tokenizer or an answer's length that does not fit it.
        EnvironmentFault: no such device.
    """
    from transformers import set_seed
    from transformers.utils.logging import disable_progress_bar

    from baichuan_sft.checkpoint import base_of, load_config, load_model, load_tokenizer

    device = _device(args.device)
    if not sys.stderr.isatty():
        disable_progress_bar()
    config, tokenizer = load_config(base_of(args.path)), load_tokenizer(args.path)
    _check_fit(args, config, tokenizer)
    model = load_model(args.path, dtype=DTYPES[args.dtype], device=device)
    if args.seed is not None:
        set_seed(args.seed)
    return model, tokenizer


def _device(name: str | None) -> str:
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return str(torch.empty(0, device=name).device)
    except (RuntimeError, AssertionError) as error:  # an assertion where torch is built without CUDA
        raise EnvironmentFault(f"--device {name}: {first_line(error)}") from None


def _check_fit(args: Any, config: Any, tokenizer: Any) -> None:
    from baichuan_sft.checkpoint import check_vocabulary

    check_vocabulary(args.path, config, tokenizer)
    if args.max_new_tokens is not None and args.max_new_tokens >= config.context_length:
        raise UserError(
            f"--max_new_tokens {args.max_new_tokens} leaves no room for a question in the model's "
            f"{config.context_length} tokens."
        )


def describe(model: Any) -> str:
    """One line: architecture, size, dtype, device and adapter of what was loaded."""
    shape = f"{architecture(model.config)} shape"
    # An adapter's parameters are wrapped around the base's, not beside them.
    base = sum(weight.numel() for name, weight in model.named_parameters() if "lora_" not in name)
    line = f"{shape}, {base:,} parameters, {str(model.dtype).removeprefix('torch.')} on {model.device}"
    for adapter in getattr(model, "peft_config", {}).values():
        line += f", adapter {','.join(sorted(adapter.target_modules))} r={adapter.r}"
    return line


def architecture(config: Any) -> str:
    """The name in VARIANTS whose position embedding and head these are."""
    from baichuan_sft.model.configuration_baichuan import BaichuanConfig
    from baichuan_sft.variants import VARIANTS

    for name, variant in VARIANTS.items():
        known = BaichuanConfig(**variant.config)
        if (known.position_embedding, known.lm_head) == (config.position_embedding, config.lm_head):
            return name
    raise AssertionError(f"no variant has {config.position_embedding} and {config.lm_head}")
