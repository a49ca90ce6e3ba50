"""The parts of a decoder layer between attention and sampling: `rms_norm`, `linear`.

    rms_norm(x) = x / sqrt(mean(x^2) + eps) * weight over the last dimension

normalised in float32 and rounded to the dtype of x before the weight, as transformers' models do.
Source: Zhang & Sennrich, arXiv 1910.07467.
"""

from __future__ import annotations

import torch

from foveate.kernels.dispatch import choose, require
from foveate.kernels.layers import reference

__all__ = ["linear", "rms_norm"]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, backend: str | None = None) -> torch.Tensor:
    """x: float [..., D]. weight: float [D]. Returns float [..., D]. Raises ValueError if the shapes do not fit."""
    require(weight.shape == x.shape[-1:], f"[{x.shape[-1] if x.dim() else '...'}]", list(weight.shape), "weight")
    choose("layers", backend)
    return reference.rms_norm(x, weight, eps)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight^T + bias, by torch's matrix product on every backend.

    x: float [M, K]. weight: float [N, K]. bias: float [N] or None. Returns float [M, N].
    """
    return reference.linear(x, weight, bias)
