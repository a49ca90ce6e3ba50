"""What every file and folder promises: size, names, and the files of a kernel family."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("foveate", "rollout", "kernels", "csrc", "bindings", "tests", "benchmarks", "examples")
SUFFIXES = {".py", ".pyi", ".h", ".cpp", ".cu", ".cuh"}
LINES = {"kernels": 400, "tests": 400}
OTHER_LINES = 300
FUNCTION_LINES = 40
EMPTY_WORDS = {"util", "utils", "helper", "helpers", "misc", "stuff", "new", "old", "tmp", "temp"}

SOURCES = sorted(
    path.relative_to(ROOT)
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*")
    if path.suffix in SUFFIXES and "__pycache__" not in path.parts
)
PYTHON = [path for path in SOURCES if path.suffix == ".py"]
FAMILIES = sorted(path.name for path in (ROOT / "kernels").iterdir() if path.is_dir() and path.name != "__pycache__")


def long_functions(source: str, budget: int) -> list[str]:
    return [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno - node.lineno >= budget
    ]


def test_the_tree_was_found():
    assert {path.parts[0] for path in SOURCES} >= {"foveate", "rollout", "kernels", "csrc", "bindings", "tests"}
    assert {"sampling", "paged_attention", "policy_loss"} <= set(FAMILIES)


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_lines_of_file(path):
    budget = LINES.get(path.parts[0], 400 if path.suffix in {".cu", ".cuh"} else OTHER_LINES)
    lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
    assert lines <= budget


@pytest.mark.parametrize("path", [path for path in PYTHON if path.parts[0] != "kernels"], ids=str)
def test_lines_of_functions(path):
    assert not long_functions((ROOT / path).read_text(encoding="utf-8"), FUNCTION_LINES)


def test_long_functions_are_seen():
    body = "    x = 1\n"
    assert not long_functions("def f():\n" + body * 39, 40)
    assert long_functions("def f():\n" + body * 40, 40) == ["f: 41 lines"]


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_no_name_says_nothing(path):
    assert not EMPTY_WORDS & set(path.stem.lower().split("_"))
    assert not EMPTY_WORDS & {part.lower() for part in path.parts[:-1]}


@pytest.mark.parametrize("family", FAMILIES)
def test_kernel_family_has_its_files(family):
    for name in (f"kernels/{family}/__init__.py", f"tests/kernels/test_{family}.py"):
        assert (ROOT / name).is_file(), name
    reference = ROOT / "kernels" / family / "reference"
    assert reference.with_suffix(".py").is_file() or (reference / "__init__.py").is_file()


def test_kernels_package_is_a_docstring():
    """Anything else would run when another package looks for Hugging Face's `kernels` in the root."""
    (statement,) = ast.parse((ROOT / "kernels" / "__init__.py").read_text(encoding="utf-8")).body
    assert isinstance(statement, ast.Expr)
    assert isinstance(statement.value, ast.Constant)


def test_tests_are_no_packages():
    assert not [path for path in PYTHON if path.parts[0] == "tests" and path.name == "__init__.py"]
