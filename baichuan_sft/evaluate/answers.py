"""The answer in a generated text, and whether two answers are the same.

Base models follow the examples' form ("The answer is 4"), chat models often do not (``\\boxed{4}``, a fenced
program): marks are looked for first, the last number, formula or line is taken where there are none.
"""

from __future__ import annotations

import ast
import re
import unicodedata
from fractions import Fraction

from baichuan_sft.evaluate.readers import boxed

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]*\.?[0-9]+)(?:/[1-9][0-9]*)?"
_NUMBER = rf"(?:(?<![0-9)])-)?{_DIGITS}"  # in "10-5" stands a difference
_MARKED = re.compile(
    # behind "answer:" often begins the working: only a number that follows at once is marked by it
    r"(?:(?:####|answer\s+is|答案[是为])[^0-9\n]{0,40}?|(?:answer|答案):[\s*$\\(]*)"
    rf"({_NUMBER})(?:(?:[-+*/x×÷0-9. ()]|\\times)*=\s*\$?({_NUMBER}))?",  # "the answer is 3*6 = 18"
    re.IGNORECASE,
)
_FORMULA = r"\$+(.+?)\$+|\\\((.+?)\\\)|\\\[(.+?)\\\]"


def number(text: str) -> str:
    """The answer to a question of arithmetic: the last boxed or marked one, else the last number, else "".

    ``"... 3*6=18 dollars a day.\\nThe answer is $1,018."`` is "1018".
    """
    text = unicodedata.normalize("NFKC", text).replace("−", "-")
    text = re.sub(r"(?<=[0-9])(?:\{,\}|,?\\[,!])(?=[0-9]{3})", "", text)  # 1{,}018 in LaTeX
    marked = [after or first for first, after in _MARKED.findall(text)]
    numbers = re.findall(_NUMBER, boxed(text) or "") or marked or re.findall(_NUMBER, text)
    return numbers[-1].replace(",", "") if numbers else ""


def same_number(given: str, gold: str) -> bool:
    """Equal in value: "18" and "18.00"."""
    return _fraction(given) is not None and _fraction(given) == _fraction(gold)


def _fraction(text: str) -> Fraction | None:
    try:  # the pattern: Fraction("1e999999999") would never end
        return Fraction(text) if re.fullmatch(_NUMBER, text) else None
    except ValueError:  # thousands of digits
        return None


def expression(text: str) -> str:
    """The answer to a question of mathematics: the last final answer, box, answer or formula; else ""."""
    for mark in ("final answer is", "answer is"):
        behind = rf"{mark}:?[\s*]*(\\\[.+?\\\]|\$\$.+?\$\$|[^\n]+)"  # a displayed formula has several lines
        if found := re.findall(behind, text, re.IGNORECASE | re.DOTALL):
            formula = re.search(_FORMULA, found[-1], re.DOTALL)
            plain = re.split(r"\.(?:\s|$)", found[-1])[0].strip("* ")
            return boxed(found[-1]) or (next(filter(None, formula.groups())) if formula else plain)
        if inside := boxed(text):
            return inside
    formulas = re.findall(_FORMULA, text, re.DOTALL)
    return "".join(formulas[-1]) if formulas else ""


def same_expression(given: str, gold: str) -> bool:
    """Equal as normalised LaTeX, or in value where both are numbers: ``\\frac12``, ``1/2`` and ``0.5``."""
    first, second = normal(given), normal(gold)
    value = _value(first)
    return bool(first) and (first == second or (value is not None and value == _value(second)))


# What changes no answer. Source: hendrycks/math ``is_equiv``, Lewkowycz et al. 2022 appendix D.1.
_RULES = [
    (r"\\\\(?:\[[^\]]*\])?", "↵"),  # the end of a row, before its second half is taken for a blank
    (r"\\[()\[\]]|\\\$|\\!|\{,\}(?=[0-9]{3})", ""),
    (r"\\[dt]frac", r"\\frac"),
    (r"\^\{?\\circ\}?|\\degree|\\?%", ""),
    (r"(?<=[0-9}.])\s*\\(?:text|mbox|mathrm|textrm)\{[^{}]*\}(?:\^\{?[0-9]\}?)?$", ""),  # a unit
    (r"\\[,;:> ]|~|\\q?quad|\\left(?![a-z])|\\right(?![a-z])|\s", ""),
    (r"\\(?:text|mbox|mathrm|textbf|mathbf)\{([^{}]*)\}", r"\1"),
    (r"(?<![\w}/.])([0-9]+)/([0-9]+)(?![\w{/.])", r"\\frac{\1}{\2}"),  # also in a pair: (1/2, 3)
    (r"\\frac([0-9a-z])(?=[0-9a-z{])", r"\\frac{\1}"),
    (r"(\\frac\{[^{}]*\})([0-9a-z])", r"\1{\2}"),
    (r"\\sqrt([0-9a-z])", r"\\sqrt{\1}"),
    (r"^[a-zA-Z]{1,2}(?:\([a-z]\))?=(?=.)", ""),  # "x =", "f(x) =" before a value
]


def normal(text: str) -> str:
    """LaTeX without spacing, sizes, units, degrees, dollars, the "x =" before a value."""
    text = text.strip().strip("$").strip().removesuffix(".")
    for pattern, by in _RULES:
        text = re.sub(pattern, by, text)
    return text.replace(",", "") if re.fullmatch(r"-?[0-9]{1,3}(,[0-9]{3})+(\.[0-9]+)?", text) else text


def _value(text: str) -> Fraction | None:
    """Of a number, a fraction, a mixed number in normalised LaTeX: ``-1\\frac{1}{2}`` is -3/2."""
    sign, text = (-1, text[1:]) if text.startswith("-") else (1, text)
    mixed = re.fullmatch(r"([0-9]*)\\frac\{(-?[0-9.]+)\}\{(-?[0-9.]+)\}", text)
    parts = mixed.groups() if mixed else (text, "0", "1")
    whole, top, bottom = (_fraction(part or "0") for part in parts)
    return sign * (whole + top / bottom) if whole is not None and top is not None and bottom else None


def short(text: str) -> str:
    """The answer to a question of BBH: what follows the last "answer is" on its line, else the last line."""
    *before, last = re.split(r"answer is:?", text, flags=re.IGNORECASE)
    lines = [line.strip() for line in last.splitlines() if line.strip()]
    line = (lines[0] if before else lines[-1]) if lines else ""
    return line.strip("*$").strip().removesuffix(".").strip("*$\"'").strip()


# "(A) and (B)", "A or B"; "(A), A pear" names one
_SEVERAL = re.compile(
    r"\(?([A-Z])\)?(?:(?:[\s,;/&]|and|or)*\((?!\1)[A-Z]\)|\s*(?:,|/|&|and|or)\s*(?!\1)[A-HJ-Z](?!['\w]))"
)


def same_short(given: str, gold: str) -> bool:
    """Equal but for case and spaces; an option's text behind its letter does not count: "(D) 12/14/1937".

    Several options are no answer.
    """
    if re.fullmatch(r"\([A-Z]\)", gold):
        found = re.match(r"\(([A-Z])\)|([A-Z])[.:)]?(?:\s|$)", given)
        return not _SEVERAL.match(given) and found is not None and (found[1] or found[2]) == gold[1]
    between = " " if re.search(r"\w", gold) else ""  # brackets may stand without spaces
    return between.join(given.split()).casefold() == between.join(gold.split()).casefold()


def program(text: str, prompt: str = "", entry_point: str = "") -> str:
    """The Python in a generated text, to be appended to ``prompt``.

    What goes on with the prompt before the first fence (which then ends it, or holds a call); else a fenced
    block, of several the first that defines ``entry_point``. Behind a prompt only what goes on with
    its function and further definitions: no calls, prints and prose.
    """
    blocks = re.findall(r"```\w*[ \t]*\n(.*?)(?:\n```|\Z)", text, re.DOTALL)
    text = re.sub(r"\A\s*\[BEGIN\][ \t]*\n?", "", text)  # MBPP's prompt says it too
    before, *fenced = re.split(r"^[ \t]*```", text, maxsplit=1, flags=re.MULTILINE)
    if fenced and _definitions(prompt, before):
        text = "".join(_python(prompt, before)[0])
    elif blocks:
        text = "\n" + next((block for block in blocks if f"def {entry_point}" in block), blocks[0]) + "\n"
    if not prompt:
        return text
    start = re.search(r"^(?:import|from|def|class|@)\b.*", text, re.MULTILINE | re.DOTALL)
    return _definitions(prompt, text) or (_definitions(prompt, "\n" + start[0]) if start else None) or text


def _python(prompt: str, text: str) -> tuple[list[str], list[ast.stmt]]:
    """Lines of the longest beginning of ``text`` that is Python behind ``prompt``, and both parsed."""
    lines = text.splitlines(keepends=True)
    for count in range(len(lines), 0, -1):
        try:
            return lines[:count], ast.parse(prompt + "".join(lines[:count])).body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
    return [], []


def _definitions(prompt: str, text: str) -> str:
    """Lines of ``text`` that define something, of the longest beginning that is Python.

    Of one name the first counts: base models write the next function, and then this one again.
    """
    (lines, body), first = _python(prompt, text), prompt.count("\n") + 1
    kept: dict[str, list[str]] = {}
    for node in body:
        begin = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", ()))]) - first
        own = lines[max(0, begin) : max(0, (node.end_lineno or node.lineno) - first + 1)]
        if own and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            kept.setdefault(node.name, own)
        elif own and isinstance(node, (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign)):
            kept[f"{node.lineno}"] = own
    return "".join(line for own in kept.values() for line in own)
