"""--config: a file of flags, each with the place it stands at; and where files that flags name are found."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from baichuan_sft.errors import UserError, suggest
from baichuan_sft.train import flags

ROOT = Path(__file__).parents[
    2
]  # the checkout: the vendor's commands name ds_config.json and data/ from there


def read_config(path: str, known: set[str]) -> tuple[list[str], dict[str, str]]:
    """The file's entries as ``--key value`` words, and of each flag ``FILE:LINE:COLUMN``.

    A value is the text as it stands: YAML 1.1 reads 1e-5 as text, 010 as 8 and 1:30 as 90, the command
    line does not.

    Raises:
        UserError: not YAML, or an entry that is no flag with one value.
    """
    import yaml

    if not os.path.isfile(path):
        raise UserError(f"--config {path}: no such file.")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        top = yaml.compose(text, yaml.SafeLoader)  # JSON is YAML
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}.") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else path
        tab = " Indent with blanks, not tabs." if "'\\t'" in str(error.problem) else ""
        raise UserError(f"{where}: not YAML: {error.problem}.{tab}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(top, yaml.MappingNode):
        kind = {"SequenceNode": "a list", "ScalarNode": "a text"}.get(type(top).__name__, "an empty file")
        raise UserError(f"{path}: expected flags as keys, got {kind}.")
    words: list[str] = []
    places: dict[str, str] = {}
    for key, value in top.value:
        place = f"{path}:{key.start_mark.line + 1}:{key.start_mark.column + 1}"
        name = str(key.value)
        today = f"--{flags.RENAMED.get(name, name)}"
        if today in places:
            raise UserError(f"{place}: {name} is given twice, first at {places[today]}; keep one.")
        places[today] = place
        if name == "config":
            raise UserError(f"{place}: a config file cannot name another one.")
        if f"--{name}" not in known and name not in {*flags.RENAMED, *flags.GONE, *flags.SWITCHES}:
            raise UserError(f"{place}: unknown key {name!r}{close_flag(name, known)} see --help.")
        if not isinstance(value, yaml.ScalarNode):
            kind = "list" if isinstance(value, yaml.SequenceNode) else "dict"
            raise UserError(f"{place}: {name} is a {kind}; expected one value, as on the command line.")
        if value.tag != "tag:yaml.org,2002:null":
            words += [f"--{name}", value.value]
    return words, places


def close_flag(name: str, known: set[str]) -> str:
    """What an unknown flag is called here, for a message."""
    if name in flags.ELSEWHERE:
        return f"; here it is {flags.ELSEWHERE[name]},"
    return suggest(f"--{name}", sorted(known)) or ","


def located(error: UserError, places: Mapping[str, str]) -> NoReturn:
    """Raise ``error`` again, behind the place of the flag it is about where a file gave that flag."""
    named = [word.strip(".,;:'") for word in str(error).split()]
    place = next((places[word] for word in named if word in places), None)
    raise error if place is None else type(error)(f"{place}: {error}")


def find_file(flag: str, path: str) -> str:
    """``path`` as it stands in the working directory, or else in the checkout's root.

    Raises:
        UserError: in neither.
    """
    for candidate in (Path(path), ROOT / path):
        if candidate.exists():
            return str(candidate.resolve())
    places = dict.fromkeys([os.getcwd(), str(ROOT)])
    raise UserError(f"--{flag} {path}: no such file in {' or '.join(places)}.")
