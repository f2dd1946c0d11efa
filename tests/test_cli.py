"""Every command explains itself with an example, and stands in both READMEs."""

import pytest
from fixtures import ROOT

from baichuan_sft import cli
from baichuan_sft.cli import COMMANDS, dispatch
from baichuan_sft.errors import UserError


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_an_example(name, capsys):
    try:
        code = dispatch([name, "--help"])
    except SystemExit as ended:
        code = ended.code
    shown = capsys.readouterr().out
    assert code == 0 and "example" in shown and f"baichuan-sft {name} " in shown.replace("\n", " "), shown


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_in_the_readmes(name):
    for file in ("README.md", "README_zh.md"):
        assert f"baichuan-sft {name} " in (ROOT / file).read_text(encoding="utf-8"), file


@pytest.mark.parametrize("local_rank, waits", [("0", []), ("1", [cli.SPEAKER_SECONDS])])
def test_what_all_ranks_find_is_said_by_one_never_by_none(local_rank, waits, monkeypatch, capsys):
    """A launcher ends every rank when one has ended; the silent ones leave the other the time to speak."""
    waited = []
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    monkeypatch.setenv("RANK", local_rank)
    monkeypatch.setenv("LOCAL_RANK", local_rank)

    def fails(argv):
        raise UserError("no such file")

    assert cli.run(fails, []) == 2 and waited == waits
    assert capsys.readouterr().err.endswith("no such file\n")
