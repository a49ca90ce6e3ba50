"""Plain torch: the definition of correct, and the CPU backend."""

from __future__ import annotations

import torch
import torch.nn.functional as F

FEW_ROWS = 128  # up to here a product on the CPU is bound by reading the weight
MAX_BLOCK = 4096  # rows of the weight in one block


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `foveate.kernels.layers.rms_norm`."""
    if x.dtype == torch.float32:
        return F.rms_norm(x, weight.shape, weight, eps)
    normed = F.rms_norm(x.float(), weight.shape, None, eps)
    return weight * normed.to(x.dtype)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """See `foveate.kernels.layers.linear`.

    With few rows, torch's product on the CPU shares its work among threads badly, or (with one row) not at all.
    There it runs as a batch of blocks of the weight.
    """
    blocks = _num_blocks(x, weight)
    if blocks == 1:
        return F.linear(x, weight, bias)
    stacked = weight.view(blocks, len(weight) // blocks, -1).transpose(1, 2)  # [blocks, K, N / blocks]
    product = torch.bmm(x.expand(blocks, -1, -1), stacked)
    out = product.transpose(0, 1).reshape(len(x), len(weight))
    return out if bias is None else out + bias


def _num_blocks(x: torch.Tensor, weight: torch.Tensor) -> int:
    blocks = torch.get_num_threads()
    few = 0 < len(x) <= FEW_ROWS and x.shape[1] > 0
    if blocks == 1 or x.device.type != "cpu" or not few or not weight.is_contiguous():
        return 1
    while len(weight) // blocks > MAX_BLOCK:
        blocks *= 2
    return blocks if len(weight) % blocks == 0 else 1
