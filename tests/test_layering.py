"""Data flows one way: a file imports only what stands above it, and kernels never import rollout."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Modules that are not named here may sit anywhere, as long as nothing reaches upwards through them.
# A submodule that stands elsewhere than its package has an entry of its own.
ORDER = ["config", "types", "models.spec", "processor", "vision", "pages", "segments", "scheduler", "planner"]
ORDER += ["weights", "models", "runner", "engine", "rewards", "grpo", "trainer", "demo", "tools", "cli"]
FOLDERS = {"foveate": "foveate", "foveate.rollout": "rollout", "foveate.kernels": "kernels"}


def module_name(package: str, folder: Path, path: Path) -> str:
    parts = path.relative_to(folder).with_suffix("").parts
    return ".".join([package, *(parts[:-1] if parts[-1] == "__init__" else parts)])


MODULES = {
    module_name(package, ROOT / folder, path): path
    for package, folder in FOLDERS.items()
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING`, whose imports never run."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
            yield from runtime_nodes(child)


def imports_of(source: str) -> set[str]:
    """Dotted names that the source imports, also inside functions; `from a import b` gives `a.b`."""
    names = set()
    for node in runtime_nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer they reach into"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@cache
def edges(module: str) -> frozenset[str]:
    """Modules of the project that `module` imports."""
    found = set()
    for name in imports_of(MODULES[module].read_text(encoding="utf-8")):
        if name == "foveate._C":  # compiled: it imports nothing
            continue
        target = name if name in MODULES else name.rpartition(".")[0]
        found |= {target} & MODULES.keys() - {module}
    return frozenset(found)


def unit(module: str) -> str | None:
    """The entry of ORDER under which a module of rollout stands; None where it has none."""
    parts = module.removeprefix("foveate.rollout.").split(".")
    prefixes = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((prefix for prefix in prefixes if prefix in ORDER), None)


def reachable(module: str) -> set[str]:
    """Every module that an import of `module` leads to."""
    seen, todo = set(), list(edges(module))
    while todo:
        target = todo.pop()
        if target not in seen:
            seen.add(target)
            todo.extend(edges(target))
    return seen


@pytest.mark.parametrize("module", [name for name in MODULES if unit(name)])
def test_imports_only_what_stands_above(module):
    own = ORDER.index(unit(module))
    assert not {target for target in reachable(module) if unit(target) and ORDER.index(unit(target)) > own}


@pytest.mark.parametrize("module", MODULES)
def test_no_cycle(module):
    assert module not in reachable(module)


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("foveate.kernels")])
def test_kernels_never_import_rollout(module):
    assert not {target for target in reachable(module) if not target.startswith("foveate.kernels")}
    assert not {name for name in imports_of(MODULES[module].read_text(encoding="utf-8")) if "rollout" in name}


@pytest.mark.parametrize("module", [name for name in MODULES if name != "foveate"])
def test_nothing_inside_imports_the_face(module):
    assert "foveate" not in edges(module)


@pytest.mark.parametrize("folder", ["foveate", "rollout", "kernels", "tests", "benchmarks", "examples"])
def test_no_folder_is_imported_by_its_bare_name(folder):
    bare = {"rollout", "kernels", "bindings", "benchmarks", "csrc", "tests"}
    for path in (ROOT / folder).rglob("*.py"):
        imported = {name.split(".")[0] for name in imports_of(path.read_text(encoding="utf-8"))}
        assert not bare & imported, path


def test_modules_and_their_imports_are_found():
    assert unit("foveate.rollout.models.spec") == "models.spec"
    assert unit("foveate.rollout.models.decoder") == "models"
    assert unit("foveate.kernels.sampling") is unit("foveate") is None
    assert {"foveate.rollout.config", "foveate.kernels.sampling", "foveate"} <= MODULES.keys()
    assert "foveate.rollout.config" in edges("foveate.rollout.types")


def test_imports_are_seen_everywhere():
    source = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import hidden
def f():
    from a.b import c
class D:
    import e.f
"""
    assert imports_of(source) == {"typing.TYPE_CHECKING", "a.b.c", "e.f"}
