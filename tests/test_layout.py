"""Imports point down only, the island stands alone, and every file can be read in one sitting."""

import ast
import sys
from pathlib import Path

import pytest
from fixtures import ROOT

# From the bottom up; a module imports those of lower layers and of its own folder, never its neighbours.
LAYERS = [
    {"errors"},
    {"arguments", "model"},
    {"variants", "machine", "streams"},
    {"data", "attention", "quantization", "commit", "hosts", "ops_cache"},
    {"checkpoint", "plan"},
    {"evaluate"},
    {"train", "infer", "datatools", "export", "doctor"},
    {"launch"},
    {"cli"},
    {"fine-tune"},
]
LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names}
ISLAND_IMPORTS = {"torch", "transformers", "sentencepiece", *sys.stdlib_module_names}
MAX_LINES = 320

PACKAGE = ROOT / "baichuan_sft"
FILES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "fine-tune").glob("*.py")])


def dotted(path: Path) -> str:
    """``baichuan_sft/data/reader.py`` is ``data.reader``, ``baichuan_sft/model/__init__.py`` is ``model``."""
    folder = PACKAGE if path.is_relative_to(PACKAGE) else path.parent
    return ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix("__init__").rstrip(".")


def imports(source: str) -> list[str]:
    """Full names that a file imports, wherever in it; ``from a import b`` is ``a.b``."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names += [f"{module}.{alias.name}" for alias in node.names]
    return names


def violations(module: str, source: str) -> list[str]:
    """What a module of the package imports and may not."""
    top = module.split(".")[0]
    level = LEVELS[top]
    found = []
    for name in imports(source):
        package, _, inner = name.partition(".")
        target = inner.split(".")[0]
        if package != "baichuan_sft" or target.startswith("_") or target == top:
            continue
        if target not in LEVELS:
            found.append(f"{module} imports {target}, which is in no layer")
        elif LEVELS[target] >= level:
            found.append(f"{module} imports {target}, which is not below it")
    return found


def test_the_check_sees_what_it_should():
    assert violations("data.reader", "def f():\n    from baichuan_sft.checkpoint import load_model")
    assert violations("train.sft", "import baichuan_sft.infer.chat")
    assert violations("train.sft", "from baichuan_sft.datatools.preview import preview")
    assert not violations(
        "train.sft", "from baichuan_sft.data.reader import x\nfrom baichuan_sft import __version__"
    )


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_imports_point_down_only(path):
    if path == PACKAGE / "__init__.py":
        pytest.skip("the package's front imports lazily from everywhere")
    assert violations(dotted(path), path.read_text()) == []


@pytest.mark.parametrize("path", sorted((PACKAGE / "model").glob("*.py")), ids=dotted)
def test_island_imports_siblings_and_what_every_machine_has(path):
    for name in imports(path.read_text()):
        if name.startswith("."):
            # `from . import x` is left behind by save_pretrained, `from ..x` breaks it.
            sibling = name.lstrip(".").split(".")[0]
            assert not name.startswith("..") and (path.parent / f"{sibling}.py").is_file(), name
        else:
            assert name.split(".")[0] in ISLAND_IMPORTS, name


@pytest.mark.parametrize("entry", ["configuration", "modeling", "tokenization"])
def test_entry_files_name_every_sibling_they_need(entry):
    """The oldest supported transformers copies what an entry file imports, not what those import in turn."""

    def siblings(stem):
        names = imports((PACKAGE / "model" / f"{stem}.py").read_text())
        return {name.lstrip(".").split(".")[0] for name in names if name.startswith(".")}

    direct = siblings(f"{entry}_baichuan")
    indirect = set().union(*map(siblings, direct))
    assert indirect <= direct


def test_no_file_is_longer_than_can_be_read():
    assert len(FILES) > 20
    lengths = {dotted(path): len(path.read_text().splitlines()) for path in FILES}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}
