"""The guards of conftest.py are themselves in place."""

from __future__ import annotations

import importlib.util
import sys
import zlib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def test_root_is_not_on_the_import_path():
    assert ROOT not in [Path(entry or ".").resolve() for entry in sys.path]
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin != str(ROOT / "kernels" / "__init__.py")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64])
def test_unwritten_floating_memory_is_nan(dtype):
    like = torch.zeros(3, dtype=dtype)
    for tensor in (
        torch.empty(2, 3, dtype=dtype),
        torch.empty_like(like),
        torch.empty_strided((2,), (1,), dtype=dtype),
        like.new_empty(4),
        like.new_empty_strided((2,), (1,)),
    ):
        assert torch.isnan(tensor).all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_unwritten_integer_memory_is_large(dtype):
    assert (torch.empty(5, dtype=dtype) >= torch.iinfo(dtype).max // 2).all()


def test_special_tensors_can_still_be_allocated():
    assert torch.empty(2, device="meta").is_meta
    assert torch.empty(2, requires_grad=True).requires_grad
    assert torch.empty(0).shape == (0,)
    assert torch.empty(2, dtype=torch.bool).all()
    assert torch.isfinite(torch.nn.Linear(3, 3).weight).all()


@pytest.mark.parametrize("which", ["first", "second"])
def test_draws_depend_on_the_test_alone(request, which):
    own = torch.Generator().manual_seed(zlib.crc32(request.node.nodeid.encode()))
    assert request.node.nodeid == f"tests/test_conftest.py::test_draws_depend_on_the_test_alone[{which}]"
    assert torch.equal(torch.rand(4), torch.rand(4, generator=own))
