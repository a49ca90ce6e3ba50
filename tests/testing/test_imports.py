"""foveate.testing stands beside the package: nothing of it imports foveate.testing, which itself needs no pytest."""

from __future__ import annotations

import ast
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import foveate.testing

ROOT = Path(__file__).resolve().parents[2]
MODULES = [f"foveate.testing.{module.name}" for module in pkgutil.iter_modules(foveate.testing.__path__)]
PACKAGE = [path for folder in ("rollout", "kernels") for path in (ROOT / folder).rglob("*.py")]


def test_all_modules_load_without_test_packages():
    code = f"""
import importlib, sys
for name in ("pytest", "hypothesis", "scipy", "sklearn"):
    sys.modules[name] = None  # any import of it now raises
for name in {MODULES}:
    importlib.import_module(name)
assert "transformers" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert {"foveate.testing.tolerance", "foveate.testing.cases"} <= set(MODULES)


@pytest.mark.parametrize(
    "path", [ROOT / "foveate" / "__init__.py", *PACKAGE], ids=lambda path: str(path.relative_to(ROOT))
)
def test_package_never_imports_it(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        assert not [name for name in names if f"{name}.".startswith("foveate.testing.")]
