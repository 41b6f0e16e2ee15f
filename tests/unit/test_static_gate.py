"""What must not be in the source at all: ways in which data becomes code, or a name a way out of its folder."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
_SOURCES = sorted(path for folder in ("src", "lab", "bench", "tests") for path in (_ROOT / folder).rglob("*.py"))
_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
_CALLS = {
    *("os.system", "os.popen", "os.spawnl", "os.spawnv", "pty.spawn", "asyncio.create_subprocess_shell"),
    *("subprocess.getoutput", "subprocess.getstatusoutput"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.full_load"),
    *("shutil.unpack_archive", "builtins.eval", "builtins.exec", "builtins.compile", "builtins.__import__"),
}
_METHODS = {"extractall", "extract"}
_BUILTINS = {"eval", "exec", "compile", "__import__"}


def find_forbidden(source: str) -> Iterator[str]:
    """Yield what a source must not do, with its line, by whatever names it has imported that."""
    tree = ast.parse(source)
    archives = any("tarfile" in _imported(node) or "zipfile" in _imported(node) for node in ast.walk(tree))
    names = dict(pair for node in ast.walk(tree) for pair in _names(node))
    for node in ast.walk(tree):
        bad = _MODULES & _imported(node)
        if bad:
            yield f"line {getattr(node, 'lineno', 0)}: imports {', '.join(bad)}"
        if isinstance(node, (ast.Name, ast.Attribute)) and _resolve(node, names) in _CALLS:
            yield f"line {node.lineno}: uses {_resolve(node, names)}"
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        shell = any(each.arg == "shell" and not _is_false(each.value) for each in node.keywords)
        method = isinstance(node.func, ast.Attribute) and node.func.attr in _METHODS and archives
        if name in _BUILTINS or shell or method:
            yield f"line {node.lineno}: calls {name}{' with a shell' if shell else ''}"


def _imported(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Import):
        return {each.name.split(".")[0] for each in node.names}
    if isinstance(node, ast.ImportFrom):
        return {(node.module or "").split(".")[0]}
    return set()


def _names(node: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield the names that a statement imports, and what they stand for."""
    if isinstance(node, ast.Import):
        for each in node.names:
            yield (each.asname, each.name) if each.asname else (each.name.split(".")[0],) * 2
    if isinstance(node, ast.ImportFrom):
        for each in node.names:
            yield each.asname or each.name, f"{node.module}.{each.name}"


def _resolve(node: ast.expr, names: Mapping[str, str]) -> str:
    """Return what a dotted name stands for, from the module on; empty for anything else."""
    if isinstance(node, ast.Name):
        return names.get(node.id, "")
    if isinstance(node, ast.Attribute):
        start = _resolve(node.value, names)
        return f"{start}.{node.attr}" if start else ""
    return ""


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
        "from os import system\nsystem('x')",
        "from os import system as run\nrun('x')",
        "import os as o\no.system('x')",
        "import os.path\nos.popen('x')",
        "import os\nstart = os.system\nstart('x')",
        "from subprocess import run as go\ngo('x', shell=1)",
        "from yaml import load\nload(text)",
        "from shutil import unpack_archive\nunpack_archive('x')",
        "import asyncio\nasyncio.create_subprocess_shell('x')",
    ],
)
def test_the_gate_sees_it(source: str) -> None:
    assert list(find_forbidden(source))
