"""Vocabulary and chat format of a GGUF file: what llama.cpp needs to give the ids that we give."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from baichuan_sft.errors import UserError
from baichuan_sft.export.source import Source
from baichuan_sft.model.chat_template_baichuan import ASSISTANT_TOKEN_ID, USER_TOKEN_ID

# sentencepiece_model.proto's numbers, which are GGUF's too
CONTROL, UNUSED = 3, 5
# What Baichuan's vocabulary rewrites and texts are full of: full-width ASCII, odd spaces and line ends, the
# ellipsis, degrees Celsius, Roman numerals and numbers in circles.
REWRITTEN = [*range(0xFF01, 0xFF5F), 0x3000, 0xA0, 0x200B, 0xFEFF, 0xD, 0x2026, 0x2103]
REWRITTEN += [*range(0x2160, 0x2180), *range(0x2460, 0x2474)]


@dataclass(frozen=True)
class Pieces:
    """A SentencePiece vocabulary in the terms of GGUF.

    Attributes:
        prefix: what SentencePiece puts before every text, a space (Baichuan) or nothing (Baichuan2).
        normalised: (as written, as SentencePiece rewrites it), the common ones; llama.cpp rewrites nothing.
    """

    texts: list[str]
    scores: list[float]
    types: list[int]
    prefix: str
    normalised: list[tuple[str, str]]


def vocabulary(source: Source) -> Pieces:
    """One entry per row of the embedding.

    The ``<reserved_N>`` and the added tokens are control pieces, which no text encodes to; llama.cpp would
    find user-defined ones in text. Added ones that a message could forge all the same are left out.

    The prefix is left to the chat template: llama.cpp would put it behind every user-defined piece as well,
    so that "1年" became "1 年".
    """
    from sentencepiece import sentencepiece_model_pb2

    schema: Any = sentencepiece_model_pb2  # its classes are made when it is imported
    model = schema.ModelProto.FromString(source.tokenizer_model)
    texts = [piece.piece for piece in model.pieces]
    scores = [piece.score for piece in model.pieces]
    types = [
        CONTROL if i in source.tokenizer.control_ids and i else p.type for i, p in enumerate(model.pieces)
    ]
    added = {i: text for text, i in source.tokenizer.get_added_vocab().items() if _breakable(text)}
    for i in range(len(texts), source.config.vocab_size):
        texts.append(added.get(i, f"[PAD{i}]"))
        scores.append(0.0)
        types.append(CONTROL if i in added else UNUSED)
    return Pieces(
        texts,
        scores,
        types,
        " " if model.normalizer_spec.add_dummy_prefix else "",
        _rewritten(source.tokenizer.sp_model) if model.normalizer_spec.precompiled_charsmap else [],
    )


def _breakable(text: str) -> bool:
    """Whether a space behind the first character always breaks it: "|a|" is left in "|a|a|", as "| a|a|"."""
    overlaps = any(text.startswith(text[i:]) for i in range(1, len(text)))
    return len(text) > 1 and " " not in text and not overlaps


def _rewritten(sp_model: Any) -> list[tuple[str, str]]:
    pairs = [(chr(code), sp_model.normalize(chr(code)).lstrip("▁") or " ") for code in REWRITTEN]
    return [(char, text) for char, text in pairs if char != text]


def chat_template(tokenizer: Any, pieces: Pieces) -> str:
    """The tokenizer's template for engines that parse control tokens in all of the rendered text.

    They would take ``<reserved_106>`` in a message for a turn, so a space goes into every literal of a
    control token.
    """
    added = sorted(filter(_breakable, tokenizer.get_added_vocab()))
    literals = dict.fromkeys(["<s>", "</s>", "<unk>", "<reserved_", *added])
    # Rewriting first: full-width <s> becomes one of the literals.
    pairs = [*pieces.normalised, *((text, f"{text[0]} {text[1:]}") for text in literals)]
    loop = "{%- for message in messages -%}\n"
    before, _, after = tokenizer.default_chat_template.partition(loop)
    written = "message['content']"
    assert written in after, "the chat template has changed"
    safe = (
        f"  {{%- set safe = namespace(text='{pieces.prefix}' + {written} if {written} else '') -%}}\n"
        "  {%- for pair in pairs -%}\n"
        "    {%- set safe.text = safe.text | replace(pair[0], pair[1]) -%}\n"
        "  {%- endfor -%}\n"
    )
    after = after.replace(f"'{pieces.prefix}' + {written}", "safe.text").replace(written, "safe.text")
    return f"{{%- set pairs = {json.dumps(pairs, ensure_ascii=False)} -%}}\n{before}{loop}{safe}{after}"


def modelfile(source: Source, pieces: Pieces, file: str) -> str:
    """Ollama's description of the model: prompt format and generation settings.

    Raises:
        UserError: a setting that is no number; a line end in it would write directives of its own.
    """
    user, assistant = source.tokenizer.convert_ids_to_tokens([USER_TOKEN_ID, ASSISTANT_TOKEN_ID])
    settings = source.settings
    sampled = settings.get("do_sample", False)
    parameters = {
        "num_ctx": source.config.context_length,
        "temperature": settings.get("temperature", 1.0) if sampled else 0,
        "top_k": settings.get("top_k") if sampled else None,
        "top_p": settings.get("top_p") if sampled else None,
        "repeat_penalty": settings.get("repetition_penalty", 1.0),
        "repeat_last_n": -1,  # the whole context, as in transformers
        "num_predict": settings.get("max_new_tokens"),
    }
    for name, value in parameters.items():
        if value is not None and (type(value) not in (int, float) or not math.isfinite(value)):
            raise UserError(
                f"{source.path / 'generation_config.json'}: {name} is {value!r}, expected a finite number; "
                "correct it, or remove it."
            )
    lines = [f"PARAMETER {name} {value}" for name, value in parameters.items() if value is not None]
    stops = [f'PARAMETER stop "{text}"' for text in ("</s>", user)]
    template = (
        "{{- range $i, $_ := .Messages }}"
        f'{{{{- if eq .Role "user" }}}}{user}{{{{ else if eq .Role "assistant" }}}}{assistant}{{{{ end }}}}'
        f"{pieces.prefix}{{{{ .Content }}}}"
        '{{- if and (ne .Role "assistant") (eq (len (slice $.Messages $i)) 1) }}'
        f"{assistant}{{{{ end }}}}{{{{- end }}}}"
    )
    return "\n".join(
        [
            "# Written by baichuan-sft and not run: it was made after Ollama's documentation.",
            "# Ollama parses control tokens in all of the prompt: a message that holds one can forge a turn.",
            f"FROM ./{file}",
            f'TEMPLATE """{template}"""',
            *lines,
            *stops,
            "",
        ]
    )
