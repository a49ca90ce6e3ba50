"""`torch.ops.foveate.decode_attention`: the backends of foveate._C, each on its own device."""

from __future__ import annotations

import torch

from foveate import _C
from foveate.kernels.dispatch import stream_of
from foveate.kernels.library import is_observed, operator
from foveate.kernels.paged_attention.plan import StepPlan
from foveate.kernels.paged_attention.tiles import tiles_of


def attend(queries, key_pool, value_pool, plan: StepPlan, scale: float) -> torch.Tensor:
    """See `foveate.kernels.paged_attention.decode`."""
    tiles = tiles_of(plan, queries.shape[1] // key_pool.shape[2], len(key_pool), queries.device)
    if queries.stride(-1) != 1:
        queries = queries.contiguous()
    arrays = (tiles.pages, tiles.tiles, tiles.rows, tiles.row_parts, tiles.part_offsets)
    arguments = (queries, key_pool, value_pool, *arrays, tiles.num_parts, scale)
    if not is_observed(queries, key_pool, value_pool):
        return _decode(*arguments)
    with torch.no_grad():
        return decode_attention(*arguments)


def _decode(queries, key_pool, value_pool, pages, tiles, rows, row_parts, part_offsets, num_parts: int, scale: float):
    out = queries.new_empty(queries.shape)
    parts = queries.new_empty((num_parts, queries.shape[1], queries.shape[2] + 2), dtype=torch.float32)
    arrays = (pages, tiles, rows, row_parts, part_offsets)
    _C.decode_attention(queries, key_pool, value_pool, *arrays, parts, out, scale, stream_of(queries))
    return out


def _fake_decode(queries, *_) -> torch.Tensor:
    return queries.new_empty(queries.shape)


# queries: [T, heads, D], last dimension contiguous; pools: [pages, page_size, kv_heads, D]; the others are those of
# `Tiles`, and are taken as they are -> [T, heads, D], contiguous.
decode_attention = operator(
    "decode_attention(Tensor queries, Tensor key_pool, Tensor value_pool, Tensor pages, Tensor tiles, Tensor rows,"
    " Tensor row_parts, Tensor part_offsets, int num_parts, float scale) -> Tensor",
    _decode,
    _fake_decode,
)
