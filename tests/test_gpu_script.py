"""The script for one GPU runs here too, at sizes for a CPU."""

import pytest

from benchmarks import gpu


@pytest.mark.slow
def test_every_section_gives_its_rows(capsys):
    rows = gpu.main(["--tiny", "--rounds", "1", "--only", "ceilings,attention,loss,train,decode"])
    figures = {name: figure for name, figure, *_ in rows}
    assert not [name for name, figure in figures.items() if "failed" in figure], figures
    rows = {name for of_device in gpu.TARGETS.values() for name in of_device}
    assert rows <= figures.keys()
    assert "TFLOP/s" in figures["13b lora, none"] and "targets/s" in figures["7b lora, vendor's way at 512"]
    assert "times the targets/s" in figures["7b lora, ours / vendor's at 512"]
    assert capsys.readouterr().out.rstrip().endswith("|")  # the table is last


def test_out_of_time_and_failures_are_said():
    report = gpu.Report(gpu.argparse.Namespace(minutes=0.0))
    with report.row("late"):
        report.require_time()
        raise AssertionError("not reached")
    report.args.minutes = 1.0
    with report.row("broken"):
        raise ValueError("no such kernel\nmore")
    assert [row[:2] for row in report.rows] == [
        ["late", "not run: too little time left"],
        ["broken", "failed: ValueError: no such kernel"],
    ]
