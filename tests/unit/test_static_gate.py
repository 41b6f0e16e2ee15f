"""What must not be in the source at all: ways in which data becomes code, or a name a way out of its folder."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
_SOURCES = sorted(path for folder in ("src", "lab", "bench") for path in (_ROOT / folder).rglob("*.py"))
_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
_CALLS = {
    "os.system",
    "os.popen",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "yaml.load",
    "yaml.unsafe_load",
}
_METHODS = {"extractall", "extract"}
_BUILTINS = {"eval", "exec", "compile"}


def find_forbidden(source: str) -> Iterator[str]:
    """Yield what a source must not do, with its line."""
    tree = ast.parse(source)
    archives = any("tarfile" in _imported(node) or "zipfile" in _imported(node) for node in ast.walk(tree))
    for node in ast.walk(tree):
        bad = _MODULES & _imported(node)
        if bad:
            yield f"line {getattr(node, 'lineno', 0)}: imports {', '.join(bad)}"
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        shell = any(each.arg == "shell" and not _is_false(each.value) for each in node.keywords)
        method = isinstance(node.func, ast.Attribute) and node.func.attr in _METHODS and archives
        if name in _CALLS or name in _BUILTINS or shell or method:
            yield f"line {node.lineno}: calls {name}{' with a shell' if shell else ''}"


def _imported(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Import):
        return {each.name.split(".")[0] for each in node.names}
    if isinstance(node, ast.ImportFrom):
        return {(node.module or "").split(".")[0]}
    return set()


def _is_false(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is False


@pytest.mark.parametrize("path", _SOURCES, ids=lambda path: str(path.relative_to(_ROOT)))
def test_nothing_forbidden_is_in_the_source(path: Path) -> None:
    assert list(find_forbidden(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import os\nos.system('x')",
        "import subprocess\nsubprocess.run('x', shell=True)",
        "import subprocess\nwith_shell = True\nsubprocess.Popen('x', shell=with_shell)",
        "import yaml\nyaml.load(text)",
        "import tarfile\ntarfile.open('x').extractall('y')",
        "from zipfile import ZipFile\nZipFile('x').extractall()",
        "eval('1')",
    ],
)
def test_the_gate_sees_it(source: str) -> None:
    assert list(find_forbidden(source))
