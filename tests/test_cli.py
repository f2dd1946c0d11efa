"""Every command explains itself with an example, and stands in both READMEs."""

import pytest
from fixtures import ROOT

from baichuan_sft.cli import COMMANDS, dispatch


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
