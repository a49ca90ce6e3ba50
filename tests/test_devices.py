"""Every tensor is made on a device that is named: the default device of whoever calls changes nothing."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FACTORIES = {"arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones"}
FACTORIES |= {"rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "tril_indices", "zeros"}
SOURCES = sorted(path.relative_to(ROOT) for folder in ("rollout", "kernels") for path in (ROOT / folder).rglob("*.py"))


def without_device(source: str) -> list[str]:
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [
        f"line {call.lineno}: {ast.unparse(call)}"
        for call in calls
        if isinstance(call.func, ast.Attribute)
        and call.func.attr in FACTORIES
        and ast.unparse(call.func.value) == "torch"
        and not any(keyword.arg in ("device", None) for keyword in call.keywords)
    ]


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_factories_name_their_device(path):
    assert not without_device((ROOT / path).read_text(encoding="utf-8"))


def test_factories_without_a_device_are_seen():
    source = "x = torch.zeros(3)\ny = torch.ones(2, device=d)\nz = [torch.tensor([1]).to(d)]\nnp.zeros(3)\nx.zeros(1)"
    assert without_device(source) == ["line 1: torch.zeros(3)", "line 3: torch.tensor([1])"]
