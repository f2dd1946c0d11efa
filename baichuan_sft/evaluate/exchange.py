"""Calls between the tests of a program and the program, in two processes. Standard library only.

No object of the program's is ever made on the tests' side: only plain data crosses, so that what equals
everything, or lies about its length, stays where it is.
"""

import builtins
import json
import sys
import types
from contextlib import suppress

PLAIN = (type(None), bool, float, str)
MAX_MESSAGE = 1 << 24  # bytes, of one call or answer


def encode(value, keep):
    """Plain data as JSON; ``keep`` makes what else there is a reference."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, int):
        return ["int", hex(value)]  # no limit of digits
    if isinstance(value, complex):
        return ["complex", value.real, value.imag]
    if isinstance(value, (bytes, bytearray)):
        return ["bytes", bytes(value).hex()]
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return [kind.__name__, [encode(part, keep) for part in value]]
    if isinstance(value, dict):
        return ["dict", [[encode(key, keep), encode(part, keep)] for key, part in value.items()]]
    return ["ref", keep(value)]


def decode(value, find):
    """Only plain data and what ``find`` makes of a reference, whatever was sent."""
    if isinstance(value, PLAIN):
        return value
    kind, *parts = value
    if kind == "int":
        return int(parts[0], 16)
    if kind == "complex":
        return complex(*parts)
    if kind == "bytes":
        return bytes.fromhex(parts[0])
    if kind == "dict":
        return {decode(key, find): decode(part, find) for key, part in parts[0]}
    if kind == "ref":
        return find(parts[0])
    made = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[kind]
    return made(decode(part, find) for part in parts[0])


def solve(link):
    """The solver: run the program, then do what the tester asks, until it is gone."""
    kept: list = []
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    operations: dict = {
        "run": lambda text: exec(compile(text, "<solution>", "exec"), module.__dict__),
        "name": lambda name: getattr(module, name),
        "call": lambda target, words, named: target(*words, **named),
        "get": getattr,
        "set": setattr,
        "list": list,
    }

    def keep(value):
        kept.append(value)
        return len(kept) - 1

    for line in link:
        try:
            operation, *words = decode(json.loads(line), kept.__getitem__)
            answer = ["value", encode(operations[operation](*words), keep)]
        except BaseException as error:
            answer = ["error", [type(error).__name__, str(error)[:200]]]
        link.write(json.dumps(answer).encode() + b"\n")
        link.flush()


class Remote:
    """Something of the solver's that is no plain data. Equal to nothing but itself."""

    def __init__(self, link, number):
        self.__dict__.update(_link=link, _number=number)

    def _ask(self, operation, *words):
        return ask(self._link, operation, self, *words)

    def __call__(self, *words, **named):
        return self._ask("call", words, named)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self._ask("get", name)

    def __setattr__(self, name, value):
        self._ask("set", name, value)

    def __iter__(self):
        return iter(self._ask("list"))


class Named(Remote):
    """What the solver has under a name when it is used."""

    def _ask(self, operation, *words):
        return ask(self._link, operation, ask(self._link, "name", self._number), *words)


class Ended(BaseException):
    """The solver is gone: no test may catch this."""


def ask(link, operation, *words):
    """What the solver answers, as plain data or Remote; raises what it raised."""
    sent = encode(
        [operation, *words], lambda value: value._number if type(value) is Remote else refuse(value)
    )
    with suppress(OSError):  # it is gone: the answer is empty too
        link.write(json.dumps(sent).encode() + b"\n")
        link.flush()
    line = link.readline(MAX_MESSAGE)
    if not line:
        raise Ended("the program ended before its tests did")
    try:
        kind, answer = json.loads(line)
        if kind == "value":
            return decode(answer, lambda number: Remote(link, number))
        name, text = map(str, answer)
    except Exception as error:  # no solver of ours says so
        raise Ended(f"unreadable answer: {type(error).__name__}") from None
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception) and not name.startswith("Stop"):
        raise kind(text)  # a test may expect it
    raise RuntimeError(f"{name}: {text}")  # never what ends a process, or a loop of the test


def refuse(value):
    raise TypeError(f"a test cannot pass {type(value).__name__} to the program")


def names_in(code):
    """All names a compiled text may look up, functions in it too."""
    inner = (names_in(part) for part in code.co_consts if isinstance(part, types.CodeType))
    return set(code.co_names).union(*inner)


def judge(link, solution, test):
    """The tester: None where every test passed, else why not.

    Names that neither the test nor Python knows are the solver's, and ``_solver("name")`` always is.
    """
    try:
        ask(link, "run", solution)
        code = compile(test, "<test>", "exec")
        known = {name: Named(link, name) for name in names_in(code) if not hasattr(builtins, name)}
        exec(code, {"__name__": "test", **known, "_solver": lambda name: Named(link, name)})
    except BaseException as error:
        return f"{type(error).__name__}: {error}"[:200].splitlines()[0].rstrip(": ")
    return None
