"""Output that nobody reads any more changes neither what a process does nor what it ends with."""

import os
import subprocess
import sys

import pytest
from fixtures import ROOT

SPEAKS = """
from baichuan_sft.streams import outlive_reader
outlive_reader({name!r})
for _ in range(3):
    print("x" * 20_000, file=sys.{name}, flush=True)
os._exit(7)
"""
ENDS = """
from baichuan_sft.errors import UserError
from baichuan_sft import cli
def fails(argv):
    raise UserError("no such file")
os._exit(cli.run(fails, []))
"""
# What a signal leaves takes long to end: the timer ends it, and says why.
STUCK = """
import contextlib, signal, time
from baichuan_sft import cli
from baichuan_sft.train import signals
signals.GRACE = 1.0
def stuck(argv):
    with signals.handled():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        finally:
            time.sleep(60)
cli.run(stuck, [])
"""


def run(program, *, deaf=()):
    """Exit code and error output; descriptors in ``deaf`` are pipes that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    places = {name: writer if name in deaf else subprocess.PIPE for name in ("stdout", "stderr")}
    words = [sys.executable, "-c", "import os, sys\n" + program]
    done = subprocess.run(
        words, timeout=120, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, **places
    )
    os.close(writer)
    return done.returncode, done.stderr


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_what_nobody_reads_is_dropped(name):
    program = SPEAKS.format(name=name)
    assert run(program, deaf=[name])[0] == 7
    assert run(program.replace("outlive_reader(", "str("), deaf=[name])[0] != 7  # what Python does


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_lines_of_a_process_that_is_killed_are_as_buffered_as_before(monkeypatch, unbuffered):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    program = "from baichuan_sft.streams import outlive_reader\noutlive_reader('stderr')\n"
    assert run(program + "print('a line', file=sys.stderr)\nos.kill(os.getpid(), 9)") == (-9, "a line\n")


def test_an_error_that_nobody_reads_keeps_its_exit_code():
    assert run(ENDS, deaf=["stderr"])[0] == 2
    assert run(ENDS) == (2, "error: no such file\n")


def test_an_end_that_takes_long_is_said_once():
    code, said = run(STUCK)
    assert code == 143 and said == "SIGTERM: ended before the first update, there is nothing to save\n"
    assert run(STUCK, deaf=["stderr", "stdout"])[0] == 143
