"""Errors a user can act on, and the one place where a name is looked up in a table."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


class UserError(Exception):
    """Something the user can repair: one line with the value, the rule and the way out.

    The command line prints it without a traceback and exits with ``exit_code``.
    """

    exit_code = 2


class EnvironmentFault(UserError):
    """The machine cannot do what was asked (a missing device, no disk space)."""

    exit_code = 3


class CheckpointFault(UserError):
    """A saved model is not what it claims to be (missing, truncated or foreign tensors)."""

    exit_code = 4


class PeerFault(UserError):
    """Another rank or host ended, or gives no sign of life; what it says itself explains more."""

    exit_code = 5


class NumericalFault(UserError):
    """Training produced a number that must not be trained on (NaN, Inf, a zero loss with targets)."""

    exit_code = 6


def suggest(name: str, known: list[str]) -> str:
    """`", did you mean 'x'?"` where a known name is close to ``name``, else an empty string."""
    close = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def pick(kind: str, name: str, table: Mapping[str, T]) -> T:
    """``table[name]``, or a UserError that lists what exists.

    Args:
        kind: what the table holds, for the message ("data format").
    """
    if name in table:
        return table[name]
    close = suggest(name, list(table)) or "."
    raise UserError(f"unknown {kind} {name!r}{close} Known: {', '.join(sorted(table))}.")


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its name where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
