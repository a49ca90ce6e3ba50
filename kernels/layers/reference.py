"""Plain torch: the definition of correct, on tensors of any device."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from foveate.kernels.dispatch import require
from foveate.kernels.library import is_traced

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


@torch.no_grad()
def rope_store_kv(queries, keys, values, cos, sin, key_pool, value_pool, slots) -> torch.Tensor:
    """See `foveate.kernels.layers.rope_store_kv`."""
    _check_rope(queries, keys, values, cos, sin, key_pool, value_pool, slots)
    cos, sin = cos[:, None], sin[:, None]
    key_pool.flatten(0, 1).index_copy_(0, slots, rotate(keys, cos, sin))
    value_pool.flatten(0, 1).index_copy_(0, slots, values)
    return rotate(queries, cos, sin)


def _check_rope(queries, keys, values, cos, sin, key_pool, value_pool, slots) -> None:
    """What foveate._C checks for the compiled backends."""
    sizes: dict[str, int] = {}
    for name, x, dims, dense in (
        ("queries", queries, ("T", "heads", "D"), False),
        ("keys", keys, ("T", "kv_heads", "D"), False),
        ("values", values, ("T", "kv_heads", "D"), False),
        ("cos", cos, ("T", "D"), True),
        ("sin", sin, ("T", "D"), True),
        ("key_pool", key_pool, ("pages", "page_size", "kv_heads", "D"), True),
        ("value_pool", value_pool, ("pages", "page_size", "kv_heads", "D"), True),
        ("slots", slots, ("T",), True),
    ):
        known = dict(zip(dims, x.shape, strict=False)) | sizes
        kind = torch.int64 if name == "slots" else queries.dtype
        lies = x.is_contiguous() if dense else x.dim() > 0 and (x.stride(-1) == 1 or x.shape[-1] == 1 or not x.numel())
        fits = [*x.shape] == [known.get(dim) for dim in dims] and x.dtype == kind and x.device == queries.device
        if not (fits and lies):
            shape = ", ".join(f"{dim}={sizes[dim]}" if dim in sizes else dim for dim in dims)
            layout = "contiguous" if dense else "last dimension contiguous"
            got = f"{list(x.shape)} {x.dtype} with strides {x.stride()} on {x.device}"
            require(False, f"[{shape}] {kind}, {layout}, on {queries.device}", got, name)
        sizes = known
    require(queries.is_floating_point(), "floating queries", queries.dtype, "queries")
    require(sizes["kv_heads"] > 0, "at least 1 KV head", 0, "keys")
    if slots.device.type != "cpu" or is_traced(slots) or not len(slots):
        return  # nothing to read: the planner's word, as in foveate._C
    limit = sizes["pages"] * sizes["page_size"]
    for slot in map(int, slots.aminmax()):
        require(0 <= slot < limit, f"slots in [0, {limit})", slot, "slots")


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
