"""Runs killed at random moments go on by themselves, with the losses of a run that nobody killed."""

import sys

import pytest
from fixtures import ROOT
from launching import run

pytestmark = pytest.mark.slow


def test_twenty_killed_runs_go_on_bit_for_bit(tmp_path):
    done = run(
        [sys.executable, ROOT / "benchmarks" / "crash.py", "--trials", 20, "--work", tmp_path], timeout=1200
    )
    assert done.returncode == 0, done.stdout
    assert "ours: 20 of 20 identical" in done.stdout
