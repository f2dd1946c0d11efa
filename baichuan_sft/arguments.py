"""What the parsers of the small commands share: errors as ``UserError``, an example, checked numbers."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from baichuan_sft.errors import UserError, suggest


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, with an example under ``--help``, raising what it refuses.

    Args:
        example: command lines, shown after the options.
    """

    def __init__(self, *, example: str, **options: Any):
        super().__init__(
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **options,
        )

    def parse_args(self, args=None, namespace=None):  # type: ignore[override]
        """
        Raises:
            UserError: an unknown flag or argument, a missing one, a value that breaks its rule.
        """
        words = sys.argv[1:] if args is None else args
        namespace, unknown = self.parse_known_args([_underscored(word) for word in words], namespace)
        if unknown:
            known = list(self._options())
            word = unknown[0].split("=")[0]
            kind = "flag" if word.startswith("-") else "argument"
            raise UserError(f"unknown {kind} {word}{suggest(word, known) or ','} see --help.")
        return namespace

    def _options(self) -> Iterator[str]:
        """All flags, those of subcommands too."""
        for action in self._actions:
            yield from action.option_strings
            if isinstance(action, argparse._SubParsersAction):
                for parser in action.choices.values():
                    yield from parser._options()

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help.")


def _underscored(word: str) -> str:
    """``--on-error=x`` as ``--on_error=x``, the way flags are written here."""
    name, equals, value = word.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if name.startswith("--") else word


# name on the command line -> torch's; auto: as stored
DTYPES = {"auto": "auto", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def number(kind: type[int] | type[float], rule: str, holds: Callable[[float], bool]) -> Callable[[str], Any]:
    """An argparse ``type``: a finite number that ``holds``.

    Args:
        rule: what ``holds`` says, after "is not" ("a whole number of at least 1").
    """

    def read(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if value != value or value in (math.inf, -math.inf) or not holds(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {rule}")
        return value

    return read


at_least_1 = number(int, "a whole number of at least 1", lambda n: n >= 1)
