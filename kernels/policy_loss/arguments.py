"""How arguments are named in errors."""

from __future__ import annotations

import torch


def kind_of(tensor: torch.Tensor) -> str:
    """For example "float32 [2, 3]"."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
