"""What the vendor published: the README tables of the family, with all models in them.

Source: README_EN.md of baichuan-inc/Baichuan2 at ed1cf0f (2024-02-26), README.md of baichuan-inc/Baichuan-13B
(its chat, int8 and int4 models). Earlier versions differ in a few figures of BBH and HumanEval, and
Baichuan-7B's own README in its Gaokao (36.24).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Columns are benchmarks; "# 7B" and "# 13B" say in which table of the README the models below stand.
_TABLES = (
    """
    columns ceval mmlu cmmlu gaokao agieval bbh jecqa medical medqa-usmle medqa-mcmle medmcqa
    # 7B 13B
    GPT-4 68.40 83.93 70.33 66.15 63.27 75.12 59.32 77.16 80.28 74.58 72.51
    GPT-3.5-Turbo 51.10 68.54 54.06 47.07 46.13 61.59 42.31 61.17 53.81 52.92 56.25
    # 7B
    LLaMA-7B 27.10 35.10 26.75 27.81 28.17 32.38 27.45 33.34 24.12 21.72 27.45
    LLaMA2-7B 28.90 45.73 31.38 25.97 26.53 39.16 29.20 36.75 27.49 24.78 37.93
    MPT-7B 27.15 27.93 26.00 26.54 24.83 35.20 27.45 26.67 16.97 19.79 31.96
    Falcon-7B 24.23 26.03 25.66 24.24 24.10 28.77 23.66 25.33 21.29 18.07 33.88
    ChatGLM2-6B 50.20 45.90 49.00 49.44 45.28 31.65 40.76 44.54 26.24 45.53 30.22
    Baichuan-7B 42.80 42.30 44.02 36.34 34.44 32.48 34.64 42.37 27.42 39.46 31.39
    Baichuan2-7B-Base 54.00 54.16 57.07 47.47 42.73 41.56 44.46 56.39 32.68 54.93 41.73
    # 13B
    LLaMA-13B 28.50 46.30 31.15 28.23 28.22 37.89 27.54 35.14 28.83 23.38 39.52
    LLaMA2-13B 35.80 55.09 37.99 30.83 32.29 46.98 34.08 47.42 35.04 29.74 42.12
    Vicuna-13B 32.80 52.00 36.28 30.11 31.55 43.04 28.38 40.99 34.80 27.67 40.66
    Chinese-Alpaca-Plus-13B 38.80 43.90 33.43 34.78 35.46 28.94 35.32 46.31 27.49 32.66 35.87
    XVERSE-13B 53.70 55.21 58.44 44.69 42.54 38.06 46.42 58.08 32.99 58.76 41.34
    Baichuan-13B-Base 52.40 51.60 55.30 49.69 43.20 43.01 41.34 51.77 29.07 43.67 39.60
    Baichuan2-13B-Base 58.10 59.17 61.97 54.33 48.17 48.78 47.40 59.33 40.38 61.62 42.86
    """,
    """
    columns gsm8k math humaneval mbpp flores-en flores-fr flores-es flores-ar flores-ru flores-ja flores-de
    # 7B 13B
    GPT-4 89.99 40.20 69.51 63.60 29.94 29.56 20.01 10.76 18.62 13.26 20.83
    GPT-3.5-Turbo 57.77 13.96 52.44 61.40 27.67 26.15 19.58 10.73 17.45 1.82 19.70
    # 7B
    LLaMA-7B 9.78 3.02 11.59 14.00 17.27 12.02 9.54 0.00 4.47 1.41 8.73
    LLaMA2-7B 16.22 3.24 12.80 14.80 25.76 15.14 11.92 0.79 4.99 2.20 10.15
    MPT-7B 8.64 2.90 14.02 23.40 20.77 9.53 8.96 0.10 3.54 2.91 6.54
    Falcon-7B 5.46 1.68 - 10.20 22.13 15.67 9.28 0.11 1.35 0.41 6.41
    ChatGLM2-6B 28.89 6.40 9.15 9.00 22.28 9.42 7.77 0.64 1.78 0.26 4.61
    Baichuan-7B 9.17 2.54 9.20 6.60 25.07 16.51 12.72 0.41 6.66 2.24 9.86
    Baichuan2-7B-Base 24.49 5.58 18.29 24.20 27.27 20.87 16.17 1.39 11.21 3.11 12.76
    # 13B
    LLaMA-13B 20.55 3.68 15.24 21.40 21.75 16.16 13.29 0.58 7.61 0.41 10.66
    LLaMA2-13B 28.89 4.96 15.24 27.00 25.44 19.25 17.49 1.38 10.34 0.13 11.13
    Vicuna-13B 28.13 4.36 16.46 15.00 22.63 18.04 14.67 0.70 9.27 3.59 10.25
    Chinese-Alpaca-Plus-13B 11.98 2.50 16.46 20.00 22.53 13.82 11.29 0.28 1.52 0.31 8.13
    XVERSE-13B 18.20 2.18 15.85 16.80 29.26 24.03 16.67 2.78 11.61 3.08 14.26
    Baichuan-13B-Base 26.76 4.84 11.59 22.80 30.24 20.90 15.92 0.98 9.65 2.64 12.00
    Baichuan2-13B-Base 52.77 10.08 17.07 30.20 30.61 22.11 17.27 2.39 14.17 11.58 14.53
    """,
    """
    columns ceval mmlu cmmlu
    #
    Baichuan-13B-Chat 51.5 52.1 55.8
    Baichuan-13B-Base-int8 51.2 49.9 54.5
    Baichuan-13B-Base-int4 47.6 46.0 51.0
    Baichuan2-7B-Chat 54.35 52.93 54.99
    Baichuan2-7B-Chat-4bits 53.04 51.72 52.84
    Baichuan2-13B-Chat 56.74 57.32 59.68
    Baichuan2-13B-Chat-4bits 56.05 56.24 58.82
    """,
)
SOURCE = "README tables of baichuan-inc/Baichuan2 and baichuan-inc/Baichuan-13B (chat and quantised)"
_FLORES = "published: by OpenCompass, on the first 100 sentences, BLEU tokenised by 13a"
# Why a figure of ours is not measured in quite the same way, or on the same items.
REMARKS = {
    "ceval": "published: the mean over subjects; base models on the test split, whose answers are not "
    "public; chat models on val",
    "gaokao": "published: a random split that is not public",
    "agieval": "published: a random split that is not public",
    "bbh": "published: the mean over tasks, by OpenCompass",
    "jecqa": "published: the single-choice items, of which part of JEC-QA is not said",
    **{
        f"flores-{code}": f"{_FLORES}: comparable but for the items"
        for code in ("en", "fr", "es", "ar", "ru", "de")
    },
    "flores-ja": f"{_FLORES}, which takes Japanese for a few long words: not comparable",
}
BASES = {
    "baichuan-7b": "Baichuan-7B",
    "baichuan-13b": "Baichuan-13B-Base",
    "baichuan2-7b": "Baichuan2-7B-Base",
    "baichuan2-13b": "Baichuan2-13B-Base",
}
# READMEs of each; Baichuan 2: 2.64 trillion in the Chinese one, rounded to 2.6 in the English one.
TRAINED_TOKENS = {
    "Baichuan-7B": 1.2e12,
    "Baichuan-13B-Base": 1.4e12,
    "Baichuan2-7B-Base": 2.64e12,
    "Baichuan2-13B-Base": 2.64e12,
}


def _parsed() -> tuple[dict[str, dict[str, float]], dict[str, list[str]]]:
    figures: dict[str, dict[str, float]] = {}
    tables: dict[str, list[str]] = {}
    for table in _TABLES:
        for name, *words in map(str.split, table.strip().splitlines()):
            if name == "columns":
                columns = words
            elif name == "#":
                sizes = words
            else:
                values = {column: float(word) for column, word in zip(columns, words) if word != "-"}
                figures.setdefault(name, {}).update(values)
                for size in sizes:
                    if name not in tables.setdefault(size, []):
                        tables[size].append(name)
    return figures, tables


FIGURES, TABLES = _parsed()  # model -> benchmark -> percent or BLEU; "7B", "13B" -> models as in the README
_NAMES = {name.lower(): name for name in FIGURES} | BASES


def name_of(facts: Mapping[str, Any]) -> str | None:
    """The published model that this is or was made from; None of another shape, or of a model half trained.

    Args:
        facts: of a model in results.json: path, revision, variant, quantization.
    """
    variant = facts.get("variant")
    if variant not in BASES or str(facts.get("revision")).startswith("train_"):
        return None
    parts = re.split(r"[/\\]|--", str(facts.get("path", "")).lower())  # a cache has models--owner--name
    own = BASES[variant].removesuffix("-Base")  # a run may lie below another model
    names = [_NAMES[part] for part in parts if _NAMES.get(part, "").startswith(own)]
    name = names[-1] if names else BASES[variant]
    ends = {"nf4": ("-4bits", "-int4"), "int8": ("-int8",)}.get(str(facts.get("quantization")), ())
    return next((name + end for end in ends if name + end in FIGURES), name)


def figure(benchmark: str, model: str | Mapping[str, Any]) -> float | None:
    """Percent or BLEU as published, None where nothing is.

    Args:
        model: a variant ("baichuan2-7b" is its base model), a name ("Baichuan2-7B-Chat") or the facts of
            ``name_of``.
    """
    name = name_of(model) if isinstance(model, Mapping) else _NAMES.get(model.rsplit("/", 1)[-1].lower())
    return FIGURES.get(name or "", {}).get(benchmark)
