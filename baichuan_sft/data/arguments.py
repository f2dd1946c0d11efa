"""The flags that say what is read and what becomes of it; training and ``data`` share them."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, get_args, get_type_hints

from baichuan_sft.data.check import Rules
from baichuan_sft.data.files import ReadOptions
from baichuan_sft.data.formats import FORMATS
from baichuan_sft.data.length import TRUNCATION
from baichuan_sft.data.survey import DOCUMENT
from baichuan_sft.data.template import TRAIN_ON

TRUE, FALSE = ("true", "yes", "1"), ("false", "no", "0")


def option(default: Any, text: str, choices: Iterable[str] | None = None) -> Any:
    """A field with its help, as ``HfArgumentParser`` reads them."""
    metadata: dict[str, Any] = {"help": text} | ({"choices": list(choices)} if choices else {})
    return (
        field(metadata=metadata)
        if default is dataclasses.MISSING
        else field(default=default, metadata=metadata)
    )


@dataclass
class DataArguments:
    """What is trained on."""

    _argument_group_name = "data"

    data_path: str = option(
        dataclasses.MISSING, "FILE[:WEIGHT][#COUNT] with commas between, patterns, or a YAML list of sources."
    )
    data_format: str | None = option(
        None, "Format of the records; default: told from each record's keys.", [*FORMATS, DOCUMENT]
    )
    model_max_length: int = option(512, "Longest conversation, tokens.")
    truncation: str = option("cut_turns", "What becomes of longer ones.", TRUNCATION)
    train_on: str = option("all", "Assistant turns that are learnt.", TRAIN_ON)
    on_error: str = option("stop", "skip: leave faulty records out, and keep their bytes.", ["stop", "skip"])
    dedup: bool = option(False, "Leave out exact duplicates.")
    merge_consecutive: bool = option(False, "Join turns of one role in a row instead of refusing them.")
    encoding: str = option("utf-8", "Of the files; a Python codec, such as gb18030.")
    max_line_mib: int = option(64, "Longest record, MiB.")
    max_unpacked_gib: int = option(64, "Most that a .gz or .zst may unpack to, GiB.")
    allow_outside: bool = option(False, "A YAML list may name files outside its directory.")
    dev_ratio: float = option(0.0, "Share of the conversations that is held out for evaluation.")
    eval_data_path: str | None = option(None, "Conversations for evaluation, in files of their own.")
    packing: bool = option(True, "Pack conversations into rows; they never see each other.")
    packing_tokens: int | None = option(
        None, "Tokens of a packed row; default model_max_length times the rows per device."
    )
    streaming: bool = option(
        False, "Tokenise while training; for data larger than the disk. Needs --max_steps."
    )
    cache_dir: str | None = option(None, "Where prepared data is kept; default ~/.cache/baichuan_sft.")
    preprocessing_num_workers: int | None = option(
        None, "Processes that tokenise; default by size and cores."
    )

    def rules(self) -> Rules:
        """What decides what becomes of a record."""
        return Rules(
            max_length=self.model_max_length,
            train_on=self.train_on,
            truncation=self.truncation,
            data_format=self.data_format,
            merge_consecutive=self.merge_consecutive,
            reading=ReadOptions(
                encoding=self.encoding,
                max_line=self.max_line_mib << 20,
                max_unpacked=self.max_unpacked_gib << 30,
            ),
        )

    def options(self) -> dict[str, Any]:
        """Of ``build_dataset``, but for the files, the share held out and the seed."""
        return dict(
            on_error=self.on_error,
            dedup=self.dedup,
            cache_dir=self.cache_dir,
            num_workers=self.preprocessing_num_workers,
            allow_outside=self.allow_outside,
        )


def add_options(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """Flags for these fields of ``DataArguments``, for a parser that is not transformers' one."""
    hints = get_type_hints(DataArguments)
    fields = {one.name: one for one in dataclasses.fields(DataArguments)}
    for name in names:
        one, text = fields[name], fields[name].metadata["help"]
        kind = next(kind for kind in (bool, int, float, str) if kind in (hints[name], *get_args(hints[name])))
        options: dict[str, Any] = {"type": kind}
        if kind is bool:
            options = {"type": _truth, "nargs": "?", "const": True, "metavar": "True"}
        if "choices" in one.metadata:
            options["choices"] = one.metadata["choices"]
        shown = "" if "default" in text else f" Default {one.default}."
        parser.add_argument(
            f"--{name}", default=one.default, help=(text + shown).replace("%", "%%"), **options
        )


def with_truth(words: list[str]) -> list[str]:
    """The words with "True" after each flag that stands alone: what follows it may be a file."""
    flags = {f"--{name}" for name, hint in get_type_hints(DataArguments).items() if hint is bool}
    result = []
    for word, following in zip(words, [*words[1:], ""]):
        result.append(word)
        if word.replace("-", "_").replace("__", "--", 1) in flags and following.lower() not in TRUE + FALSE:
            result.append("True")
    return result


def _truth(text: str) -> bool:
    if text.lower() not in TRUE + FALSE:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() in TRUE
