"""Attention scores of keys, and their log-sum-exp, in Triton: no attention matrix is written.

A program takes a tile of one span, which begins where the span does, so that neither the batch nor its order changes a
bit; it finds its span by adding up the tiles of the spans before it, and the grid has room for one tile more a span
than the elements fill. Head dimensions are read as a power of two and a rest (80 as 64 + 16), not padded to the next
power.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from foveate.kernels.targets import TritonTarget

SPANS = 256  # whose tiles are added up at once
SUM_TILE = 256


class _Shape(NamedTuple):
    """Rows and columns of a tile of logits; the same for every batch, as a product's bits depend on them."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


# float32 has no matrix instruction of full precision, and its products take more registers. None spills on sm_80,
# sm_90, sm_100.
_FEW_ROWS, _MANY_ROWS, _COLUMNS, _FLOAT32 = (
    _Shape(16, 64, 4, 2),
    _Shape(128, 64, 8, 3),
    _Shape(64, 128, 8, 3),
    _Shape(16, 32, 4, 2),
)


@triton.jit
def _tile_of(offsets, spans, tile, SIZE: tl.constexpr, FACTOR: tl.constexpr, SPANS: tl.constexpr):
    """(span, its tile) of the `tile`-th of all tiles of SIZE / FACTOR elements; span = spans past the end."""
    span, before, carry = 0, 0, 0
    for first in range(0, spans, SPANS):
        s = first + tl.arange(0, SPANS)
        there = s < spans
        length = tl.load(offsets + s + 1, mask=there, other=0) - tl.load(offsets + s, mask=there, other=0)
        tiles = (length * FACTOR + SIZE - 1) // SIZE
        ends = carry + tl.cumsum(tiles, axis=0)
        passed = there & (ends <= tile)
        span += tl.sum(passed.to(tl.int32), axis=0)
        before = tl.maximum(before, tl.max(tl.where(passed, ends, 0), axis=0))
        carry += tl.sum(tiles, axis=0)
    return span, tile - before


@triton.jit
def _part(base, offset, there, first, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """[rows, WIDTH]: columns first .. first + WIDTH of rows at `offset` elements, 0 beyond DIM."""
    column = first + tl.arange(0, WIDTH)
    return tl.load(base + offset[:, None] + column[None, :], mask=there[:, None] & (column < DIM)[None, :], other=0.0)


@triton.jit
def _product(left, left_rest, right, right_rest, LOW: tl.constexpr):
    out = tl.dot(left, tl.trans(right), input_precision="ieee")
    if LOW:
        out = tl.dot(left_rest, tl.trans(right_rest), out, input_precision="ieee")
    return out


@triton.jit
def _place_of_key(slots, key, there, SLOTS: tl.constexpr):
    return tl.load(slots + key, mask=there, other=0).to(tl.int64) if SLOTS else key.to(tl.int64)


@triton.jit
def attention_scores_kernel(
    queries, keys, logsumexp, slots, offsets, row_offsets, out, spans,
    query_row, query_head, key_row, key_head, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DEPTH: tl.constexpr,
    TILE: tl.constexpr, ROWS: tl.constexpr, SPANS: tl.constexpr, SLOTS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    span, tile = _tile_of(offsets, spans, tl.program_id(0), TILE, 1, SPANS)
    if span >= spans:
        return
    key = tl.load(offsets + span) + tile * TILE + tl.arange(0, TILE)
    there = key < tl.load(offsets + span + 1)
    place = _place_of_key(slots, key, there, SLOTS) * key_row
    first_row, last_row = span, span + 1
    if RAGGED:
        first_row, last_row = tl.load(row_offsets + span), tl.load(row_offsets + span + 1)
    pairs = (last_row - first_row) * GROUP
    total = tl.zeros((TILE,), tl.float32)
    for head in range(KV_HEADS):
        own_keys = keys + head * key_head
        for first in range(0, pairs, ROWS):
            pair = first + tl.arange(0, ROWS)
            real = pair < pairs
            row, own_head = (first_row + pair // GROUP).to(tl.int64), head * GROUP + pair % GROUP
            offset = row * query_row + own_head * query_head
            lse = tl.load(logsumexp + row * (KV_HEADS * GROUP) + own_head, mask=real, other=float("-inf"))
            logits = tl.zeros((ROWS, TILE), tl.float32)
            for depth in range(0, DIM, DEPTH):
                q = _part(queries, offset, real, depth, DEPTH, DIM)
                k = _part(own_keys, place, there, depth, DEPTH, DIM)
                logits = tl.dot(q, tl.trans(k), logits, input_precision="ieee")
            logits *= scale
            counts = (lse > float("-inf"))[:, None]
            total += tl.sum(tl.where(counts, tl.exp(logits - tl.where(counts, lse[:, None], 0.0)), 0.0), axis=0)
    weight = tl.maximum(pairs, 1) * KV_HEADS
    tl.store(out + key, tl.div_rn(total, tl.zeros((TILE,), tl.float32) + weight), mask=there)


@triton.jit
def logsumexp_kernel(
    queries, keys, slots, offsets, row_offsets, out, spans,
    query_row, query_head, key_row, key_head, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr,
    TILE: tl.constexpr, ROWS: tl.constexpr, SPANS: tl.constexpr, SLOTS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    if RAGGED:
        span, tile = _tile_of(row_offsets, spans, tl.program_id(0), ROWS, GROUP, SPANS)
        if span >= spans:
            return
        first_row, last_row = tl.load(row_offsets + span), tl.load(row_offsets + span + 1)
    else:
        tiles: tl.constexpr = (GROUP + ROWS - 1) // ROWS
        span, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
        first_row, last_row = span, span + 1
    pair = tile * ROWS + tl.arange(0, ROWS)
    real = pair < (last_row - first_row) * GROUP
    row, own_head = (first_row + pair // GROUP).to(tl.int64), head * GROUP + pair % GROUP
    offset = row * query_row + own_head * query_head
    q = _part(queries, offset, real, 0, HIGH, DIM)
    q_rest = _part(queries, offset, real, HIGH, LOW, DIM) if LOW else q
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    last_key = tl.load(offsets + span + 1)
    for first in range(tl.load(offsets + span), last_key, TILE):
        key = first + tl.arange(0, TILE)
        there = key < last_key
        place = _place_of_key(slots, key, there, SLOTS) * key_row
        k = _part(keys + head * key_head, place, there, 0, HIGH, DIM)
        k_rest = _part(keys + head * key_head, place, there, HIGH, LOW, DIM) if LOW else k
        logits = tl.where(there[None, :], _product(q, q_rest, k, k_rest, LOW) * scale, float("-inf"))
        higher = tl.maximum(peak, tl.max(logits, axis=1))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(logits - higher[:, None]), axis=1)
        peak = higher
    total = tl.maximum(total, 1.0, propagate_nan=tl.PropagateNan.ALL)  # it is, unless there is no key
    tl.store(out + row * (KV_HEADS * GROUP) + own_head, peak + tl.log(total), mask=real)


@triton.jit
def column_scores_kernel(
    q, k, logsumexp, cu_seqlens, partials, spans, total_rows,
    query_row, query_head, key_row, key_head, lse_head, lse_row, scale,
    DIM: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr,
    TILE: tl.constexpr, ROWS: tl.constexpr, SPANS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    span, tile = _tile_of(cu_seqlens, spans, tl.program_id(0), TILE, 1, SPANS)
    if span >= spans:
        return
    start, stop = tl.load(cu_seqlens + span), tl.load(cu_seqlens + span + 1)
    key = start + tile * TILE + tl.arange(0, TILE)
    there = key < stop
    place = key.to(tl.int64) * key_row
    right = _part(k + head * key_head, place, there, 0, HIGH, DIM)
    right_rest = _part(k + head * key_head, place, there, HIGH, LOW, DIM) if LOW else right
    sums = tl.zeros((ROWS, TILE), tl.float32)
    for first in range(start, stop, ROWS):
        row = first + tl.arange(0, ROWS)
        real = row < stop
        offset = row.to(tl.int64) * query_row
        left = _part(q + head * query_head, offset, real, 0, HIGH, DIM)
        left_rest = _part(q + head * query_head, offset, real, HIGH, LOW, DIM) if LOW else left
        lse = tl.load(logsumexp + head * lse_head + row.to(tl.int64) * lse_row, mask=real, other=float("inf"))
        sums += tl.exp(_product(left, left_rest, right, right_rest, LOW) * scale - lse[:, None])
    tl.store(partials + head.to(tl.int64) * total_rows + key, tl.sum(sums, axis=0), mask=there)


@triton.jit
def sum_heads_kernel(partials, out, heads, total_rows, TILE: tl.constexpr):
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    there = row < total_rows
    total = tl.zeros((TILE,), tl.float32)
    for head in range(heads):
        total += tl.load(partials + tl.cast(head, tl.int64) * total_rows + row, mask=there, other=0.0)
    tl.store(out + row, total, mask=there)


def attention_scores(queries, keys, logsumexp, offsets, slots, row_offsets, scale: float, out: torch.Tensor) -> None:
    """queries: [R, Hq, d], keys: [T, Hk, d], contiguous in d. logsumexp: [R, Hq], contiguous. out: [sum N], written."""
    heads, dim = queries.shape[1:]
    kv_heads, spans = keys.shape[1], len(offsets) - 1
    if len(out) == 0:
        return
    shape = _shape(queries.dtype, few_rows=True)
    with torch.cuda.device_of(queries):
        attention_scores_kernel[(triton.cdiv(len(out), shape.columns) + spans,)](
            queries, keys, logsumexp, slots, offsets, row_offsets, out, spans,
            *queries.stride()[:2], *keys.stride()[:2], scale,
            KV_HEADS=kv_heads, GROUP=heads // kv_heads, DIM=dim, DEPTH=_depth(queries.dtype, dim),
            TILE=shape.columns, ROWS=shape.rows,
            SPANS=SPANS, SLOTS=slots is not None, RAGGED=row_offsets is not None,
            num_warps=shape.num_warps, num_stages=shape.num_stages,
        )  # fmt: skip


def logsumexp(queries, keys, offsets, slots, row_offsets, scale: float, out: torch.Tensor) -> None:
    """As `attention_scores`; out: [R, Hq], written."""
    heads, dim = queries.shape[1:]
    kv_heads, spans = keys.shape[1], len(offsets) - 1
    group = heads // kv_heads
    shape = _shape(queries.dtype, few_rows=row_offsets is None or group > 1)
    tiles = triton.cdiv(len(queries) * group, shape.rows) + spans
    if row_offsets is None:
        tiles = spans * triton.cdiv(group, shape.rows)
    if out.numel() == 0:
        return
    with torch.cuda.device_of(queries):
        logsumexp_kernel[(tiles, kv_heads)](
            queries, keys, slots, offsets, row_offsets, out, spans,
            *queries.stride()[:2], *keys.stride()[:2], scale,
            KV_HEADS=kv_heads, GROUP=group, **_dims(dim), TILE=shape.columns, ROWS=shape.rows, SPANS=SPANS,
            SLOTS=slots is not None, RAGGED=row_offsets is not None,
            num_warps=shape.num_warps, num_stages=shape.num_stages,
        )  # fmt: skip


def column_scores(q, k, logsumexp, cu_seqlens, scale: float, out: torch.Tensor) -> None:
    """q, k: [P, H, d], contiguous in d. logsumexp: [H, P]. out: [P], written."""
    total, heads, dim = q.shape
    spans = len(cu_seqlens) - 1
    if total == 0:
        return
    shape = _FLOAT32 if q.dtype == torch.float32 else _COLUMNS
    partials = out.new_empty(heads, total)
    with torch.cuda.device_of(q):
        column_scores_kernel[(triton.cdiv(total, shape.columns) + spans, heads)](
            q, k, logsumexp, cu_seqlens, partials, spans, total,
            *q.stride()[:2], *k.stride()[:2], *logsumexp.stride(), scale,
            **_dims(dim), TILE=shape.columns, ROWS=shape.rows, SPANS=SPANS,
            num_warps=shape.num_warps, num_stages=shape.num_stages,
        )  # fmt: skip
        sum_heads_kernel[(triton.cdiv(total, SUM_TILE),)](partials, out, heads, total, TILE=SUM_TILE)


def _shape(dtype: torch.dtype, few_rows: bool) -> _Shape:
    """few_rows: one query row a span or a few, which fill a tile with the heads of a group."""
    if dtype == torch.float32:
        return _FLOAT32
    return _FEW_ROWS if few_rows else _MANY_ROWS


def _depth(dtype: torch.dtype, dim: int) -> int:
    """Dimensions that attention_scores multiplies at once: few in float32, which would spill."""
    return 64 if dtype != torch.float32 and dim % 64 == 0 else 16


def _dims(dim: int) -> dict[str, int]:
    """dim as a power of two and a rest that is one as well, each at least 16, the least that a product takes."""
    high = max(16, 1 << (dim.bit_length() - 1))
    return {"DIM": dim, "HIGH": high, "LOW": max(16, triton.next_power_of_2(dim - high)) if dim > high else 0}


def _targets() -> list[TritonTarget]:
    """The head dimensions of decoders (64, 128) and towers (80), and one with a rest of a rest."""
    strides = ("query_row", "query_head", "key_row", "key_head")
    targets = []
    for dtype, dim, group in (("bf16", 128, 7), ("fp16", 64, 1), ("bf16", 72, 1), ("fp32", 128, 7), ("fp32", 80, 1)):
        torch_dtype = torch.float32 if dtype == "fp32" else torch.bfloat16
        pointers = {"queries": f"*{dtype}", "keys": f"*{dtype}", "slots": "*i64", "offsets": "*i32"}
        pointers |= {"row_offsets": "*i32", "out": "*fp32", "spans": "i32", "scale": "fp32"}
        pointers |= dict.fromkeys(strides, "i32")
        constants: dict[str, Any] = {"KV_HEADS": 4, "GROUP": group, "DIM": dim, "SPANS": SPANS}
        constants |= {"SLOTS": True, "RAGGED": True}
        matrix = dtype != "fp32"
        for kernel, few_rows in ((attention_scores_kernel, True), (logsumexp_kernel, group > 1)):
            shape = _shape(torch_dtype, few_rows)
            depths = {"DEPTH": _depth(torch_dtype, dim)} if kernel is attention_scores_kernel else _dims(dim)
            fixed = {**constants, **depths, "TILE": shape.columns, "ROWS": shape.rows}
            scores = {**pointers, "logsumexp": "*fp32"} if kernel is attention_scores_kernel else pointers
            name = f"{kernel.__name__.removesuffix('_kernel')}_{dtype}_{dim}_{group}"
            options: dict[str, Any] = dict(num_warps=shape.num_warps, num_stages=shape.num_stages, matrix=matrix)
            targets.append(TritonTarget(name, kernel, scores, fixed, strides, **options))
        if group > 1:
            continue
        shape = _FLOAT32 if dtype == "fp32" else _COLUMNS
        options = dict(num_warps=shape.num_warps, num_stages=shape.num_stages, matrix=matrix)
        columns = {"q": f"*{dtype}", "k": f"*{dtype}", "logsumexp": "*fp32", "cu_seqlens": "*i32"}
        columns |= {"partials": "*fp32", "scale": "fp32"}
        columns |= dict.fromkeys(("spans", "total_rows", *strides, "lse_head", "lse_row"), "i32")
        fixed = {**_dims(dim), "SPANS": SPANS, "TILE": shape.columns, "ROWS": shape.rows}
        targets.append(
            TritonTarget(f"column_scores_{dtype}_{dim}", column_scores_kernel, columns, fixed, strides, **options)
        )
    sums = {"partials": "*fp32", "out": "*fp32", "heads": "i32", "total_rows": "i32"}
    targets.append(TritonTarget("sum_heads", sum_heads_kernel, sums, {"TILE": SUM_TILE}))
    return targets


TARGETS = _targets()
