"""For every test: the root off sys.path, a seed of its own, and memory that shows when it is read unwritten."""

from __future__ import annotations

import random
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

# In the root, `kernels` would be our folder and hide Hugging Face's package of that name from transformers.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

# The same examples on every run; no deadline, because a busy machine is not a wrong result.
hypothesis.settings.register_profile("foveate", derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.load_profile("foveate")


@pytest.fixture(autouse=True)
def seed_from_node_id(request: pytest.FixtureRequest) -> None:
    """A test draws the same numbers alone, in any order, and in the whole suite."""
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _fill_with_garbage(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_meta or tensor.numel() == 0:
        return tensor
    with torch.no_grad():
        if tensor.is_floating_point() or tensor.is_complex():
            tensor.fill_(float("nan"))
        elif tensor.dtype == torch.bool:
            tensor.fill_(True)
        else:
            # Large, yet index arithmetic on it does not wrap around to something small.
            tensor.fill_(torch.iinfo(tensor.dtype).max // 2 + 1)
    return tensor


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def allocate_garbage(*args, **kwargs) -> torch.Tensor:
        return _fill_with_garbage(allocate(*args, **kwargs))

    return allocate_garbage


@pytest.fixture(autouse=True)
def poison_empty_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty` and its kin return NaN (floating), True (bool) or a large number (integers)."""
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, _poisoned(getattr(torch.Tensor, name)))
