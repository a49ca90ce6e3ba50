"""For every test: the root off sys.path, a seed of its own, and memory that shows when it is read unwritten."""

from __future__ import annotations

import os
import random
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

from foveate.testing.uninitialised import poisoned_empty

ROOT = Path(__file__).resolve().parent.parent

# In the root, `kernels` would be our folder and hide Hugging Face's package of that name from transformers.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

# Without a GPU Triton's kernels run in its interpreter, which must be chosen before they are defined.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

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


@pytest.fixture(autouse=True)
def poison_empty_memory() -> Iterator[None]:
    """`torch.empty` and its kin return NaN (floating), True (bool) or a large number (integers)."""
    with poisoned_empty():
        yield
