"""Plain torch: the definition of correct, and the CPU backend."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

FEW_ROWS = 128  # up to here a product on the CPU is bound by reading the weight
MAX_BLOCK = 4096  # rows of the weight in one block
SERIAL = 1 << 15  # torch's kernels use one thread below so many elements
VECTOR = 64  # a multiple of the elements that they compute at once


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `foveate.kernels.layers.rms_norm`."""
    if x.dtype == torch.float32:
        return F.rms_norm(x, weight.shape, weight, eps)
    normed = F.rms_norm(x.float(), weight.shape, None, eps)
    return weight * normed.to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x [T, heads, head_dim]: (a, b) -> (a cos - b sin, b cos + a sin) for its halves a, b.

    cos, sin: [T, 1, head_dim], sin negated in the first half.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def rope_store_kv(queries, keys, values, cos, sin, key_pool, value_pool, slots) -> torch.Tensor:
    """See `foveate.kernels.layers.rope_store_kv`."""
    cos, sin = cos[:, None], sin[:, None]
    key_pool.view(-1, *key_pool.shape[2:]).index_copy_(0, slots, rotate(keys, cos, sin))
    value_pool.view(-1, *value_pool.shape[2:]).index_copy_(0, slots, values)
    return rotate(queries, cos, sin)


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


def linear_in_blocks(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, row_block: int) -> torch.Tensor:
    """See `foveate.kernels.layers.linear`."""
    padded = x.new_zeros(-(-len(x) // row_block) * row_block, x.shape[1])
    padded[: len(x)] = x
    return torch.cat([F.linear(block, weight, bias) for block in padded.split(row_block)])[: len(x)]


def elementwise(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """See `foveate.kernels.layers.elementwise`."""
    rows, width = x.shape
    padded_width = -(-width // VECTOR) * VECTOR
    size = min(64, max(1, (SERIAL - 1) // max(1, padded_width)))  # rows in one call, always as many
    padded = x.new_zeros(-(-rows // size) * size, padded_width)
    padded[:rows, :width] = x
    return torch.cat([function(block) for block in padded.split(size)])[:rows, :width]


def _num_blocks(x: torch.Tensor, weight: torch.Tensor) -> int:
    blocks = torch.get_num_threads()
    few = 0 < len(x) <= FEW_ROWS and x.shape[1] > 0
    if blocks == 1 or x.device.type != "cpu" or not few or not weight.is_contiguous():
        return 1
    while len(weight) // blocks > MAX_BLOCK:
        blocks *= 2
    return blocks if len(weight) % blocks == 0 else 1
