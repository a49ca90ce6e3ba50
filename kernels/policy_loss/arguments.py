"""What the functions of the family share: the target that counts for nothing, and how arguments are named in errors."""

from __future__ import annotations

import torch

IGNORE = -100  # as a target: zeros, and no gradient


def kind_of(tensor: torch.Tensor) -> str:
    """For example "float32 [2, 3]"."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
