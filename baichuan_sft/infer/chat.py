"""What ``baichuan-sft chat`` is given and what it loads: options, model, tokenizer."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any

from baichuan_sft.arguments import DTYPES, Parser, at_least_1, number
from baichuan_sft.errors import EnvironmentFault, UserError
from baichuan_sft.quantization import add_model_options, num_elements, quantization_of, stored_quantization
from baichuan_sft.quantization import device as device_of
from baichuan_sft.variants import architecture

CHARACTERS_PER_TOKEN = 32  # the longest piece of either vocabulary
EXAMPLE = """baichuan-sft chat out
  baichuan-sft chat out/checkpoint-100 --greedy --system 'Answer briefly.'
  baichuan-sft chat Baichuan2-13B-Chat --dtype bf16 --quantize nf4
  baichuan-sft chat Baichuan2-7B-Chat --dtype bf16 --compile --temperature 0.3 --top_p 0.85 < questions.txt"""


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
    add_model_options(parser)
    parser.add_argument(
        "--compile", action="store_true", help="static cache and CUDA graphs: faster after the first answer"
    )
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
        EnvironmentFault: no such device, or one that cannot do what was asked.
    """
    from transformers import set_seed
    from transformers.utils.logging import disable_progress_bar

    from baichuan_sft.checkpoint import base_of, load_config, load_model, load_tokenizer

    device = device_of(args.device)
    if args.compile:
        _check_compile(args.quantize, device)
    if not sys.stderr.isatty():
        disable_progress_bar()
    config, tokenizer = load_config(base_of(args.path)), load_tokenizer(args.path)
    _check_fit(args, config, tokenizer)
    if args.compile and (stored := stored_quantization(config)):
        raise UserError(
            f"{args.path}: is {stored}, which transformers does not compile; leave --compile out."
        )
    model = load_model(args.path, dtype=DTYPES[args.dtype], device=device, quantize=args.quantize)
    model.requires_grad_(False)  # NormHead then keeps the norms of its rows
    if args.seed is not None:
        set_seed(args.seed)
    return model, tokenizer


def _check_compile(quantize: str | None, device: str) -> None:
    if quantize:
        raise UserError(
            f"--compile and --quantize {quantize} are both given; transformers compiles no bitsandbytes "
            "model. Keep --compile for speed, --quantize for memory."
        )
    if device.startswith("cpu"):
        raise EnvironmentFault("--compile: transformers compiles on GPUs only, this is a CPU; leave it out.")


def static_cache(model: Any) -> Any:
    """A key-value cache of the whole context, on which ``generate`` compiles the step of one token.

    Of the whole context from the start: for one that grows with the conversation each turn would be compiled
    anew.
    """
    from transformers import StaticCache

    return StaticCache(config=model.config, max_cache_len=model.config.context_length)


def states(chat: Any, messages: list[dict[str, Any]], show: Callable[[str], None]) -> None:
    """Call ``show`` with the whole answer so far, after each token.

    Args:
        chat: model, tokenizer and options, a static cache among them or not (``terminal.Conversation``).
    """
    cache = chat.options.get("past_key_values")
    if cache is None:
        # Streamed in any case: only a stream can be stopped and still leave what it had.
        with contextlib.closing(
            chat.model.chat(chat.tokenizer, messages, stream=True, **chat.options)
        ) as stream:
            for state in stream:
                show(state)
        return
    cache.reset()
    # In this thread: CUDA graphs belong to the one that recorded them, and a stream starts its own.
    chat.model.chat(chat.tokenizer, messages, streamer=_streamer(chat.tokenizer, show), **chat.options)


def _streamer(tokenizer: Any, show: Callable[[str], None]) -> Any:
    """What ``generate`` hands the prompt and then each token to."""
    from transformers.generation.streamers import BaseStreamer

    from baichuan_sft.model.chat_baichuan import answer_text

    class Streamer(BaseStreamer):
        ids: list[int] | None = None  # before the prompt

        def put(self, value: Any) -> None:
            if self.ids is None:
                self.ids = []
                return
            self.ids += value.reshape(-1).tolist()
            show(answer_text(tokenizer, self.ids))

        def end(self) -> None:
            """Nothing: ``generate`` returns."""

    return Streamer()


def _check_fit(args: Any, config: Any, tokenizer: Any) -> None:
    from baichuan_sft.checkpoint import check_vocabulary

    check_vocabulary(args.path, config, tokenizer)
    check_room(args, config.context_length)


def check_room(args: Any, context_length: int) -> None:
    """
    Raises:
        UserError: an answer as long as the context, which leaves none for the question.
    """
    if args.max_new_tokens is not None and args.max_new_tokens >= context_length:
        raise UserError(
            f"--max_new_tokens {args.max_new_tokens} leaves no room for a question in the model's "
            f"{context_length} tokens."
        )


def check_text(text: str, context_length: int) -> None:
    """Refuse at once what would take minutes to tokenise and be cut, or could not be tokenised at all.

    Raises:
        UserError: more than the context can hold, or half of a surrogate pair.
    """
    if len(text) > (most := context_length * CHARACTERS_PER_TOKEN):
        raise UserError(
            f"this text has {len(text):,} characters, the model's {context_length:,} tokens hold {most:,} at "
            "most; nothing was sent. Send a part of it."
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise UserError(f"text has a lone surrogate U+{code:04X} at character {error.start}.") from None


def describe(model: Any) -> str:
    """One line: architecture, size, dtype, device and adapter of what was loaded."""
    shape = f"{architecture(model.config)} shape"
    # An adapter's parameters are wrapped around the base's, not beside them.
    base = sum(num_elements(weight) for name, weight in model.named_parameters() if "lora_" not in name)
    line = f"{shape}, {base:,} parameters, {str(model.dtype).removeprefix('torch.')} on {model.device}"
    if quantized := quantization_of(model):
        line += f", linear layers in {quantized}"
    for adapter in getattr(model, "peft_config", {}).values():
        line += f", adapter {','.join(sorted(adapter.target_modules))} r={adapter.r}"
    return line
